"""The contract's tests on the kernel backend: the very ones that the software backend passes."""

from __future__ import annotations

from functools import partial

import pytest

import devmem_tcp as dmt
from devmem_tcp.testing.contract import ContractTest, Rig, contract_tests
from devmem_tcp.types import Capabilities
from far_end import NEAR, NETIF, FarEnd

RING_PAGES = 2048  # gve fills a ring of 1024 descriptors, and its page pool keeps some more


def kernel_capabilities() -> Capabilities:
    with dmt.open_nic(NETIF, backend="kernel") as nic:
        return nic.capabilities


def runnable() -> list[object]:
    capabilities = kernel_capabilities()
    return [pytest.param(test, id=test.id) for test in contract_tests() if not test.unmet_needs(capabilities)]


@pytest.mark.parametrize("test", runnable())
def test_contract(test: ContractTest, far: FarEnd) -> None:
    rig = Rig(
        partial(dmt.open_nic, NETIF, backend="kernel"),
        dmt.memory.Udmabuf(),
        hosts=NEAR,
        connect_peer=far.connect,
        listen_peer=far.listen,
        patience_s=30.0,
        ring_pages=RING_PAGES,
    )
    with rig:
        test.run(rig)
