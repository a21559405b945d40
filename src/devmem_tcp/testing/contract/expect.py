"""The words the contract tests are written in: which error is expected, and which capabilities a test needs."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, Self, TypeAlias, TypeVar

from devmem_tcp.errors import errno_name
from devmem_tcp.types import Capabilities

if TYPE_CHECKING:
    from devmem_tcp.testing.contract.rig import Rig

ErrorT = TypeVar("ErrorT", bound=BaseException)
TestFunction: TypeAlias = "Callable[[Rig], None]"

_NEEDS: Final = "__contract_needs__"
_LACKS: Final = "__contract_lacks__"


class raises(Generic[ErrorT]):  # noqa: N801 - reads as a word of the test, like pytest's
    """Expect the block to raise ``kind``, with this ``errno`` if given; afterwards the error is ``error``.

    Raises:
        AssertionError: nothing was raised, or another errno.
    """

    def __init__(self, kind: type[ErrorT], errno: int | None = None) -> None:
        self._kind = kind
        self._errno = errno
        self._error: ErrorT | None = None

    @property
    def error(self) -> ErrorT:
        assert self._error is not None, "the block has not ended yet"
        return self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> bool:
        wanted = self._kind.__name__ + (f" with {errno_name(self._errno)}" if self._errno else "")
        assert value is not None, f"expected {wanted}, nothing was raised"
        if not isinstance(value, self._kind):
            return False
        found = getattr(value, "errno", None)
        assert self._errno is None or found == self._errno, f"expected {wanted}, got: {value}"
        self._error = value.with_traceback(None)  # its frames would keep the test's sockets alive
        return True


def needs(*fields: str, lacking: tuple[str, ...] = ()) -> Callable[[TestFunction], TestFunction]:
    """Declare which Capabilities a test needs to be true, and which it needs to be false (``lacking``)."""

    def mark(function: TestFunction) -> TestFunction:
        setattr(function, _NEEDS, fields)
        setattr(function, _LACKS, lacking)
        return function

    return mark


def unmet_needs(function: TestFunction, capabilities: Capabilities) -> tuple[str, ...]:
    """Return what ``function`` needs and ``capabilities`` do not offer, for people; empty if it can run."""
    missing = [name for name in getattr(function, _NEEDS, ()) if not getattr(capabilities, name)]
    present = [f"no {name}" for name in getattr(function, _LACKS, ()) if getattr(capabilities, name)]
    return (*missing, *present)
