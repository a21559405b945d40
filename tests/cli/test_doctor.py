"""``devmem-tcp doctor`` as people and programs run it, on this machine, whatever it has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from devmem_tcp.cli.doctor import EXIT_WARNINGS, DoctorReport, ExplainReport, RestoreReport, severity
from devmem_tcp.kernel.journal import FORMAT, Entry, NicIdentity, current_process
from devmem_tcp.types import ProbeReport, Severity
from processes import Finished, running

NOBODY = 65534
STATUS = {Severity.OK: 0, Severity.WARNING: EXIT_WARNINGS, Severity.ERROR: 1}
LIMIT_S = 30.0
# imports come first: another user may not be able to read them
AS_NOBODY = """
import os, sys
import devmem_tcp.cli.doctor, devmem_tcp.cli.recv
import encodings.ascii, encodings.idna, gzip
from devmem_tcp.cli.main import main
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
main()
"""


def doctor(*arguments: str, columns: int = 80, **environment: str) -> Finished:
    """Run the doctor to its end."""
    return run([sys.executable, "-m", "devmem_tcp", "doctor", *arguments], columns, environment)


def doctor_as_nobody(*arguments: str, **environment: str) -> Finished:
    """Run the doctor without any privilege."""
    return run([sys.executable, "-c", AS_NOBODY, "doctor", *arguments], 80, environment)


def run(command: list[str], columns: int, environment: dict[str, str]) -> Finished:
    ended = subprocess.run(
        command,
        capture_output=True,
        timeout=LIMIT_S,
        env={**os.environ, "COLUMNS": str(columns), **environment},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    finished = Finished(ended.returncode, ended.stdout, ended.stderr.decode())
    assert "Traceback" not in finished.stderr, finished.stderr
    return finished


def test_json_is_the_whole_report_and_the_status_is_its_worst() -> None:
    finished = doctor("lo", "--json")
    (line,) = finished.stdout.splitlines()
    report = msgspec.json.decode(line, type=DoctorReport)
    assert report.nic == "lo"
    assert report.severity is Severity.ERROR
    assert severity(ProbeReport(report.checks)) is report.severity
    assert finished.status == STATUS[report.severity]
    found = {check.name: check for check in report.checks}
    assert {"kernel", "header split", "udmabuf", "dma-heaps", "CUDA", "MTU", "sender's RTO", "journal"} <= set(found)
    assert found["header split"].severity is Severity.ERROR
    assert all(check.needed and check.fix for check in report.checks if check.severity is Severity.ERROR)
    assert json.loads(line)["event"] == "doctor"


@pytest.mark.parametrize("arguments", [("lo",), (), ("nothere0",)])
def test_table_and_fixes_fit_80_columns(arguments: tuple[str, ...]) -> None:
    finished = doctor(*arguments)
    lines = finished.stdout.decode().splitlines()
    table = [line for line in lines if not re.match(r"[a-z]", line)]  # the rest is to be pasted, whole
    assert max(map(len, table)) <= 80
    assert finished.stderr == ""
    assert lines[-1].startswith("Devmem TCP can")
    if arguments:
        assert finished.status == 1
        assert "--backend software" in lines[-1]


def test_fixes_can_be_pasted_into_a_shell() -> None:
    """What is no comment is a command line that the shell understands."""
    text = doctor("lo").stdout.decode()
    block = text[text.index("# What would mend it") :].rpartition("\n\n")[0]
    subprocess.run(["sh", "-n", "-c", block], check=True, timeout=LIMIT_S)
    typed = [line.split()[0] for line in block.splitlines() if line and not line.startswith("#")]
    assert "devmem-tcp" in typed
    assert set(typed) <= {"devmem-tcp", "sudo", "echo", "ip", "ss"}


def test_without_privileges_it_says_so_and_how_to_do_without() -> None:
    finished = doctor_as_nobody("lo", "--json")
    report = msgspec.json.decode(finished.stdout, type=DoctorReport)
    found = {check.name: check for check in report.checks}
    if found["netdev family"].severity is Severity.ERROR:  # a kernel without bind-rx cannot be asked
        assert found["CAP_NET_ADMIN"].found.startswith("not asked")
    else:
        assert found["CAP_NET_ADMIN"].severity is Severity.ERROR
        assert "devmem-tcp broker" in found["CAP_NET_ADMIN"].fix
    assert found["binding"].severity is Severity.WARNING
    assert found["header split"].severity is Severity.ERROR, "what needs no privilege is found out without"
    assert finished.status == 1


def test_an_interface_that_is_not_there_is_a_finding() -> None:
    finished = doctor("nothere0", "--json")
    found = {check.name: check for check in msgspec.json.decode(finished.stdout, type=DoctorReport).checks}
    assert found["interface"].found == "there is no nothere0"
    assert "header split" in found["not looked at"].found


@pytest.mark.parametrize("arguments", [("lo", "--restore"), ("--restore", "--explain", "EBADF"), ("--nosuch",)])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert doctor(*arguments).status == 2


def test_exit_status_is_in_the_help() -> None:
    text = " ".join(doctor("--help").stdout.decode().split())
    assert "4 that there are warnings" in text


# --- explaining -----------------------------------------------------------------------------------------------------


def test_explain_says_cause_fix_and_source() -> None:
    finished = doctor("--explain", "tcp-data-split is disabled")
    assert finished.status == 0
    text = finished.stdout.decode()
    assert "header split is off" in text
    assert "ethtool -G NIC tcp-data-split on" in text
    assert "netdev_rx_queue.c" in text


def test_explain_as_json_and_of_several() -> None:
    finished = doctor("--explain", "bind-rx EBUSY", "--json")
    report = msgspec.json.decode(finished.stdout, type=ExplainReport)
    assert len(report.refusals) > 1
    assert {one.errno for one in report.refusals} == {"EBUSY"}


def test_explain_of_what_nobody_knows() -> None:
    finished = doctor("--explain", "it does not work")
    assert finished.status == 1
    assert finished.stderr.startswith("devmem-tcp: nothing is known about 'it does not work'\nhint: ")


# --- putting back ---------------------------------------------------------------------------------------------------


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A runtime directory with a journal of NOBODY's; not pytest's own, where another user has no way in."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as name:
        folder = Path(name, "devmem-tcp")
        folder.mkdir(mode=0o700)
        folder.parent.chmod(0o755)
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        yield folder.parent


def put(runtime: Path, number: int, content: bytes) -> Path:
    path = runtime / "devmem-tcp" / f"{number:012}.json"
    path.write_bytes(content)
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    return path


def test_restore_with_nothing_to_do(runtime: Path) -> None:
    finished = doctor_as_nobody("--restore", XDG_RUNTIME_DIR=str(runtime))
    assert (finished.status, finished.stdout.decode()) == (
        0,
        f"nothing to put back: {runtime}/devmem-tcp has no entry\n",
    )
    assert "sudo devmem-tcp doctor --restore" in finished.stderr


def test_restore_tells_what_became_of_each_entry(runtime: Path) -> None:
    """One of another boot is forgotten; one that cannot be read is kept, and the status says that it was not undone."""
    owner = msgspec.structs.replace(current_process(), boot_id="another")
    nic = NicIdentity("eth7", 7, "02:00:00:00:00:01", True, 1)
    old = Entry(FORMAT, 1, owner, nic, "header-split", "off", "on", "ethtool -G eth7 tcp-data-split on")
    path = put(runtime, 1, msgspec.json.encode(old))
    finished = doctor_as_nobody("--restore", XDG_RUNTIME_DIR=str(runtime))
    assert finished.status == 0
    assert finished.stdout.decode().startswith("eth7: ethtool -G eth7 tcp-data-split on: of another boot")
    assert not path.exists()
    path = put(runtime, 2, b"half of an ent")
    finished = doctor_as_nobody("--restore", "--json", XDG_RUNTIME_DIR=str(runtime))
    report = msgspec.json.decode(finished.stdout, type=RestoreReport)
    assert finished.status == 1
    assert [one.result for one in report.settings] == ["failed"]
    assert str(path) in report.settings[0].text
    assert path.exists()


def test_restore_without_a_journal_to_be_had_says_why() -> None:
    finished = doctor_as_nobody("--restore", XDG_RUNTIME_DIR="")
    assert finished.status == 1
    assert finished.stderr.startswith("devmem-tcp: error: ")


def test_recv_says_in_a_line_what_the_doctor_says_in_a_table() -> None:
    with running("recv", "0", "-o", "/dev/null", "--backend", "kernel", "--nic", "lo") as process:
        finished = process.finish()
    assert finished.status == 1
    error, *hints = finished.stderr.splitlines()
    assert "header split: the driver has none" in error
    assert len(hints) == len(set(hints)) >= 2
