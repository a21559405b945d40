"""The contract's tests are modules of the package: their asserts should say as much as those of test files."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("devmem_tcp.testing.contract")
