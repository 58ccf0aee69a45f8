"""Where the --sp-* choices come from, which wins, and how a bad one is reported."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from swiftfusion_xdit import envs
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.xdit import hooks, options
from swiftfusion_xdit.xdit.options import Options

PARSERS = ("add_cli_args", "add_runner_args")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, variable in envs.VARIABLES.items():
        for full in (name, *variable.aliases):
            monkeypatch.delenv(envs.PREFIX + full, raising=False)


def parse(parser_name: str, *arguments: str) -> Any:
    import xfuser

    parser = xfuser.config.FlexibleArgumentParser()
    getattr(xfuser.xFuserArgs, parser_name)(parser)
    namespace = parser.parse_args(["--model", "tiny", *arguments])
    if parser_name == "add_cli_args":
        return xfuser.xFuserArgs.from_cli_args(namespace)
    return xfuser.xFuserArgs.from_runner_args(vars(namespace))


def resolve(args: Any) -> Options:
    return hooks.resolve({name: getattr(args, f"sp_{name}") for name in options.PARSERS})


@pytest.mark.parametrize("parser_name", PARSERS)
def test_defaults(parser_name: str) -> None:
    assert resolve(parse(parser_name)) == Options()
    assert Options() == Options("usp", "auto", None, None, "auto", "error", "exact")


@pytest.mark.parametrize("parser_name", PARSERS)
@pytest.mark.parametrize("dash", ["-", "_"])
def test_dashes_and_underscores(parser_name: str, dash: str) -> None:
    given = {
        "--sp-strategy": "torus",
        "--sp-transport": "shm",
        "--sp-machines": "2",
        "--sp-mesh": "torus=2,ring=3",
        "--sp-schedule": "pipelined",
        "--sp-fallback": "usp",
        "--sp-wire": "fp8",
    }
    words = [f"--{flag[2:].replace('-', dash)}={value}" for flag, value in given.items()]
    expected = Options("torus", "shm", 2, Mesh(torus=2, ring=3), "pipelined", "usp", "fp8")
    assert resolve(parse(parser_name, *words)) == expected


def test_flag_beats_enable_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("STRATEGY", "tas"), ("SCHEDULE", "torus"), ("FALLBACK", "usp")):
        monkeypatch.setenv(f"SWIFTFUSION_SP_{name}", value)
    monkeypatch.setattr(hooks, "_enabled", {"strategy": "torus", "schedule": "pipelined"})
    resolved = resolve(parse("add_cli_args", "--sp-strategy", "usp"))
    assert (resolved.strategy, resolved.schedule, resolved.fallback) == ("usp", "pipelined", "usp")


def test_flag_auto_beats_machines_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFTFUSION_MACHINES", "4")
    assert resolve(parse("add_cli_args")).machines == 4
    monkeypatch.setenv("SWIFTFUSION_SP_MACHINES", "2")
    assert resolve(parse("add_cli_args")).machines == 2
    assert resolve(parse("add_cli_args", "--sp-machines", "auto")).machines is None


@pytest.mark.parametrize("parser_name", PARSERS)
@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("--sp-strategy", "ulysses", "must be one of usp, tas, torus"),
        ("--sp-transport", "tcp", "must be one of auto, shm, cuda, nvshmem, nccl"),
        ("--sp-machines", "none", "must be auto or a number of machines"),
        ("--sp-mesh", "torus=0", "torus must be a positive integer"),
        ("--sp-mesh", "2x2", "must look like torus=T,ulysses=U,ring=R"),
        ("--sp-schedule", "best", "must be one of auto, torus, folded, pipelined"),
        ("--sp-fallback", "none", "must be one of error, usp"),
        ("--sp-wire", "fp4", "must be one of exact, fp8"),
    ],
)
def test_bad_flag_exits_with_2(
    capsys: pytest.CaptureFixture[str], parser_name: str, flag: str, value: str, rule: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(parser_name, flag, value)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert flag in message and rule in message and repr(value) in message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SP_STRATEGY", "ring"),
        ("SP_MESH", "torus=x"),
        ("SP_MACHINES", "-1"),
        ("MACHINES", "two"),
        ("TIMEOUT_S", "soon"),
        ("DISABLE", "maybe"),
        ("LAYER_GRAPHS", "some"),
    ],
)
def test_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(f"SWIFTFUSION_{variable}", value)
    with pytest.raises(ValueError, match=f"SWIFTFUSION_{variable} .*{value!r}"):
        if variable in ("TIMEOUT_S", "DISABLE", "LAYER_GRAPHS"):
            envs.get(variable)
        else:
            hooks.resolve({})


@pytest.mark.parametrize(
    ("text", "value"), [(None, None), ("auto", None), ("1", True), ("on", True), ("0", False)]
)
def test_layer_graphs_are_on_off_or_auto(
    monkeypatch: pytest.MonkeyPatch, text: str | None, value: bool | None
) -> None:
    if text is not None:
        monkeypatch.setenv("SWIFTFUSION_LAYER_GRAPHS", text)
    assert envs.get("LAYER_GRAPHS") is value


def test_bad_field_is_named() -> None:
    import xfuser

    with pytest.raises(ValueError, match=r"--sp-strategy must be one of .*'ring'"):
        xfuser.xFuserArgs(sp_strategy="ring")
    with pytest.raises(ValueError, match=r"enable.*unknown: colour"):
        hooks.enable(colour="blue")


def test_every_module_holds_the_extended_arguments() -> None:
    import xfuser
    import xfuser.config
    import xfuser.config.args as home
    from xfuser.core.distributed import runtime_state

    extended = home.xFuserArgs
    assert xfuser.xFuserArgs is xfuser.config.xFuserArgs is runtime_state.xFuserArgs is extended
    assert (extended.__module__, extended.__qualname__) == ("xfuser.config.args", "xFuserArgs")
    args = pickle.loads(pickle.dumps(extended(model="tiny", sp_strategy="torus")))
    assert type(args) is extended
    assert args.sp_strategy == "torus"
