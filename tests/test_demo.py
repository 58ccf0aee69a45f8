"""`swiftfusion demo`: unmodified xDiT with each strategy agrees with one process, and says so."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from swiftfusion_xdit.cli.demo_report import TOLERANCE, Outcome, compare
from swiftfusion_xdit.cli.tiny_models import choose_num_heads
from tests.test_launch import assert_ended

STRATEGIES = ("usp", "tas", "torus")
NUM_BYTES_FP32 = 4


def demo_command(output: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "swiftfusion_xdit", "demo", "--output", str(output), *arguments]


def run_demo(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = demo_command(output, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=590, check=False)


def read_report(output: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    report = json.loads((output / "report.json").read_text())
    for name, row in report["strategies"].items():
        assert row["relative_diff_vs_single"] <= TOLERANCE, (name, row, done.args)
        assert row["unmetered"] == [], (name, row)
    return report


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """A demo of 4 ranks as 2 machines: its directory, what it printed, its report."""
    output = tmp_path_factory.mktemp("demo") / "out"
    done = run_demo(output, "--steps", "2", "--size", "128")
    return output, done.stdout, read_report(output, done)


def test_report_has_the_documented_fields(demo: tuple[Path, str, dict[str, Any]]) -> None:
    report = demo[2]
    assert (report["ranks"], report["machines"], report["steps"]) == (4, 2, 2)
    assert report["mesh"] == {"torus": 2, "ulysses": 1, "ring": 2}
    # Two double and two single blocks, each step.
    assert report["attention_calls"] == 4 * 2
    assert tuple(report["strategies"]) == STRATEGIES
    for row in report["strategies"].values():
        assert math.isfinite(row["max_abs_diff_vs_single"])
        assert row["seconds"] > 0
        assert isinstance(row["bytes_same_machine"], int)
        assert isinstance(row["bytes_across_machines"], int)


def test_bytes_across_machines_are_the_papers(demo: tuple[Path, str, dict[str, Any]]) -> None:
    report = demo[2]
    expected = bytes_across(report, heads=6, text_tokens=64)
    found = {name: row["bytes_across_machines"] for name, row in report["strategies"].items()}
    assert found == expected


def bytes_across(report: dict[str, Any], *, heads: int, text_tokens: int) -> dict[str, int]:
    """The paper's formulas for all machines and calls of a run of Flux in fp32."""
    machines = report["machines"]
    tokens = text_tokens + (report["size"] // 16) ** 2
    elements = tokens * heads * 16 * report["attention_calls"]
    usp = 2 * (machines - 1) * elements
    torus = 4 * (machines - 1) * elements // machines
    return {
        "usp": usp * NUM_BYTES_FP32,
        "tas": torus * NUM_BYTES_FP32,
        "torus": torus * NUM_BYTES_FP32,
    }


def test_pictures_are_the_same(demo: tuple[Path, str, dict[str, Any]]) -> None:
    output = demo[0]
    single = np.asarray(Image.open(output / "single.png"), dtype=int)
    assert single.shape == (128, 128, 3)
    assert single.std() > 10, "a flat picture would agree with anything"
    for name in STRATEGIES:
        picture = np.asarray(Image.open(output / f"{name}.png"), dtype=int)
        assert np.abs(picture - single).max() <= 1, name


def test_timeline_shows_one_layer_of_every_rank(demo: tuple[Path, str, dict[str, Any]]) -> None:
    output = demo[0]
    entries = json.loads((output / "timeline.json").read_text())["traceEvents"]
    for rank in range(4):
        kinds = {e["cat"] for e in entries if e["ph"] == "X" and e["pid"] == rank}
        assert {"put", "wait", "attend", "merge"} <= kinds, (rank, kinds)
    picture = Image.open(output / "timeline.png")
    assert picture.width > 1000


def test_it_prints_a_table_and_what_is_compared(demo: tuple[Path, str, dict[str, Any]]) -> None:
    printed = demo[1]
    for word in ("strategy", *STRATEGIES, "single", "latents", "report.json"):
        assert word in printed, printed


@pytest.mark.slow
def test_torus_sends_half_of_usp_across_four_machines(tmp_path: Path) -> None:
    arguments = ("--ranks", "8", "--machines", "4", "--steps", "2", "--size", "128")
    report = read_report(tmp_path, run_demo(tmp_path, *arguments))
    assert report["mesh"] == {"torus": 4, "ulysses": 1, "ring": 2}
    found = {name: row["bytes_across_machines"] for name, row in report["strategies"].items()}
    assert found == bytes_across(report, heads=12, text_tokens=64)
    assert found["usp"] == 2 * found["torus"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["wan", "sd3"])
def test_other_models_agree(model: str, tmp_path: Path) -> None:
    arguments = ("--model", model, "--steps", "2", "--size", "128")
    report = read_report(tmp_path, run_demo(tmp_path, *arguments))
    assert report["model"] == model
    assert report["attention_calls"] > 0
    assert report["strategies"]["torus"]["bytes_across_machines"] > 0


def test_a_failed_launch_says_which_and_where_its_log_is(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "--size", "128", "--timeout", "0.5")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the launch with single failed: no end within 0.5 s" in done.stderr
    assert str(tmp_path / "logs" / "single.log") in done.stderr
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process(signum: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        demo_command(tmp_path, "--size", "128"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        family: list[psutil.Process] = []
        for _ in range(1200):  # xdit, torchrun, one rank
            family = psutil.Process(process.pid).children(recursive=True)
            if len(family) >= 3 or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signum)
        _, printed = process.communicate(timeout=120)
    assert len(family) >= 3, printed
    assert process.returncode == 130, printed
    assert "interrupted" in printed
    for child in family:
        assert_ended(child.pid)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "4", "--machines", "3"), "--machines must divide --ranks: 4 ranks on 3"),
        (("--ranks", "1", "--machines", "1"), "--ranks must be at least 2, got 1"),
        (("--machines", "0"), "--machines must be at least 1, got 0"),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--size", "100"), "--size must be a multiple of 16"),
        (("--ranks", "6", "--size", "128"), "got size 128 with 6 ranks; the next that works is"),
        (
            ("--model", "dalle"),
            "--model must be one of flux, wan, sd3, hunyuan_video, qwen_image, ",
        ),
        (("--model", "dalle"), "got 'dalle'"),
        (("--model", "cogvideox"), "got 'cogvideox'"),
        (("--parity", "x.png", "--model", "dalle"), "qwen_image, cogvideox, got 'dalle'"),
        (("--timeout", "-1"), "--timeout must be a positive number of seconds, got -1"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from swiftfusion_xdit.cli.main import main

    output = tmp_path / "out"
    assert main(["demo", "--output", str(output), *arguments]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not output.exists()


def test_output_must_be_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from swiftfusion_xdit.cli.main import main

    file = tmp_path / "file"
    file.touch()
    assert main(["demo", "--output", str(file)]) == 2
    assert "--output must be a directory" in capsys.readouterr().err


def outcome(latents: dict[int, np.ndarray]) -> Outcome:
    return Outcome(latents, np.zeros((2, 2, 3), np.uint8), seconds=1.0, ranks=())


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e-2])
def test_one_wrong_value_on_one_rank_is_a_disagreement(bad: float) -> None:
    latents = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    wrong = latents.copy()
    wrong[1, 2] += bad
    found = compare(outcome({0: latents, 1: wrong}), outcome({0: latents}))
    assert found["relative_diff_vs_single"] > TOLERANCE
    same = compare(outcome({0: latents, 1: latents}), outcome({0: latents}))
    assert same["relative_diff_vs_single"] == 0.0


def test_latents_of_another_shape_are_a_disagreement() -> None:
    found = compare(outcome({0: np.zeros((2, 3))}), outcome({0: np.zeros((2, 4))}))
    assert found["relative_diff_vs_single"] == math.inf


@pytest.mark.parametrize("num_machines", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("per_machine", [1, 2, 3, 4, 8])
def test_head_count_suits_stock_xdit_and_the_papers_rule(
    num_machines: int, per_machine: int
) -> None:
    num_ranks = num_machines * per_machine
    heads = choose_num_heads(num_ranks, num_machines)
    assert heads % per_machine == 0, "stock Ulysses inside a machine"
    assert math.gcd(num_ranks, heads) % num_machines == 0, "Ulysses across machines"
    if (num_ranks, num_machines) in {(4, 2), (8, 4)}:
        assert math.gcd(num_ranks, heads) == num_machines, "and Ring inside"


def test_the_environment_of_a_launch_is_the_demos(monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftfusion_xdit.cli import demo as demo_module

    monkeypatch.setenv("SWIFTFUSION_DISABLE", "1")
    monkeypatch.setenv("SWIFTFUSION_SP_STRATEGY", "tas")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SWIFTFUSION_TIMEOUT_S", "12")
    env = demo_module._environment(Path("/reports"))
    assert not {"SWIFTFUSION_DISABLE", "SWIFTFUSION_SP_STRATEGY", "RANK"} & set(env)
    assert env["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1"
    assert env["SWIFTFUSION_TIMEOUT_S"] == "12"
    assert env["PATH"] == os.environ["PATH"]
