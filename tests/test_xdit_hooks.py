"""A changed xfuser is noticed, and the refusal names the hook that no longer fits."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from swiftfusion_xdit import bootstrap
from swiftfusion_xdit.xdit import compat, corrections, hooks

MODULES = sorted(corrections.CORRECTED)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "notes", compat.Notes())
    monkeypatch.setattr(hooks, "_warned", False)
    monkeypatch.setattr(hooks, "_hooked", set())


def test_every_hook_is_installed_by_the_bootstrap() -> None:
    assert set(hooks._HOOKS) <= set(bootstrap.HOOKED_MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_the_installed_xfuser_is_what_corrections_expect(name: str) -> None:
    assert corrections.check(importlib.import_module(name)) == []


@pytest.mark.parametrize("name", MODULES)
def test_what_is_missing_is_named(name: str) -> None:
    """Of an empty module in xfuser's place."""
    problems = corrections.check(ModuleType(name))
    assert problems
    hooks.after_import(ModuleType(name))
    with pytest.raises(compat.IncompatibleXfuserError) as caught:
        hooks.resolve({"strategy": "torus"})
    for problem in problems:
        assert problem in str(caught.value)
    assert "--sp-strategy usp" in str(caught.value)
    assert hooks.resolve({"strategy": "usp"}).strategy == "usp"


def test_a_changed_signature_is_shown_with_the_expected_one() -> None:
    name = "xfuser.model_executor.models.transformers.transformer_wan"
    changed = ModuleType(name)

    class Wrapper:
        def _chunk_and_pad_sequence(self, x: object, pad: int) -> None: ...

    vars(changed)["xFuserWanTransformer3DWrapper"] = Wrapper
    (problem,) = corrections.check(changed)
    assert (
        "_chunk_and_pad_sequence takes (self, x, pad), expected (self, x, sp_world_rank" in problem
    )
