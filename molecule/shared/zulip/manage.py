"""The stand-in's manage.py: email_mirror, and email_server (Zulip 11 and later)."""

from __future__ import annotations

import sys

import store

if __name__ == "__main__":
    command, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command == "email_server" and store.version() >= (11, 0):
        import email_server

        email_server.main(arguments)
    elif command == "email_mirror":
        import email_mirror

        email_mirror.main()
    else:
        sys.exit(f"Unknown command: {command!r}\nType 'manage.py help' for usage.")
