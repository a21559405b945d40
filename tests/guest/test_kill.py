"""Killed (SIGKILL) at any instant of its life, a program leaves nothing that ``doctor --restore`` does not undo.

DEVMEM_KILLS says how often (default 40). Each time a child lives through a whole transfer and says in which phase it
is; it is killed a random time into a phase, each phase in turn. One life is left alone, to learn how long phases take.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

import devmem_tcp as dmt
from conftest import NicState
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.journal import Journal, Result
from devmem_tcp.kernel.state import restore
from far_end import NEAR, NETIF, FarEnd

KILLS: Final = int(os.environ.get("DEVMEM_KILLS", 40))
SEED: Final = int(os.environ.get("DEVMEM_SEED", 1))
BY_COMMAND: Final = 2  # of the kills; the rest is restored by what the command calls, which is quicker
QUEUE: Final = 1
MIB: Final = 1 << 20
SENT_BYTES: Final = 1 * MIB  # each way
BOUND_BYTES: Final = 16 * MIB
PATIENCE_S: Final = 30.0  # of any one wait of a life
GONE_S: Final = 3.0
COMPLAINTS: Final = ("WARNING:", "BUG:", "Oops", "Call Trace", "refcount", "stalled pool", "hung task")


class Phase(enum.IntEnum):
    """What a life is doing: one byte on the pipe."""

    BEGIN = 0
    SPLIT = 1
    RSS = 2
    RULE = 3
    BIND_RX = 4
    BIND_TX = 5
    LISTEN = 6
    ACCEPT = 7
    RECEIVE = 8
    SEND = 9
    CLOSE_SOCKET = 10
    UNBIND = 11
    REMOVE_RULE = 12
    RESTORE_RSS = 13
    RESTORE_SPLIT = 14
    END = 15


def live(port: int, say: Callable[[Phase], object]) -> None:
    """Set the NIC up, receive SENT_BYTES, send as many back, and put everything as it was."""
    say(Phase.BEGIN)
    with (
        dmt.open_nic(NETIF, backend="kernel") as nic,
        dmt.memory.Udmabuf().allocate(BOUND_BYTES) as target,
        dmt.memory.Udmabuf().allocate(SENT_BYTES) as source,
    ):
        say(Phase.SPLIT)
        with nic.set_header_split("on"):
            say(Phase.RSS)
            with nic.set_rss(equal=1):
                say(Phase.RULE)
                with nic.add_ntuple(dst_port=port, queue=QUEUE):
                    say(Phase.BIND_RX)
                    with nic.bind_rx(target, [QUEUE]):
                        say(Phase.BIND_TX)
                        with nic.bind_tx(source) as tx:
                            transfer(nic, tx, port, say)
                            say(Phase.UNBIND)
                    say(Phase.REMOVE_RULE)
                say(Phase.RESTORE_RSS)
            say(Phase.RESTORE_SPLIT)
        say(Phase.END)


def transfer(nic: dmt.Nic, tx: dmt.TxBinding, port: int, say: Callable[[Phase], object]) -> None:
    """Take one connection: receive SENT_BYTES, and send as many."""
    say(Phase.LISTEN)
    with nic.listen((NEAR[0], port), strict=True) as listener:
        say(Phase.ACCEPT)
        listener.settimeout(PATIENCE_S)
        with listener.accept() as sock:
            say(Phase.RECEIVE)
            sock.settimeout(PATIENCE_S)
            left = SENT_BYTES
            while left:
                with sock.recv_frags(64 << 10) as batch:
                    left -= batch.nbytes
            say(Phase.SEND)
            sock.set_zerocopy()
            sends = 0
            for at in range(0, SENT_BYTES, 64 << 10):
                sock.send_frags(tx, [at], [64 << 10])
                sends += 1
            while sends:
                sends -= sum(high - low + 1 for low, high in sock.wait_completions(PATIENCE_S))
            say(Phase.CLOSE_SOCKET)


class Life:
    """A child that lives through ``live``; the block's end waits for it."""

    def __init__(self, port: int) -> None:
        self._pipe, theirs = os.pipe()
        self.begun: Final[dict[Phase, float]] = {}
        self.pid: Final = os.fork()
        if self.pid:
            os.close(theirs)
            return
        status = 1
        try:
            live(port, lambda phase: os.write(theirs, bytes([phase])))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def until(self, phase: Phase | None, deadline: float) -> bool:
        """Follow the life until it says ``phase``, or to its end; False: time was over before."""
        while phase is None or phase not in self.begun:
            if not select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
            said = os.read(self._pipe, 64)
            if not said:
                return True
            for one in said:
                self.begun[Phase(one)] = time.monotonic()
        return True

    def end(self, *, kill: bool) -> int:
        """Wait for the end, which SIGKILL brings if wanted; returns the status as wait(2) does."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        self.until(None, time.monotonic() + PATIENCE_S)  # what it said before
        os.close(self._pipe)
        return os.waitpid(self.pid, 0)[1]


@contextlib.contextmanager
def talker(far: FarEnd, life: Life, port: int) -> Iterator[None]:
    """Be the other end of a life's connection: send SENT_BYTES and read to the end, or as far as it gets."""
    over = threading.Event()

    def talk() -> None:
        while Phase.ACCEPT not in life.begun:
            if over.wait(0.005):
                return
        with contextlib.suppress(OSError), far.connect((NEAR[0], port), PATIENCE_S) as sock:
            sock.sendall(bytes(SENT_BYTES))
            while sock.recv(1 << 16):
                pass

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def undisturbed(far: FarEnd, port: int) -> dict[Phase, float]:
    """Let one child live to its end; returns how long each phase took, in seconds."""
    life = Life(port)
    with talker(far, life, port):
        assert life.until(None, time.monotonic() + 2 * PATIENCE_S)
        ended = time.monotonic()
        assert life.end(kill=False) == 0
    assert list(life.begun) == list(Phase)
    begun = [*life.begun.values(), ended]
    return {phase: begun[phase + 1] - begun[phase] for phase in Phase}


def killed(far: FarEnd, port: int, phase: Phase, delay_s: float) -> Phase | None:
    """Kill a child ``delay_s`` into a phase; returns in which phase that met it, None: it had just ended."""
    life = Life(port)
    with talker(far, life, port):
        assert life.until(phase, time.monotonic() + PATIENCE_S)
        life.until(None, time.monotonic() + delay_s)
        status = life.end(kill=True)
    assert status in (0, signal.SIGKILL), f"a life failed by itself: {status}"
    return max(life.begun) if status else None


def restored_by_command() -> None:
    subprocess.run([sys.executable, "-m", "devmem_tcp", "doctor", "--restore"], check=True, timeout=PATIENCE_S)


def restored() -> None:
    outcomes = restore(Journal.default())
    assert {outcome.result for outcome in outcomes} <= {Result.RESTORED, Result.UNCHANGED}, outcomes


def check_all_gone(before: NicState, journal: Journal) -> None:
    """See that the NIC is as before, that nothing of a binding is left, and that the journal is empty."""
    assert NicState.read() == before
    deadline = time.monotonic() + GONE_S
    while left := [pool for pool in netdev.page_pools() if pool.dmabuf_id]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    assert not list(Path(journal.directory).iterdir())


def kernel_log() -> list[str]:
    """Return what the kernel has logged since boot, a line a record."""
    records = []
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while True:
            records.append(os.read(fd, 1 << 13).decode("utf-8", "replace"))
    except BlockingIOError:
        return records
    finally:
        os.close(fd)


@pytest.mark.timeout(120 + 20 * KILLS)
def test_killed_at_any_instant(far: FarEnd, capfd: pytest.CaptureFixture[str]) -> None:
    logged = len(kernel_log())
    chance = random.Random(SEED)
    before, journal = NicState.read(), Journal.default()
    port = 20000
    lasts = undisturbed(far, port)
    check_all_gone(before, journal)
    met: Counter[Phase] = Counter()
    for number in itertools.count():
        if met.total() == KILLS:
            break
        phase = Phase(number % len(Phase))
        port += 1
        last = killed(far, port, phase, chance.uniform(0, lasts[phase]))
        if last is not None:
            met[last] += 1
        if number % max(1, KILLS // BY_COMMAND) == Phase.RECEIVE:
            restored_by_command()
        else:
            restored()
        check_all_gone(before, journal)
    with capfd.disabled():
        print(f"\na life of {sum(lasts.values()):.2f} s; {number - KILLS} were over before; kills in each phase:")
        print(", ".join(f"{phase.name.lower()} {met[phase]}" for phase in Phase))
    complaints = [line for line in kernel_log()[logged:] if any(word in line for word in COMPLAINTS)]
    assert not complaints
