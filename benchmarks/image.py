"""How long does a whole FLUX.1 image take under xDiT, and what does --sp-strategy torus gain?

    python -m benchmarks.image [--size 1024] [--steps 28] [--compile] [--json FILE]
    python -m benchmarks.image --tiny       the same on CPU ranks with the demo's tiny FLUX

Launches xDiT's own runner, unmodified, as a user does, once with each strategy in turn, on one
checkpoint with random weights, which is made first. xDiT times the images itself. A picture that
is not the first strategy's fails its row. What is done is in the file after every launch.
"""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import image_checkpoint
from benchmarks.common import environment, provenance
from benchmarks.image_config import BACKENDS, LAUNCH_S, ROOTS, ROUNDS, SIZES, STEPS, Case, Settings
from benchmarks.image_launch import Launched, run_case
from benchmarks.image_report import MAX_DIFFERENCE, METHOD, results_of, show
from swiftfusion_xdit.cli.bench_report import write_json

SPARE = 1.2  # of the longest launch so far: what must be left for another one


class Image:
    """All launches of a run, and what they say so far."""

    def __init__(self, settings: Settings, path: Path | None) -> None:
        self.settings, self.path = settings, path
        self.launches: dict[Case, list[Launched]] = {case: [] for case in settings.cases()}
        self._start_s = time.monotonic()
        self._longest_s = 0.0
        self.report = {
            **provenance("image", __doc__),
            **environment(),
            "settings": settings.as_dict(),
            "weights": None,
            "method": METHOD,
        }

    def run(self, say: Callable[[str], None]) -> None:
        """Make the checkpoint, then launch until all rounds are done or the time is over.

        Raises:
            ValueError: see ``image_checkpoint.ensure``.
        """
        self.report["weights"] = image_checkpoint.ensure(self.settings)
        self.report["checkpoint_s"] = round(time.monotonic() - self._start_s, 1)
        say(f"checkpoint ready after {self.report['checkpoint_s']} s: {self.settings.checkpoint}")
        self._write(complete=False)
        with tempfile.TemporaryDirectory(prefix="swiftfusion-image-") as scratch:
            for number, (round_idx, case) in enumerate(turns(self.settings)):
                if any(done.failure for done in self.launches[case]):
                    continue
                left_s = self.settings.timeout - (time.monotonic() - self._start_s)
                # One that is cut short would only cost its row the launches before.
                if left_s < max(SPARE * self._longest_s, 1.0):
                    say(f"the time is over, {left_s:.0f} s are left: {case.name} is not launched")
                    return
                folder = Path(scratch) / f"{number}_{case.label}"
                limit_s = min(left_s, self.settings.launch_timeout)
                done = run_case(self.settings, case, folder, limit_s)
                self._add(case, done)
                say(f"round {round_idx + 1}: {case.name}: {told(done)}")
            self._write(complete=True)

    def _add(self, case: Case, done: Launched) -> None:
        self.launches[case].append(done)
        if done.failure is None:
            self._longest_s = max(self._longest_s, done.wall_s)
        self._write(complete=False)

    def _write(self, *, complete: bool) -> None:
        self.report |= {
            "complete": complete,
            "seconds": round(time.monotonic() - self._start_s, 1),
            "results": results_of(self.launches, self.settings.max_difference),
        }
        if self.path is not None:
            write_json(self.path, self.report)


def turns(settings: Settings) -> list[tuple[int, Case]]:
    """Rounds and cases in the order of their launches; the first case of a round rotates."""
    cases = settings.cases()
    return [
        (number, cases[(number + place) % len(cases)])
        for number in range(settings.rounds)
        for place in range(len(cases))
    ]


def told(done: Launched) -> str:
    if done.failure is not None:
        return f"{done.failure}\n" + "\n".join(f"  | {line}" for line in done.log)
    images = ", ".join(f"{seconds:.2f}" for seconds in done.images_s)
    return f"{images} s an image, {done.load_s} s of loading, {done.wall_s} s in all"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.image", description=(__doc__ or "").splitlines()[0]
    )
    add = made.add_argument
    words = functools.partial(add, type=lambda text: tuple(text.split(",")))
    add("--size", type=int, help="pixels of the square image's side (1024; tiny: 128)")
    add("--steps", type=int, help="denoising steps (28; tiny: 4)")
    add("--ranks", type=int, default=2, help="one GPU each (2)")
    words("--strategies", default=("usp", "torus"), help="of usp,tas,torus (usp,torus)")
    words("--backends", help="xDiT's attention backends (CUDNN,FLASH_4; tiny: SDPA_FLASH)")
    words("--schedules", default=("auto",), help="of torus; see --sp-schedule (auto)")
    words("--only", default=(), help="rows by their names in the table")
    add("--compile", action="store_true", help="with xDiT's --use_torch_compile")
    add("--rounds", type=int, help="launches of each row, at most (2; tiny: 1)")
    add("--images", type=int, default=3, help="timed images of a launch (3)")
    add("--warmup-calls", type=int, default=0, help="images before, besides the first (0)")
    add(
        "--max-difference",
        type=float,
        default=MAX_DIFFERENCE,
        help=f"of a picture, above which its row fails ({MAX_DIFFERENCE:g})",
    )
    add("--checkpoint", type=Path, metavar="DIR", help="kept and used again (under out/image)")
    add("--timeout", type=float, default=500.0, help="seconds after which all ends (500)")
    add("--launch-timeout", type=float, help="seconds of a launch (180; with --compile 420)")
    add("--tiny", action="store_true", help="a tiny model on CPU ranks")
    add("--json", type=Path, metavar="FILE", help="write the results here too, after each launch")
    return made


def settings_of(args: dict[str, Any]) -> Settings:
    """Arguments with the defaults that depend on the device.

    Raises:
        ValueError: see ``Settings``; or there are too few GPUs.
    """
    device = "cpu" if args["tiny"] else "cuda"
    for name, defaults in (
        ("size", SIZES),
        ("steps", STEPS),
        ("rounds", ROUNDS),
        ("backends", BACKENDS),
        ("checkpoint", ROOTS),
    ):
        args[name] = defaults[device] if args[name] is None else args[name]
    args["checkpoint"] = args["checkpoint"].resolve()
    if args["launch_timeout"] is None:
        args["launch_timeout"] = LAUNCH_S[args["compile"]]
    settings = Settings(**args)
    if device == "cuda" and torch.cuda.device_count() < settings.ranks:
        raise ValueError(
            f"--ranks must be at most the number of GPUs, {torch.cuda.device_count()}, got "
            f"{settings.ranks}; --tiny needs none"
        )
    return settings


def main() -> int:
    """0: every row is good; 1: some failed, or there was no time for them."""
    made = parser()
    args = vars(made.parse_args())
    path = args.pop("json")
    try:
        settings = settings_of(args)
    except ValueError as error:
        made.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated; its ranks have ended"))
    image = Image(settings, path)
    try:
        image.run(functools.partial(print, file=sys.stderr, flush=True))
    except ValueError as error:
        made.error(str(error))
    show(image.report, settings)
    rows = image.report["results"]
    return int(any(row["failure"] is not None or row["image_s"] is None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
