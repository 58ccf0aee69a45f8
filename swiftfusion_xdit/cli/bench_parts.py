"""What the ranks of `swiftfusion bench layer` keep about each case, and how they agree."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from swiftfusion_xdit.attention import Backend
from swiftfusion_xdit.cli.bench_config import Case

SEED = 1234
T = TypeVar("T")


class NoAttention(Backend):
    """Leaves the kernel out: fresh memory of the right shapes, so that only transfers are timed."""

    has_lse = True

    def __init__(self, real: Backend) -> None:
        super().__init__(real.device)
        self.name, self.device_type, self.dtypes = (  # type: ignore[misc]
            real.name,
            real.device_type,
            real.dtypes,
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch, rows, heads, _ = q.shape
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
        return (torch.empty_like(q) if out is None else out), lse


@dataclass
class Measured:
    """What this rank found about one case."""

    relative_error: float | None = None
    failure: str | None = None
    graph_failure: str | None = None
    graph_same_bits: bool | None = None
    plan: str | None = None
    predicted_of_floor: float | None = None
    bytes_across: int = 0  # that this rank sends to other machines in a layer
    layers: int = 0
    eager_ms: list[float] = field(default_factory=list)
    graph_ms: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)


class Orders:
    """Orders of what is compared, one for each round; alike on all ranks, and in every run.

    What ran before decides how hot a GPU is and how high it clocks. So nothing comes after what it
    came after in the round before, as far as that can be, and the rest is drawn.
    """

    TRIES = 50

    def __init__(self) -> None:
        self._random = random.Random(SEED)
        self._before: dict[Any, Any] = {}  # of each one, what it came after
        self._last: Any = None

    def draw(self, items: Sequence[T]) -> list[T]:
        """All of ``items``, which are hashable, for the next round."""
        orders = (self._random.sample(items, len(items)) for _ in range(self.TRIES))
        chosen = min(orders, key=self._num_repeated)
        self._before = self._pairs(chosen)
        self._last = chosen[-1] if chosen else None
        return chosen

    def _pairs(self, order: list[T]) -> dict[Any, Any]:
        return dict(zip(order, [self._last, *order], strict=False))

    def _num_repeated(self, order: list[T]) -> int:
        return sum(self._before.get(item) == before for item, before in self._pairs(order).items())


class Ranks:
    """Small agreements between the ranks, on the host, beside the group that is measured."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._group = dist.new_group(backend="gloo")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self._group)

    def first_failure(self, failure: str | None) -> str | None:
        """The same answer on every rank: None if none has failed."""
        failures = self.gather(failure)
        found = [(rank, text) for rank, text in enumerate(failures) if text]
        if not found:
            return None
        everywhere = len(found) == self.size
        return found[0][1] if everywhere else f"rank {found[0][0]}: {found[0][1]}"


def joined(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One case's findings of all ranks: a turn took as long as its slowest rank."""

    def slowest(name: str) -> list[float]:
        turns = zip(*(rank[name] for rank in ranks), strict=True)
        return [round(max(turn), 5) for turn in turns]

    errors = [rank["relative_error"] for rank in ranks if rank["relative_error"] is not None]
    same = [rank["graph_same_bits"] for rank in ranks if rank["graph_same_bits"] is not None]
    return {
        "kind": case.kind,
        "name": case.name,
        "backend": case.backend,
        "schedule": case.schedule or None,
        "mesh": case.mesh,
        "transport": case.transport,
        "layer_graphs": case.layer_graphs,
        "plan": ranks[0]["plan"],
        "predicted_of_floor": ranks[0]["predicted_of_floor"],
        "bytes_across": max(rank["bytes_across"] for rank in ranks),
        "relative_error": max(errors, default=None),
        "failure": ranks[0]["failure"],
        "graph_failure": ranks[0]["graph_failure"],
        "graph_same_bits": all(same) if same else None,
        "layers_per_turn": ranks[0]["layers"],
        "eager_ms": slowest("eager_ms"),
        "graph_ms": slowest("graph_ms"),
        "host_us": slowest("host_us"),
    }
