"""Stands in for Zulip's SMTP server on 127.0.0.1:10525 and answers wrongly.

    python3 - MODE     runs until it is killed
Modes: greet421, tls421 (after RCPT), data554 (after the message), cut (in DATA), close
(at once), silent.
"""

import socket
import sys
import threading

MODE = sys.argv[1]


def serve(connection: socket.socket) -> None:
    try:
        if MODE == "silent":
            threading.Event().wait(600)
        if MODE == "close":
            return
        connection.sendall(b"421 4.3.2 Too busy\r\n" if MODE == "greet421" else b"220 x Zulip Server 11.4\r\n")
        lines = connection.makefile("rb")
        for line in lines:
            command = line[:4].upper()
            if command == b"RCPT" and MODE == "tls421":
                connection.sendall(b"421 4.7.6 TLS error: WRONG_VERSION_NUMBER\r\n")
                return
            if command == b"DATA":
                connection.sendall(b"354 Go on\r\n")
                if MODE == "cut":
                    lines.readline()
                    return
                while lines.readline() not in (b".\r\n", b""):
                    pass
                connection.sendall(b"554 5.1.1 This is no verdict\r\n")
            else:
                connection.sendall(b"250 OK\r\n")
    except OSError:
        pass
    finally:
        connection.close()


with socket.create_server(("127.0.0.1", 10525)) as server:
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
