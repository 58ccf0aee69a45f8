"""The words of a schedule: blocks, steps, and one rank's program.

A schedule is a value. It names chunks of the sequence and groups of heads, never bytes, tensors
or transports, so the same value is executed, proved, simulated and drawn.

A *block* is the rows of one chunk and the heads of one group of one tensor. A block that a peer
writes lands in a *slot* of the reader's memory. Each slot has one writer and two binary flags:

    Put      writer: wait FREE and clear it, copy the block, set FULL
    Wait     reader: wait FULL and clear it
    Release  reader: set FREE, after the slot's last reader

so a program may run any number of times, after and before any other, without a barrier.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

from swiftfusion_xdit.mesh import Mesh

TensorName = Literal["q", "k", "v", "o"]
# Attention calls that may overlap take turns on the two compute streams; what stays in the machine
# moves on `ring`, what crosses on `torus`.
Stream = Literal["compute", "compute2", "ring", "torus"]


class Block(NamedTuple):
    """Rows of one chunk, heads of one group: the unit of what moves.

    ``chunk`` is the rank whose rows these are, before and after the layer. ``heads`` is a head
    group; a schedule with G groups a rank numbers them ``mesh.head_group(rank) * G + i``.
    """

    tensor: TensorName
    chunk: int
    heads: int

    def __str__(self) -> str:
        return f"{self.tensor}[chunk {self.chunk}, heads {self.heads}]"


@dataclass(frozen=True)
class Step:
    """One entry of a program; ``stage`` is the phase of the algorithm that it serves."""

    stage: str
    stream: Stream
    verb: ClassVar[str] = "step"

    def __str__(self) -> str:
        return f"{self.stage}: {self.verb} {self.operands()}"

    def operands(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Copy(Step):
    """Copy this rank's own block into its place among the received ones."""

    block: Block
    verb: ClassVar[str] = "copy"

    def operands(self) -> str:
        return str(self.block)


@dataclass(frozen=True)
class Put(Step):
    """Write ``block`` into its slot at ``peer``: an input, a received block, or a merged output."""

    block: Block
    peer: int
    verb: ClassVar[str] = "put"

    def operands(self) -> str:
        return f"{self.block} to rank {self.peer}"


@dataclass(frozen=True)
class Wait(Step):
    """Wait until ``peer`` has put ``block`` into this rank's slot."""

    block: Block
    peer: int
    verb: ClassVar[str] = "wait"

    def operands(self) -> str:
        return f"{self.block} from rank {self.peer}"


@dataclass(frozen=True)
class Release(Step):
    """Give the slot of ``block`` back to ``peer``, its writer."""

    block: Block
    peer: int
    verb: ClassVar[str] = "release"

    def operands(self) -> str:
        return f"{self.block} to rank {self.peer}"


@dataclass(frozen=True)
class Attend(Step):
    """Attend query rows of some chunks with key rows of some chunks: one partial (out, lse).

    An operand that is this rank's own chunk alone is read from the layer's input; any other is
    read from the slots, where the program's orders make it contiguous.

    A ``fused`` one takes its keys from the last to the first. The last are the rank's own, which it
    reads from the input; before those of each other chunk its kernel waits itself: the Waits in
    front of it say for what. Of one program the fused calls may be one launch.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int
    fused: bool = False
    verb: ClassVar[str] = "attend"

    def operands(self) -> str:
        queries, keys = (",".join(map(str, chunks)) for chunks in (self.queries, self.keys))
        return f"q[{queries}] with kv[{keys}], heads {self.heads}"


@dataclass(frozen=True)
class Merge(Step):
    """Merge every partial of these query chunks, in program order, into finished output."""

    queries: tuple[int, ...]
    heads: int
    verb: ClassVar[str] = "merge"

    def operands(self) -> str:
        return f"o[{','.join(map(str, self.queries))}], heads {self.heads}"


@dataclass(frozen=True)
class Collect(Step):
    """Copy an output block that came home into the layer's result."""

    block: Block
    verb: ClassVar[str] = "collect"

    def operands(self) -> str:
        return str(self.block)


@dataclass(frozen=True)
class Program:
    """What one rank does in one layer.

    ``steps`` is a total order that a single thread may follow. Steps of one ``stream`` keep that
    order; steps of different streams are ordered by the blocks they share. ``query_order`` and
    ``key_order`` give the order in memory of the chunks that this rank attends, so that every
    operand of an ``Attend`` is one contiguous range of rows.
    """

    rank: int
    query_order: tuple[int, ...]
    key_order: tuple[int, ...]
    steps: tuple[Step, ...]

    @cached_property
    def num_partials(self) -> Counter[tuple[int, int]]:
        """How many calls attend (a query chunk, a head group)."""
        return Counter(
            (chunk, step.heads)
            for step in self.steps
            if isinstance(step, Attend)
            for chunk in step.queries
        )

    @cached_property
    def fused_calls(self) -> tuple[Attend, ...]:
        """The attention calls that wait for their keys themselves."""
        return tuple(step for step in self.steps if isinstance(step, Attend) and step.fused)

    @cached_property
    def awaited_in_kernels(self) -> frozenset[Block]:
        """The blocks whose arrival only a fused call waits for."""
        return frozenset(block for step in self.fused_calls for block in self.reads(step))

    def in_place(self, step: Attend) -> bool:
        """Whether ``step`` gives a part of the rank's result: its own rows, once and alone."""
        return step.queries == (self.rank,) and self.num_partials[self.rank, step.heads] == 1

    def reads(self, step: Step) -> tuple[Block, ...]:
        """The blocks that ``step`` reads from this rank's slots."""
        if isinstance(step, Collect):
            return (step.block,)
        if isinstance(step, Put):
            relayed = step.block.tensor != "o" and step.block.chunk != self.rank
            return (step.block,) if relayed else ()
        if isinstance(step, Attend):
            queries, keys = self.from_slots(step.queries), self.from_slots(step.keys)
            if step.fused:
                keys = step.keys[:-1]
            return (
                *(Block("q", chunk, step.heads) for chunk in queries),
                *(Block("k", chunk, step.heads) for chunk in keys),
                *(Block("v", chunk, step.heads) for chunk in keys),
            )
        return ()

    def from_slots(self, chunks: tuple[int, ...]) -> tuple[int, ...]:
        """The chunks of an operand that are read from slots: none for the own chunk alone."""
        return () if chunks == (self.rank,) else chunks


@dataclass(frozen=True)
class Schedule:
    """The programs of every rank of a mesh, for one layer.

    ``groups_per_rank`` is the number of head groups that each rank works through in turn.
    """

    name: str
    mesh: Mesh
    groups_per_rank: int
    programs: tuple[Program, ...] = field(repr=False)

    @property
    def num_head_groups(self) -> int:
        return self.mesh.num_head_groups * self.groups_per_rank
