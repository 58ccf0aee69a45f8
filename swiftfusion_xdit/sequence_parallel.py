"""Attention over a process group, each rank holding its own rows of the sequence."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from swiftfusion_xdit import envs
from swiftfusion_xdit.agreement import Agreement
from swiftfusion_xdit.attention import Backend, select_backend
from swiftfusion_xdit.comm import Communicator, create_communicator
from swiftfusion_xdit.inputs import LocalSizes, check_inputs, shape_of
from swiftfusion_xdit.mesh import Mesh, whole_sequence_mesh
from swiftfusion_xdit.plan import (
    FUSED_TILE_ROWS,
    STRATEGIES,
    AttentionShape,
    Plan,
    make_plan,
    not_fused_because,
)
from swiftfusion_xdit.runtime import LayerRunner
from swiftfusion_xdit.schedule import GROUPED
from swiftfusion_xdit.simulate.timeline import Event
from swiftfusion_xdit.topology import Topology

if TYPE_CHECKING:
    from swiftfusion_xdit.autoplan import AutoPlanner
    from swiftfusion_xdit.device_runtime import SideStreams

logger = logging.getLogger(__name__)

MAX_PLANS = 16  # distinct shapes whose symmetric memory is kept
MAX_AGREED = 256  # distinct lengths that need not be agreed upon again


class _Disagreement(Exception):
    """A peer runs this call with another plan, or has asked to agree on one."""


class SequenceParallel:
    """Exact attention over all rows of a group.

    Every rank calls ``attention`` with its own rows, in the same order of calls. Chunk lengths
    may differ between ranks and from call to call: ranks agree on them when they change, and
    exchange nothing about them while they do not.

    Owns its communicator and all symmetric memory; use it as a context manager or ``close`` it.

    Args:
        group: the process group; by default the whole world. Rank p brings chunk p.
        strategy: ``torus`` (Torus Attention), or for comparison the classic exchange with its
            own ring on USP's layout (``usp``) or on the topology-aware one (``tas``).
        machines: how many machines the ranks are split over, evenly, in rank order, or the
            ``Topology`` itself; by default ``SWIFTFUSION_SP_MACHINES``, or what the hosts say.
        mesh: ``Mesh``, its text form or a mapping; by default the strategy's rule.
        schedule: ``auto``, ``torus``, ``folded``, ``pipelined`` or ``fused``; for strategy
            ``torus`` only. Layers that ``fused`` cannot serve run in ``pipelined``.
        groups: head groups of schedules ``pipelined`` and ``fused``, and of ``torus`` on a mesh
            with torus=1; by default the plan's choice.
        transport: ``auto`` or the name of a transport, see ``comm.create_communicator``.
        backend: ``auto``, the name of a local attention kernel, see ``attention``, or a kernel.
        wire: how rows travel between ranks: ``exact``, or ``fp8``, as 8-bit floats with a scale
            each. That halves the bytes of bf16, is off by a few percent, and runs on CPUs only.
        tune: on GPUs, whether the planner's best few are timed when a shape is first seen, and the
            fastest is taken; by default ``SWIFTFUSION_TUNE``.
        layer_graphs: on GPUs, whether layers at addresses that come again are repeated as CUDA
            graphs; by default ``SWIFTFUSION_LAYER_GRAPHS``, and where that is ``auto``, those whose
            attention is so short that the host is the bound.
        device: where the tensors live; by default the CPU, or the current GPU if the group's
            backend is NCCL.

    Raises:
        ValueError: an unknown name, a mesh that does not fit the group, machines that do not
            divide it, or options that differ between ranks. Collective, so every rank raises.
        NotImplementedError: ``wire="fp8"`` on a GPU.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        strategy: str = "torus",
        machines: int | Topology | None = None,
        mesh: Mesh | str | Mapping[str, int] | None = None,
        schedule: str = "auto",
        groups: int | None = None,
        transport: str = "auto",
        backend: str | Backend = "auto",
        wire: str = "exact",
        tune: bool | None = None,
        layer_graphs: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if group is None:
            if not dist.is_initialized():
                raise ValueError(
                    "group must be a process group, or torch.distributed initialised for the "
                    "whole world; got None and no initialised world"
                )
            group = dist.group.WORLD
            assert group is not None
        _require("strategy", strategy, STRATEGIES)
        _require("schedule", schedule, envs.SCHEDULES)
        _require("wire", wire, envs.WIRES)
        if schedule != "auto" and strategy != "torus":
            raise ValueError(
                f"schedule={schedule!r} needs strategy='torus', got strategy={strategy!r}"
            )
        if groups is not None and (groups < 1 or schedule not in GROUPED):
            raise ValueError(
                "groups must be at least 1, with schedule='torus', 'pipelined' or 'fused'; "
                f"got groups={groups} and schedule={schedule!r}"
            )
        self.strategy = strategy
        self.schedule = schedule
        self._forced_groups = groups
        self._tune = envs.get("TUNE") if tune is None else tune
        self._layer_graphs = envs.get("LAYER_GRAPHS") if layer_graphs is None else layer_graphs
        self.wire = wire
        self.timeout_s = envs.get("TIMEOUT_S")
        self._agreement = Agreement(group, timeout_s=self.timeout_s)
        self.device = torch.device(device or self._agreement.device)
        if wire != "exact" and self.device.type != "cpu":
            raise NotImplementedError(f"wire={wire!r} on device type {self.device.type!r}")
        self.backend: Backend = (
            backend if isinstance(backend, Backend) else select_backend(backend, self.device)
        )
        self._forced_mesh = None if mesh is None else Mesh.of(mesh)
        self.topology = self._find_topology(group.size(), machines)
        if self._forced_mesh is not None:
            self._forced_mesh.require(num_ranks=group.size())
        self._agreement.require_equal(
            "options",
            f"{strategy} {schedule} {groups} {transport} {self.backend.name} {self._forced_mesh} "
            f"{wire} {'tuned' if self._tune else ''}",
        )
        self._comm: Communicator = create_communicator(
            transport, group, self.topology, timeout_s=self.timeout_s, device=self.device
        )
        self._runners: dict[AttentionShape, LayerRunner] = {}
        # What was agreed for this rank's sizes: the plan's number and its runner.
        self._latest: dict[tuple[LocalSizes, Hashable], tuple[int, LayerRunner]] = {}
        self._num_plans = 0
        self._num_calls = 0
        self._plan: Plan | None = None
        self._events: list[Event] | None = None
        self._streams: SideStreams | None = None
        self._planner: AutoPlanner | None = None
        self._predicted_us: dict[AttentionShape, tuple[float, float]] = {}
        self._attention_calls = 0

    def _find_topology(self, num_ranks: int, machines: int | Topology | None) -> Topology:
        if isinstance(machines, Topology):
            if machines.num_ranks != num_ranks:
                raise ValueError(
                    f"machines must place every rank of the group: it places {machines.num_ranks} "
                    f"ranks, the group has {num_ranks}"
                )
            return machines
        machines = envs.get("SP_MACHINES") if machines is None else machines
        if machines is None:
            return Topology.from_hosts(self._agreement.hosts())
        return Topology.split(num_ranks, machines)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        lengths: Hashable = None,
    ) -> Tensor:
        """softmax(scale q k^T) v, with this rank's queries and every rank's keys.

        Args:
            q: this rank's rows ``[B, s_q, H, D]``, any strides.
            k, v: this rank's rows ``[B, s_kv, H_kv, D]``, any strides. H_kv divides H; query head
                i uses head i // (H / H_kv). s_q and s_kv may differ and may be 0.
            scale: factor of the scores; by default 1 / sqrt(D).
            lengths: what the lengths of all ranks follow from, the same on every rank. On GPUs it
                must be given where lengths may change on some ranks only: ranks that launch a
                layer of other lengths cannot take it back. On CPU ranks notice by themselves.

        Returns:
            out ``[B, s_q, H, D]``, contiguous, the caller's own.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit each other, or that differ
                between ranks where they must not.
            PeerTimeout: a peer died or did not come within ``SWIFTFUSION_TIMEOUT_S``. The group
                cannot be used any more.
        """
        check_inputs(q, k, v, self.device)
        if self._forced_mesh is not None:
            self._forced_mesh.require(num_ranks=self._comm.size, num_heads=q.shape[2])
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _InferenceOnly.apply(self, q, k, v, scale, lengths)
        return self._attention(q, k, v, scale, lengths)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, lengths: Hashable
    ) -> Tensor:
        scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
        call = self._num_calls + 1
        mine = (LocalSizes.of(q, k), lengths)
        agreed = self._latest.get(mine)
        while True:
            plan_id, runner = agreed or self._agree(call, mine)
            self._comm.post((call, plan_id))
            try:
                out = runner.run(
                    q,
                    k,
                    v,
                    scale=scale,
                    context=f"attention call {call}",
                    on_wait=lambda: self._check_peers(call, plan_id),  # noqa: B023
                    events=self._events,
                )
                break
            except _Disagreement:
                agreed = None
            except Exception:
                # The layer stopped half way. If the ranks live on, they set up its flags anew.
                self._latest.clear()
                raise
        self._plan = runner.plan
        self._num_calls = call
        self._attention_calls += 1
        return out

    def _check_peers(self, call: int, plan_id: int) -> None:
        """Leave the layer if a peer is in the same call with another plan.

        Every rank needs rows of every other, through slots of its own plan, so none can finish a
        call in which one differs: all notice while they wait.
        """
        for peer in range(self._comm.size):
            if peer != self._comm.rank:
                their_call, their_plan = self._comm.peek(peer)
                if their_call == call and their_plan != plan_id:
                    raise _Disagreement

    def _agree(self, call: int, mine: tuple[LocalSizes, Hashable]) -> tuple[int, LayerRunner]:
        """Collective: learn every rank's lengths and take or make the plan for them."""
        self._comm.post((call, -1))
        gathered = self._agreement.gather(f"lengths of attention call {call}", mine[0])
        shape = shape_of([LocalSizes(*numbers) for numbers in gathered], wire=self.wire)
        # Nobody is inside a layer now; what a layer left behind when it was given up goes.
        for runner in self._runners.values():
            runner.reset_flags()
        if shape not in self._runners:
            self._runners[shape] = self._new_runner(shape)
        self._num_plans += 1
        while len(self._latest) >= MAX_AGREED:
            self._latest.pop(next(iter(self._latest)))
        self._latest[mine] = (self._num_plans, self._runners[shape])
        # Past this barrier no board asks for an agreement and all flags are ready for puts.
        self._comm.post((call, self._num_plans))
        self._agreement.barrier(f"flags of attention call {call}")
        return self._latest[mine]

    def _new_runner(self, shape: AttentionShape) -> LayerRunner:
        if len(self._runners) >= MAX_PLANS:
            oldest = next(iter(self._runners))
            runner = self._runners.pop(oldest)
            self._predicted_us.pop(oldest, None)
            self._latest = {k: v for k, v in self._latest.items() if v[1] is not runner}
            runner.close()
        plan = self._choose_plan(shape)
        if self._comm.rank == 0:
            logger.info(
                "%s: %s, %d rows, %d heads, %.1f MiB of symmetric memory a rank",
                self.strategy,
                plan.describe(),
                sum(shape.query_lengths),
                shape.num_heads,
                plan.symmetric_bytes / 2**20,
            )
        return self._make_runner(plan)

    def _choose_plan(self, shape: AttentionShape) -> Plan:
        """Collective: the planner's choice on GPUs; elsewhere the strategy's rule."""
        mesh, schedule = self._forced_mesh, self.schedule
        whole_sequence = self.backend.whole_sequence
        if whole_sequence:
            mesh = mesh or whole_sequence_mesh(self.topology)
            schedule = "pipelined" if schedule in ("auto", "fused") else schedule
        can_fuse = False
        if schedule == "fused" or (schedule == "auto" and self.device.type == "cuda"):
            refusal = self._not_fused_because(shape, mesh)
            can_fuse = not refusal
            if refusal and schedule == "fused":
                schedule, refusal = "pipelined", f"{refusal}; it is pipelined"
            if refusal and self._comm.rank == 0:
                logger.info("schedule fused: %s", refusal)
        if schedule == "fused":
            mesh = mesh or Mesh(ring=self._comm.size)
        is_open = (
            self.strategy == "torus"
            and (mesh is None or schedule == "auto")
            and not whole_sequence  # what such a kernel costs is not known
        )
        if is_open and self.device.type == "cuda" and self.topology.is_even:
            from swiftfusion_xdit.autoplan import AutoPlanner, near

            if self._planner is None:
                self._planner = AutoPlanner(self._agreement, self._comm, self.device)
            in_groups = self.schedule == "torus" and (self._forced_groups or 1) > 1
            choice = self._planner.choose(
                shape,
                degrees={"torus": 1} if in_groups and mesh is None else mesh,
                schedule=schedule,
                has_lse=self.backend.has_lse,
                can_fuse=can_fuse,
            )
            self._predicted_us[shape] = choice.prediction.layer_us, choice.prediction.floor_us
            if self._comm.rank == 0:
                logger.info("planned: %s", choice.describe())
            candidates = [choice.candidate, *(near(choice) if self._tune else ())]
            # The planner compares groups of fused calls; the plan has a rule for them.
            plans = [
                self._make_plan(shape, c.mesh, c.schedule)
                if c.schedule == "fused"
                else self._make_plan(
                    shape, c.mesh, c.schedule, c.groups_per_rank, c.edge_heads, c.whole_rounds
                )
                for c in candidates
            ]
            return self._fastest(plans)
        return self._make_plan(shape, mesh, schedule)

    def _fastest(self, plans: list[Plan]) -> Plan:
        """Collective: the plan that is fastest on this machine, if there are several."""
        if len(plans) == 1:
            return plans[0]
        from swiftfusion_xdit import tuning

        number, times_us = tuning.fastest(
            plans, self._make_runner, self._agreement, self._comm.rank, self.device
        )
        if self._comm.rank == 0:
            found = zip(plans, times_us, strict=True)
            texts = [f"{p.describe()} {us / 1e3:.3f} ms" for p, us in found]
            logger.info("timed: %s; taken: %s", "; ".join(texts), texts[number])
        return plans[number]

    def _make_plan(
        self,
        shape: AttentionShape,
        mesh: Mesh | None,
        schedule: str,
        groups: int = 0,
        edge: int = 0,
        whole_rounds: bool = False,
    ) -> Plan:
        if self._forced_groups:
            groups, edge = self._forced_groups, 0
        return make_plan(
            shape,
            self.topology,
            strategy=self.strategy,
            mesh=mesh,
            schedule=schedule,
            has_lse=self.backend.has_lse,
            whole_sequence=self.backend.whole_sequence,
            num_units=self._num_units(),
            groups_per_rank=groups,
            edge_heads=edge,
            whole_rounds=whole_rounds,
        )

    def _not_fused_because(self, shape: AttentionShape, mesh: Mesh | None) -> str:
        """Why no fused call serves these layers, or nothing; the same on all ranks."""
        mesh = mesh or Mesh(ring=self._comm.size)
        if reason := not_fused_because(shape, mesh, self.topology):
            return reason
        if self.device.type == "cpu":
            return ""  # ranks on CPUs wait first and attend then
        if not self._comm.addressable:
            return "peers cannot write to this rank's memory"
        return self.backend.not_fused_because(
            dtype=shape.dtype,
            head_dim=shape.head_dim,
            shared_by=shape.num_heads // shape.num_kv_heads,
            tile_rows=FUSED_TILE_ROWS,
        )

    def _make_runner(self, plan: Plan) -> LayerRunner:
        if not self._comm.addressable:
            return LayerRunner(plan, self._comm, self.backend)
        from swiftfusion_xdit import device_runtime, native

        if self._streams is None:
            self._streams = device_runtime.SideStreams(self.device)
        return device_runtime.DeviceRunner(
            plan,
            self._comm,
            self.backend,
            native=native.load(),
            streams=self._streams,
            layer_graphs=self._layer_graphs,
        )

    def _num_units(self) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    @property
    def plan(self) -> Plan | None:
        """The plan of the last call; None before the first."""
        return self._plan

    @property
    def predicted_us(self) -> tuple[float, float] | None:
        """What the planner predicted for layers like the last one, and for their attention alone.

        None where it was not asked: on CPUs, and where mesh and schedule were both given.
        """
        return self._predicted_us.get(self._plan.shape) if self._plan else None

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the last call; the forced one, or None, before the first."""
        return self._plan.mesh if self._plan else self._forced_mesh

    def stats(self) -> dict[str, Any]:
        """What this rank has sent since ``reset_stats``.

        Returns:
            ``{"same_machine": {"bytes", "messages"}, "across_machines": {...},
            "attention_calls": n}``
        """
        links = self._comm.counters.as_dict()
        sent = {link: links[link] for link in ("same_machine", "across_machines")}
        return {**sent, "attention_calls": self._attention_calls}

    def reset_stats(self) -> None:
        self._comm.counters.reset()
        self._attention_calls = 0

    @contextmanager
    def record(self) -> Iterator[list[Event]]:
        """Collect one event a step, on the clock that all processes of a host share."""
        events: list[Event] = []
        self._events = events
        try:
            yield events
        finally:
            self._events = None

    def describe(self) -> str:
        """One line: strategy, mesh, schedule, machines, symmetric memory."""
        text = f"strategy {self.strategy}, {self.topology.num_machines} machines"
        if self._plan is None:
            return f"{text}, no call yet"
        held = sum(runner.plan.symmetric_bytes for runner in self._runners.values())
        return f"{text}, {self._plan.describe()}, {held} bytes of symmetric memory"

    def close(self) -> None:
        """Give all symmetric memory back. Not collective; may be called twice."""
        self._runners.clear()
        self._latest.clear()
        self._comm.close()

    def __enter__(self) -> SequenceParallel:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _InferenceOnly(torch.autograd.Function):
    """Lets the forward pass run where gradients are on; asking for one is an error."""

    @staticmethod
    def forward(
        ctx: Any, sp: SequenceParallel, q: Tensor, k: Tensor, v: Tensor, scale: Any, lengths: Any
    ) -> Any:
        return sp._attention(q, k, v, scale, lengths)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("sequence-parallel attention has no backward pass")


def _require(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
