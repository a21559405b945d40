"""Tensors of files, fetched: whole, chosen, resumed; and servers and clients that do not mean well."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devmem_tcp.arrays import array_type
from devmem_tcp.contract import Nic
from devmem_tcp.errors import (
    AuthenticationFailed,
    BrokenError,
    DevmemError,
    OutOfDeviceMemory,
    RemoteProtocolError,
    StaleFragError,
    Timeout,
)
from devmem_tcp.memory.host import Host, HostBuffer
from devmem_tcp.safetensors.asking import MAX_INDEXES, AskTensors, encode_ask, take_answer
from devmem_tcp.safetensors.catalog import Catalog
from devmem_tcp.safetensors.fetching import fetch_tensors, list_tensors
from devmem_tcp.safetensors.remote import FetchProgress, open_remote
from devmem_tcp.safetensors.serving import serve_tensors
from devmem_tcp.safetensors.source_file import SourceFile
from devmem_tcp.sansio.frames import ChecksumKind
from devmem_tcp.transport import open_receiver
from devmem_tcp.transport.checksums import available_checksums
from devmem_tcp.transport.delivery import StagedSource
from devmem_tcp.transport.sending import MessageHeader, SenderLink
from devmem_tcp.types import Address
from fetch_ends import METADATA, MIB, blocks, client_nic, contents, lying, serving
from safetensors_files import Tensors, some_tensors, write_file

KEY = b"sixteen bytes or more of a secret"


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    first = write_file(tmp_path / "a.safetensors", some_tensors("a.") | blocks(3, 2 * MIB + 5, "a.big"), METADATA)
    second = write_file(tmp_path / "b.safetensors", some_tensors("b.", 9) | blocks(40, 700, "b.small"), METADATA)
    return [first, second]


def fetched_bytes(nic: Nic, to: Address, **options: Any) -> dict[str, bytes]:
    with fetch_tensors(nic, to, **options) as fetched:
        return {name: message.gather().tobytes() for name, message in fetched.items()}


# --- what comes ---


@pytest.mark.parametrize("lanes", [1, 3])
def test_tensors_of_several_files_arrive_in_device_memory(files: list[Path], lanes: int) -> None:
    wanted = contents(*files)
    with serving(*files) as served, client_nic() as nic, fetch_tensors(nic, served.address, lanes=lanes) as got:
        assert list(got) == list(wanted)
        for name, (dtype, shape, data) in wanted.items():
            assert (array_type(got[name].dtype).safetensors, got[name].shape) == (dtype, shape)
            assert got[name].gather().tobytes() == data
        summary = got.summary
        assert (summary.tensors, summary.bytes) == (len(wanted), sum(len(data) for _, _, data in wanted.values()))
        assert summary.dmabuf_bytes + summary.linear_bytes + summary.host_bytes == summary.bytes
        assert (summary.backend, summary.peer_backend) == ("software", "software")
        assert summary.checksum == ("xxh3" if ChecksumKind.XXH3 in available_checksums() else "")
        listed, session = served.sessions(2)
    assert (listed.tensors, session.tensors) == (0, len(wanted))
    assert session.dmabuf_bytes == session.bytes == summary.bytes


def test_only_what_matches_comes(files: list[Path]) -> None:
    wanted = {name: data for name, (_, _, data) in contents(*files).items() if name.startswith(("a.lay", "b.small.1"))}
    with serving(*files) as served, client_nic() as nic:
        assert fetched_bytes(nic, served.address, only=["a.layers.*", "b.small.1*"]) == wanted
        with pytest.raises(ValueError, match=r"no tensor matches 'a\.layer\.0\.weight'; near names: 'a\.layers"):
            fetch_tensors(nic, served.address, only=["a.layer.0.weight"])
        assert list_tensors(nic, served.address).total_bytes == served.server.catalog.total_bytes


def test_more_tensors_than_a_receiver_holds_messages(tmp_path: Path) -> None:
    tensors = blocks(2500, 10)
    with serving(write_file(tmp_path / "many", tensors)) as served, client_nic() as nic:
        assert fetched_bytes(nic, served.address) == {name: data for name, (_, _, data) in tensors.items()}


def test_tensors_outlive_the_session_and_end_with_the_fetched(files: list[Path]) -> None:
    with client_nic() as nic:
        with serving(*files) as served:
            fetched = fetch_tensors(nic, served.address, only=["a.*"])
        wanted = contents(files[0])
        for name, message in fetched.items():
            assert message.gather().tobytes() == wanted[name][2]
        kept = fetched["a.big.0"].gather().numpy()
        fetched.close()
        fetched.close()
        assert kept.tobytes() == wanted["a.big.0"][2]
        with pytest.raises(StaleFragError):
            fetched["a.big.1"].gather()


def test_into_arrays_of_the_callers(files: list[Path]) -> None:
    wanted = contents(files[0])
    into = {"a.big.1": np.zeros(2 * MIB + 5, np.uint8), "a.layers.0.weight": np.zeros((5, 7), np.float32), "other": 1}
    with serving(files[0]) as served, client_nic() as nic:
        with fetch_tensors(nic, served.address, into=into) as fetched:
            assert fetched["a.big.1"].path.copied == 2 * MIB + 5
            assert fetched["a.big.0"].gather().tobytes() == wanted["a.big.0"][2]
        with pytest.raises(ValueError, match="has 4 bytes, the message 140"):
            fetch_tensors(nic, served.address, into={"a.layers.0.weight": np.zeros(1, np.float32)})
        with pytest.raises(ValueError, match="not both"):
            fetch_tensors(nic, served.address, out="x", into={})
    for name in ("a.big.1", "a.layers.0.weight"):
        assert into[name].tobytes() == wanted[name][2]  # type: ignore[attr-defined]


def test_what_asks_for_the_catalog_is_of_the_memory_given_too(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, allocated = Host(), list[int]()
    allocate = given.allocate

    def count(size_bytes: int) -> HostBuffer:
        allocated.append(size_bytes)
        return allocate(size_bytes)

    monkeypatch.setattr(given, "allocate", count)
    with serving(*files) as served, client_nic() as nic:
        fetch_tensors(nic, served.address, memory=given).close()
    assert len(allocated) == 2


def test_what_the_buffer_cannot_hold_is_said_before_it_is_sent(files: list[Path]) -> None:
    with serving(*files) as served, client_nic() as nic:
        with pytest.raises(OutOfDeviceMemory, match="do not fit"):
            fetch_tensors(nic, served.address, size=2 * MIB)
        assert served.sessions(1)[0].tensors == 0


# --- into a file ---


@pytest.mark.parametrize(("size", "hostile"), [(MIB // 4, None), (64 * MIB, None), (4 * MIB, 3)])
def test_a_file_of_all_tensors(files: list[Path], tmp_path: Path, size: int, hostile: int | None) -> None:
    out = tmp_path / "out"
    told: list[FetchProgress] = []
    with serving(*files) as served, client_nic(hostile) as nic:
        summary = fetch_tensors(nic, served.address, out=out, size=size, progress=told.append)
        with pytest.raises(FileExistsError):
            fetch_tensors(nic, served.address, out=out, size=size)
        fetch_tensors(nic, served.address, only=["a.*"], out=out, size=size, overwrite=True)
    assert contents(out) == contents(files[0])
    assert summary.bytes == told[-1].bytes == told[-1].all_bytes
    assert (told[0].tensors, told[-1].tensors) == (0, summary.tensors)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors", "out"]
    with SourceFile(out) as file:
        assert file.metadata == METADATA


def test_no_tensors_at_all_make_a_file(tmp_path: Path) -> None:
    with serving(write_file(tmp_path / "empty", {}, METADATA)) as served, client_nic() as nic:
        assert fetch_tensors(nic, served.address, out=tmp_path / "out").tensors == 0
        assert fetched_bytes(nic, served.address) == {}
    assert contents(tmp_path / "out") == {}


class Enough(Exception):
    """Raised by a test where it wants a fetch to end."""


def stop_at(tensors: int, act: Callable[[], object]) -> Callable[[FetchProgress], None]:
    def progress(told: FetchProgress) -> None:
        if told.tensors >= tensors:
            act()

    return progress


def give_up() -> None:
    raise Enough


def test_a_fetch_that_ended_early_is_resumed(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(*files) as served, client_nic() as nic:
        with pytest.raises(Enough):
            fetch_tensors(nic, served.address, out=out, progress=stop_at(7, give_up))
        summary = fetch_tensors(nic, served.address, out=out)
    assert (summary.resumed_tensors, summary.tensors) == (7, len(contents(*files)) - 7)
    assert summary.bytes + summary.resumed_bytes == sum(len(data) for _, _, data in contents(*files).values())
    assert contents(out) == contents(*files)


def test_a_fetch_is_resumed_from_another_server_of_the_same_files(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with client_nic() as nic:
        with serving(*files) as served:

            def end_server() -> None:
                served.stop()
                served.server.close()

            with pytest.raises(BrokenError, match="the server was stopped"):
                fetch_tensors(nic, served.address, out=out, size=MIB, progress=stop_at(6, end_server))
        with serving(*files) as served:
            assert fetch_tensors(nic, served.address, out=out).resumed_tensors >= 6
    assert contents(out) == contents(*files)


# --- a file that changes ---


def test_a_file_that_changed_is_refused_in_words(files: list[Path], tmp_path: Path) -> None:
    with serving(*files) as served, client_nic() as nic:
        os.utime(files[1], ns=(0, 1_000_000_000))
        with pytest.raises(BrokenError, match=r"refused: b\.safetensors has changed on the server's disk"):
            fetch_tensors(nic, served.address, out=tmp_path / "out")
        assert fetched_bytes(nic, served.address, only=["a.*"]).keys() == contents(files[0]).keys()
        files[0].unlink()
        with pytest.raises(BrokenError, match=r"a\.safetensors has changed"):
            fetch_tensors(nic, served.address)


def test_a_file_that_changes_while_it_is_sent_is_sent_no_further(tmp_path: Path) -> None:
    source = write_file(tmp_path / "source", blocks(60, MIB))
    with serving(source) as served, client_nic() as nic:
        act = stop_at(3, lambda: os.utime(source, ns=(0, 1_000_000_000)))
        with pytest.raises(BrokenError, match="source has changed on the server's disk since it was started: start it"):
            fetch_tensors(nic, served.address, out=tmp_path / "out", size=2 * MIB, progress=act)
        (session,) = served.sessions(1)
    assert session.tensors < 60
    assert "has changed" in session.error


def test_files_that_do_not_go_together_or_change_at_once(files: list[Path], tmp_path: Path) -> None:
    with client_nic() as nic:
        with pytest.raises(ValueError, match="serve one of them"):
            serve_tensors(nic, [files[0], files[0]], listen=("127.0.0.1", 0))
        with pytest.raises(DevmemError, match="No such file"):
            serve_tensors(nic, [tmp_path / "none"], listen=("127.0.0.1", 0))
        with pytest.raises(ValueError, match="8 clients of 4 lanes need 67108864"):
            serve_tensors(nic, files, listen=("127.0.0.1", 0), size=8 * MIB)


# --- several clients ---


def test_clients_at_once_and_one_that_reads_nothing(tmp_path: Path) -> None:
    tensors = blocks(30, MIB)
    wanted = {name: data for name, (_, _, data) in tensors.items()}
    got: list[dict[str, bytes]] = []

    def fetch(to: Address) -> None:
        with client_nic() as nic:
            got.append(fetched_bytes(nic, to))

    with serving(write_file(tmp_path / "source", tensors), max_peers=4) as served, client_nic() as nic:
        with open_remote(nic, served.address, size=MIB) as idle:
            stuck = iter(idle.receive(idle.catalog.entries))
            next(stuck).release()  # all thirty are asked for, and nobody reads them
            threads = [threading.Thread(target=fetch, args=(served.address,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            rest = [message.gather().tobytes() for message in stuck if not message.released]
        sessions = served.sessions(7)
    assert got == [wanted] * 3
    assert rest == list(wanted.values())[1:]
    assert sorted(session.tensors for session in sessions) == [0, 0, 0, 30, 30, 30, 30]


# --- strangers, and clients that do not mean well ---


def test_a_wrong_key(files: list[Path]) -> None:
    with serving(*files, key=KEY) as served, client_nic() as nic:
        with pytest.raises(AuthenticationFailed):
            list_tensors(nic, served.address, key=KEY[::-1])
        assert list_tensors(nic, served.address, key=KEY).entries
        assert served.server.refused == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (encode_ask(AskTensors((50, 9999))), "there is no tensor 9999: the catalog has 53"),
        (b"", "this is no request for tensors"),
        (b'{"ask":"everything"}', "this is no request for tensors"),
        (b'{"ask":"tensors","indexes":[]}', "this is no request for tensors"),
        (b'{"ask":"tensors","indexes":[-1]}', "this is no request for tensors"),
        (b'{"ask":"tensors","indexes":[0],"more":1}', "this is no request for tensors"),
        (b'{"ask":"tensors","indexes":[' + b"0," * MAX_INDEXES + b"0]}", "this is no request for tensors"),
        (b"[" * 60_000, "this is no request for tensors"),
    ],
)
def test_hostile_requests_are_refused_and_cost_nobody_else(files: list[Path], body: bytes, words: str) -> None:
    with (
        serving(*files) as served,
        client_nic() as nic,
        client_nic() as other_nic,
        open_receiver(nic, to=served.address, size=MIB) as receiver,
    ):
        answer = receiver.request(body, 5.0)
        with pytest.raises(BrokenError, match=f"the server refused: {words}"):
            take_answer(answer)
        assert fetched_bytes(other_nic, served.address, only=["a.layers.1.mask"])


def test_a_client_that_leaves_in_the_middle_costs_nobody_else(tmp_path: Path) -> None:
    source = write_file(tmp_path / "source", blocks(20, MIB))
    with serving(source, max_peers=2) as served, client_nic() as nic:
        for _ in range(5):
            with suppress(Enough), open_remote(nic, served.address, size=MIB) as remote:
                next(iter(remote.receive(remote.catalog.entries))).release()
                raise Enough
        assert len(fetched_bytes(nic, served.address)) == 20


# --- servers that do not mean well ---


@pytest.fixture
def small(tmp_path: Path) -> tuple[Tensors, Catalog]:
    tensors: Tensors = {"a": ("U8", (5,), b"aaaaa"), "b": ("U8", (0,), b""), "c": ("U8", (5,), b"ccccc")}
    with SourceFile(write_file(tmp_path / "small", tensors)) as file:
        return tensors, Catalog.of([file])


def send(link: SenderLink, name: str, data: bytes, shape: tuple[int, ...] = (5,)) -> None:
    header = MessageHeader(name, array_type("uint8"), shape, len(data))
    link.begin(header, StagedSource(link.outbox, memoryview(data), link.piece_bytes))
    link.push()


@pytest.mark.parametrize(
    "sent", [["c"], ["x"], ["b"], ["a", "a"], ["a", "c"], ["a", "b", "b"]], ids=lambda names: "".join(names)
)
def test_what_was_not_asked_for_is_not_taken(small: tuple[Tensors, Catalog], sent: list[str], tmp_path: Path) -> None:
    tensors, catalog = small

    def tell(link: SenderLink, indexes: Sequence[int]) -> None:
        for name in sent:
            _, shape, data = tensors.get(name, ("U8", (5,), b"xxxxx"))
            send(link, name, data, shape)

    with (
        lying(catalog, tell) as address,
        client_nic() as nic,
        pytest.raises(RemoteProtocolError, match="the server sen"),
    ):
        fetch_tensors(nic, address, out=tmp_path / "out", timeout_s=5.0)
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_another_shape_is_not_taken(small: tuple[Tensors, Catalog]) -> None:
    tell: Callable[[SenderLink, Sequence[int]], None] = lambda link, indexes: send(link, "a", b"aaaaa", (5, 1))  # noqa: E731
    with (
        lying(small[1], tell) as address,
        client_nic() as nic,
        pytest.raises(RemoteProtocolError, match="asked for so"),
    ):
        fetch_tensors(nic, address, size=MIB, timeout_s=5.0)


def test_a_server_that_sends_nothing(small: tuple[Tensors, Catalog]) -> None:
    with lying(small[1], lambda link, indexes: None) as address, client_nic() as nic, pytest.raises(Timeout):
        fetch_tensors(nic, address, size=MIB, timeout_s=0.3)


def test_a_server_that_leaves(small: tuple[Tensors, Catalog]) -> None:
    error = pytest.raises(BrokenError, match="the server left, with 3 tensors to send")
    with lying(small[1], lambda link, indexes: link.leave()) as address, client_nic() as nic, error:
        fetch_tensors(nic, address, size=MIB, timeout_s=5.0)


def test_no_catalog(small: tuple[Tensors, Catalog]) -> None:
    with lying(b"{}", lambda link, indexes: None) as address, client_nic() as nic, pytest.raises(RemoteProtocolError):
        list_tensors(nic, address)
