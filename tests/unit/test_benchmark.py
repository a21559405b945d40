"""The benchmark's parts that neither wait nor move bytes: plans, memory, medians, axes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devmem_tcp.benchmark import measuring, plots, words
from devmem_tcp.benchmark.drill import BEGIN, END, PATTERN, WARM_UP, Drill, MeasuringTurn, check
from devmem_tcp.benchmark.figures import EndFigures, Run, this_machine
from devmem_tcp.benchmark.measuring import Limits
from devmem_tcp.benchmark.plan import MIB, SIZES, Driver, Form, Kind, Plan, Pools, Work, list_works, size_name
from devmem_tcp.benchmark.results import Range, summarize
from devmem_tcp.benchmark.talk import Greeting
from devmem_tcp.errors import DevmemError
from devmem_tcp.testing.patterns import pattern

SMALL = Work(Kind.THROUGHPUT, 4096)
LARGE = Work(Kind.THROUGHPUT, 1 << 30)


def greeting(**known: Any) -> Greeting:
    means: dict[str, Any] = {
        "buffer_bytes": 1 << 40,
        "memory_bytes": 1 << 40,
        "fds": 1 << 20,
        "boot_id": "another machine",
    }
    return Greeting(version=1, nic="eth1", backend="kernel", machine=this_machine(), **means | known)


def figures(**known: Any) -> EndFigures:
    counts = ("messages", "dmabuf_bytes", "linear_bytes", "host_bytes", "copied_bytes", "sent_dmabuf_bytes")
    others: dict[str, Any] = {"backend": "software", "wall_s": 1.0, "cpu_s": 0.0, "congestion_controls": []}
    return EndFigures(**others | dict.fromkeys((*counts, "sent_host_bytes"), 0) | known)


def test_every_round_does_all_works_in_an_order_of_its_own() -> None:
    works = list_works(SIZES, (1, 8), frozenset())
    plan = Plan(works, rounds=3, seconds=1.0, seed=4)
    rounds = plan.schedule()
    assert rounds == plan.schedule()
    assert all(set(one) == set(works) and len(one) == len(works) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


@pytest.mark.parametrize(
    ("only", "count"),
    [
        ("", 4 * 2 + 4 + 1),
        ("throughput", 8),
        ("asyncio", 6),
        ("series round-trip", 2),
        ("connections", 1),
        ("connections series", 0),
        ("blocking asyncio", 13),
    ],
)
def test_only(only: str, count: int) -> None:
    assert len(list_works((4096, MIB), (8,), frozenset(only.split()))) == count


def test_memory_grows_with_what_is_measured_and_never_over_the_limit() -> None:
    assert Pools.of([SMALL], 1 << 40) == Pools(64 * MIB, 0, 0, 4096, 0)
    assert Pools.of([SMALL, LARGE], 1 << 40) == Pools(64 * MIB, 2 << 30, 0, 4096, 1 << 30)
    assert Pools.of([SMALL, LARGE], 1 << 30).rx_large == 1 << 30
    many = Work(Kind.CONNECTIONS, 65536, connections=512)
    assert Pools.of([many], 1 << 40) == Pools(0, 0, 256 * MIB, 65536, 0)
    pools = Pools.of([SMALL, LARGE, many], 100 * MIB)
    assert pools == Pools(64 * MIB, 100 * MIB, 100 * MIB, 65536, 1 << 30)
    assert [pools.rx(work) for work in (SMALL, LARGE, many)] == [64 * MIB, 100 * MIB, 100 * MIB]
    assert [pools.tx(work) for work in (SMALL, LARGE, many)] == [65536, 1 << 30, 65536]


@pytest.mark.parametrize(
    ("limits", "known", "words"),
    [
        (Limits(MIB, 1 << 20), {}, "needs a Buffer of 1 GiB; --buffer is 1 MiB"),
        (Limits(1 << 40, 1 << 20), {"buffer_bytes": MIB}, "needs a Buffer of 1 GiB; --buffer is 1 MiB"),
        (Limits(1 << 40, 1 << 20), {"memory_bytes": 1 << 30}, "needs 2,112 MiB of memory, with what else is measured"),
    ],
)
def test_what_one_end_has_no_memory_for_is_left_out(limits: Limits, known: dict[str, int], words: str) -> None:
    fitting, left_out = measuring._fitting([SMALL, LARGE], limits, greeting(**known))
    assert fitting == [SMALL]
    (one,) = left_out
    assert one.work == LARGE
    assert words in one.words


def test_on_one_machine_both_ends_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "available_memory", lambda: 3 << 30)
    monkeypatch.setattr(measuring, "boot_id", lambda: "this boot")
    limits = Limits(1 << 40, 1 << 20)
    assert measuring._fitting([LARGE], limits, greeting(boot_id="another boot"))[0] == [LARGE]
    assert measuring._fitting([LARGE], limits, greeting(boot_id="this boot"))[0] == []


def test_connections_need_fds_at_both_ends() -> None:
    many = Work(Kind.CONNECTIONS, 65536, connections=512)
    assert many.fds == 2112
    for here, there in ((2112, 2111), (2111, 2112)):
        fitting, left_out = measuring._fitting([many], Limits(1 << 40, here), greeting(fds=there))
        assert (fitting, [one.work for one in left_out]) == ([], [many])
    assert measuring._fitting([many], Limits(1 << 40, 2112), greeting(fds=2112)) == ([many], [])


def test_a_drill_warms_up_measures_between_the_marks_and_fetches_the_other_end_s_figures() -> None:
    there = figures(messages=7)
    turn = MeasuringTurn(SMALL, ("", 0), ("", 0), 1e-9, lambda: there)
    drill = Drill(turn, "software", list)
    steps = list(drill.steps())
    assert [step.mark for step in steps] == [*[WARM_UP] * (len(steps) - 2), BEGIN, END]
    assert steps[0].messages == 1
    assert steps[-2].messages == 0
    run = drill.run([])
    assert (run.messages, run.receiver) == (steps[-1].messages, there)
    assert run.messages == 100  # so small a message is sent that often, however little time there is


def test_a_row_is_medians_over_rounds() -> None:
    runs = [
        Run(4, figures(wall_s=wall_s, cpu_s=0.25), figures(messages=4, cpu_s=0.75, dmabuf_bytes=4 << 30), [])
        for wall_s in (1.0, 4.0, 2.0)
    ]
    row = summarize(LARGE, runs)
    assert row.gb_per_s == Range((4 << 30) / 2.0 / 1e9, (4 << 30) / 4.0 / 1e9, (4 << 30) / 1.0 / 1e9)
    assert row.cpu_s_per_gib == Range(0.25, 0.25, 0.25)
    assert (row.messages, row.payload_bytes, row.receiver.received_dmabuf) == (12, 12 << 30, 12 << 30)
    assert row.round_trip_us is None


def test_p99_is_a_trip_that_was_made() -> None:
    laps = [float(n) for n in range(1, 201)]
    work = Work(Kind.ROUND_TRIP, 4096, Driver.ASYNCIO, Form.SERIES)
    row = summarize(work, [Run(200, figures(), figures(messages=200), laps[::-1])])
    assert row.round_trip_us == Range(100.5, 100.5, 100.5)
    assert row.round_trip_p99_us == Range(198.0, 198.0, 198.0)


def test_a_wrong_byte_is_found() -> None:
    sent = pattern(PATTERN, 70_000)
    check(sent)
    wrong = sent.copy()
    wrong[65_537] ^= 1
    with pytest.raises(DevmemError, match="byte 65537 of a message is"):
        check(wrong)
    with pytest.raises(DevmemError, match="byte 0 of a message is"):
        check(np.roll(sent, 4096))


@given(st.lists(st.floats(1e-3, 1e7), min_size=1, max_size=20), st.sampled_from([None, 4, 8, 10]))
def test_an_axis_holds_every_value_and_ticks_are_few_and_in_order(values: list[float], base: int | None) -> None:
    scale = plots.Scale(values, 300, 20, base)
    assert scale.ticks == sorted(scale.ticks)
    assert 1 <= len(scale.ticks) <= 40
    assert scale.ticks[-1] >= max(values) * 0.999999
    assert base is None or scale.ticks[0] <= min(values) * 1.000001
    assert all(20 <= scale(value) <= 300 for value in values)
    placed = [scale(value) for value in sorted(values)]
    assert placed == sorted(placed, reverse=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (4.5, "4.50"), (99.94, "99.9"), (123.4, "123"), (1234567, "1,234,567")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1 bytes"), (4096, "4 KiB"), (1 << 30, "1 GiB"), (3 * MIB, "3 MiB"), (5000, "5,000 bytes")]
)
def test_size_names(size: int, text: str) -> None:
    assert size_name(size) == text


def test_text_in_a_plot_is_escaped() -> None:
    point = plots.Point(1.0, Range(1.0, 1.0, 1.0), "<words> & more")
    drawn = plots.lines(
        [plots.Line("<name>", "blocking messages", [point])],
        x_label="a<b",
        y_label="c&d",
        x_name=lambda value: "<x>",
        x_base=2,
        y_base=10,
        alt='"alt"',
    )
    assert not re.search(r"<(words|name|x|b)\b", drawn)
    assert "&lt;words&gt; &amp; more" in drawn
    assert 'aria-label="&quot;alt&quot;"' in drawn
