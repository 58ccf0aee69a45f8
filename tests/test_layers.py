"""Imports go one way: each layer sees only those below it, and the pure ones no communication.

Every import statement counts, also one inside a function: laziness does not make a layer lower.
Imports under `if TYPE_CHECKING:` count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import swiftfusion_xdit

PACKAGE = "swiftfusion_xdit"
ROOT = Path(swiftfusion_xdit.__file__).parent

# What each part of the package may import of the package, besides itself. A part is a module or a
# subpackage directly under the root.
ALLOWED: dict[str, set[str]] = {
    "bootstrap": set(),
    "envs": set(),
    "region": set(),
    "topology": set(),
    "wire": set(),
    "native": {"envs"},
    "mesh": {"topology"},
    "schedule": {"mesh", "topology"},
    "simulate": {"schedule", "mesh", "topology"},
    "agreement": {"mesh", "topology", "envs"},
    "attention": {"native", "envs"},
    "comm": {"region", "topology", "envs"},
    "plan": {"schedule", "simulate", "mesh", "topology", "region", "envs", "wire"},
}
ALLOWED["clusters"] = {"simulate", *ALLOWED["simulate"]}
ALLOWED["detect"] = {"clusters", "comm", *ALLOWED["clusters"], *ALLOWED["comm"]}
ALLOWED["planner"] = {"plan", *ALLOWED["plan"]}
ALLOWED["autoplan"] = {"agreement", "detect", "planner", *ALLOWED["planner"], *ALLOWED["detect"]}
ALLOWED["exchange"] = {"plan", "comm", *ALLOWED["plan"]}
ALLOWED["runtime"] = {"exchange", "comm", "attention", *ALLOWED["exchange"]}
ALLOWED["tuning"] = {"runtime", "agreement", *ALLOWED["runtime"]}
ALLOWED["device_runtime"] = {"runtime", "native", *ALLOWED["runtime"]}
ALLOWED["inputs"] = {"plan", *ALLOWED["plan"]}
ALLOWED["sequence_parallel"] = {
    "device_runtime",
    "agreement",
    "inputs",
    "autoplan",
    "tuning",
    *ALLOWED["device_runtime"],
}
ALLOWED["xdit"] = {"sequence_parallel", "bootstrap", *ALLOWED["sequence_parallel"]}
ALLOWED["cli"] = {"xdit", "autoplan", *ALLOWED["autoplan"], *ALLOWED["xdit"]}
# The package's face, and its command.
ALLOWED["__init__"] = {"sequence_parallel", "xdit"}
ALLOWED["__main__"] = {"cli"}

# No process groups and no CUDA: these describe and prove, and run anywhere.
PURE = ("topology", "mesh", "schedule", "simulate", "plan")
IMPURE_MODULES = ("torch.distributed", "torch.cuda", "torch.multiprocessing", "nvshmem", "triton")
# These need nothing installed: one runs inside `import torch`, the other before it.
STANDARD_LIBRARY_ONLY = ("bootstrap", "envs")
# The only importers of xfuser.
XFUSER_IMPORTERS = ("xdit", "cli")

SOURCES = sorted(ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the package to which a source file belongs."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import in `source`, a file of `package`.

    `from a import b` gives `a.b`: b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call):
            yield from import_calls(node)


def import_calls(node: ast.Call) -> Iterator[tuple[int, str]]:
    """What `import_module("name")` or `__import__("name")` loads, where it is spelled out."""
    called = (
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    )
    if called in ("import_module", "__import__") and node.args:
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield node.lineno, first.value


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def violations(part: str, source: str, package: str) -> list[str]:
    """What `source`, a file of `part` in `package`, imports against the rules."""
    found = []
    for line, module in imports_of(source, package):
        if is_within(module, PACKAGE):
            names = module.split(".")[1:]
            # `from swiftfusion_xdit import __version__` and the like name no part.
            target = names[0] if names and names[0] in ALLOWED else None
            if target not in (None, part) and target not in ALLOWED[part]:
                found.append(f"line {line}: {part} must not import {target}")
        elif part in STANDARD_LIBRARY_ONLY and module.split(".")[0] not in sys.stdlib_module_names:
            found.append(f"line {line}: {part} is standard library only, and imports {module}")
        elif is_within(module, "xfuser") and part not in XFUSER_IMPORTERS:
            found.append(f"line {line}: {part} must not import {module}")
        elif part in PURE and any(is_within(module, impure) for impure in IMPURE_MODULES):
            found.append(f"line {line}: {part} is pure and must not import {module}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_only_what_is_below_it(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{part} has no place in the layers: add it to ALLOWED"
    package = ".".join([PACKAGE, *path.relative_to(ROOT).parts[:-1]])
    found = violations(part, path.read_text(encoding="utf-8"), package)
    # The bootstrap names the hooks that it hands modules to; nothing else may.
    if part == "bootstrap":
        found = [line for line in found if not line.endswith("bootstrap must not import xdit")]
    assert not found, f"{path}:\n" + "\n".join(found)


def test_layers_have_no_cycle() -> None:
    done: set[str] = set()
    waiting = dict(ALLOWED)
    while waiting:
        ready = [part for part, below in waiting.items() if below <= done]
        assert ready, f"each of these imports another of them: {sorted(waiting)}"
        done.update(ready)
        waiting = {part: below for part, below in waiting.items() if part not in done}


@pytest.mark.parametrize(
    ("part", "statement"),
    [
        ("mesh", "import torch.distributed"),
        ("mesh", "from torch import distributed"),
        ("plan", "import torch.distributed as dist"),
        ("schedule", "def f():\n    from torch.cuda import Stream"),
        ("schedule", "from swiftfusion_xdit.runtime import LayerRunner"),
        ("schedule", "from ..runtime import LayerRunner"),
        ("schedule", "from .. import plan"),
        ("topology", "import swiftfusion_xdit.mesh"),
        ("comm", "from swiftfusion_xdit import attention"),
        ("runtime", "if TYPE_CHECKING:\n    from swiftfusion_xdit.xdit.options import Options"),
        ("runtime", "import xfuser.envs"),
        ("runtime", "importlib.import_module('xfuser')"),
        ("xdit", "from swiftfusion_xdit.cli import main"),
        ("envs", "import torch"),
        ("bootstrap", "from swiftfusion_xdit import envs"),
    ],
)
def test_a_wrong_import_is_found(part: str, statement: str) -> None:
    is_package = (ROOT / part).is_dir()
    package = f"{PACKAGE}.{part}" if is_package else PACKAGE
    assert violations(part, statement, package), f"not found: {statement!r} in {part}"


@pytest.mark.parametrize(
    ("part", "statement"),
    [
        ("plan", "import torch"),
        ("schedule", "from .steps import Put"),
        ("schedule", "from ..mesh import Mesh"),
        ("xdit", "import xfuser"),
        ("cli", "from swiftfusion_xdit import __version__"),
        ("envs", "import os"),
    ],
)
def test_an_allowed_import_passes(part: str, statement: str) -> None:
    is_package = (ROOT / part).is_dir()
    package = f"{PACKAGE}.{part}" if is_package else PACKAGE
    assert not violations(part, statement, package)
