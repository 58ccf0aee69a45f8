"""The contact sheet of demo --parity shows what it is given, and the launches it draws agree."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from swiftfusion_xdit.cli import parity, parity_sheet
from swiftfusion_xdit.cli.demo_config import launch_environment

ROOT = Path(__file__).parent.parent


def row(difference: float, *, size: int = 16) -> parity_sheet.Row:
    single = np.full((size, size, 3), 0.25, dtype=np.float32)
    pictures = {"single": single, "usp": single, "torus": single + np.float32(difference)}
    return parity_sheet.Row("Tiny", pictures, {"usp": 0.0, "torus": difference})


@pytest.mark.parametrize(
    ("difference", "factor"), [(0.75, 1), (0.3, 2), (0.2, 5), (1.5e-6, 500_000), (0.0, 10**9)]
)
def test_amplification_fills_the_range(difference: float, factor: int) -> None:
    assert row(difference).amplification == factor


def test_a_nan_is_as_different_as_can_be() -> None:
    bad = row(0.0)
    bad.pictures["torus"][3, 4] = np.nan
    assert bad.difference[3, 4].min() == 1.0


def test_the_sheet_shows_each_picture_and_the_difference() -> None:
    sheet = np.asarray(parity_sheet.draw([row(0.0), row(0.5)], "caption"))
    size, step = 16, 16 + parity_sheet.GAP
    for index, difference in enumerate((0.0, 0.5)):
        top = parity_sheet.HEADER_HEIGHT + index * step
        for column, value in enumerate((0.25, 0.25, 0.25 + difference, difference * 2)):
            left = parity_sheet.LABEL_WIDTH + column * step
            tile = sheet[top : top + size, left : left + size]
            assert (tile == round(value * 255)).all(), (index, column)


@pytest.mark.parametrize(
    ("out", "expected", "value"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([3.0], [3.0, 4.0], float("inf")),
        ([3.0, float("nan")], [3.0, 4.0], float("inf")),
    ],
)
def test_relative_difference(out: list[float], expected: list[float], value: float) -> None:
    found = parity.relative_difference(np.array(out), np.array(expected))
    assert found == pytest.approx(value)


def test_results_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no rank decoded flux"):
        parity.read(tmp_path, "flux")


def test_commands_name_ranks_and_strategy() -> None:
    config = argparse.Namespace(ranks=4, machines=2, size=64, steps=1)
    single = parity.rank_command(config, ["flux"], "single", Path("out"))  # type: ignore[arg-type]
    assert "torch.distributed.run" not in single
    ranks = parity.rank_command(config, ["flux"], "torus", Path("out"))  # type: ignore[arg-type]
    assert ranks[ranks.index("--nproc_per_node") + 1] == "4"
    assert ranks[ranks.index("--strategy") + 1] == "torus"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="these launches run xDiT on CPU ranks")
def test_all_pipelines_agree(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    command = [sys.executable, "-m", "swiftfusion_xdit", "demo", "--parity", str(sheet)]
    command += ["--size", "128", "--steps", "2", "--output", str(tmp_path / "out")]
    env = launch_environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in parity.NAMES:
        title = parity.find(name).pipeline.removesuffix("Pipeline")
        assert f"{title}: usp " in done.stdout
    with Image.open(sheet) as image:
        assert image.height > len(parity.NAMES) * 128
