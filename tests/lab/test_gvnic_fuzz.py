"""A hostile guest gets no exception out of the gVNIC, no long wait, and no byte outside of what is mapped."""

from __future__ import annotations

import logging

import pytest

from gvnic_fuzzer import Fuzzer


@pytest.mark.parametrize("seed", range(8))
def test_hostile_guest(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    fuzzer = Fuzzer(seed)
    try:
        for _ in range(400):
            fuzzer.step()
        fuzzer.check()
        stats = fuzzer.nic.statistics()
        assert sum(stats.mistakes.values()) > 100, "the inputs are hostile"
        assert fuzzer.switch.counters[fuzzer.nic].sent_packets > 20, "and get as far as the wire"
    finally:
        fuzzer.close()


def test_mistakes_are_logged_without_flooding(caplog: pytest.LogCaptureFixture) -> None:
    fuzzer = Fuzzer(0)
    for _ in range(1000):
        fuzzer.nic.write_bar(0, 0x1000, b"\0")
    assert fuzzer.nic.mistakes.counts["bar-write"] == 1000
    lines = [record for record in caplog.records if "bar-write" in record.getMessage()]
    assert len(lines) == 10
    fuzzer.close()
