"""Whole reports of the probe, and what it makes of an error that a user pastes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import devmem_tcp as dmt
from devmem_tcp import refusals
from devmem_tcp.errors import BackendFallbackWarning, BackendUnavailable, BrokenError, errno_name
from devmem_tcp.probe import lookup, machine, nic, probe_kernel, probe_machine
from devmem_tcp.probe.finding import looked_at, ok, reasons
from devmem_tcp.sys import calls
from devmem_tcp.types import ProbeCheck, ProbeReport, Severity

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR
DOCS = Path(__file__).parents[2] / "docs"


def test_without_an_interface_the_rest_is_said_not_to_be_looked_at() -> None:
    report = probe_kernel("nothere0")
    found = {check.name: check for check in report.checks}
    assert not report.ok
    assert found["interface"].severity is ERROR
    assert "header split, ntuple rules, RX queues, RSS, XDP, binding, sending" in found["not looked at"].found
    assert "interface: there is no nothere0" in reasons(report)


def test_every_check_is_made_although_the_first_ones_fail() -> None:
    names = [check.name for check in probe_kernel("lo").checks]
    assert names == ["netdev family", "CAP_NET_ADMIN", "interface", *nic.NECESSARY]


def test_open_nic_reads_no_file_to_decide() -> None:
    """Who opens a NIC after giving up its privileges may not even be able to read the standard library."""
    made: list[str] = []
    with calls.intercept(made.append):
        probe_kernel("lo")
    assert made
    assert "open" not in made


def test_what_a_check_cannot_find_out_does_not_stop_the_others() -> None:
    def fail() -> ProbeCheck:
        raise BrokenError("the kernel's answer makes no sense", hint="ask again")

    check = looked_at("header split", fail)
    assert (check.severity, check.fix) == (WARNING, "ask again")


def test_reasons_are_the_errors_alone() -> None:
    report = ProbeReport(
        (ok("a", "fine"), ProbeCheck("b", WARNING, "so so", "", ""), ProbeCheck("c", ERROR, "no", "", ""))
    )
    assert reasons(report) == "c: no"


OF_THE_MACHINE = {
    *("kernel", "netdev family", "kernel options", "CAP_NET_ADMIN", "locked memory", "optmem_max", "udmabuf"),
    *("dma-heaps", "CUDA", "device memory", "sender's RTO", "journal"),
}
CHANGING = {"mkdir", "write", "rename", "unlink", "chmod", "chown", "ftruncate"}


@pytest.mark.parametrize("name", [None, "lo", "nothere0"])
def test_the_doctor_changes_nothing_and_survives_any_failure(name: str | None) -> None:
    """Make the n-th system call fail, for every n: there is always a whole report, and no fd is left."""
    made: list[str] = []
    with calls.intercept(made.append):
        assert {check.name for check in probe_machine(name).checks} >= OF_THE_MACHINE
    assert not CHANGING & set(made)
    for number in range(len(made)):
        left = iter(range(number + 1))

        def fail(call: str, left: Iterator[int] = left, number: int = number) -> None:
            if next(left, -1) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with calls.intercept(fail):
            report = probe_machine(name)
        assert {check.name for check in report.checks} >= OF_THE_MACHINE, f"call {number}: {made[number]}"


@pytest.mark.parametrize(("backend", "said"), [("kernel", BackendUnavailable), ("auto", BackendFallbackWarning)])
def test_a_broker_that_is_not_there_is_said_with_the_fix(tmp_path: Path, backend: str, said: type[Any]) -> None:
    path = str(tmp_path / "broker.sock")
    if said is BackendUnavailable:
        with pytest.raises(BackendUnavailable, match=f"connect to the broker at {path}: ENOENT") as refused:
            dmt.open_nic("lo", backend=backend, via=path)
        check = next(check for check in refused.value.report.checks if check.name == "broker")
        assert "systemctl start devmem-tcp-broker" in check.fix
        assert "CAP_NET_ADMIN" not in {check.name for check in refused.value.report.checks}
        return
    with pytest.warns(BackendFallbackWarning, match="connect to the broker"):
        opened = dmt.open_nic("lo", backend=backend, via=path)
    with opened:
        assert opened.capabilities.backend == "software"


def test_candidates_say_which_nics_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "interface_names", lambda: ["lo", "eth7", "eth8"])
    answers = {
        "eth7": [ok("driver", "gve, version 1")],
        "eth8": [ok("driver", "e1000"), ProbeCheck("RSS", ERROR, "no", "", "")],
    }
    monkeypatch.setattr(machine, "nic_checks", lambda name, checks: answers[name])
    first, second, last = machine.candidates()
    assert (first.name, first.found) == ("NIC eth7", "gve: can carry devmem TCP")
    assert (second.severity, second.found) == (OK, "e1000: no. RSS: no")
    assert (last.severity, last.found) == (OK, "eth7; more about it: devmem-tcp doctor eth7")
    del answers["eth7"][0]
    answers["eth7"].append(ProbeCheck("RSS", ERROR, "no", "", ""))
    assert machine.candidates()[-1].severity is ERROR


# --- explaining -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("tcp-data-split is disabled", "header split is off"),
        ("netdev bind-rx: EINVAL (Invalid argument): tcp-data-split is disabled", "header split is off"),
        ("Tcp-Data-Split Is", "header split is off"),
        ("bind-rx EBADF", "the fd is not open"),
        ("bind-tx: ENOTSUP: Driver does not support netmem TX", "cannot send from device memory"),
        ("dmabuf sg entry (addr=0x4883000, len=4096) not aligned to niov size 8192", "no whole number of RX pages"),
        ("netdev bind-rx: EPERM (Operation not permitted)", "CAP_NET_ADMIN"),
    ],
)
def test_an_error_is_explained_by_what_can_be_pasted(text: str, cause: str) -> None:
    found = lookup.explanations(text)
    assert found
    assert any(cause in refusal.cause for refusal in found)
    assert all(refusal.errno == found[0].errno for refusal in found)


@pytest.mark.parametrize("refusal", [one for one in refusals.REFUSALS if one.extack], ids=lambda one: one.extack)
def test_the_kernels_own_words_find_their_refusal(refusal: refusals.Refusal) -> None:
    said = f"netdev {refusal.call}: {errno_name(refusal.errno)} (…): {refusal.extack.replace('…', '12 34')}"
    assert refusal in lookup.explanations(said)


@pytest.mark.parametrize("text", ["", "it does not work", "ENOENT", "bind-rx EXDEV"])
def test_what_is_not_known_is_not_explained(text: str) -> None:
    assert lookup.explanations(text) == ()


def test_every_extack_of_the_contract_has_a_cause_and_a_fix() -> None:
    """Three words or more in backticks are the kernel's."""
    text = (DOCS / "kernel-contract.md").read_text(encoding="utf-8")
    quoted = set(re.findall(r"`([a-zA-Z][a-zA-Z'-]*(?: [^ `]+){2,})`", text))
    assert {"tcp-data-split is disabled", "Driver does not support netmem TX"} <= quoted
    for said in quoted:
        found = lookup.explanations(said)
        assert found, said
        assert all(refusal.extack and refusal.cause and refusal.fix for refusal in found), said


def test_the_table_in_the_documentation_is_the_table_of_refusals() -> None:
    text = (DOCS / "doctor.md").read_text(encoding="utf-8")
    begin, end = "<!-- refusals: begin -->\n", "\n<!-- refusals: end -->"
    shown = text.partition(begin)[2].partition(end)[0]
    assert shown == "\n".join(lookup.table()), "docs/doctor.md: replace the table by lookup.table() of devmem_tcp.probe"
