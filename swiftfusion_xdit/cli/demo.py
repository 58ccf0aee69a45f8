"""`swiftfusion demo`: xDiT's own launcher with each strategy, on CPU ranks, and what it shows.

A tiny checkpoint is made locally; the unmodified `xdit` command then runs it in one process and
with `usp`, `tas` and `torus`. The latents must agree; traffic, times and a timeline are reported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from swiftfusion_xdit.cli import demo_report as reports
from swiftfusion_xdit.cli import parity
from swiftfusion_xdit.cli.demo_config import DemoConfig, launch_environment
from swiftfusion_xdit.cli.launch import LaunchError, free_port, launch
from swiftfusion_xdit.cli.tiny_models import MODELS, TinyModel, choose_num_heads, make_checkpoint
from swiftfusion_xdit.simulate.timeline import draw, write_chrome_trace

STRATEGIES = ("usp", "tas", "torus")
SEED = 42


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="run xDiT with usp, tas and torus on CPU ranks and compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=4, help="processes (default 4)")
    parser.add_argument("--machines", type=int, default=2, help="machines to play (default 2)")
    parser.add_argument("--model", help=f"{', '.join(MODELS)} (default flux)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default 4)")
    parser.add_argument("--size", type=int, default=256, help="height and width (default 256)")
    parser.add_argument("--output", type=Path, default=Path("out"), help="directory (default out)")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds for one launch (default 300)"
    )
    parser.add_argument(
        "--parity",
        type=Path,
        metavar="PNG",
        help="draw pictures of diffusers, usp and torus side by side instead: of all models, "
        "cogvideox too, or of the one named by --model",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo. 0: all agree; 1: a launch failed or results differ; 2: bad arguments."""
    console = Console(stderr=True, soft_wrap=True)
    try:
        config = DemoConfig(
            ranks=args.ranks,
            machines=args.machines,
            model=args.model or "flux",
            steps=args.steps,
            size=args.size,
            output=args.output.resolve(),
            timeout_s=args.timeout,
            choices=parity.NAMES if args.parity else tuple(MODELS),
        )
        if not args.parity:
            _check_packages(config.tiny)
    except ValueError as error:
        console.print(f"swiftfusion demo: error: {error}", style="red", markup=False)
        return 2
    try:
        with _terminated_by_signal():
            if args.parity:
                models = [config.model] if args.model else parity.NAMES
                return parity.draw_sheet(config, models, args.parity)
            return _run_demo(config)
    except (LaunchError, FileNotFoundError) as error:
        console.print(f"swiftfusion demo: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("swiftfusion demo: interrupted; its processes have ended", style="red")
        return 130


def _check_packages(model: TinyModel) -> None:
    needed = [("matplotlib", "plots")]
    if model.is_video:
        needed += [("imageio", "video"), ("imageio_ffmpeg", "video")]
    for package, extra in needed:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--model {model.name} needs {package}: pip install 'swiftfusion-xdit[{extra}]'"
            )


@contextmanager
def _terminated_by_signal() -> Iterator[None]:
    """SIGTERM raises, as Ctrl-C does, so that the launched processes are ended."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run_demo(config: DemoConfig) -> int:
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "logs").mkdir(exist_ok=True)
    console = Console()
    heads = choose_num_heads(config.ranks, config.machines)
    checkpoints = config.output / "checkpoints"
    console.print(f"tiny {config.model} with {heads} heads: {checkpoints}", highlight=False)
    make_checkpoint(config.tiny, checkpoints, num_heads=heads)
    outcomes: dict[str, reports.Outcome] = {}
    with (
        tempfile.TemporaryDirectory(prefix="swiftfusion-demo-") as scratch,
        Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<8}"),
            BarColumn(),
            TextColumn("{task.fields[state]:<12}"),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):
        for name in ("single", *STRATEGIES):
            outcomes[name] = _run_launch(config, name, Path(scratch) / name, progress)
    return _write_results(config, outcomes, console)


def _run_launch(
    config: DemoConfig, name: str, scratch: Path, progress: Progress
) -> reports.Outcome:
    saved, reported = scratch / "saved", scratch / "reported"
    saved.mkdir(parents=True)
    reported.mkdir()
    log = config.output / "logs" / f"{name}.log"
    task = progress.add_task(name, total=config.steps, state="loading")

    def show_steps() -> None:
        done = _steps_done(log, config.steps)
        if done:
            progress.update(task, completed=done, state=f"step {done}/{config.steps}")

    try:
        launch(
            xdit_command(config, name, saved),
            log=log,
            cwd=config.output / "checkpoints",
            env=_environment(reported),
            timeout_s=config.timeout_s,
            on_poll=show_steps,
        )
    except LaunchError as error:
        progress.update(task, state="failed")
        raise LaunchError(f"the launch with {name} failed: {error}") from None
    progress.update(task, completed=config.steps, state="done")
    (seconds,) = json.loads((saved / "timings.json").read_text(encoding="utf-8"))[-1:]
    return reports.Outcome(
        latents=reports.read_latents(reported),
        picture=reports.read_picture(saved),
        seconds=seconds,
        ranks=() if name == "single" else reports.read_rank_reports(reported, config.ranks),
    )


def xdit_command(config: DemoConfig, name: str, saved: Path) -> list[str]:
    """The `xdit` command line for a strategy, or for `single`, that saves into `saved`.

    Stock degrees are USP's own: Ulysses inside a machine, Ring across.
    """
    script = Path(sys.executable).with_name("xdit")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "xfuser.cli"]
    text_tokens = math.ceil(64 / config.ranks) * config.ranks
    command += ["--master_port", str(free_port()), "--model", config.tiny.checkpoint]
    command += ["--height", str(config.size), "--width", str(config.size)]
    command += ["--num_inference_steps", str(config.steps), "--seed", str(SEED)]
    command += ["--prompt", config.tiny.prompt(config.ranks), "--output_directory", str(saved)]
    # The one CPU kernel that gives the log-sum-exp, which Ring needs; so all launches use it.
    command += ["--attention_backend", "SDPA_FLASH"]
    command += [part.format(text_tokens=text_tokens) for part in config.tiny.arguments]
    if name != "single":
        command += ["--ulysses_degree", str(config.ranks_per_machine)]
        command += ["--ring_degree", str(config.machines)]
        command += ["--sp-strategy", name, "--sp-machines", str(config.machines)]
    return command


def _environment(reported: Path) -> dict[str, str]:
    return launch_environment(reported) | {
        "SWIFTFUSION_REPORT_DIR": str(reported),
        "SWIFTFUSION_REPORT_DTYPE": "float32",
    }


def _steps_done(log: Path, num_steps: int) -> int:
    """The last step that the pipeline's own progress bar shows in the log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = re.findall(rf"\b(\d+)/{num_steps} \[", text)
    return max((int(number) for number in found), default=0)


def _write_results(
    config: DemoConfig, outcomes: Mapping[str, reports.Outcome], console: Console
) -> int:
    settings = {"model": config.model, "steps": config.steps, "size": config.size}
    report = reports.build_report(outcomes, settings=settings, num_machines=config.machines)
    for name, outcome in outcomes.items():
        Image.fromarray(outcome.picture).save(config.output / f"{name}.png")
    events = [event for rank in outcomes["torus"].ranks for event in rank.events]
    mesh = ", ".join(f"{axis} {degree}" for axis, degree in report["mesh"].items())
    title = f"One layer of {config.model}, {config.ranks} CPU ranks as {config.machines} machines"
    draw(events, config.output / "timeline.png", title=f"{title}: {mesh}")
    write_chrome_trace(events, config.output / "timeline.json")
    text = json.dumps(report, indent=2)
    (config.output / "report.json").write_text(text + "\n", encoding="utf-8")
    console.print(reports.report_table(report))
    console.print(f"compared: {report['compared']}", highlight=False)
    files = [*(f"{name}.png" for name in outcomes), "timeline.png", "timeline.json", "report.json"]
    console.print(f"written to {config.output}: {', '.join(files)}", highlight=False)
    for name, row in report["strategies"].items():
        if row["unmetered"]:
            unknown = ", ".join(row["unmetered"])
            console.print(f"{name}: bytes of these are not counted: {unknown}", style="yellow")
    wrong = [name for name, row in report["strategies"].items() if not row["agrees"]]
    if wrong:
        console.print(
            f"results differ from the single process by more than {report['tolerance']:g} of the "
            f"latents' norm: {', '.join(wrong)}",
            style="bold red",
        )
    return 1 if wrong else 0
