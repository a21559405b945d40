"""How names that anybody may have made are shown to people."""

from __future__ import annotations

from typing import Final

_SHOWN: Final = 80  # characters


def shown(name: str) -> str:
    """Return a name, quoted, fit for a terminal in its length and characters."""
    return repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "…")
