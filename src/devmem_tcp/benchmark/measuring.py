"""The end that measures: asks the listening end for each work, does its own side, and gathers what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

import msgspec

from devmem_tcp.benchmark import asynchronous, blocking
from devmem_tcp.benchmark.drill import MeasuringTurn
from devmem_tcp.benchmark.figures import EndFigures, Run, available_memory, boot_id, this_machine
from devmem_tcp.benchmark.plan import Driver, Kind, Plan, Pools, Work, size_name
from devmem_tcp.benchmark.results import FORMAT, End, LeftOut, Report, summarize
from devmem_tcp.benchmark.site import Site
from devmem_tcp.benchmark.talk import (
    TALK_BYTES,
    VERSION,
    Finish,
    Finished,
    Greet,
    Greeting,
    OtherEndFailed,
    Start,
    Started,
    ask,
    talking_nic,
)
from devmem_tcp.errors import DevmemError, RemoteProtocolError
from devmem_tcp.transport import Receiver, open_receiver
from devmem_tcp.types import Address

_MEMORY_SHARE: Final = 0.8  # of what is available; the rest is for everybody else


class Limits(msgspec.Struct, frozen=True):
    """What this end may use: the largest Buffer, and how many fds."""

    buffer_bytes: int
    fds: int


class Measuring:
    """A run of the benchmark, from the end that measures. Made by ``measuring``.

    Attributes:
        plan: what will be measured: of what was asked for, all that both ends have means for.
        left_out: the rest, and why.
        pools: the Buffers of both ends.
    """

    def __init__(self, site: Site, talk: Receiver, to: Address, plan: Plan, limits: Limits) -> None:
        self._site = site
        self._talk = talk
        self._host = to[0]
        self._other = ask(talk, Greet(), Greeting, site.timeout_s)
        if self._other.version != VERSION:
            raise RemoteProtocolError(f"the other end speaks version {self._other.version}, this one {VERSION}")
        works, self.left_out = _fitting(plan.works, limits, self._other)
        self.plan = msgspec.structs.replace(plan, works=works)
        self.pools = site.pools = Pools.of(works, min(limits.buffer_bytes, self._other.buffer_bytes))
        self._failed: dict[Work, str] = {}

    @property
    def same_machine(self) -> bool:
        """Whether both ends run on one machine."""
        return _same_machine(self._other)

    @property
    def turns(self) -> int:
        """How many works will be done, all rounds together."""
        return self.plan.rounds * len(self.plan.works)

    def run(self, before: Callable[[Work], None], command: str) -> Report:
        """Do all works.

        Args:
            before: called before each, for whoever waits.
            command: how to repeat it, for the report.

        Raises:
            DevmemError, ConnectionError: the other end went away.
        """
        began_at, began = datetime.now(UTC), time.perf_counter()
        runs: dict[Work, list[Run]] = {work: [] for work in self.plan.works}
        for number, works in enumerate(self.plan.schedule()):
            for work in works:
                before(work)
                if work not in self._failed:  # what failed once is not tried again
                    self._turn(work, number == 0, runs[work])
        return Report(
            format=FORMAT,
            began_at=began_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
            took_s=round(time.perf_counter() - began, 1),
            command=command,
            same_machine=self.same_machine,
            lanes=self._site.session.get("lanes", 1),
            plan=self.plan,
            sender=self._end(self._site.nic.name, self._site.backend, self.pools.tx_bytes),
            receiver=End(
                nic=self._other.nic,
                backend=self._other.backend,
                buffer_bytes=self.pools.rx_bytes,
                machine=self._other.machine,
            ),
            rows=[summarize(work, done) for work, done in runs.items() if done],
            left_out=self.left_out,
            failed=[LeftOut(work, words) for work, words in self._failed.items()],
        )

    def _end(self, nic: str, backend: str, buffer_bytes: int) -> End:
        return End(nic=nic, backend=backend, buffer_bytes=buffer_bytes, machine=this_machine())

    def _turn(self, work: Work, verify: bool, runs: list[Run]) -> None:
        """Do one work, and note its figures or why there are none."""
        try:
            runs.append(self._work(work, verify))
        except OtherEndFailed as error:
            self._failed[work] = f"the listening end: {error.message}"
        except (DevmemError, OSError) as error:
            if self._talk.closed or not self._talk.peers:
                raise
            self._failed[work] = self._why(error)

    def _work(self, work: Work, verify: bool) -> Run:
        started = ask(self._talk, Start(work, verify, self.pools), Started, self._site.timeout_s)
        to, back = (self._host, started.port), (self._host, started.port_back)
        module = blocking if work.driver is Driver.BLOCKING else asynchronous
        turn = MeasuringTurn(work, to, back, self.plan.seconds, self._finish)
        run: Run = (module.ask if work.kind is Kind.ROUND_TRIP else module.send)(self._site, turn)
        return run

    def _finish(self) -> EndFigures:
        """Fetch the other end's figures, or its reason."""
        return ask(self._talk, Finish(), Finished, self._site.timeout_s).figures

    def _why(self, error: Exception) -> str:
        """Say why a work failed: in the other end's words if it failed there as well, for that came first."""
        words = str(error) or type(error).__name__
        try:
            self._finish()
        except OtherEndFailed as there:
            return f"{words}; the listening end: {there.message}"
        return words


@contextmanager
def measuring(site: Site, to: Address, plan: Plan, limits: Limits) -> Iterator[Measuring]:
    """Go to the listening end, and yield what can be measured with it; says goodbye at the end of the block.

    Raises:
        DevmemError, OSError: nobody listens there, or nobody that this one may talk to.
    """
    with (
        talking_nic() as nic,
        open_receiver(nic, to=to, size=TALK_BYTES, timeout_s=site.timeout_s, **site.session) as talk,
    ):
        yield Measuring(site, talk, to, plan, limits)


def _same_machine(other: Greeting) -> bool:
    return bool(other.boot_id) and other.boot_id == boot_id()


def _fitting(works: list[Work], limits: Limits, other: Greeting) -> tuple[list[Work], list[LeftOut]]:
    """Return the works that both ends have means for, and the others, with what would be needed."""
    fitting: list[Work] = []
    left_out: list[LeftOut] = []
    largest = min(limits.buffer_bytes, other.buffer_bytes)
    fds = min(limits.fds, other.fds)
    for work in sorted(works, key=lambda work: work.landing_bytes):
        pools = Pools.of([*fitting, work], largest)
        if work.landing_bytes > largest:
            words = f"needs a Buffer of {size_name(work.landing_bytes)}; --buffer is {size_name(largest)}"
        elif work.fds > fds:
            words = f"needs {work.fds} open files, and the limit is {fds}: raise it with ulimit -Hn, as root"
        elif (short := _short_of_memory(pools, other)) is not None:
            words = short
        else:
            fitting.append(work)
            continue
        left_out.append(LeftOut(work, words))
    return [work for work in works if work in set(fitting)], left_out


def _short_of_memory(pools: Pools, other: Greeting) -> str | None:
    """Return what is missing to have such Buffers; None: nothing. What no system says is taken to be enough."""
    here, there = pools.tx_bytes, pools.rx_bytes + pools.tx_small
    wanted = (
        [(here + there, available_memory())]
        if _same_machine(other)
        else [
            (here, available_memory()),
            (there, other.memory_bytes),
        ]
    )
    for needed, available in wanted:
        if available and needed > available * _MEMORY_SHARE:
            return f"needs {needed >> 20:,} MiB of memory, with what else is measured; {available >> 20:,} MiB are free"
    return None
