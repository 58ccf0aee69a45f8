"""An xfuser that the plugin does not know is refused, with usp it keeps working."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import pytest

from swiftfusion_xdit.xdit import compat, hooks


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "notes", compat.Notes())
    monkeypatch.setattr(hooks, "_warned", False)
    monkeypatch.setattr(hooks, "_hooked", set())


def refusal(strategy: str = "torus") -> str:
    with pytest.raises(compat.IncompatibleXfuserError) as caught:
        hooks.resolve({"strategy": strategy})
    message = str(caught.value)
    assert f"--sp-strategy {strategy}" in message
    assert compat.SUPPORTED_VERSIONS in message
    assert f"found xfuser {compat.installed_version()}" in message
    return message


def test_the_installed_xfuser_is_known() -> None:
    import xfuser.config.args as args
    import xfuser.core.distributed.parallel_state as parallel_state
    import xfuser.core.distributed.runtime_state as runtime_state
    import xfuser.model_executor.layers.usp as usp

    assert compat.is_supported(compat.installed_version())
    assert compat.check_usp(usp) == []
    assert compat.check_parallel_state(parallel_state) == []
    assert compat.check_runtime_state(runtime_state) == []
    # The hooked class has the fields that the check guards against.
    assert compat.check_args(args) == [
        f"xFuserArgs has a field sp_{name}"
        for name in ("strategy", "transport", "machines", "mesh", "schedule", "fallback", "wire")
    ]


@pytest.mark.parametrize("version", ["0.6.9", "0.8.0", "1.0", "unknown"])
def test_unknown_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: version)
    for strategy in ("torus", "tas"):
        assert f"version {version} is not in" in refusal(strategy)


@pytest.mark.parametrize("version", ["0.7.0", "0.7.5", "0.7.1.dev3+g123"])
def test_known_versions(version: str) -> None:
    assert compat.is_supported(version)


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


def test_unknown_usp_signature() -> None:
    def usp(query: Any, key: Any, value: Any, causal: bool = False) -> None: ...

    hooks.after_import(module("xfuser.model_executor.layers.usp", USP=usp))
    assert "USP has the signature" in refusal()


def test_changed_default_of_usp() -> None:
    import xfuser.model_executor.layers.usp as usp

    changed = type(usp.USP)(usp.USP.__code__, {}, "USP", (0.1, *usp.USP.__defaults__[1:]))
    hooks.after_import(module("xfuser.model_executor.layers.usp", USP=changed))
    assert "USP has the signature" in refusal()


def test_unknown_runtime_state() -> None:
    class RuntimeState:
        def __init__(self, config: Any, more: Any) -> None: ...

    name = "xfuser.core.distributed.runtime_state"
    hooks.after_import(module(name, RuntimeState=RuntimeState))
    message = refusal()
    assert "RuntimeState.__init__ takes (self, config, more)" in message
    assert "_check_distributed_env is missing" in message


def test_unknown_parsers_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("xfuser.config.args", xFuserArgs=type("xFuserArgs", (), {}))
    monkeypatch.setattr("sys.argv", ["runner.py", "--model", "tiny"])
    hooks.after_import(made)
    monkeypatch.setattr(hooks, "_hooked", set())
    monkeypatch.setattr("sys.argv", ["runner.py", "--sp-strategy", "torus"])
    with pytest.raises(compat.IncompatibleXfuserError, match="not a dataclass"):
        hooks.after_import(made)


def test_usp_works_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: "0.9.0")
    with caplog.at_level(logging.WARNING):
        assert hooks.resolve({}).strategy == "usp"
        assert hooks.resolve({}).strategy == "usp"
    assert [record.getMessage() for record in caplog.records] == [
        "swiftfusion_xdit does not know this xfuser: version 0.9.0 is not in >=0.7,<0.8"
    ]
