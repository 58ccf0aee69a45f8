"""A wrapper that its correction does not fit is refused under torus; other models are not."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

import swiftfusion_xdit
from swiftfusion_xdit.xdit import compat, corrections, hooks
from swiftfusion_xdit.xdit.patches import Patches
from tests import xdit_models
from tests.distributed import run_ranks

LAYERS = "xfuser.model_executor.layers."
TRANSFORMERS = "xfuser.model_executor.models.transformers."
# The module and what of it gets other parameters; a model of its; models that others wrap.
CHANGED = {
    "a method of the model": (
        f"{TRANSFORMERS}transformer_wan",
        ("xFuserWanTransformer3DWrapper", "_chunk_and_pad_sequence"),
        "wan",
        ("wan_vace", "flux"),
    ),
    "a processor of a model made on first use": (
        f"{TRANSFORMERS}transformer_cosmos3",
        ("xFuserCosmos3AttnProcessor", "__call__"),
        "cosmos3",
        ("wan",),
    ),
    "the function that makes the model": (
        f"{TRANSFORMERS}transformer_ideogram4",
        ("_make_xfuser_ideogram4_transformer_wrapper",),
        "ideogram4",
        ("wan",),
    ),
    "one processor of a module that many models share": (
        f"{LAYERS}attention_processor",
        ("xFuserJointAttnProcessor2_0", "__call__"),
        "sd3",
        ("pixart", "cogvideox"),
    ),
}


def with_one_more(function: Any) -> Any:
    """The same function with a parameter that was not there."""

    def changed(*args: Any, fresh: Any = None, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return changed


def attempts(
    rank: int, world_size: int, name: str, path: tuple[str, ...], models: tuple[str, ...]
) -> dict[str, float | str | None]:
    """How far each model is from diffusers, or what it raised; the first also under usp."""
    owner: Any = importlib.import_module(name)
    swiftfusion_xdit.disable()
    for step in path[:-1]:
        owner = getattr(owner, step)
    changed = Patches()
    changed.set(owner, path[-1], with_one_more(getattr(owner, path[-1])))
    swiftfusion_xdit.enable()
    found: dict[str, float | str | None] = {}
    degrees = {"ulysses_degree": world_size, "ring_degree": 1}
    for model in models:
        try:
            found[model] = xdit_models.run(model, "even", sp_strategy="torus", **degrees)
        except compat.IncompatibleXfuserError as error:
            found[model] = str(error)
    # The same function under another signature: xDiT's own path does not notice.
    if name != f"{TRANSFORMERS}transformer_cosmos3":  # which is wrong there
        found["usp"] = xdit_models.run(models[0], "even", sp_strategy="usp", **degrees)
    return found


@pytest.mark.parametrize("what", CHANGED)
def test_refuses_the_models_of_that_wrapper_alone(what: str) -> None:
    module, path, model, others = CHANGED[what]
    # Fresh processes: what is changed is process-wide.
    results = run_ranks(2, attempts, module, path, (model, *others), timeout_s=180)
    for found in results:
        message = found.pop(model)
        assert isinstance(message, str), message
        assert "--sp-strategy torus cannot run this model" in message
        assert f"{module}: " in message
        assert ".".join(path[-2:]) in message and "fresh" in message
        assert "--sp-strategy usp" in message
    for other in set(results[0]):
        errors = [found[other] for found in results if found[other] is not None]
        assert errors and max(errors) <= 1e-5, (other, errors)


def test_a_renamed_model_is_refused_too() -> None:
    import torch

    name = f"{TRANSFORMERS}transformer_wan"
    made = ModuleType(name)
    model = type("Renamed", (torch.nn.Module,), {"__module__": name, "forward": lambda self: 1})
    vars(made).update(Renamed=model)
    patches = Patches()
    assert corrections.apply(made, patches) == []
    assert len(patches) == 1
    assert model()() == 1  # no session
    patches.undo()


def test_a_module_without_models_stops_torus_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "notes", compat.Notes())
    monkeypatch.setattr(hooks, "_hooked", set())
    hooks.after_import(ModuleType(f"{TRANSFORMERS}transformer_wan"))
    with pytest.raises(compat.IncompatibleXfuserError, match=r"transformer_wan: .* is missing"):
        hooks.resolve({"strategy": "torus"})


def test_a_correction_that_fails_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftfusion_xdit.xdit.corrections import wan

    module = importlib.import_module(f"{TRANSFORMERS}transformer_wan")

    def fail(module: ModuleType, patches: Patches) -> None:
        raise RuntimeError("half way")

    patches = Patches()
    monkeypatch.setattr(wan, "apply", fail)
    monkeypatch.setattr(corrections, "current", lambda: FakeSession())
    forward = module.xFuserWanTransformer3DWrapper.forward
    try:
        assert corrections.apply(module, patches) == []
        with pytest.raises(compat.IncompatibleXfuserError, match="half way"):
            module.xFuserWanTransformer3DWrapper.forward(None)
    finally:
        patches.undo()
    assert module.xFuserWanTransformer3DWrapper.forward is forward


class FakeSession:
    options = type("Options", (), {"flag": "--sp-strategy torus"})
