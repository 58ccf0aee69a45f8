"""What is installed: metadata, entry points and, later, the compiled part under csrc/.

The metadata lives here rather than in pyproject.toml because the extras share requirements and a
CUDA build needs code. setuptools is all that it imports, so that nothing has to be installed
first.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

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
    "test": [*PLOTS, *VIDEO, "hypothesis", "mypy", "pytest>=8", "pytest-timeout", "ruff"],
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
