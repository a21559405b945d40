"""What ``nc -N HOST PORT`` does, where there is none: send stdin, end the sending side, write what comes to stdout."""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import Final

STEP_BYTES: Final = 1 << 20


def send(sock: socket.socket) -> None:
    while data := os.read(sys.stdin.fileno(), STEP_BYTES):
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def main() -> None:
    host, port = sys.argv[1:]
    with socket.create_connection((host, int(port))) as sock:
        sending = threading.Thread(target=send, args=(sock,), daemon=True)
        sending.start()
        while data := sock.recv(STEP_BYTES):
            sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
