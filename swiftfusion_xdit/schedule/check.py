"""Proves a schedule for every rank at once.

What is proved, for every mesh and any sizes (a schedule names no sizes):

- *work*: each (query chunk, key chunk, head group) is attended exactly once, every partial is
  merged, every output block reaches the rank that owns its rows, exactly once;
- *data*: every read of a slot comes after the Wait for the put it needs and before the Release;
  every slot has one writer; nothing is put before it exists;
- *layout*: every operand of an Attend is contiguous in the rank's memory orders;
- *fused calls*: one takes its own chunk's keys from the input, and nothing else reads what it waits
  for inside its kernel;
- *progress*: no cyclic wait, over consecutive layers.

Each flag has one setter and one waiter, and waiting is all that a rank can do about it. Such a
network is determinate (Kahn 1974): if one interleaving of the ranks runs to the end, all do, and
they move the same data. So one simulated run decides progress, and the order inside each program
decides data. The run must leave every flag as it found it; then any number of layers may follow.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from swiftfusion_xdit.schedule.steps import (
    Attend,
    Block,
    Collect,
    Copy,
    Merge,
    Program,
    Put,
    Release,
    Schedule,
    Step,
    Wait,
)

Slot = tuple[int, Block]  # (rank whose memory it is, block)


class ScheduleError(Exception):
    """A schedule that is not correct; the message names the rank, the step and the rule."""


def check(schedule: Schedule) -> None:
    """Prove ``schedule`` or name what is wrong with it.

    Raises:
        ScheduleError: naming rank, step and broken rule.
    """
    writers = _writers(schedule)
    attended: dict[tuple[int, int], int] = defaultdict(int)
    for program in schedule.programs:
        _ProgramCheck(schedule, program, writers[program.rank]).run(attended)
    _check_pairs(schedule, attended)
    _check_progress(schedule, num_layers=2)


def _fail(program: Program, index: int, rule: str) -> ScheduleError:
    return ScheduleError(f"rank {program.rank}, step {index} ({program.steps[index]}): {rule}")


def _writers(schedule: Schedule) -> list[dict[Block, int]]:
    """Per rank: who writes each of its slots.

    Raises:
        ScheduleError: a slot is put twice, or by a rank to itself.
    """
    writers: list[dict[Block, int]] = [{} for _ in schedule.programs]
    for program in schedule.programs:
        for index, step in enumerate(program.steps):
            if not isinstance(step, Put):
                continue
            slots = writers[step.peer]
            if step.block in slots:
                raise _fail(program, index, f"slot already put by rank {slots[step.block]}")
            if step.peer == program.rank:
                raise _fail(program, index, "puts to itself")
            slots[step.block] = program.rank
    return writers


class _ProgramCheck:
    """Walks one program in order, keeping what exists in this rank's memory."""

    def __init__(self, schedule: Schedule, program: Program, writers: dict[Block, int]) -> None:
        self.schedule = schedule
        self.program = program
        self.writers = writers
        groups = schedule.groups_per_rank
        first = schedule.mesh.head_group(program.rank) * groups
        self.own_heads = range(first, first + groups)
        self.readable: set[Block] = set()  # waited for or copied, and not released
        self.released: set[Block] = set()
        self.waited: set[Block] = set()
        self.unmerged: Counter[tuple[int, int]] = Counter()  # partials by (chunk, heads)
        self.merged: set[tuple[int, int]] = set()
        self.sent_home: set[tuple[int, int]] = set()
        self.collected: set[int] = set()  # head groups of this rank's finished output
        self.query_at = {chunk: i for i, chunk in enumerate(program.query_order)}
        self.key_at = {chunk: i for i, chunk in enumerate(program.key_order)}

    def run(self, attended: dict[tuple[int, int], int]) -> None:
        visit = {
            Copy: self._copy,
            Put: self._put,
            Wait: self._wait,
            Release: self._release,
            Merge: self._merge,
            Collect: self._collect,
        }
        fused_calls = self.program.fused_calls
        for index, step in enumerate(self.program.steps):
            for block in self.program.reads(step):
                if block not in self.readable:
                    why = "after its release" if block in self.released else "without a wait"
                    raise self._fail(index, f"reads {block} {why}")
                if block in self.program.awaited_in_kernels and step not in fused_calls:
                    raise self._fail(index, f"reads {block}, which only a fused call waits for")
            if isinstance(step, Attend):
                self._attend(index, step, attended)
            else:
                visit[type(step)](index, step)
        self._end()

    def _fail(self, index: int, rule: str) -> ScheduleError:
        return _fail(self.program, index, rule)

    def _copy(self, index: int, step: Step) -> None:
        assert isinstance(step, Copy)
        if step.block.chunk != self.program.rank or step.block.tensor == "o":
            raise self._fail(index, "copies what is not this rank's input")
        self.readable.add(step.block)

    def _put(self, index: int, step: Step) -> None:
        assert isinstance(step, Put)
        block = step.block
        if block.tensor == "o":
            if (block.chunk, block.heads) not in self.merged:
                raise self._fail(index, "sends output that is not merged")
            if step.peer != block.chunk:
                raise self._fail(index, f"sends output of rank {block.chunk} to rank {step.peer}")
            self.sent_home.add((block.chunk, block.heads))

    def _wait(self, index: int, step: Step) -> None:
        assert isinstance(step, Wait)
        writer = self.writers.get(step.block)
        if writer != step.peer:
            who = "nobody" if writer is None else f"rank {writer}"
            raise self._fail(index, f"waits for rank {step.peer}, but {who} puts this slot")
        if step.block in self.waited:
            raise self._fail(index, "waits twice for one put")
        self.waited.add(step.block)
        self.readable.add(step.block)

    def _release(self, index: int, step: Step) -> None:
        assert isinstance(step, Release)
        if step.block not in self.waited or step.block in self.released:
            raise self._fail(index, "releases a slot that it does not hold")
        if self.writers[step.block] != step.peer:
            raise self._fail(index, "releases the slot to a rank that does not write it")
        self.readable.discard(step.block)
        self.released.add(step.block)

    def _attend(self, index: int, step: Attend, attended: dict[tuple[int, int], int]) -> None:
        if step.heads not in self.own_heads:
            raise self._fail(index, f"attends heads of another rank, own are {self.own_heads}")
        if step.fused and (step.keys[-1:], step.queries) != ((self.program.rank,),) * 2:
            raise self._fail(index, "a fused call must end with its own keys, for its own queries")
        self._check_contiguous(index, step.queries, self.query_at)
        keys = self._check_contiguous(index, step.keys, self.key_at)
        mask = sum(1 << chunk for chunk in keys)
        for chunk in step.queries:
            if (chunk, step.heads) in self.merged:
                raise self._fail(index, f"attends chunk {chunk} after its merge")
            if attended[chunk, step.heads] & mask:
                raise self._fail(index, f"pair attended twice for query chunk {chunk}")
            attended[chunk, step.heads] |= mask
            self.unmerged[chunk, step.heads] += 1

    def _check_contiguous(
        self, index: int, chunks: Sequence[int], at: dict[int, int]
    ) -> Sequence[int]:
        positions = [at.get(chunk, -1) for chunk in chunks]
        first = positions[0] if positions else -1
        if first < 0 or positions != list(range(first, first + len(positions))):
            raise self._fail(index, f"operand {chunks} is not contiguous in memory order")
        return chunks

    def _merge(self, index: int, step: Step) -> None:
        assert isinstance(step, Merge)
        for chunk in step.queries:
            if not self.unmerged.pop((chunk, step.heads), 0):
                raise self._fail(index, f"merges chunk {chunk}, which has no partial")
            self.merged.add((chunk, step.heads))
            if chunk == self.program.rank:
                self.collected.add(step.heads)

    def _collect(self, index: int, step: Step) -> None:
        assert isinstance(step, Collect)
        if step.block.tensor != "o" or step.block.chunk != self.program.rank:
            raise self._fail(index, "collects what is not this rank's output")
        if step.block.heads in self.collected:
            raise self._fail(index, "collects the same heads twice")
        self.collected.add(step.block.heads)

    def _end(self) -> None:
        rank = self.program.rank
        for (chunk, heads), _ in self.unmerged.items():
            raise ScheduleError(f"rank {rank}: output of chunk {chunk}, heads {heads} not merged")
        for chunk, heads in self.merged - self.sent_home:
            if chunk != rank:
                raise ScheduleError(
                    f"rank {rank}: output of chunk {chunk}, heads {heads} never sent home"
                )
        for block in self.waited - self.released:
            raise ScheduleError(f"rank {rank}: slot of {block} never released")
        for block, writer in self.writers.items():
            if block not in self.waited:
                raise ScheduleError(f"rank {rank}: never waits for {block} from rank {writer}")
        if missing := set(range(self.schedule.num_head_groups)) - self.collected:
            raise ScheduleError(f"rank {rank}: output heads {sorted(missing)} missing")


def _check_pairs(schedule: Schedule, attended: dict[tuple[int, int], int]) -> None:
    """Every query chunk meets every key chunk in every head group."""
    everything = (1 << schedule.mesh.size) - 1
    for chunk in range(schedule.mesh.size):
        for heads in range(schedule.num_head_groups):
            missing = everything & ~attended[chunk, heads]
            if missing:
                keys = [key for key in range(schedule.mesh.size) if missing >> key & 1]
                raise ScheduleError(
                    f"query chunk {chunk}, heads {heads}: key chunks {keys} never attended"
                )


def _check_progress(schedule: Schedule, *, num_layers: int) -> None:
    """Run all ranks through consecutive layers that use the same slots.

    Layers that alternate between two sets of slots, or that belong to different schedules, find
    their slots free no later, and flags that are set earlier block nobody: what runs here, runs
    there.

    Raises:
        ScheduleError: the ranks wait for each other, or a flag is left as it was not found.
    """
    flags = _Flags()
    programs = [flags.compile(program) for program in schedule.programs]
    is_set = [kind == "FREE" for kind, _ in flags.names]
    sleeper: list[int | None] = [None] * len(is_set)
    positions = [(0, 0)] * len(programs)  # (layer, action) of each rank
    ready = deque(range(len(programs)))
    while ready:
        rank = ready.popleft()
        layer, start = positions[rank]
        actions = programs[rank]
        blocked = False
        while layer < num_layers and not blocked:
            for index in range(start, len(actions)):
                _, taken, given = actions[index]
                if taken is not None:
                    if not is_set[taken]:
                        sleeper[taken] = rank
                        positions[rank] = (layer, index)
                        blocked = True
                        break
                    is_set[taken] = False
                if given is not None:
                    is_set[given] = True
                    woken, sleeper[given] = sleeper[given], None
                    if woken is not None:
                        ready.append(woken)
            else:
                layer, start = layer + 1, 0
        if not blocked:
            positions[rank] = (layer, 0)
    stuck = {
        rank: (layer, programs[rank][index][0])
        for rank, (layer, index) in enumerate(positions)
        if layer < num_layers
    }
    _report_stuck(schedule, stuck)
    for (kind, (owner, block)), value in zip(flags.names, is_set, strict=True):
        if value != (kind == "FREE"):
            raise ScheduleError(f"{kind} of {block} at rank {owner} is left {int(value)}")


class _Flags:
    """Numbers the flags of a schedule, so that a run handles integers."""

    def __init__(self) -> None:
        self.names: list[tuple[str, Slot]] = []
        self._numbers: dict[tuple[str, Slot], int] = {}

    def number(self, kind: str, slot: Slot) -> int:
        number = self._numbers.setdefault((kind, slot), len(self.names))
        if number == len(self.names):
            self.names.append((kind, slot))
        return number

    def compile(self, program: Program) -> list[tuple[int, int | None, int | None]]:
        """(step index, flag to wait for and clear, flag to set) of the steps that use flags."""
        actions: list[tuple[int, int | None, int | None]] = []
        for index, step in enumerate(program.steps):
            if isinstance(step, Put):
                slot = (step.peer, step.block)
                actions.append((index, self.number("FREE", slot), self.number("FULL", slot)))
            elif isinstance(step, Wait):
                actions.append((index, self.number("FULL", (program.rank, step.block)), None))
            elif isinstance(step, Release):
                actions.append((index, None, self.number("FREE", (program.rank, step.block))))
        return actions


def _report_stuck(schedule: Schedule, stuck: dict[int, tuple[int, int]]) -> None:
    if stuck:
        where = (
            f"rank {rank}, layer {layer}, step {index} ({schedule.programs[rank].steps[index]})"
            for rank, (layer, index) in stuck.items()
        )
        raise ScheduleError("cyclic wait: " + "; ".join(where))
