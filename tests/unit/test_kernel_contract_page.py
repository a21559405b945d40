"""docs/kernel-contract.md names tests as proofs: each of them exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from devmem_tcp.testing.contract import contract_tests

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs/kernel-contract.md").read_text(encoding="utf-8")
AREAS: Final = {test.id.partition("-")[0] for test in contract_tests()}
MODULES: Final = {
    "fresh": "test_a_fresh_nic",
    "netdev": "test_netdev",
    "ethtool": "test_ethtool",
    "socket": "test_kernel_socket",
    "facts": "test_contract_facts",
    "leasing": "test_leasing",
}
NAME: Final = re.compile(rf"`((?:{'|'.join(AREAS)})-|(?:{'|'.join(MODULES)})::)([a-z0-9_]+)(…?)`")


def known(prefix: str) -> list[str]:
    """Return the names of the tests that a proof's prefix is of."""
    if prefix.endswith("-"):
        return [test.id.removeprefix(prefix) for test in contract_tests() if test.id.startswith(prefix)]
    source = (ROOT / "tests/guest" / f"{MODULES[prefix[:-2]]}.py").read_text(encoding="utf-8")
    return re.findall(r"^def test_(\w+)", source, re.MULTILINE)


@pytest.mark.parametrize(("prefix", "name", "more"), sorted(set(NAME.findall(PAGE))))
def test_proof_exists(prefix: str, name: str, more: str) -> None:
    tests = known(prefix)
    assert any(test.startswith(name) for test in tests) if more else name in tests


def test_every_row_from_the_lab_has_a_proof() -> None:
    rows = [line for line in PAGE.splitlines() if re.search(r"\| L[,;: |(]", line) and not line.startswith("| L |")]
    assert len(rows) > 80
    assert [row for row in rows if not re.search(r"::|the same|`lab.trial`", row) and not NAME.search(row)] == []
