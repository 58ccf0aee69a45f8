"""Every SWIFTFUSION_* environment variable, typed, in one table.

Standard library only: the bootstrap and the command line read it before torch is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

STRATEGIES = ("usp", "tas", "torus")
TRANSPORTS = ("auto", "shm", "cuda", "nvshmem", "nccl")
SCHEDULES = ("auto", "torus", "folded", "pipelined", "fused")
FALLBACKS = ("error", "usp")
WIRES = ("exact", "fp8")

PREFIX = "SWIFTFUSION_"


def one_of(*choices: str) -> Callable[[str], str]:
    """A parser that accepts the given words only."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return parse


def parse_machines(text: str) -> int | None:
    """``auto`` (None: the hosts tell) or a number of machines, at least 1."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("must be auto or a number of machines, at least 1")
    return int(text)


def parse_bool(text: str) -> bool:
    """``1``, ``true``, ``yes``, ``on`` or their opposites, in any case."""
    word = text.lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("must be one of 1, 0, true, false, yes, no, on, off")


def parse_switch(text: str) -> bool | None:
    """``auto`` (None: decided case by case), or as ``parse_bool``."""
    if text.lower() == "auto":
        return None
    try:
        return parse_bool(text)
    except ValueError:
        raise ValueError("must be one of auto, 1, 0, true, false, yes, no, on, off") from None


def parse_seconds(text: str) -> float:
    """A positive number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ValueError("must be a positive number of seconds")
    return seconds


def parse_text(text: str) -> str | None:
    """Any text; empty means not set."""
    return text or None


@dataclass(frozen=True)
class Variable:
    """One environment variable: how it is read, and its value where it is not set."""

    parse: Callable[[str], Any]
    default: Any
    help: str
    aliases: tuple[str, ...] = ()


VARIABLES: dict[str, Variable] = {
    "DISABLE": Variable(parse_bool, False, "1: the plugin does not hook into xDiT at all"),
    "SP_STRATEGY": Variable(one_of(*STRATEGIES), "usp", "default of --sp-strategy"),
    "SP_TRANSPORT": Variable(one_of(*TRANSPORTS), "auto", "default of --sp-transport"),
    "SP_MACHINES": Variable(
        parse_machines, None, "default of --sp-machines", aliases=("MACHINES",)
    ),
    "SP_MESH": Variable(parse_text, None, "default of --sp-mesh"),
    "SP_SCHEDULE": Variable(one_of(*SCHEDULES), "auto", "default of --sp-schedule"),
    "SP_FALLBACK": Variable(one_of(*FALLBACKS), "error", "default of --sp-fallback"),
    "SP_WIRE": Variable(one_of(*WIRES), "exact", "default of --sp-wire"),
    "TIMEOUT_S": Variable(parse_seconds, 300.0, "seconds a rank waits for a peer before it fails"),
    "TUNE": Variable(
        parse_bool, False, "1: the planner's best few are timed, the fastest is taken"
    ),
    "LAYER_GRAPHS": Variable(
        parse_switch,
        None,
        "layers that come again are repeated as CUDA graphs; auto: where the host is the bound",
    ),
    "REPORT_DIR": Variable(
        parse_text, None, "directory in which every rank writes rankN.json when it exits"
    ),
    "REPORT_DTYPE": Variable(
        one_of("float32"), None, "with REPORT_DIR: cast pipelines to it, so that latents compare"
    ),
}


def variable_name(name: str) -> str:
    """The full name of the variable that supplies ``name``: an alias only where it is set."""
    for candidate in (name, *VARIABLES[name].aliases):
        if PREFIX + candidate in os.environ:
            return PREFIX + candidate
    return PREFIX + name


def get(name: str) -> Any:
    """The value of ``SWIFTFUSION_<name>``, parsed, or its default.

    Raises:
        ValueError: the variable holds a value that its rule does not allow.
    """
    variable = VARIABLES[name]
    full_name = variable_name(name)
    text = os.environ.get(full_name)
    if text is None:
        return variable.default
    try:
        return variable.parse(text.strip())
    except ValueError as error:
        raise ValueError(f"{full_name} {error}, got {text!r}") from None
