"""Makes an interpreter ready for the project and prints its path.

Standard library only: `make` runs it with whatever Python 3.10 or later the machine has. Where that
interpreter already has torch, the project is installed into it; otherwise into .venv. Nothing is
reinstalled while what was installed still fits, and a .venv that does not work is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = ROOT / ".environment.json"
LOCK = ROOT / ".environment.lock"
LOG = ROOT / ".environment.log"
LOG_LINES = 25
CPU_CONSTRAINTS = ROOT / "constraints-cpu.txt"
INPUTS = (ROOT / "setup.py", ROOT / "pyproject.toml", CPU_CONSTRAINTS, Path(__file__).resolve())
SUPPORTED = ((3, 10), (3, 14))
REQUIREMENT = f"{ROOT}[test]"
PACKAGES = [
    *("torch", "diffusers", "transformers", "triton", "einops", "numpy", "rich"),
    *("matplotlib", "pytest", "hypothesis", "mypy"),
]
PRESENT = [*PACKAGES, "xfuser", "swiftfusion_xdit", "ruff"]


class SetupError(Exception):
    """What the machine lacks, and what to do about it."""


def main() -> int:
    try:
        check_version()
        with LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two `make`s at once must not share a half-made .venv
            python = ready_interpreter()
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    print(python)
    return 0


def check_version() -> None:
    low, high = SUPPORTED
    if not low <= sys.version_info[:2] < high:
        raise SetupError(
            f"Python must be 3.10 to 3.13, and {sys.executable} is {sys.version.split()[0]}; "
            f"name another one: make PYTHON=/path/to/python3 ..."
        )


def ready_interpreter() -> str:
    """The path of an interpreter into which the project and its test tools are installed."""
    use_active = importlib.util.find_spec("torch") is not None and imports(sys.executable, "torch")
    inherit = use_active and not is_writable()
    python = sys.executable if use_active and not inherit else str(VENV / "bin" / "python")
    stamp = {"python": python, "version": sys.version, "inputs": digest(), "driver": has_driver()}
    if read_stamp() == stamp and is_complete(python):
        return python
    STAMP.unlink(missing_ok=True)
    if python == sys.executable:
        install(python)
    else:
        install_into_venv(python, inherit=inherit)
    STAMP.write_text(json.dumps(stamp), encoding="utf-8")
    return python


def is_writable() -> bool:
    """Whether packages may be installed into the running interpreter."""
    in_venv = sys.prefix != sys.base_prefix
    managed = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    return os.access(sysconfig.get_path("purelib"), os.W_OK) and (in_venv or not managed.exists())


def install_into_venv(python: str, *, inherit: bool) -> None:
    """Install into .venv, made anew where it is missing or does not work."""
    if venv_works(python):
        try:
            install(python)
        except SetupError:
            # An interrupted installation can leave packages that pip takes for whole.
            say(".venv is not usable as it is")
        else:
            return
    make_venv(inherit=inherit)
    install(python)


def venv_works(python: str) -> bool:
    if not Path(python).exists() or not imports(python, "pip"):
        return False
    found = run_quietly([python, "-c", "import sys; print(sys.version)"])
    return found.returncode == 0 and found.stdout.strip() == sys.version.strip()


def make_venv(*, inherit: bool) -> None:
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            f"{sys.executable} cannot make a virtual environment: the module ensurepip is missing. "
            f"On Debian and Ubuntu: apt-get install python{version}-venv. "
            f"Or name another Python: make PYTHON=/path/to/python3 ..."
        )
    say(f"making {VENV}")
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    elif VENV.exists():
        shutil.rmtree(VENV)
    command = [sys.executable, "-m", "venv", str(VENV)]
    run([*command, "--system-site-packages"] if inherit else command)


def install(python: str) -> None:
    """torch first and alone, then the project under a constraint that keeps that torch.

    Raises:
        SetupError: pip failed, or what it installed cannot be imported.
    """
    if not imports(python, "pip"):
        raise SetupError(f"{python} has no pip: run `{python} -m ensurepip`")
    if not imports(python, "torch"):
        # The default build is the one with CUDA, for a machine with a driver.
        options = ["torch>=2.6"] if has_driver() else ["-c", str(CPU_CONSTRAINTS), "torch"]
        pip(python, *options)
    # The version as pip knows it: torch.__version__ can name the build too.
    code = "from importlib.metadata import version; print(version('torch'))"
    version = run_quietly([python, "-c", code]).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(f"torch=={version}\n", encoding="utf-8")
        pip(python, "-c", str(constraints), "-e", REQUIREMENT)
    # The project and xfuser, which it hooks into, are left out: a mistake in the project must not
    # look like a broken environment.
    found = run_quietly([python, "-c", f"import {', '.join(PACKAGES)}"])
    if found.returncode != 0:
        raise SetupError(f"{python} cannot import what was installed:\n{found.stderr}")


def is_complete(python: str) -> bool:
    """Whether all that is needed seems to be there, without importing it."""
    code = (
        f"from importlib.util import find_spec as f; raise SystemExit(not all(map(f, {PRESENT})))"
    )
    return Path(python).exists() and run_quietly([python, "-c", code]).returncode == 0


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def digest() -> str:
    content = b"\0".join(path.read_bytes() for path in INPUTS)
    return hashlib.sha256(content).hexdigest()


def read_stamp() -> object:
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def imports(python: str, module: str) -> bool:
    return run_quietly([python, "-c", f"import {module}"]).returncode == 0


def run_quietly(command: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        return subprocess.run(
            command, cwd="/", env=env, capture_output=True, text=True, check=False
        )
    except OSError as error:  # a .venv whose interpreter is gone
        return subprocess.CompletedProcess(command, 127, "", str(error))


def pip(python: str, *arguments: str) -> None:
    say(f"pip install {' '.join(arguments)}    (log: {LOG})")
    run([python, "-m", "pip", "install", "--disable-pip-version-check", *arguments])


def run(command: list[str]) -> None:
    with LOG.open("w+", encoding="utf-8", errors="replace") as log:
        status = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        ).returncode
        if status != 0:
            log.seek(0)
            tail = "".join(log.readlines()[-LOG_LINES:])
            raise SetupError(f"exit status {status} of {' '.join(command)}\n{tail}")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
