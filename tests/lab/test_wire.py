"""The switch: who gets which packet, what is learnt, counted and seen by taps, and sending while being delivered to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.lab.wire import Direction, Packet, Port, PortCounters, Switch

BROADCAST = b"\xff" * 6
MULTICAST = bytes.fromhex("333300000001")


class Jack:
    """A port that keeps what it is given, and may do more on delivery."""

    def __init__(self, name: str, then: Callable[[Packet], None] | None = None) -> None:
        self.name = name
        self.mac = b"\x02" + name.encode()[:5].rjust(5, b"\0")
        self.got: list[Packet] = []
        self._then = then

    def deliver(self, packet: Packet) -> None:
        self.got.append(packet)
        if self._then is not None:
            self._then(packet)


def packet(destination: bytes, source: bytes, payload: bytes = b"", gso_size: int = 0) -> Packet:
    return Packet(destination + source + b"\x08\x00" + payload, gso_size)


def plugged(count: int, **limits: int) -> tuple[Switch, list[Jack]]:
    switch = Switch(**limits)
    jacks = [Jack(chr(ord("a") + i)) for i in range(count)]
    for jack in jacks:
        switch.attach(jack)
    return switch, jacks


def introduce(switch: Switch, *jacks: Jack) -> None:
    """Let the switch learn where each is; forget what that delivered."""
    for jack in jacks:
        switch.send(jack, packet(BROADCAST, jack.mac))
    for port in switch.counters:
        assert isinstance(port, Jack)
        port.got.clear()


# --- forwarding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("destination", [BROADCAST, MULTICAST, b"\x02\0\0\0\0\x99"])
def test_broadcast_multicast_and_unknown_go_to_all_others(destination: bytes) -> None:
    switch, (a, b, c) = plugged(3)
    sent = packet(destination, a.mac)
    switch.send(a, sent)
    assert (a.got, b.got, c.got) == ([], [sent], [sent])


def test_a_known_address_gets_it_alone() -> None:
    switch, (a, b, c) = plugged(3)
    introduce(switch, b)
    sent = packet(b.mac, a.mac, b"x", gso_size=1448)
    switch.send(a, sent)
    assert (a.got, b.got, c.got) == ([], [sent], [])
    assert b.got[0] is sent


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes_is_learnt_and_looked_up(kind: type[bytes]) -> None:
    switch, (a, b, c) = plugged(3)
    switch.send(b, Packet(kind(packet(BROADCAST, b.mac).data)))
    switch.send(a, Packet(kind(packet(b.mac, a.mac).data)))
    assert (len(b.got), len(c.got)) == (1, 1)
    assert dict(switch.addresses) == {b.mac: b, a.mac: a}


def test_a_packet_for_the_senders_own_side_goes_nowhere() -> None:
    switch, (a, b) = plugged(2)
    introduce(switch, a)
    switch.send(a, packet(a.mac, b"\x02\0\0\0\0\x77"))
    assert (a.got, b.got) == ([], [])
    assert switch.counters[a].filtered == 1


def test_an_address_that_moves_is_learnt_anew() -> None:
    switch, (a, b, c) = plugged(3)
    introduce(switch, a, b)
    switch.send(c, packet(BROADCAST, b.mac))
    c.got.clear()
    b.got.clear()
    switch.send(a, packet(b.mac, a.mac))
    assert (len(b.got), len(c.got)) == (0, 1)


def test_a_group_address_is_never_learnt() -> None:
    switch, (a, b, c) = plugged(3)
    switch.send(b, packet(a.mac, MULTICAST))
    switch.send(a, packet(MULTICAST, a.mac))
    assert len(c.got) == 2
    assert set(switch.addresses) == {a.mac}


def test_the_address_table_is_bounded_and_forgets_the_oldest() -> None:
    switch, (a, b, c) = plugged(3, max_addresses=2)
    introduce(switch, a, b)
    switch.send(c, packet(b.mac, c.mac))
    assert list(switch.addresses) == [b.mac, c.mac]
    switch.send(c, packet(b.mac, c.mac))  # known ones push nothing out
    switch.send(a, packet(BROADCAST, c.mac))  # nor does one that moves
    assert dict(switch.addresses) == {b.mac: b, c.mac: a}


def test_runts_are_dropped() -> None:
    switch, (a, b) = plugged(2)
    for size in (0, 6, 13):
        switch.send(a, Packet(bytes(size)))
    assert b.got == []
    assert switch.counters[a] == PortCounters(dropped=3)
    switch.send(a, Packet(BROADCAST + bytes(8)))
    assert len(b.got) == 1


# --- ports -----------------------------------------------------------------------------------------------------------


def test_names_are_unique_and_strangers_are_refused() -> None:
    switch, (a,) = plugged(1)
    with pytest.raises(ValueError, match="'a' is attached already"):
        switch.attach(a)
    with pytest.raises(ValueError, match="'a' is attached already"):
        switch.attach(Jack("a"))
    stranger = Jack("x")
    with pytest.raises(ValueError, match="no port 'x'"):
        switch.send(stranger, packet(BROADCAST, stranger.mac))
    with pytest.raises(ValueError, match="no port 'x'"):
        switch.detach(stranger)


def test_a_detached_port_is_forgotten() -> None:
    switch, (a, b, c) = plugged(3)
    introduce(switch, a, b)
    switch.detach(b)
    assert dict(switch.addresses) == {a.mac: a}
    assert set(switch.counters) == {a, c}
    switch.send(a, packet(b.mac, a.mac))
    assert (len(b.got), len(c.got)) == (0, 1)
    switch.attach(b)
    assert switch.counters[b] == PortCounters()


def test_counters() -> None:
    switch, (a, b, c) = plugged(3)
    switch.send(a, packet(BROADCAST, a.mac, bytes(86)))
    switch.send(b, packet(a.mac, b.mac, bytes(46)))
    assert switch.counters[a] == PortCounters(1, 100, 1, 60, flooded=1)
    assert switch.counters[b] == PortCounters(1, 60, 1, 100)
    assert switch.counters[c] == PortCounters(0, 0, 1, 100)


# --- sending while being delivered to --------------------------------------------------------------------------------


def test_an_answer_waits_its_turn() -> None:
    """b answers a broadcast; c gets the broadcast first all the same, and nobody's deliver runs inside another's."""
    switch = Switch()
    order: list[str] = []
    answer = packet(BROADCAST, b"\x02\0\0\0\0b")

    def note(name: str) -> Callable[[Packet], None]:
        return lambda got: order.append(f"{name}: {'answer' if got is answer else 'question'}")

    def reply(got: Packet) -> None:
        note("b")(got)
        if got is not answer:
            switch.send(b, answer)
            order.append("b: done")

    a, b, c = Jack("a", note("a")), Jack("b", reply), Jack("c", note("c"))
    for jack in (a, b, c):
        switch.attach(jack)
    switch.send(a, packet(BROADCAST, a.mac))
    assert order == ["b: question", "b: done", "c: question", "a: answer", "c: answer"]


def test_a_long_conversation_does_not_recurse() -> None:
    switch = Switch()
    turns = 5000  # far beyond the interpreter's recursion limit

    def reply_from(jack: Jack) -> Callable[[Packet], None]:
        def reply(got: Packet) -> None:
            if len(jack.got) < turns:
                switch.send(jack, packet(bytes(got.data[6:12]), jack.mac))

        return reply

    a, b = Jack("a"), Jack("b")
    a._then, b._then = reply_from(a), reply_from(b)
    switch.attach(a)
    switch.attach(b)
    switch.send(a, packet(BROADCAST, a.mac))
    assert (len(a.got), len(b.got)) == (turns - 1, turns)


def test_what_waits_is_bounded() -> None:
    switch = Switch(max_waiting=3)

    def babble(_got: Packet) -> None:
        for _ in range(5):
            switch.send(b, packet(BROADCAST, b.mac))

    a, b = Jack("a"), Jack("b", babble)
    switch.attach(a)
    switch.attach(b)
    switch.send(a, packet(BROADCAST, a.mac))
    assert len(a.got) == 3
    assert switch.counters[b].dropped == 2


def test_a_fault_in_a_port_leaves_the_switch_working() -> None:
    switch = Switch()

    def fail(_: Packet) -> None:
        switch.send(b, packet(BROADCAST, b.mac))
        raise RuntimeError("broken port")

    a, b = Jack("a"), Jack("b", fail)
    switch.attach(a)
    switch.attach(b)
    with pytest.raises(RuntimeError, match="broken port"):
        switch.send(a, packet(BROADCAST, a.mac))
    b._then = None
    switch.send(a, packet(BROADCAST, a.mac))
    assert len(a.got) == 1  # what b sent before it failed
    assert len(b.got) == 2


def test_ports_may_go_while_packets_are_on_their_way() -> None:
    """b unplugs c, which is to be served next, and itself, having sent."""
    switch = Switch()

    def leave(_: Packet) -> None:
        switch.send(b, packet(BROADCAST, b.mac))
        switch.detach(b)
        switch.detach(c)

    a, b, c = Jack("a"), Jack("b", leave), Jack("c")
    for jack in (a, b, c):
        switch.attach(jack)
    switch.send(a, packet(BROADCAST, a.mac))
    assert (len(a.got), len(c.got)) == (1, 0)
    assert dict(switch.addresses) == {a.mac: a}  # nothing is learnt of a port that has gone


# --- trains ---------------------------------------------------------------------------------------------------------


class Station(Jack):
    """A port that takes trains, and keeps them apart."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.trains: list[list[Packet]] = []

    def deliver_train(self, packets: Sequence[Packet]) -> None:
        self.trains.append(list(packets))
        self.got.extend(packets)


def stations(count: int) -> tuple[Switch, list[Station]]:
    """Return a switch, and ports that it has heard of."""
    switch = Switch()
    ports = [Station("abcdefgh"[index]) for index in range(count)]
    for port in ports:
        switch.attach(port)
    for port in ports:
        switch.send(port, packet(BROADCAST, port.mac))
    for port in ports:
        port.trains.clear()
        port.got.clear()
    return switch, ports


def test_neighbours_for_one_port_arrive_together() -> None:
    switch, (a, b, c) = stations(3)
    to_b = [packet(b.mac, a.mac, bytes(size)) for size in range(3)]
    to_c, to_all, to_self = packet(c.mac, a.mac), packet(BROADCAST, a.mac), packet(a.mac, a.mac)
    switch.send_train(a, [to_b[0], to_b[1], to_c, to_self, to_b[2], to_all, to_b[0]])
    assert b.trains == [to_b[:2], to_b[2:], [to_all], to_b[:1]]
    assert c.trains == [[to_c], [to_all]]
    assert a.trains == []


def test_a_port_that_takes_no_trains_gets_packets_one_by_one_and_may_leave() -> None:
    switch = Switch()
    a = Jack("a")
    b = Jack("b", lambda _: switch.detach(b) if len(b.got) == 3 else None)
    switch.attach(a)
    switch.attach(b)
    switch.send(b, packet(a.mac, b.mac))
    train = [packet(b.mac, a.mac, bytes(size)) for size in range(5)]
    switch.send_train(a, train)
    assert b.got == train[:3]


def test_taps_see_all_of_one_packets_way_before_the_next() -> None:
    switch, (a, b) = stations(2)
    seen: list[tuple[str, Direction, Packet]] = []
    switch.add_tap(lambda port, direction, passing: seen.append((port.name, direction, passing)))
    train = [packet(b.mac, a.mac, bytes(size)) for size in range(3)]
    switch.send_train(a, train)
    assert seen == [step for one in train for step in (("a", Direction.SENT, one), ("b", Direction.DELIVERED, one))]
    assert b.got == train


def test_a_train_has_its_short_packets_dropped() -> None:
    switch, (a, b) = stations(2)
    good = packet(b.mac, a.mac)
    switch.send_train(a, [Packet(bytes(13)), good, Packet(b"")])
    switch.send_train(a, [])
    assert b.trains == [[good]]
    assert switch.counters[a].dropped == 2
    with pytest.raises(ValueError, match="no port 'x'"):
        switch.send_train(Station("x"), [good])


# --- taps ------------------------------------------------------------------------------------------------------------


def test_taps_see_each_passage() -> None:
    switch, (a, _, c) = plugged(3)
    seen: list[tuple[str, Direction, Packet]] = []

    def tap(port: Port, direction: Direction, passing: Packet) -> None:
        seen.append((port.name, direction, passing))

    switch.add_tap(tap)
    question, answer = packet(BROADCAST, a.mac), packet(a.mac, c.mac)
    switch.send(a, question)
    switch.send(c, answer)
    assert seen == [
        ("a", Direction.SENT, question),
        ("b", Direction.DELIVERED, question),
        ("c", Direction.DELIVERED, question),
        ("c", Direction.SENT, answer),
        ("a", Direction.DELIVERED, answer),
    ]
    switch.remove_tap(tap)
    switch.send(a, question)
    assert len(seen) == 5
    with pytest.raises(ValueError, match="not in list"):
        switch.remove_tap(tap)


# --- any traffic -----------------------------------------------------------------------------------------------------

macs = st.sampled_from([BROADCAST, MULTICAST, *(bytes([2, 0, 0, 0, 0, i]) for i in range(6))])


@given(st.lists(st.tuples(st.integers(0, 3), macs, macs), max_size=40), st.integers(1, 8))
def test_any_traffic_reaches_whom_it_should(traffic: list[tuple[int, bytes, bytes]], max_addresses: int) -> None:
    switch, jacks = plugged(4, max_addresses=max_addresses)
    for index, destination, source in traffic:
        for jack in jacks:
            jack.got.clear()
        sender = jacks[index]
        switch.send(sender, packet(destination, source))
        receivers = [jack for jack in jacks if jack.got]
        owner = switch.addresses.get(destination)
        if owner is None:
            assert receivers == [jack for jack in jacks if jack is not sender]
        else:
            assert receivers == [jack for jack in [owner] if jack is not sender]
        assert sender.got == []
        assert len(switch.addresses) <= max_addresses
        assert source[0] & 1 or switch.addresses[source] is sender
    counters = switch.counters.values()
    assert sum(one.sent_packets for one in counters) == len(traffic)
    delivered = sum(one.delivered_packets for one in counters)
    flooded, filtered = sum(one.flooded for one in counters), sum(one.filtered for one in counters)
    assert delivered == 3 * flooded + (len(traffic) - flooded - filtered)


ends = st.sampled_from([BROADCAST, *(Jack(name).mac for name in "abcd")])


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(ends, max_size=6)), max_size=12), st.booleans())
def test_trains_are_as_good_as_packets(traffic: list[tuple[int, list[bytes]]], tapped: bool) -> None:
    """The same packets, in trains to ports that take them or one by one, arrive alike, in order, and count alike."""
    together, apart = Switch(), Switch()
    takers, jacks = [Station(name) for name in "abcd"], [Jack(name) for name in "abcd"]
    for taker, jack in zip(takers, jacks, strict=True):
        together.attach(taker)
        apart.attach(jack)
    if tapped:
        together.add_tap(lambda port, direction, passing: None)
    for index, destinations in traffic:
        train = [packet(destination, jacks[index].mac) for destination in destinations]
        together.send_train(takers[index], train)
        for one in train:
            apart.send(jacks[index], one)
    assert [taker.got for taker in takers] == [jack.got for jack in jacks]
    assert list(together.counters.values()) == list(apart.counters.values())
