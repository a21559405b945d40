"""Ctrl-C and SIGTERM at any moment: everything closed, no child left, no traceback, 130 or 143."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from processes import SOFTWARE, children, exists, running

ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "status"), ENDINGS)
def test_while_listening(number: signal.Signals, status: int) -> None:
    with running("recv", "127.0.0.1:0", "-o", "/dev/null", "--json", *SOFTWARE) as receiver:
        receiver.port()
        receiver.process.send_signal(number)
        assert receiver.finish().status == status


@pytest.mark.parametrize(("number", "status"), ENDINGS)
def test_while_receiving(number: signal.Signals, status: int, tmp_path: Path) -> None:
    copy = tmp_path / "copy.bin"
    with (
        running("recv", "127.0.0.1:0", "-o", copy, "--json", "--progress", "json", *SOFTWARE) as receiver,
        socket.create_connection(("127.0.0.1", receiver.port())) as peer,
    ):
        peer.sendall(b"x" * 1000)
        assert receiver.json_line()["event"] == "progress"
        receiver.process.send_signal(number)
        received = receiver.finish()
        assert peer.recv(1) == b""
    assert received.status == status
    assert "Error" not in received.stderr
    assert copy.read_bytes() == b"x" * 1000


@pytest.mark.parametrize(("number", "status"), ENDINGS)
def test_while_sending_to_a_peer_that_does_not_read(number: signal.Signals, status: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        to = f"127.0.0.1:{server.getsockname()[1]}"
        send = ["send", to, "--pattern", "7", "--size", "1G", "--json", "--progress", "json", *SOFTWARE]
        with running(*send) as sender:
            peer, _ = server.accept()
            with peer:
                assert sender.json_line()["event"] == "progress"
                sender.process.send_signal(number)
                sent = sender.finish()
    assert sent.status == status
    assert "Error" not in sent.stderr


@pytest.mark.parametrize("moment", ["making a file", "hashing it", "moving it"])
def test_in_a_demo(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running("demo", "--size", "256M") as demo:
        demo.stderr_line(moment)
        started = children(demo.process.pid)
        assert len(started) == (2 if moment == "moving it" else 0)
        demo.process.send_signal(signal.SIGINT)
        ended = demo.finish()
    assert ended.status == 130
    assert ended.stderr.endswith("devmem-tcp: interrupted\n")
    assert not any(exists(pid) for pid in started)
    assert not list(tmp_path.iterdir())
