"""Memory of a NUMA node, as far as one node goes, and the look at it from outside."""

from __future__ import annotations

import mmap
import os
import struct
import sys
from pathlib import Path

import pytest

from devmem_tcp.errors import DevmemError, KernelError
from devmem_tcp.lab import outside, second_memory, trial

ZONES = """\
Node 0, zone      DMA
  per-node stats
  pages free     2816
        spanned  4095
  start_pfn:           1
Node 0, zone   Normal
        spanned  0
        present  0
Node 1, zone    DMA32
        spanned  65504
        present  65536
  node_unreclaimable:  0
  start_pfn:           262144
Node 1, zone   Normal
        spanned  0
Node 10, zone   Normal
        spanned  16
  start_pfn:           1048576
"""
START = 0x4000_0000


@pytest.mark.parametrize(("node", "start"), [(0, 4096), (1, START), (10, 1 << 32)])
def test_a_node_starts_where_its_first_zone_with_memory_does(node: int, start: int) -> None:
    assert second_memory.node_start(node, ZONES) == start


@pytest.mark.parametrize("zones", ["", ZONES.partition("Node 1,")[0]])
def test_a_node_without_memory_is_none(zones: str) -> None:
    with pytest.raises(DevmemError, match="no NUMA node 1 with memory"):
        second_memory.node_start(1, zones)


def test_a_node_that_is_not_there_is_refused() -> None:
    with pytest.raises(KernelError, match="set_mempolicy"), second_memory.bound_to(62):
        pass
    with pytest.raises(ValueError, match="a node is 0 to 62"), second_memory.bound_to(63):
        pass


def test_pages_that_nobody_touched_have_no_address() -> None:
    with (
        mmap.mmap(-1, 4 * second_memory.PAGE_BYTES) as mapping,
        pytest.raises(DevmemError, match="does not say where"),
    ):
        second_memory.physical_addresses(mapping)


@pytest.mark.parametrize(
    ("entries", "addresses"),
    [
        ([1 << 63 | 5, 1 << 63 | 1 << 55 | 0x40000, 1 << 63 | 3], [0x5000, 0x4000_0000, 0x3000]),
        ([1 << 63, 1 << 63, 1 << 63], None),  # hidden from who is not root
        ([1 << 63 | 5, 1 << 62 | 5, 1 << 63 | 3], None),  # swapped out
        ([1 << 63 | 5, 1 << 63 | 6], None),
    ],
)
def test_entries_of_the_pagemap_are_addresses(
    monkeypatch: pytest.MonkeyPatch, entries: list[int], addresses: list[int] | None
) -> None:
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: struct.pack(f"<{len(entries)}Q", *entries))
    with mmap.mmap(-1, 3 * second_memory.PAGE_BYTES) as mapping:
        if addresses is None:
            with pytest.raises(DevmemError, match="does not say where"):
                second_memory.physical_addresses(mapping)
        else:
            assert second_memory.physical_addresses(mapping).tolist() == addresses


# --- from outside ----------------------------------------------------------------------------------------------------

SIZE = 3 * second_memory.PAGE_BYTES
OFFSETS = (0x5000, 0x1000, 0x3100)  # of the pieces, in the file


def whereabouts() -> trial.Whereabouts:
    page = second_memory.PAGE_BYTES
    pieces = [(at * page, START + offset, page) for at, offset in enumerate(OFFSETS)]
    return trial.Whereabouts(node_start=START, pieces=pieces)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    memory = bytearray(0x8000)
    for (at, physical, length), offset in zip(whereabouts().pieces, OFFSETS, strict=True):
        assert physical - START == offset
        memory[offset : offset + length] = trial.content(SIZE)[at : at + length].tobytes()
    (tmp_path / "node1").write_bytes(memory)
    return tmp_path / "node1"


def test_a_stream_in_pieces_is_found_in_the_file(file: Path) -> None:
    assert outside.compare(file, whereabouts(), trial.content(SIZE)) == (0x5000, 0x3100)


@pytest.mark.parametrize("at", [0x5000, 0x1FFF, 0x40FF])
def test_one_wrong_byte_in_the_file_is_found(file: Path, at: int) -> None:
    memory = bytearray(file.read_bytes())
    memory[at] ^= 1
    file.write_bytes(memory)
    with pytest.raises(DevmemError, match="a wrong byte"):
        outside.compare(file, whereabouts(), trial.content(SIZE))


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([], "0 of 12288 bytes"),
        (whereabouts().pieces[:2], "8192 of 12288 bytes"),
        (whereabouts().pieces[1:], "is not where it can be"),
        ([(0, START - 4096, 4096)], "is not where it can be"),
        ([(0, START + 0x7001, 4096)], "is not where it can be"),
    ],
)
def test_pieces_that_are_missing_or_elsewhere_are_found(
    file: Path, pieces: list[tuple[int, int, int]], said: str
) -> None:
    with pytest.raises(DevmemError, match=said):
        outside.compare(file, trial.Whereabouts(node_start=START, pieces=pieces), trial.content(SIZE))


SHOW = """
import sys
import numpy as np
from devmem_tcp.lab import trial
print("set up")
trial.show({landed}, np.array({physical}, np.uint64), {start})
print("went on")
sys.exit({status})
"""


def showing(status: int = 0) -> list[str]:
    """Return a command that says where a stream is, as a trial does: three pieces, one of which crosses pages."""
    page = second_memory.PAGE_BYTES
    landed = [(0, page, page), (page, 2 * page + 0x100, page), (2 * page, 0, page)]
    physical = [START + 0x7000, START, START + 0x2000, START + 0x5000]
    return [
        sys.executable,
        "-c",
        SHOW.format(landed=landed, physical=physical, start=START, status=status),
    ]


def test_what_a_trial_says_is_compared_and_the_trial_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = second_memory.PAGE_BYTES
    content = trial.content(SIZE).tobytes()
    memory = bytearray(0x8000)
    memory[0:page] = content[:page]
    memory[0x2100:0x3000] = content[page : page + 0xF00]
    memory[0x5000:0x5100] = content[page + 0xF00 : 2 * page]
    memory[0x7000:0x8000] = content[2 * page :]
    file = tmp_path / "node1"
    file.write_bytes(memory)
    assert outside.watch(showing(), file, SIZE) == 1
    said = capsys.readouterr().out
    assert said.startswith(
        "set up\noutside  12,288 bytes in 4 pieces, read from the file of the guest's node at 0x0 … "
    )
    assert said.endswith("went on\n")
    with pytest.raises(DevmemError, match="exit status 3"):
        outside.watch(showing(status=3), file, SIZE)
    file.write_bytes(bytes(0x8000))
    with pytest.raises(DevmemError, match="a wrong byte"):
        outside.watch(showing(), file, SIZE)


def test_the_arguments_have_limits(capsys: pytest.CaptureFixture[str]) -> None:
    for main, arguments in (
        (outside.main, ["--bytes", str(trial.NODE_BYTES + 1)]),
        (trial.main, ["--outside"]),
        (trial.main, ["--outside", "--node", "1"]),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
    assert str(trial.NODE_BYTES) in capsys.readouterr().err
