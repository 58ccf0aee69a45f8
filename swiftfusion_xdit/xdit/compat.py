"""Is this the xfuser that the plugin was written for?

Hooks that do not fit are left out and noted here. With ``usp`` that costs nothing but the flags;
any other strategy is refused with the notes.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

SUPPORTED_VERSIONS = ">=0.7,<0.8"

# Parameters of USP: (name, default), in order. "..." stands for no default.
USP_PARAMETERS: tuple[tuple[str, Any], ...] = (
    ("query", ...),
    ("key", ...),
    ("value", ...),
    ("dropout_p", 0.0),
    ("is_causal", False),
    ("joint_query", None),
    ("joint_key", None),
    ("joint_value", None),
    ("joint_strategy", None),
    ("attn_layer", None),
    ("combine_qkv_a2a", None),
    ("backend", None),
    ("attention_kwargs", None),
    ("head_balance_layer", None),
    ("kv_head_repeat", 1),
)


class IncompatibleXfuserError(RuntimeError):
    """The installed xfuser is not one that the plugin can extend."""


def installed_version() -> str:
    try:
        return importlib.metadata.version("xfuser")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def is_supported(version: str) -> bool:
    """Whether a version lies in SUPPORTED_VERSIONS; source builds count as their release."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(SUPPORTED_VERSIONS).contains(Version(version).base_version)
    except InvalidVersion:
        return False


def parameters(function: Callable[..., Any]) -> tuple[tuple[str, Any], ...]:
    """(name, default) of a function's parameters, in order."""
    empty = inspect.Parameter.empty
    return tuple(
        (p.name, ... if p.default is empty else p.default)
        for p in inspect.signature(function).parameters.values()
    )


def check_names(owner: Any, name: str, expected: tuple[str, ...]) -> list[str]:
    """What is wrong with the parameter names of ``owner.name``; empty if nothing is."""
    function = getattr(owner, name, None)
    where = f"{getattr(owner, '__name__', owner)}.{name}"
    if function is None:
        return [f"{where} is missing"]
    found = tuple(parameter for parameter, _ in parameters(function))
    if found != expected:
        return [f"{where} takes ({', '.join(found)}), expected ({', '.join(expected)})"]
    return []


def check_usp(module: ModuleType) -> list[str]:
    usp = getattr(module, "USP", None)
    if not isinstance(usp, FunctionType):
        return [f"{module.__name__}.USP is missing or not a plain function"]
    if parameters(usp) != USP_PARAMETERS or usp.__kwdefaults__ or usp.__closure__:
        return [
            f"{module.__name__}.USP has the signature {inspect.signature(usp)}, expected "
            f"({', '.join(name for name, _ in USP_PARAMETERS)}) with their known defaults"
        ]
    return []


def check_args(module: ModuleType) -> list[str]:
    args = getattr(module, "xFuserArgs", None)
    if args is None or not hasattr(args, "__dataclass_fields__"):
        return [f"{module.__name__}.xFuserArgs is missing or not a dataclass"]
    problems = [f"xFuserArgs has a field {f}" for f in args.__dataclass_fields__ if f[:3] == "sp_"]
    for name, expected in (
        ("add_cli_args", ("parser",)),
        ("add_runner_args", ("parser",)),
        ("from_cli_args", ("args",)),
        ("from_runner_args", ("args",)),
        ("create_config", ("self",)),
    ):
        problems += check_names(args, name, expected)
    return problems


def check_parallel_state(module: ModuleType) -> list[str]:
    problems = check_names(module, "get_sp_group", ())
    problems += check_names(module, "model_parallel_is_initialized", ())
    coordinator = getattr(module, "SequenceParallelGroupCoordinator", None)
    expected = ("self", "group_ranks", "local_rank", "torch_distributed_backend", "kwargs")
    return problems + check_names(coordinator, "__init__", expected)


def check_runtime_state(module: ModuleType) -> list[str]:
    base = getattr(module, "RuntimeState", None)
    dit = getattr(module, "DiTRuntimeState", None)
    return [
        *check_names(base, "__init__", ("self", "config")),
        *check_names(base, "_check_distributed_env", ("self", "parallel_config")),
        *check_names(
            base,
            "_check_if_backend_compatible_with_current_configuration",
            ("self", "attention_backend"),
        ),
        *check_names(dit, "__init__", ("self", "pipeline", "config")),
        *check_names(
            dit, "_check_model_and_parallel_config", ("self", "pipeline", "parallel_config")
        ),
    ]


class Notes:
    """What was found not to fit, once each, in the order found."""

    def __init__(self) -> None:
        self._problems: dict[str, None] = {}

    def add(self, problem: str) -> None:
        self._problems.setdefault(problem)

    def clear(self) -> None:
        self._problems.clear()

    def problems(self) -> list[str]:
        version = installed_version()
        if is_supported(version):
            return list(self._problems)
        return [f"version {version} is not in {SUPPORTED_VERSIONS}", *self._problems]

    def require(self, strategy: str) -> None:
        """Refuse a strategy that the notes stand in the way of.

        Raises:
            IncompatibleXfuserError: naming the version found, those supported, and the notes.
        """
        problems = self.problems()
        if problems:
            raise IncompatibleXfuserError(
                f"--sp-strategy {strategy} needs xfuser {SUPPORTED_VERSIONS}, found xfuser "
                f"{installed_version()}: {'; '.join(problems)}. Install a supported xfuser, or use "
                "--sp-strategy usp"
            )
