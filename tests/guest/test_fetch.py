"""``devmem-tcp serve`` and ``fetch`` with the kernel backend at either end: every tensor, its path, and what is kept.

What a NIC has is looked at after each test (``conftest``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

import devmem_tcp as dmt
from devmem_tcp.kernel.journal import Journal
from devmem_tcp.kernel.state import restore
from devmem_tcp.safetensors.fetching import fetch_tensors
from devmem_tcp.safetensors.source_file import SourceFile
from far_end import NEAR, NETIF, FarEnd
from serving_pair import KEY, MIB, PATIENCE_S, Side, hashes, write_key, write_model

BLOCKS: Final = 24  # of 1 MiB each
SIZES: Final = {f"block.{number}": MIB for number in range(BLOCKS)} | {
    "whole": 6 * MIB,  # more than is left lying in the buffer: it is copied to the file as it comes
    "small": 2,
    "empty": 0,
}
TOTAL: Final = sum(SIZES.values())
KEPT_BYTES: Final = 8 * MIB

pytestmark = pytest.mark.timeout(3 * PATIENCE_S)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors", SIZES)


@pytest.fixture
def key(tmp_path: Path) -> tuple[str, str]:
    return write_key(tmp_path / "key")


@pytest.mark.parametrize(
    ("backends", "near", "version"),
    [
        (("software", "kernel"), "client", 6),
        (("kernel", "software"), "server", 4),
    ],
)
def test_a_file_comes_whole_by_the_path_that_is_told(
    far: FarEnd, key: tuple[str, str], model: Path, tmp_path: Path, backends: tuple[str, str], near: str, version: int
) -> None:
    out = tmp_path / "out.safetensors"
    here, there = (NEAR[version == 6], (far.ipv4, far.ipv6)[version == 6])
    server = Side(backends[0], far if near == "client" else None, key)
    client = Side(backends[1], far if near == "server" else None, key)
    with server.serving(there if near == "client" else here, model) as (serving, where):
        with client.fetching(where, "--strict", "--out", str(out)) as fetching:
            summary = fetching.report()["summary"]
        served = serving.event()["session"]
    assert hashes(out) == hashes(model)
    assert (summary["tensors"], summary["bytes"], summary["checksum"]) == (len(SIZES), TOTAL, "xxh3")
    assert (summary["peer_backend"], summary["backend"]) == backends
    assert summary["dmabuf_bytes"] + summary["linear_bytes"] == TOTAL
    assert summary["dmabuf_bytes"] >= 0.99 * TOTAL  # a header split leaves a little in front of a session's first bytes
    assert summary["host_bytes"] == 0
    assert (served["tensors"], served["bytes"], served["error"]) == (len(SIZES), TOTAL, "")
    assert (served["backend"], served["peer_backend"]) == backends
    assert (served["dmabuf_bytes"], served["host_bytes"]) == (TOTAL, 0)


def test_a_fetch_that_is_killed_goes_on(far: FarEnd, key: tuple[str, str], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    options = ("--only", "block.*", "--out", str(out), "--checkpoint", "1M", "--progress", "json")
    client = Side("kernel", None, key)
    with Side("kernel", far, key).serving(far.ipv4, model) as (serving, where):
        with client.fetching(where, *options) as fetching:
            while fetching.event()["bytes"] < KEPT_BYTES:
                pass
            fetching.process.kill()
            fetching.process.wait(PATIENCE_S)
        restore(Journal.default())  # as doctor --restore does: nothing else puts back what a kill leaves of settings
        assert serving.event()["session"]["error"]
        with client.fetching(where, *options) as fetching:
            summary = fetching.report()["summary"]
        served = serving.event()["session"]
    assert summary["resumed_tensors"] > 0
    assert summary["resumed_tensors"] + summary["tensors"] == BLOCKS
    assert (served["tensors"], served["bytes"], served["error"]) == (summary["tensors"], summary["bytes"], "")
    assert (summary["backend"], summary["peer_backend"]) == ("kernel", "kernel")
    assert summary["dmabuf_bytes"] + summary["linear_bytes"] == summary["bytes"]
    assert (summary["dmabuf_bytes"] > 0, summary["host_bytes"]) == (True, 0)
    assert (served["dmabuf_bytes"], served["host_bytes"]) == (served["bytes"], 0)
    assert hashes(out) == {name: told for name, told in hashes(model).items() if name.startswith("block.")}


def test_tensors_that_stay_in_device_memory(far: FarEnd, key: tuple[str, str], model: Path) -> None:
    with (
        Side("kernel", far, key).serving(far.ipv4, model) as (_, where),
        dmt.open_nic(NETIF, backend="kernel") as nic,
        SourceFile(model) as file,
    ):
        to = (far.ipv4, int(where.rpartition(":")[2]))
        with fetch_tensors(nic, to, only=["block.1?", "small"], key=KEY, lanes=2, strict=True) as weights:
            assert len(weights) == 11
            for name, message in weights.items():
                assert message.gather().tobytes() == bytes(file.data(name))
            summary = weights.summary
    assert (summary.backend, summary.peer_backend, summary.host_bytes) == ("kernel", "kernel", 0)
    assert summary.dmabuf_bytes + summary.linear_bytes == 10 * MIB + 2
    assert summary.dmabuf_bytes > 0
