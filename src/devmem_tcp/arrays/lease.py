"""Who may still look at received bytes, so that they go back exactly once, after the last reader."""

from __future__ import annotations

from collections.abc import Callable

from devmem_tcp.errors import StaleFragError


class Lease:
    """The right to look at some bytes, until ``release()``; and afterwards for those who took a hold before.

    ``on_free`` runs exactly once, when the lease is released and no hold is left: in ``release()``, or where the last
    hold is collected. An exception of it is raised by ``release()`` in the first case; in the second there is nobody to
    catch it, and it goes to ``sys.unraisablehook``. The last hold may go in any thread, and in the middle of anything,
    by the garbage collector: ``on_free`` must wait for no lock that the thread it runs in could have taken.

    Threads: any thread may do anything at any time. There is no lock, which a collection in the middle of a locked
    section could wait for without end. Each side first writes its own part (``hold``: the set, ``release``: the flag)
    and then reads the other's, so that at least one of two sees both; and of those who do, one gets the callback.

    Lifetime: a hold keeps its lease. A lease that is dropped without ``release()`` frees nothing.
    """

    __slots__ = ("_holds", "_on_free", "_released")

    def __init__(self, on_free: Callable[[], None]) -> None:
        self._holds: set[int] = set()  # ids: a hold is in here only while it lives
        self._on_free = [on_free]  # popped by who calls it
        self._released = False

    @property
    def released(self) -> bool:
        return self._released

    @property
    def held(self) -> int:
        """How many holds there are, from before ``release()`` as well."""
        return len(self._holds)

    def check(self) -> None:
        """Raise StaleFragError if the lease is released."""
        if self._released:
            raise StaleFragError(
                "this message was released: its memory went back, and may hold another's bytes by now",
                hint="take .numpy(), torch.from_dlpack() or a copy before release(); an array taken before stays valid",
            )

    def hold(self) -> object:
        """Return an object whose collection lets go of the bytes.

        Raises:
            StaleFragError: the lease is released.
        """
        hold = _Hold(self)
        if self._released:  # asked when the hold is in the set already: a release() from now on sees it
            del hold  # now, not when somebody drops the traceback
            self.check()
        return hold

    def release(self) -> None:
        """Give no new holds, and free now or with the last hold. Idempotent."""
        self._released = True
        if not self._holds:
            self._free()

    def _let_go(self, hold: _Hold) -> None:
        self._holds.discard(id(hold))
        if self._released and not self._holds:
            self._free()

    def _free(self) -> None:
        try:
            on_free = self._on_free.pop()
        except IndexError:  # somebody else was first
            return
        on_free()


class _Hold:
    """One reader of a lease's bytes, from its making to its collection."""

    __slots__ = ("_lease",)

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        lease._holds.add(id(self))

    def __del__(self) -> None:
        self._lease._let_go(self)
