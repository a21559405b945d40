"""``devmem-tcp serve`` and ``fetch`` at the two ends of the wire, and a file of tensors for them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from devmem_tcp.safetensors.source_file import SourceFile
from far_end import NETIF, FarEnd

MIB: Final = 1 << 20
PATIENCE_S: Final = 60.0
KEY: Final = b"the key that both ends of a test have"
PROGRAM: Final = (sys.executable, "-m", "devmem_tcp")
_END: Final = ("--buffer", "16M", "--lanes", "2", "--json", "--quiet")


class Command:
    """``devmem-tcp VERB``; it does not outlive the block."""

    def __init__(self, *arguments: str, program: Sequence[str] = PROGRAM) -> None:
        self.process = subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE)

    def event(self) -> dict[str, Any]:
        """Return the next thing that the command says; nothing, if it has ended."""
        assert self.process.stdout is not None
        event: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")
        return event

    def report(self) -> dict[str, Any]:
        """Wait for the end; returns the last thing that the command says."""
        last: dict[str, Any] = {}
        while event := self.event():
            last = event
        assert self.process.wait(PATIENCE_S) == 0
        return last

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.communicate(timeout=PATIENCE_S)


class Side:
    """Where a command runs, and what its NIC is.

    Args:
        backend: ``kernel`` is the NIC of that side.
        far: the other namespace; None: this one.
        options: more of the command line.
        program: other than this user's ``devmem-tcp``.
    """

    def __init__(
        self, backend: str, far: FarEnd | None = None, options: Sequence[str] = (), program: Sequence[str] = PROGRAM
    ) -> None:
        nic = "soft0" if backend == "software" else NETIF if far is None else far.nic()
        self.backend: Final = backend
        self._options = ("--backend", backend, "--nic", nic, *_END, *options)
        self._program = program if far is None else ("ip", "netns", "exec", far.namespace, *program)

    @contextlib.contextmanager
    def serving(self, host: str, *files: Path, options: Sequence[str] = ()) -> Iterator[tuple[Command, str]]:
        """Serve files; gives the command, and where it listens."""
        listen = f"[{host}]:0" if ":" in host else f"{host}:0"
        arguments = ("serve", *map(str, files), "--listen", listen, "--max-peers", "2", *options, *self._options)
        with Command(*arguments, program=self._program) as server:
            event = server.event()
            assert event.get("event") == "listening", server.process.wait(PATIENCE_S)
            yield server, listen[:-1] + str(event["port"])

    def fetching(self, server: str, *options: str) -> Command:
        """Fetch from who listens there."""
        limit = ("--timeout", str(PATIENCE_S))
        return Command("fetch", server, *options, *limit, *self._options, program=self._program)


def write_key(path: Path) -> tuple[str, str]:
    """Write the key that both ends have; returns the options that say so."""
    path.write_bytes(KEY)
    path.chmod(0o600)
    return ("--key-file", str(path))


def write_model(path: Path, sizes: dict[str, int]) -> Path:
    """Write a safetensors file of tensors of so many bytes, no two alike."""
    header: dict[str, Any] = {}
    end = 0
    for name, nbytes in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [nbytes // 2], "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    words = np.random.SFC64(5).random_raw(-(-end // 8))
    path.write_bytes(len(text).to_bytes(8, "little") + text + words.tobytes()[:end])
    return path


def hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a file."""
    with SourceFile(path) as file:
        return {name: hashlib.sha256(file.data(name)).hexdigest() for name in file.tensors}
