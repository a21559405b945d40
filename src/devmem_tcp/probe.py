"""What this machine has for each backend: the checks behind ``open_nic``, each with what was found and the fix."""

from __future__ import annotations

from devmem_tcp.types import ProbeCheck, ProbeReport, Severity


def probe_kernel() -> ProbeReport:
    """Say whether the kernel backend can run here."""
    return ProbeReport(
        (
            ProbeCheck(
                name="devmem_tcp.kernel",
                severity=Severity.ERROR,
                found="not part of this release",
                needed="a release of devmem-tcp that has it",
                fix="",
            ),
        )
    )
