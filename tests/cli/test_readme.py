"""The program in the README runs as it stands there, and receives what a plain socket sends."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
SIZE = 5_000_000
LIMIT_S = 30.0


def program(port: int) -> str:
    accepting = "listener.accept() as sock"
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = (block.replace("5201", str(port)) for block in blocks if accepting in block)
    return text.replace(accepting, f"print('listening', flush=True) or {accepting}")


def test_the_program_of_the_readme() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "error", "-c", program(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "listening\n"
        with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as peer:
            peer.sendall(bytes(SIZE))
        out, err = child.communicate(timeout=LIMIT_S)
    assert (child.returncode, err) == (0, "")
    batches = [int(line.rpartition(" ")[2]) for line in out.splitlines() if line.startswith("[")]
    assert sum(batches) == SIZE
    assert f"dmabuf_bytes={SIZE}, linear_bytes=0, host_bytes=0" in out
