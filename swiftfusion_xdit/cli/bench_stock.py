"""xDiT's own USP function, unmodified, as `swiftfusion bench layer` times it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor

from swiftfusion_xdit.cli.bench_config import XDIT_BACKENDS, BenchConfig, Case, Shape
from swiftfusion_xdit.mesh import Mesh, paper_mesh
from swiftfusion_xdit.topology import Topology

GROUPS = ("_MODEL_REPLICA", "_DP", "_CFG", "_SP", "_TP", "_PP", "_FS", "_VAE", "_DIT")
RANK_GROUPS = ("ULYSSES_PG", "RING_PG")


class NotRunnable(RuntimeError):
    """xDiT cannot run this case at all; every rank finds the same reason."""


class StockUsp:
    """xDiT's USP on any of the groups that it, or ``--sp-strategy tas``, makes.

    xDiT knows one set of groups at a time; each set is made once and put in place when its case
    has its turn.
    """

    def __init__(self, config: BenchConfig) -> None:
        self._config = config
        self._groups: dict[tuple[str, Mesh], dict[str, Any]] = {}

    @cached_property
    def _problem(self) -> str | None:
        """Import xDiT; why that does not work, if it does not."""
        try:
            # Strategy usp leaves xDiT as it is, and lets it run where there is no GPU.
            import swiftfusion_xdit

            swiftfusion_xdit.enable("usp")
            import xfuser.model_executor.layers.usp as usp
        except Exception as error:
            return f"xfuser cannot be imported: {type(error).__name__}: {error}"
        if usp.USP.__code__.co_filename != usp.__file__:
            return "USP is not xDiT's own: another plugin has replaced it"
        self._usp = usp
        return None

    def layer(
        self, case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor
    ) -> Callable[[], Tensor]:
        """Put the groups of ``case`` in place; the function that runs one layer. Collective.

        q, k, v: this rank's rows ``[B, S / ranks, H, D]``; the function returns the same layout.

        Raises:
            NotRunnable: xfuser is missing, or rows or heads do not divide as xDiT needs it.
        """
        if self._problem:
            raise NotRunnable(self._problem)
        mesh = self._mesh(case, shape)
        if shape.rows % self._config.ranks:
            raise NotRunnable(
                f"{shape.rows} rows do not divide by {self._config.ranks} ranks, as xDiT needs"
            )
        if shape.heads % mesh.num_head_groups:
            raise NotRunnable(
                f"{shape.heads} heads do not divide by the Ulysses degree {mesh.num_head_groups}"
            )
        self._use_groups(case.kind, mesh)
        backend = self._usp.AttentionBackendType[XDIT_BACKENDS[case.backend]]
        combined = case.combined
        usp = self._usp.USP
        # As xDiT's models call it: views of [B, S, H, D], heads before rows.
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return lambda: usp(q, k, v, combine_qkv_a2a=combined, backend=backend).transpose(1, 2)

    def _mesh(self, case: Case, shape: Shape) -> Mesh:
        if case.kind == "usp":
            return Mesh(ulysses=case.ulysses, ring=case.ring)
        machines = Topology.split(self._config.ranks, self._config.machines)
        return paper_mesh(machines, shape.heads)

    def _use_groups(self, kind: str, mesh: Mesh) -> None:
        from xfuser.core.distributed import parallel_state
        from yunchang.globals import PROCESS_GROUP

        key = (kind, mesh)
        if key not in self._groups:
            for name in GROUPS:
                setattr(parallel_state, name, None)
            self._start(kind, mesh)
            groups = {name: getattr(parallel_state, name) for name in GROUPS}
            groups |= {name: getattr(PROCESS_GROUP, name) for name in RANK_GROUPS}
            self._groups[key] = groups
        for name, group in self._groups[key].items():
            setattr(PROCESS_GROUP if name in RANK_GROUPS else parallel_state, name, group)
        sp = parallel_state.get_sp_group()
        degrees = (sp.ulysses_world_size, sp.ring_world_size)
        assert degrees == (mesh.num_head_groups, mesh.ring), (degrees, mesh)

    def _start(self, kind: str, mesh: Mesh) -> None:
        """A runtime state of xDiT over all ranks, with groups of these degrees."""
        import xfuser
        from xfuser.core.distributed import init_distributed_environment, initialize_runtime_state

        init_distributed_environment()
        on_cpu = self._config.device == "cpu"
        config, _ = xfuser.xFuserArgs(
            model="bench",
            ulysses_degree=mesh.num_head_groups,
            ring_degree=mesh.ring,
            # Every call names its kernel; this one only has to pass xDiT's check for Ring.
            attention_backend="SDPA_FLASH" if on_cpu else "CUDNN",
        ).create_config()
        initialize_runtime_state(_Pipeline(mesh.num_head_groups), config)
        if kind == "tas":
            self._lay_out_tas(config.parallel_config, mesh)

    def _lay_out_tas(self, parallel_config: Any, mesh: Mesh) -> None:
        from swiftfusion_xdit.xdit import groups
        from swiftfusion_xdit.xdit.options import Options
        from swiftfusion_xdit.xdit.patches import Patches

        options = Options(strategy="tas", machines=self._config.machines, mesh=mesh)
        # Never undone: the groups that it changes are this case's own.
        groups.lay_out_tas(parallel_config, options, None, Patches())


class _Pipeline:
    """As much of a pipeline as xDiT's runtime state looks at."""

    def __init__(self, num_heads: int) -> None:
        class Config(dict):
            num_attention_heads = num_heads

        self.transformer = type("Transformer", (), {"config": Config()})
