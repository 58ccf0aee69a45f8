"""enable() works before and after xfuser was imported; disable() restores everything."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import pytest

import swiftfusion_xdit
from swiftfusion_xdit.xdit.patches import Patches
from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool, run_ranks


def snapshot() -> dict[tuple[str, ...], Any]:
    """Identities of what the plugin may touch: names of modules and classes, code of functions."""
    found: dict[tuple[str, ...], Any] = {}
    names = [name for name in sys.modules if name.partition(".")[0] in ("xfuser", "yunchang")]
    for name in [*names, "torch", "torch.cuda", "diffusers"]:
        module = sys.modules[name]
        for key, value in vars(module).items():
            if isinstance(value, ModuleType) or key == "__builtins__":
                continue
            found[name, key] = id(value)
            if isinstance(value, FunctionType):
                found[name, key, "code"] = id(value.__code__)
            elif isinstance(value, type) and value.__module__ == name:
                for attribute, member in vars(value).items():
                    found[name, key, attribute] = id(member)
    return found


IGNORED = {"_RUNTIME", "_patched_modules"}


def changes(before: dict[Any, Any], after: dict[Any, Any]) -> set[tuple[str, ...]]:
    return {
        key
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key) and key[0] in sys.modules and key[1] not in IGNORED
    }


def restored(rank: int, world_size: int) -> dict[str, Any]:
    import xfuser
    import xfuser.model_executor.models.runner_models.base_model

    usp = xdit_calls.usp_module()
    hooked = snapshot()
    swiftfusion_xdit.disable()
    stock = snapshot()
    assert not hasattr(xfuser.xFuserArgs, "sp_strategy")
    swiftfusion_xdit.enable(strategy="torus", machines=2)
    enabled = snapshot()
    with xdit_cases.xdit_groups():
        xdit_calls.start(None, sp_machines=None)
        code = usp.USP.__code__
        error = xdit_calls.call(rank)
        swiftfusion_xdit.disable()
        again = snapshot()
    try:
        return {
            "hooks change something": len(changes(hooked, stock)),
            "enable changes something": len(changes(stock, enabled)),
            "not restored": sorted(changes(stock, again)),
            "ran torus": code is not usp.USP.__code__,
            "error": error,
        }
    finally:
        swiftfusion_xdit.enable()


def test_disable_restores_xdit_exactly() -> None:
    # Fresh processes: what is checked is process-wide.
    for found in run_ranks(4, restored, timeout_s=120):
        assert found["hooks change something"] > 10
        assert found["enable changes something"] > 10
        allowed = {("xfuser.core.distributed.parallel_state", f"_{name}") for name in GROUPS}
        assert set(found["not restored"]) - allowed == set()
        assert found["ran torus"]
        assert found["error"] <= 2e-6


GROUPS = ("WORLD", "TP", "SP", "PP", "CFG", "DP", "FS", "DIT", "VAE", "MODEL_REPLICA")


def switched_on_later(rank: int, world_size: int) -> tuple[bool, float, bool, float]:
    usp = xdit_calls.usp_module()
    code = usp.USP.__code__
    try:
        with xdit_cases.xdit_groups():
            xdit_calls.start("usp")
            swiftfusion_xdit.enable(strategy="torus", machines=2)
            changed, error = usp.USP.__code__ is not code, xdit_calls.call(rank)
            swiftfusion_xdit.enable(strategy="usp")
            return changed, error, usp.USP.__code__ is code, xdit_calls.call(rank)
    finally:
        swiftfusion_xdit.enable()


def test_enable_switches_a_running_state(rank_pool: Callable[[int], RankPool]) -> None:
    for changed, error, back, stock_error in rank_pool(4).run(switched_on_later, timeout_s=60):
        assert changed and back
        assert max(error, stock_error) <= 2e-6


class Owner:
    value = 1

    @staticmethod
    def function() -> int:
        return 1


def test_patches_undo_in_reverse() -> None:
    patches, mapping = Patches(), {"a": 1}
    before = dict(vars(Owner))
    patches.set(Owner, "value", 2)
    patches.set(Owner, "value", 3)
    patches.set(Owner, "fresh", 3)
    patches.set(Owner, "function", lambda: 2)
    patches.set_item(mapping, "a", 2)
    patches.set_item(mapping, "b", 2)
    assert (Owner.value, mapping) == (3, {"a": 2, "b": 2})
    patches.undo()
    assert dict(vars(Owner)) == before
    assert mapping == {"a": 1}
    assert not patches


def test_entry_point_without_arguments_keeps_usp(monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftfusion_xdit.xdit import hooks

    monkeypatch.delenv("SWIFTFUSION_SP_STRATEGY", raising=False)
    swiftfusion_xdit.enable()
    assert hooks.resolve({}).strategy == "usp"
