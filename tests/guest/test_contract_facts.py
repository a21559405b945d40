"""What Linux does, asked of Linux itself, where no other test does so: rows of docs/kernel-contract.md.

    devmem-tcp lab run --memory 2G --queues 6 -- .venv/bin/pytest tests/guest/test_contract_facts.py

Here are plain sockets and single system calls, for what the backend never does or checks before it asks. The NIC is
NETIF, driven by gve; the far end is in another network namespace.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pytest

import devmem_tcp as dmt
from devmem_tcp.buffers import Buffer
from devmem_tcp.errors import BindError, KernelError, NicSettingError
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.settings import NicSettings
from devmem_tcp.memory import Udmabuf
from devmem_tcp.sys import calls
from devmem_tcp.sys.netlink import GenericNetlink
from devmem_tcp.types import PAGE_SIZE, FlowRule, FragArray
from devmem_tcp.uapi import netdev as abi
from devmem_tcp.uapi.dmabuf import UDMABUF_CREATE, pack_udmabuf_create
from devmem_tcp.uapi.netdev import Command, QueueType
from devmem_tcp.uapi.netlink import attr_u32, nest
from devmem_tcp.uapi.socket import CMSGHDR, MSG_ZEROCOPY, SCM_DEVMEM_DMABUF, SO_ZEROCOPY, SOL_SOCKET, pack_tokens
from far_end import NEAR, NETIF, FarEnd
from plain_sockets import (
    MANY_FRAGS,
    PATIENCE_S,
    PORT,
    QUEUE,
    UNTOUCHED,
    Line,
    bound,
    bytes_of,
    completion,
    content,
    deliver,
    fd_of,
    give_back,
    ifindex,
    line,
    pieces,
    receive,
    refuse,
    run,
    send,
    tx_bound,
)
from xdp_by_netlink import generic_xdp

RSS_QUEUES: Final = 1  # RSS stays on queue 0
MIB: Final = 1 << 20
STALL_S: Final = 5
NOBODY: Final = 65534
NO_LINGER: Final = struct.pack("ii", 1, 0)  # close() sends a reset
RTO_MAX: Final = Path("/proc/sys/net/ipv4/tcp_rto_max_ms")


@pytest.fixture
def settings() -> Iterator[NicSettings]:
    """Header split on, RSS on queue 0, one port steered to the queue that is to be bound."""
    with NicSettings(NETIF) as made:
        made.set_header_split("on")
        made.set_rss(equal=RSS_QUEUES)
        made.add_ntuple(FlowRule(QUEUE, dst_port=PORT))
        yield made


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    with Udmabuf().allocate(4 * MIB) as made:
        yield made


# --- bind-rx ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("missing", "named"), [(abi.Dmabuf.IFINDEX, "ifindex"), (abi.Dmabuf.FD, "fd")])
def test_a_missing_attribute_is_named(buffer: Buffer, missing: abi.Dmabuf, named: str) -> None:
    queue = nest(abi.Dmabuf.QUEUES, attr_u32(abi.Queue.ID, QUEUE), attr_u32(abi.Queue.TYPE, QueueType.RX))
    whole = {
        abi.Dmabuf.IFINDEX: attr_u32(abi.Dmabuf.IFINDEX, ifindex()),
        abi.Dmabuf.QUEUES: queue,
        abi.Dmabuf.FD: attr_u32(abi.Dmabuf.FD, fd_of(buffer)),
    }
    wanted = [payload for kind, payload in whole.items() if kind != missing]
    with GenericNetlink(abi.FAMILY) as netlink, pytest.raises(KernelError) as caught:
        netlink.request(Command.BIND_RX, *wanted, attributes=abi.DMABUF_NAMES)
    assert (caught.value.errno, caught.value.attr) == (errno.EINVAL, named)


@pytest.mark.usefixtures("settings")
def test_a_queue_named_twice_counts_once(buffer: Buffer) -> None:
    queue = nest(abi.Dmabuf.QUEUES, attr_u32(abi.Queue.ID, QUEUE), attr_u32(abi.Queue.TYPE, QueueType.RX))
    wanted = [attr_u32(abi.Dmabuf.IFINDEX, ifindex()), attr_u32(abi.Dmabuf.FD, fd_of(buffer)), queue, queue]
    with GenericNetlink(abi.FAMILY) as netlink:
        dmabuf_id = netlink.request(Command.BIND_RX, *wanted, attributes=abi.DMABUF_NAMES).u32(abi.Dmabuf.ID)
        assert [one.queue for one in netdev.queues(ifindex()) if one.dmabuf_id == dmabuf_id] == [QUEUE]


@pytest.mark.usefixtures("settings")
def test_a_bound_queue_tells_its_binding_in_a_plain_u32_and_to_anybody(buffer: Buffer) -> None:
    which = [attr_u32(abi.Queue.IFINDEX, ifindex()), attr_u32(abi.Queue.TYPE, QueueType.RX)]
    with bound(buffer) as dmabuf_id:
        os.seteuid(NOBODY)
        try:
            with GenericNetlink(abi.FAMILY) as netlink:
                found = netlink.request(
                    Command.QUEUE_GET, *which, attr_u32(abi.Queue.ID, QUEUE), attributes=abi.QUEUE_NAMES
                )
            assert dmabuf_id in [pool.dmabuf_id for pool in netdev.page_pools(ifindex())]
        finally:
            os.seteuid(0)
    assert found.u32(abi.Queue.DMABUF) == dmabuf_id


def test_queue_0_of_gve_is_not_asked_for(settings: NicSettings, buffer: Buffer) -> None:
    """Were Linux asked, it would warn in its log, which fails the run."""
    settings.set_rss(table=[2])
    with dmt.open_nic(NETIF, backend="kernel") as nic, pytest.raises(BindError, match="for gve, 1 or higher") as caught:
        nic.bind_rx(buffer, [0])
    assert caught.value.errno == errno.ERANGE
    assert buffer.holders == ()


def test_an_xdp_program_keeps_queues_from_being_bound(settings: NicSettings, buffer: Buffer) -> None:
    with generic_xdp(NETIF, in_pieces=True), pytest.raises(BindError) as caught, bound(buffer):
        pass
    settings.ethtool.set_feature("rx-gro-hw", True)  # which the kernel turned off for it, and not on again
    assert caught.value.errno == errno.EEXIST
    assert caught.value.extack == "unable to custom memory provider to device with XDP program attached"
    assert "xdp off" in caught.value.hint


@pytest.mark.usefixtures("settings")
def test_what_binding_takes() -> None:
    with Udmabuf().allocate(64 * MIB) as large, GenericNetlink(abi.FAMILY) as netlink:
        started = time.monotonic()
        netdev.bind_tx(netlink, ifindex(), fd_of(large))
        sending = time.monotonic()
        netdev.bind_rx(netlink, ifindex(), fd_of(large), [QUEUE])
        receiving = time.monotonic()
    ended = time.monotonic()
    print(
        f"64 MiB: bind-tx {(sending - started) * 1e3:.0f} ms, bind-rx {(receiving - sending) * 1e3:.0f} ms, "
        f"unbinding both {(ended - receiving) * 1e3:.0f} ms"
    )
    assert ended - started < PATIENCE_S


def test_long_words_of_the_kernel_are_cut(buffer: Buffer) -> None:
    with GenericNetlink(abi.FAMILY) as netlink:
        with pytest.raises(BindError) as caught:
            netdev.bind_rx(netlink, ifindex(), fd_of(buffer), [QUEUE], rx_page_size=1)
        if caught.value.extack == "Unknown attribute type":
            return  # Linux 7.2 has no rx-page-size, and says nothing that long
        with Udmabuf().allocate(PAGE_SIZE) as small, pytest.raises(BindError) as caught:
            netdev.bind_rx(netlink, ifindex(), fd_of(small), [QUEUE], rx_page_size=2 * PAGE_SIZE)
    print(f"{len(caught.value.extack)} characters: {caught.value.extack!r}")
    assert len(caught.value.extack) < 80
    logged = [text for text in run("dmesg").splitlines() if "niov size" in text]
    print(logged)
    assert len(logged[-1].partition("dmabuf sg entry")[2]) > len(caught.value.extack.partition("dmabuf sg entry")[2])


# --- while it is bound ------------------------------------------------------------------------------------------------


def test_channels_stay_while_bound(settings: NicSettings, buffer: Buffer) -> None:
    last = settings.ethtool.rx_queues() - 1
    with bound(buffer, last), pytest.raises(NicSettingError) as caught:
        settings.set_channels(rx=last, tx=settings.ethtool.channels().tx)
    print(caught.value)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.extack


@pytest.mark.usefixtures("settings")
def test_a_queues_counters_start_anew_with_it(far: FarEnd, buffer: Buffer) -> None:
    def counted() -> int:
        (found,) = [
            one.counters["rx-bytes"]
            for one in netdev.queue_statistics(ifindex())
            if (one.type, one.queue) == (QueueType.RX, QUEUE)
        ]
        return found

    def napi() -> int | None:
        return next(one.napi_id for one in netdev.queues(ifindex()) if (one.type, one.queue) == (QueueType.RX, QUEUE))

    with bound(buffer), line(far) as on:
        before = napi()
        deliver(on, bytes(40_000))
        assert counted() >= 40_000
    assert counted() < 40_000
    assert napi() != before


@pytest.mark.usefixtures("settings")
def test_a_binding_outlives_the_link_going_down(far: FarEnd, buffer: Buffer, configure: Callable[[], None]) -> None:
    with bound(buffer) as dmabuf_id:
        run("ip", "link", "set", NETIF, "down")
        configure()
        assert [one.queue for one in netdev.queues(ifindex()) if one.dmabuf_id == dmabuf_id] == [QUEUE]
        with line(far) as on:
            deliver(on, b"0123456789")
            assert bytes_of(buffer, receive(on.near, 10).frags) == b"0123456789"


# --- receiving --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("settings")
def test_bytes_in_the_dmabuf_count_and_are_written_nowhere_else(far: FarEnd, buffer: Buffer) -> None:
    data = content(20_000)
    with bound(buffer) as dmabuf_id, line(far) as on:
        deliver(on, data)
        found = receive(on.near, len(data))
        assert found.taken == len(data) == int(found.frags["size"].sum())
        assert set(found.frags["dmabuf_id"].tolist()) == {dmabuf_id}
        assert bytes_of(buffer, found.frags) == data
        assert bytes(found.data) == UNTOUCHED * len(data)


@pytest.mark.usefixtures("settings")
def test_a_read_cut_short_for_want_of_control_space_does_not_say_so(far: FarEnd, buffer: Buffer) -> None:
    with bound(buffer), line(far) as on:
        deliver(on, content(40_000))
        found = receive(on.near, 40_000, max_frags=2)
        assert (len(found.frags), found.flags & calls.MSG_CTRUNC) == (2, 0)
        assert found.taken == int(found.frags["size"].sum()) < 40_000


@pytest.mark.usefixtures("settings")
def test_peeking_and_reading_nothing_hand_out_tokens(far: FarEnd, buffer: Buffer) -> None:
    with bound(buffer), line(far) as on:
        deliver(on, b"0123456789")
        peeked = receive(on.near, 10, flags=calls.MSG_PEEK)
        again = receive(on.near, 10, flags=calls.MSG_PEEK)
        nothing = receive(on.near, 0)
        taken = receive(on.near, 10)
        tokens = [found.frags["token"].tolist() for found in (peeked, again, nothing, taken)]
        print(tokens)
        assert len(set(peeked.frags["offset"].tolist() + again.frags["offset"].tolist())) == 1
        assert tokens == [[1], [2], [3], [4]]
        assert give_back(on.near, peeked.frags, again.frags, nothing.frags, taken.frags) == 4


def test_ordinary_and_devmem_data_never_come_in_one_call(far: FarEnd, settings: NicSettings, buffer: Buffer) -> None:
    with bound(buffer), line(far, port=PORT + 1) as on:
        deliver(on, b"ordinary")
        with settings.add_ntuple(FlowRule(QUEUE, dst_port=PORT + 1)):
            deliver(on, b"in the device")
        deliver(on, b"ordinary again")
        found = [receive(on.near, 1000) for _ in range(3)]
        assert [one.taken for one in found] == [8, 13, 14]
        assert [len(one.frags) for one in found] == [0, 1, 0]
        assert bytes(found[0].data[:8]) == b"ordinary"
        assert bytes_of(buffer, found[1].frags) == b"in the device"


class Sizes(NamedTuple):
    mtu: int
    segmented: bool
    most: list[int]  # the commonest sizes of frags, the commonest first


@pytest.mark.parametrize(
    "case",
    [Sizes(1500, True, [1448]), Sizes(9000, True, [4096, 756]), Sizes(1500, False, [4096, 3720])],
    ids=["1500", "9000", "superframes"],
)
def test_sizes_of_frags(far: FarEnd, settings: NicSettings, case: Sizes) -> None:
    """Each frag lies in one page; of one MTU a packet's are always the same; 64 KiB of control space is enough."""
    (peer,) = json.loads(run("ip", "-netns", far.namespace, "-json", "addr", "show", "to", far.ipv4))
    theirs = ["ip", "netns", "exec", far.namespace]
    offloads = ["tso", "off", "gso", "off"] if case.segmented else ["tso", "on", "gso", "on"]

    def set_mtu(mtu: int) -> None:
        run("ip", "link", "set", NETIF, "mtu", str(mtu))
        run("ip", "-netns", far.namespace, "link", "set", peer["ifname"], "mtu", str(mtu))

    with contextlib.ExitStack() as undo:
        undo.callback(set_mtu, 1500)
        set_mtu(case.mtu)
        undo.callback(run, *theirs, "ethtool", "-K", peer["ifname"], "tso", "on", "gso", "on")
        run(*theirs, "ethtool", "-K", peer["ifname"], *offloads)
        large = undo.enter_context(Udmabuf().allocate(16 * MIB))
        undo.enter_context(bound(large))
        on = undo.enter_context(line(far))
        sender = threading.Thread(target=on.far.sendall, args=[content(4 * MIB)])
        sender.start()
        sizes: list[int] = []
        most_frags = received = 0
        while received < 4 * MIB:
            found = receive(on.near, MIB)
            received += found.taken
            sizes += found.frags["size"].tolist()
            most_frags = max(most_frags, len(found.frags))
            first, last = found.frags["offset"], found.frags["offset"] + found.frags["size"] - 1
            assert (first // PAGE_SIZE == last // PAGE_SIZE).all()
            assert give_back(on.near, found.frags) == len(found.frags)
        sender.join()
        values, counts = np.unique(sizes, return_counts=True)
        common = [int(values[at]) for at in np.argsort(-counts)]
        print(f"{len(sizes)} frags, at most {most_frags} a read; the commonest sizes: {common[:4]}")
        assert common[: len(case.most)] == case.most
        assert most_frags < MANY_FRAGS


@pytest.mark.usefixtures("settings")
def test_a_small_packet_takes_a_page(far: FarEnd, buffer: Buffer) -> None:
    with bound(buffer), line(far) as on:
        pages: set[int] = set()
        for _ in range(20):
            deliver(on, b"0123456789")
            pages |= {int(offset) // PAGE_SIZE for offset in receive(on.near, 10).frags["offset"]}
        assert len(pages) == 20


# --- giving back ------------------------------------------------------------------------------------------------------


def test_tokens_of_sockets_that_have_none() -> None:
    one = pack_tokens([1], [1]).tobytes()
    for family, kind in ((socket.AF_UNIX, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM)):
        with socket.socket(family, kind) as sock, pytest.raises(OSError, match="file descriptor") as caught:
            calls.return_tokens(sock, one)
        assert caught.value.errno == errno.EBADF
    with socket.socket() as sock:
        assert calls.return_tokens(sock, one) == 0


@pytest.mark.usefixtures("settings")
def test_memory_bound_again_too_early_is_handed_out_twice(far: FarEnd) -> None:
    """Linux minds it as little as the binding of memory that is bound already."""
    with Udmabuf().allocate(64 * PAGE_SIZE) as small, contextlib.ExitStack() as first:
        first.enter_context(bound(small))
        with line(far) as on, line_of_its_own(far) as other:
            deliver(on, b"held")
            held = receive(on.near, 4)
            assert bytes_of(small, held.frags) == b"held"
            first.close()
            with bound(small):
                at = int(held.frags["offset"][0]) // PAGE_SIZE
                seen: set[int] = set()
                while at not in seen:
                    deliver(other, bytes(PAGE_SIZE))
                    found = receive(other.near, PAGE_SIZE)
                    seen |= {int(offset) // PAGE_SIZE for offset in found.frags["offset"]}
                    give_back(other.near, found.frags)
                assert bytes_of(small, held.frags) != b"held"
            assert give_back(on.near, held.frags) == 1


def line_of_its_own(far: FarEnd) -> contextlib.AbstractContextManager[Line]:
    """Connect by the other address, whose port is free."""
    return line(far, host=NEAR[1])


# --- running out of pages ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[120_000, 1000], ids=["default", "1 s"])
def rto_max_ms(far: FarEnd, request: pytest.FixtureRequest) -> Iterator[int]:
    """Limit the sender's retransmission timeout. Kernel: net.ipv4.tcp_rto_max_ms, of the far end's namespace."""
    before = far.make(RTO_MAX.read_text)
    far.make(lambda: RTO_MAX.write_text(str(request.param), encoding="ascii"))
    yield request.param
    far.make(lambda: RTO_MAX.write_text(before, encoding="ascii"))


@pytest.mark.usefixtures("settings")
def test_after_a_stall_data_comes_at_the_next_retransmission(far: FarEnd, rto_max_ms: int) -> None:
    with Udmabuf().allocate(64 * PAGE_SIZE) as small, bound(small), line(far) as on:
        sender = threading.Thread(target=on.far.sendall, args=[content(MIB)])
        sender.start()
        calls.setsockopt(on.near, SOL_SOCKET, calls.SO_RCVTIMEO, struct.pack("<qq", STALL_S, 0))
        held: list[FragArray] = []
        received = 0
        with contextlib.suppress(BlockingIOError):
            while received < MIB:
                found = receive(on.near, MIB)
                received += found.taken
                held.append(found.frags)
        assert received < MIB
        calls.setsockopt(on.near, SOL_SOCKET, calls.SO_RCVTIMEO, struct.pack("<qq", int(PATIENCE_S), 0))
        assert give_back(on.near, *held) > 0
        started = time.monotonic()
        found = receive(on.near, MIB)
        delay = time.monotonic() - started
        print(f"rto_max {rto_max_ms} ms: {delay:.2f} s after a stall of {STALL_S} s")
        while received < MIB:
            give_back(on.near, found.frags)
            received += found.taken
            if received < MIB:
                found = receive(on.near, MIB)
        sender.join()
        assert delay < (1.5 if rto_max_ms == 1000 else 2 * STALL_S)


# --- sending ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sending(far: FarEnd) -> Iterator[Line]:
    """A connection that may send from device memory."""
    with line(far, port=0) as on:
        calls.setsockopt(on.near, SOL_SOCKET, SO_ZEROCOPY, 1)
        yield on


def test_linux_itself_refuses_what_cannot_be_sent(sending: Line, buffer: Buffer) -> None:
    size = buffer.size_bytes
    with tx_bound(buffer) as tx:
        refuse(sending.near, pieces(tx, [0], [0]), errno.EINVAL)
        refuse(sending.near, pieces(tx, [size], [1]), errno.EFAULT)
        refuse(sending.near, pieces(tx, [size - 5], [6]), errno.EFAULT)
        refuse(sending.near, pieces(tx, [0, size - 5], [100, 6]), errno.EFAULT)
        refuse(sending.near, pieces(tx, [0] * 1025, [1] * 1025), errno.EMSGSIZE)
        refuse(sending.near, pieces(tx, [0], [10]), errno.EINVAL, flags=0)
        refuse(sending.near, pieces(0, [0], [10]), errno.EFAULT)
        short = pieces(tx, [0], [10])
        short._control[: CMSGHDR.size] = np.frombuffer(CMSGHDR.pack(18, SOL_SOCKET, SCM_DEVMEM_DMABUF), np.uint8)
        refuse(sending.near, short, errno.EINVAL)
        bare = pieces(tx, [0], [10])
        bare._header.control_length = 0
        refuse(sending.near, bare, errno.EFAULT)
        sending.near.sendall(b"nothing was sent before this")
        assert sending.far.recv(1000) == b"nothing was sent before this"
        assert send(sending.near, pieces(tx, [0], [10])) == 10
        assert sending.far.recv(1000) == bytes(10)
        assert completion(sending.near) == (0, 0)


@pytest.mark.parametrize("host", NEAR)
def test_completions_of_both_ip_versions(far: FarEnd, buffer: Buffer, host: str) -> None:
    with tx_bound(buffer) as tx, line(far, port=0, host=host) as on:
        calls.setsockopt(on.near, SOL_SOCKET, SO_ZEROCOPY, 1)
        for number in range(3):
            assert send(on.near, pieces(tx, [number], [10])) == 10
            assert completion(on.near) == (number, number)


def test_a_send_that_would_leave_by_another_interface_is_enodev(buffer: Buffer) -> None:
    with tx_bound(buffer) as tx, socket.create_server((NEAR[0], 0)) as listener:
        with socket.create_connection(listener.getsockname()) as by_loopback:
            calls.setsockopt(by_loopback, SOL_SOCKET, SO_ZEROCOPY, 1)
            refuse(by_loopback, pieces(tx, [0], [10]), errno.ENODEV)
        with socket.socket() as unconnected:
            calls.setsockopt(unconnected, SOL_SOCKET, SO_ZEROCOPY, 1)
            refuse(unconnected, pieces(tx, [0], [10]), errno.ENODEV)


def test_each_page_is_charged_to_the_send_buffer_in_full(sending: Line, buffer: Buffer) -> None:
    """The far end reads nothing, so what is sent stays charged."""
    near = sending.near
    calls.setsockopt(near, SOL_SOCKET, socket.SO_SNDBUF, 8192)
    with contextlib.suppress(BlockingIOError):
        while True:
            near.send(bytes(MIB), socket.MSG_DONTWAIT)
    calls.setsockopt(near, SOL_SOCKET, socket.SO_SNDBUF, 200_000)
    room = near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    with tx_bound(buffer) as tx:
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                message = pieces(tx, [PAGE_SIZE * (sent + piece) for piece in range(4)], [1] * 4)
                sent += send(near, message, flags=MSG_ZEROCOPY | calls.MSG_EOR)
        print(f"{sent} bytes fill a send buffer of {room}")
        assert room // PAGE_SIZE // 2 < sent < 2 * room // PAGE_SIZE
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        near.close()


# --- packets that the CPU cannot read ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("settings")
def test_a_capture_has_the_headers_and_the_length(far: FarEnd, buffer: Buffer) -> None:
    """Kernel: PACKET_AUXDATA, include/uapi/linux/if_packet.h, struct tpacket_auxdata."""
    data = content(1400)
    with bound(buffer), line(far) as on:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:  # ETH_P_ALL
            tap.bind((NETIF, 3))
            tap.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA
            deliver(on, data)
            tap.settimeout(PATIENCE_S)
            length = 0
            while length < len(data):
                packet, ((_, _, auxiliary),), _, _ = tap.recvmsg(1 << 16, 256)
                length = struct.unpack_from("<II", auxiliary)[1]
        print(f"{len(packet)} bytes of {length}")
        assert len(packet) < 100
        assert data[:16] not in packet


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def udmabuf_limit() -> Iterator[None]:
    """Limit udmabuf to 1 MiB a buffer; it has no limit on Linux 7.3.4."""
    limit = Path("/sys/module/udmabuf/parameters/size_limit_mb")
    before = limit.read_text()
    print(f"the limit is {before.strip()} MiB")
    limit.write_text("1")
    yield
    limit.write_text(before)


@pytest.mark.usefixtures("udmabuf_limit")
@pytest.mark.parametrize(
    ("sealed", "size", "taken"),
    [(False, MIB, False), (True, MIB, True), (True, MIB + PAGE_SIZE, False)],
    ids=["not sealed", "sealed", "too large"],
)
def test_udmabuf_wants_a_sealed_memfd_within_its_limit(sealed: bool, size: int, taken: bool) -> None:
    with contextlib.ExitStack() as undo:
        memfd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        undo.callback(os.close, memfd)
        node = os.open("/dev/udmabuf", os.O_RDWR)
        undo.callback(os.close, node)
        os.ftruncate(memfd, size)
        if sealed:
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        refused = contextlib.nullcontext() if taken else pytest.raises(OSError, match="Invalid argument")
        with refused:
            undo.callback(os.close, calls.ioctl(node, UDMABUF_CREATE, bytearray(pack_udmabuf_create(memfd, 0, size))))


# --- what takes the NIC apart, last -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("configure")
def test_a_reset_takes_the_flow_rules_and_the_rss_table(settings: NicSettings) -> None:
    assert settings.ntuple_rules
    run("ethtool", "--reset", NETIF, "all")
    assert settings.ntuple_rules == ()
    assert settings.header_split.value == "on"
    assert set(settings.rss_table) == set(range(settings.ethtool.rx_queues()))


@pytest.mark.usefixtures("settings", "configure")
def test_a_binding_goes_with_the_nic_to_another_namespace(buffer: Buffer) -> None:
    elsewhere = FarEnd("elsewhere", "", "")
    run("ip", "netns", "add", elsewhere.namespace)
    try:
        with bound(buffer) as dmabuf_id:
            run("ip", "link", "set", NETIF, "netns", elsewhere.namespace)
            run("ip", "-netns", elsewhere.namespace, "link", "set", NETIF, "up")
            there = elsewhere.make(lambda: netdev.queues(socket.if_nametoindex(NETIF)))
            run("ip", "-netns", elsewhere.namespace, "link", "set", NETIF, "netns", "1")
            run("ip", "link", "set", NETIF, "up")
            back = netdev.queues(ifindex())
            for found in (there, back):
                assert [(one.queue, one.dmabuf_id) for one in found if one.dmabuf_id] == [(QUEUE, dmabuf_id)]
        assert not any(one.dmabuf_id for one in netdev.queues(ifindex()))
    finally:
        run("ip", "netns", "del", elsewhere.namespace)
