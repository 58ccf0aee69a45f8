"""What torus, and xDiT's own usp, make of every tiny model: exact, wrong, fails, refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests import xdit_models
from tests.distributed import RankFailure, RankPool

TOLERANCE = 1e-5
MESHES = (
    "torus=2,ulysses=1,ring=2",
    "torus=2,ulysses=2,ring=1",
    "torus=1,ulysses=1,ring=4",
)
# Of xDiT's own launches some never end.
STOCK_TIMEOUT_S = 30

Pools = Callable[[int], RankPool]
CASES = [
    (name, feature) for name in xdit_models.NAMES for feature in xdit_models.load(name).FEATURES
]

_known: dict[tuple[str, str, str], tuple[str, Any]] = {}


def attempt(
    rank: int, world_size: int, name: str, feature: str, strategy: str
) -> list[float | str | None]:
    """How far the model is from diffusers in one process, on each mesh, or what was raised."""
    arguments: dict[str, Any] = {"ulysses_degree": 2, "ring_degree": 2, "sp_strategy": strategy}
    if strategy == "usp":
        meshes: list[dict[str, Any]] = [{}]
    else:
        meshes = [{"sp_mesh": mesh, "sp_machines": "2"} for mesh in MESHES]
    found: list[float | str | None] = []
    for mesh in meshes:
        try:
            found.append(xdit_models.run(name, feature, **arguments, **mesh))
        except Exception as error:  # whatever xDiT raises is what is asked for
            found.append(f"{type(error).__name__}: {error}")
    return found


def outcome(pools: Pools, name: str, feature: str, strategy: str) -> tuple[str, Any]:
    """The word for it, and what the ranks found; each case runs once."""
    case = (name, feature, strategy)
    if case not in _known:
        _known[case] = _judge(name, feature, _results(pools, *case))
    return _known[case]


def ready(rank: int, world_size: int) -> None:
    """Imports what the ranks of a new pool still have to import."""
    import diffusers
    import xfuser

    assert diffusers and xfuser


def _results(pools: Pools, name: str, feature: str, strategy: str) -> list[Any] | str:
    timeout_s = STOCK_TIMEOUT_S if strategy == "usp" else 180
    pools(4).run(ready, timeout_s=180)
    try:
        return pools(4).run(attempt, name, feature, strategy, timeout_s=timeout_s)
    except RankFailure as failure:
        if strategy != "usp":
            raise
        return str(failure)


def _judge(name: str, feature: str, results: list[Any] | str) -> tuple[str, Any]:
    if isinstance(results, str):
        return "fails", results
    found = [value for of_rank in results for value in of_rank if value is not None]
    raised = [value for value in found if isinstance(value, str)]
    if raised:
        phrase = getattr(xdit_models.load(name), "REFUSED_BY_XDIT", {}).get(feature)
        known = ("NotImplementedError", *([] if phrase is None else ["ValueError"]))
        is_refused = all(m.startswith(known) and (phrase or "") in m for m in raised)
        return ("refused" if is_refused else "fails"), raised
    assert found, (name, feature, "no rank has a result")
    return ("exact" if max(found) <= TOLERANCE else "wrong"), found


def cell(pools: Pools, name: str, feature: str) -> str:
    """Of the table: torus, and where it differs, usp."""
    if feature not in xdit_models.load(name).FEATURES:
        return ""
    torus, _ = outcome(pools, name, feature, "torus")
    usp, _ = outcome(pools, name, feature, "usp")
    return torus if usp == torus else f"{torus} (usp: {usp})"


def table(pools: Pools) -> list[str]:
    """Lines of Markdown."""
    titles = " | ".join(xdit_models.FEATURES)
    lines = [f"| model | {titles} |", "|---" * (len(xdit_models.FEATURES) + 1) + "|"]
    for name in xdit_models.NAMES:
        cells = [cell(pools, name, feature) for feature in xdit_models.FEATURES]
        lines.append(f"| {xdit_models.load(name).TITLE} | {' | '.join(cells)} |")
    return lines
