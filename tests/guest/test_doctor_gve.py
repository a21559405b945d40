"""The doctor with a real NIC: what it finds is so, and what it says to type mends it. Run in a guest of the lab.

devmem-tcp lab run -- .venv/bin/pytest tests/guest/test_doctor_gve.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec
import pytest

import devmem_tcp as dmt
from devmem_tcp.cli.doctor import EXIT_WARNINGS, DoctorReport, RestoreReport
from devmem_tcp.errors import BackendFallbackWarning, BackendUnavailable, BindError, NicSettingError, SteeringWarning
from devmem_tcp.kernel import netdev
from devmem_tcp.kernel.ethtool import Ethtool
from devmem_tcp.memory import Udmabuf
from devmem_tcp.probe import probe_kernel, probe_machine
from devmem_tcp.types import ProbeCheck, Severity
from xdp_by_netlink import generic_xdp

NIC: Final = os.environ["NETIF"]
MIB: Final = 1 << 20
LIMIT_S: Final = 60.0
NOBODY: Final = 65534


def doctor(*arguments: str) -> tuple[int, bytes]:
    """Run ``devmem-tcp doctor`` in a process of its own."""
    command = [sys.executable, "-m", "devmem_tcp", "doctor", *arguments]
    ended = subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=False)
    assert b"Traceback" not in ended.stderr, ended.stderr.decode()
    return ended.returncode, ended.stdout


def found() -> dict[str, ProbeCheck]:
    """Examine the NIC."""
    return {check.name: check for check in probe_machine(NIC).checks}


def type_fix(check: ProbeCheck) -> None:
    """Type what a check says would mend it."""
    command = check.fix.partition("#")[0].replace("sudo ", "").replace("devmem-tcp", f"{sys.executable} -m devmem_tcp")
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=LIMIT_S)


@contextmanager
def ethtool() -> Iterator[Ethtool]:
    """Give the NIC for changes, and put header split, ntuple and the queues back."""
    with Ethtool(NIC) as nic:
        channels, header_split = nic.channels(), nic.rings().header_split
        try:
            yield nic
        finally:
            nic.set_header_split(header_split)
            nic.set_feature("ntuple", False)
            if nic.channels() != channels:
                nic.set_channels(rx=channels.rx, tx=channels.tx)


@contextmanager
def xdp_attached() -> Iterator[None]:
    """Keep an XDP program attached, a generic one; the kernel turns rx-gro-hw off for it, and not on again."""
    try:
        with generic_xdp(NIC):
            yield
    finally:
        with Ethtool(NIC) as nic:
            nic.set_feature("rx-gro-hw", True)


# --- what is well ---------------------------------------------------------------------------------------------------


def test_a_healthy_nic() -> None:
    status, said = doctor(NIC, "--json")
    report = msgspec.json.decode(said, type=DoctorReport)
    assert [check for check in report.checks if check.severity is not Severity.OK] == []
    assert (status, report.severity) == (0, Severity.OK)
    checks = {check.name: check for check in report.checks}
    assert checks["driver"].found.startswith("gve, ")
    assert checks["binding"].found == "bind-rx takes this NIC"
    assert checks["sending"].found == "bind-tx takes this NIC"
    assert checks["device memory"].found == "by udmabuf, dma-heaps"
    with dmt.open_nic(NIC) as nic:
        assert nic.capabilities.backend == "kernel"


def test_without_a_name_the_nics_that_can_are_listed() -> None:
    status, said = doctor("--json")
    checks = {check.name: check for check in msgspec.json.decode(said, type=DoctorReport).checks}
    assert status == 0
    assert checks[f"NIC {NIC}"].found == "gve: can carry devmem TCP"
    assert checks["NICs"].found.startswith(NIC)


def test_looking_restarts_no_queue() -> None:
    """A queue that restarts gets a new page pool."""

    def pools() -> set[int]:
        with Ethtool(NIC) as nic:
            return {pool.pool_id for pool in netdev.page_pools(nic.ifindex)}

    before = pools()
    assert before
    probe_machine(NIC)
    probe_kernel(NIC)
    assert pools() == before


# --- what can be turned on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["header split", "ntuple rules"])
def test_what_is_off_can_be_turned_on_by_what_is_advised(name: str) -> None:
    with ethtool():
        check = found()[name]
        assert (check.severity, check.found) == (Severity.OK, "off; can be turned on")
        type_fix(check)
        check = found()[name]
        assert (check.severity, check.found.partition(";")[0], check.fix) == (Severity.OK, "on", "")


def test_one_queue() -> None:
    with ethtool() as nic:
        nic.set_channels(rx=1, tx=nic.channels().tx)
        with pytest.raises(BackendUnavailable, match="RX queues: 1, of") as refused:
            dmt.open_nic(NIC, backend="kernel")
        check = next(check for check in refused.value.report.checks if check.name == "RX queues")
        assert found()["RX queues"] == check
        type_fix(check)
        assert found()["RX queues"].severity is Severity.OK


# --- XDP ------------------------------------------------------------------------------------------------------------


def test_xdp_is_in_the_way_until_it_is_detached_as_said() -> None:
    with xdp_attached():
        check = found()["XDP"]
        assert (check.severity, check.found) == (Severity.ERROR, "a program is attached (generic)")
        with pytest.raises(BackendUnavailable, match="XDP: a program is attached"):
            dmt.open_nic(NIC, backend="kernel")
        type_fix(check)
        assert found()["XDP"].severity is Severity.OK


def test_what_linux_itself_says_of_xdp_has_a_hint() -> None:
    with dmt.open_nic(NIC, backend="kernel") as nic, Udmabuf().allocate(MIB) as buffer, nic.set_rss(equal=1):
        with xdp_attached(), pytest.raises(NicSettingError, match="single buffer XDP") as refused:
            nic.set_header_split("on")
        assert "xdpgeneric off" in refused.value.hint
        with pytest.raises(BindError, match="tcp-data-split is disabled") as bound:
            nic.bind_rx(buffer, [1])
        assert "tcp-data-split on" in bound.value.hint


# --- privileges, lo -------------------------------------------------------------------------------------------------


def in_child_as_nobody(code: str) -> str:
    """Run code in a process without privileges; what it imports is imported before it loses them."""
    program = "\n".join(
        (
            "import encodings.ascii, gzip, os, warnings",
            "import devmem_tcp as dmt",
            "from devmem_tcp.errors import BackendFallbackWarning, BackendUnavailable",
            "from devmem_tcp.probe import probe_machine",
            f"os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})",
            code,
        )
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_without_privileges() -> None:
    said = in_child_as_nobody(
        f"""
for check in probe_machine({NIC!r}).checks:
    print(check.name, check.severity.value, check.found, sep="|")
try:
    dmt.open_nic({NIC!r}, backend="kernel")
except BackendUnavailable as error:
    print("refused", error.message, sep="|")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with dmt.open_nic({NIC!r}) as nic:
        print("auto", nic.capabilities.backend, [str(each.message) for each in caught], sep="|")
"""
    )
    lines = {line.partition("|")[0]: line for line in said.splitlines()}
    assert lines["CAP_NET_ADMIN"].startswith("CAP_NET_ADMIN|error|no")
    assert lines["binding"].startswith("binding|warning|not asked")
    assert lines["sending"] == "sending|ok|bind-tx takes this NIC"
    assert lines["header split"].startswith("header split|ok|off")
    assert lines["refused"].endswith(f"cannot run on {NIC}: CAP_NET_ADMIN: no: this process may not bind")
    assert lines["auto"].startswith("auto|software|")
    assert "CAP_NET_ADMIN: no" in lines["auto"]


def test_lo() -> None:
    with pytest.raises(BackendUnavailable, match="header split: the driver has none") as refused:
        dmt.open_nic("lo", backend="kernel")
    checks = {check.name: check for check in refused.value.report.checks}
    assert checks["binding"].severity is Severity.ERROR
    assert "queue management" in checks["binding"].found
    assert checks["sending"].severity is Severity.WARNING
    with pytest.warns(BackendFallbackWarning, match="header split"), dmt.open_nic("lo") as nic:
        assert nic.capabilities.backend == "software"


# --- in use, and left over ------------------------------------------------------------------------------------------


def test_a_bound_queue_that_rss_covers() -> None:
    with (
        dmt.open_nic(NIC, backend="kernel") as nic,
        Udmabuf().allocate(16 * MIB) as buffer,
        nic.set_header_split("on"),
    ):
        with pytest.warns(SteeringWarning, match="hash buckets"):
            rx = nic.bind_rx(buffer, [1])
        with rx:
            check = found()["bound queues"]
            assert check.severity is Severity.WARNING
            assert f"1 (dmabuf id {rx.dmabuf_id})" in check.found
            assert "hash buckets" in check.found
            assert check.fix.startswith("sudo ethtool -X")
            with nic.set_rss(equal=1):
                assert found()["bound queues"].severity is Severity.OK
                assert " 0 of them of dma-bufs" not in found()["page pools"].found


def test_settings_of_a_program_that_was_killed_are_put_back() -> None:
    """The conftest's look at the NIC is the judge of what ``--restore`` did."""
    program = f"""
import os, signal
import devmem_tcp as dmt
nic = dmt.open_nic({NIC!r}, backend="kernel")
buffer = dmt.memory.Udmabuf().allocate({MIB})
kept = [nic.set_header_split("on"), nic.set_rss(equal=1), nic.add_ntuple(dst_port=5201, queue=1)]
kept.append(nic.bind_rx(buffer, [1]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    status, said = doctor(NIC, "--json")
    checks = {check.name: check for check in msgspec.json.decode(said, type=DoctorReport).checks}
    assert status == EXIT_WARNINGS
    assert checks["journal"].severity is Severity.WARNING
    assert "tcp-data-split on" in checks["journal"].found
    assert checks["header split"].found == "on"
    assert checks["bound queues"].found == "none now", "the kernel undoes a binding"
    status, said = doctor("--restore", "--json")
    report = msgspec.json.decode(said, type=RestoreReport)
    assert status == 0
    assert [one.result for one in report.settings] == ["restored"] * len(report.settings)
    assert len(report.settings) >= 4
    assert found()["journal"].found == "nothing left"
    status, said = doctor("--restore")
    assert (status, said.decode()) == (0, f"nothing to put back: {report.journal} has no entry\n")
