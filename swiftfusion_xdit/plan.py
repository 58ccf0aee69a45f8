"""A plan: the mesh and schedule chosen for one shape, and where every block lies in memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from swiftfusion_xdit import wire
from swiftfusion_xdit.mesh import (
    Mesh,
    head_group_sizes,
    paper_mesh,
    split_counts,
    torus_mesh,
    usp_mesh,
    whole_sequence_mesh,
)
from swiftfusion_xdit.region import Region
from swiftfusion_xdit.schedule import build
from swiftfusion_xdit.schedule.fused import fused_groups, suits_kernel_puts
from swiftfusion_xdit.schedule.messages import messages
from swiftfusion_xdit.schedule.steps import (
    Attend,
    Block,
    Copy,
    Program,
    Put,
    Schedule,
    TensorName,
    Wait,
)
from swiftfusion_xdit.schedule.turns import Message, turns
from swiftfusion_xdit.simulate.cost import tiles_per_head
from swiftfusion_xdit.topology import Topology

STRATEGIES = ("usp", "tas", "torus")
PIPELINED_GROUPS = 2  # where the device is not known
FUSED_TILE_ROWS = 128  # keys that a fused call loads at a time
NUM_PARITIES = 2  # even and odd layers have slots of their own
ALIGNMENT_BYTES = 256
# Of a message that is let arrive before the next turn. Layers with messages of some MiB decided it:
# with shorter ones they were slower in step (benchmarks/results/puts_to_several_peers.md). Copies
# with nothing beside them gain from about 24 MiB on only.
LEAST_TURN_BYTES = 4 * 2**20


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one attention layer over a whole group.

    Rank p brings ``q [batch, query_lengths[p], num_heads, head_dim]`` and
    ``k, v [batch, key_lengths[p], num_kv_heads, head_dim]``. ``wire`` says how rows travel and
    lie in slots: ``exact``, or ``fp8`` (wire.py).
    """

    batch: int
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    wire: str = "exact"

    @property
    def slot_row(self) -> tuple[int, torch.dtype]:
        """What a slot holds of one row of one head: so many elements of this dtype."""
        if self.wire == "fp8":
            return wire.row_bytes(self.head_dim), torch.uint8
        return self.head_dim, self.dtype

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def lengths(self, tensor: TensorName) -> tuple[int, ...]:
        """Rows of every chunk of a tensor."""
        return self.query_lengths if tensor in ("q", "o") else self.key_lengths


@dataclass(frozen=True)
class Matrix:
    """A contiguous ``[batch, rows, heads, elements]`` array of one rank's symmetric memory."""

    offset_bytes: int
    shape: tuple[int, int, int, int]

    def window(self, rows: range, heads: range, dtype: torch.dtype, offset_bytes: int) -> Region:
        batch, num_rows, num_heads, dim = self.shape
        skipped = (rows.start * num_heads + heads.start) * dim
        return Region(
            offset_bytes + self.offset_bytes + skipped * dtype.itemsize,
            (batch, len(rows), len(heads), dim),
            (num_rows * num_heads * dim, num_heads * dim, dim, 1),
            dtype,
        )


class Layout:
    """Where the slots of one rank lie.

    Per head group that the rank attends: q, k, v with the rows of all received chunks in memory
    order, so that an operand of several chunks is one view; for fused calls, which take all heads
    at once, k and v with all heads and with room for own rows up to the end of a tile. Then the
    output rows of the rank itself, all heads, where peers put what they attended. Once for even and
    once for odd layers.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan = plan
        self.program: Program = plan.schedule.programs[rank]
        self._matrices: dict[tuple[TensorName, int], Matrix] = {}
        self._row_starts: dict[TensorName, dict[int, int]] = {}
        shape = plan.shape
        orders: dict[TensorName, tuple[int, ...]] = {
            "q": self.program.query_order,
            "k": self.program.key_order,
            "v": self.program.key_order,
            "o": (rank,),
        }
        # Own rows that no operand joins to others are read where they are.
        self._orders = {tensor: self._in_slots(tensor, order) for tensor, order in orders.items()}
        for tensor, order in self._orders.items():
            lengths = [shape.lengths(tensor)[chunk] for chunk in order]
            starts = accumulate(lengths, initial=0)
            self._row_starts[tensor] = dict(zip(order, starts, strict=False))
        self._whole = ("k", "v", "o") if self.program.fused_calls else ("o",)
        end = 0
        num_elements, self._dtype = shape.slot_row
        for tensor, heads in self._held(rank):
            rows = sum(shape.lengths(tensor)[chunk] for chunk in self._orders[tensor])
            num_heads = len(plan.heads(tensor, heads))
            if tensor in self._whole:
                num_heads = shape.num_heads if tensor == "o" else shape.num_kv_heads
            if tensor != "o" and self.program.fused_calls:
                rows += own_rows_in_tile(rows)
            matrix = Matrix(end, (shape.batch, rows, num_heads, num_elements))
            self._matrices[tensor, heads] = matrix
            end += _aligned(math.prod(matrix.shape) * self._dtype.itemsize)
        self.layer_bytes = end

    def _in_slots(self, tensor: TensorName, order: tuple[int, ...]) -> tuple[int, ...]:
        """The chunks of ``order`` that are ever put or copied into slots."""
        filled = {
            step.block.chunk
            for step in self.program.steps
            if isinstance(step, Copy | Wait) and step.block.tensor == tensor
        }
        return tuple(chunk for chunk in order if chunk in filled)

    def _held(self, rank: int) -> list[tuple[TensorName, int]]:
        """The arrays this rank holds: none for an operand that is always its own chunk."""
        groups = self.plan.schedule.groups_per_rank
        first = self.plan.mesh.head_group(rank) * groups
        names: tuple[TensorName, ...] = ("q", "k", "v", "o")
        held = [
            (tensor, heads)
            for heads in range(first, first + groups)
            for tensor in names
            if tensor not in self._whole
        ]
        held += [(tensor, 0) for tensor in names if tensor in self._whole]
        return [(tensor, heads) for tensor, heads in held if self._orders[tensor]]

    def array(self, tensor: TensorName, parity: int) -> Region:
        """All rows and heads that fused calls read from slots, with those that fill a tile up."""
        matrix = self._matrices[tensor, 0]
        rows, heads = (range(length) for length in matrix.shape[1:3])
        return matrix.window(rows, heads, self._dtype, parity * self.plan.layer_bytes)

    def slot(self, block: Block, parity: int) -> Region:
        """The slot of one block."""
        return self.operand(block.tensor, (block.chunk,), block.heads, parity)

    def operand(self, tensor: TensorName, chunks: Sequence[int], heads: int, parity: int) -> Region:
        """The rows of neighbouring chunks as one window."""
        start = self._row_starts[tensor][chunks[0]]
        lengths = self.plan.shape.lengths(tensor)
        rows = range(start, start + sum(lengths[chunk] for chunk in chunks))
        if tensor in self._whole:
            matrix, columns = self._matrices[tensor, 0], self.plan.heads(tensor, heads)
        else:
            matrix = self._matrices[tensor, heads]
            columns = range(matrix.shape[2])
        return matrix.window(rows, columns, self._dtype, parity * self.plan.layer_bytes)


@dataclass(frozen=True)
class Plan:
    """A schedule bound to sizes: heads of each group, slots, and the flags beside them.

    ``edge_heads``: of the first and the last group of a rank, see ``mesh.head_group_sizes``.
    ``whole_rounds``: how transfers go in batches, see ``schedule/rounds.py``.
    """

    shape: AttentionShape
    schedule: Schedule
    edge_heads: int = 0
    whole_rounds: bool = False

    @property
    def mesh(self) -> Mesh:
        return self.schedule.mesh

    def describe(self) -> str:
        """Mesh and schedule, in words."""
        groups = self.schedule.groups_per_rank
        in_groups = f" in {groups} head groups" if groups > 1 else ""
        rounds = ", in whole rounds" if self.whole_rounds else ""
        return f"mesh {self.mesh}, schedule {self.schedule.name}{in_groups}{rounds}"

    @cached_property
    def query_heads(self) -> tuple[range, ...]:
        """The query heads of each head group."""
        fine = []
        coarse = split_counts(self.shape.num_heads, self.mesh.num_head_groups)
        for num_heads in coarse:
            fine += head_group_sizes(
                num_heads, self.schedule.groups_per_rank, edge_heads=self.edge_heads
            )
        ends = accumulate(fine, initial=0)
        return tuple(range(start, stop) for start, stop in pairwise(ends))

    def heads(self, tensor: TensorName, heads: int) -> range:
        """The heads of a group in a tensor: for k and v those that its query heads share."""
        query_heads = self.query_heads[heads]
        if tensor in ("q", "o") or not query_heads:
            return query_heads
        shared_by = self.shape.num_heads // self.shape.num_kv_heads
        return range(query_heads[0] // shared_by, query_heads[-1] // shared_by + 1)

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        return tuple(Layout(self, rank) for rank in range(self.mesh.size))

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes of one parity's slots: the most that any rank needs."""
        return max(layout.layer_bytes for layout in self.layouts)

    @property
    def symmetric_bytes(self) -> int:
        """Bytes of symmetric memory on every rank."""
        return NUM_PARITIES * self.layer_bytes

    @cached_property
    def full_flags(self) -> tuple[dict[Block, int], ...]:
        """Per rank: the number of the FULL flag of each slot that it owns."""
        return tuple(
            {step.block: i for i, step in enumerate(_steps(program, Wait))}
            for program in self.schedule.programs
        )

    @cached_property
    def free_flags(self) -> tuple[dict[tuple[int, Block], int], ...]:
        """Per rank: the number of the FREE flag of each (peer, slot) that it puts to."""
        return tuple(
            {(step.peer, step.block): i for i, step in enumerate(_steps(program, Put))}
            for program in self.schedule.programs
        )

    @cached_property
    def _message_blocks(self) -> dict[tuple[int, Block], Block]:
        """Of (owner, slot): the last block of the message that the slot's block comes in."""
        return {
            (put.peer, put.block): puts[-1].block
            for program in self.schedule.programs
            for puts in messages(program)
            for put in puts
        }

    def message_block(self, owner: int, block: Block) -> Block:
        """The block whose flags serve the whole message that brings ``block`` to ``owner``."""
        return self._message_blocks[owner, block]

    @cached_property
    def _last_blocks(self) -> dict[tuple[int, int], Block]:
        """Of (writer, owner): the last block that one puts to the other."""
        return {
            (program.rank, put.peer): put.block
            for program in self.schedule.programs
            for put in _steps(program, Put)
        }

    def return_block(self, writer: int, owner: int, block: Block) -> Block:
        """The block whose FREE flag gives the slots of the message that brings ``block`` back.

        Fused calls end together, so all that they read of one writer goes back at once.
        """
        if self.schedule.programs[owner].fused_calls:
            return self._last_blocks[writer, owner]
        return self.message_block(owner, block)

    @property
    def puts_by_kernel(self) -> bool:
        """Whether a kernel puts, on ranks where it can, what fused calls read."""
        return self.schedule.name == "fused" and suits_kernel_puts(self.shape)

    @cached_property
    def turns(self) -> dict[Message, Message]:
        """Of each message that keeps turns: the one to its peer that its writer lets arrive.

        None where ranks may put by a kernel, which tells of no arrival.
        """
        if self.puts_by_kernel:
            return {}
        return {
            message: before
            for message, before in turns(self.schedule).items()
            if self._message_bytes[before.peer, before.last] >= LEAST_TURN_BYTES
        }

    @cached_property
    def _message_bytes(self) -> Counter[tuple[int, Block]]:
        """Of (owner, last block of a message to it): its bytes."""
        found: Counter[tuple[int, Block]] = Counter()
        for (owner, block), last in self._message_blocks.items():
            found[owner, last] += self.layouts[owner].slot(block, 0).num_bytes
        return found

    @cached_property
    def next_writers(self) -> dict[Message, int]:
        """Of each message that has to arrive before another: the rank that puts the other."""
        return {before: message.writer for message, before in self.turns.items()}

    @cached_property
    def turn_flags(self) -> tuple[dict[Message, int], ...]:
        """Per rank: the number of the TURN flag of each message that it lets arrive first."""
        awaited: list[list[Message]] = [[] for _ in range(self.mesh.size)]
        for before, rank in self.next_writers.items():
            awaited[rank].append(before)
        return tuple({before: i for i, before in enumerate(each)} for each in awaited)

    @cached_property
    def _num_flags(self) -> tuple[int, int, int]:
        """FULL, FREE and TURN flags of a parity, on the rank that has most of each."""
        kinds = (self.full_flags, self.free_flags, self.turn_flags)
        full, free, turn = (max(map(len, flags)) for flags in kinds)
        return full, free, turn

    @property
    def num_flags(self) -> int:
        return NUM_PARITIES * sum(self._num_flags)

    def full_flag(self, owner: int, block: Block, parity: int) -> int:
        """Index, at ``owner``, of the flag that says its slot is full."""
        return parity * sum(self._num_flags) + self.full_flags[owner][block]

    def free_flag(self, writer: int, peer: int, block: Block, parity: int) -> int:
        """Index, at ``writer``, of the flag that says its slot at ``peer`` may be written."""
        begin = parity * sum(self._num_flags) + self._num_flags[0]
        return begin + self.free_flags[writer][peer, block]

    def turn_flag(self, message: Message, parity: int) -> int:
        """Index, at the rank that waits for it, of the flag that says that ``message`` arrived."""
        begin = parity * sum(self._num_flags) + sum(self._num_flags[:2])
        return begin + self.turn_flags[self.next_writers[message]][message]


def make_plan(
    shape: AttentionShape,
    topology: Topology,
    *,
    strategy: str = "torus",
    mesh: Mesh | None = None,
    schedule: str = "auto",
    has_lse: bool = True,
    whole_sequence: bool = False,
    num_units: int = 0,
    groups_per_rank: int = 0,
    edge_heads: int = 0,
    whole_rounds: bool = False,
) -> Plan:
    """Choose mesh and schedule for a shape.

    Args:
        strategy: ``torus``; or ``usp`` and ``tas``, the classic schedule on USP's own layout and
            on the topology-aware one.
        mesh: forces the mesh; by default the strategy's rule for this topology and head count.
        schedule: forces ``torus``, ``folded``, ``pipelined`` or ``fused``; ``auto`` takes
            ``torus``, but ``pipelined`` where the attention kernel has no log-sum-exp, and on GPUs
            where no axis crosses machines, so that only head groups can hide the exchange.
        has_lse: whether the local attention kernel returns one.
        whole_sequence: whether the kernel must see all rows, in order, in one call; then the
            schedule is ``pipelined`` and the mesh has no ring.
        num_units: multiprocessors of the device, for the number of head groups; 0 if unknown.
        groups_per_rank: forces the number of head groups of ``pipelined`` and ``fused``, and of
            ``torus`` on a mesh with torus=1, as far as there are heads; 0 leaves it open.
        edge_heads: heads of the first and the last of these groups; 0: as many as the others.
        whole_rounds: whether transfers whose receivers take part go in as few batches as can be,
            see ``schedule/rounds.py``.

    Raises:
        ValueError: a mesh that does not fit the group or the heads, head groups that the schedule
            does not have there, a schedule that needs a log-sum-exp that the kernel does not have,
            or ``fused`` where ``not_fused_because``.
    """
    if whole_sequence:
        mesh = mesh or whole_sequence_mesh(topology)
        schedule = _whole_sequence_schedule(mesh, schedule)
    if schedule == "fused":
        mesh = mesh or Mesh(ring=topology.num_ranks)
        if reason := not_fused_because(shape, mesh, topology):
            raise ValueError(f"schedule 'fused' cannot serve this layer: {reason}")
        groups_per_rank, edge_heads = fused_groups(
            shape.num_heads,
            shape.num_kv_heads,
            wanted=groups_per_rank,
            heads_at_once=num_units / _tiles_per_head(shape, max(shape.query_lengths)),
            put_by_kernel=suits_kernel_puts(shape),
        )
    choose_mesh = {"usp": usp_mesh, "tas": paper_mesh, "torus": torus_mesh}[strategy]
    mesh = mesh or choose_mesh(topology, shape.num_heads)
    mesh.require(num_ranks=topology.num_ranks, num_heads=shape.num_heads)
    if strategy != "torus":
        name = "usp"
    elif schedule == "auto":
        name = "pipelined" if not has_lse or (num_units and mesh.torus == 1) else "torus"
    else:
        name = schedule
    groups = min(groups_per_rank, shape.num_heads // mesh.num_head_groups)
    if not groups:
        groups = 1
        if name in ("pipelined", "whole_sequence", "fused"):
            groups, edge_heads = pipelined_groups(shape, mesh, num_units)
    if groups > 1 and name == "torus" and mesh.torus > 1:
        raise ValueError(
            f"groups must be 1 with schedule 'torus' on a mesh with torus > 1, got groups={groups} "
            f"on {mesh}; a mesh with torus=1 takes more"
        )
    plan = Plan(shape, build(name, mesh, groups_per_rank=groups), edge_heads, whole_rounds)
    if not has_lse and needs_lse(plan.schedule):
        raise ValueError(
            f"schedule {name!r} merges partial outputs and needs an attention backend with a "
            "log-sum-exp; use schedule='pipelined'"
        )
    return plan


def _whole_sequence_schedule(mesh: Mesh, schedule: str) -> str:
    if mesh.ring > 1 or schedule not in ("auto", "pipelined"):
        raise ValueError(
            "an attention kernel that must see the whole sequence needs a mesh with ring=1 and "
            f"schedule 'pipelined'; got mesh {mesh} and schedule {schedule!r}"
        )
    return "whole_sequence"


def pipelined_groups(shape: AttentionShape, mesh: Mesh, num_units: int) -> tuple[int, int]:
    """(head groups, heads of the first and the last) that keep a device of ``num_units`` busy.

    Three groups: the first and the last as small as fill the device once, because nothing hides
    the way in of the one and the way home of the other. Two where that leaves too little between.
    """
    heads_per_rank = shape.num_heads // mesh.num_head_groups
    if not num_units:
        return min(PIPELINED_GROUPS, heads_per_rank), 0
    rows = sum(shape.query_lengths) // mesh.ring
    edge_heads = -(-num_units // _tiles_per_head(shape, rows))
    if heads_per_rank >= 4 * edge_heads:
        return 3, edge_heads
    return min(PIPELINED_GROUPS, heads_per_rank), 0


def _tiles_per_head(shape: AttentionShape, rows: int) -> int:
    tiles = tiles_per_head(query_rows=rows, head_dim=shape.head_dim, batch=shape.batch)
    return max(1, tiles)


def own_rows_in_tile(received: int) -> int:
    """Own rows that fill up the last tile of ``received`` rows of a fused call's keys."""
    return -received % FUSED_TILE_ROWS


def not_fused_because(shape: AttentionShape, mesh: Mesh, topology: Topology) -> str:
    """Why no fused call can serve a shape on a mesh, or nothing."""
    if mesh.size < 2 or mesh.num_head_groups > 1:
        return f"it needs a mesh with torus=1, ulysses=1 and a ring, got {mesh}"
    if topology.num_machines > 1:
        return f"it works inside one machine, got {topology.num_machines}"
    if shape.wire != "exact":
        return f"it reads rows as they are, got wire {shape.wire!r}"
    if 0 in shape.query_lengths:
        return f"every rank must bring queries, got {shape.query_lengths}"
    total = sum(shape.key_lengths)
    for rank, own in enumerate(shape.key_lengths):
        if own <= own_rows_in_tile(total - own) or own == total:
            return (
                f"every rank must receive keys and bring enough to fill up a tile of "
                f"{FUSED_TILE_ROWS}, got {own} of {total} at rank {rank}"
            )
    return ""


def needs_lse(schedule: Schedule) -> bool:
    """Whether any output has more than one partial."""
    for program in schedule.programs:
        seen: set[tuple[int, int]] = set()
        for step in _steps(program, Attend):
            pairs = {(chunk, step.heads) for chunk in step.queries}
            if pairs & seen:
                return True
            seen |= pairs
    return False


def _steps(program: Program, kind: type) -> list:
    return [step for step in program.steps if isinstance(step, kind)]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
