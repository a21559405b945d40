"""The contract's own tests: plain functions with plain asserts, for any backend to be held against.

A runner opens a ``Rig`` over its NIC for every ``ContractTest`` and calls ``test.run(rig)``. No test names a backend;
what it needs is said in Capabilities. The tests assume nothing that a legal NIC may do otherwise: frags of any size and
alignment, packets that land in host memory, a pool of a few pages, completions that come late.
"""

from devmem_tcp.testing.contract.collector import Collector
from devmem_tcp.testing.contract.expect import needs, raises
from devmem_tcp.testing.contract.rig import BoundPair, Pair, Rig
from devmem_tcp.testing.contract.suite import ContractTest, contract_tests

__all__ = ["BoundPair", "Collector", "ContractTest", "Pair", "Rig", "contract_tests", "needs", "raises"]
