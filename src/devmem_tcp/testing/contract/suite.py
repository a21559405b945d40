"""The list of all contract tests, for a runner to instantiate."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Final

from devmem_tcp.testing.contract import (
    binding,
    closing,
    exhaustion,
    placement,
    receiving,
    sending,
    settings,
    tokens,
    waiting,
)
from devmem_tcp.testing.contract.expect import TestFunction, unmet_needs
from devmem_tcp.testing.contract.rig import Rig
from devmem_tcp.types import Capabilities

_MODULES: Final = (binding, settings, receiving, waiting, tokens, exhaustion, placement, sending, closing)
_PREFIX: Final = "test_"


@dataclass(frozen=True, slots=True)
class ContractTest:
    """One test of the contract; ``id`` is for people and runners, for instance ``tokens-start_at_one_and_count_up``."""

    id: str
    function: TestFunction

    def unmet_needs(self, capabilities: Capabilities) -> tuple[str, ...]:
        """Return what this test needs and a backend does not offer; empty if it can run."""
        return unmet_needs(self.function, capabilities)

    def run(self, rig: Rig) -> None:
        """Run on a fresh rig.

        Raises:
            AssertionError: the backend breaks the contract.
        """
        self.function(rig)


def contract_tests() -> list[ContractTest]:
    """Return every contract test, in the order in which failures are best looked at: the simplest first."""
    return [test for module in _MODULES for test in _tests_of(module)]


def _tests_of(module: ModuleType) -> list[ContractTest]:
    area = module.__name__.rpartition(".")[2]
    return [
        ContractTest(f"{area}-{name.removeprefix(_PREFIX)}", thing)
        for name, thing in vars(module).items()
        if name.startswith(_PREFIX)
    ]
