"""What a refusal means, found by whatever a user can paste: an error message, its words, an errno, a call. Pure."""

from __future__ import annotations

import re
from typing import Final

from devmem_tcp.errors import errno_name
from devmem_tcp.refusals import REFUSALS, VARIES, Refusal

_SAME: Final = {"ENOTSUP": "EOPNOTSUPP"}  # one number on Linux
_NAME: Final = re.compile(r"\bE[A-Z0-9]{2,}\b")
_MIN_WORDS: Final = 6  # characters of the kernel's words that tell one refusal from others


def explanations(text: str) -> tuple[Refusal, ...]:
    """Return the refusals that a text speaks of; the kernel's words decide, then errno and call."""
    names = {_SAME.get(name, name) for name in _NAME.findall(text)}
    called = {refusal.call for refusal in REFUSALS if re.search(rf"(?<![\w-]){re.escape(refusal.call)}(?![\w-])", text)}
    fitting = [
        refusal
        for refusal in REFUSALS
        if (not names or errno_name(refusal.errno) in names) and (not called or refusal.call in called)
    ]
    worded = tuple(refusal for refusal in fitting if _speaks(text, refusal))
    if worded:
        return worded
    if not names and not called:
        return ()
    bare = tuple(refusal for refusal in fitting if not refusal.extack)
    return bare or tuple(fitting)


def _speaks(text: str, refusal: Refusal) -> bool:
    """Whether a text has the kernel's words, or is a part of them."""
    if not refusal.extack:
        return False
    said, words = text.strip().casefold(), refusal.extack.casefold()
    if len(said) >= _MIN_WORDS and said in words:
        return True
    fixed = [piece.strip() for piece in words.split(VARIES) if piece.strip()]
    return all(piece in said for piece in fixed)


def table() -> list[str]:
    """Return the whole table of refusals in Markdown; those of the same words, cause and fix in one row."""
    rows: dict[tuple[str, str, str, str], list[Refusal]] = {}
    for refusal in REFUSALS:
        rows.setdefault((refusal.extack, refusal.attr, refusal.cause, refusal.fix), []).append(refusal)
    lines = ["| the kernel says | because | so |", "|---|---|---|"]
    for (extack, attribute, cause, fix), alike in rows.items():
        asked = ", ".join(dict.fromkeys(f"`{refusal.call}`" for refusal in alike))
        numbers = ", ".join(dict.fromkeys(errno_name(refusal.errno) for refusal in alike))
        words = [f"{asked}: {numbers}", extack and f"`{extack}`", attribute and f"attribute `{attribute}`"]
        cells = (", ".join(filter(None, words)), cause, fix)
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return lines
