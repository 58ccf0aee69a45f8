"""Timeline: what every rank did in a layer, as a picture and as a Chrome trace.

Measured and simulated runs produce the same `Event` values, so both are drawn alike: a lane for
each rank and stream, time to the right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Event:
    """One thing that one stream of one rank did, from `start_us` to `end_us` (microseconds).

    Ranks share the clock. `name` begins with what was done (`put k 3`, `wait q 1`, `attend ...`),
    which decides the colour.

    Raises:
        ValueError: the event ends before it starts, or a time is not finite.
    """

    rank: int
    stream: str
    name: str
    start_us: float
    end_us: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start_us) and math.isfinite(self.end_us)):
            raise ValueError(
                f"event {self.name!r} of rank {self.rank}: times must be finite, got "
                f"start_us={self.start_us}, end_us={self.end_us}"
            )
        if self.end_us < self.start_us:
            raise ValueError(
                f"event {self.name!r} of rank {self.rank}: end_us must not be before start_us, got "
                f"start_us={self.start_us}, end_us={self.end_us}"
            )

    @property
    def kind(self) -> str:
        """The kind of step, one of `KINDS`."""
        return classify(self.name)


@dataclass(frozen=True)
class Kind:
    """A kind of step: the words that name it and its colour, with that of text on it."""

    words: tuple[str, ...]
    color: str
    text_color: str = "black"


# Colours are told apart with the common forms of colour blindness too (Okabe and Ito's palette).
KINDS = {
    "attend": Kind(("attend",), "#0072B2", "white"),
    "merge": Kind(("merge",), "#56B4E9"),
    "put": Kind(("put", "push", "send"), "#009E73"),
    "get": Kind(("get", "pull", "recv"), "#CC79A7"),
    "wait": Kind(("wait",), "#E69F00"),
    "release": Kind(("release", "signal"), "#D55E00"),
    "copy": Kind(("copy", "collect"), "#F0E442"),
    "other": Kind((), "#999999"),
}
# What names a stage rather than an action: `pull_kv[1]: wait k` is a wait.
_STAGE_SEPARATOR = ": "
_MIN_VISIBLE_FRACTION = 0.0012
_MIN_LABEL_FRACTION = 0.035
_POINTS_PER_CHARACTER = 4.2


def classify(name: str) -> str:
    """The key of `KINDS` for an event of this name."""
    action = name.split(_STAGE_SEPARATOR)[-1].strip().lower()
    for key, kind in KINDS.items():
        if action.startswith(kind.words):
            return key
    return "other"


def lanes(events: Iterable[Event]) -> list[tuple[int, str]]:
    """The (rank, stream) pairs that occur: ranks in order, a rank's streams as they first start."""
    first_start: dict[tuple[int, str], float] = {}
    for event in events:
        lane = (event.rank, event.stream)
        first_start[lane] = min(first_start.get(lane, math.inf), event.start_us)
    # A stream has the same place in every rank, or the eye cannot compare ranks.
    stream_start: dict[str, float] = {}
    for (_, stream), start in first_start.items():
        stream_start[stream] = min(stream_start.get(stream, math.inf), start)
    return sorted(first_start, key=lambda lane: (lane[0], stream_start[lane[1]], lane[1]))


def chrome_trace(events: Sequence[Event]) -> dict[str, Any]:
    """`events` as a trace in Chrome's JSON format, which Perfetto opens.

    A rank is a process and a stream one of its threads; times in microseconds from the first event.
    """
    origin = min((event.start_us for event in events), default=0.0)
    thread_of: dict[tuple[int, str], int] = {}
    entries: list[dict[str, Any]] = []
    for rank, stream in lanes(events):
        threads_of_rank = sum(lane[0] == rank for lane in thread_of)
        thread_of[rank, stream] = threads_of_rank
        if threads_of_rank == 0:
            entries.append(_metadata("process_name", rank, 0, {"name": f"rank {rank}"}))
            entries.append(_metadata("process_sort_index", rank, 0, {"sort_index": rank}))
        entries.append(_metadata("thread_name", rank, threads_of_rank, {"name": stream}))
        order = {"sort_index": threads_of_rank}
        entries.append(_metadata("thread_sort_index", rank, threads_of_rank, order))
    for event in sorted(events, key=lambda event: (event.start_us, -event.end_us)):
        entries.append(
            {
                "name": event.name,
                "cat": event.kind,
                "ph": "X",
                "ts": round(event.start_us - origin, 3),
                "dur": round(event.end_us - event.start_us, 3),
                "pid": event.rank,
                "tid": thread_of[event.rank, event.stream],
            }
        )
    return {"traceEvents": entries, "displayTimeUnit": "ms"}


def _metadata(name: str, rank: int, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": rank, "tid": thread, "args": args}


def write_chrome_trace(events: Sequence[Event], path: str | Path) -> None:
    """Write `events` to `path` in Chrome's trace format (open it with Perfetto)."""
    Path(path).write_text(json.dumps(chrome_trace(events), indent=1), encoding="utf-8")


def draw(events: Sequence[Event], path: str | Path, *, title: str) -> None:
    """Draw `events` into the picture `path`, a lane per rank and stream.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is not installed (`pip install swiftfusion-xdit[plots]`).
    """
    if not events:
        raise ValueError("events must not be empty: there is nothing to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing a timeline needs matplotlib: pip install 'swiftfusion-xdit[plots]'"
        ) from error

    all_lanes = lanes(events)
    figure = Figure(figsize=(14, 1.6 + 0.3 * len(all_lanes)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed, and pyplot's global state stays as it is
    axes = figure.add_subplot()
    _draw_bars(axes, events, all_lanes)
    _label_lanes(axes, all_lanes)
    axes.set_title(title, loc="left", fontsize=11)
    figure.savefig(str(path))


def _draw_bars(axes: Axes, events: Sequence[Event], all_lanes: list[tuple[int, str]]) -> None:
    from matplotlib.patches import Patch

    origin = min(event.start_us for event in events)
    span = max(max(event.end_us for event in events) - origin, 1e-9)
    # Below a second's worth of microseconds the numbers are easier to read as they are.
    unit, per_unit = ("ms", 1000.0) if span > 10_000 else ("us", 1.0)
    row_of = {lane: row for row, lane in enumerate(all_lanes)}
    for event in events:
        row = row_of[event.rank, event.stream]
        start = (event.start_us - origin) / per_unit
        duration = event.end_us - event.start_us
        width = max(duration, span * _MIN_VISIBLE_FRACTION) / per_unit
        kind = KINDS[event.kind]
        axes.barh(row, width, left=start, height=0.76, color=kind.color, ec="white", lw=0.3)
        if duration > span * _MIN_LABEL_FRACTION:
            # A lane is about 800 points wide; what would not fit is cut.
            room = int(800 * duration / span / _POINTS_PER_CHARACTER)
            text = event.name.split(_STAGE_SEPARATOR)[-1]
            text = text if len(text) <= room else text[: max(room - 1, 1)] + "…"
            center = start + width / 2
            label = axes.text(center, row, text, ha="center", va="center", fontsize=6.5)
            label.set_color(kind.text_color)
    axes.set_xlim(0, span * 1.01 / per_unit)
    axes.set_xlabel(f"time ({unit})")
    present = [key for key in KINDS if any(event.kind == key for event in events)]
    patches = [Patch(color=KINDS[key].color, label=key) for key in present]
    axes.legend(
        handles=patches,
        ncols=len(patches),
        loc="lower right",
        bbox_to_anchor=(1, 1),
        frameon=False,
        fontsize=9,
    )


def _label_lanes(axes: Axes, all_lanes: list[tuple[int, str]]) -> None:
    axes.set_yticks(range(len(all_lanes)))
    axes.set_yticklabels([f"rank {rank}  {stream}" for rank, stream in all_lanes], fontsize=8)
    axes.set_ylim(len(all_lanes) - 0.4, -0.6)
    for row, (rank, _) in enumerate(all_lanes):
        if rank % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="#f2f2f2", zorder=0)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#dddddd", lw=0.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
