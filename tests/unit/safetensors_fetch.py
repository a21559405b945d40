"""A fetch into a file, for tests of ``TargetFile``: what a network would bring is a dict."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from devmem_tcp.errors import BusyError
from devmem_tcp.safetensors.catalog import Catalog
from devmem_tcp.safetensors.source_file import SourceFile
from devmem_tcp.safetensors.target_file import BLAKE2B, Digest, TargetFile
from safetensors_files import Tensors, some_tensors, write_file

TENSORS = some_tensors()
TOTAL = 9000 + 140 + 8 + 3
METADATA = {"format": "pt"}


def catalog_of(path: Path, tensors: Tensors) -> Catalog:
    """Return the catalog of a file of these tensors, which is always of the same time."""
    write_file(path, tensors, METADATA)
    os.utime(path, ns=(0, 1_000_000_000))
    with SourceFile(path) as file:
        return Catalog.of([file])


class Fetch:
    """Fetches tensors into ``folder``/out; what a network would bring is in ``tensors``."""

    def __init__(self, folder: Path, tensors: Tensors = TENSORS) -> None:
        self.folder = folder
        self.path = folder / "out"
        self.tensors = tensors
        self.catalog = catalog_of(folder.parent / f"{folder.name}-source", tensors)
        self.finished: list[str] = []  # in the last attempt, when finish() had returned

    def open(self, *, overwrite: bool = False, checkpoint_bytes: int = 0, digest: Digest = BLAKE2B) -> TargetFile:
        return TargetFile(
            self.path,
            self.catalog,
            METADATA,
            overwrite=overwrite,
            digest=digest,
            checkpoint_bytes=checkpoint_bytes,
        )

    def fill(self, file: TargetFile, names: list[str]) -> None:
        for name in names:
            file.window(name)[:] = self.tensors[name][2]
            file.finish(name)
            self.finished.append(name)

    def run(self) -> int:
        """Do all that is left to do; return how many bytes an earlier attempt had done."""
        self.finished = []
        with self.open() as file:
            self.fill(file, file.missing())
            file.complete()
        return file.resumed

    def some(self, number: int, *, checkpoint_bytes: int = 0) -> list[str]:
        """Finish some tensors, and leave it at that; return which."""
        with self.open(checkpoint_bytes=checkpoint_bytes) as file:
            names = file.missing()[:number]
            self.fill(file, names)
        return names

    def size_of(self, names: list[str]) -> int:
        return sum(len(self.tensors[name][2]) for name in names)

    def files(self) -> list[str]:
        return sorted(os.listdir(self.folder))

    def check_complete(self) -> None:
        assert self.files() == ["out"]
        with SourceFile(self.path) as file:
            assert file.metadata == METADATA
            assert {name: (each.dtype, each.shape, bytes(file.data(name))) for name, each in file.tensors.items()} == (
                self.tensors
            )


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked child; return its status, or minus the signal that ended it. Raises its BusyError."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BusyError:
            status = 2
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 2:
        raise BusyError("the child says so")
    return status
