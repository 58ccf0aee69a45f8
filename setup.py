"""What is installed: metadata, entry points and the compiled part under csrc/.

The metadata lives here rather than in pyproject.toml because the extras share requirements and a
CUDA build needs code. setuptools is all that it imports, so that nothing has to be installed
first.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

# torch.backends is loaded at the end of `import torch`; xfuser.plugins is there for launchers that
# look for plugins by that name.
ENTRY_POINTS = {
    "console_scripts": ["swiftfusion = swiftfusion_xdit.cli.main:main"],
    "torch.backends": ["swiftfusion_xdit = swiftfusion_xdit.bootstrap:autoload"],
    "xfuser.plugins": ["swiftfusion_xdit = swiftfusion_xdit:enable"],
}

REQUIREMENTS = [
    "diffusers>=0.33",
    "einops",  # xfuser imports it
    "numpy",
    "packaging",
    "pillow",
    "psutil",
    "pyyaml",
    "rich>=13",
    "torch>=2.6",
    "triton; platform_system == 'Linux'",  # xfuser imports it, also without a GPU
    "xfuser>=0.7,<0.8",
]
PLOTS = ["matplotlib>=3.7"]
VIDEO = ["imageio", "imageio-ffmpeg"]  # diffusers writes videos with them
EXTRAS = {
    "cuda": ["flash-attn-4", "nvshmem4py-cu13"],
    "plots": PLOTS,
    "video": VIDEO,
    "test": [*PLOTS, *VIDEO, "hypothesis", "mypy", "pytest>=8", "pytest-timeout", "ray", "ruff"],
}


def read_version() -> str:
    """`__version__` of the package, read without importing it."""
    source = (ROOT / "swiftfusion_xdit" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__\s*=\s*"([^"]+)"', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('swiftfusion_xdit/__init__.py has no line __version__ = "X.Y.Z"')
    return found.group(1)


def read_readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def load_builder() -> ModuleType:
    """swiftfusion_xdit/native/build.py, without the package, whose requirements may be missing."""
    path = ROOT / "swiftfusion_xdit" / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("native_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """nvcc instead of the C compiler; the library is no Python module and serves every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        try:
            builder.build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except builder.BuildError as error:
            raise CompileError(str(error)) from error


class BuildWithSources(build_py):
    """Takes csrc/ along, so that an installation without nvcc can be completed later."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "swiftfusion_xdit" / "csrc"
            shutil.copytree(ROOT / "csrc", target, dirs_exist_ok=True)


builder = load_builder()
has_nvcc = builder.find_nvcc() is not None
if not has_nvcc:
    print(builder.MISSING_NVCC)

setup(
    name="swiftfusion-xdit",
    version=read_version(),
    description="Torus Attention with one-sided communication as a sequence parallelism of xDiT",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["swiftfusion_xdit", "swiftfusion_xdit.*"]),
    package_data={"swiftfusion_xdit": ["py.typed"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points=ENTRY_POINTS,
    # optional: a toolkit too old for csrc/ must not stop the installation of the rest; loading
    # says then what is missing.
    ext_modules=[Extension("swiftfusion_xdit._native", [], optional=True)] if has_nvcc else [],
    cmdclass={"build_ext": BuildNative, "build_py": BuildWithSources},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
)
