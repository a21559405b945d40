"""What is wrong with a command line, a file, a NIC or an address is said in a line, before anything is moved."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from devmem_tcp import __version__
from devmem_tcp.cli.main import VERBS, program
from devmem_tcp.cli.options import HostPort, Size

SOFTWARE = ["--backend", "software", "--buffer", "64K", "--nic", "soft0"]


def invoke(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(program, [str(argument) for argument in arguments], prog_name="devmem-tcp")
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("4096", 4096), ("12B", 12), ("64K", 65536), ("4KiB", 4096), ("256M", 1 << 28), ("1g", 1 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "0M", "-1", "1.5M", "12KB", "1 M", "K", "M4", "4iB", "1E", "١", "lots"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Size().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:5201", ("::1", 5201)),
        ("[fe80::1%eth0]:5201", ("fe80::1%eth0", 5201)),
        ("host.example:65535", ("host.example", 65535)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert HostPort().convert(text, None, None) == address
    assert HostPort(default_host="::").convert(text, None, None) == address


def test_a_port_alone_takes_the_default_host() -> None:
    assert HostPort(default_host="::").convert("5201", None, None) == ("::", 5201)
    assert HostPort(default_host="::").convert(":0", None, None) == ("::", 0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("5201", "port is missing"),
        (":5201", "host is missing"),
        ("host:", "a port is a number"),
        ("host:http", "a port is a number"),
        ("host:65536", "0 to 65535"),
        ("host:-1", "0 to 65535"),
        ("host:0", "only listening"),
        ("::1", "in brackets"),
        ("::1:5201", "in brackets"),
    ],
)
def test_what_is_no_address(text: str, why: str) -> None:
    with pytest.raises(click.BadParameter, match=why):
        HostPort().convert(text, None, None)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--no-such"], "No such option"),
        (["juggle"], "No such command"),
        (["recv", "--no-such"], "No such option"),
        (["recv", "--buffer", "12KB"], "is not a size"),
        (["recv", "--buffer", "0"], "must be positive"),
        (["recv", "--buffer", "5000"], "not a multiple of 4096 bytes; use 8192"),
        (["recv", "--read-size", "0"], "must be positive"),
        (["recv", "--verify", "1"], "2<=x<=256"),
        (["recv", "--verify", "257"], "2<=x<=256"),
        (["recv", "--queue", "-1"], "x>=0"),
        (["recv", "--timeout", "0"], "x>0"),
        (["recv", "::1"], "in brackets"),
        (["recv", "5201", "--connect", "h:1", "-o", "x"], "not both"),
        (["recv", "--json"], "--output"),
        (["recv", "--progress", "json", "-o", "x"], "goes with --json"),
        (["recv", "5201", "6000"], "unexpected extra argument"),
        (["send"], "give HOST:PORT"),
        (["send", "h:1", "a", "b"], "'b' is one too many"),
        (["send", "h:1", "--pattern", "7"], "go together"),
        (["send", "h:1", "--size", "1M"], "go together"),
        (["send", "h:1", "file", "--pattern", "7", "--size", "1M"], "not both"),
        (["send", "h:1", "--progress", "json"], "goes with --json"),
        (["demo", "--size", "much"], "is not a size"),
        (["demo", "extra"], "unexpected extra argument"),
    ],
)
def test_wrong_usage(arguments: list[str], why: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert why in result.stderr.replace("\n", " ")
    assert not result.stdout


def test_options_of_the_software_backend_are_not_the_kernels(tmp_path: Path) -> None:
    result = invoke("recv", "0", "-o", tmp_path / "out", "--backend", "kernel", "--frag-size", "4096")
    assert result.exit_code == 2
    assert "for the software backend alone" in result.stderr


def failed(*arguments: str | Path) -> list[str]:
    """Run what must fail with status 1, and return the lines it said on stderr."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert not result.stdout
    return result.stderr.splitlines()


@pytest.mark.parametrize("verb", [["recv", "0", "-o", "/dev/null"], ["send", "127.0.0.1:9", "/dev/null"]])
def test_unknown_nic(verb: list[str]) -> None:
    error, hint = failed(*verb, "--backend", "software", "--nic", "nosuch0")
    assert error.startswith("devmem-tcp: error: ")
    assert "nosuch0" in error
    assert "ENODEV" in error
    assert hint.startswith("hint: ")
    assert "soft0" in hint


def test_queue_out_of_range() -> None:
    error, hint = failed("recv", "0", "-o", "/dev/null", *SOFTWARE, "--queue", "16")
    assert error == "devmem-tcp: error: soft0 has no RX queue 16"
    assert hint == "hint: --queue takes 0 to 15"


def test_a_backend_that_is_not_here_says_why_and_what_to_do() -> None:
    error, *hints = failed("recv", "0", "-o", "/dev/null", "--backend", "kernel", "--nic", "lo")
    assert "the kernel backend cannot run" in error
    assert len(hints) == len(set(hints))
    assert hints[-1] == "hint: --backend software runs anywhere, over ordinary TCP"


@pytest.mark.parametrize("option", ["--frag-size=100", "--congestion=nosuch"])
def test_what_the_library_refuses_is_a_line_too(option: str, taken_port: int) -> None:
    (error, *_) = failed("send", f"127.0.0.1:{taken_port}", "/dev/null", *SOFTWARE, option)
    assert error.startswith("devmem-tcp: error: ")
    assert option.partition("=")[2] in error


def test_output_that_is_a_directory_is_refused_before_listening(tmp_path: Path) -> None:
    assert failed("recv", "0", "-o", tmp_path, *SOFTWARE) == [f"devmem-tcp: error: {tmp_path}: Is a directory"]


def test_input_that_is_a_directory_or_missing_is_refused_before_connecting(tmp_path: Path, taken_port: int) -> None:
    to = f"127.0.0.1:{taken_port}"
    missing = tmp_path / "missing"
    assert failed("send", to, tmp_path, *SOFTWARE) == [f"devmem-tcp: error: {tmp_path}: Is a directory"]
    assert failed("send", to, missing, *SOFTWARE) == [f"devmem-tcp: error: {missing}: No such file or directory"]


def test_demo_of_a_directory_a_device_or_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert failed("demo", "--file", tmp_path) == [f"devmem-tcp: error: {tmp_path}: Is a directory"]
    assert failed("demo", "--file", missing) == [f"devmem-tcp: error: {missing}: No such file or directory"]
    assert failed("demo", "--file", "/dev/zero") == ["devmem-tcp: error: /dev/zero: not a regular file"]


def test_demo_that_finds_no_room_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error, hint = failed("demo", "--size", "1000000T")
    assert "free, and the file needs" in error
    assert "--size" in hint
    assert not list(tmp_path.iterdir())


def test_address_in_use(taken_port: int) -> None:
    error, hint = failed("recv", str(taken_port), "-o", "/dev/null", *SOFTWARE)
    assert "Address already in use" in error
    assert str(taken_port) in error
    assert "port 0" in hint


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    error, hint = failed("send", f"127.0.0.1:{port}", "/dev/null", *SOFTWARE)
    assert f"127.0.0.1:{port}: Connection refused" in error
    assert "start the receiver first" in hint


def test_a_window_larger_than_the_buffer() -> None:
    (error,) = failed("send", "127.0.0.1:1", "/dev/null", *SOFTWARE, "--window", "128K")
    assert error == "devmem-tcp: error: a window of 131072 bytes does not fit a buffer of 65536 bytes"


def test_nobody_comes_in_time() -> None:
    said = failed("recv", "127.0.0.1:0", "-o", "/dev/null", *SOFTWARE, "--timeout", "0.05")
    assert "listening on 127.0.0.1:" in said[0]
    assert said[1].startswith("devmem-tcp: error: ")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_verb_and_exit_status(flag: str) -> None:
    result = invoke(flag)
    assert result.exit_code == 0
    assert all(re.search(rf"  {verb} +{what.split()[0]}", result.stdout) for verb, what in VERBS.items())
    for verb in VERBS.keys() - {"lab"}:  # whose verbs exit as the command in the guest does
        text = " ".join(invoke(verb, flag).stdout.split())
        assert "3 the payload is not what --verify expects" in text
        assert "130 interrupted" in text


def test_version() -> None:
    assert invoke("--version").stdout == f"devmem-tcp {__version__}\n"
