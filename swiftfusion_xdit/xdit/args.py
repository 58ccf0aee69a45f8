"""The --sp-* flags in xDiT's parsers and in its arguments dataclass."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from swiftfusion_xdit import envs
from swiftfusion_xdit.xdit import options as options_module
from swiftfusion_xdit.xdit.options import Options

FLAGS: dict[str, tuple[str, str]] = {
    "strategy": (
        "{" + ",".join(envs.STRATEGIES) + "}",
        "Sequence parallelism: xDiT's own (usp), its collectives with Ulysses across machines and "
        "Ring inside (tas), or Torus Attention (torus). Default usp.",
    ),
    "transport": (
        "{" + ",".join(envs.TRANSPORTS) + "}",
        "How torus moves data between ranks. Default auto.",
    ),
    "machines": (
        "{auto,N}",
        "Machines that the ranks are on: by host (auto), or N equal shares of the ranks, which "
        "makes one machine play N. Default auto.",
    ),
    "mesh": (
        "torus=T,ulysses=U,ring=R",
        "Force the mesh; T * U * R is ulysses_degree * ring_degree. Default: planned.",
    ),
    "schedule": (
        "{" + ",".join(envs.SCHEDULES) + "}",
        "Schedule of a torus layer. Default auto.",
    ),
    "fallback": (
        "{" + ",".join(envs.FALLBACKS) + "}",
        "What a call does that the strategy does not support: raise (error), or warn once and take "
        "xDiT's own path (usp). Default error.",
    ),
    "wire": (
        "{" + ",".join(envs.WIRES) + "}",
        "How rows of torus travel between ranks: as they are (exact), or as 8-bit floats with a "
        "scale each (fp8; on CPU ranks only). --use_fp8_comms asks for fp8 too. Default exact.",
    ),
}


def _flag_type(name: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        try:
            options_module.PARSERS[name](text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}, got {text!r}") from None
        return text

    return check


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Register --sp-*, in both spellings: xDiT's parser turns dashes into underscores."""
    group = parser.add_argument_group(
        "SwiftFusion options", "defaults come from SWIFTFUSION_SP_STRATEGY and so on"
    )
    for name, (metavar, help_text) in FLAGS.items():
        group.add_argument(
            f"--sp_{name}",
            f"--sp-{name}",
            dest=f"sp_{name}",
            type=_flag_type(name),
            default=None,
            metavar=metavar,
            help=help_text,
        )


def extend(
    original: type, resolve: Callable[[dict[str, Any]], Options], attach: Callable[..., None]
) -> type:
    """xFuserArgs with the fields ``sp_strategy`` and so on; None means not given.

    Args:
        original: xDiT's dataclass.
        resolve: makes Options from the given fields.
        attach: called as ``attach(engine_config, options)`` on every config that is created.
    """

    @dataclasses.dataclass
    class xFuserArgs(original):
        sp_strategy: str | None = None
        sp_transport: str | None = None
        sp_machines: str | None = None
        sp_mesh: str | None = None
        sp_schedule: str | None = None
        sp_fallback: str | None = None
        sp_wire: str | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in FLAGS:
                value = getattr(self, f"sp_{name}")
                if value is not None:
                    options_module.parse(name, value, source=f"--sp-{name}")

        @staticmethod
        def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = original.add_cli_args(parser)  # type: ignore[attr-defined]
            add_flags(parser)
            return parser

        @staticmethod
        def add_runner_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            parser = original.add_runner_args(parser)  # type: ignore[attr-defined]
            add_flags(parser)
            return parser

        def create_config(self) -> Any:
            options = resolve({name: getattr(self, f"sp_{name}") for name in FLAGS})
            engine_config, input_config = super().create_config()
            attach(engine_config, options)
            return engine_config, input_config

    # Under the original's name, so that an instance pickles and unpickles as one of this class.
    xFuserArgs.__module__ = original.__module__
    xFuserArgs.__qualname__ = original.__qualname__
    xFuserArgs.__doc__ = original.__doc__
    return xFuserArgs
