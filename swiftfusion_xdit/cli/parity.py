"""`swiftfusion demo --parity`: pictures of diffusers in one process, usp and torus, side by side.

Three launches run every model: one process with diffusers alone, then all ranks with `usp` and with
`torus`. What is compared is not rounded to eight bits.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from swiftfusion_xdit.cli import parity_sheet
from swiftfusion_xdit.cli.demo_config import DemoConfig, launch_environment
from swiftfusion_xdit.cli.launch import LaunchError, free_port, launch
from swiftfusion_xdit.cli.tiny_models import (
    COGVIDEOX,
    MODELS,
    choose_num_heads,
    find,
    make_checkpoint,
)

STRATEGIES = ("usp", "torus")
NAMES = (*MODELS, COGVIDEOX.name)
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Decoded:
    """What one rank's VAE took and gave: `picture [h, w, 3]` in 0..1, a video's first frame."""

    latents: np.ndarray
    picture: np.ndarray


def draw_sheet(config: DemoConfig, models: Sequence[str], sheet: Path) -> int:
    """Run `models` and draw `sheet`; 0: all agree, 1: some do not.

    Raises:
        LaunchError: a launch failed.
        FileNotFoundError: no rank of a launch decoded a model's latents.
    """
    console = Console()
    logs = config.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="swiftfusion-parity-") as name:
        scratch = Path(name)
        heads = choose_num_heads(config.ranks, config.machines)
        for model in models:
            make_checkpoint(find(model), scratch / "checkpoints", num_heads=heads)
        with Progress(console=console) as progress:
            for strategy in ("single", *STRATEGIES):
                _launch(config, models, strategy, scratch, progress)
        rows = [_row(model, scratch) for model in models]
    sheet.parent.mkdir(parents=True, exist_ok=True)
    caption = f"tiny random weights, {config.size} x {config.size}, {config.steps} steps, float32"
    ranks = f"{config.ranks} CPU ranks as {config.machines} machines"
    parity_sheet.draw(rows, f"{caption}; {ranks}").save(sheet, optimize=True)
    for row in rows:
        numbers = ", ".join(f"{name} {value:.1e}" for name, value in row.relative.items())
        console.print(f"{row.title}: {numbers}", highlight=False)
    console.print(f"largest relative differences of latents; written: {sheet}", highlight=False)
    wrong = [row.title for row in rows if not max(row.relative.values()) <= TOLERANCE]
    if wrong:
        console.print(f"more than {TOLERANCE:g}: {', '.join(wrong)}", style="bold red")
    return 1 if wrong else 0


def _launch(
    config: DemoConfig, models: Sequence[str], strategy: str, scratch: Path, progress: Progress
) -> None:
    output = scratch / strategy
    output.mkdir()
    log = config.output / "logs" / f"parity_{strategy}.log"
    task = progress.add_task(f"{strategy:<6}", total=len(models))

    def show() -> None:
        text = log.read_text(encoding="utf-8", errors="replace")
        done = sum(f"finished {model}" in text for model in models)
        progress.update(task, completed=done)

    try:
        launch(
            rank_command(config, models, strategy, output),
            log=log,
            cwd=scratch / "checkpoints",
            env=launch_environment(scratch),
            timeout_s=config.timeout_s,
            on_poll=show,
        )
    except LaunchError as error:
        raise LaunchError(f"the launch with {strategy} failed: {error}") from None


def rank_command(
    config: DemoConfig, models: Sequence[str], strategy: str, output: Path
) -> list[str]:
    """Starts the rank or ranks that leave their results in `output`."""
    command = [sys.executable, "-m"]
    if strategy != "single":
        command += ["torch.distributed.run", "--nproc_per_node", str(config.ranks)]
        command += ["--master_port", str(free_port()), "-m"]
    command += ["swiftfusion_xdit.cli.parity_ranks", "--strategy", strategy, "--models", *models]
    command += ["--size", str(config.size), "--steps", str(config.steps)]
    command += ["--ranks", str(config.ranks), "--machines", str(config.machines)]
    return [*command, "--output", str(output)]


def _row(model: str, scratch: Path) -> parity_sheet.Row:
    (single,) = read(scratch / "single", model)
    decoded = {strategy: read(scratch / strategy, model) for strategy in STRATEGIES}
    return parity_sheet.Row(
        title=find(model).pipeline.removesuffix("Pipeline"),
        pictures={
            "single": single.picture,
            **{strategy: ranks[0].picture for strategy, ranks in decoded.items()},
        },
        relative={
            strategy: max(relative_difference(rank.latents, single.latents) for rank in ranks)
            for strategy, ranks in decoded.items()
        },
    )


def read(directory: Path, model: str) -> list[Decoded]:
    """What each rank that decoded has left.

    Raises:
        FileNotFoundError: no rank did.
    """
    found = sorted(directory.glob(f"{model}_rank*.npz"))
    if not found:
        raise FileNotFoundError(f"no rank decoded {model}: {directory}/{model}_rank*.npz")
    results = []
    for path in found:
        with np.load(path, allow_pickle=False) as fields:
            results.append(Decoded(fields["latents"], fields["picture"]))
    return results


def relative_difference(out: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of `expected`; inf where shapes differ or for NaN."""
    if out.shape != expected.shape:
        return float("inf")
    exact = expected.astype(np.float64)
    value = float(np.linalg.norm(out.astype(np.float64) - exact) / np.linalg.norm(exact))
    return value if np.isfinite(value) else float("inf")
