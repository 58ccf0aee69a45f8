"""Unmodified launches of xDiT run with the flags: xdit, the runner, an example, a dying rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swiftfusion_xdit.cli.launch import LaunchError, free_port, launch
from swiftfusion_xdit.cli.tiny_models import MODELS, make_checkpoint

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SIZE = 128
STEPS = 2
NUM_LAYERS = 4  # attention layers of the tiny Flux

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="these launches run xDiT on CPU ranks"
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which --model names find a tiny Flux."""
    directory = tmp_path_factory.mktemp("launches")
    make_checkpoint(MODELS["flux"], directory, num_heads=6)
    return directory


def arguments(saved: Path) -> list[str]:
    words = ["--model", MODELS["flux"].checkpoint, "--prompt", "a torus", "--seed", "1"]
    words += ["--height", str(SIZE), "--width", str(SIZE), "--num_inference_steps", str(STEPS)]
    words += ["--max_sequence_length", "32", "--ulysses_degree", "2", "--ring_degree", "2"]
    saved.mkdir(parents=True, exist_ok=True)
    return [*words, "--output_directory", str(saved), "--attention_backend", "SDPA_FLASH"]


def environment(**more: str) -> dict[str, str]:
    foreign = ("SWIFTFUSION_", "TORCH", "MASTER_", "HF_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    ranked = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    env = {key: value for key, value in env.items() if key not in ranked}
    return env | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "SWIFTFUSION_TIMEOUT_S": "60",
        **more,
    }


def torchrun(*command: str, ranks: int = 4) -> list[str]:
    port = f"--master_port={free_port()}"
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", port]
    return [*run, *command]


def xdit(saved: Path) -> list[str]:
    script = Path(sys.executable).with_name("xdit")
    port = ["--master_port", str(free_port())]
    flags = ["--sp-strategy", "torus", "--sp-machines", "2"]
    return [sys.executable, str(script), *port, *arguments(saved), *flags]


def swiftfusion_xdit(saved: Path) -> list[str]:
    port = ["--master_port", str(free_port())]
    flags = ["--sp_strategy=torus", "--sp_machines=2", "--sp-mesh=torus=2,ulysses=2"]
    words = ["swiftfusion_xdit.cli.main", "xdit", *port, *arguments(saved), *flags]
    return [sys.executable, "-m", *words]


def runner(saved: Path) -> list[str]:
    return torchrun("-m", "xfuser.runner", *arguments(saved))


LAUNCHES: dict[str, tuple[Any, dict[str, str]]] = {
    "runner": (runner, {"SWIFTFUSION_SP_STRATEGY": "tas", "SWIFTFUSION_MACHINES": "2"}),
    "xdit": (xdit, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}),
    "swiftfusion xdit": (swiftfusion_xdit, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}),
    "stock": (runner, {}),
}


@pytest.fixture(scope="module")
def results(workplace: Path) -> dict[str, tuple[np.ndarray, list[dict[str, Any]]]]:
    """Latents of the last rank, and the reports of all, by launch."""
    found = {}
    for name, (command, variables) in LAUNCHES.items():
        reported = workplace / f"report {name}"
        report = {"SWIFTFUSION_REPORT_DIR": str(reported), "SWIFTFUSION_REPORT_DTYPE": "float32"}
        launch(
            command(workplace / f"saved {name}"),
            log=workplace / f"{name}.log",
            cwd=workplace,
            env=environment(**report, **variables),
            timeout_s=180,
        )
        reports = [json.loads((reported / f"rank{i}.json").read_text()) for i in range(4)]
        found[name] = np.load(reported / "latents_rank3.npy"), reports
        assert list((workplace / f"saved {name}").glob("*.png"))
    return found


@pytest.mark.parametrize("name", ["runner", "xdit", "swiftfusion xdit"])
def test_latents_agree_with_stock(results: dict[str, Any], name: str) -> None:
    stock, _ = results["stock"]
    latents, _ = results[name]
    assert np.linalg.norm(latents - stock) <= 1e-5 * np.linalg.norm(stock)


@pytest.mark.parametrize(
    ("name", "strategy", "mesh"),
    [
        ("stock", "usp", {"torus": 1, "ulysses": 2, "ring": 2}),
        ("runner", "tas", {"torus": 2, "ulysses": 1, "ring": 2}),
        ("xdit", "torus", {"torus": 2, "ulysses": 1, "ring": 2}),
        ("swiftfusion xdit", "torus", {"torus": 2, "ulysses": 2, "ring": 1}),
    ],
)
def test_reports_say_what_ran(
    results: dict[str, Any], name: str, strategy: str, mesh: dict[str, int]
) -> None:
    for rank, report in enumerate(results[name][1]):
        assert report["rank"] == rank
        assert (report["strategy"], report["mesh"]) == (strategy, mesh)
        assert report["machines"] == (1 if name == "stock" else 2)
        assert report["attention_calls"] == NUM_LAYERS * STEPS
        assert report["unmetered"] == []
        assert report["events"]
        for _, _, start_us, end_us in report["events"]:
            assert start_us <= end_us


def test_reported_bytes_follow_the_formulas(results: dict[str, Any]) -> None:
    """N = 2 machines of M = 2 ranks, Q, K, V and O of L/4 rows, 6 heads of 16, fp32."""
    rows, heads, dim, size = (SIZE // 16) ** 2 + 32, 6, 16, 4
    piece = rows // 4 * heads * dim * size * NUM_LAYERS * STEPS  # Q, K, V or O of one rank
    # Torus and TAS, Ulysses across: half of Q, K, V and O leaves; K and V for half the heads of
    # two chunks pass once round the ring inside the machine.
    expected = {"runner": (2 * piece, 2 * piece), "xdit": (2 * piece, 2 * piece)}
    # Stock is given no machines here, so all that it sends stays on this one: half of Q, K, V, O
    # to the Ulysses peer, and K, V of two chunks, half the heads, round the ring.
    expected["stock"] = (4 * piece, 0)
    for name, (same, across) in expected.items():
        for report in results[name][1]:
            found = report["bytes_same_machine"], report["bytes_across_machines"]
            assert found == (same, across), (name, report["rank"])


def test_example_script(workplace: Path) -> None:
    words = [word for word in arguments(workplace / "saved") if "output" not in word]
    words.remove(str(workplace / "saved"))
    flags = ["--sp_strategy", "torus", "--sp-machines", "2", "--warmup_steps", "0"]
    launch(
        torchrun(str(TESTS / "xdit_example.py"), *words, *flags),
        log=workplace / "example.log",
        cwd=workplace,
        env=environment(SWIFTFUSION_REPORT_DIR=str(workplace / "example")),
        timeout_s=180,
    )
    assert "relative difference" in (workplace / "example.log").read_text()
    report = json.loads((workplace / "example" / "rank0.json").read_text())
    assert report["strategy"] == "torus"
    assert report["attention_calls"] >= NUM_LAYERS * STEPS


def test_bad_flag_ends_the_launch_with_its_name(workplace: Path) -> None:
    with pytest.raises(LaunchError, match=r"--sp_strategy/--sp-strategy.*'ulysses'"):
        launch(
            [sys.executable, "-m", "xfuser.runner", "--model", "m", "--sp-strategy", "ulysses"],
            log=workplace / "bad.log",
            cwd=workplace,
            env=environment(),
            timeout_s=120,
        )


def test_rank_left_alone_ends_with_an_error(workplace: Path) -> None:
    common = environment(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        WORLD_SIZE="2",
        SWIFTFUSION_TIMEOUT_S="5",
        SWIFTFUSION_REPORT_DIR=str(workplace / "dying"),
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "xdit_dying.py")],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=workplace,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].returncode == 7, outputs[1]
    assert ranks[0].returncode not in (0, None), outputs[0]
    assert "PeerTimeout" in outputs[0]
    assert "rank 1" in outputs[0]
    assert json.loads((workplace / "dying" / "rank0.json").read_text())["attention_calls"] == 2
