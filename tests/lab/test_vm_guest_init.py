"""PID 1 of the guest, as far as it runs on the host: it stands alone, and carries the job's input and output."""

from __future__ import annotations

import ast
import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devmem_tcp.lab.vm import guest_init


def read_all(fd: int, into: bytearray) -> None:
    while True:
        try:
            data = os.read(fd, 1 << 16)
        except OSError:
            return
        if not data:
            return
        into += data


class Ports:
    """Pipes in place of the virtio-serial ports."""

    def __init__(self) -> None:
        self.feed_end, read_in = os.pipe()[::-1]
        out, write_out = os.pipe()
        err, write_err = os.pipe()
        self.by_name = {"in": read_in, "out": write_out, "err": write_err}
        self.out, self.err = bytearray(), bytearray()
        self._ends = (out, err)
        self._readers = [
            threading.Thread(target=read_all, args=(fd, into), daemon=True)
            for fd, into in ((out, self.out), (err, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def end_input(self) -> None:
        """End the job's input, and wait until whoever fed it has seen that."""
        os.write(self.feed_end, piece(b""))
        for thread in threading.enumerate():
            if thread.name == guest_init.INPUT_THREAD:
                thread.join()

    def finish(self) -> None:
        for name in ("out", "err"):
            os.close(self.by_name[name])
        for reader in self._readers:
            reader.join()

    def close(self) -> None:
        for fd in (*self._ends, self.by_name["in"], self.feed_end):
            os.close(fd)


@pytest.fixture
def ports() -> Iterator[Ports]:
    with contextlib.closing(Ports()) as made:
        yield made


def plan(*command: str, **more: Any) -> dict[str, Any]:
    return {"command": command, "cwd": "/", "environment": {"PATH": "/usr/bin:/bin"}, "input": False, **more}


def piece(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


def test_it_imports_nothing_but_the_standard_library() -> None:
    source = Path(guest_init.__file__).read_text(encoding="utf-8")
    compile(source, guest_init.__file__, "exec")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= sys.stdlib_module_names
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.module.partition(".")[0] in sys.stdlib_module_names


def test_it_starts_without_site_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", guest_init.__file__, "/nonexistent/plan.json"], capture_output=True, text=True
    )
    assert "FileNotFoundError" in done.stderr
    assert "/nonexistent/plan.json" in done.stderr


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_exit_code_is_the_jobs(ports: Ports, script: str, code: int) -> None:
    assert guest_init.run_on_pipes(plan("sh", "-c", script), ports.by_name) == code
    ports.finish()


def test_output_and_errors_stay_apart_and_whole(ports: Ports) -> None:
    script = "head -c 1000000 /dev/zero; echo said >&2"
    assert guest_init.run_on_pipes(plan("sh", "-c", script), ports.by_name) == 0
    ports.finish()
    assert bytes(ports.out) == bytes(1_000_000)
    assert bytes(ports.err) == b"said\n"


def test_a_job_with_input_gets_all_of_it_and_its_end(ports: Ports) -> None:
    sent = os.urandom(300_000)

    def feed() -> None:
        for start in range(0, len(sent), 50_000):
            os.write(ports.feed_end, piece(sent[start : start + 50_000]))
        os.write(ports.feed_end, piece(b""))

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert guest_init.run_on_pipes(plan("cat", input=True), ports.by_name) == 0
    feeder.join()
    ports.finish()
    assert bytes(ports.out) == sent


def test_a_job_that_ignores_its_input_is_not_held_up(ports: Ports) -> None:
    os.write(ports.feed_end, piece(b"x" * 60_000))
    assert guest_init.run_on_pipes(plan("true", input=True), ports.by_name) == 0
    ports.end_input()
    ports.finish()


def test_a_child_left_running_with_the_pipes_is_not_waited_for(ports: Ports) -> None:
    script = "echo before; (exec sleep 20) & echo $!"
    assert guest_init.run_on_pipes(plan("sh", "-c", script), ports.by_name) == 0
    ports.finish()
    said, child = bytes(ports.out).split()
    assert said == b"before"
    os.kill(int(child), 9)


def test_a_terminal_is_one_with_its_size(ports: Ports) -> None:
    script = "test -t 0 && test -t 2 && stty size; exit 3"
    made = plan("sh", "-c", script, terminal=(37, 91))
    assert guest_init.run_on_terminal(made, ports.by_name["in"], ports.by_name["out"]) == 3
    ports.end_input()
    ports.finish()
    assert bytes(ports.out) == b"37 91\r\n"


def test_a_terminal_is_resized_and_its_job_told(ports: Ports) -> None:
    script = "trap 'stty size; exit 5' WINCH; echo waiting; while :; do read -r line; done"
    made = plan("bash", "-c", script, terminal=(37, 91))
    codes: list[int] = []
    job = threading.Thread(
        target=lambda: codes.append(guest_init.run_on_terminal(made, ports.by_name["in"], ports.by_name["out"]))
    )
    job.start()
    while b"waiting" not in ports.out:
        job.join(0.01)
        assert job.is_alive()
    os.write(ports.feed_end, b"\xff\xff\xff\xff" + struct.pack("<HH", 50, 132) + piece(b"\n"))
    job.join()
    ports.end_input()
    ports.finish()
    assert codes == [5]
    assert b"50 132\r\n" in ports.out


def test_a_command_that_is_not_there_gives_the_code_of_a_shell(ports: Ports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_init, "open_port", lambda name, flags: ports.by_name[name])
    assert guest_init.run_job(plan("/nonexistent/tool", terminal=None)) == 127
    assert guest_init.run_job(plan("/etc", terminal=None)) == 126
    ports.finish()
    assert b"/nonexistent/tool: No such file" in bytes(ports.err)


def test_packets_are_stamped_while_the_guest_lives() -> None:
    with guest_init.timestamping_socket() as held:
        assert held.getsockopt(socket.SOL_SOCKET, guest_init._SO_TIMESTAMP) == 1
        assert held.family == socket.AF_INET, "the kernel stamps nothing for the sake of a UNIX socket"
