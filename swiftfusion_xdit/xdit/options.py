"""The choices of --sp-*: from the command line, from enable(), from the environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from swiftfusion_xdit import envs
from swiftfusion_xdit.mesh import Mesh


def parse_mesh(value: Mesh | str | Mapping[str, int] | None) -> Mesh | None:
    """A mesh, or None (also for the empty text): the planner chooses."""
    return None if value is None or value == "" else Mesh.of(value)


def _parse_machines(value: int | str | None) -> int | None:
    return value if value is None else envs.parse_machines(str(value))


PARSERS: dict[str, Callable[[Any], Any]] = {
    "strategy": envs.one_of(*envs.STRATEGIES),
    "transport": envs.one_of(*envs.TRANSPORTS),
    "machines": _parse_machines,
    "mesh": parse_mesh,
    "schedule": envs.one_of(*envs.SCHEDULES),
    "fallback": envs.one_of(*envs.FALLBACKS),
    "wire": envs.one_of(*envs.WIRES),
}


@dataclass(frozen=True)
class Options:
    """How sequence parallelism runs. ``machines`` None: by host; ``mesh`` None: planned.

    Raises:
        ValueError: a value that the option cannot have.
    """

    strategy: str = "usp"
    transport: str = "auto"
    machines: int | None = None
    mesh: Mesh | None = None
    schedule: str = "auto"
    fallback: str = "error"
    wire: str = "exact"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = parse(field.name, getattr(self, field.name), source=field.name)
            object.__setattr__(self, field.name, value)

    @property
    def flag(self) -> str:
        """The strategy as the user would type it, for messages."""
        return f"--sp-strategy {self.strategy}"

    @property
    def split_sequence(self) -> str | None:
        """Why kernels that must see whole sequences cannot run, in words, or None if they can."""
        if self.mesh is not None and self.mesh.ring > 1:
            return (
                f"attention over whole sequences with --sp-mesh {self.mesh}, which splits them: it "
                f"needs ring=1, got ring={self.mesh.ring}; give another --sp-mesh, or none"
            )
        if self.schedule not in ("auto", "pipelined", "fused"):  # which falls to pipelined
            return (
                "attention over whole sequences with --sp-schedule, which must then be auto, "
                f"pipelined or fused, got {self.schedule}"
            )
        return None

    def with_fp8_comms(self, state: Any) -> Options:
        """With fp8 on the wire, where a runtime state of xDiT was made with --use_fp8_comms."""
        return self if state.fp8_comms is None else replace(self, wire="fp8")

    def check_degrees(self, *, sp_degree: int, tp_degree: int, world_size: int) -> None:
        """Check against xDiT's degrees.

        Raises:
            ValueError: the mesh is not the SP degree, or the machines do not divide the ranks.
            NotImplementedError: tensor parallelism together with this strategy.
        """
        if self.mesh is not None and self.mesh.size != sp_degree:
            t, u, r = self.mesh.torus, self.mesh.ulysses, self.mesh.ring
            raise ValueError(
                f"--sp-mesh must have ulysses_degree * ring_degree ranks: torus({t}) * ulysses({u})"
                f" * ring({r}) = {self.mesh.size} != sp degree {sp_degree}"
            )
        if self.machines is not None and world_size % self.machines:
            raise ValueError(
                f"--sp-machines must divide the ranks: {world_size} ranks / {self.machines} "
                "machines"
            )
        if tp_degree > 1:
            raise NotImplementedError(
                f"{self.flag} does not support tensor parallelism: tensor_parallel_degree="
                f"{tp_degree}; set it to 1, or use --sp-strategy usp"
            )


def parse(name: str, value: Any, *, source: str) -> Any:
    """``value`` of option ``name``, parsed; ``source`` is how the error names it."""
    try:
        return PARSERS[name](value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source} {error}, got {value!r}") from None


def from_environment(name: str) -> Any:
    value = envs.get(f"SP_{name.upper()}")
    return parse(name, value, source=envs.variable_name(f"SP_{name.upper()}"))


def resolve(flags: Mapping[str, Any], enabled: Mapping[str, Any]) -> Options:
    """Flags first, then what enable() was given, then the environment; None means not given.

    Raises:
        ValueError: a bad value, named by the flag, the argument or the variable that holds it.
    """
    values = {}
    for name in PARSERS:
        if flags.get(name) is not None:
            values[name] = parse(name, flags[name], source=f"--sp-{name}")
        elif enabled.get(name) is not None:
            values[name] = parse(name, enabled[name], source=f"enable({name}=)")
        else:
            values[name] = from_environment(name)
    return Options(**values)
