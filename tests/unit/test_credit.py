"""Credit: what a sender may send, and what a receiver may promise."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from devmem_tcp.errors import LocalProtocolError, RemoteProtocolError
from devmem_tcp.sansio.credit import Grant, Quiet, ReceiveCredit, SendCredit
from devmem_tcp.sansio.frames import MAX_TOTAL


def due(credit: ReceiveCredit) -> bool:
    return credit.grant_is_due


def test_a_sender_has_nothing_before_the_first_grant() -> None:
    credit = SendCredit()
    assert (credit.room(0), credit.messages_left) == (0, 0)
    with pytest.raises(LocalProtocolError, match="no credit for another message"):
        credit.take_message()


def test_room_is_counted_from_a_place_in_the_order_of_all_bytes() -> None:
    credit = SendCredit()
    credit.grant(100, 2)
    assert [credit.room(place) for place in (0, 99, 100, 500)] == [100, 1, 0, 0]
    credit.take_message()
    credit.take_message()
    assert credit.messages_left == 0
    with pytest.raises(LocalProtocolError):
        credit.take_message()


@pytest.mark.parametrize("grant", [(99, 2), (100, 1)])
def test_a_grant_cannot_be_taken_back(grant: tuple[int, int]) -> None:
    credit = SendCredit()
    credit.grant(100, 2)
    credit.grant(100, 2)
    with pytest.raises(RemoteProtocolError, match="takes back what was granted: 100 and 2"):
        credit.grant(*grant)
    assert (credit.granted_bytes, credit.granted_messages) == (100, 2)


def test_the_whole_pool_is_granted_first_and_then_in_quarters() -> None:
    credit = ReceiveCredit(100, 8)
    assert due(credit)
    assert credit.take_grant() == Grant(100, 8)
    assert not due(credit)
    credit.message_arrived()
    credit.bytes_arrived(0, 60)
    credit.release(24)
    assert not due(credit), "the sender has 40 bytes left, and 24 are less than a quarter"
    credit.release(1)
    assert due(credit)
    assert credit.take_grant() == Grant(125, 8)
    credit.release(0, 1)
    assert not due(credit)
    for _ in range(6):
        credit.message_arrived()
    assert due(credit), "one message is left to the sender, less than a quarter"
    assert credit.take_grant() == Grant(125, 9)


def test_a_starving_sender_gets_every_byte() -> None:
    credit = ReceiveCredit(100, 8)
    credit.take_grant()
    credit.bytes_arrived(0, 76)
    credit.release(1)
    assert due(credit)
    assert credit.take_grant().total_bytes == 101


@pytest.mark.parametrize(
    ("nbytes", "arrivals", "releases"),
    [(1, 6, 1), (3, 6, 1), (10, 6, 1), (30, 2, 0), (75, 1, 0), (76, 0, 0)],
)
def test_a_few_messages_come_and_go_without_a_grant(nbytes: int, arrivals: int, releases: int) -> None:
    credit = ReceiveCredit(100, 8)
    credit.take_grant()
    assert credit.quiet(nbytes) == Quiet(arrivals, releases)


@given(
    pool=st.tuples(st.integers(1, 200), st.integers(1, 40)),
    before=st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=20),
    nbytes=st.integers(1, 30),
    data=st.data(),
)
def test_nothing_is_due_while_it_is_said_to_be_quiet(
    pool: tuple[int, int], before: list[tuple[bool, int]], nbytes: int, data: st.DataObject
) -> None:
    """In whatever order messages come and go."""
    credit = ReceiveCredit(*pool)
    credit.take_grant()
    held: list[int] = []

    def arrive(size: int) -> None:
        credit.message_arrived()
        credit.bytes_arrived(credit.arrived_bytes, size)
        held.append(size)

    for comes, size in before:
        if due(credit):
            credit.take_grant()
        if (
            comes
            and credit.granted_messages > credit.arrived_messages
            and credit.granted_bytes >= size + credit.arrived_bytes
        ):
            arrive(size)
        elif held:
            credit.release(held.pop(), 1)
    if due(credit):
        credit.take_grant()
    quiet = credit.quiet(nbytes)
    steps = data.draw(st.permutations(["come"] * quiet.arrivals + ["go"] * quiet.releases))
    for step in steps:
        if step == "come":
            arrive(nbytes)
        elif nbytes in held:
            held.remove(nbytes)
            credit.release(nbytes, 1)
        assert not due(credit)


def test_what_was_not_granted_is_not_taken() -> None:
    credit = ReceiveCredit(100, 1)
    with pytest.raises(RemoteProtocolError, match="message 0 was announced without credit"):
        credit.message_arrived()
    credit.take_grant()
    credit.message_arrived()
    with pytest.raises(RemoteProtocolError, match="message 1 was announced without credit"):
        credit.message_arrived()
    credit.bytes_arrived(60, 40)
    with pytest.raises(RemoteProtocolError, match="bytes up to 101 were sent, and 100 granted"):
        credit.bytes_arrived(61, 40)
    assert credit.arrived_bytes == 40


@pytest.mark.parametrize(("nbytes", "messages"), [(11, 0), (0, 2), (-1, 0), (0, -1)])
def test_only_what_came_can_be_released(nbytes: int, messages: int) -> None:
    credit = ReceiveCredit(100, 8)
    credit.take_grant()
    credit.message_arrived()
    credit.bytes_arrived(0, 10)
    with pytest.raises(LocalProtocolError, match="not released"):
        credit.release(nbytes, messages)
    credit.release(10, 1)
    with pytest.raises(LocalProtocolError):
        credit.release(1)


@pytest.mark.parametrize("pool", [(0, 1), (1, 0), (-1, 1)])
def test_a_pool_of_nothing_is_refused(pool: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="never receives anything"):
        ReceiveCredit(*pool)


def test_totals_end_where_the_wire_does() -> None:
    assert ReceiveCredit(MAX_TOTAL + 5, MAX_TOTAL + 5).take_grant() == Grant(MAX_TOTAL, MAX_TOTAL)


class Accounts(RuleBasedStateMachine):
    """One sender and one receiver, grants on their way, messages cancelled now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.sender = SendCredit()
        self.receiver = ReceiveCredit(40, 3)
        self.grants: list[Grant] = []
        self.place = 0
        self.held = 0
        self.live = 0

    @precondition(lambda self: self.receiver.grant_is_due)
    @rule()
    def grant(self) -> None:
        self.grants.append(self.receiver.take_grant())

    @precondition(lambda self: self.grants)
    @rule()
    def grant_arrives(self) -> None:
        self.sender.grant(*self.grants.pop(0))

    @precondition(lambda self: self.sender.messages_left)
    @rule(nbytes=st.integers(0, 100), cancelled=st.booleans())
    def message(self, nbytes: int, cancelled: bool) -> None:
        self.sender.take_message()
        self.receiver.message_arrived()
        self.live += 1
        sent = min(nbytes, self.sender.room(self.place))
        if sent:
            self.receiver.bytes_arrived(self.place, sent)
        self.held += sent
        if cancelled or sent == nbytes:
            self.receiver.bytes_skipped(nbytes - sent)
            self.place += nbytes
        else:
            self.place += sent

    @precondition(lambda self: self.held or self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        nbytes, messages = data.draw(st.integers(0, self.held)), data.draw(st.integers(0, self.live))
        self.receiver.release(nbytes, messages)
        self.held -= nbytes
        self.live -= messages

    @invariant()
    def the_pool_is_never_promised_twice(self) -> None:
        assert self.held <= 40
        assert self.live <= 3
        assert self.receiver.granted_bytes - self.receiver.released_bytes <= 40
        assert self.receiver.granted_messages - self.receiver.released_messages <= 3
        assert self.sender.granted_bytes <= self.receiver.granted_bytes

    @invariant()
    def nobody_starves_while_the_pool_is_empty(self) -> None:
        if not self.held and not self.grants and not self.receiver.grant_is_due:
            assert self.sender.room(self.place) > 0
        if not self.live and not self.grants and not self.receiver.grant_is_due:
            assert self.sender.messages_left > 0


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=50, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow])
