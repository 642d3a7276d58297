"""Stands in for Zulip's web server on 127.0.0.1:443 and answers wrongly.

    python3 - MODE     runs until it is killed
Modes: html400, html200, empty (hangs up), half (half an answer), silent, or an
HTTP status.
"""

import socket
import ssl
import sys
import threading

MODE = sys.argv[1]
ANSWER = b'{"result":"success","msg":""}'


def head(status: str, length: int) -> bytes:
    lines = (
        f"HTTP/1.1 {status} X",
        "Content-Type: text/html",
        f"Content-Length: {length}",
        "Connection: close",
        "",
        "",
    )
    return "\r\n".join(lines).encode()


def serve(raw: socket.socket) -> None:
    try:
        connection = context.wrap_socket(raw, server_side=True)
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(65536)
        headers, _, body = request.partition(b"\r\n\r\n")
        length = int(headers.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += connection.recv(65536)
        page = b"<html><body>5.1.1 This is no verdict</body></html>"
        if MODE == "html400":
            connection.sendall(head("400", len(page)) + page)
        elif MODE == "html200":
            connection.sendall(head("200", len(page)) + page)
        elif MODE == "half":
            connection.sendall(head("200", len(ANSWER)) + ANSWER[:9])
        elif MODE == "silent":
            threading.Event().wait(600)
        elif MODE != "empty":
            connection.sendall(head(MODE, len(page)) + page)
        connection.close()
    except OSError:
        pass


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/etc/ssl/certs/zulip.combined-chain.crt", "/etc/ssl/private/zulip.key")
with socket.create_server(("127.0.0.1", 443), reuse_port=False) as server:
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
