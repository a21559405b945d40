"""``devmem-tcp broker`` itself, in a process of its own: started by hand, and by systemd's protocol."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from broker_rig import ME, public_directory
from devmem_tcp.broker import configuration
from devmem_tcp.broker.client import BrokerControl, Connection
from devmem_tcp.cli.main import program
from devmem_tcp.errors import KernelError
from fake_nic import PATIENCE_S

CONFIG = f"""
[[nic.nosuch0.allow]]
users = [{ME}]
queues = 1
"""
# The shell becomes the broker, so that its own process id is the broker's, as systemd has it.
ACTIVATED = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'


@pytest.fixture
def directory() -> Iterator[Path]:
    with public_directory() as made:
        (made / "broker.toml").write_text(CONFIG)
        yield made


def invoke(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(program, ["broker", *map(str, arguments)], prog_name="devmem-tcp")
    assert "Traceback" not in result.output
    return result


def talk_and_end(process: subprocess.Popen[bytes], path: str) -> str:
    """Wait until the broker serves, be its client, end it in order, and return what it said."""
    assert process.stderr is not None
    said = process.stderr.readline()
    assert b"serving at" in said, said + process.stderr.read()
    with Connection(path) as connection:
        assert connection.welcome.kinds == []
    with pytest.raises(KernelError, match="ENODEV"):  # the real NicControl's answer
        BrokerControl(path, "nosuch0")
    process.terminate()
    _, rest = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, rest
    assert b"Traceback" not in rest
    return (said + rest).decode()


def test_started_by_hand(directory: Path) -> None:
    path = str(directory / "broker.sock")
    command = [sys.executable, "-m", "devmem_tcp", "broker", "--socket", path, "--config", f"{directory}/broker.toml"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        said = talk_and_end(process, path)
    assert f"uid {ME}, pid {os.getpid()}: OpenNic: " in said
    assert "ending; what was given is undone" in said
    assert not Path(path).exists()


def test_started_by_systemd(directory: Path) -> None:
    path = str(directory / "broker.sock")
    command = [sys.executable, "-m", "devmem_tcp", "broker", "--config", f"{directory}/broker.toml"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        with subprocess.Popen(
            ["sh", "-c", ACTIVATED, "sh", *command], stdin=listener.fileno(), stderr=subprocess.PIPE
        ) as process:
            talk_and_end(process, path)
    assert Path(path).exists()  # it is systemd's


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, None])
def test_a_socket_of_systemd_that_is_not_ours(directory: Path, kind: socket.SocketKind | None) -> None:
    command = [sys.executable, "-m", "devmem_tcp", "broker", "--config", f"{directory}/broker.toml"]
    with socket.socket(socket.AF_UNIX, kind or socket.SOCK_SEQPACKET) as passed:
        ended = subprocess.run(
            ["sh", "-c", ACTIVATED if kind else ACTIVATED.replace("FDS=1", "FDS=2"), "sh", *command],
            stdin=passed.fileno(),
            stderr=subprocess.PIPE,
            timeout=PATIENCE_S,
            check=False,
        )
    assert ended.returncode == 1
    error, hint = ended.stderr.decode().splitlines()
    assert "of systemd" in error
    assert "ListenSequentialPacket=" in hint


def test_the_example_is_printed_and_is_what_is_checked(directory: Path) -> None:
    printed = invoke("--example-config")
    assert printed.stdout == configuration.EXAMPLE
    checked = invoke("--check", "--config", directory / "broker.toml")
    assert checked.exit_code == 0
    assert checked.stdout.splitlines() == [
        f"nosuch0: users {ME}: queues 1, ports none",
        "memory: none",
        f"{directory}/broker.toml is right",
    ]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        (b"nic = 3", "nic: Expected `object`, got `int`"),
        (b"[nic\n", "at line 1, column 5"),
        (b"\xff", "no UTF-8 text"),
    ],
)
def test_a_wrong_file_is_a_line_and_a_hint(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "broker.toml"
    if content is not None:
        path.write_bytes(content)
    for arguments in (["--check"], ["--socket", str(tmp_path / "sock")]):
        result = invoke("--config", path, *arguments)
        assert result.exit_code == 1
        assert why in result.stderr
        assert str(path) in result.stderr
    assert not (tmp_path / "sock").exists()


def test_a_place_that_cannot_be_listened_at(directory: Path) -> None:
    config = directory / "broker.toml"
    result = invoke("--config", config, "--socket", directory / "missing" / "sock")
    assert result.exit_code == 1
    assert "ENOENT" in result.stderr
    assert "--socket takes another path" in result.stderr
    assert invoke("--config", config, "--socket", directory / "s", "--group", "no such group").exit_code == 2
