"""The layer benchmark with peers: their cases take part in checks, turns, graphs and gathering."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers import PEERS, Mode, Setting
from swiftfusion_xdit.cli.bench_config import BenchConfig, Case, Shape
from swiftfusion_xdit.cli.bench_parts import Ranks
from swiftfusion_xdit.cli.bench_ranks import Layer, LayerBench
from swiftfusion_xdit.cli.bench_stock import NotRunnable, StockUsp


@dataclass(frozen=True, kw_only=True)
class PeerCase(Case):
    """One mode of one peer. ``kind`` is ``peer``, or ``lossy`` where it rounds on the wire."""

    peer: str
    mode: Mode

    @property
    def name(self) -> str:
        return f"{PEERS[self.peer].name} {self.mode.name}".strip()


@dataclass(frozen=True, kw_only=True)
class PeerConfig(BenchConfig):
    """``BenchConfig`` with the cases of ``peers`` behind its own."""

    peers: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [name for name in self.peers if name not in PEERS]
        if wrong or len(set(self.peers)) < len(self.peers):
            known = ", ".join(PEERS)
            raise ValueError(f"--peers must be of {known}, each once; got {','.join(self.peers)!r}")

    @property
    def bench_type(self) -> type[LayerBench]:
        return PeerBench

    @property
    def setting(self) -> Setting:
        return Setting(self.device, self.ranks, self.backends)

    def cases(self) -> list[Case]:
        return [*super().cases(), *(case for name in self.peers for case in self._peer(name))]

    def _peer(self, name: str) -> list[Case]:
        peer, setting = PEERS[name], self.setting
        reason = peer.reason(setting)
        modes = [Mode("", reason=reason)] if reason else peer.modes(setting)
        return [
            PeerCase(
                kind="lossy" if mode.max_error is not None else "peer",
                backend=mode.backend,
                peer=name,
                mode=mode,
            )
            for mode in modes
        ]


class PeerBench(LayerBench):
    """Makes each peer's layer once; all ranks agree on whether it can be made."""

    def __init__(
        self, config: BenchConfig, shape: Shape, ranks: Ranks, stock: StockUsp, resources: ExitStack
    ) -> None:
        super().__init__(config, shape, ranks, stock, resources)
        self._layers: dict[Case, Layer] = {}
        self._pool: Any = None

    def layer(self, case: Case) -> Layer:
        if not isinstance(case, PeerCase):
            return super().layer(case)
        if case not in self._layers:
            self._layers[case] = self._make(case)
        PEERS[case.peer].activate(case.mode)
        return self._layers[case]

    def _make(self, case: PeerCase) -> Layer:
        failure, layer = case.mode.reason or None, None
        if failure is None:
            try:
                layer = PEERS[case.peer].layer(case.mode, self.shape, *self.rows)
            except NotRunnable as error:
                failure = str(error)
            except Exception as error:
                failure = f"{type(error).__name__}: {str(error).strip()[:200]}"
        failure = self.ranks.first_failure(failure)
        if failure is not None:
            raise NotRunnable(failure)
        assert layer is not None
        return layer

    def _check(self, case: Case) -> None:
        super()._check(case)
        if self.measured[case].failure is not None:
            self._layers.pop(case, None)  # with the memory that it may hold

    def _max_error(self, case: Case) -> float:
        if isinstance(case, PeerCase) and case.mode.max_error is not None:
            return case.mode.max_error
        return super()._max_error(case)

    def _capture(self, case: Case) -> None:
        if isinstance(case, PeerCase) and case.mode.graph_reason:
            self.measured[case].graph_failure = case.mode.graph_reason
            return
        super()._capture(case)
        if self.measured[case].graph_failure is not None:
            self._pool = None  # a capture that failed may have left it unusable

    def _graph_pool(self, case: Case) -> Any:
        """One for all peers: many graphs of large layers do not fit, each with its own."""
        if not isinstance(case, PeerCase):
            return None
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool
