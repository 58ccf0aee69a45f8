"""Chooses mesh and schedule of an attention layer by simulated time.

`plan` is a pure function of a cluster and a shape: ranks that describe their cluster alike decide
alike. It simulates only what may win: candidates are tried in the order of a lower bound on their
time, and one whose bound is above the best time so far is out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest

from swiftfusion_xdit.mesh import Mesh, paper_mesh
from swiftfusion_xdit.planner.bounds import (
    even_shape,
    lower_bound_us,
    num_messages,
    transfers_dominate,
    transfers_over_attention,
)
from swiftfusion_xdit.planner.candidates import (
    KNOWN_SCHEDULES,
    STRATEGIES,
    Candidate,
    check_degrees,
    fits,
    parse_degrees,
    schedules_of,
    schedules_on,
    sort_meshes,
)
from swiftfusion_xdit.planner.memory import layer_shape, symmetric_bytes
from swiftfusion_xdit.planner.outcome import Choice, Outcome, Prediction, ranked, slower
from swiftfusion_xdit.simulate.cost import Costs
from swiftfusion_xdit.simulate.hardware import Cluster
from swiftfusion_xdit.simulate.layer import simulate_layer
from swiftfusion_xdit.simulate.paper import STOCK_MERGE_PASSES
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import Transport, one_sided, stock

__all__ = ["POLICIES", "Candidate", "Choice", "Outcome", "Prediction", "layer_shape", "plan"]

POLICIES = ("fastest", "paper")
ONE_SIDED = one_sided()
STOCK = stock()
MEMORY_SHARE = 0.25  # of a GPU's memory that slots may take, where the caller sets no limit
# Relative: a gain below it is not searched for; the simulator is not that exact.
WORTHWHILE = 0.02
SIMULATED_WITHIN = 0.06  # about the mean error of layers that two H100 ran
QUICK = 2000  # simulated operations: some 30 ms
THOROUGH = 60_000  # some seconds
SHOWN = 0.1  # of the messages' latencies, by a guess that only orders the search


def plan(
    cluster: Cluster,
    shape: LayerShape,
    degrees: Mesh | Mapping[str, int] | str | None = None,
    *,
    policy: str = "fastest",
    strategies: Iterable[str] = ("torus",),
    schedules: Iterable[str] | None = None,
    has_lse: bool = True,
    transport: Transport = ONE_SIDED,
    memory_limit_bytes: int | None = None,
    effort: int | None = QUICK,
) -> Choice:
    """Choose how to run a layer.

    Args:
        cluster: the machines and GPUs of the group.
        shape: one attention layer; rows and heads may be uneven.
        degrees: axes that are fixed, e.g. ``{"ring": 4}`` or ``"ring=4"``; the others are free.
        policy: ``fastest``, or ``paper``: SwiftFusion's rule ``P_u = gcd(N * M, H)``, Ulysses
            across machines and Ring inside, with Torus Attention.
        strategies: of ``usp`` and ``tas``, which run over xDiT's collectives, and ``torus``.
        schedules: those that ``torus`` may take; by default all that the cluster can run.
        has_lse: whether the attention kernel gives a log-sum-exp; if not, only ``pipelined`` fits.
        transport: of ``torus``.
        memory_limit_bytes: of symmetric memory on a GPU; by default a quarter of what it has.
        effort: operations to simulate before the best so far is taken, counted, so that ranks
            stop alike; what cannot win by more than 2 % is left out. None: predict all.

    Raises:
        ValueError: unknown names, degrees that no mesh has, or nothing that fits the limits.
    """
    fixed = parse_degrees(degrees)
    schedules = schedules_of(cluster) if schedules is None else schedules
    names = tuple(dict.fromkeys(strategies)), tuple(dict.fromkeys(schedules))
    _require_known("policy", (policy,), POLICIES)
    _require_known("strategies", names[0], STRATEGIES)
    _require_known("schedules", names[1], KNOWN_SCHEDULES)
    limit = int(MEMORY_SHARE * cluster.gpu.memory_gib * 2**30)
    if memory_limit_bytes is not None:
        limit = memory_limit_bytes
    fits(cluster, shape)
    check_degrees(fixed, num_ranks=cluster.num_ranks, num_heads=shape.num_heads)
    question = Question(
        cluster, shape, tuple(fixed.items()), policy, *names, has_lse, transport, limit, effort
    )
    return _answer(question)


@dataclass(frozen=True)
class Question:
    """The checked arguments of ``plan``."""

    cluster: Cluster
    shape: LayerShape
    degrees: tuple[tuple[str, int], ...]
    policy: str
    strategies: tuple[str, ...]
    schedules: tuple[str, ...]
    has_lse: bool
    transport: Transport
    memory_limit_bytes: int
    effort: int | None

    @property
    def paper_mesh(self) -> Mesh:
        return paper_mesh(self.cluster.topology, self.shape.num_heads)

    def transport_of(self, candidate: Candidate) -> Transport:
        return self.transport if candidate.strategy == "torus" else STOCK

    def in_rounds(self, candidate: Candidate) -> Candidate:
        """The candidate with its transfers in whole rounds, if they dominate the layer.

        A ring's are one round: whole, they would leave its head groups nothing to hide.
        """
        if candidate.strategy != "torus" or _is_ring(candidate):
            return candidate
        even = even_shape(self.shape, candidate.mesh)
        whole = transfers_dominate(candidate, even, self.cluster, self.transport)
        return replace(candidate, whole_rounds=whole)

    def is_slow_ring(self, candidate: Candidate) -> bool:
        """A ring between machines whose links take longer than attention.

        Nothing of it awaits attention to be sent.
        """
        if not _is_ring(candidate):
            return False
        even = even_shape(self.shape, candidate.mesh)
        return transfers_over_attention(candidate, even, self.cluster, self.transport) >= 1

    def is_simplest(self, candidate: Candidate) -> bool:
        """Whether others must win clearly, so that a tie is reason enough to simulate it."""
        return candidate.schedule == "fused" or self.is_slow_ring(candidate)

    def predict(self, candidate: Candidate) -> tuple[Prediction, int]:
        """What a candidate takes, and how many operations that was to simulate."""
        shape, transport = even_shape(self.shape, candidate.mesh), self.transport_of(candidate)
        layer = simulate_layer(
            candidate.schedule,
            candidate.mesh,
            shape,
            self.cluster,
            inside=transport,
            across=transport,
            groups_per_rank=candidate.groups_per_rank,
            edge_heads=candidate.edge_heads,
            costs=Costs(
                self.cluster.gpu,
                merge_passes=1.0 if candidate.strategy == "torus" else STOCK_MERGE_PASSES,
            ),
            whole_rounds=candidate.whole_rounds,
        )
        found = Prediction(
            layer_us=layer.total_us,
            floor_us=layer.floor_us,
            attention_us=layer.attention_us,
            exposed_us=layer.exposed_us,
            bytes_across=round(layer.bytes_across),
            symmetric_bytes=symmetric_bytes(candidate, shape),
        )
        return found, len(layer.graph.ops)


@lru_cache(maxsize=256)
def _answer(question: Question) -> Choice:
    candidates, lost = _candidates(question)
    candidates = [question.in_rounds(candidate) for candidate in candidates]
    predicted: list[Outcome] = []
    best_us, num_ops = float("inf"), 0
    for bound_us, candidate in _by_promise(question, candidates):
        margin = SIMULATED_WITHIN if question.is_simplest(candidate) else -WORTHWHILE
        if question.effort is not None and bound_us > best_us * (1 + margin):
            reason = f"takes {bound_us / 1e3:.3f} ms at least"
            lost.append(Outcome(candidate, None, reason))
            continue
        if question.effort is not None and num_ops >= question.effort and predicted:
            lost.append(Outcome(candidate, None, "promised less than what was simulated"))
            continue
        found, more = question.predict(candidate)
        num_ops += more
        if found.symmetric_bytes > question.memory_limit_bytes:
            lost.append(Outcome(candidate, None, _too_large(found, question)))
            continue
        predicted.append(Outcome(candidate, found))
        best_us = min(best_us, found.layer_us)
    if not predicted:
        reasons = "; ".join(f"{outcome.candidate}: {outcome.reason}" for outcome in lost)
        raise ValueError(f"no mesh and schedule fit: {reasons or 'there are none'}")
    best, *others = _simplest_first(question, ranked(predicted, question.paper_mesh))
    assert best.prediction is not None
    told = [replace(outcome, reason=slower(outcome, best.prediction)) for outcome in others]
    return Choice(question.policy, best.candidate, best.prediction, (*told, *lost))


def _simplest_first(question: Question, outcomes: list[Outcome]) -> list[Outcome]:
    """What has the least that the simulator may not know of: others must win clearly.

    Of slow rings the one of the most head groups: over TCP they hid more than is simulated.

    Args:
        outcomes: predicted ones, best first.
    """

    def close_to(best: Outcome, margin: float, outcomes: list[Outcome]) -> list[Outcome]:
        most_us = (1 + margin) * _layer_us(best)
        return [outcome for outcome in outcomes if _layer_us(outcome) <= most_us]

    simplest = [o for o in outcomes if question.is_simplest(o.candidate)]
    simplest = close_to(outcomes[0], SIMULATED_WITHIN, simplest)
    if not simplest:
        return outcomes
    best = simplest[0]
    if question.is_slow_ring(best.candidate):
        alike = close_to(best, WORTHWHILE, simplest)
        best = max(alike, key=lambda outcome: outcome.candidate.groups_per_rank)
    return [best, *(other for other in outcomes if other is not best)]


def _layer_us(outcome: Outcome) -> float:
    assert outcome.prediction is not None
    return outcome.prediction.layer_us


def _is_ring(candidate: Candidate) -> bool:
    """All heads on every rank, keys coming round; not ``fused`` or ``pipelined`` on that mesh."""
    return candidate.mesh.num_head_groups == 1 and candidate.schedule == "torus"


def _candidates(question: Question) -> tuple[list[Candidate], list[Outcome]]:
    topology, heads = question.cluster.topology, question.shape.num_heads
    schedules = question.schedules
    if topology.num_machines > 1:  # a fused call reads flags that peers of its machine write
        schedules = tuple(name for name in schedules if name != "fused")
        if not schedules:
            raise ValueError(
                f"schedule fused works inside one machine, got {topology.num_machines} machines"
            )
    if not question.has_lse:
        schedules = tuple(name for name in schedules if name == "pipelined")
        if not schedules:
            raise ValueError(
                f"schedules {', '.join(question.schedules)} merge partial outputs and need an "
                "attention kernel with a log-sum-exp; allow pipelined"
            )
    if question.policy == "paper":
        name = "torus" if question.has_lse else "pipelined"
        return [Candidate("torus", question.paper_mesh, name)], []
    candidates: list[Candidate] = []
    lost: list[Outcome] = []
    for strategy in question.strategies:
        good, bad = sort_meshes(strategy, topology, heads, dict(question.degrees))
        for mesh in good:
            candidates += schedules_on(
                strategy, mesh, question.shape, topology.num_machines, schedules=schedules
            )
        name = schedules[0] if strategy == "torus" else "usp"
        lost += [Outcome(Candidate(strategy, mesh, name), None, reason) for mesh, reason in bad]
    return candidates, lost


def _by_promise(question: Question, candidates: list[Candidate]) -> list[tuple[float, Candidate]]:
    """Candidates with their lower bounds, each schedule's most promising in turn.

    Promising are a low bound and few, large messages. Bounds of different schedules say little
    about one another: how much they leave out differs.
    """
    promise: dict[str, list[tuple[float, int, float]]] = {}
    for index, candidate in enumerate(candidates):
        even, transport = (
            even_shape(question.shape, candidate.mesh),
            question.transport_of(candidate),
        )
        bound_us = lower_bound_us(candidate, even, question.cluster, transport)
        overhead_us = SHOWN * question.cluster.inside.latency_us * num_messages(candidate)
        family = promise.setdefault(candidate.strategy + candidate.schedule, [])
        family.append((bound_us + overhead_us, index, bound_us))
    turns = zip_longest(*(sorted(family) for family in promise.values()))
    ordered = [entry for turn in turns for entry in turn if entry is not None]
    # The paper's rule comes first: the search then never ends with less. What is preferred is next.
    rule = question.paper_mesh, "torus"

    def place(entry: tuple[float, int, float]) -> int:
        candidate = candidates[entry[1]]
        if (candidate.mesh, candidate.schedule) == rule:
            return 0
        return 1 if question.is_simplest(candidate) else 2

    ordered.sort(key=place)
    return [(bound_us, candidates[index]) for _, index, bound_us in ordered]


def _too_large(found: Prediction, question: Question) -> str:
    return (
        f"needs {found.symmetric_bytes / 2**20:.0f} MiB of symmetric memory, the limit is "
        f"{question.memory_limit_bytes / 2**20:.0f} MiB"
    )


def _require_known(what: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not given or not set(given) <= set(known):
        raise ValueError(f"{what} must be of {', '.join(known)}, got {', '.join(given)!r}")
