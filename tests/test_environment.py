"""tools/environment.py says what a machine lacks, and knows when there is nothing to do."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "environment.py"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with every file that it writes under `tmp_path` and nothing ever installed."""
    spec = importlib.util.spec_from_file_location("environment_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, file in (("VENV", ".venv"), ("STAMP", "stamp"), ("LOCK", "lock"), ("LOG", "log")):
        monkeypatch.setattr(module, name, tmp_path / file)
    monkeypatch.setattr(module, "pip", lambda *arguments: pytest.fail(f"pip ran: {arguments}"))
    return module


def test_unsupported_python_is_named(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    old = SimpleNamespace(version_info=(3, 9, 1), version="3.9.1", executable="/old/python3")
    monkeypatch.setattr(tool, "sys", SimpleNamespace(**vars(old), stderr=sys.stderr))
    assert tool.main() == 1
    assert "Python must be 3.10 to 3.13, and /old/python3 is 3.9.1" in capfd.readouterr().err


def test_missing_ensurepip_says_what_to_install(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def without_ensurepip(name: str) -> object:
        return None if name == "ensurepip" else find_spec(name)

    monkeypatch.setattr(tool.importlib.util, "find_spec", without_ensurepip)
    with pytest.raises(tool.SetupError, match=r"ensurepip is missing.*apt-get install python3"):
        tool.make_venv(inherit=False)
    assert not tool.VENV.exists()


def test_active_interpreter_with_torch_is_used_and_stamped_once(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[str] = []
    monkeypatch.setattr(tool, "is_writable", lambda: True)
    monkeypatch.setattr(tool, "install", installed.append)
    assert tool.ready_interpreter() == sys.executable
    assert tool.ready_interpreter() == sys.executable
    assert installed == [sys.executable], "the second time there is nothing to do"

    stamp = json.loads(tool.STAMP.read_text())
    tool.STAMP.write_text(json.dumps({**stamp, "inputs": "of another setup.py"}))
    tool.ready_interpreter()
    assert installed == [sys.executable] * 2, "requirements that changed are installed"


def test_broken_venv_is_made_again(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tool.VENV / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/nowhere/python3")
    installed: list[str] = []
    monkeypatch.setattr(tool, "install", installed.append)
    tool.install_into_venv(str(python), inherit=False)
    assert installed == [str(python)]
    assert tool.venv_works(str(python))


def test_a_failed_command_shows_the_end_of_its_log(tool: ModuleType) -> None:
    code = "import sys; print('the reason'); sys.exit(7)"
    with pytest.raises(tool.SetupError, match=r"(?s)exit status 7.*the reason"):
        tool.run([sys.executable, "-c", code])
