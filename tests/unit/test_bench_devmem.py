"""The receivers' bench: what it makes of their figures is right, and the C program is what it says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.append(str(BENCH))

import devmem_cpu  # noqa: E402
import pairs  # noqa: E402
from loopback import GIB  # noqa: E402

NAMES = ("one", "batch", "ours")


def received(cpu_s: float, dontneed_calls: int = 100) -> devmem_cpu.Received:
    """Half a GiB, received in so much CPU time, a quarter of it the program's own."""
    return devmem_cpu.Received(
        bytes=GIB // 2,
        dmabuf_bytes=GIB // 2,
        linear_bytes=0,
        host_bytes=0,
        frags=10_000,
        recv_calls=200,
        dontneed_calls=dontneed_calls,
        wall_s=4.0,
        user_s=cpu_s / 4,
        system_s=cpu_s * 3 / 4,
        undisturbed_s_per_gib=cpu_s,
        start_s=0.1,
    )


def test_a_row_is_the_medians_of_its_runs() -> None:
    row = devmem_cpu.row("ours", [received(1.0), received(9.0), received(2.0)])
    assert (row.cpu_s_per_gib, row.cpu_s_per_gib_least, row.cpu_s_per_gib_most) == (4.0, 2.0, 18.0)
    assert (row.user_s_per_gib, row.system_s_per_gib, row.undisturbed_s_per_gib) == (1.0, 3.0, 2.0)
    assert row.gbit_per_s == pytest.approx(GIB / 1e9)
    assert (row.frags, row.recv_calls, row.dontneed_calls, row.frags_a_dontneed) == (10_000, 200, 100, 100)


@pytest.mark.parametrize(
    ("seconds", "dontneed_calls", "held"),
    [
        ((10.0, 5.6, 7.0), 500, [True, True, True]),
        ((10.0, 5.6, 7.1), 500, [False, False, True]),
        ((10.0, 8.0, 7.0), 501, [True, True, False]),
        ((10.0, 5.0, 7.0), 500, [True, False, True]),
    ],
)
def test_the_limits(seconds: tuple[float, float, float], dontneed_calls: int, held: list[bool]) -> None:
    rows = [devmem_cpu.row(name, [received(cpu_s, dontneed_calls)]) for name, cpu_s in zip(NAMES, seconds, strict=True)]
    assert [limit.holds for limit in devmem_cpu.limits(rows)] == held


def test_the_c_program_compiles_and_says_how_it_is_used() -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the C limit is not measured")
    (binary,) = pairs.built(devmem_cpu.RECEIVER) or ("",)
    done = subprocess.run([binary], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: devmem_receiver PORT READ_BYTES LOWAT_BYTES WARM_BYTES one|batch\n"
    done = subprocess.run([binary, "0", "5x", "1", "1", "one"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "devmem_receiver: 5x is not a number\n")
