"""The entry point hooks xfuser lazily, costs nothing without it, and never raises."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import swiftfusion_xdit
from swiftfusion_xdit import bootstrap

PACKAGE = Path(swiftfusion_xdit.__file__).parent


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter that runs ``code``."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("SWIFTFUSION_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["bootstrap.py", "envs.py"])
def test_imports_the_standard_library_only(name: str) -> None:
    tree = ast.parse((PACKAGE / name).read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").partition(".")[0])
    assert imported <= set(sys.stdlib_module_names)


def test_importing_the_package_is_light() -> None:
    code = "import sys, swiftfusion_xdit as s; print(s.__version__, 'torch' in sys.modules)"
    assert python(code) == f"{swiftfusion_xdit.__version__} False"


INSTALLED = (
    "import sys, {}; from swiftfusion_xdit import bootstrap; print(bootstrap.is_installed())"
)


def test_importing_torch_installs_the_hook_and_loads_nothing() -> None:
    code = (
        INSTALLED.format("torch") + "; print('xfuser' in sys.modules, 'diffusers' in sys.modules)"
    )
    assert python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="1").split() == ["True", "False", "False"]


def test_disable_variable_keeps_it_out() -> None:
    assert python(INSTALLED.format("torch"), SWIFTFUSION_DISABLE="1") == "False"


def test_disabled_xfuser_is_stock() -> None:
    code = (
        "import torch\n"
        "try:\n"
        "    import xfuser.config.args as args\n"
        "    print('ours' if hasattr(args.xFuserArgs, 'sp_strategy') else 'stock')\n"
        "except NotImplementedError as error:\n"
        "    print('stock' if 'No Accelerators' in str(error) else error)\n"
    )
    assert python(code, SWIFTFUSION_DISABLE="1") == "stock"
    assert python(code) == "ours"


def test_autoload_never_raises(monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    def fail() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(bootstrap, "install", fail)
    monkeypatch.delenv("SWIFTFUSION_DISABLE", raising=False)
    bootstrap.autoload()
    assert "swiftfusion_xdit: not loaded: RuntimeError('broken')" in capsys.readouterr().err


def test_finder_finds_nothing_of_others() -> None:
    finder = bootstrap.XfuserFinder()
    assert finder.find_spec("json", None) is None
    assert finder.find_spec("xfuser.logger", None) is None


def test_install_is_idempotent() -> None:
    before = list(sys.meta_path)
    try:
        bootstrap.uninstall()
        assert not bootstrap.is_installed()
        bootstrap.install()
        bootstrap.install()
        assert sum(isinstance(f, bootstrap.XfuserFinder) for f in sys.meta_path) == 1
    finally:
        sys.meta_path[:] = before


def test_hooked_module_keeps_its_own_loader() -> None:
    code = (
        "import importlib.machinery as m, torch, xfuser.config.args as args\n"
        "print(type(args.__loader__) is type(args.__spec__.loader) is m.SourceFileLoader)"
    )
    assert python(code) == "True"


def test_enable_in_python_before_xfuser() -> None:
    code = (
        "import sys, swiftfusion_xdit\n"
        "swiftfusion_xdit.enable(strategy='torus', machines=2)\n"
        "loaded = 'xfuser' in sys.modules\n"
        "import xfuser\n"
        "from swiftfusion_xdit.xdit import hooks\n"
        "print(loaded, hasattr(xfuser.xFuserArgs, 'sp_strategy'), hooks.resolve({}).strategy)"
    )
    assert python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").split() == ["False", "True", "torus"]
