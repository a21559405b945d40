"""Leases: bytes go back exactly once, after release and after the last hold, in whatever order and thread."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from devmem_tcp.arrays import Lease
from devmem_tcp.errors import ClosedError, StaleFragError


class Counter:
    """An ``on_free`` that counts."""

    def __init__(self) -> None:
        self.freed = 0

    def __call__(self) -> None:
        self.freed += 1


@pytest.fixture
def quick_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class TestOneThread:
    def test_release_without_holds(self) -> None:
        count = Counter()
        lease = Lease(count)
        lease.check()
        assert (lease.released, lease.held, count.freed) == (False, 0, 0)
        lease.release()
        lease.release()
        assert (lease.released, lease.held, count.freed) == (True, 0, 1)

    def test_last_hold_frees(self) -> None:
        count = Counter()
        lease = Lease(count)
        first, second = lease.hold(), lease.hold()
        assert lease.held == 2
        lease.release()
        assert (lease.held, count.freed) == (2, 0)
        del first
        assert (lease.held, count.freed) == (1, 0)
        lease.release()
        del second
        assert (lease.held, count.freed) == (0, 1)

    def test_holds_that_ended_before_release(self) -> None:
        count = Counter()
        lease = Lease(count)
        for _ in range(3):
            hold = lease.hold()
            del hold
        assert (lease.held, count.freed) == (0, 0)
        lease.release()
        assert count.freed == 1

    def test_stale_after_release(self) -> None:
        count = Counter()
        lease = Lease(count)
        hold = lease.hold()
        lease.release()
        with pytest.raises(StaleFragError, match="hint: take"):
            lease.check()
        with pytest.raises(ClosedError) as caught:
            lease.hold()
        assert (lease.held, count.freed) == (1, 0)
        del hold
        assert count.freed == 1  # although the traceback in `caught` is alive
        assert caught.value.hint

    def test_hold_in_a_cycle(self) -> None:
        count = Counter()
        lease = Lease(count)
        cycle: list[object] = [lease.hold()]
        cycle.append(cycle)
        lease.release()
        del cycle
        assert count.freed == 0
        gc.collect()
        assert count.freed == 1

    def test_hold_keeps_the_lease(self) -> None:
        count = Counter()
        lease = Lease(count)
        hold = lease.hold()
        lease.release()
        del lease
        gc.collect()
        assert count.freed == 0
        del hold
        assert count.freed == 1

    def test_errors_of_on_free_come_out_of_release(self) -> None:
        def refuse() -> None:
            raise OSError("no")

        lease = Lease(refuse)
        with pytest.raises(OSError, match="no"):
            lease.release()
        lease.release()  # it has run; once is once

    def test_errors_of_on_free_at_the_last_hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse() -> None:
            raise OSError("no")

        seen: list[object] = []
        monkeypatch.setattr(sys, "unraisablehook", lambda caught: seen.append(str(caught.exc_value)))
        lease = Lease(refuse)
        hold = lease.hold()
        lease.release()
        del hold
        assert seen == ["no"]

    def test_on_free_may_release_again(self) -> None:
        count = Counter()

        def free() -> None:
            count()
            lease.release()

        lease = Lease(free)
        lease.release()
        assert count.freed == 1


@pytest.mark.usefixtures("quick_switching")
class TestThreads:
    def test_hold_ends_in_another_thread(self) -> None:
        count = Counter()
        lease = Lease(count)
        holds = [lease.hold()]
        lease.release()
        thread = threading.Thread(target=holds.clear)
        thread.start()
        thread.join()
        assert count.freed == 1

    def test_races(self) -> None:
        """Threads take and drop holds while others release: each lease is freed once, never under a hold."""
        leases = 300
        wrong: list[str] = []
        freed = [0] * leases
        in_use = [[0] for _ in range(leases)]
        start = threading.Barrier(4)

        def free(number: int) -> None:
            freed[number] += 1
            if in_use[number] != [0]:
                wrong.append(f"lease {number} freed in use")

        made = [Lease(lambda number=number: free(number)) for number in range(leases)]  # type: ignore[misc]

        def reader(which: int) -> None:
            start.wait()
            for number, lease in enumerate(made):
                for _ in range(3):
                    try:
                        hold = lease.hold()
                    except StaleFragError:
                        break
                    marks = in_use[number]
                    marks.append(which)
                    marks.remove(which)
                    del hold

        def releaser() -> None:
            start.wait()
            for lease in made:
                lease.release()

        threads = [threading.Thread(target=reader, args=(which,)) for which in (1, 2)]
        threads += [threading.Thread(target=releaser) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert freed == [1] * leases
        assert [lease.held for lease in made] == [0] * leases


PROGRAM = """
import functools, os
import numpy as np
from devmem_tcp.arrays import ARRAY_TYPES, DeviceArray, Lease

def lent(what):  # what frees may not lead back to this module: NumPy arrays hide cycles from the collector
    lease = Lease(functools.partial(os.write, 1, what.encode()))
    return lease, DeviceArray(memoryview(bytearray(8)), ARRAY_TYPES["float64"], (1,), lease=lease)

kept = []
for number, look in enumerate(
    [DeviceArray.numpy, np.asarray, np.from_dlpack, DeviceArray.__dlpack__, lambda array: array.bytes_view()]
):
    lease, array = lent(str(number))
    kept.append(look(array))
    lease.release()
lease, array = lent("c")
cycle = [lease.hold()]
cycle.append(cycle)
lease.release()
never_released, array = lent("!")
kept.append(array.numpy())
print(end="before exit,", flush=True)
"""


def test_interpreter_exit() -> None:
    """What is looked at when the interpreter ends is freed then, each once, and nothing crashes.

    But for 2 and 3, which DLPack deleters would free: those of NumPy leave everything as it is by then.
    """
    ended = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    early, _, late = ended.stdout.partition(",")
    assert early == "before exit"
    assert sorted(set(late) - set("23")) == sorted("014c")
    assert len(late) == len(set(late))
