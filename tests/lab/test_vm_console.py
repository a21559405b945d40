"""The console watcher on logs as kernels write them."""

from __future__ import annotations

import pytest

from devmem_tcp.lab.vm.console import TAIL_LINES, Console

CLEAN = """\
[    0.000000] Linux version 7.3.4+deb13-amd64
[    0.912345] mtrr: your CPUs had inconsistent fixed MTRR settings
[    1.100000] ACPI: IRQ 4 override to edge(!), high(!)
[    1.200000] systemd[1]: WARNING: this is no kernel's
[    1.300000] BUGS: none
[    2.637848] devmem-lab abc123 ready
[    5.000000] devmem-lab abc123 exit 7
[    5.100000] reboot: Power down
"""

TROUBLE = [
    "[    6.110318] Kernel panic - not syncing: sysrq triggered crash",
    "[    6.1] BUG: kernel NULL pointer dereference, address: 0000000000000008",
    "[    6.1] BUG: KASAN: slab-out-of-bounds in gve_rx_dqo+0x1/0x2",
    "[    6.1] kernel BUG at net/core/devmem.c:120!",
    "[    6.1] WARNING: CPU: 1 PID: 103 at net/core/page_pool.c:1199 page_pool_put+0x1/0x2",
    "[    6.1] WARNING: net/core/page_pool.c:1199 at page_pool_put+0x1/0x2, CPU#1: ip/103",
    "[    6.1] WARNING: possible circular locking dependency detected",
    "[    6.1] WARNING: suspicious RCU usage",
    "[    6.1] Oops: 0002 [#1] SMP NOPTI",
    "[    6.1] Oops: general protection fault, probably for non-canonical address 0xdead",
    "[    6.1] rcu: INFO: rcu_preempt self-detected stall on CPU",
    "[    6.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    "[    6.1] INFO: task ip:103 blocked for more than 120 seconds.",
    "[    6.1] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [ip:103]",
    "[    6.1] unregister_netdevice: waiting for eth0 to become free. Usage count = 2",
    "[    6.1] UBSAN: array-index-out-of-bounds in net/core/dev.c:1:2",
    "[    6.1] gve 0000:00:03.0 eth0: NETDEV WATCHDOG: CPU: 0: transmit queue 1 timed out 5000 ms",
]


def fed(text: str, size: int) -> Console:
    console, data = Console("abc123"), text.encode()
    for start in range(0, len(data), size):
        console.feed(data[start : start + size])
    console.finish()
    return console


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_a_clean_run_in_pieces_of_any_size(size: int) -> None:
    console = fed(CLEAN.replace("\n", "\r\n"), size)
    assert console.ready
    assert console.exit_code == 7
    assert console.trouble == []
    assert not console.problem


@pytest.mark.parametrize("line", TROUBLE)
def test_what_a_kernel_reports_of_itself_is_trouble(line: str) -> None:
    assert fed(f"{CLEAN}{line}\n", 11).trouble == [line]


def test_the_last_line_counts_without_its_end() -> None:
    assert fed(f"{CLEAN}{TROUBLE[0]}", 100).trouble == [TROUBLE[0]]


def test_markers_of_another_boot_and_markers_without_a_number_are_not_ours() -> None:
    console = fed("devmem-lab other ready\ndevmem-lab other exit 0\ndevmem-lab abc123 exit x\n", 100)
    assert not console.ready
    assert console.exit_code is None


def test_an_init_that_fails_says_why() -> None:
    assert fed("[ 1.0] devmem-lab abc123 failed OSError: loading gve.ko: no\n", 9).problem == (
        "OSError: loading gve.ko: no"
    )


def test_bytes_that_are_no_text_do_no_harm_and_the_tail_is_short() -> None:
    console = Console("abc123")
    console.feed(b"\xff\xfe\x00 noise\n" * 1000)
    assert len(console.tail) == TAIL_LINES
