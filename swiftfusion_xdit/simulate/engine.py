"""Event simulation of operations that wait for one another and share links and GPUs.

An operation starts when all that it follows is done. What it then costs is a fixed time, a share
of its GPU (attention calls, which go slower while transfers hold units, and of which a later one
takes what earlier ones leave) or a share of the links that it crosses (transfers). Shares of links
are max-min fair: links are filled evenly until one is full, those who cross it keep what they have,
and the others go on. Times are in microseconds, bytes are bytes, rates bytes a microsecond. Nothing
is random and ties go by creation order.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

Resource = Hashable
_SAME_TIME = 1e-9  # relative: what ends this close together ends together


@dataclass(eq=False)
class Op:
    """One operation. ``stream`` names the lane that it is drawn in.

    ``delay_us`` passes first; then ``attend_us`` of an attention call (of another kernel, if not
    ``attends``) that keeps a part ``width`` of its GPU busy, or ``num_bytes`` over ``links``. From
    its start on, ``holds`` more units of its GPU (fewer, if negative) are taken from attention.
    ``engine`` is a counted resource of which it occupies one. ``since`` is where what it ends
    began, for drawing.
    """

    rank: int
    stream: str
    name: str
    delay_us: float = 0.0
    attend_us: float = 0.0
    attends: bool = True
    width: float = 1.0
    num_bytes: float = 0.0
    links: tuple[Resource, ...] = ()
    ends: tuple[int, ...] = ()  # ranks at both ends of a transfer
    holds: int = 0
    under_compute: float = 1.0
    engine: Resource | None = None
    since: Op | None = None
    drawn: bool = True
    start_us: float = math.nan
    end_us: float = math.nan
    index: int = -1
    num_before: int = 0
    then: list[Op] = field(default_factory=list, repr=False)
    left: float = 0.0
    rate: float = 0.0
    moved: list[tuple[float, float, float]] = field(default_factory=list, repr=False)


class OpGraph:
    """Operations and their order."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def add(self, op: Op, after: list[Op] | tuple[Op, ...] = ()) -> Op:
        op.index = len(self.ops)
        self.ops.append(op)
        for earlier in after:
            self.order(earlier, op)
        return op

    def order(self, earlier: Op, later: Op) -> None:
        earlier.then.append(later)
        later.num_before += 1


class Engine:
    """Runs a graph once; afterwards every operation has its times.

    Args:
        capacity: bytes a microsecond of every link; a link that is missing is free.
        engines: how many of each counted resource there are.
        num_units: of a GPU, for what transfers hold.
    """

    def __init__(
        self,
        graph: OpGraph,
        *,
        capacity: Mapping[Resource, float],
        engines: Mapping[Resource, int],
        num_units: int,
    ) -> None:
        self.graph = graph
        self.capacity = capacity
        self.free_engines = dict(engines)
        self.num_units = num_units
        self.now = 0.0
        self._waiting_for = {op.index: op.num_before for op in graph.ops}
        self._ready = [op.index for op in graph.ops if not op.num_before]
        heapq.heapify(self._ready)
        self._delayed: list[tuple[float, int]] = []
        self._flows: dict[int, Op] = {}
        self._attending: dict[int, Op] = {}
        self._held: dict[int, int] = defaultdict(int)  # units, by rank
        self._busy: dict[int, int] = defaultdict(int)  # attention calls, by rank
        self._queues: dict[Resource, list[int]] = defaultdict(list)  # for engines
        self._dirty = False
        self._num_done = 0

    def run(self) -> float:
        """Run to the end and return when that is.

        Raises:
            ValueError: operations wait for one another in a circle.
        """
        while True:
            while self._ready:
                self._start(self.graph.ops[heapq.heappop(self._ready)])
            if not self._advance():
                break
        if self._num_done != len(self.graph.ops):
            stuck = next(op for op in self.graph.ops if math.isnan(op.end_us))
            raise ValueError(f"waits in a circle: rank {stuck.rank}, {stuck.name}")
        return self.now

    def _start(self, op: Op) -> None:
        if op.engine is not None:
            if not self.free_engines[op.engine]:
                heapq.heappush(self._queues[op.engine], op.index)
                return
            self.free_engines[op.engine] -= 1
        op.start_us = self.now
        if op.holds:
            self._held[op.rank] += op.holds
            self._dirty = True
        if op.delay_us > 0:
            heapq.heappush(self._delayed, (self.now + op.delay_us, op.index))
        else:
            self._begin_work(op)

    def _begin_work(self, op: Op) -> None:
        if op.attend_us > 0:
            op.left = op.attend_us
            self._attending[op.index] = op
            self._busy[op.rank] += op.attends
            self._dirty = True
        elif op.num_bytes > 0 and any(link in self.capacity for link in op.links):
            op.left = op.num_bytes
            self._flows[op.index] = op
            self._dirty = True
        else:
            self._finish(op)

    def _finish(self, op: Op) -> None:
        op.end_us = self.now
        self._num_done += 1
        if self._flows.pop(op.index, None) or self._attending.pop(op.index, None):
            self._dirty = True
        if op.attend_us > 0:
            self._busy[op.rank] -= op.attends
        if op.engine is not None:
            self.free_engines[op.engine] += 1
            if self._queues[op.engine]:
                heapq.heappush(self._ready, heapq.heappop(self._queues[op.engine]))
        for later in op.then:
            self._waiting_for[later.index] -= 1
            if not self._waiting_for[later.index]:
                heapq.heappush(self._ready, later.index)

    def _advance(self) -> bool:
        """Go to the next end; False if nothing is under way."""
        if self._dirty:
            self._set_rates()
        working = [*self._flows.values(), *self._attending.values()]
        if not working and not self._delayed:
            return False
        next_end = min((op.left / op.rate for op in working if op.rate), default=math.inf)
        if self._delayed:
            next_end = min(next_end, self._delayed[0][0] - self.now)
        assert math.isfinite(next_end), "work without a rate"
        before, self.now = self.now, self.now + next_end
        slack = _SAME_TIME * max(self.now, 1.0)
        while self._delayed and self._delayed[0][0] <= self.now + slack:
            self._begin_work(self.graph.ops[heapq.heappop(self._delayed)[1]])
        for op in working:
            op.left -= op.rate * next_end
            if op.num_bytes > 0 and next_end > 0:
                op.moved.append((before, self.now, op.rate))
            if op.left <= op.rate * slack:
                self._finish(op)
        return True

    def _set_rates(self) -> None:
        self._dirty = False
        left: dict[int, float] = {}
        for op in self._attending.values():  # in the order in which they began
            # Attention keeps at least one unit, or nothing would ever end.
            units = max(1, self.num_units - self._held[op.rank]) / self.num_units
            taken = min(op.width * units, left.setdefault(op.rank, units))
            left[op.rank] -= taken
            op.rate = taken / op.width
        fair = fair_rates({op.index: op.links for op in self._flows.values()}, self.capacity)
        for op in self._flows.values():
            slowed = op.under_compute < 1 and any(self._busy[rank] for rank in op.ends)
            op.rate = fair[op.index] * (op.under_compute if slowed else 1.0)


def fair_rates(
    flows: Mapping[int, tuple[Resource, ...]], capacity: Mapping[Resource, float]
) -> dict[int, float]:
    """Max-min fair rates of flows that cross links of these capacities."""
    on_link: dict[Resource, set[int]] = defaultdict(set)
    for flow, links in flows.items():
        for link in links:
            if link in capacity:
                on_link[link].add(flow)
    left = {link: capacity[link] for link in on_link}
    order = {link: number for number, link in enumerate(on_link)}
    rates: dict[int, float] = {}
    while on_link:
        tightest = min(on_link, key=lambda link: (left[link] / len(on_link[link]), order[link]))
        share = left[tightest] / len(on_link[tightest])
        for flow in sorted(on_link[tightest]):
            rates[flow] = share
            for link in flows[flow]:
                if link in on_link and flow in on_link[link]:
                    on_link[link].discard(flow)
                    left[link] = max(0.0, left[link] - share)
                    if not on_link[link]:
                        del on_link[link]
    return rates
