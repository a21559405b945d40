"""The contract's tests are modules of the package: their asserts should say as much as those of test files."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("devmem_tcp.testing.contract")


@pytest.fixture(scope="session", autouse=True)
def _old_objects_are_not_collected_again() -> Iterator[None]:
    """Every test collects garbage twice for its leak check; what was there before the first need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()
