"""The process of the NICs: made, told things, asked things, ended."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab import control
from devmem_tcp.lab.crafting import Path as Way
from devmem_tcp.lab.crafting import echo_request
from devmem_tcp.lab.hostport import MAX_FRAME_BYTES
from devmem_tcp.lab.nic_client import NicClient, NicProcess
from devmem_tcp.lab.vm import processes


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
        nothing = {"packets": 0, "failure": ""}
        assert ask(control.StopCapture()) == nothing
        ask(control.StartCapture(path=str(tmp_path / "packets.pcapng"), ports=["nic0"], snap_length=64))
        ask(control.StartCapture(path=str(tmp_path / "other.pcapng")))
        assert ask(control.StopCapture()) == nothing
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


def test_a_capture_on_a_full_disk_says_so(tmp_path: Path) -> None:
    with NicProcess(plugs(1), tmp_path) as nics:
        nics.client.ask(control.StartCapture(path="/dev/full"))
        assert nics.client.ask(control.StopCapture()) == {"packets": 0, "failure": "No space left on device"}


# --- processes of the host -------------------------------------------------------------------------------------------


def answering(path: Path) -> str:
    """Return the program that docs/lab.md shows, for another socket."""
    document = Path(__file__).parents[2].joinpath("docs/lab.md").read_text(encoding="utf-8")
    program = document.partition("```python\n")[2].partition("```")[0]
    assert '"/tmp/wire"' in program
    return program.replace('"/tmp/wire"', repr(str(path)))


def plugged_in(path: Path) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(10)
    end.connect(str(path))
    return end


def test_a_process_of_the_host_is_plugged_into_the_wire(tmp_path: Path) -> None:
    path = tmp_path / "wire"
    way = Way.between("02:00:00:00:00:01", "10.77.0.1", "02:00:00:00:00:99", "10.77.0.99")
    with NicProcess(plugs(1), tmp_path, host_port=path) as nics:
        with subprocess.Popen([sys.executable, "-c", answering(path)]) as other, plugged_in(path) as end:
            try:
                while len(nics.client.ask(control.GetStatistics())["host_ports"]) < 2:
                    pass
                end.send(echo_request(way, 1, 2, b"over the wire"))
                reply = end.recv(MAX_FRAME_BYTES)
                assert reply[:12] == way.src_mac + way.dst_mac
                assert reply.endswith(b"over the wire")
                ports = nics.client.ask(control.GetStatistics())["host_ports"]
                assert sorted(ports) == ["host0", "host1"]
                assert {one["wire"]["sent_packets"] for one in ports.values()} == {1}
                assert ports["host0"]["port"]["not_taken"] == 0
            finally:
                other.kill()
        while nics.client.ask(control.GetStatistics())["host_ports"]:
            pass
        with plugged_in(path):
            while list(nics.client.ask(control.GetStatistics())["host_ports"]) != ["host2"]:
                pass
    assert not path.exists()


@pytest.mark.parametrize(
    ("path", "said"), [("there", "something there already"), ("no/folder", "no such folder"), ("x" * 200, "too long")]
)
def test_a_host_port_that_cannot_be_made_is_refused(tmp_path: Path, path: str, said: str) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(DevmemError, match=said):
        NicProcess(plugs(1), tmp_path, host_port=tmp_path / path).__enter__()
    assert (tmp_path / "there").exists()


# --- a run that is killed --------------------------------------------------------------------------------------------

HOLDING = """
import sys, time
from pathlib import Path
from devmem_tcp.lab import control
from devmem_tcp.lab.nic_client import NicProcess

plug = control.NicPlug(name="nic0", path="", mac="02:00:00:00:00:01", queues=2, mtu=1500)
with NicProcess([plug], Path(sys.argv[1]), host_port=Path(sys.argv[1], "wire")) as nics:
    print(nics.control_path.parent, flush=True)
    time.sleep(60)
"""


def ask_for_ever(client: NicClient) -> None:
    while True:
        client.ask(control.GetStatistics())


def test_a_killed_run_leaves_no_process_and_the_next_one_removes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        folder = Path(run.stdout.readline().decode().strip())
        with contextlib.closing(NicClient(folder / "control")) as client:
            assert client.ask(control.GetStatistics())["nics"]
            run.kill()
            with pytest.raises(DevmemError, match="has gone"):  # ended by the kernel with the run
                ask_for_ever(client)
        while (tmp_path / "wire").exists():
            pass
    assert folder.is_dir()
    with processes.socket_folder():
        assert folder.is_dir(), "it is too young to be judged"
    os.utime(folder, (0, 0))
    with processes.socket_folder() as mine:
        assert not folder.exists()
        os.utime(mine, (0, 0))
        with processes.socket_folder():
            assert mine.is_dir(), "it is in use"
    assert list(tmp_path.glob("devmem-lab-*")) == []
