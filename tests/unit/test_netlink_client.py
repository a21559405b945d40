"""The netlink client against a kernel of Python, which can do what Linux does only under load; and against Linux."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Sequence
from enum import IntEnum

import pytest

from devmem_tcp.errors import BrokenError, BusyError, ClosedError, KernelError, LeakWarning
from devmem_tcp.sys.netlink import MAX_ATTEMPTS, GenericNetlink
from devmem_tcp.testing.faults import fail_nth, sweep
from devmem_tcp.uapi import netlink as nl
from devmem_tcp.uapi.netlink import Attributes, Message
from netlink_kernel import FAMILY_ID, FAMILY_VERSION, PORT, Datagram, FakeKernel, ack, done, entry, faked


class Command(IntEnum):
    BIND_RX = 13


class Names(IntEnum):
    IFINDEX = 1
    QUEUES = 2


NAMES = nl.AttributeNames.of(Names, {Names.QUEUES: nl.AttributeNames({1: "id", 3: "type"})})


kernel = pytest.fixture(faked)


def numbers(found: list[Attributes]) -> list[int]:
    return [each.u32(1) for each in found]


# --- opening --------------------------------------------------------------------------------------------------------


def test_it_asks_for_extended_acks_and_finds_the_family(kernel: FakeKernel) -> None:
    with GenericNetlink("fake") as netlink:
        netlink.request(Command.BIND_RX, nl.attr_u32(1, 7))
    (request,) = kernel.requests
    assert request.kind == FAMILY_ID
    assert request.flags == nl.NLM_F_REQUEST | nl.NLM_F_ACK
    assert request.payload == nl.generic(13, FAMILY_VERSION, nl.attr_u32(1, 7))
    assert kernel.options == [(270, nl.NETLINK_EXT_ACK, 1), (270, nl.NETLINK_CAP_ACK, 1)]


def test_a_family_that_is_not_there_is_an_error_with_a_hint(kernel: FakeKernel) -> None:
    with pytest.raises(KernelError) as caught:
        GenericNetlink("nowhere")
    assert caught.value.errno == errno.ENOENT
    assert "no netlink family 'nowhere'" in caught.value.hint


def test_a_dropped_socket_warns_and_closes(kernel: FakeKernel) -> None:
    netlink = GenericNetlink("fake")
    with pytest.warns(LeakWarning, match="GenericNetlink fake"):
        del netlink


def test_after_close_nothing_is_asked(kernel: FakeKernel) -> None:
    with GenericNetlink("fake") as netlink:
        assert netlink.fileno() == 99
    netlink.close()
    assert netlink.closed
    assert netlink.fileno() == -1
    with pytest.raises(ClosedError):
        netlink.request(Command.BIND_RX)
    assert kernel.requests == []


# --- requests -------------------------------------------------------------------------------------------------------


def test_a_request_returns_the_answers_attributes(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [entry(request, nl.attr_u32(4, 12)), ack(request)]
    with GenericNetlink("fake") as netlink:
        assert netlink.request(Command.BIND_RX).u32(4) == 12


def test_answer_and_ack_may_come_in_one_datagram(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [entry(request, nl.attr_u32(4, 12)) + ack(request)]
    with GenericNetlink("fake") as netlink:
        assert netlink.request(Command.BIND_RX).u32(4) == 12


def test_a_request_without_an_answer_returns_no_attributes(kernel: FakeKernel) -> None:
    with GenericNetlink("fake") as netlink:
        assert len(netlink.request(Command.BIND_RX)) == 0


def test_a_refusal_tells_all_the_kernel_told(kernel: FakeKernel) -> None:
    text = nl.attr_string(nl.NLMSGERR_ATTR_MSG, "integer out of range")
    offset = nl.attr_u32(nl.NLMSGERR_ATTR_OFFS, 20 + 8 + 4 + 8)
    policy = nl.nest(nl.NLMSGERR_ATTR_POLICY, nl.attr_u64(5, 1), nl.attr_u64(4, 0))
    kernel.answer = lambda request: [ack(request, -errno.ERANGE, text, offset, policy)]
    queue = nl.nest(Names.QUEUES, nl.attr_u32(1, 0), nl.attr_u32(3, 7))
    with GenericNetlink("fake") as netlink, pytest.raises(KernelError) as caught:
        netlink.request(Command.BIND_RX, nl.attr_u32(Names.IFINDEX, 2), queue, attributes=NAMES)
    error = caught.value
    assert (error.errno, error.call, error.extack) == (errno.ERANGE, "fake bind-rx", "integer out of range")
    assert error.attr == "queues.type"
    assert error.hint == "queues.type must be 0 to 1"


def test_a_missing_attribute_is_named_though_the_request_is_not_echoed(kernel: FakeKernel) -> None:
    missing = nl.attr_u32(nl.NLMSGERR_ATTR_MISS_TYPE, 3) + nl.attr_u32(nl.NLMSGERR_ATTR_MISS_NEST, 20)
    kernel.answer = lambda request: [ack(request, -errno.EINVAL, missing)]
    with GenericNetlink("fake") as netlink, pytest.raises(KernelError) as caught:
        netlink.request(Command.BIND_RX, nl.nest(Names.QUEUES, nl.attr_u32(1, 0)), attributes=NAMES)
    assert caught.value.attr == "queues.type"
    assert caught.value.hint == ""


def test_a_command_without_a_name_is_called_by_its_number(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [ack(request, -errno.EOPNOTSUPP)]
    with GenericNetlink("fake") as netlink, pytest.raises(KernelError) as caught:
        netlink.request(99)
    assert caught.value.call == "fake command 99"


def test_after_a_refusal_the_socket_is_good(kernel: FakeKernel) -> None:
    answers = iter([-errno.EBUSY, 0])
    kernel.answer = lambda request: [ack(request, next(answers))]
    with GenericNetlink("fake") as netlink:
        with pytest.raises(KernelError):
            netlink.request(Command.BIND_RX)
        netlink.request(Command.BIND_RX)


# --- what is not an answer ------------------------------------------------------------------------------------------


def test_messages_of_others_are_passed_over(kernel: FakeKernel) -> None:
    def answer(request: Message) -> Sequence[Datagram]:
        forged = entry(request, nl.attr_u32(1, 666)) + done(request)
        return [
            (forged, 0, 1234),  # from a process, not the kernel
            entry(request, nl.attr_u32(1, 1), sequence=request.sequence - 1),  # of an earlier request
            entry(request, nl.attr_u32(1, 2), sequence=0),  # a notification
            entry(request, nl.attr_u32(1, 3), port=PORT + 1),  # to another port
            nl.message(nl.NLMSG_NOOP, 0, request.sequence, b"", port=PORT),
            entry(request, nl.attr_u32(1, 12)),
            done(request),
        ]

    kernel.answer = answer
    with GenericNetlink("fake") as netlink:
        assert numbers(netlink.dump(Command.BIND_RX)) == [12]


def test_no_answer_is_an_error_not_a_wait(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [entry(request)]
    with GenericNetlink("fake") as netlink, pytest.raises(BrokenError, match="no answer"):
        netlink.request(Command.BIND_RX)


@pytest.mark.parametrize("garbage", [b"\x01", bytes(16), nl.message(FAMILY_ID, 0, 2, b"\0", port=PORT)])
def test_garbage_is_an_error_and_the_next_request_is_good(kernel: FakeKernel, garbage: bytes) -> None:
    first = True

    def answer(request: Message) -> Sequence[Datagram]:
        nonlocal first
        mixed = [garbage] if first else []
        first = False
        return [*mixed, entry(request, nl.attr_u32(4, 5)), ack(request)]

    kernel.answer = answer
    with GenericNetlink("fake") as netlink:
        with pytest.raises(BrokenError, match="makes no sense"):
            netlink.request(Command.BIND_RX)
        assert netlink.request(Command.BIND_RX).u32(4) == 5
        assert not kernel.queue


def test_a_truncated_answer_is_an_error(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [(entry(request), socket.MSG_TRUNC, 0), ack(request)]
    with GenericNetlink("fake") as netlink, pytest.raises(BrokenError, match="65536 bytes"):
        netlink.request(Command.BIND_RX)


# --- dumps ----------------------------------------------------------------------------------------------------------


def test_a_dump_collects_all_its_parts(kernel: FakeKernel) -> None:
    def answer(request: Message) -> Sequence[Datagram]:
        one, two, three = (entry(request, nl.attr_u32(1, i), flags=nl.NLM_F_MULTI) for i in (1, 2, 3))
        return [one + two, three, done(request)]

    kernel.answer = answer
    with GenericNetlink("fake") as netlink:
        assert numbers(netlink.dump(Command.BIND_RX, nl.attr_u32(1, 9))) == [1, 2, 3]
    assert kernel.requests[0].flags == nl.NLM_F_REQUEST | nl.NLM_F_DUMP
    assert kernel.requests[0].payload == nl.generic(13, FAMILY_VERSION, nl.attr_u32(1, 9))


def test_an_empty_dump_is_empty(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [done(request)]
    with GenericNetlink("fake") as netlink:
        assert netlink.dump(Command.BIND_RX) == []


@pytest.mark.parametrize("how", [ack, done])
def test_a_dump_may_be_refused_at_its_start_or_at_its_end(kernel: FakeKernel, how: Callable[..., bytes]) -> None:
    text = nl.attr_string(nl.NLMSGERR_ATTR_MSG, "no such device")
    kernel.answer = lambda request: [how(request, -errno.ENODEV, text)]
    with GenericNetlink("fake") as netlink, pytest.raises(KernelError) as caught:
        netlink.dump(Command.BIND_RX)
    assert (caught.value.errno, caught.value.extack) == (errno.ENODEV, "no such device")
    assert len(kernel.requests) == 1


@pytest.mark.parametrize("where", ["entry", "end"])
def test_a_dump_that_changed_is_read_again(kernel: FakeKernel, where: str) -> None:
    def answer(request: Message) -> Sequence[Datagram]:
        changed = nl.NLM_F_DUMP_INTR if len(kernel.requests) == 1 else 0
        flags = changed if where == "entry" else 0
        end = done(request, flags=changed if where == "end" else 0)
        return [entry(request, nl.attr_u32(1, len(kernel.requests)), flags=flags), end]

    kernel.answer = answer
    with GenericNetlink("fake") as netlink:
        assert numbers(netlink.dump(Command.BIND_RX)) == [2]


def test_a_dump_that_keeps_changing_is_given_up(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [done(request, flags=nl.NLM_F_DUMP_INTR)]
    with GenericNetlink("fake") as netlink, pytest.raises(KernelError, match="try again later") as caught:
        netlink.dump(Command.BIND_RX)
    assert caught.value.errno == errno.EAGAIN
    assert len(kernel.requests) == MAX_ATTEMPTS


def test_an_overflow_is_drained_and_the_dump_read_again(kernel: FakeKernel) -> None:
    def answer(request: Message) -> Sequence[Datagram]:
        lost = [OSError(errno.ENOBUFS, "overflow")] if len(kernel.requests) == 1 else []
        return [entry(request, nl.attr_u32(1, 1)), *lost, entry(request, nl.attr_u32(1, 2)), done(request)]

    kernel.answer = answer
    with GenericNetlink("fake") as netlink:
        assert numbers(netlink.dump(Command.BIND_RX)) == [1, 2]
    assert len(kernel.requests) == 2


def test_a_dump_that_keeps_overflowing_is_given_up(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [OSError(errno.ENOBUFS, "overflow")]
    with GenericNetlink("fake") as netlink, pytest.raises(KernelError) as caught:
        netlink.dump(Command.BIND_RX)
    assert caught.value.errno == errno.ENOBUFS
    assert len(kernel.requests) == MAX_ATTEMPTS


def test_an_overflow_of_a_request_is_told_for_it_may_have_been_done(kernel: FakeKernel) -> None:
    kernel.answer = lambda request: [OSError(errno.ENOBUFS, "overflow"), ack(request)]
    with GenericNetlink("fake") as netlink, pytest.raises(KernelError) as caught:
        netlink.request(Command.BIND_RX)
    assert caught.value.errno == errno.ENOBUFS
    assert len(kernel.requests) == 1


def test_a_dump_that_was_broken_off_is_drained_before_the_next_request(kernel: FakeKernel) -> None:
    def answer(request: Message) -> Sequence[Datagram]:
        assert not kernel.queue, "a dump is under way: Linux would answer EBUSY"
        return [entry(request, nl.attr_u32(1, 1)), done(request)]

    kernel.answer = answer
    with GenericNetlink("fake") as netlink:
        with fail_nth(1, errno=errno.EINTR, only={"recvmsg"}), pytest.raises(KernelError):
            netlink.dump(Command.BIND_RX)
        assert numbers(netlink.dump(Command.BIND_RX)) == [1]


# --- threads --------------------------------------------------------------------------------------------------------


def test_a_second_thread_meanwhile_is_told_that_it_is_busy(kernel: FakeKernel) -> None:
    raised: list[BaseException] = []

    def ask_too() -> None:
        try:
            netlink.request(Command.BIND_RX)
        except BaseException as error:
            raised.append(error)

    def in_between() -> None:
        kernel.before_send = lambda: None
        thread = threading.Thread(target=ask_too)
        thread.start()
        thread.join()

    with GenericNetlink("fake") as netlink:
        kernel.before_send = in_between
        netlink.request(Command.BIND_RX)
        assert len(kernel.requests) == 1
        ask_too()  # not at the same time: welcome
    assert [type(error) for error in raised] == [BusyError]


# --- Linux ----------------------------------------------------------------------------------------------------------

GET_FAMILY = nl.AttributeNames({nl.CTRL_ATTR_FAMILY_NAME: "family-name"})


def test_linux_lists_its_families_and_tells_one() -> None:
    with GenericNetlink("nlctrl") as netlink:
        listed = {each.string(nl.CTRL_ATTR_FAMILY_NAME) for each in netlink.dump(nl.CTRL_CMD_GETFAMILY)}
        assert "nlctrl" in listed
        wanted = nl.attr_string(nl.CTRL_ATTR_FAMILY_NAME, "nlctrl")
        assert netlink.request(nl.CTRL_CMD_GETFAMILY, wanted).u16(nl.CTRL_ATTR_FAMILY_ID) == nl.GENL_ID_CTRL


def test_linux_names_the_attribute_it_refuses() -> None:
    too_long = nl.attr_string(nl.CTRL_ATTR_FAMILY_NAME, "x" * 40)
    with GenericNetlink("nlctrl") as netlink, pytest.raises(KernelError) as caught:
        netlink.request(nl.CTRL_CMD_GETFAMILY, too_long, attributes=GET_FAMILY)
    assert caught.value.errno in (errno.EINVAL, errno.ERANGE)  # older, newer kernels
    assert caught.value.attr == "family-name"
    assert caught.value.extack


def test_linux_has_no_family_of_a_made_up_name() -> None:
    with pytest.raises(KernelError) as caught:
        GenericNetlink("made-up")
    assert caught.value.errno == errno.ENOENT


def test_the_socket_is_close_on_exec_and_gone_after_close() -> None:
    with GenericNetlink("nlctrl") as netlink:
        fd = netlink.fileno()
        assert not os.get_inheritable(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_every_system_call_may_fail_and_nothing_is_left() -> None:
    def scenario() -> None:
        with GenericNetlink("nlctrl") as netlink:
            netlink.dump(nl.CTRL_CMD_GETFAMILY)

    runs = sweep(scenario, errnos=(errno.ENOMEM, errno.ENOBUFS, errno.EMFILE))
    assert {run.call for run in runs} == {"socket", "setsockopt", "bind", "getsockname", "send", "recvmsg"}


def test_a_fault_in_a_dump_leaves_the_socket_good() -> None:
    with GenericNetlink("nlctrl") as netlink:
        with fail_nth(1, only={"recvmsg"}), pytest.raises(KernelError):
            netlink.dump(nl.CTRL_CMD_GETFAMILY)
        assert len(netlink.dump(nl.CTRL_CMD_GETFAMILY)) > 1
