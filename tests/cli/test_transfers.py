"""recv and send as real processes over real sockets: to each other, to a plain nc, and when something goes wrong."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from devmem_tcp.testing.patterns import pattern
from processes import LIMIT_S, SOFTWARE, running

SIZE = (3 << 20) + 1234  # more than a read, and no whole number of pages


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "payload.bin"
    path.write_bytes(np.random.default_rng(1).bytes(SIZE))
    return path


@pytest.fixture
def nc() -> str:
    path = shutil.which("nc")
    if path is None:
        pytest.skip("nc is not installed")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reset(sock: socket.socket) -> None:
    """Close a socket so that the peer sees a reset, not an end of stream."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
@pytest.mark.parametrize("receiver_connects", [False, True])
def test_a_file_arrives_whole(host: str, receiver_connects: bool, file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.bin"
    recv = ["recv", "-o", str(copy), "--json", "--hash", "--quiet", *SOFTWARE]
    send = ["send", "--json", "--hash", "--quiet", *SOFTWARE]
    if receiver_connects:
        with (
            running(*send, "--listen", f"{host}:0", file) as sender,
            running(*recv, "--connect", f"{host}:{sender.port()}") as receiver,
        ):
            received, sent = receiver.finish(), sender.finish()
    else:
        with (
            running(*recv, f"{host}:0") as receiver,
            running(*send, f"{host}:{receiver.port()}", file) as sender,
        ):
            received, sent = receiver.finish(), sender.finish()
    assert (received.status, sent.status) == (0, 0)
    assert (received.stderr, sent.stderr) == ("", "")
    assert copy.read_bytes() == file.read_bytes()
    assert received.report["sha256"] == sent.report["sha256"] == sha256(file)


def test_the_report_is_the_proof_of_path(file: Path, tmp_path: Path) -> None:
    with running("recv", "127.0.0.1:0", "-o", "/dev/null", "--json", "--queue", "3", *SOFTWARE) as receiver:
        to = f"127.0.0.1:{receiver.port()}"
        with running("send", to, file, "--json", "--window", "64K", *SOFTWARE) as sender:
            received, sent = receiver.finish(), sender.finish()
    rx, tx = received.report, sent.report
    assert (rx["event"], rx["bytes"], rx["nic"], rx["memory"][:4]) == ("received", SIZE, "soft0", "host")
    assert rx["queue"] == rx["rx_queue"] == 3
    assert rx["local"] == tx["remote"] == to
    assert rx["remote"] == tx["local"]
    assert rx["sha256"] is rx["verified_pattern"] is None
    assert rx["output"] == "/dev/null"
    assert rx["gigabytes_per_second"] == pytest.approx(SIZE / rx["seconds"] / 1e9)
    path = rx["path"]
    assert (path["backend"], path["dmabuf_bytes"], path["linear_bytes"], path["host_bytes"]) == ("software", SIZE, 0, 0)
    assert path["frags"] > 0
    assert path["tokens_out"] == 0
    assert path["recv_calls"] > path["dontneed_calls"] > 0
    assert 0 < rx["smallest_frag"] <= rx["largest_frag"] <= 1 << 20
    assert (tx["event"], tx["bytes"], tx["source"], tx["window_bytes"]) == ("sent", SIZE, str(file), 64 << 10)
    assert tx["path"]["sent_dmabuf_bytes"] == SIZE
    assert tx["path"]["sent_host_bytes"] == tx["path"]["sends_incomplete"] == 0
    assert tx["path"]["send_calls"] >= SIZE // (64 << 10)
    assert tx["completions"] > 0
    for figure in (
        f"{SIZE:,} bytes",
        "software, soft0, queue 3",
        f"dmabuf {SIZE:,} bytes, linear 0, host 0",
        "0 tokens",
    ):
        assert figure in received.stderr
    for figure in (f"{SIZE:,} bytes", "software, soft0", f"dmabuf {SIZE:,} bytes, host 0", "0 incomplete"):
        assert figure in sent.stderr
    assert "zero copy" not in (received.stderr + sent.stderr).lower()


def test_stdin_to_stdout(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.bin"
    with copy.open("wb") as output, running("recv", "127.0.0.1:0", *SOFTWARE, stdout=output) as receiver:
        to = f"127.0.0.1:{receiver.port()}"
        with running("send", to, "-", *SOFTWARE, stdin=subprocess.PIPE) as sender:
            assert sender.finish(file.read_bytes()).status == 0
        assert receiver.finish().status == 0
    assert copy.read_bytes() == file.read_bytes()


def test_an_empty_file(tmp_path: Path) -> None:
    copy = tmp_path / "copy.bin"
    with (
        running("recv", "127.0.0.1:0", "-o", copy, "--json", "--verify", "7", *SOFTWARE) as receiver,
        running("send", f"127.0.0.1:{receiver.port()}", "/dev/null", "--json", *SOFTWARE) as sender,
    ):
        received, sent = receiver.finish(), sender.finish()
    assert (received.status, sent.status) == (0, 0)
    assert received.report["bytes"] == sent.report["bytes"] == 0
    assert received.report["smallest_frag"] == received.report["largest_frag"] == 0
    assert copy.read_bytes() == b""


def test_frags_of_the_kernels_shape(file: Path) -> None:
    with (
        running(
            "recv", "127.0.0.1:0", "-o", "/dev/null", "--json", "--hash", "--frag-size", "4K", *SOFTWARE
        ) as receiver,
        running("send", f"127.0.0.1:{receiver.port()}", file, *SOFTWARE) as sender,
    ):
        received, sent = receiver.finish(), sender.finish()
    assert (received.status, sent.status) == (0, 0)
    assert received.report["largest_frag"] == 4096
    assert received.report["path"]["frags"] > SIZE // 4096
    assert received.report["sha256"] == sha256(file)


@pytest.mark.parametrize("seed", ["1", "2"])
def test_hostile_mode_changes_no_byte(seed: str) -> None:
    hostile = ["--hostile", seed, *SOFTWARE]
    with running("recv", "127.0.0.1:0", "-o", "/dev/null", "--json", "--verify", "251", *hostile) as receiver:
        send = ["send", f"127.0.0.1:{receiver.port()}", "--pattern", "251", "--size", "600001", "--window", "16K"]
        with running(*send, "--json", *hostile) as sender:
            received, sent = receiver.finish(), sender.finish()
    assert (received.status, sent.status) == (0, 0), received.stderr + sent.stderr
    path = received.report["path"]
    assert path["dmabuf_bytes"] + path["linear_bytes"] + path["host_bytes"] == received.report["bytes"] == 600001
    assert path["host_bytes"] > 0
    assert received.report["smallest_frag"] == 1
    assert sent.report["path"]["sends_incomplete"] == 0


def test_strict_does_not_accept_host_memory() -> None:
    with (
        running("recv", "127.0.0.1:0", "-o", "/dev/null", "--strict", "--hostile", "1", *SOFTWARE) as receiver,
        running("send", f"127.0.0.1:{receiver.port()}", "--pattern", "7", "--size", "4M", *SOFTWARE) as sender,
    ):
        received, sent = receiver.finish(), sender.finish()
    assert received.status == 1
    assert "error: " in received.stderr
    assert sent.status == 1
    assert "broke" in sent.stderr


def test_nc_sends_to_recv(nc: str, file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.bin"
    with running("recv", "127.0.0.1:0", "-o", copy, "--json", *SOFTWARE) as receiver:
        port = receiver.port()
        with file.open("rb") as payload:
            subprocess.run([nc, "-N", "127.0.0.1", str(port)], stdin=payload, check=True, timeout=LIMIT_S)
        received = receiver.finish()
    assert received.status == 0
    assert copy.read_bytes() == file.read_bytes()
    assert received.report["path"]["dmabuf_bytes"] == SIZE


def test_nc_receives_from_send(nc: str, file: Path) -> None:
    listen = [nc, "-l", "-v", "-N", "-n", "127.0.0.1", "0"]
    with subprocess.Popen(
        listen, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as peer:
        assert peer.stderr is not None
        port = int(peer.stderr.readline().split()[-1])  # "Listening on 127.0.0.1 PORT"
        with running("send", f"127.0.0.1:{port}", file, "--json", *SOFTWARE) as sender:
            payload, _ = peer.communicate(timeout=LIMIT_S)
            sent = sender.finish()
    assert peer.returncode == 0
    assert payload == file.read_bytes()
    assert sent.status == 0
    assert sent.report["bytes"] == SIZE


def test_verify_accepts_the_pattern() -> None:
    with running("recv", "[::1]:0", "-o", "/dev/null", "--json", "--verify", "7", *SOFTWARE) as receiver:
        to = f"[::1]:{receiver.port()}"
        with running("send", to, "--pattern", "7", "--size", "3000001", "--json", *SOFTWARE) as sender:
            received, sent = receiver.finish(), sender.finish()
    assert (received.status, sent.status) == (0, 0)
    assert received.report["verified_pattern"] == 7
    assert sent.report["source"] == "pattern of 7"
    assert received.report["bytes"] == 3000001


def test_verify_names_offset_expected_and_found() -> None:
    payload = pattern(7, SIZE)
    assert payload[2_000_000] == 3
    payload[2_000_000] = 200
    with (
        running("recv", "127.0.0.1:0", "-o", "/dev/null", "--json", "--verify", "7", *SOFTWARE) as receiver,
        socket.create_connection(("127.0.0.1", receiver.port())) as peer,
    ):
        peer.sendall(payload[:2_000_001].data)
        received = receiver.finish()
    assert received.status == 3
    assert "at offset 2000000: expected 3, found 200" in received.stderr
    assert received.stdout == b""  # no report of what failed


def test_disk_full_names_the_file_and_what_it_took(file: Path) -> None:
    with (
        running("recv", "127.0.0.1:0", "-o", "/dev/full", *SOFTWARE) as receiver,
        running("send", f"127.0.0.1:{receiver.port()}", file, *SOFTWARE) as sender,
    ):
        received, sent = receiver.finish(), sender.finish()
    assert received.status == 1
    assert "error: /dev/full: No space left on device, after 0 bytes" in received.stderr
    assert "hint: make room" in received.stderr
    assert sent.status == 1


def test_a_file_size_limit_leaves_the_part_that_was_written(tmp_path: Path) -> None:
    copy = tmp_path / "copy.bin"
    limited = (
        "import os, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000));"
        "from devmem_tcp.cli.main import main; sys.argv[0] = 'devmem-tcp'; main()"
    )
    command = ["recv", "127.0.0.1:0", "-o", str(copy), "--json", *SOFTWARE]
    with (
        running(*command, program=["-c", limited]) as receiver,
        socket.create_connection(("127.0.0.1", receiver.port())) as peer,
    ):
        with contextlib.suppress(ConnectionError):  # the receiver may have gone before it was all sent
            peer.sendall(pattern(7, 200_000).data)
        received = receiver.finish()
    assert received.status == 1
    assert f"error: {copy}: File too large, after 100,000 bytes" in received.stderr
    assert "the partly written file is left" in received.stderr
    assert copy.read_bytes() == pattern(7, 100_000).tobytes()


def test_the_reader_of_stdout_goes_away_quietly() -> None:
    with running("recv", "127.0.0.1:0", *SOFTWARE) as receiver:
        assert receiver.process.stdout is not None
        with socket.create_connection(("127.0.0.1", receiver.port())) as peer:
            receiver.process.stdout.close()
            peer.sendall(b"x")
            receiver.process.wait(LIMIT_S)
        assert receiver.process.stderr is not None
        assert receiver.process.stderr.read() == b""
    assert receiver.process.returncode == 141


def test_the_reader_of_the_report_goes_away_quietly() -> None:
    with running("recv", "127.0.0.1:0", "-o", "/dev/null", "--json", "--quiet", *SOFTWARE) as receiver:
        assert receiver.process.stdout is not None
        with socket.create_connection(("127.0.0.1", receiver.port())):
            receiver.process.stdout.close()
        receiver.process.wait(LIMIT_S)
        assert receiver.process.stderr is not None
        assert receiver.process.stderr.read() == b""
    assert receiver.process.returncode == 141


def test_recv_says_how_much_came_before_a_reset(tmp_path: Path) -> None:
    copy = tmp_path / "copy.bin"
    with running("recv", "127.0.0.1:0", "-o", copy, "--json", "--progress", "json", *SOFTWARE) as receiver:
        peer = socket.create_connection(("127.0.0.1", receiver.port()))
        peer.sendall(b"x" * 1000)
        assert receiver.json_line() == {"event": "progress", "bytes": 1000}
        reset(peer)
        received = receiver.finish()
    assert received.status == 1
    assert "broke (Connection reset by peer) after 1,000 bytes" in received.stderr
    assert copy.read_bytes() == b"x" * 1000


def test_send_says_how_much_went_before_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        to = f"127.0.0.1:{server.getsockname()[1]}"
        with running("send", to, "--pattern", "7", "--size", "1G", *SOFTWARE) as sender:
            peer, _ = server.accept()
            assert peer.recv(4, socket.MSG_WAITALL) == b"\1\2\3\4"
            reset(peer)
            sent = sender.finish()
    assert sent.status == 1
    assert f"connection to {to} broke" in sent.stderr
    assert "bytes were sent" in sent.stderr


def test_send_notices_a_reset_after_its_last_byte() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        to = f"127.0.0.1:{server.getsockname()[1]}"
        with running("send", to, "--pattern", "7", "--size", "1K", *SOFTWARE) as sender:
            peer, _ = server.accept()
            assert len(peer.recv(1024, socket.MSG_WAITALL)) == 1024
            reset(peer)
            sent = sender.finish()
    assert sent.status == 1
    assert "after 1,024 bytes were sent" in sent.stderr


def test_send_gives_up_on_a_peer_that_does_not_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        to = f"127.0.0.1:{server.getsockname()[1]}"
        with running("send", to, "--pattern", "7", "--size", "1G", "--timeout", "0.2", *SOFTWARE) as sender:
            peer, _ = server.accept()
            with peer:
                sent = sender.finish()
    assert sent.status == 1
    assert f"{to} did not go on within 0.2 s" in sent.stderr


def test_a_fallback_is_said_once_in_a_line() -> None:
    with running("recv", "127.0.0.1:0", "-o", "/dev/null", "--quiet", "--json", "--buffer", "64K") as receiver:
        with socket.create_connection(("127.0.0.1", receiver.port())):
            pass
        received = receiver.finish()
    assert received.status == 0
    (line,) = received.stderr.splitlines()
    assert line.startswith("devmem-tcp: warning: soft0: software backend")
