"""Where the next payload of a socket will land: pieces of pages, chosen before it is read.

A *plan* is a list of pieces in TCP order. Each DMABUF piece is one holder of its pages until it becomes a frag or is
given back. ``Contiguous`` plans long runs; ``Hostile`` makes every choice that is legal and nasty.
"""

from __future__ import annotations

import random
from typing import Final, NamedTuple, Protocol

from devmem_tcp.software.binding import SoftwareRxBinding
from devmem_tcp.types import FragKind

_MAX_RUNS: Final = 16


class Piece(NamedTuple):
    """``size`` bytes at ``offset`` of the Buffer, in ``page_count`` pages from ``first_page``; none if not DMABUF."""

    kind: FragKind
    offset: int
    size: int
    first_page: int
    page_count: int


class Planner(Protocol):
    """Chooses where payload lands."""

    def plan(self, binding: SoftwareRxBinding, queue: int, max_bytes: int, max_frags: int) -> list[Piece]:
        """Return pieces for up to about ``max_bytes`` and at most ``max_frags`` frags; empty: no free page."""

    @property
    def places(self) -> bool:
        """Whether payload can be landed where the program wants it."""

    def completions_late(self) -> bool:
        """Whether a completion that could be reported now is kept for later."""


class Contiguous:
    """The friendly planner: adjacent pages, lowest first, whole pages up to the one that ``max_bytes`` ends in."""

    places: Final = True

    def plan(self, binding: SoftwareRxBinding, queue: int, max_bytes: int, max_frags: int) -> list[Piece]:
        page_size = binding.page_size
        pages = min(-(-max_bytes // page_size), max_frags * (binding.frag_size // page_size))
        runs = binding.take(queue, pages, min(_MAX_RUNS, max_frags))
        return [Piece(FragKind.DMABUF, first * page_size, count * page_size, first, count) for first, count in runs]

    def completions_late(self) -> bool:
        return False


class Hostile:
    """The nasty planner. Seeded: the same calls give the same choices."""

    places: Final = False

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def plan(self, binding: SoftwareRxBinding, queue: int, max_bytes: int, max_frags: int) -> list[Piece]:
        chance = self._random.random()
        if chance < 0.1:
            return [Piece(FragKind.HOST, 0, min(max_bytes, self._random.randint(1, 3000)), 0, 0)]
        pieces: list[Piece] = []
        left = max_bytes
        for first, count in binding.take(queue, self._random.randint(1, 8), max_frags):
            for page in range(first, first + count):
                pieces += self._pieces_of_page(binding, page)
        self._random.shuffle(pieces)
        if pieces and chance < 0.3:
            pieces.insert(0, Piece(FragKind.LINEAR, 0, self._random.randint(1, 200), 0, 0))
        plan: list[Piece] = []
        for piece in pieces:
            if left and len(plan) < max_frags:
                plan.append(piece._replace(size=min(piece.size, left)))
                left -= plan[-1].size
            else:
                give_back(binding, piece)
        return plan

    def _pieces_of_page(self, binding: SoftwareRxBinding, page: int) -> list[Piece]:
        """Cut one page into up to three frags that do not touch, of any size from one byte on."""
        cuts = sorted(self._random.sample(range(binding.page_size + 1), 2 * self._random.randint(1, 3)))
        pieces: list[Piece] = []
        for start, end in zip(cuts[::2], cuts[1::2], strict=True):
            if pieces:
                binding.share(page)
            size = 1 if self._random.random() < 0.2 else end - start
            pieces.append(Piece(FragKind.DMABUF, page * binding.page_size + start, size, page, 1))
        return pieces

    def completions_late(self) -> bool:
        return self._random.random() < 0.7


def give_back(binding: SoftwareRxBinding, piece: Piece) -> None:
    """Give back a piece that nothing landed in."""
    if piece.kind is FragKind.DMABUF:
        binding.give_back(piece.first_page, piece.page_count)


def planner(hostile_seed: int | None) -> Planner:
    """Return the planner that the options ask for."""
    return Contiguous() if hostile_seed is None else Hostile(hostile_seed)
