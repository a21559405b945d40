"""The process of the NICs: made, told things, asked things, ended."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab import control
from devmem_tcp.lab.nic_client import NicClient, NicProcess


def plugs(count: int, **more: Any) -> list[control.NicPlug]:
    return [
        control.NicPlug(
            name=f"nic{number}", path="", mac=f"02:00:00:00:00:{number + 1:02x}", queues=2, mtu=1500, **more
        )
        for number in range(count)
    ]


def test_nics_are_there_on_entry_and_gone_on_exit(tmp_path: Path) -> None:
    with NicProcess(plugs(2, faults={"drop": 0.5}), tmp_path) as nics:
        assert len(nics.sockets) == 2
        for path in nics.sockets:
            with socket.socket(socket.AF_UNIX) as qemu:
                qemu.connect(str(path))
        found = nics.client.ask(control.GetStatistics())
        assert list(found["nics"]) == ["nic0", "nic1"]
        assert found["nics"]["nic0"]["device"]["link_up"]
        assert found["nics"]["nic1"]["wire"]["sent_packets"] == 0
        changed = nics.client.ask(control.SetFaults(nic="nic1", faults={"delay_s": 0.01}))
        assert (changed["nic1"]["drop"], changed["nic1"]["delay_s"]) == (0.5, 0.01)
        assert list(nics.client.ask(control.SetFaults(faults={"drop": 0.0}))) == ["nic0", "nic1"]
        control_path = nics.control_path
    assert not control_path.exists()
    assert not any(path.exists() for path in nics.sockets)


def test_link_reset_and_capture(tmp_path: Path) -> None:
    with NicProcess(plugs(1), tmp_path) as nics:
        ask = nics.client.ask
        ask(control.SetLink(nic="nic0", up=False))
        assert not ask(control.GetStatistics())["nics"]["nic0"]["device"]["link_up"]
        ask(control.RequestReset(nic="nic0"))
        assert ask(control.StopCapture()) == 0
        ask(control.StartCapture(path=str(tmp_path / "packets.pcapng"), ports=["nic0"], snap_length=64))
        ask(control.StartCapture(path=str(tmp_path / "other.pcapng")))
        assert ask(control.StopCapture()) == 0
        for name in ("packets", "other"):
            assert (tmp_path / f"{name}.pcapng").read_bytes().startswith(b"\x0a\x0d\x0d\x0a")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (control.SetFaults(nic="nic9", faults={}), r"no NIC 'nic9'; there are: nic0"),
        (control.SetFaults(faults={"smell": 1.0}), "no such fault: smell"),
        (control.SetFaults(faults={"drop": 2.0}), "drop is a probability"),
        (control.StartCapture(path="/nonexistent/file"), "No such file"),
        (control.StartCapture(path="/tmp/unused", ports=["x"]), "no NIC 'x'"),
    ],
)
def test_a_wrong_command_is_refused_and_the_process_goes_on(
    tmp_path: Path, command: control.Command, said: str
) -> None:
    with NicProcess(plugs(1), tmp_path) as nics:
        with pytest.raises(DevmemError, match=said):
            nics.client.ask(command)
        assert nics.client.ask(control.GetStatistics())["nics"]


def test_lines_that_are_no_commands_get_an_answer_too(tmp_path: Path) -> None:
    with NicProcess(plugs(1), tmp_path) as nics, socket.socket(socket.AF_UNIX) as other:
        other.connect(str(nics.control_path))
        with other.makefile("rb") as lines:
            for line in (b"{", b'{"do":"dance"}', b"\xff\xfe", b"[]"):
                other.sendall(line + b"\n")
                assert msgspec.json.decode(lines.readline(), type=control.Answer).error
        other.close()
        assert nics.client.ask(control.GetStatistics())["cpu_s"] > 0


def test_a_process_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    with pytest.raises(DevmemError, match=r"did not come up.*\n(.*\n)*.*queues must be"):
        NicProcess([msgspec.structs.replace(plugs(1)[0], queues=0)], tmp_path).__enter__()


def test_a_process_that_has_gone_is_an_error_not_a_hang(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        client = NicClient(path)
        listener.accept()[0].close()
        with pytest.raises(DevmemError, match="has gone"):
            client.ask(control.GetStatistics())
        client.close()
