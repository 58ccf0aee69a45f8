"""How long does a model's transformer take for a denoising step, under torus and under xDiT?

    python -m benchmarks.model_step [--model flux] [--sizes 1024,2048] [--compile] [--json FILE]
    python -m benchmarks.model_step --tiny       the same on CPU ranks with a tiny model, in seconds

All in one run, in turn, on one model with random weights under xDiT's own wrapper: xDiT's USP at
every pair of degrees, ours (what ``--sp-strategy torus`` does), and the ceiling, a step without any
communication in its attention. ``--compile`` adds the same steps compiled by xDiT's own runner, and
``--ranks 1`` runs xDiT's on one GPU, against which `swiftfusion bench report` scales the others.
Models and their sizes are in step_models/.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.table import Table

from benchmarks import step_models
from benchmarks.common import environment, provenance
from benchmarks.model_step_config import (
    BACKENDS,
    COMPILE,
    HEADINGS,
    HOST,
    KINDS,
    PEER_TIMEOUT_S,
    Settings,
)
from benchmarks.model_step_ranks import ModelStep
from swiftfusion_xdit.cli.bench_parts import Ranks
from swiftfusion_xdit.cli.bench_report import tables_console, write_json

METHOD = {
    "ms": "Strategies take turns in each round, in an order of its own: none comes after the one "
    "that it came after in the round before, where that can be, and the rest is drawn. A turn is a "
    "barrier, then --steps steps back to back; the slowest rank's time counts, divided by the "
    "steps.",
    "best stock /": "The fastest of xDiT's own of the same mode over this one: median over rounds "
    "of the two times of a round, divided.",
    "ceiling": "Each rank attends, with our kernel, heads / ranks heads of as many rows as all "
    "ranks have together, made of its own rows: what torus would take if communication were free.",
    "layer graphs": "Attention layers of torus are CUDA graphs of their own where "
    "SWIFTFUSION_LAYER_GRAPHS says so, by default auto; without and with: it is 0 and 1.",
    "host ms": "Time until the calls of a step return, on the slowest rank.",
    "peak GiB": "torch.cuda.max_memory_allocated of the strategy's first steps, less what the "
    "strategies before it keep, plus torus's symmetric memory, which torch does not count.",
    "error": "Norm of the difference to the first of xDiT's own in eager mode, over its norm. The "
    "ceiling's shows how far off a step is whose attention is wrong.",
}


def show(found: dict[str, Any], settings: Settings) -> None:
    model = f"a tiny {settings.module.TITLE}" if settings.tiny else settings.module.TITLE
    table = Table(
        title=f"A step of {model} at {found['size']}: {found['image_tokens']} image and "
        f"{found['text_tokens']} text tokens, {settings.ranks} ranks, {found['rounds']} rounds"
    )
    for heading in HEADINGS:
        is_text = heading in ("strategy", "note")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading != "note")
    for compiled in (False, True):
        table.add_section()
        for result in found["results"]:
            if result["compiled"] is compiled:
                table.add_row(*_row(result))
    tables_console().print(table)


def _row(result: dict[str, Any]) -> list[str]:
    name = result["name"] + (" compiled" if result["compiled"] else "")
    if result["failure"]:
        return [name, "", "", "", "", "", result["failure"]]

    def text(part: str, digits: int) -> str:
        low, middle, high = (f"{result[part][q]:.{digits}f}" for q in ("q1", "median", "q3"))
        return f"{middle} ({low} - {high})"

    error = result["relative_error"]
    notes = [result["plan"] or "", "the best stock" if result.get("is_best_stock") else ""]
    notes += [f"{count} {name}" for name, count in result["compiler"].items() if count]
    return [
        name,
        text("ms", 1),
        text("best_stock_over", 3) if "best_stock_over" in result else "",
        f"{result['host_ms']['median']:.1f}",
        f"{result['peak_gib']:.2f}",
        "" if error is None else f"{error:.1e}",
        "; ".join(note for note in notes if note),
    ]


def run_rank(rank: int, settings: Settings, port: int, path: Path | None, timeout_s: float) -> None:
    """A rank's process. Rank 0 prints, and writes the file after each size."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.dump_traceback_later(timeout_s + 10, exit=True)  # shows where a rank was stuck
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    device = torch.device("cpu")
    if settings.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if settings.device == "cuda" else "gloo",
        store=dist.TCPStore(HOST, port, is_master=False, wait_for_workers=False),
        rank=rank,
        world_size=settings.ranks,
        timeout=timedelta(seconds=PEER_TIMEOUT_S),
    )
    import swiftfusion_xdit

    # xDiT as it is, also where there is no GPU; torus is put in force for its turns.
    swiftfusion_xdit.enable("usp")
    start_s = time.monotonic()
    report = report_of(settings)
    with torch.no_grad():
        bench = ModelStep(settings, Ranks(), device)
        for size in settings.sizes:
            found = bench.measure(size)
            report["sizes"].append(found)
            report["seconds"] = round(time.monotonic() - start_s, 1)
            if rank == 0:
                show(found, settings)
                if path is not None:
                    write_json(path, report)
    if rank == 0:
        print(
            f"{report['seconds']} s",
            *(f"{name}: {text}" for name, text in METHOD.items()),
            sep="\n",
        )
    dist.destroy_process_group()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def report_of(settings: Settings) -> dict[str, Any]:
    return {
        **provenance("model_step", __doc__),
        **environment(),
        "settings": dataclasses.asdict(settings),
        "model": {"title": settings.module.TITLE, **settings.config},
        "method": METHOD,
        "sizes": [],
    }


def run_ranks(settings: Settings, path: Path | None, timeout_s: float) -> None:
    """Start the ranks and wait; none is left when this returns or raises.

    Raises:
        SystemExit: a rank failed, or the time is up.
    """
    os.environ |= {
        "WORLD_SIZE": str(settings.ranks),
        "LOCAL_WORLD_SIZE": str(settings.ranks),
        "GLOO_SOCKET_IFNAME": "lo",
        "LOG_LEVEL": os.environ.get("LOG_LEVEL", "error"),
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
        "DIFFUSERS_VERBOSITY": os.environ.get("DIFFUSERS_VERBOSITY", "error"),
        "SWIFTFUSION_TIMEOUT_S": os.environ.get("SWIFTFUSION_TIMEOUT_S", str(PEER_TIMEOUT_S)),
    }
    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated; its ranks have ended"))
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    deadline = time.monotonic() + timeout_s
    ranks = multiprocessing.start_processes(
        run_rank,
        (settings, store.port, path, timeout_s),
        nprocs=settings.ranks,
        join=False,
        daemon=True,
    )
    try:
        while not ranks.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise SystemExit(f"the ranks were not done within {timeout_s:g} s")
    except (
        multiprocessing.ProcessRaisedException,
        multiprocessing.ProcessExitedException,
    ) as error:
        raise SystemExit(str(error)) from None
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model_step", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    words = functools.partial(add, type=lambda text: tuple(text.split(",")))
    add("--model", default="flux", help=f"one of {', '.join(step_models.NAMES)} (flux)")
    words(
        "--sizes",
        default=None,
        help="of flux, pixels of the square image's side; of others, by "
        "name: 480p, 720p; 49f (all that the model has)",
    )
    words("--kinds", default=KINDS, help="of stock,ours,ceiling (all)")
    words("--backends", default=None, help="xDiT's attention backends (CUDNN,FLASH_4)")
    words("--only", default=(), help="strategies by their names in the table")
    words("--schedules", default=("auto",), help="of auto,torus,folded,pipelined,fused (auto)")
    add("--layer-graphs", action="store_true", help="torus with SWIFTFUSION_LAYER_GRAPHS=0 and 1")
    add("--ranks", type=int, default=2, help="one GPU each (2); of 1, xDiT's steps alone")
    add(
        "--compile",
        nargs="?",
        const="whole",
        choices=COMPILE,
        help="also compiled: the whole transformer, as xDiT does (whole), or block by block, which "
        "takes a fraction of the time to compile (blocks)",
    )
    add("--no-compile", dest="compile", action="store_const", const=None, help="the default")
    add("--compile-mode", help="of torch.compile (xDiT's for the model)")
    add("--compile-seconds", type=float, default=240.0, help="then no more is compiled (240)")
    add("--rounds", type=int, default=5, help="rounds of turns, at most (5)")
    add("--seconds", type=float, default=120.0, help="of a size, after which no round begins (120)")
    add("--steps", type=int, default=2, help="steps of a turn (2)")
    add("--timeout", type=float, default=540.0, help="seconds after which all ends (540)")
    add("--tiny", action="store_true", help="a tiny model, on the CPU unless --device cuda")
    add("--device", choices=tuple(BACKENDS), help="cuda, or cpu with --tiny")
    add("--json", type=Path, metavar="FILE", help="write the results here too, after each size")
    args = vars(parser.parse_args())
    path, timeout_s = args.pop("json"), args.pop("timeout")
    args["device"] = args["device"] or ("cpu" if args["tiny"] else "cuda")
    args["backends"] = args["backends"] or BACKENDS[args["device"]]
    try:
        module = step_models.load(args["model"])
        args["sizes"] = args["sizes"] or tuple(module.TINY_SIZES if args["tiny"] else module.SIZES)
        settings = Settings(**args)
    except ValueError as error:
        parser.error(str(error))
    run_ranks(settings, path, timeout_s)


if __name__ == "__main__":
    main()
