"""What everything that is acquired has in common: ``with`` gives it back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closing(ABC):
    """``with`` releases; ``close()`` may be called any number of times."""

    @abstractmethod
    def close(self) -> None:
        """Release everything held. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
