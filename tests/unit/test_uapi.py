"""The kernel ABI in Python against golden bytes, and the golden bytes against this machine's C compiler and headers."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from devmem_tcp import types
from devmem_tcp.uapi import dmabuf, errqueue, netlink, socket

HERE = Path(__file__).parent
SOURCE = HERE / "uapi_abi.c"
GOLDEN = HERE / "uapi_abi.golden"

DMABUF = socket.SCM_DEVMEM_DMABUF
LINEAR = socket.SCM_DEVMEM_LINEAR

# What the golden program's receive control holds, as (offset, size, token, dmabuf_id, kind).
RECEIVED = [
    (0, 100, 0, 0, LINEAR),
    (0x5000, 4096, 1, 3, DMABUF),
    (0x123456789000, 3720, 2, 3, DMABUF),
    (100, 1, 0, 0, LINEAR),
    (0x1001, 1, 0xFFFFFFFF, 0x80000000, DMABUF),
    (101, 23, 0, 0, LINEAR),
]
IPV4_COMPLETIONS = [(0, 9), (0xFFFFFFFE, 1)]
IPV6_COMPLETIONS = [(10, 10), (11, 12)]

SOCKET_NAMES = [
    "SOL_SOCKET",
    "SO_ZEROCOPY",
    "SO_INCOMING_NAPI_ID",
    "SO_DEVMEM_LINEAR",
    "SO_DEVMEM_DMABUF",
    "SO_DEVMEM_DONTNEED",
    "SCM_DEVMEM_LINEAR",
    "SCM_DEVMEM_DMABUF",
    "MSG_SOCK_DEVMEM",
    "MSG_ZEROCOPY",
]
ERRQUEUE_NAMES = [
    "SOL_IP",
    "IP_RECVERR",
    "SOL_IPV6",
    "IPV6_RECVERR",
    "SO_EE_ORIGIN_ZEROCOPY",
    "SO_EE_CODE_ZEROCOPY_COPIED",
]
DMABUF_NAMES = [
    "UDMABUF_CREATE",
    "UDMABUF_CREATE_LIST",
    "UDMABUF_FLAGS_CLOEXEC",
    "DMA_HEAP_IOCTL_ALLOC",
    "O_RDWR",
    "O_CLOEXEC",
    "DMA_BUF_IOCTL_SYNC",
    "DMA_BUF_SYNC_READ",
    "DMA_BUF_SYNC_WRITE",
    "DMA_BUF_SYNC_RW",
    "DMA_BUF_SYNC_START",
    "DMA_BUF_SYNC_END",
]
NETLINK_NAMES = [
    "NETLINK_GENERIC",
    "SOL_NETLINK",
    "NETLINK_CAP_ACK",
    "NETLINK_EXT_ACK",
    "NLMSG_NOOP",
    "NLMSG_ERROR",
    "NLMSG_DONE",
    "NLMSG_MIN_TYPE",
    "NLM_F_REQUEST",
    "NLM_F_MULTI",
    "NLM_F_ACK",
    "NLM_F_DUMP_INTR",
    "NLM_F_DUMP",
    "NLM_F_CAPPED",
    "NLM_F_ACK_TLVS",
    "NLA_F_NESTED",
    "NLA_F_NET_BYTEORDER",
    "NLMSGERR_ATTR_MSG",
    "NLMSGERR_ATTR_OFFS",
    "NLMSGERR_ATTR_POLICY",
    "NLMSGERR_ATTR_MISS_TYPE",
    "NLMSGERR_ATTR_MISS_NEST",
    "NL_POLICY_TYPE_ATTR_MIN_VALUE_S",
    "NL_POLICY_TYPE_ATTR_MAX_VALUE_S",
    "NL_POLICY_TYPE_ATTR_MIN_VALUE_U",
    "NL_POLICY_TYPE_ATTR_MAX_VALUE_U",
    "NL_POLICY_TYPE_ATTR_MIN_LENGTH",
    "NL_POLICY_TYPE_ATTR_MAX_LENGTH",
    "GENL_ID_CTRL",
    "CTRL_CMD_GETFAMILY",
    "CTRL_ATTR_FAMILY_ID",
    "CTRL_ATTR_FAMILY_NAME",
    "CTRL_ATTR_VERSION",
]


def parse_golden(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines())


def golden_bytes(name: str) -> bytearray:
    return bytearray.fromhex(parse_golden(GOLDEN.read_text())[name])


def frags_of(rows: list[tuple[int, int, int, int, int]]) -> npt.NDArray[np.void]:
    return np.array(rows, socket.FRAG_DTYPE)


def dmabuf_frags(count: int) -> npt.NDArray[np.void]:
    """Make ``count`` DMABUF frags of a page each; every column tells its frag."""
    return frags_of([(i * 4096, 4096 - i % 7, i + 1, 3, DMABUF) for i in range(count)])


def foreign_cmsg(data: bytes, *, level: int = socket.SOL_SOCKET, kind: int = 29) -> bytes:
    """Make a control message that is none of ours; the default is SCM_TIMESTAMP."""
    record = struct.pack("<Qii", 16 + len(data), level, kind) + data
    return record + bytes(-len(record) % 8)


# --- the ABI --------------------------------------------------------------------------------------------------------


def our_numbers() -> dict[str, int]:
    numbers = {name: getattr(socket, name) for name in SOCKET_NAMES}
    numbers |= {name: getattr(errqueue, name) for name in ERRQUEUE_NAMES}
    numbers |= {name: getattr(dmabuf, name) for name in DMABUF_NAMES}
    numbers |= {name: getattr(netlink, name) for name in NETLINK_NAMES}
    numbers |= {
        "(__u16)NLA_TYPE_MASK": netlink.NLA_TYPE_MASK,
        "sizeof(struct nlmsghdr)": netlink.NLMSGHDR.size,
        "sizeof(struct genlmsghdr)": netlink.GENLMSGHDR.size,
        "sizeof(struct nlattr)": netlink.NLATTR.size,
        "UIO_MAXIOV": socket.MAX_IOVECS,
        "CMSG_LEN(0)": socket.CMSG_HEADER_SIZE,
        "CMSG_LEN(24)": socket.CMSG_HEADER_SIZE + socket.DMABUF_CMSG.size,
        "CMSG_SPACE(24)": socket.CONTROL_SPACE_PER_FRAG,
        "CMSG_ALIGN(1)": socket.align_control(1),
        "sizeof(struct sock_extended_err)": errqueue.SOCK_EXTENDED_ERR.size,
        "sizeof(struct udmabuf_create)": dmabuf.UDMABUF_CREATE_STRUCT.size,
        "sizeof(struct udmabuf_create_list)": dmabuf.UDMABUF_CREATE_LIST_HEAD.size,
        "sizeof(struct udmabuf_create_item)": dmabuf.UDMABUF_CREATE_ITEM.size,
        "sizeof(struct dma_heap_allocation_data)": dmabuf.DMA_HEAP_ALLOCATION_DATA.size,
        "sizeof(struct dma_buf_sync)": dmabuf.DMA_BUF_SYNC.size,
    }
    numbers |= layout_numbers("cmsghdr", "cmsg_", socket.CMSGHDR_DTYPE)
    numbers |= layout_numbers("dmabuf_cmsg", "", socket.DMABUF_CMSG_DTYPE)
    return numbers | layout_numbers("dmabuf_token", "token_", socket.TOKEN_DTYPE)


def layout_numbers(struct_name: str, prefix: str, dtype: np.dtype[Any]) -> dict[str, int]:
    assert dtype.fields is not None
    offsets = {f"offsetof(struct {struct_name}, {prefix}{name})": field[1] for name, field in dtype.fields.items()}
    return offsets | {f"sizeof(struct {struct_name})": dtype.itemsize}


def our_bytes() -> dict[str, bytes]:
    header = socket.CMSGHDR.pack(socket.CONTROL_SPACE_PER_FRAG, socket.SOL_SOCKET, socket.SCM_DEVMEM_DMABUF)
    uniform = socket.build_control(frags_of(RECEIVED))
    ipv6 = errqueue.build_errqueue(IPV6_COMPLETIONS, level=errqueue.SOL_IPV6)
    icmp = errqueue.SOCK_EXTENDED_ERR.pack(111, 2, 0, 0, 0, 1, 2)
    completion = errqueue.pack_completion(0xFFFFFFFE, 7, code=errqueue.SO_EE_CODE_ZEROCOPY_COPIED)
    allocation = dmabuf.pack_dma_heap_allocation_data(0x140000000)
    name = netlink.attr(netlink.CTRL_ATTR_FAMILY_NAME | netlink.NLA_F_NESTED, b"netde\0")
    flags = netlink.NLM_F_REQUEST | netlink.NLM_F_ACK
    family = netlink.generic(netlink.CTRL_CMD_GETFAMILY, 2, name)
    inq = [foreign_cmsg(struct.pack("<I", number), level=6, kind=36) for number in (77, 78)]
    return {
        "cmsghdr": header,
        "dmabuf_cmsg": socket.DMABUF_CMSG.pack(0x123456789000, 4096, 0x80000001, 3, 0x55667788),
        "dmabuf_token[2]": socket.pack_tokens([1, 0xFFFFFFFE], [128, 2]).tobytes(),
        "sock_extended_err": completion,
        "sock_extended_err icmp": errqueue.SOCK_EXTENDED_ERR.pack(111, 2, 3, 4, 9, 0x01020304, 0x05060708),
        "udmabuf_create": dmabuf.pack_udmabuf_create(7, 0x100002000, 0x4000000),
        "udmabuf_create_list": dmabuf.pack_udmabuf_create_list([(7, 0x1000, 0x200000), (8, 0x100002000, 0x3000)]),
        "dma_heap_allocation_data": allocation,
        "dma_heap_allocation_data answered": allocation[:8] + struct.pack("<I", 42) + allocation[12:],
        "dma_buf_sync": dmabuf.pack_dma_buf_sync(dmabuf.DMA_BUF_SYNC_END | dmabuf.DMA_BUF_SYNC_RW),
        "receive control uniform": uniform,
        "receive control mixed": uniform[:120] + inq[0] + uniform[120:] + inq[1],
        "errqueue control ipv4": errqueue.build_errqueue(IPV4_COMPLETIONS, level=errqueue.SOL_IP),
        "errqueue control ipv6": ipv6,
        "netlink request": netlink.message(netlink.GENL_ID_CTRL, flags, 0x01020304, family, port=0x05060708),
        "errqueue control mixed": ipv6 + foreign_cmsg(icmp, level=0, kind=11) + inq[0],
    }


def test_every_golden_line_equals_ours() -> None:
    ours = {name: str(number) for name, number in our_numbers().items()}
    ours |= {name: data.hex() for name, data in our_bytes().items()}
    assert ours == parse_golden(GOLDEN.read_text())


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: golden bytes checked only")
def test_golden_is_what_a_c_program_prints(tmp_path: Path) -> None:
    program = tmp_path / "uapi_abi"
    compiled = subprocess.run(
        ["cc", "-std=gnu11", "-Wall", "-o", program, SOURCE], capture_output=True, text=True, timeout=50, check=False
    )
    assert compiled.returncode == 0, compiled.stderr
    printed = subprocess.run([program], capture_output=True, text=True, timeout=10, check=True).stdout
    assert parse_golden(printed) == parse_golden(GOLDEN.read_text())


def test_structs_and_dtypes_say_the_same() -> None:
    values = (0x123456789000, 4096, 0x80000001, 3, 0x55667788)
    assert np.array([values], socket.DMABUF_CMSG_DTYPE).tobytes() == socket.DMABUF_CMSG.pack(*values)
    assert np.array([(5, 128)], socket.TOKEN_DTYPE).tobytes() == socket.DMABUF_TOKEN.pack(5, 128)
    assert np.array([(40, 1, -1)], socket.CMSGHDR_DTYPE).tobytes() == socket.CMSGHDR.pack(40, 1, -1)


def test_frag_dtype_is_that_of_types() -> None:
    assert socket.FRAG_DTYPE == types.FRAG_DTYPE
    assert socket.FRAG_DTYPE.itemsize == socket.DMABUF_CMSG.size


def test_limits_of_dontneed() -> None:
    assert (socket.MAX_DONTNEED_TOKENS, socket.MAX_DONTNEED_FRAGS) == (128, 1024)


# --- receive control ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["receive control uniform", "receive control mixed"])
def test_parses_what_the_c_library_builds(name: str) -> None:
    control = golden_bytes(name)
    parsed = socket.parse_control(control, len(control))
    assert parsed.dtype == types.FRAG_DTYPE
    assert parsed.tolist() == RECEIVED


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 100, 8192, 8193])
def test_control_round_trip_of_every_size(count: int) -> None:
    frags = dmabuf_frags(count)
    control = socket.build_control(frags)
    assert len(control) == count * socket.CONTROL_SPACE_PER_FRAG
    assert np.array_equal(socket.parse_control(control, len(control)), frags)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda data: memoryview(data).cast("Q")])
@pytest.mark.parametrize("count", [1, 9])
def test_any_buffer_will_do_and_bytes_past_the_length_do_not_count(count: int, wrap: Any) -> None:
    frags = dmabuf_frags(count)
    control = wrap(socket.build_control(frags) + b"\xff" * 40)
    assert np.array_equal(socket.parse_control(control, count * socket.CONTROL_SPACE_PER_FRAG), frags)


@pytest.mark.parametrize("count", [1, 9])
def test_frags_outlive_the_control_buffer(count: int) -> None:
    control = bytearray(socket.build_control(dmabuf_frags(count)))
    parsed = socket.parse_control(control, len(control))
    control[:] = bytes(len(control))
    control.clear()  # would raise BufferError if anything still looked at it
    assert np.array_equal(parsed, dmabuf_frags(count))


def test_a_control_buffer_is_read_again_after_every_call() -> None:
    control = bytearray(20 * socket.CONTROL_SPACE_PER_FRAG + 7)
    columns = socket.ControlColumns(control)
    wanted: list[Any] = []
    parsed: list[Any] = []
    for count in (20, 1, 0, 13, 4, 20):
        frags = dmabuf_frags(count)
        frags["token"] += len(wanted)
        frags["kind"][::3] = LINEAR if count == 13 else DMABUF
        raw = socket.build_control(frags)
        control[: len(raw)] = raw
        wanted.append(socket.parse_control(raw, len(raw)).tolist())
        parsed.append(columns.parse(len(raw)))
    assert [frags.tolist() for frags in parsed] == wanted  # none changed with the buffer


@pytest.mark.parametrize("length", [-40, 47, 80])
def test_columns_refuse_a_length_outside_their_buffer(length: int) -> None:
    with pytest.raises(ValueError, match="not within the 46 bytes"):
        socket.ControlColumns(bytes(46)).parse(length)


@pytest.mark.parametrize("count", [2, 20])
def test_linear_frags_are_packed_inline(count: int) -> None:
    raw = b"".join(
        socket.CMSGHDR.pack(40, socket.SOL_SOCKET, LINEAR if i % 2 else DMABUF)
        + socket.DMABUF_CMSG.pack(0xABC000, 10 + i, 5, 6, 0)
        for i in range(count)
    )
    parsed = socket.parse_control(raw, len(raw))
    linear = parsed[parsed["kind"] == LINEAR]
    assert parsed["kind"].tolist() == [DMABUF, LINEAR] * (count // 2)
    assert linear["offset"].tolist() == [sum(range(11, 10 + i, 2)) for i in range(1, count, 2)]
    assert not linear["token"].any()
    assert not linear["dmabuf_id"].any()
    assert set(parsed[::2].tolist()) == {(0xABC000, 10 + i, 5, 6, DMABUF) for i in range(0, count, 2)}


def test_linear_offsets_pass_four_gib() -> None:
    frags = frags_of([(0, 0xFFFFFFFF, 0, 0, LINEAR)] * 4)
    control = socket.build_control(frags)
    assert socket.parse_control(control, len(control))["offset"].tolist() == [i * 0xFFFFFFFF for i in range(4)]


@pytest.mark.parametrize("foreign_bytes", [0, 4, 8, 16, 24])
@pytest.mark.parametrize("at", [0, 5, 10])
def test_foreign_messages_are_passed_over(at: int, foreign_bytes: int) -> None:
    frags = dmabuf_frags(10)
    control = socket.build_control(frags)
    cut = at * socket.CONTROL_SPACE_PER_FRAG
    control = control[:cut] + foreign_cmsg(bytes(foreign_bytes)) + control[cut:]
    assert np.array_equal(socket.parse_control(control, len(control)), frags)


def test_our_types_at_another_level_are_foreign() -> None:
    frags = dmabuf_frags(9)
    foreign = foreign_cmsg(bytes(24), level=6, kind=DMABUF)
    control = socket.build_control(frags) + foreign
    assert np.array_equal(socket.parse_control(control, len(control)), frags)


def test_a_message_larger_than_ours_is_read_as_far_as_we_know_it() -> None:
    grown = foreign_cmsg(socket.DMABUF_CMSG.pack(4096, 100, 1, 3, 0) + bytes(16), kind=DMABUF)
    control = socket.build_control(dmabuf_frags(4)) + grown
    assert socket.parse_control(control, len(control)).tolist()[4] == (4096, 100, 1, 3, DMABUF)


def test_the_last_message_may_lack_its_padding() -> None:
    frags = dmabuf_frags(4)
    control = socket.build_control(frags) + foreign_cmsg(bytes(4))[:20]
    assert np.array_equal(socket.parse_control(control, len(control)), frags)


@pytest.mark.parametrize("rest", range(1, 16))
def test_a_tail_too_short_for_a_header_ends_the_walk(rest: int) -> None:
    frags = dmabuf_frags(4)
    control = socket.build_control(frags) + b"\xff" * rest
    assert np.array_equal(socket.parse_control(control, len(control)), frags)


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "less than its header"),
        (15, "less than its header"),
        (41, "run past the end"),
        (2**64 - 1, "run past the end"),
    ],
)
def test_a_message_with_a_wrong_length_is_refused(count: int, length: int, message: str) -> None:
    control = bytearray(socket.build_control(dmabuf_frags(count)))
    at = (count - 1) * socket.CONTROL_SPACE_PER_FRAG
    control[at : at + 8] = struct.pack("<Q", length)
    with pytest.raises(ValueError, match=f"control message at byte {at}: .*{message}"):
        socket.parse_control(control, len(control))


@pytest.mark.parametrize("length", [0, 17])
def test_a_header_that_just_fits_is_looked_at(length: int) -> None:
    control = socket.build_control(dmabuf_frags(4)) + socket.CMSGHDR.pack(length, 6, 36)
    with pytest.raises(ValueError, match="control message at byte 160"):
        socket.parse_control(control, len(control))


@pytest.mark.parametrize("data_bytes", [0, 4, 20, 23])
def test_a_devmem_message_too_short_for_a_frag_is_refused(data_bytes: int) -> None:
    control = socket.build_control(dmabuf_frags(3)) + foreign_cmsg(bytes(data_bytes), kind=DMABUF)
    with pytest.raises(ValueError, match=f"byte 120: {data_bytes} bytes of data are less than struct dmabuf_cmsg's 24"):
        socket.parse_control(control, len(control))


@pytest.mark.parametrize("length", [-1, -40, 41, 1 << 40])
@pytest.mark.parametrize("parse", [socket.parse_control, errqueue.parse_errqueue])
def test_a_length_outside_the_buffer_is_refused(parse: Any, length: int) -> None:
    with pytest.raises(ValueError, match=f"control length {length} is not within the 40 bytes"):
        parse(bytes(40), length)


def test_parsing_makes_no_object_a_frag() -> None:
    """Peak memory stays that of a few columns; a list of tuples would take over 250 bytes a frag."""
    count = 8192
    frags = dmabuf_frags(count)
    frags["kind"][::3] = LINEAR
    for control in (socket.build_control(dmabuf_frags(count)), socket.build_control(frags)):
        tracemalloc.start()
        try:
            socket.parse_control(control, len(control))
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak_bytes < 100 * count


def test_host_frags_have_no_control_message() -> None:
    frags = dmabuf_frags(3)
    frags["kind"][1] = types.FragKind.HOST
    with pytest.raises(ValueError, match="frag 1 is of kind 0"):
        socket.build_control(frags)


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_pack_tokens_takes_arrays_of_any_integer_type() -> None:
    packed = socket.pack_tokens(np.array([1, 9], np.int64), np.array([2, 0], np.uint8))
    assert packed.dtype == socket.TOKEN_DTYPE
    assert packed.tolist() == [(1, 2), (9, 0)]
    assert socket.pack_tokens([], []).tolist() == []


@pytest.mark.parametrize(
    ("starts", "counts", "error"),
    [
        ([1, 2], [1], ValueError),
        ([1], [], ValueError),
        ([[1]], [[1]], ValueError),
        ([-1], [1], ValueError),
        ([1], [1 << 32], ValueError),
        ([1.0], [1], TypeError),
    ],
)
def test_pack_tokens_refuses_what_is_no_token(starts: Any, counts: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        socket.pack_tokens(starts, counts)


# --- error queue ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "completions"),
    [
        ("errqueue control ipv4", IPV4_COMPLETIONS),
        ("errqueue control ipv6", IPV6_COMPLETIONS),
        ("errqueue control mixed", IPV6_COMPLETIONS),
    ],
)
def test_parses_the_error_queue(name: str, completions: list[tuple[int, int]]) -> None:
    control = golden_bytes(name)
    assert errqueue.parse_errqueue(control, len(control)) == completions


@pytest.mark.parametrize("error", [(0, 2, 0, 0, 0, 1, 2), (111, 5, 0, 0, 0, 1, 2)])
def test_other_errors_are_no_completions(error: tuple[int, ...]) -> None:
    control = foreign_cmsg(errqueue.SOCK_EXTENDED_ERR.pack(*error), level=errqueue.SOL_IP, kind=errqueue.IP_RECVERR)
    assert errqueue.parse_errqueue(control, len(control)) == []


def test_the_type_of_the_other_ip_version_is_no_completion() -> None:
    swapped = foreign_cmsg(errqueue.pack_completion(1, 2), level=errqueue.SOL_IP, kind=errqueue.IPV6_RECVERR)
    assert errqueue.parse_errqueue(swapped, len(swapped)) == []


def test_an_error_message_too_short_is_refused() -> None:
    control = foreign_cmsg(bytes(15), level=errqueue.SOL_IPV6, kind=errqueue.IPV6_RECVERR)
    with pytest.raises(ValueError, match="15 bytes of data are less than struct sock_extended_err's 16"):
        errqueue.parse_errqueue(control, len(control))


def test_building_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="completion 0 to 4294967296"):
        errqueue.build_errqueue([(0, 1 << 32)], level=errqueue.SOL_IP)
    with pytest.raises(ValueError, match="not 1"):
        errqueue.build_errqueue([], level=1)


# --- ioctls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "what"),
    [((4, "u", 0, 8), "direction"), ((1, "ā", 0, 8), "kind"), ((1, "u", 256, 8), "number"), ((1, "u", 0, -1), "size")],
)
def test_ioctl_numbers_refuse_what_does_not_fit(arguments: tuple[int, str, int, int], what: str) -> None:
    with pytest.raises(ValueError, match=f"ioctl {what}"):
        dmabuf.ioc(*arguments)


def test_struct_fields_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="struct udmabuf_create of"):
        dmabuf.pack_udmabuf_create(-1, 0, 4096)
    with pytest.raises(ValueError, match="struct udmabuf_create_item of"):
        dmabuf.pack_udmabuf_create_list([(3, 0, -1)])


def test_the_heap_answers_with_an_fd() -> None:
    assert dmabuf.unpack_dma_heap_fd(golden_bytes("dma_heap_allocation_data answered")) == 42
    with pytest.raises(ValueError, match="24 bytes, not 23"):
        dmabuf.unpack_dma_heap_fd(bytes(23))
