"""Fetch tensors from a server of safetensors files: into device memory, arrays of the caller's, or a file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final, overload

import msgspec

from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.closing import Closing
from devmem_tcp.contract import Nic
from devmem_tcp.errors import OutOfDeviceMemory
from devmem_tcp.safetensors.catalog import Catalog, CatalogEntry
from devmem_tcp.safetensors.remote import DEFAULT_LANES, DEFAULT_SIZE, Progress, RemoteTensors, open_remote
from devmem_tcp.safetensors.target_file import BLAKE2B, CHECKPOINT_BYTES, Digest, TargetFile
from devmem_tcp.sansio.frames import ChecksumKind
from devmem_tcp.transport.checksums import available_checksums, checksum_of
from devmem_tcp.transport.message import Message, writable_bytes
from devmem_tcp.types import PAGE_SIZE, Address

_SPARE_PAGES: Final = 64
_COPIED_SHARE: Final = 4  # a tensor of more than this part of the room goes straight to its file


class TensorFigures(msgspec.Struct, frozen=True):
    """One tensor fetched: when it was whole, in seconds from the start, and by which path its bytes came.

    ``copied`` of them were copied by the CPU on the way to where they are used; to a file, all are written besides.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    seconds: float
    dmabuf_bytes: int
    linear_bytes: int
    host_bytes: int
    copied_bytes: int
    checksum: str


class FetchSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A fetch that is complete. ``resumed``: what an earlier attempt had brought, not counted in the others."""

    tensors: int
    bytes: int
    resumed_tensors: int = 0
    resumed_bytes: int = 0
    seconds: float
    backend: str
    peer_backend: str
    checksum: str  #: what every tensor was verified with on arrival; nothing: an end has no library for it
    dmabuf_bytes: int
    linear_bytes: int
    host_bytes: int
    copied_bytes: int
    figures: tuple[TensorFigures, ...]


class Fetched(Mapping[str, Message], Closing):
    """Tensors in device memory, by name: each a Message, whose ``gather()`` is an array. ``with`` gives them back.

    Lifetime: the memory of each is held until ``close``, and after it by the arrays that were made of it.
    """

    def __init__(self, messages: dict[str, Message], summary: FetchSummary) -> None:
        self.summary: Final = summary
        self._messages = messages
        self._closed = False

    def __getitem__(self, name: str) -> Message:
        return self._messages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._messages)

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        self._closed = True
        for message in self._messages.values():
            message.release()


class Tally:
    """Figures of a fetch under way."""

    def __init__(self, remote: RemoteTensors) -> None:
        self._remote = remote
        self._began = time.monotonic()
        self._figures: list[TensorFigures] = []

    def add(self, message: Message) -> None:
        """Note a tensor that is where it is used."""
        path, seconds = message.path, time.monotonic() - self._began
        figures = TensorFigures(
            message.name,
            message.dtype,
            message.shape,
            message.nbytes,
            seconds,
            path.dmabuf,
            path.linear,
            path.host,
            path.copied,
            message.checksum.hex(),
        )
        self._figures.append(figures)

    def summary(self, *, resumed_tensors: int = 0, resumed_bytes: int = 0) -> FetchSummary:
        """Return the whole of it."""
        figures = tuple(self._figures)
        verified = bool(figures) and all(each.checksum for each in figures)
        return FetchSummary(
            tensors=len(figures),
            bytes=sum(each.bytes for each in figures),
            resumed_tensors=resumed_tensors,
            resumed_bytes=resumed_bytes,
            seconds=time.monotonic() - self._began,
            backend=self._remote.backend,
            peer_backend=self._remote.peer_backend,
            checksum=ChecksumKind.XXH3.value if verified else "",
            dmabuf_bytes=sum(each.dmabuf_bytes for each in figures),
            linear_bytes=sum(each.linear_bytes for each in figures),
            host_bytes=sum(each.host_bytes for each in figures),
            copied_bytes=sum(each.copied_bytes for each in figures),
            figures=figures,
        )


@overload
def fetch_tensors(
    nic: Nic,
    to: Address,
    *,
    only: Sequence[str] = (),
    out: None = None,
    into: Mapping[str, Any] | None = None,
    memory: Allocator | None = None,
    size: int | None = None,
    buffer: Buffer | None = None,
    lanes: int = DEFAULT_LANES,
    progress: Progress = ...,
    **options: Any,
) -> Fetched: ...
@overload
def fetch_tensors(
    nic: Nic,
    to: Address,
    *,
    only: Sequence[str] = (),
    out: str | PurePath,
    memory: Allocator | None = None,
    size: int | None = None,
    buffer: Buffer | None = None,
    lanes: int = DEFAULT_LANES,
    progress: Progress = ...,
    overwrite: bool = False,
    checkpoint_bytes: int = CHECKPOINT_BYTES,
    **options: Any,
) -> FetchSummary: ...
def fetch_tensors(
    nic: Nic,
    to: Address,
    *,
    only: Sequence[str] = (),
    out: str | PurePath | None = None,
    into: Mapping[str, Any] | None = None,
    memory: Allocator | None = None,
    size: int | None = None,
    buffer: Buffer | None = None,
    lanes: int = DEFAULT_LANES,
    progress: Progress = lambda progress: None,
    overwrite: bool = False,
    checkpoint_bytes: int = CHECKPOINT_BYTES,
    **options: Any,
) -> Fetched | FetchSummary:
    """Fetch tensors that ``devmem-tcp serve`` or ``serve_tensors`` offers.

    Args:
        to: (host, port) of the server.
        only: patterns as of a shell; a tensor comes if one matches its name. None given: all come.
        out: a file to write them to; each that is whole is kept, and not fetched again if this one ends early.
        into: arrays to copy tensors to, by name: writable, contiguous, of as many bytes. Others stay where they land.
        memory: Allocator of the Buffer that they land in; None: Udmabuf where the NIC needs a dma-buf, else Host.
        size: of the Buffer, in bytes; None: 64 MiB with ``out``, else as much as they need.
        buffer: bind this one instead; it stays the caller's.
        lanes: data connections, at most.
        progress: told how far it is, ten times a second and after each tensor.
        overwrite: whether ``out`` may be there already; it is replaced when all is complete.
        checkpoint_bytes: with ``out``: how much may have to be fetched again after a kill.
        options: key, insecure, tls, timeout_s, queues, strict, steer … : see ``open_remote``.

    Returns:
        Without ``out`` the tensors, held in device memory until they are closed; with it what was done.

    Raises:
        ValueError: a pattern matches nothing; an array of ``into`` does not fit; arguments that do not go together.
        OutOfDeviceMemory: the Buffer cannot hold them all.
        FileExistsError, BusyError, KernelError: what stands against ``out``.
        BrokenError, RemoteProtocolError, Timeout, ConnectionError …: as ``open_remote`` and ``RemoteTensors.receive``.
    """
    if out is not None:
        if into is not None:
            raise ValueError("give out= or into=, not both")
        bound: dict[str, Any] = {"memory": memory, "size": size or DEFAULT_SIZE, "buffer": buffer}
        with open_remote(nic, to, lanes=lanes, **bound, **options) as remote:
            chosen = remote.catalog.select(only)
            return store_tensors(
                remote, chosen, out, progress=progress, overwrite=overwrite, checkpoint_bytes=checkpoint_bytes
            )
    if size is None and buffer is None:
        catalog = list_tensors(nic, to, memory=memory, **options).select(only)
        placement = nic.capabilities.placement
        held = [entry for entry in catalog.entries if entry.name not in (into or {})]
        size = size_to_hold(held, placement=placement) + (DEFAULT_SIZE if into else 0)
    with open_remote(nic, to, lanes=lanes, memory=memory, size=size or 0, buffer=buffer, **options) as remote:
        return _hold_tensors(remote, remote.catalog.select(only), into or {}, progress)


def list_tensors(nic: Nic, to: Address, **options: Any) -> Catalog:
    """Return what a server offers. Args and errors as ``open_remote``."""
    with open_remote(nic, to, lanes=1, size=_SPARE_PAGES * PAGE_SIZE, **options) as remote:
        return remote.catalog


def size_to_hold(entries: Sequence[CatalogEntry], *, placement: bool) -> int:
    """Return how many bytes of Buffer hold tensors at a time.

    Three quarters of a Buffer are for messages where the backend places them, a quarter where they lie as packets fill
    pages (``transport.inbox.Share``).
    """
    pages = sum(-(-entry.nbytes // PAGE_SIZE) for entry in entries)
    return (_SPARE_PAGES + (-(-pages * 4 // 3) if placement else pages * 4)) * PAGE_SIZE


def store_tensors(
    remote: RemoteTensors,
    chosen: Catalog,
    out: str | PurePath,
    *,
    progress: Progress = lambda progress: None,
    overwrite: bool = False,
    checkpoint_bytes: int = CHECKPOINT_BYTES,
) -> FetchSummary:
    """Fetch tensors into a file, as far as an earlier attempt has not: see ``fetch_tensors``.

    Args:
        chosen: of ``remote.catalog``, by ``select``.
    """
    metadata = _metadata(chosen)
    with TargetFile(
        out, chosen, metadata, overwrite=overwrite, digest=_digest(), checkpoint_bytes=checkpoint_bytes
    ) as target:
        missing = set(target.missing())
        entries = [entry for entry in chosen.entries if entry.name in missing]
        done, done_bytes = len(chosen.entries) - len(entries), target.resumed
        large = remote.room_bytes // _COPIED_SHARE
        tally = Tally(remote)
        for message in remote.receive(
            entries,
            where=lambda entry: target.window(entry.name) if entry.nbytes > large else None,
            progress=lambda told: progress(
                told._replace(
                    tensors=told.tensors + done,
                    all_tensors=told.all_tensors + done,
                    bytes=told.bytes + done_bytes,
                    all_bytes=told.all_bytes + done_bytes,
                )
            ),
        ):
            with message:
                if message.nbytes <= large:
                    _write(target, message)
                tally.add(message)
                target.finish(message.name, message.checksum or None)
            del message  # and with it the view of its window
        target.complete()
        return tally.summary(resumed_tensors=done, resumed_bytes=done_bytes)


def _write(target: TargetFile, message: Message) -> None:
    offset = 0
    for piece in message.fragments():
        target.write(message.name, piece, offset)
        offset += len(piece)


def _hold_tensors(remote: RemoteTensors, chosen: Catalog, into: Mapping[str, Any], progress: Progress) -> Fetched:
    targets = {
        entry.name: writable_bytes(into[entry.name], entry.nbytes) for entry in chosen.entries if entry.name in into
    }
    wanted = sum(entry.nbytes for entry in chosen.entries if entry.name not in targets)
    if wanted > remote.room_bytes:
        raise OutOfDeviceMemory(
            f"{wanted} bytes of tensors do not fit the {remote.room_bytes} that the buffer holds",
            wanted=wanted,
            free=remote.room_bytes,
            hint="give a larger size= or none, choose fewer by only=, or fetch to a file by out=",
        )
    tally, messages = Tally(remote), dict[str, Message]()
    try:
        for message in remote.receive(chosen.entries, where=lambda entry: targets.get(entry.name), progress=progress):
            message.keep()
            tally.add(message)
            messages[message.name] = message
        return Fetched(messages, tally.summary())
    except BaseException:
        for message in messages.values():
            message.release()
        raise


def _digest() -> Digest:
    """Return how what is finished is checked when it is resumed: as on the wire, which costs nothing more."""
    if ChecksumKind.XXH3 not in available_checksums():
        return BLAKE2B
    return Digest(ChecksumKind.XXH3.value, lambda data: checksum_of(ChecksumKind.XXH3, (data,)))


def _metadata(chosen: Catalog) -> dict[str, str]:
    """Return what the files of tensors say about themselves, where they do not contradict each other."""
    files = [chosen.files[index].metadata for index in sorted({entry.file for entry in chosen.entries})]
    said: dict[str, set[str]] = {}
    for metadata in files:
        for key, value in metadata.items():
            said.setdefault(key, set()).add(value)
    return {key: values.pop() for key, values in said.items() if len(values) == 1}
