"""The parts of a trial that need no guest: the peers' plain sockets, the comparison, the netlink codec."""

from __future__ import annotations

import socket
import struct
import threading

import numpy as np
import pytest

from devmem_tcp.lab import netdev, trial

SIZE = 300_001


def free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        return int(server.getsockname()[1])


def test_content_is_the_same_on_both_ends_and_differs_from_place_to_place() -> None:
    whole = trial.content(SIZE)
    assert len(whole) == SIZE
    assert np.array_equal(whole[:1000], trial.content(1000))
    assert not np.array_equal(whole[:1000], whole[1000:2000])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_peers_understand_each_other(host: str, capfd: pytest.CaptureFixture[str]) -> None:
    address = (host, free_port(host))
    failures: list[BaseException] = []

    def receive() -> None:
        try:
            trial.peer_receive(address, SIZE)
        except BaseException as error:
            failures.append(error)

    receiver = threading.Thread(target=receive)
    receiver.start()
    while capfd.readouterr().out != "listening\n":
        receiver.join(0.01)
        assert receiver.is_alive(), failures
    trial.peer_send(address, SIZE)
    receiver.join()
    assert failures == []


def test_a_wrong_byte_is_found() -> None:
    wanted = trial.content(SIZE)
    trial._compare(wanted[5000:6000], wanted, 5000)
    wrong = wanted[5000:6000].copy()
    wrong[-1] ^= 1
    with pytest.raises(trial.TrialFailed, match="between 5000 and 6000"):
        trial._compare(wrong, wanted, 5000)


def test_attributes_are_padded_and_read_back() -> None:
    message = netdev._text(2, "netdev") + netdev._number(4, 77)
    assert message[:4] == struct.pack("<HH", 4 + 7, 2)
    assert len(message) % 4 == 0
    assert netdev._attributes(message) == {2: b"netdev\0", 4: struct.pack("<I", 77)}


@pytest.mark.parametrize("broken", [b"", b"\0\0\0\0", b"\x02\0\x01\0", b"\xff\xff\x01\0abcd"])
def test_broken_attributes_end_the_walk(broken: bytes) -> None:
    netdev._attributes(broken)


def test_the_arguments_have_limits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trial.main(["--bytes", str(trial.BUFFER_BYTES + 1)])
    assert f"--bytes is 1 to {trial.BUFFER_BYTES}" in capsys.readouterr().err
