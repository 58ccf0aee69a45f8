"""The rank's side of cpu_layer.py: the ways to run an attention layer, and their measurement."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import HostLoad
from benchmarks.overhead import measure_overhead
from swiftfusion_xdit import SequenceParallel
from swiftfusion_xdit.attention import attend, select_backend
from swiftfusion_xdit.attention.reference import reference_attention, relative_error
from swiftfusion_xdit.mesh import Mesh, torus_mesh
from swiftfusion_xdit.topology import Topology

MAX_ERROR = {"float32": 2e-6, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Case:
    """One way to run the layer.

    ``kind`` is ``stock`` (xDiT's USP), ``ours`` (``schedule`` over shm) or ``floor`` (only the
    attention kernel).
    """

    kind: str
    name: str
    mesh: Mesh = field(default_factory=Mesh)
    schedule: str = ""
    combined: bool = False  # stock: q, k and v in one all-to-all, as some of xDiT's models ask for


@dataclass(frozen=True)
class Settings:
    ranks: int
    machines: int
    seq: int
    heads: int
    head_dim: int
    dtype: str
    rounds: int
    layers: int
    max_other_cores: float

    def __post_init__(self) -> None:
        p, m, s, h = self.ranks, self.machines, self.seq, self.heads
        for name, value in (("machines", m), ("seq", s), ("heads", h)):
            if p < 1 or value < 1 or (p % value if name == "machines" else value % p):
                rule = "divide" if name == "machines" else "be a multiple of"
                raise ValueError(f"--{name} must {rule} --ranks, got {value} and {p} ranks")
        for name in ("head_dim", "rounds", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")

    @property
    def default_mesh(self) -> Mesh:
        return torus_mesh(Topology.split(self.ranks, self.machines), self.heads)

    def cases(self) -> list[Case]:
        cases = []
        for u in _divisors(self.ranks):
            mesh, name = Mesh(ulysses=u, ring=self.ranks // u), f"USP U={u} R={self.ranks // u}"
            cases.append(Case("stock", name, mesh))
            if u > 1:
                cases.append(Case("stock", f"{name} combined", mesh, combined=True))
        inside = self.ranks // self.machines
        for schedule in ("torus", "pipelined"):
            for u in _divisors(inside):
                mesh = Mesh(torus=self.machines, ulysses=u, ring=inside // u)
                name = f"{schedule} T={mesh.torus} U={u} R={mesh.ring}"
                note = " (default)" if mesh == self.default_mesh else ""
                cases.append(Case("ours", name + note, mesh, schedule))
        return [*cases, Case("floor", "attention kernel alone")]


def _divisors(number: int) -> list[int]:
    return [i for i in range(number, 0, -1) if number % i == 0]


class Rank:
    """This rank's inputs and everything that the cases need; owns the groups and the memory."""

    def __init__(self, rank: int, settings: Settings, resources: ExitStack) -> None:
        self.rank = rank
        self.settings = settings
        self._resources = resources
        self._groups: dict[tuple[int, int], dict[str, Any]] = {}
        self.sequence_parallel: dict[Case, SequenceParallel] = {}
        generator = torch.Generator().manual_seed(0)
        shape = (1, settings.seq, settings.heads, settings.head_dim)
        dtype = getattr(torch, settings.dtype)
        # The same q, k, v on every rank.
        self.whole = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
        self.rows = self._share(1)
        self.heads = self._share(2)
        self.expected_rows = reference_attention(self.rows[0], *self.whole[1:])
        self.expected_heads = reference_attention(*self.heads)

    def _share(self, dim: int) -> list[Tensor]:
        return [x.chunk(self.settings.ranks, dim=dim)[self.rank].contiguous() for x in self.whole]

    def layer(self, case: Case) -> Callable[[], Tensor]:
        """Make ``case`` ready; the function that runs one layer of it. Collective."""
        if case.kind == "floor":
            return self._floor()
        return self._stock(case) if case.kind == "stock" else self._ours(case)

    def check(self, case: Case) -> float:
        """Run one layer and compare it with attention in fp64."""
        out = self.layer(case)()
        if case.kind == "stock":
            out = out.transpose(1, 2)
        expected = self.expected_heads if case.kind == "floor" else self.expected_rows
        error = relative_error(out, expected)
        if not error <= MAX_ERROR[self.settings.dtype]:
            raise RuntimeError(f"{case.name}: rank {self.rank} is wrong by {error:.2g}")
        return error

    def _floor(self) -> Callable[[], Tensor]:
        backend = select_backend("cpu", "cpu")
        scale = 1 / math.sqrt(self.settings.head_dim)
        return lambda: attend(*self.heads, scale=scale, backend=backend)[0]

    def _ours(self, case: Case) -> Callable[[], Tensor]:
        sp = self.sequence_parallel.get(case)
        if sp is None:
            sp = SequenceParallel(
                machines=self.settings.machines,
                mesh=case.mesh,
                schedule=case.schedule,
                transport="shm",
                backend="cpu",
                device="cpu",
            )
            self.sequence_parallel[case] = self._resources.enter_context(sp)
        return lambda: sp.attention(*self.rows)

    def _stock(self, case: Case) -> Callable[[], Tensor]:
        """xDiT's function itself, on the groups that xDiT makes for the degrees."""
        import xfuser.model_executor.layers.usp as usp
        from xfuser.core.distributed.attention_backend import AttentionBackendType

        assert usp.USP.__code__.co_filename == usp.__file__, "USP is not xDiT's own"
        self._use_groups(case.mesh.ulysses, case.mesh.ring)
        # As xDiT's models call it: views of [B, S, H, D], heads before rows.
        q, k, v = (x.transpose(1, 2) for x in self.rows)
        # Both sides run one kernel, aten's flash attention for CPU.
        flash = AttentionBackendType.SDPA_FLASH
        return lambda: usp.USP(q, k, v, combine_qkv_a2a=case.combined, backend=flash)

    def _use_groups(self, ulysses: int, ring: int) -> None:
        """Let xDiT make its groups for these degrees once, and put them in place again later."""
        from xfuser.core.distributed import init_distributed_environment, parallel_state
        from yunchang.globals import PROCESS_GROUP

        from tests.xdit_calls import start

        names = ("_MODEL_REPLICA", "_DP", "_CFG", "_SP", "_TP", "_PP", "_FS", "_VAE")
        degrees = (ulysses, ring)
        if degrees not in self._groups:
            for name in names:
                setattr(parallel_state, name, None)
            init_distributed_environment()
            start(
                "usp",
                num_heads=self.settings.heads,
                ulysses_degree=ulysses,
                ring_degree=ring,
                sp_machines=str(self.settings.machines),
            )
            groups = {name: getattr(parallel_state, name) for name in names}
            groups |= {name: getattr(PROCESS_GROUP, name) for name in ("ULYSSES_PG", "RING_PG")}
            self._groups[degrees] = groups
        for name, group in self._groups[degrees].items():
            setattr(parallel_state if name in names else PROCESS_GROUP, name, group)
        sp = parallel_state.get_sp_group()
        assert (sp.ulysses_world_size, sp.ring_world_size) == degrees


def measure(rank: int, world_size: int, settings: Settings) -> dict[str, Any]:
    """Check every case, time all in turn, then take the runtime's overhead apart.

    Returns:
        this rank's ``errors`` by case name, ``rounds`` (see _rounds), and ``overhead`` by case name
        (see measure_overhead).
    """
    with ExitStack() as resources, torch.no_grad():
        me = Rank(rank, settings, resources)
        cases = settings.cases()
        _say(rank, f"checking {len(cases)} ways to run the layer")
        errors = {case.name: me.check(case) for case in cases}
        rounds = _rounds(me, cases)
        _say(rank, "overhead")
        overhead = {
            case.name: measure_overhead(sp, me.rows) for case, sp in me.sequence_parallel.items()
        }
        dist.barrier()
        return {"errors": errors, "rounds": rounds, "overhead": overhead}


def _rounds(me: Rank, cases: list[Case]) -> list[dict[str, Any]]:
    """Time every case once a round; in round i the i-th case goes first.

    Returns:
        one entry a round: ``load`` (see HostLoad; of rank 0 on every rank), ``quiet`` (whether
        that is within the settings) and ``turns``, ``(start_ns, end_ns, cpu_ns)`` by case name, on
        the host's monotonic clock and this process's CPU clock. At most three times
        ``settings.rounds``, until so many are quiet.
    """
    settings, rounds = me.settings, list[dict[str, Any]]()
    num_quiet = 0
    while num_quiet < settings.rounds and len(rounds) < 3 * settings.rounds:
        first = len(rounds) % len(cases)
        dist.barrier()
        load, own_s = HostLoad(), time.process_time()
        turns = {
            case.name: _time(me.layer(case), settings.layers)
            for case in cases[first:] + cases[:first]
        }
        own = torch.tensor([time.process_time() - own_s])
        dist.all_reduce(own)
        seen: list[Any] = [load.others(own.item())]
        dist.broadcast_object_list(seen, src=0)
        quiet = sum(seen[0].values()) <= settings.max_other_cores
        rounds.append({"load": seen[0], "quiet": quiet, "turns": turns})
        num_quiet += quiet
        _say(me.rank, f"round {len(rounds)}, {num_quiet} of {settings.rounds} quiet: {seen[0]}")
    return rounds


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, file=sys.stderr, flush=True)


def _time(layer: Callable[[], Tensor], num_layers: int) -> tuple[int, int, int]:
    layer()  # whoever ran before has had the caches
    dist.barrier()
    cpu_ns, start_ns = time.process_time_ns(), time.monotonic_ns()
    for _ in range(num_layers):
        layer()
    end_ns = time.monotonic_ns()
    return start_ns, end_ns, time.process_time_ns() - cpu_ns
