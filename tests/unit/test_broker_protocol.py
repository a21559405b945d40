"""The broker's messages: what is sent is what is received, what is no message is refused, errors come whole."""

from __future__ import annotations

import errno
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.broker import protocol
from devmem_tcp.broker.protocol import Answer, Failed, Request
from devmem_tcp.errors import (
    BindError,
    BrokenError,
    BusyError,
    ClosedError,
    DevmemError,
    KernelError,
    NicSettingError,
    OutOfDeviceMemory,
    RemoteProtocolError,
    RestoreError,
    SettingWarning,
    StaleFragError,
)
from devmem_tcp.types import Family, FlowRule, HeaderSplitMode

U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFF_FFFF)
SIZES = st.integers(0, (1 << 63) - 1)
HANDLES = st.integers(1, (1 << 63) - 1)
WORDS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=protocol.MAX_WORDS)
IPS = st.ip_addresses().map(str)
RULES = st.builds(
    FlowRule,
    queue=U16,
    family=st.none() | st.sampled_from(Family),
    src_ip=st.none() | IPS,
    dst_ip=st.none() | IPS,
    src_port=st.none() | U16,
    dst_port=st.none() | U16,
    src_port_mask=U16,
    dst_port_mask=U16,
    location=st.none() | U32,
)
REQUESTS: st.SearchStrategy[Request] = st.one_of(
    st.builds(protocol.Hello, version=U32),
    st.builds(protocol.OpenNic, nic=st.from_regex(r"[a-z0-9.@_-]{1,15}", fullmatch=True), network_namespace=SIZES),
    st.builds(protocol.SetHeaderSplit, mode=st.sampled_from(HeaderSplitMode)),
    st.builds(protocol.SetHdsThresh, size_bytes=SIZES),
    st.builds(protocol.SetRss, table=st.lists(U16, min_size=1, max_size=300), words=WORDS),
    st.builds(protocol.AddNtuple, rule=RULES.map(protocol.Rule.of)),
    st.builds(protocol.Attach, queues=st.lists(U16, min_size=1, max_size=100), rx_page_size=U32),
    st.builds(protocol.Undo, handle=HANDLES),
    st.just(protocol.UndoAll()),
    st.builds(protocol.Allocate, kind=st.text(min_size=1, max_size=10), size_bytes=SIZES),
    st.just(protocol.GetStatus()),
)
TEXTS = st.text(max_size=2000)
ANSWERS: st.SearchStrategy[Answer] = st.one_of(
    st.builds(protocol.Welcome, version=U32, kinds=st.lists(st.text())),
    st.just(protocol.Done()),
    st.builds(protocol.Changed, handle=HANDLES, description=WORDS),
    st.builds(protocol.RuleAdded, handle=HANDLES, description=WORDS, rule=RULES.map(protocol.Rule.of)),
    st.builds(protocol.Attached, handle=HANDLES, dmabuf_id=U32),
    st.builds(protocol.Allocated, handle=HANDLES),
    st.builds(
        protocol.Status,
        user_id=U32,
        quotas=st.dictionaries(st.text(), st.builds(protocol.Amount, used=SIZES, allowed=SIZES), max_size=6),
        leased=st.dictionaries(st.text(), st.lists(U16), max_size=3),
    ),
)


@given(REQUESTS)
def test_requests_round_trip(request: Request) -> None:
    data = protocol.encode_request(request)
    assert protocol.decode_request(data, [7] * isinstance(request, protocol.Attach)) == request


@given(ANSWERS)
def test_answers_round_trip(answer: Answer) -> None:
    assert protocol.decode_answer(protocol.encode(answer), [7] * isinstance(answer, protocol.Allocated)) == answer


@given(RULES)
def test_rules_round_trip(rule: FlowRule) -> None:
    assert protocol.Rule.of(rule).flow_rule() == rule


@given(st.binary(max_size=300))
def test_bytes_are_a_request_or_refused(data: bytes) -> None:
    try:
        request = protocol.decode_request(data, [])
    except RemoteProtocolError:
        return
    assert protocol.decode_request(protocol.encode_request(request), []) == request


@given(REQUESTS, st.data())
def test_a_request_that_is_cut_short_is_refused(request: Request, data: st.DataObject) -> None:
    whole = protocol.encode_request(request)
    with pytest.raises(RemoteProtocolError):
        protocol.decode_request(whole[: data.draw(st.integers(0, len(whole) - 1))], [])


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        {"do": "juggle"},
        {"do": "open", "nic": "", "network_namespace": 1},
        {"do": "open", "nic": "a" * 16, "network_namespace": 1},
        {"do": "open", "nic": "../eth0", "network_namespace": 1},
        {"do": "open", "nic": "eth0\n", "network_namespace": 1},
        {"do": "open", "nic": "eth0", "network_namespace": -1},
        {"do": "set-header-split", "mode": "maybe"},
        {"do": "set-rss", "table": [], "words": ""},
        {"do": "set-rss", "table": [65536], "words": ""},
        {"do": "set-rss", "table": [0] * (protocol.MAX_RSS_ENTRIES + 1), "words": ""},
        {"do": "set-rss", "table": [0], "words": "two\nlines"},
        {"do": "add-ntuple", "rule": {"queue": 1, "dst_port": 65536}},
        {"do": "add-ntuple", "rule": {"queue": True}},
        {"do": "add-ntuple", "rule": {"queue": 1, "src_ip": "$(reboot)"}},
        {"do": "add-ntuple", "rule": {"queue": 1, "port": 3}},
        {"do": "undo", "handle": 0},
        {"do": "undo", "handle": 1 << 63},
        {"do": "undo", "handle": 1.5},
        {"do": "undo-all", "really": True},
        {"do": "allocate", "kind": "k" * 65, "size_bytes": 1},
    ],
)
def test_what_is_over_a_limit_is_refused(message: object) -> None:
    with pytest.raises(RemoteProtocolError):
        protocol.decode_request(json.dumps(message).encode(), [])


def test_the_largest_request_fits() -> None:
    table = [0xFFFF] * protocol.MAX_RSS_ENTRIES
    request = protocol.SetRss(table=table, words='"' * protocol.MAX_WORDS)
    assert len(protocol.encode_request(request)) <= protocol.MAX_MESSAGE_BYTES


def test_the_largest_error_and_its_warnings_fit() -> None:
    text = "\x01" * 100_000
    failed = protocol.pack_error(BindError(errno.EINVAL, text, extack=text, attr=text, hint=text))
    answer = protocol.with_warnings(failed, [SettingWarning(text)] * 100)
    assert len(protocol.encode(answer)) <= protocol.MAX_MESSAGE_BYTES


def test_what_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="over the broker's limit of 65536"):
        protocol.encode(protocol.Welcome(version=1, kinds=["k" * 70_000]))


@pytest.mark.parametrize(
    ("request_", "count"), [(protocol.Undo(handle=1), 1), (protocol.Attach(queues=[1], rx_page_size=4096), 0)]
)
def test_fds_belong_to_some_requests_alone(request_: Request, count: int) -> None:
    with pytest.raises(RemoteProtocolError, match="fd"):
        protocol.decode_request(protocol.encode_request(request_), [3] * count)


def test_hello_and_answers_may_say_more_in_later_versions() -> None:
    assert protocol.decode_request(b'{"do":"hello","version":9,"name":"x"}', []) == protocol.Hello(version=9)
    assert protocol.decode_answer(b'{"is":"attached","handle":1,"dmabuf_id":3,"napi":7}', []) == protocol.Attached(
        handle=1, dmabuf_id=3
    )


ERRORS = [
    KernelError(errno.ENODEV, "open eth9", hint="there is eth0"),
    BindError(errno.EINVAL, "bind-rx", extack="tcp-data-split is disabled", attr="queues.id", hint="turn it on"),
    NicSettingError(errno.ENOSPC, "ethtool -N", extack="table full"),
    OutOfDeviceMemory("too much", wanted=10, free=3, hint="less"),
    RestoreError("it stays", journal="/run/x.json", hint="restore"),
    BusyError("leased", hint="wait"),
    ClosedError("closed"),
    BrokenError("broken", hint="open again"),
    DevmemError("something"),
    ValueError("no such queue"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_come_whole(error: Exception) -> None:
    answer = protocol.decode_answer(protocol.encode(protocol.pack_error(error)), [])
    assert isinstance(answer, Failed)
    raised = protocol.unpack_error(answer)
    assert type(raised) is type(error)
    assert str(raised) == str(error)
    kept = {"errno", "call", "extack", "attr", "hint", "wanted", "free", "journal", "message"}
    assert {k: v for k, v in vars(raised).items() if k in kept} == {k: v for k, v in vars(error).items() if k in kept}
    if isinstance(error, OSError):
        assert (raised.errno, raised.strerror) == (error.errno, error.strerror)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StaleFragError("of no use to a client"), DevmemError),
        (PermissionError(errno.EPERM, "Operation not permitted"), KernelError),
        (AssertionError("a mistake"), BrokenError),
    ],
)
def test_other_errors_become_the_nearest(error: Exception, kind: type[Exception]) -> None:
    raised = protocol.unpack_error(protocol.pack_error(error))
    assert type(raised) is kind
    assert str(error) in str(raised) or isinstance(error, OSError)


def test_an_error_of_a_later_version_is_still_one() -> None:
    assert type(protocol.unpack_error(Failed(error="NewError", message="new"))) is DevmemError


def test_no_message_has_a_default_that_could_be_forgotten() -> None:
    for kind in (protocol.OpenNic, protocol.SetRss, protocol.Attach, protocol.Allocate, protocol.Undo):
        assert all(info.required for info in msgspec.structs.fields(kind)), kind
