"""Compiled programs of all ranks, run in any order that streams allow, give the exact result."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from swiftfusion_xdit import envs
from swiftfusion_xdit.attention.reference import reference_attention, relative_error
from swiftfusion_xdit.comm.stream import StreamBuffer, StreamCommunicator, memory_bytes
from swiftfusion_xdit.device_runtime import DeviceRunner, calls, graphs, scratch
from swiftfusion_xdit.device_runtime.fused import FusedCall
from swiftfusion_xdit.device_runtime.graphs import MOST_GRAPHS, LayerGraphs, wants_graphs
from swiftfusion_xdit.device_runtime.program import STREAMS
from swiftfusion_xdit.device_runtime.puts import PutCall, can_put_by_kernel
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.native.ops import OpKind
from swiftfusion_xdit.plan import NUM_PARITIES, AttentionShape, Plan, make_plan
from swiftfusion_xdit.runtime import Layer
from swiftfusion_xdit.schedule import build
from swiftfusion_xdit.schedule.turns import Message
from swiftfusion_xdit.topology import Topology
from tests.meshes import meshes_of
from tests.sp_cases import uneven
from tests.stream_machine import (
    FakeGraph,
    FakeNative,
    FakeProgram,
    FakeStream,
    Machine,
    StreamedBackend,
    word,
)

# The package has a function of this name.
FUSED_SCHEDULE = importlib.import_module("swiftfusion_xdit.schedule.fused")
HEADS, KV_HEADS, DIM, BATCH = 8, 8, 8, 2
MESHES = [*meshes_of(2), *meshes_of(4), Mesh(2, 2, 2), Mesh(3, 1, 2), Mesh(1, 3, 2), Mesh(2, 2, 1)]


class Ranks:
    """Device runners of every rank of a plan, on one machine."""

    def __init__(
        self,
        plan: Plan,
        machine: Machine,
        layer_graphs: Callable[[int], bool | None] = lambda rank: False,
    ) -> None:
        self.plan, self.machine, self.layer_graphs = plan, machine, layer_graphs
        size = plan.symmetric_bytes + scratch.num_bytes(plan)
        self.memories = [
            torch.zeros(memory_bytes(size, plan.num_flags), dtype=torch.uint8)
            for _ in range(plan.mesh.size)
        ]
        addresses = [memory.data_ptr() for memory in self.memories]
        self.notes = torch.zeros(2, dtype=torch.int32)
        self.watched_now, self.contexts = False, list[str]()
        self.runners = [self._runner(rank, size, addresses) for rank in range(plan.mesh.size)]

    def _runner(self, rank: int, size: int, addresses: list[int]) -> DeviceRunner:
        plan = self.plan
        streams = [FakeStream(1 + rank * len(STREAMS) + idx) for idx in range(len(STREAMS))]

        def enter() -> list[FakeStream]:
            self.machine.current = streams[0]  # each rank's own process has this one
            return streams

        address = self.notes.data_ptr()
        comm = Mock(spec=StreamCommunicator, rank=rank, on_stream=False, timeout_s=1.0)
        comm.topology, comm.counters = Topology.split(plan.mesh.size, 1), Mock()
        comm.heartbeat = SimpleNamespace(
            begin_notes=lambda: [(address, 1), (address + 4, 1)],
            end_notes=lambda: [(address, 0)],
            stream_lane_address=lambda stream: address + 4,
            watched=lambda: self._watched(comm),
        )
        comm.layer_context = ""
        comm.allocate.return_value = StreamBuffer(
            self.memories[rank], addresses, rank=rank, num_bytes=size, num_flags=plan.num_flags
        )
        fakes: dict[str, Any] = {
            "native": FakeNative(self.machine),
            "streams": SimpleNamespace(enter=enter, capture=FakeStream(-1 - rank)),
        }
        backend, layer_graphs = StreamedBackend(self.machine), self.layer_graphs(rank)
        runner = DeviceRunner(plan, comm, backend, **fakes, layer_graphs=layer_graphs)
        self._set_flags(runner)
        self._compile(runner, streams[0])
        return runner

    @contextmanager
    def _watched(self, comm: Any) -> Iterator[None]:
        self.watched_now = True
        self.contexts.append(comm.layer_context)
        yield
        self.watched_now = False

    def _set_flags(self, runner: DeviceRunner) -> None:
        """As DeviceRunner.reset_flags leaves them."""
        for parity in range(NUM_PARITIES):
            for peer, block in self.plan.free_flags[runner.rank]:
                flag = self.plan.free_flag(runner.rank, peer, block, parity)
                word(runner.buffer.flag_address(flag, runner.rank)).value = block.tensor != "o"

    def _compile(self, runner: Any, stream: FakeStream) -> None:
        self.machine.current = stream
        for _ in range(NUM_PARITIES):
            q, k, v = rows(self.plan, runner.rank, seed=0)
            runner._compile_for(Layer({"q": q, "k": k, "v": v}, torch.empty_like(q), 0.3, None))
            runner._num_layers += 1
        runner._num_layers = 0


def whole(plan: Plan, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = plan.shape
    sizes = ((shape.query_lengths, HEADS), (shape.key_lengths, KV_HEADS))
    return [
        torch.randn(BATCH, sum(lengths), heads, DIM, generator=generator)
        for lengths, heads in (sizes[0], sizes[1], sizes[1])
    ]


def rows(plan: Plan, rank: int, seed: int) -> list[Tensor]:
    lengths = (plan.shape.query_lengths, plan.shape.key_lengths, plan.shape.key_lengths)
    parts = zip(whole(plan, seed), lengths, strict=True)
    return [x.split(list(each), dim=1)[rank].contiguous() for x, each in parts]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine(seed=0)
    for name, function in {
        "set_stream": lambda stream: setattr(machine, "current", stream),
        "current_stream": lambda device=None: machine.current,
        "is_current_stream_capturing": lambda: False,
        "synchronize": machine.drain,
        "CUDAGraph": lambda: FakeGraph(machine),
        "graph_pool_handle": object,
        "stream": machine.on,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    # It says that tensors must be on a GPU.
    monkeypatch.setattr(calls, "merge_refusal", lambda partials, out: None)
    yield machine


def plan_of(schedule: str, mesh: Mesh, groups: int = 1, edge_heads: int = 0) -> Plan:
    queries, keys = uneven(5 * mesh.size + 1, mesh.size), uneven(7 * mesh.size + 2, mesh.size)
    shape = AttentionShape(BATCH, queries, keys, HEADS, KV_HEADS, DIM, torch.float32)
    return Plan(shape, build(schedule, mesh, groups_per_rank=groups), edge_heads)


def check_layers(
    plan: Plan, machine: Machine, seed: int, parities: tuple[int, ...] = (0, 1, 0, 1, 0)
) -> None:
    machine.seed = seed
    ranks = Ranks(plan, machine)
    outs: dict[tuple[int, int], Tensor] = {}
    alive = []
    for layer, parity in enumerate(parities):
        for runner in ranks.runners:
            runner._num_layers = parity
            mine = rows(plan, runner.rank, seed=layer)
            alive.append(mine)
            outs[layer, runner.rank] = runner.run(*mine, scale=0.3)
    machine.drain()
    for layer in range(len(parities)):
        expected = reference_attention(*whole(plan, layer), scale=0.3)
        for rank, mine in enumerate(expected.split(list(plan.shape.query_lengths), dim=1)):
            if mine.numel():
                error = relative_error(outs[layer, rank], mine)
                assert error <= 1e-5, f"layer {layer}, rank {rank}, seed {seed}: {error:.2g}"
    assert ranks.notes.tolist()[0] == 0, "every layer must be noted as ended"


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("schedule", ["torus", "folded"])
def test_schedules_that_merge(schedule: str, mesh: Mesh, machine: Machine) -> None:
    for seed in range(3):
        check_layers(plan_of(schedule, mesh), machine, seed)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(("groups", "edge_heads"), [(1, 0), (2, 0), (3, 1)])
def test_head_groups(groups: int, edge_heads: int, mesh: Mesh, machine: Machine) -> None:
    if groups > HEADS // mesh.num_head_groups:
        groups = 1
    for seed in range(3):
        check_layers(plan_of("pipelined", mesh, groups, edge_heads), machine, seed)


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh.ring == 1], ids=str)
def test_whole_sequences(mesh: Mesh, machine: Machine) -> None:
    for seed in range(3):
        check_layers(plan_of("whole_sequence", mesh, 2), machine, seed)


FUSED = {  # rows of keys by rank; tiles have 128
    "whole tiles": (128, 256),
    "own rows fill a tile up": (300, 170),
    "three ranks": (131, 290, 259),
    "two chunks begin in a tile": (300, 60, 291),
    "all alike": (200, 200, 200),
}


@pytest.fixture(params=["engines", "kernel"])
def puts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who puts where calls wait themselves: copy engines, or a kernel wherever it can."""
    most = {"engines": 0, "kernel": 2**40}[request.param]
    monkeypatch.setattr(FUSED_SCHEDULE, "MOST_KERNEL_BYTES", most)
    return request.param


def fused_plan(keys: tuple[int, ...], groups: int) -> Plan:
    mesh = Mesh(ring=len(keys))
    queries = uneven(5 * mesh.size + 1, mesh.size)
    shape = AttentionShape(BATCH, queries, keys, HEADS, KV_HEADS, DIM, torch.float32)
    return make_plan(shape, Topology.split(mesh.size, 1), schedule="fused", groups_per_rank=groups)


@pytest.mark.parametrize("keys", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("groups", [1, 3])
def test_calls_that_wait_themselves(
    keys: tuple[int, ...], groups: int, puts: str, machine: Machine
) -> None:
    for seed in range(3):
        check_layers(fused_plan(keys, groups), machine, seed)


def test_fused_layers_as_replayed_graphs_follow_one_another(puts: str, machine: Machine) -> None:
    for seed, parities in enumerate([(0, 0, 0, 0), (1, 1, 0, 0, 1), (0, 1, 1, 1, 0, 0)] * 2):
        check_layers(fused_plan((200, 200, 200), 3), machine, seed, parities)


def test_what_a_fused_call_read_goes_back_at_once(puts: str, machine: Machine) -> None:
    """A peer takes all slots by one flag: its streams wait for, and write, as few as they can."""
    plan = fused_plan((131, 290, 259), 3)
    runner = Ranks(plan, machine).runners[0]
    ops = next(iter(runner._compiled.values())).program.ops
    waits = [op for op in ops if op.kind == OpKind.WAIT]
    writes = [op for op in ops if op.kind == OpKind.WRITE and op.dst_offset not in notes_of(runner)]
    num_peers, num_groups = 2, 3
    assert len(waits) == num_peers
    parts = next(iter(runner._compiled.values())).parts
    told = [
        flag
        for part in parts
        if isinstance(part, PutCall)
        for item in part._args.items
        for flag in item.flag
        if flag
    ]
    num_told = {"engines": len(writes), "kernel": len(told)}  # rows are there
    assert num_told == {"engines": 0, "kernel": 0} | {puts: num_peers * num_groups}
    (call,) = (part for part in parts if isinstance(part, FusedCall))  # it gives slots back
    assert len(call._remote.clears) == num_peers * num_groups
    assert len(call._remote.frees) == num_peers


def notes_of(runner: DeviceRunner) -> set[int]:
    notes: Any = runner.notes
    return {address for address, _ in (*notes.begin_notes(), *notes.end_notes())}


def test_what_a_kernel_puts(puts: str, machine: Machine) -> None:
    """It needs one layout at all peers, and not too many of them."""

    def by_kernel(keys: tuple[int, ...], groups: int = 3) -> bool:
        return can_put_by_kernel(fused_plan(keys, groups), rank=0)

    assert by_kernel((200, 200, 200)) == (puts == "kernel")
    assert not by_kernel((300, 60, 291))  # rows of samples lie farther apart at one of the two
    assert not by_kernel((200,) * 9)  # too many peers


def test_a_kernel_puts_on_the_stream_of_the_call(puts: str, machine: Machine) -> None:
    """What starts beside the puts has to come right behind them."""
    runner = Ranks(fused_plan((200, 200, 200), 3), machine).runners[0]
    for compiled in runner._compiled.values():
        calls = [type(part) for part in compiled.parts[-3:-1]]
        streams = {op.stream for op in compiled.program.ops}
        assert (calls == [PutCall, FusedCall]) == (streams == {0}) == (puts == "kernel")


@pytest.mark.parametrize("least_turn_bytes", [0, 2**40], ids=["turns", "no turns"])
def test_ranks_need_not_agree_on_who_puts(
    least_turn_bytes: int, puts: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two samples, slots of uneven chunks lie apart differently at peers of some ranks."""
    monkeypatch.setattr("swiftfusion_xdit.plan.LEAST_TURN_BYTES", least_turn_bytes)
    plan = fused_plan((129, 128, 128), 2)
    kernels = [can_put_by_kernel(plan, rank) for rank in range(3)]
    assert any(kernels) == (puts == "kernel") and not all(kernels)
    for seed in range(3):
        check_layers(plan, machine, seed)


def test_a_layer_is_noted_before_its_stream_waits(puts: str, machine: Machine) -> None:
    """Else nobody would look for a peer that never gives slots back."""
    runner: Any = Ranks(fused_plan((200, 200, 200), 3), machine).runners[0]
    notes = {address for address, _ in runner.notes.begin_notes()}
    for compiled in runner._compiled.values():
        ops = compiled.program.ops
        noted = [i for i, op in enumerate(ops) if op.dst_offset in notes and op.value]
        waits = [i for i, op in enumerate(ops) if op.kind == OpKind.WAIT]
        assert noted and max(noted) < min(waits)


def test_fused_calls_do_wait(puts: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told of no flags, they read what is not there yet, in some order of the streams."""
    monkeypatch.setattr(FusedCall, "_begins", lambda self, runner: [0] * (400 // 128 + 1))
    with pytest.raises(AssertionError):
        for seed in range(20):
            check_layers(fused_plan((200, 200, 200), 2), machine, seed)


@pytest.mark.parametrize("parities", [(0, 0, 0, 0), (1, 1, 0, 0, 1), (0, 1, 1, 1, 0, 0)], ids=str)
@pytest.mark.parametrize(
    ("schedule", "mesh", "groups"),
    [
        ("torus", Mesh(2, 1, 2), 1),
        ("folded", Mesh(2, 2, 1), 1),
        ("pipelined", Mesh(1, 2, 2), 2),
        ("torus", Mesh(ring=2), 1),
        ("torus", Mesh(ring=2), 2),
        ("torus", Mesh(1, 2, 2), 2),
    ],
)
def test_layers_as_replayed_graphs_follow_one_another(
    schedule: str, mesh: Mesh, groups: int, parities: tuple[int, ...], machine: Machine
) -> None:
    """A graph of one layer, or of an odd number, has the same slots again and again."""
    for seed in range(5):
        check_layers(plan_of(schedule, mesh, groups), machine, seed, parities)


@pytest.mark.parametrize("kind", [OpKind.WAIT, OpKind.WAIT_EVENT])
def test_the_machine_notices_what_is_missing(kind: OpKind, machine: Machine) -> None:
    """Without its waits a program reads what is not there yet, in some order of the streams."""
    program = FakeProgram._meaning

    def without(self: FakeProgram, op: Any, this: OpKind, src: int, dst: int) -> Any:
        run, ready = program(self, op, this, src, dst)
        return (run, ready) if this != kind else (run, lambda: True)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(FakeProgram, "_meaning", without)
        for seed in range(20):
            check_layers(plan_of("folded", Mesh(torus=2)), machine, seed)


@pytest.fixture
def long_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message is worth keeping turns for, and none is put by a kernel."""
    monkeypatch.setattr("swiftfusion_xdit.plan.LEAST_TURN_BYTES", 0)
    monkeypatch.setattr(FUSED_SCHEDULE, "MOST_KERNEL_BYTES", 0)


TURNS = [
    *((name, mesh, 1) for name in ("torus", "folded") for mesh in MESHES if mesh.size > 2),
    *(("pipelined", mesh, 2) for mesh in MESHES if mesh.size > 2),
    ("fused", Mesh(ring=3), 3),
    ("fused", Mesh(ring=4), 2),
]


def plan_with_turns(schedule: str, mesh: Mesh, groups: int) -> Plan:
    if schedule == "fused":
        return fused_plan(uneven(200 * mesh.size + 1, mesh.size), groups)
    return plan_of(schedule, mesh, groups)


@pytest.mark.parametrize(("schedule", "mesh", "groups"), TURNS, ids=str)
@pytest.mark.parametrize("parities", [(0, 1, 0, 1, 0), (0, 0, 0, 1, 1)], ids=str)
def test_ranks_that_keep_turns(
    schedule: str,
    mesh: Mesh,
    groups: int,
    parities: tuple[int, ...],
    long_messages: None,
    machine: Machine,
) -> None:
    plan = plan_with_turns(schedule, mesh, groups)
    assert plan.turns or mesh.ring * mesh.ulysses <= 2 >= mesh.torus
    for seed in range(2):
        check_layers(plan, machine, seed, parities)


def times_told(plan: Plan, machine: Machine, message: Message, num_layers: int) -> int:
    """How often an arrival is told in layers with the same slots, if who waits never gets on."""
    ranks, waiter = Ranks(plan, machine), plan.next_writers[message]
    buffer: Any = ranks.runners[waiter].buffer
    flag = buffer.flag_address(plan.turn_flag(message, 0), waiter)
    told, alive = [0], list[Any]()
    program = FakeProgram._meaning

    def held(self: FakeProgram, op: Any, kind: OpKind, src: int, dst: int) -> Any:
        run, ready = program(self, op, kind, src, dst)
        if kind == OpKind.WRITE and dst == flag:

            def tell() -> None:
                told[0] += 1
                run()

            return tell, ready
        return run, (lambda: False) if kind == OpKind.WAIT and src == flag else ready

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeProgram, "_meaning", held)
        for _ in range(num_layers):
            for runner in ranks.runners:
                runner._num_layers = 0
                mine = rows(plan, runner.rank, seed=0)
                alive += [*mine, runner.run(*mine, scale=0.3)]
        with pytest.raises(AssertionError):
            machine.drain()
    machine.queues.clear()
    return told[0]


@pytest.mark.parametrize(
    ("schedule", "mesh", "groups"), [*TURNS, ("usp", Mesh(ulysses=4), 1)], ids=str
)
def test_no_arrival_is_told_again_before_the_wait_for_it(
    schedule: str, mesh: Mesh, groups: int, long_messages: None, machine: Machine
) -> None:
    """A flag does not count: what is told twice before a wait is lost to the wait after it."""
    plan = plan_with_turns(schedule, mesh, groups)
    for message in plan.turn_flags[0]:
        told = times_told(plan, machine, message, num_layers=2)
        assert told == 1, f"{message} told {told} times to rank 0, which still waits for it"


def copies_out_of_turn(plan: Plan, machine: Machine, seed: int) -> int:
    """Of one layer: copies to a peer while another rank's of the turn before to it are due."""
    machine.seed = seed
    ranks = Ranks(plan, machine)
    starts = [memory.data_ptr() for memory in ranks.memories]
    ends = [start + memory.numel() for start, memory in zip(starts, ranks.memories, strict=True)]
    size, due = plan.mesh.size, dict[tuple[int, int], int]()
    found = [0]
    program = FakeProgram._meaning

    def turn(writer: int, peer: int) -> int:
        return (peer - writer) % size

    def watched(self: FakeProgram, op: Any, kind: OpKind, src: int, dst: int) -> Any:
        run, ready = program(self, op, kind, src, dst)
        inside = [i for i in range(size) if starts[i] <= dst < ends[i]]
        writer = (self._streams[op.stream] - 1) // len(STREAMS)
        if kind != OpKind.COPY or not inside or inside[0] == writer:
            return run, ready
        peer, number = inside[0], turn(writer, inside[0])
        due[peer, number] = due.get((peer, number), 0) + 1

        def copy() -> None:
            found[0] += bool(due.get((peer, number - 1)))
            due[peer, number] -= 1
            run()

        return copy, ready

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeProgram, "_meaning", watched)
        inputs = [rows(plan, runner.rank, seed=0) for runner in ranks.runners]
        outs = [
            runner.run(*mine, scale=0.3) for runner, mine in zip(ranks.runners, inputs, strict=True)
        ]
        machine.drain()
        del outs  # not before: addresses of theirs are enqueued
    return found[0]


def test_ranks_keep_in_step(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring of four puts to the next rank, then to the one after it, and so on."""
    mesh, seeds = Mesh(ring=4), range(5)
    assert any(copies_out_of_turn(plan_of("torus", mesh), machine, seed) for seed in seeds)
    monkeypatch.setattr("swiftfusion_xdit.plan.LEAST_TURN_BYTES", 0)
    assert not any(copies_out_of_turn(plan_of("torus", mesh), machine, seed) for seed in seeds)


def test_short_messages_keep_no_turns() -> None:
    def flags(rows: int) -> int:
        shape = AttentionShape(1, (rows,) * 4, (rows,) * 4, 8, 8, 128, torch.bfloat16)
        return sum(map(len, Plan(shape, build("torus", Mesh(ring=4))).turn_flags))

    # Keys and values of a rank: 4 KiB a row.
    assert (flags(1023), flags(1024)) == (0, 2 * 4)


def test_the_watchdog_knows_the_turns(long_messages: None, machine: Machine) -> None:
    runner = Ranks(plan_of("torus", Mesh(ring=4)), machine).runners[1]
    named = [(flag.name, peer) for flag, peer in runner._own_flags() if "TURN" in flag.name]
    # Rank 2 is one turn ahead with each peer that rank 1 goes on to.
    assert named == 2 * [(f"TURN of v[chunk 2, heads 0] at rank {peer}", 2) for peer in (3, 0)]


def check_repeated(
    plan: Plan,
    machine: Machine,
    seed: int,
    *,
    layer_graphs: Callable[[int], bool | None],
    steps: int = 6,
) -> Ranks:
    """Steps of three layers, each with inputs and a result at addresses of its own."""
    machine.seed, ranks = seed, Ranks(plan, machine, layer_graphs)
    places = [[rows(plan, rank, seed=0) for rank in range(plan.mesh.size)] for _ in range(3)]
    outs: dict[int, Tensor] = {}

    def result_like(q: Tensor) -> Tensor:
        return outs.setdefault(q.data_ptr(), torch.empty_like(q))

    for runner in ranks.runners:
        runner._result_like = result_like  # type: ignore[method-assign]
    for step in range(steps):
        for layer, place in enumerate(places):
            for runner, mine in zip(ranks.runners, place, strict=True):
                fresh = rows(plan, runner.rank, seed=9 * step + layer)
                for x, values in zip(mine, fresh, strict=True):
                    x.copy_(values)
                runner.run(*mine, scale=0.3)
        machine.drain()
        for layer, place in enumerate(places):
            expected = reference_attention(*whole(plan, 9 * step + layer), scale=0.3)
            parts = expected.split(list(plan.shape.query_lengths), dim=1)
            for mine, part in zip(place, parts, strict=True):
                if part.numel():
                    error = relative_error(outs[mine[0].data_ptr()], part)
                    assert error <= 1e-5, f"step {step}, layer {layer}: {error:.2g}"
    return ranks


def num_captured(ranks: Ranks) -> list[int]:
    """Layers of each rank that are graphs."""
    return [0 if each._graphs is None else len(each._graphs._graphs) for each in ranks.runners]


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize(
    "plan",
    [
        plan_of("torus", Mesh(2, 1, 2)),
        plan_of("folded", Mesh(torus=4)),
        plan_of("pipelined", Mesh(1, 2, 2), 2),
        fused_plan((131, 290, 259), 3),
    ],
    ids=lambda plan: plan.schedule.name,
)
def test_layers_that_come_again_are_repeated_as_graphs(
    plan: Plan, some: bool, machine: Machine
) -> None:
    """Peers cannot tell: some ranks may repeat graphs while others enqueue."""
    size = plan.mesh.size
    chosen = set(range(0, size, 2)) if some else set(range(size))
    for seed in range(2):
        ranks = check_repeated(plan, machine, seed, layer_graphs=lambda rank: rank in chosen)
        # Three places, even and odd layers; captured when they came for the second time.
        assert num_captured(ranks) == [6 if rank in chosen else 0 for rank in range(size)]


@pytest.mark.parametrize(
    ("value", "small", "large"), [(None, 6, 0), ("auto", 6, 0), ("0", 0, 0), ("1", 6, 6)]
)
def test_layers_of_small_plans_are_graphs_by_default(
    value: str | None,
    small: int,
    large: int,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SWIFTFUSION_LAYER_GRAPHS", raising=False)
    if value is not None:
        monkeypatch.setenv("SWIFTFUSION_LAYER_GRAPHS", value)
    plan = plan_of("torus", Mesh(torus=2))
    pairs = sum(plan.shape.query_lengths) * sum(plan.shape.key_lengths)
    rank_flop = 4 * BATCH * HEADS * DIM * pairs / 2
    for bound, found in ((graphs.HOST_BOUND_FLOP, small), (rank_flop, large)):
        monkeypatch.setattr(graphs, "HOST_BOUND_FLOP", bound)
        layer_graphs = envs.get("LAYER_GRAPHS")
        ranks = check_repeated(plan, machine, 0, layer_graphs=lambda rank, each=layer_graphs: each)
        assert num_captured(ranks) == [found, found]


@pytest.mark.parametrize(
    ("rows", "num_ranks", "wanted"),
    [(4608, 2, True), (4608, 4, True), (16896, 4, False), (16896, 2, False), (75600, 8, False)],
)
def test_where_the_host_is_the_bound(rows: int, num_ranks: int, wanted: bool) -> None:
    """FLUX.1 at 1024 and at 2048 pixels, on four GPUs where graphs were measured to pay or not."""
    lengths = (rows // num_ranks,) * num_ranks
    shape = AttentionShape(1, lengths, lengths, 24, 24, 128, torch.bfloat16)
    plan = Plan(shape, build("torus", Mesh(ring=num_ranks)), 0)
    assert wants_graphs(plan, None) is wanted
    assert wants_graphs(plan, True) and not wants_graphs(plan, False)


def test_what_cannot_be_captured_is_an_error_that_names_the_switch(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeGraph) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeGraph, "capture_end", refuse)
    expected = r"RuntimeError: operation not permitted.*; with SWIFTFUSION_LAYER_GRAPHS=0 none is"
    with pytest.raises(RuntimeError, match=expected):
        check_repeated(plan_of("torus", Mesh(torus=2)), machine, 0, layer_graphs=lambda rank: True)


def test_room_for_graphs_has_an_end(machine: Machine) -> None:
    found: Any = LayerGraphs()
    for number in range(MOST_GRAPHS):
        assert not found.is_wanted(number) and found.is_wanted(number)
        assert found.capture(number, FakeStream(-1), lambda: None) is found.find(number)
    assert not found.is_wanted("one more") and not found.is_wanted("one more")


def test_the_watchdog_sees_kernels_that_are_tried(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs there would hang the host, in no layer."""
    ranks = Ranks(plan_of("torus", Mesh(torus=2)), machine)
    runner: Any = ranks.runners[0]
    seen = []

    def synchronize() -> None:
        seen.append(ranks.watched_now)
        machine.drain()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    runner._compiled.clear()
    ranks.contexts.clear()
    runner.run(*rows(ranks.plan, 0, seed=0), scale=0.3, context="attention call 1")
    assert seen == [True] and not ranks.watched_now
    assert ranks.contexts == ["attention call 1, before which its kernels are tried without a peer"]
    assert runner._comm.layer_context == "attention call 1"


def test_nothing_is_collected_during_a_capture(machine: Machine) -> None:
    """What a collection lets go of may need a call that a capture forbids."""
    collecting: list[bool] = []
    graphs: Any = LayerGraphs()
    graphs.capture(0, FakeStream(-1), lambda: collecting.append(gc.isenabled()))
    assert collecting == [False] and gc.isenabled()


def test_calls_of_another_scale_reach_their_merges(machine: Machine) -> None:
    """They find their kernel anew, and merges look where those of the first scale stored."""
    plan = plan_of("torus", Mesh(torus=2))
    runner, scale, heads = Ranks(plan, machine).runners[0], 0.8, slice(0, HEADS // 2)
    q, k, v = rows(plan, 0, seed=1)
    layer = Layer({"q": q, "k": k, "v": v}, torch.empty_like(q), scale, None)
    (compiled, *_) = runner._compiled.values()
    for part in compiled.parts:
        if not isinstance(part, tuple):
            part(layer)  # the peer's rows are 0, as nothing has arrived
    machine.drain()
    theirs = torch.zeros(BATCH, plan.shape.key_lengths[1], HEADS // 2, DIM)
    keys, values = (torch.cat([x[:, :, heads], theirs], dim=1) for x in (k, v))
    expected = reference_attention(q[:, :, heads], keys, values, scale=scale)
    assert relative_error(layer.out[:, :, heads], expected) <= 1e-5


def test_layers_of_another_scale_are_enqueued(machine: Machine) -> None:
    """Their attention calls take memory of their own, which a graph would hold on to."""
    plan = plan_of("torus", Mesh(torus=2))
    (compiled, *_) = Ranks(plan, machine).runners[0]._compiled.values()
    assert compiled.repeats(0.3) and not compiled.repeats(0.5)
