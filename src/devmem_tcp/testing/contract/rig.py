"""What a contract test is given: a NIC set up for devmem, a far end of plain sockets, and the usual first steps."""

from __future__ import annotations

import random
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

from devmem_tcp.buffers import Allocator, Buffer
from devmem_tcp.closing import Closing
from devmem_tcp.contract import DevmemSocket, Listener, Nic, NtupleRule, RxBinding
from devmem_tcp.errors import SteeringWarning, Timeout
from devmem_tcp.testing.contract.collector import BoundMemory, Collector
from devmem_tcp.types import PAGE_SIZE, Address, Capabilities

ConnectPeer: TypeAlias = Callable[[Address, float], socket.socket]
ListenPeer: TypeAlias = Callable[[str], socket.socket]

BUFFER_SIZE: Final = 64 * PAGE_SIZE
PUSH_BLOCK: Final = 16 * 1024  # bytes; small against a socket buffer
STARVE_WAIT_S: Final = 0.05  # how long nothing must come before the drop counter is looked at


class Pair(NamedTuple):
    """A connection to the NIC: our end, the rule that steers it (None: RSS does), and the peer's plain socket."""

    sock: DevmemSocket
    peer: socket.socket
    rule: NtupleRule | None


class BoundPair(NamedTuple):
    """A connection steered to a bound queue: ``collector`` receives on ``sock``, into the Buffer of ``rx``."""

    sock: DevmemSocket
    peer: socket.socket
    rx: RxBinding
    collector: Collector


class Rig(Closing):
    """One NIC with header split on and RSS kept away from ``queue`` and ``second_queue``; closes all it made.

    Args:
        open_nic: opens the NIC under test.
        allocator: memory that the NIC can bind and the CPU can read.
        hosts: addresses of the NIC to listen on; ``host`` is the first.
        connect_peer: opens a plain connection from the peer's machine to (address, within seconds).
        listen_peer: opens a plain listening socket, of any free port, that connections from ``host`` reach.
        ring_pages: how many pages each queue of a binding keeps to itself, of those that all its queues share.
        patience_s: how long to wait for what must happen; data after a stall needs the sender's retransmission.
    """

    def __init__(
        self,
        open_nic: Callable[[], Nic],
        allocator: Allocator,
        *,
        hosts: Sequence[str] = ("127.0.0.1",),
        connect_peer: ConnectPeer = socket.create_connection,
        listen_peer: ListenPeer | None = None,
        patience_s: float = 20.0,
        ring_pages: int = 0,
    ) -> None:
        self.allocator = allocator
        self.ring_pages = ring_pages
        self.hosts = tuple(hosts)
        self.host = self.hosts[0]
        self.patience_s = patience_s
        self._connect_peer = connect_peer
        self._listen_peer = listen_peer or listen_on
        self._buffers: list[Buffer] = []
        self._peers: list[socket.socket] = []
        self._socks: list[DevmemSocket] = []  # a NIC need not keep sockets alive that its user drops
        self._memories: dict[int, BoundMemory] = {}
        self._random = random.Random(1)
        self.nic = open_nic()
        self.capabilities: Capabilities = self.nic.capabilities
        self.queue = self.capabilities.rx_queues - 1
        self.second_queue = self.queue - 1
        self.rss_queues = self.second_queue  # RSS spreads over queues 0 to this one, exclusive
        try:
            assert self.rss_queues >= 2, f"the contract tests need at least 4 RX queues, not {self.queue + 1}"
            self.nic.set_header_split("on")
            self.nic.set_rss(equal=self.rss_queues)
        except BaseException:
            self.nic.close()
            raise

    def close(self) -> None:
        self.nic.close()
        for peer in self._peers:
            peer.close()
        for buffer in self._buffers:
            buffer.close()  # BusyError here: the NIC closed, and yet something holds the memory

    # --- memory and bindings ---------------------------------------------------------------------------------------

    def allocate(self, size_bytes: int = BUFFER_SIZE) -> Buffer:
        buffer = self.allocator.allocate(size_bytes)
        self._buffers.append(buffer)
        return buffer

    def bind(self, *queues: int, buffer: Buffer | None = None) -> RxBinding:
        """Bind a Buffer (a fresh one, if none is given) to queues; to ``queue``, if none is given."""
        queues = queues or (self.queue,)
        rings = len(queues) * self.ring_pages * PAGE_SIZE if len(queues) > 1 else 0
        rx = self.nic.bind_rx(buffer or self.allocate(BUFFER_SIZE + rings), queues)
        self.watch(rx)
        return rx

    def watch(self, rx: RxBinding) -> None:
        """Let Collectors know a binding made without ``bind``, so that they can read its frags."""
        self._memories[rx.dmabuf_id] = BoundMemory(rx.buffer)

    # --- connections -----------------------------------------------------------------------------------------------

    def listen(self, host: str | None = None, *, strict: bool = False) -> Listener:
        listener = self.nic.listen((host or self.host, 0), strict=strict)
        listener.settimeout(self.patience_s)
        return listener

    def accept(self, listener: Listener) -> DevmemSocket:
        """Accept a connection and keep it until the rig closes; its waits are bounded."""
        sock = listener.accept()
        self.keep(sock)
        return sock

    def keep(self, sock: DevmemSocket) -> None:
        """Keep a socket made otherwise until the rig closes, and bound its waits."""
        sock.settimeout(self.patience_s)
        self._socks.append(sock)

    def peer_to(self, address: Address) -> socket.socket:
        """Return a plain socket of the peer, connected to one of our listeners."""
        peer = self._connect_peer(address, self.patience_s)
        self._peers.append(peer)
        return peer

    def peer_listener(self) -> socket.socket:
        """Return a plain listening socket of the peer."""
        listener = self._listen_peer(self.host)
        listener.settimeout(self.patience_s)
        self._peers.append(listener)
        return listener

    def accept_peer(self, listener: socket.socket) -> socket.socket:
        """Accept, at the peer, a connection that we made to ``peer_listener``."""
        peer, _ = listener.accept()
        peer.settimeout(self.patience_s)
        self._peers.append(peer)
        return peer

    def pair(
        self, *, queue: int | None = None, steer: bool = True, strict: bool = False, host: str | None = None
    ) -> Pair:
        """Return a connection, steered to ``queue`` (``rig.queue``, if none is given) by a rule on its port."""
        host = host or self.host
        with self.listen(host, strict=strict) as listener:
            port = listener.address[1]
            wanted = self.queue if queue is None else queue
            rule = self.nic.add_ntuple(dst_port=port, queue=wanted) if steer else None
            peer = self.peer_to((host, port))
            with warnings.catch_warnings():
                if not steer:
                    warnings.simplefilter("ignore", SteeringWarning)
                sock = self.accept(listener)
        return Pair(sock, peer, rule)

    def bound_pair(self, *, host: str | None = None) -> BoundPair:
        """Return a connection steered to ``queue``, with a fresh Buffer bound to it."""
        return self.pair_on(self.bind(), host=host)

    def pair_on(self, rx: RxBinding, *, queue: int | None = None, host: str | None = None) -> BoundPair:
        """Return one more connection steered to a queue of a binding: its first, if none is given."""
        sock, peer, _ = self.pair(queue=rx.queues[0] if queue is None else queue, host=host)
        return BoundPair(sock, peer, rx, self.collect(sock))

    def collect(self, sock: DevmemSocket) -> Collector:
        return Collector(sock, self._memories)

    # --- traffic ---------------------------------------------------------------------------------------------------

    def payload(self, size: int) -> bytes:
        """Return ``size`` bytes that differ from all others of this rig."""
        return self._random.randbytes(size)

    def push(self, peer: socket.socket, data: bytes) -> int:
        """Send what the peer's socket buffer takes at once; return how many bytes that was, perhaps 0."""
        peer.settimeout(0)
        try:
            return peer.send(data)
        except BlockingIOError:
            return 0
        finally:
            peer.settimeout(self.patience_s)

    def transfer(
        self, collector: Collector, peer: socket.socket, size: int, *, hold: bool = False, max_bytes: int = 1 << 20
    ) -> None:
        """Send ``size`` fresh bytes from the peer and receive them all; they must come right and in TCP order."""
        data = self.payload(size)
        sent = received = 0
        while received < size:
            if sent == received:  # nothing is under way that a receive could wait for
                block = data[sent : sent + PUSH_BLOCK]
                peer.sendall(block)
                sent += len(block)
            else:
                sent += self.push(peer, data[sent:])
            start = len(collector.data)
            assert collector.recv(max_bytes), f"stream ended after {received} of {size} bytes"
            received += len(collector.data) - start
            if not hold:
                collector.release()
        assert collector.data[-size:] == data, "bytes came wrong or in another order"

    def hold_tokens(self, collector: Collector, peer: socket.socket, count: int, *, max_bytes: int = 100) -> list[int]:
        """Receive small pieces until ``count`` tokens are out; return the tokens in order of arrival.

        A legal NIC may put any packet into host memory, so more is sent until enough has landed in device memory.
        """
        deadline = time.monotonic() + self.patience_s
        while len(collector.live) < count:
            assert time.monotonic() < deadline, f"only {len(collector.live)} of {count} tokens came"
            data = self.payload(max_bytes)
            peer.sendall(data)
            assert collector.recv_exactly(len(data), hold=True, max_bytes=max_bytes) == data
        return list(collector.live)

    def starve(self, collector: Collector, peer: socket.socket, *, queue: int | None = None) -> bytes:
        """Send and receive, returning no token, until the queue has no page left.

        Returns:
            All bytes sent, of which the last have not come yet; ``collector.data`` ends with the others.
        """
        wanted = self.queue if queue is None else queue
        drops = self.nic.queue_stats(wanted).rx_alloc_fail
        start = len(collector.data)
        sent = bytearray()
        deadline = time.monotonic() + self.patience_s
        collector.sock.settimeout(STARVE_WAIT_S)
        while True:
            assert time.monotonic() < deadline, f"queue {wanted} still has pages after {len(sent)} bytes"
            if len(sent) - (len(collector.data) - start) < 2 * PUSH_BLOCK:
                block = self.payload(PUSH_BLOCK)
                sent += block[: self.push(peer, block)]
            try:
                assert collector.recv(), "stream ended"
            except Timeout:
                if self.nic.queue_stats(wanted).rx_alloc_fail > drops:
                    break
        collector.sock.settimeout(self.patience_s)
        assert sent.startswith(collector.data[start:]), "bytes came wrong or in another order"
        return bytes(sent)


def listen_on(host: str) -> socket.socket:
    """Open a plain listening socket on this machine, of any free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family)
