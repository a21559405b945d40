"""The contract's tests, instantiated for each way in which this machine can keep the contract."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest

import devmem_tcp as dmt
from devmem_tcp.testing.contract import ContractTest, Rig, contract_tests
from devmem_tcp.types import PAGE_SIZE, Capabilities


@dataclass(frozen=True)
class Instance:
    """One way to keep the contract."""

    id: str
    options: dmt.SoftwareOptions
    hosts: tuple[str, ...] = ("127.0.0.1", "::1")

    def rig(self) -> Rig:
        return Rig(
            partial(dmt.open_nic, "soft0", backend="software", software=self.options),
            dmt.memory.Host(),
            hosts=self.hosts,
        )

    def capabilities(self) -> Capabilities:
        with dmt.open_nic("soft0", backend="software", software=self.options) as nic:
            return nic.capabilities


INSTANCES = [
    Instance("software", dmt.SoftwareOptions()),
    Instance("software_pages", dmt.SoftwareOptions(frag_size=PAGE_SIZE), hosts=("::1", "127.0.0.1")),
    *(Instance(f"hostile{seed}", dmt.SoftwareOptions(hostile_seed=seed)) for seed in (1, 2, 3)),
]


def instantiated() -> list[object]:
    """Return every test for every instance that offers what it needs; nothing is skipped."""
    return [
        pytest.param(instance, test, id=f"{instance.id}-{test.id}")
        for instance in INSTANCES
        for capabilities in [instance.capabilities()]
        for test in contract_tests()
        if not test.unmet_needs(capabilities)
    ]


@pytest.mark.parametrize(("instance", "test"), instantiated())
def test_contract(instance: Instance, test: ContractTest) -> None:
    with instance.rig() as rig:
        test.run(rig)


def test_every_test_runs_somewhere() -> None:
    """A test whose needs nobody meets would never run, and nobody would know."""
    offered = [instance.capabilities() for instance in INSTANCES]
    lonely = {test.id for test in contract_tests() if all(test.unmet_needs(capabilities) for capabilities in offered)}
    assert lonely == {  # the software backend can do all that a NIC can; the others are for tests/guest
        "binding-large_rx_page_size_is_refused",
        "settings-hds_thresh_is_refused_where_there_is_none",
    }
