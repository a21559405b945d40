"""The testing tools themselves: faults fire where they should, and each kind of leak is found out."""

from __future__ import annotations

import errno
import mmap
import os
import select
import subprocess
import sys
import threading

import pytest

import devmem_tcp as dmt
from devmem_tcp.buffers import BufferUse
from devmem_tcp.sys import calls
from devmem_tcp.testing.contract import contract_tests, needs, raises
from devmem_tcp.testing.contract.expect import unmet_needs
from devmem_tcp.testing.contract.rig import Rig
from devmem_tcp.testing.faults import fail_nth, sweep
from devmem_tcp.testing.leaks import leak_check
from devmem_tcp.types import PAGE_SIZE, Capabilities

CAPABILITIES = Capabilities(
    backend="some",
    zero_copy=False,
    unprivileged_bind=True,
    rx_page_size=True,
    hds_thresh=True,
    loopback=False,
    merged_frags=False,
    queue_shares=True,
    placement=False,
    rx_queues=4,
    rss_table_size=128,
)


def make_and_close_two() -> None:
    for _ in range(2):
        calls.close_fd(calls.eventfd_create())


class TestFailNth:
    def test_fails_that_call_alone(self) -> None:
        with fail_nth(2, errno=errno.EMFILE) as fault:
            calls.close_fd(calls.eventfd_create())
            with pytest.raises(OSError, match="call 2, eventfd2") as caught:
                calls.eventfd_create()
            calls.close_fd(calls.eventfd_create())
        assert caught.value.errno == errno.EMFILE
        assert fault.fired
        assert fault.failed_call == "eventfd2"
        assert fault.calls == ["eventfd2"] * 3

    def test_errno_picks_the_exception_class(self) -> None:
        with fail_nth(1, errno=errno.EAGAIN), pytest.raises(BlockingIOError):
            calls.interface_names()

    def test_counts_only_the_named_calls(self) -> None:
        with fail_nth(1, only={"if_nameindex"}) as fault:
            calls.close_fd(calls.eventfd_create())
            with pytest.raises(OSError, match="if_nameindex"):
                calls.interface_names()
        assert fault.calls == ["if_nameindex"]

    def test_does_not_fire_beyond_the_last_call(self) -> None:
        with fail_nth(3) as fault:
            make_and_close_two()
        assert not fault.fired

    def test_zero_only_lists(self) -> None:
        with fail_nth(0) as fault:
            make_and_close_two()
        assert fault.calls == ["eventfd2"] * 2
        assert not fault.fired

    def test_ends_with_its_block(self) -> None:
        with fail_nth(1):
            pass
        make_and_close_two()

    def test_refuses_negative_numbers_and_a_second_fault(self) -> None:
        with pytest.raises(ValueError, match="n=-1"), fail_nth(-1):
            pass
        with fail_nth(1), pytest.raises(RuntimeError), fail_nth(1):
            pass


class TestSweep:
    def test_makes_every_call_fail_with_every_errno(self) -> None:
        runs = sweep(make_and_close_two, errnos=[errno.ENOMEM, errno.EMFILE])
        assert [(run.n, run.call, run.errno) for run in runs] == [
            (1, "eventfd2", errno.ENOMEM),
            (2, "eventfd2", errno.ENOMEM),
            (1, "eventfd2", errno.EMFILE),
            (2, "eventfd2", errno.EMFILE),
        ]
        assert all("put in at call" in run.outcome and not run.broke for run in runs)

    def test_tolerated_failures_are_fine(self) -> None:
        def scenario() -> None:
            try:
                calls.interface_names()
            except OSError:
                return

        assert [run.outcome for run in sweep(scenario)] == ["passed"]

    def test_names_the_call_that_leaks(self) -> None:
        leaked: list[int] = []

        def scenario() -> None:
            leaked.append(calls.eventfd_create())
            calls.interface_names()  # when this fails, the fd stays open
            calls.close_fd(leaked.pop())

        try:
            with pytest.raises(AssertionError, match=r"1 of 2 runs .*\ncall 2, if_nameindex -> ENOMEM(.*\n)+.*eventfd"):
                sweep(scenario)
        finally:
            for fd in leaked:
                os.close(fd)

    def test_unexpected_errors_are_breakage(self) -> None:
        def scenario() -> None:
            fd = -1
            try:
                fd = calls.eventfd_create()
            except OSError as error:
                raise KeyError("swallowed") from error
            finally:
                if fd >= 0:
                    calls.close_fd(fd)

        with pytest.raises(AssertionError, match="unexpected KeyError"):
            sweep(scenario)

    def test_scenario_must_pass_without_faults(self) -> None:
        def scenario() -> None:
            raise OSError(errno.EIO, "always")

        with pytest.raises(AssertionError, match="without any fault"):
            sweep(scenario)

    def test_endless_scenarios_are_stopped(self) -> None:
        def scenario() -> None:
            for _ in range(10):
                calls.close_fd(calls.eventfd_create())

        with pytest.raises(AssertionError, match="after 5 calls"):
            sweep(scenario, limit=5)


class TestLeakCheck:
    def test_nothing_left_behind(self) -> None:
        with leak_check():
            fd = os.eventfd(0)
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()
            subprocess.run([sys.executable, "-c", ""], check=True)
            os.close(fd)

    def test_fd(self) -> None:
        with raises(AssertionError) as caught, leak_check():
            fd = os.eventfd(0)
        assert f"fd {fd} -> anon_inode:[eventfd]" in str(caught.error)
        os.close(fd)

    def test_fd_number_used_again_for_another_file(self) -> None:
        first = os.memfd_create("first")
        with raises(AssertionError) as caught, leak_check():
            os.close(first)
            second = os.memfd_create("second")
        assert second == first
        assert "memfd:second" in str(caught.error)
        os.close(second)

    def test_thread(self) -> None:
        stop = threading.Event()
        with raises(AssertionError) as caught, leak_check():
            thread = threading.Thread(target=stop.wait, name="stray")
            thread.start()
        assert "thread 'stray'" in str(caught.error)
        stop.set()
        thread.join()

    def test_child_process_that_nobody_waited_for(self) -> None:
        with raises(AssertionError) as caught, leak_check():
            child = subprocess.Popen(["true"])
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert f"child process {child.pid}" in str(caught.error)
        child.wait()

    def test_mapping_of_a_memory_file(self) -> None:
        with raises(AssertionError) as caught, leak_check():
            fd = os.memfd_create("stray")
            os.ftruncate(fd, PAGE_SIZE)
            mapping = mmap.mmap(fd, PAGE_SIZE)
            os.close(fd)
        assert "mapping of /memfd:stray" in str(caught.error)
        mapping.close()

    def test_buffer_and_who_holds_it(self) -> None:
        with raises(AssertionError) as caught, leak_check():
            buffer = dmt.memory.Host(kind="anonymous").allocate(PAGE_SIZE)
            pin = buffer.pin("a test", BufferUse.TX)
        assert "of 4096 bytes, never closed, held by a test" in str(caught.error)
        buffer.unpin(pin)
        buffer.close()

    def test_nic(self) -> None:
        with raises(AssertionError) as caught, leak_check():
            nic = dmt.open_nic("soft0", backend="software")
        assert f"{type(nic).__name__}, never closed" in str(caught.error)
        nic.close()

    def test_what_was_there_before_is_not_judged(self) -> None:
        with dmt.memory.Host().allocate(PAGE_SIZE) as buffer, leak_check():
            assert not buffer.closed

    def test_garbage_is_no_leak(self) -> None:
        """An epoll closes its fd when it goes, without a warning."""
        with leak_check():
            cycle: list[object] = [select.epoll()]
            cycle.append(cycle)
            del cycle

    def test_kept_random_device_is_no_leak(self) -> None:
        with leak_check():
            fd = os.open("/dev/urandom", os.O_RDONLY)
        os.close(fd)

    def test_error_of_the_block_goes_on(self) -> None:
        with raises(KeyError), leak_check():
            fd = os.eventfd(0)
            raise KeyError
        os.close(fd)


class TestExpectations:
    def test_raises_keeps_the_error(self) -> None:
        with raises(OSError, errno.EBADF) as caught:
            os.close(-1)
        assert caught.error.errno == errno.EBADF
        assert caught.error.__traceback__ is None

    def test_raises_wants_an_error(self) -> None:
        with pytest.raises(AssertionError, match="expected ValueError"), raises(ValueError):
            pass

    def test_raises_wants_that_errno(self) -> None:
        with pytest.raises(AssertionError, match="expected OSError with EPERM"), raises(OSError, errno.EPERM):
            os.close(-1)

    def test_raises_lets_others_through(self) -> None:
        with pytest.raises(KeyError), raises(ValueError):
            raise KeyError

    def test_needs(self) -> None:
        @needs("rx_page_size", "loopback", lacking=("unprivileged_bind",))
        def test(rig: Rig) -> None: ...

        assert unmet_needs(test, CAPABILITIES) == ("loopback", "no unprivileged_bind")
        assert unmet_needs(lambda rig: None, CAPABILITIES) == ()


def test_contract_tests_have_names_of_their_own() -> None:
    ids = [test.id for test in contract_tests()]
    assert len(set(ids)) == len(ids) > 100
    assert "tokens-start_at_one_and_count_up" in ids


def test_a_sweep_of_some_calls_makes_each_of_them_fail() -> None:
    def scenario() -> None:
        for _ in range(2):
            calls.close_fd(calls.eventfd_create())

    assert [(run.n, run.call) for run in sweep(scenario, only=["eventfd2"])] == [(1, "eventfd2"), (2, "eventfd2")]
    assert sweep(scenario, only=["socket"]) == ()
