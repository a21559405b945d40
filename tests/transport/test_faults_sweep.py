"""Every system call of a whole session fails once: nothing waits in vain, no other error comes out, nothing stays."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from devmem_tcp.errors import Timeout
from devmem_tcp.sys import calls
from devmem_tcp.testing.faults import sweep
from fault_ends import Nursery, nursery, same, sending, surviving
from fault_peer import pattern

PATIENCE_S = 5.0
SMALL = 64 << 10


@pytest.fixture(scope="module")
def peers() -> Iterator[Nursery]:
    with nursery() as made:
        yield made


@pytest.fixture(scope="module")
def far_port(peers: Nursery) -> Iterator[int]:
    """The TCP port of a receiver in another process."""
    with peers.peer("honest_receiver") as far:
        yield far.hear()


def sweep_through(scenario: Callable[[], object], code: int, wanted: set[str]) -> None:
    """Sweep, and make sure that each of the wanted calls failed: what waits for another process is not always made as
    the n-th call."""
    failed = {run.call for run in sweep(scenario, errnos=[code])}
    for call in wanted - failed:
        assert sweep(scenario, errnos=[code], only=[call]), f"{call} is never made"


@pytest.mark.filterwarnings("ignore::devmem_tcp.errors.ShortageWarning")  # it is what EMFILE is told by
@pytest.mark.parametrize("code", [errno.ECONNRESET, errno.EMFILE], ids=errno.errorcode.get)
def test_a_receiver_in_which_any_call_fails(peers: Nursery, code: int) -> None:
    def receive() -> None:
        with (
            surviving(size=SMALL, lanes=2, handshake_timeout_s=0.5) as end,  # one that a lane is lost to ends no sooner
            peers.peer("honest_sender", address=end.receiver.address, lanes=2, seeds=[1]) as honest,
        ):
            honest.go()
            end.drive(lambda: bool(end.names or end.errors or end.receiver.refused), honest, limit_s=PATIENCE_S)
            if end.errors:
                raise end.errors[0]

    sweep_through(receive, code, {"accept4", "recv", "send", "epoll_ctl", "epoll_wait", "setsockopt"})


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ECONNRESET], ids=errno.errorcode.get)
def test_a_sender_in_which_any_call_fails(far_port: int, code: int) -> None:
    def send() -> None:
        try:
            with sending(to=("127.0.0.1", far_port), lanes=2, size=SMALL) as sender:
                sender.send(pattern(1, 10_000), confirm=True, timeout_s=PATIENCE_S).wait_delivered(PATIENCE_S)
                with sender.reserve(1000, "uint8") as slot:
                    slot.send(timeout_s=PATIENCE_S).wait(PATIENCE_S)
                sender.close()
        except Timeout as error:
            raise AssertionError(f"it waited in vain: {error}") from None

    sweep_through(send, code, {"connect", "recv", "send", "sendmsg", "epoll_ctl", "epoll_wait", "setsockopt"})


class Reluctant:
    """Has each of the calls that may have to be made again answer so, every second time; ``seen`` counts them."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __call__(self, name: str) -> None:
        if name in ("accept4", "recv", "recvmsg", "send", "sendmsg"):
            self.seen[name] += 1
            if self.seen[name] % 2:
                raise BlockingIOError(errno.EAGAIN, f"{name} is to be made again")


@pytest.mark.parametrize("lanes", [1, 3])
def test_calls_that_are_to_be_made_again_are(peers: Nursery, lanes: int) -> None:
    reluctant = Reluctant()
    with calls.intercept(reluctant), surviving(lanes=lanes) as end:
        with peers.peer("honest_sender", address=end.receiver.address, lanes=lanes, seeds=[1, 2]) as honest:
            honest.go()
            honest.go()
            end.drive(lambda: len(end.names) == 2 and not end.receiver.peers, honest)
        assert all(same(data, pattern(seed)) for seed, (_, data) in enumerate(end.messages, 1))
        assert not end.errors
    assert reluctant.seen.keys() >= {"accept4", "recv", "send"}


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_sender_makes_calls_again_that_are_to_be(far_port: int, lanes: int) -> None:
    reluctant = Reluctant()
    with sending(to=("127.0.0.1", far_port), lanes=lanes) as sender, calls.intercept(reluctant):
        for number in range(10):
            sender.send(pattern(number), confirm=True, timeout_s=PATIENCE_S).wait_delivered(PATIENCE_S)
        sender.close()
    assert reluctant.seen.keys() >= {"recv", "send", "sendmsg"}
