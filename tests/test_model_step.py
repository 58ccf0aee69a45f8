"""The benchmark of denoising steps: its models in small, on CPU ranks, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import step_models

pytest.importorskip("xfuser")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.model_step", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def results(path: Path) -> list[dict[str, Any]]:
    (size,) = json.loads(path.read_text(encoding="utf-8"))["sizes"]
    return size["results"]


@pytest.mark.parametrize("name", step_models.NAMES)
def test_every_model_runs_the_same_step_every_way(name: str, tmp_path: Path) -> None:
    path, size = tmp_path / "step.json", next(iter(step_models.load(name).TINY_SIZES))
    words = ("--tiny", "--sizes", size, "--backends", "SDPA_FLASH", "--rounds", "1")
    done = run("--model", name, *words, "--steps", "1", "--json", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    found = results(path)
    assert [result["kind"] for result in found] == ["stock", "stock", "ours", "ceiling"]
    for result in found:
        assert result["failure"] is None and result["ms"]["median"] > 0
        if result["kind"] == "ceiling":  # attends other keys
            assert result["relative_error"] > 1e-2
        else:
            assert result["relative_error"] <= 1e-5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--model", "sd"), "--model must be one of flux, cogvideox, wan, hunyuan_video, got sd"),
        (("--model", "wan", "--sizes", "4k"), "--sizes of Wan2.1-T2V-14B are 480p, 720p, got 4k"),
        (("--sizes", "1000"), "are pixels, multiples of 16, got 1000"),
        (("--model", "cogvideox", "--compile"), "xDiT has no runner for CogVideoX-5B"),
        (("--only", "torus CUDNN,torus SAGE"), "no communication FLASH_4; got torus SAGE"),
        (("--seconds", "0"), "--seconds above 0, got 5, 2 and 0.0"),
        (("--ranks", "5"), "--ranks must be at least 1 and divide 24 heads, got 5"),
        (("--ranks", "0"), "--ranks must be at least 1 and divide 24 heads, got 0"),
        (
            ("--ranks", "1", "--kinds", "ours"),
            "--ranks 1 runs xDiT's own steps alone: --kinds must",
        ),
        (("--ranks", "1", "--layer-graphs"), "are of several ranks; got"),
        (("--sizes", "1040", "--ranks", "8"), "1040 has 4225 of the image and 512 of the text"),
    ],
)
def test_refusals_name_the_argument(words: tuple[str, ...], says: str) -> None:
    done = run(*words, "--device", "cuda")
    assert done.returncode == 2 and says in " ".join(done.stderr.split())


def test_one_rank_is_what_several_are_scaled_against(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    done = run("--tiny", "--ranks", "1", "--sizes", "128", "--rounds", "1", "--json", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    names = [result["name"] for result in results(path) if result["ms"]]
    assert names == ["xDiT u1 r1 SDPA_FLASH", "xDiT u1 r1 SDPA"]


def test_torus_with_layer_graphs_is_a_strategy_of_its_own(tmp_path: Path) -> None:
    """On CPU ranks there is nothing to capture, and the step is the same."""
    path, ours = tmp_path / "step.json", "torus SDPA_FLASH {} layer graphs"
    names = ("xDiT u2 r1 SDPA_FLASH", ours.format("without"), ours.format("with"))
    words = ("--tiny", "--model", "wan", "--only", ",".join(names), "--layer-graphs")
    words += ("--rounds", "1")
    done = run(*words, "--json", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    found = results(path)
    assert [result["layer_graphs"] for result in found] == [None, False, True]
    assert max(result["relative_error"] for result in found[1:]) <= 1e-5


def test_no_round_begins_when_the_time_of_a_size_is_over(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    words = ("--tiny", "--model", "wan", "--only", "torus SDPA_FLASH", "--rounds", "1000")
    done = run(*words, "--seconds", "1e-9", "--json", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    (size,) = json.loads(path.read_text(encoding="utf-8"))["sizes"]
    assert size["rounds"] == len(size["results"][0]["samples_ms"]) == 1


def test_sizes_are_those_of_the_models() -> None:
    rows = {
        ("flux", "1024"): (4096, 512),
        ("cogvideox", "49f"): (17550, 226),
        ("wan", "480p"): (32760, 512),
        ("wan", "720p"): (75600, 512),
        ("hunyuan_video", "720p"): (118800, 256),
    }
    for (name, size), expected in rows.items():
        latents = step_models.latents_of(step_models.load(name), size, tiny=False)
        assert (latents.image_tokens, latents.text) == expected
