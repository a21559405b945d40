"""The demo: two processes, one file, equal hashes, and an explanation with the figures."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from processes import running


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    return path


def test_the_demo_explains_itself_and_leaves_nothing(temporary: Path) -> None:
    with running("demo", "--size", "2M") as demo:
        ended = demo.finish()
    assert ended.status == 0, ended.stderr
    text = ended.stdout.decode()
    for figure in (
        "2,097,152 bytes (2 MiB)",
        "header split on",
        "ntuple rule",
        "on queue 1",
        "as dmabuf id 1",
        "sendmsg calls",
        "2,097,152 bytes in the dmabuf, 0 linear, 0 host",
        "DONTNEED calls; 0 out at the end",
        "GB/s",
        "congestion",
        "equal at the file, the sender and the receiver",
        "software",
    ):
        assert figure in text
    assert "zero copy" not in text.lower()
    assert not list(temporary.iterdir())


def test_json_and_a_file_of_the_users(temporary: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.bin"
    file.write_bytes(os.urandom(300_001))
    with running("demo", "--file", file, "--json") as demo:
        ended = demo.finish()
    assert ended.status == 0, ended.stderr
    assert ended.stderr == ""
    report = ended.report
    assert (report["event"], report["file"], report["made"], report["kept"]) == ("demo", str(file), False, None)
    assert report["bytes"] == report["received"]["bytes"] == report["sent"]["bytes"] == 300_001
    assert report["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert report["received"]["sha256"] == report["sent"]["sha256"] == report["sha256"]
    assert report["received"]["path"]["tokens_out"] == 0
    assert not list(temporary.iterdir())


def test_keep_keeps_both_files(temporary: Path) -> None:
    with running("demo", "--size", "100K", "--keep", "--json", "--hostile", "3") as demo:
        report = demo.finish().report
    assert report["received"]["path"]["host_bytes"] > 0
    sent, received = Path(report["file"]), Path(report["kept"])
    assert sent.stat().st_size == 100 << 10
    assert sent.read_bytes() == received.read_bytes()
    assert list(temporary.iterdir()) == [sent.parent]


def test_a_child_that_fails_is_heard(temporary: Path, tmp_path: Path) -> None:
    file = tmp_path / "secret.bin"
    file.write_bytes(b"x")
    breaking = (
        "import sys; from devmem_tcp.cli import demo; demo._HOST = 'no.such.host.invalid';"
        "from devmem_tcp.cli.main import main; main()"
    )
    with running("demo", "--file", file, program=["-c", breaking]) as demo:
        ended = demo.finish()
    assert ended.status == 1
    assert "the receiver failed (exit status 1); it said:" in ended.stderr
    assert "cannot resolve host 'no.such.host.invalid'" in ended.stderr
    assert not list(temporary.iterdir())
