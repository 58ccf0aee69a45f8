"""Compiles csrc/ with nvcc. Standard library only: setup.py loads this file before anything is
installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# A checkout has csrc beside the package, an installation inside it.
SOURCE_FOLDERS = (PACKAGE.parent / "csrc", PACKAGE / "csrc")
LIBRARY_NAME = "_native.so"
COMMAND = "python -m swiftfusion_xdit.native build"

# Machine code for the GPUs in use, and PTX that the driver compiles for every other from sm_80 on.
TARGETS = (
    "arch=compute_80,code=[sm_80,compute_80]",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100,code=sm_100",
)
FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "--threads=0",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)
MISSING_NVCC = (
    "nvcc not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda): the "
    "compiled part of swiftfusion_xdit is left out, and with it CUDA transports. "
    f"With the CUDA toolkit 12.8 or later: {COMMAND}"
)


class BuildError(RuntimeError):
    """csrc/ could not be compiled; the message has the command and what it printed."""


def source_folder() -> Path | None:
    """The folder with the sources, or None where neither place has them."""
    for folder in SOURCE_FOLDERS:
        if (folder / "swiftfusion.h").is_file():
            return folder
    return None


def sources(folder: Path) -> list[Path]:
    """Every file that the build reads, headers included, in a fixed order."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".h", ".cpp", ".cu"))


def digest(folder: Path) -> str:
    """Names a build: the sources and how they are compiled."""
    content = hashlib.sha256(repr((TARGETS, FLAGS)).encode())
    for path in sources(folder):
        content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def find_nvcc() -> str | None:
    """The path of nvcc, or None."""
    candidates = [os.environ.get("CUDACXX")]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(os.path.join(os.environ[variable], "bin", "nvcc"))  # noqa: PTH118
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    return None


def command_line(nvcc: str, folder: Path, output: Path) -> list[str]:
    """The nvcc command line that builds the library at ``output``."""
    return [
        nvcc,
        *FLAGS,
        *(f"-gencode={target}" for target in TARGETS),
        f'-DSF_SOURCE_DIGEST="{digest(folder)}"',
        "-o",
        str(output),
        *(str(path) for path in sources(folder) if path.suffix != ".h"),
    ]


def cached_library(folder: Path) -> Path:
    """Where the build of these sources lies if the package's folder is not writable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "swiftfusion_xdit" / f"native-{digest(folder)}.so"


def default_output(folder: Path) -> Path:
    """The package's folder, or the user's cache where that is not writable."""
    return PACKAGE / LIBRARY_NAME if os.access(PACKAGE, os.W_OK) else cached_library(folder)


def build(output: Path | None = None) -> Path:
    """Compile the library; several processes may do so at once.

    Raises:
        BuildError: no nvcc, no sources, or nvcc failed.
    """
    folder, nvcc = source_folder(), find_nvcc()
    if folder is None:
        places = " and ".join(map(str, SOURCE_FOLDERS))
        raise BuildError(f"the sources of the compiled part are missing: looked in {places}")
    if nvcc is None:
        raise BuildError(MISSING_NVCC)
    output = output or default_output(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".native-") as scratch:
        unfinished = Path(scratch) / LIBRARY_NAME
        line = command_line(nvcc, folder, unfinished)
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{' '.join(line)}\n{done.stdout}{done.stderr}")
        unfinished.replace(output)
    return output
