"""What `swiftfusion bench layer` runs: shapes, and the ways to run one attention layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from swiftfusion_xdit.envs import SCHEDULES, TRANSPORTS
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule import GROUPED

STRATEGIES = ("usp", "tas", "torus")
# Largest relative error against attention in fp64 that is rounding and no mistake.
MAX_ERROR = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
# A local kernel here and the backend of xDiT that runs the same one.
XDIT_BACKENDS = {
    "cpu": "SDPA_FLASH",
    "cudnn": "CUDNN",
    "fa2": "FLASH",
    "fa3": "FLASH_3",
    "fa4": "FLASH_4",
    "sdpa_flash": "SDPA_FLASH",
}


@dataclass(frozen=True)
class Shape:
    """One attention layer over a whole group: ``[batch, rows, heads, head_dim]``."""

    name: str
    batch: int
    rows: int
    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if min(self.batch, self.rows, self.heads, self.head_dim) < 1:
            raise ValueError(f"--shapes: B, S, H and D must be at least 1, got {self.name}")


# Batch 1; text and image or video tokens of the model at that size.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("flux1024", 1, 4608, 24, 128),
        Shape("flux2048", 1, 16896, 24, 128),
        Shape("flux3072", 1, 37376, 24, 128),
        Shape("cogvideox", 1, 17776, 48, 64),
        Shape("wan480", 1, 32760, 40, 128),
        Shape("wan720", 1, 75600, 40, 128),
    )
}


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Names and custom ``B,S,H,D``, all separated by commas, as in ``flux1024,1,4608,24,128``.

    Raises:
        ValueError: an unknown name, or numbers that are not in fours.
    """
    rule = f"--shapes takes names ({', '.join(SHAPES)}) and custom B,S,H,D"
    shapes: list[Shape] = []
    words = [word.strip() for word in text.split(",")]
    while words:
        if words[0] in SHAPES:
            shapes.append(SHAPES[words.pop(0)])
            continue
        numbers, words = words[:4], words[4:]
        if len(numbers) < 4 or not all(number.isdecimal() for number in numbers):
            raise ValueError(f"{rule}; got {','.join(numbers)!r} in {text!r}")
        shapes.append(Shape("x".join(numbers), *map(int, numbers)))
    if len(set(shapes)) < len(shapes):
        raise ValueError(f"--shapes must name each shape once, got {text!r}")
    return tuple(shapes)


@dataclass(frozen=True)
class Case:
    """One way to run the layer.

    ``kind`` is ``floor`` (the local kernel alone on this rank's share of the heads), ``torus``
    (``SequenceParallel`` with ``schedule``, over ``transport`` where several are compared), ``usp``
    (xDiT's own function at ``ulysses`` x ``ring``), ``tas`` (the same on the groups of
    ``--sp-strategy tas``) or ``comm`` (``torus`` with the attention kernel left out).
    """

    kind: str
    backend: str
    schedule: str = ""
    groups: int | None = None
    mesh: str | None = None
    ulysses: int = 1
    ring: int = 1
    transport: str | None = None
    layer_graphs: bool | None = None  # None: as SWIFTFUSION_LAYER_GRAPHS says, by default auto
    combined: bool = False  # xDiT's: q, k and v in one all-to-all, as some of its models ask for

    @property
    def is_stock(self) -> bool:
        return self.kind in ("usp", "tas")

    @property
    def name(self) -> str:
        if self.kind == "floor":
            return f"floor: {self.backend} alone"
        combined = " combined" if self.combined else ""
        if self.kind == "usp":
            return f"xDiT usp u{self.ulysses} r{self.ring}{combined} {XDIT_BACKENDS[self.backend]}"
        if self.kind == "tas":
            return f"xDiT tas{combined} {XDIT_BACKENDS[self.backend]}"
        text = f"torus/{self.schedule} {self.backend}" + (f" {self.mesh}" if self.mesh else "")
        text += f" in {self.groups} groups" if self.groups else ""
        text += f" over {self.transport}" if self.transport else ""
        if self.layer_graphs is not None:
            text += " with layer graphs" if self.layer_graphs else " without layer graphs"
        return f"communication alone: {text}" if self.kind == "comm" else text


@dataclass(frozen=True)
class BenchConfig:
    """The checked arguments of ``bench layer``.

    Raises:
        ValueError: naming the argument, its rule and the values.
    """

    device: str
    shapes: tuple[Shape, ...]
    strategies: tuple[str, ...]
    schedules: tuple[str, ...]
    backends: tuple[str, ...]
    groups: tuple[int, ...]
    meshes: tuple[str | None, ...]
    ranks: int
    machines: int
    transports: tuple[str, ...]
    dtype: str
    graph: bool
    stock_graph: bool
    layer_graphs: bool
    parts: bool
    tcp: bool
    rounds: int | None
    seconds: float
    timeout_s: float

    def __post_init__(self) -> None:
        for name, least in (("ranks", 2), ("machines", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if any(groups < 1 for groups in self.groups):
            raise ValueError(f"--groups must be at least 1 each, got {self.groups}")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {self.rounds}")
        if self.ranks % self.machines:
            raise ValueError(
                f"--machines must divide --ranks: {self.ranks} ranks on {self.machines} machines"
            )
        for name in ("seconds", "timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                flag = f"--{name.removesuffix('_s')}"
                raise ValueError(f"{flag} must be a positive number, got {getattr(self, name)}")
        _require_known("strategies", self.strategies, STRATEGIES)
        _require_known("schedules", self.schedules, SCHEDULES)
        on_cpu = self.device == "cpu"
        kernels = tuple(name for name in XDIT_BACKENDS if (name == "cpu") == on_cpu)
        _require_known("backends", self.backends, kernels)
        _require_known("transport", self.transports, TRANSPORTS)
        _require_known("dtype", (self.dtype,), tuple(MAX_ERROR))
        if not on_cpu and self.dtype == "float32":
            raise ValueError("--dtype on a GPU must be bfloat16 or float16, got float32")
        if on_cpu and (self.graph or self.stock_graph or self.layer_graphs or self.tcp):
            raise ValueError("--graph, --stock-graph, --layer-graphs and --tcp need --device cuda")
        self._check_meshes()

    def _check_meshes(self) -> None:
        for mesh, shape in itertools.product(self.meshes, self.shapes):
            if mesh is not None:
                try:
                    Mesh.parse(mesh).require(num_ranks=self.ranks, num_heads=shape.heads)
                except ValueError as error:
                    raise ValueError(f"--mesh {mesh} for {shape.name}: {error}") from None
        for shape in self.shapes:
            if shape.heads < self.ranks:
                raise ValueError(
                    f"--shapes: {shape.name} has {shape.heads} heads, and the floor needs at least "
                    f"one for each of {self.ranks} ranks"
                )

    def cases(self) -> list[Case]:
        """Every way to run a layer, floors first, the same for each shape."""
        cases = [Case("floor", backend) for backend in self.backends]
        for backend, strategy in itertools.product(self.backends, self.strategies):
            if strategy == "torus":
                cases += self._torus(backend)
            else:
                cases += self._stock(strategy, backend)
        return cases

    def _torus(self, backend: str) -> list[Case]:
        kinds = ("torus", "comm") if self.parts else ("torus",)
        transports = self.transports if len(self.transports) > 1 else (None,)
        cases = [
            Case(kind, backend, schedule=schedule, groups=groups, mesh=mesh, transport=transport)
            for kind in kinds
            for transport in transports
            for schedule in self.schedules
            for mesh in self.meshes
            for groups in (None, *self._groups(schedule, mesh))
        ]
        if not self.layer_graphs:
            return cases
        first = [replace(c, layer_graphs=False) if c.kind == "torus" else c for c in cases]
        return first + [replace(c, layer_graphs=True) for c in cases if c.kind == "torus"]

    def _groups(self, schedule: str, mesh: str | None) -> tuple[int, ...]:
        """Head groups to force; `torus` has some only without a torus axis."""
        has_torus_axis = Mesh.parse(mesh).torus > 1 if mesh else self.machines > 1
        if schedule not in GROUPED or (schedule == "torus" and has_torus_axis):
            return ()
        return self.groups

    def _stock(self, strategy: str, backend: str) -> list[Case]:
        if strategy == "tas":
            return [Case("tas", backend, combined=combined) for combined in (False, True)]
        return [
            Case("usp", backend, ulysses=u, ring=self.ranks // u, combined=combined)
            for u in range(self.ranks, 0, -1)
            if self.ranks % u == 0
            for combined in ((False, True) if u > 1 else (False,))
        ]


def _require_known(flag: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    wrong = [value for value in values if value not in known]
    if wrong or not values or len(set(values)) < len(values):
        raise ValueError(
            f"--{flag} must be of {', '.join(known)}, each once; got {','.join(values)!r}"
        )
