"""The parts of a soak that need no guest: traffic on loopback, and what is made of what commands and the kernel say."""

from __future__ import annotations

import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devmem_tcp.lab import soak, soak_traffic
from devmem_tcp.lab.soak_traffic import Datagrams, Flow, Pings, Place, SoakFailed, Stream, pattern

LOOPBACK = Place(namespace="", ipv4="127.0.0.1", ipv6="::1")
FAMILIES = [socket.AF_INET, socket.AF_INET6]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


@pytest.fixture
def free_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(soak_traffic, "TCP_PORT", one.getsockname()[1])
        monkeypatch.setattr(soak_traffic, "UDP_PORT", other.getsockname()[1])


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until it is true; the test's own time limit ends a wait in vain."""
    waiter = threading.Event()
    while not condition():
        waiter.wait(0.001)


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_the_pattern_goes_on_where_it_left_off_and_differs_from_place_to_place() -> None:
    whole = pattern(999_000, 60_000)
    assert pattern(999_000, 10_000) + pattern(1_009_000, 50_000) == whole
    assert pattern(0, 1000) != pattern(1000, 1000)
    assert len(pattern(10**12, 65536)) == 65536


# --- TCP ------------------------------------------------------------------------------------------------------------


def test_a_stream_ends_with_all_that_was_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    flow = Flow("TCP", start=7)
    stream = Stream(flow, *pair)
    stream.start()
    wait_for(lambda: flow.received > 3_000_000)
    stream.finish()
    assert flow.sent == flow.received


def test_a_wrong_byte_of_a_stream_is_found(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    sent = bytearray(pattern(0, 5000))
    sent[4999] ^= 1

    class Liar(Stream):
        def _send(self) -> None:
            here.sendall(sent)

    stream = Liar(Flow("TCP", start=0), here, there)
    stream.start()
    with pytest.raises(SoakFailed, match=r"TCP: a wrong byte between \d+ and 5000"):
        stream.finish()


def test_bytes_that_never_arrive_are_missed(pair: tuple[socket.socket, socket.socket]) -> None:
    class Loser(Stream):
        def _send(self) -> None:
            self._sent = 100
            self._sender.shutdown(socket.SHUT_WR)

    stream = Loser(Flow("TCP", start=0), *pair)
    stream.start()
    with pytest.raises(SoakFailed, match="100 bytes sent, 0 received"):
        stream.finish()


# --- UDP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("free_ports")
def test_datagrams_of_every_size_arrive(family: int) -> None:
    flow = Flow("UDP", start=11)
    datagrams = Datagrams(flow, family, LOOPBACK, LOOPBACK)
    datagrams.start()
    wait_for(lambda: flow.received >= sum(soak_traffic._DATAGRAM_BYTES))
    datagrams.finish()
    assert flow.sent >= flow.received


@pytest.fixture
def flow(free_ports: None) -> Iterator[Datagrams]:
    """A UDP flow that has sent 10 datagrams and received none."""
    made = Datagrams(Flow("UDP", start=0), socket.AF_INET, LOOPBACK, LOOPBACK)
    made._next = 10
    yield made
    made.finish()


def test_a_datagram_counts_once(flow: Datagrams) -> None:
    flow._check(flow._datagram(3))
    flow._check(flow._datagram(2))
    assert flow._flow.received == len(flow._datagram(3)) + len(flow._datagram(2))
    with pytest.raises(SoakFailed, match="datagram 3 arrived twice"):
        flow._check(flow._datagram(3))


@pytest.mark.parametrize(
    "change",
    [
        lambda datagram: datagram[:-1],
        lambda datagram: datagram + b"\0",
        lambda datagram: datagram[:-1] + bytes([datagram[-1] ^ 1]),
        lambda datagram: (4).to_bytes(8, "big") + datagram[8:],
        lambda datagram: (10).to_bytes(8, "big") + datagram[8:],
        lambda datagram: b"",
    ],
)
def test_a_datagram_that_was_not_sent_is_found(flow: Datagrams, change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(SoakFailed, match="a wrong datagram"):
        flow._check(change(flow._datagram(3)))


# --- ping and commands ----------------------------------------------------------------------------------------------


def test_what_ping_says_is_counted() -> None:
    pings = Pings("ping", "192.0.2.1")
    pings.count(subprocess.CompletedProcess([], 1, "10 packets transmitted, 7 received, 30% packet loss", ""))
    pings.count(subprocess.CompletedProcess([], 2, "", "ping: connect: Network is unreachable"))
    pings.count(subprocess.CompletedProcess([], 0, "10 packets transmitted, 10 received, 0% packet loss", ""))
    assert (pings.sent, pings.received, pings.processes) == (20, 17, 3)
    with pytest.raises(SoakFailed, match="not permitted"):
        pings.count(subprocess.CompletedProcess([], 2, "", "ping: socket: Operation not permitted"))


def test_pings_without_any_answer_are_a_failure() -> None:
    load = soak_traffic.Load(LOOPBACK, LOOPBACK)
    load.pings.append(Pings("ping IPv6", "192.0.2.1"))
    load.pings[0].sent = 20
    with pytest.raises(SoakFailed, match="no answer at all: ping IPv6"):
        load.finish()
    load.pings[0].received = 1
    load.finish()


def test_a_command_that_fails_says_what_it_said() -> None:
    assert soak.command("cat", said="through") == "through"
    with pytest.raises(soak.CommandFailed, match=r"sh -c echo no >&2; exit 3: exit status 3: no"):
        soak.command("sh", "-c", "echo no >&2; exit 3")


def test_what_goes_wrong_in_a_thread_is_told_with_the_step(free_ports: None) -> None:
    load = soak_traffic.Load(LOOPBACK, LOOPBACK)
    broken = Pings("ping IPv4", "192.0.2.1")
    broken._failure = SoakFailed("it broke")
    load.pings.append(broken)
    with pytest.raises(SoakFailed, match=r"after ethtool -G: ping IPv4: it broke"):
        load.wait_until_moving("ethtool -G")


def test_a_flow_that_stands_still_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak_traffic, "LIMIT_S", 0.01)
    load = soak_traffic.Load(LOOPBACK, LOOPBACK)
    load.flows.append(Flow("TCP IPv4 out", start=0))
    with pytest.raises(SoakFailed, match=r"after a step: no byte in 0 s: TCP IPv4 out"):
        load.wait_until_moving("a step")


# --- the steps ------------------------------------------------------------------------------------------------------


class Log(soak.KernelLog):
    """A kernel log that says what the test writes into it."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def read(self) -> list[str]:
        return self.lines


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that would have been run."""
    made: list[tuple[str, ...]] = []

    def command(*words: str, said: str = "") -> str:
        made.append((*words, *said.splitlines()))
        return LINKS if words == ("ip", "-o", "link") else ""

    monkeypatch.setattr(soak, "command", command)
    return made


@pytest.fixture
def running() -> soak.Soak:
    near = soak.Nic(LOOPBACK, "eth0", "02:00:00:00:00:01", "0000:00:03.0")
    far = soak.Nic(LOOPBACK, "eth1", "02:00:00:00:00:02", "0000:00:04.0")
    return soak.Soak(near, far, soak_traffic.Load(LOOPBACK, LOOPBACK), random.Random(1), Log())


LINKS = r"""1: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 \    link/loopback 00:00:00:00:00:00 brd 00:00:00:00:00:00
5: eth0: <BROADCAST,MULTICAST> mtu 9216 qdisc noop state DOWN \    link/ether 02:00:00:00:00:02 brd ff:ff:ff:ff:ff:ff
6: eth1: <BROADCAST,MULTICAST> mtu 9216 qdisc noop state DOWN \    link/ether 02:00:00:00:00:01 brd ff:ff:ff:ff:ff:ff
"""


def test_an_interface_that_came_back_under_another_name_gets_its_own(
    running: soak.Soak, commands: list[tuple[str, ...]]
) -> None:
    running.near.bring_home()
    assert commands.pop() == ("ip", "link", "set", "eth1", "name", "eth0")
    peer = Place(namespace="peer", ipv4="10.0.0.2", ipv6="fd00::2")
    soak.Nic(peer, "eth1", "02:00:00:00:00:02", "0000:00:04.0").bring_home()
    assert commands.pop() == ("ip", "link", "set", "eth0", "netns", "peer", "name", "eth1")
    with pytest.raises(SoakFailed, match=r"did not come back to 0000:00:05\.0"):
        soak.Nic(LOOPBACK, "eth2", "02:00:00:00:00:03", "0000:00:05.0").bring_home()


def test_every_step_names_an_interface_and_leaves_both_ends_alike(
    running: soak.Soak, commands: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(running.load, "connect", lambda: None)
    monkeypatch.setattr(soak, "_DRIVER", tmp_path)
    for name, step in soak.STEPS.items():
        commands.clear()
        step(running, running.far)
        assert commands, name
    assert [(tmp_path / what).read_text() for what in ("unbind", "bind")] == ["0000:00:04.0"] * 2
    assert running.mtu == 9000
    changed = [line for words in commands for line in words if line.startswith("link set eth")]
    assert changed == ["link set eth1 mtu 9000 up", "link set eth0 mtu 9000 up"], "the last one reloads the driver"


def test_a_step_is_taken_again_only_if_a_reset_came_in_between(running: soak.Soak) -> None:
    taken = []

    def step(soaked: soak.Soak, nic: soak.Nic) -> None:
        taken.append(nic.name)
        if len(taken) == 1:
            running.log.read().append("gve 0000:00:03.0: Performing reset")
        if len(taken) != 2:
            raise soak.CommandFailed("refused")

    running._take("a step", step, running.near)
    assert taken == ["eth0", "eth0"]
    with pytest.raises(soak.CommandFailed):
        running._take("a step", step, running.near)
    assert taken == ["eth0", "eth0", "eth0"]


def test_the_first_round_is_taken_whole_even_if_there_is_no_time(
    running: soak.Soak, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak.Soak, "_take", lambda *rest: None)
    running.run(1e-9)
    assert set(running.done) == set(soak.STEPS)


# --- the end --------------------------------------------------------------------------------------------------------


def test_a_warning_in_the_log_is_a_complaint() -> None:
    said = [
        "6,700,3000,-;gve 0000:00:03.0 eth0: Device link is down.",
        "4,701,3001,-;WARNING: net/core/dev.c:1 at f+0x1",
    ]
    assert soak.complaints(said) == [said[1]]
    assert soak.complaints(said[:1]) == []


def test_what_came_from_outside_is_what_the_soak_did_not_do(running: soak.Soak) -> None:
    running.log.read().extend(["eth0: Device link is down.", "Performing reset", "Performing reset"])
    running.done["ethtool --reset"] = 1
    assert soak.prods(running) == {"link down, from outside": 1, "reset, from outside": 1}


def test_the_table_tells_every_step_and_every_flow(running: soak.Soak) -> None:
    running.load.flows.append(Flow("TCP IPv4 out", start=0, sent=1_234_567, received=1_234_566))
    running.load.pings.append(Pings("ping IPv4", "192.0.2.1"))
    running.load.pings[0].sent, running.load.pings[0].received = 20, 17
    running.done["ethtool --reset"] = 3
    lines = {tuple(line.split("  ")[0:1]): line.split()[-3:] for line in soak.table(running).splitlines()}
    assert lines[("ethtool --reset",)][-1] == "3"
    assert lines[("TCP IPv4 out",)][-2:] == ["1,234,567", "1,234,566"]
    assert lines[("ping IPv4",)] == ["20", "3", "0"]
    assert all((name,) in lines for name in soak.STEPS)
