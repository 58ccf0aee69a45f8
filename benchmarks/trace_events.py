"""What ran in a rank's layers: read from a profile, told apart, split into layers, added up.

An `Activity` is one kernel or copy with its times. Its lane is "attention", "transfers" or "other
kernels"; what is not known is another kernel.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from swiftfusion_xdit.simulate.timeline import Event

ATTENTION, TRANSFERS, OTHER = LANES = ("attention", "transfers", "other kernels")
# Of Kineto's categories, what ran on a GPU; and on CPU ranks, operators and gloo's own threads.
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
CPU_CATEGORIES = ("cpu_op", "user_annotation")
STEP = "step"  # an event that the runtime recorded itself
MOST_LABEL = 48  # characters

_MARKER = re.compile("all_?reduce", re.IGNORECASE)
_TRANSFER = re.compile("nccl|nvshmem|gloo:|put_kernel", re.IGNORECASE)
_WAIT = re.compile("wait_tensor")
# FlashAttention 4 and what extends it are named by their compiler.
_ATTENTION = re.compile("flash|fmha|sdpa|attention|attn|kernel_cutlass_", re.IGNORECASE)
_MERGE = re.compile("merge_kernel")
_COPY = re.compile("pack_kernel|copy|catarray|clone|contiguous|reshape", re.IGNORECASE)


class NotSplit(RuntimeError):
    """What was recorded does not show where one layer ends and the next begins."""


@dataclass(frozen=True)
class Activity:
    """One kernel, copy or step, from ``start_us`` to ``end_us``."""

    name: str
    category: str
    stream: str
    start_us: float
    end_us: float
    num_bytes: int = 0

    @property
    def is_marker(self) -> bool:
        """Whether it is of the all-reduces around the layers; a layer itself has none."""
        return self.category != STEP and _MARKER.search(self.name) is not None


@dataclass(frozen=True)
class Recording:
    """What one rank ran, and when the all-reduces before and behind it ended.

    ``pushes``: its copies inside and between GPUs are transfers, as ours are. Stock copies tensors
    with them too.
    """

    activities: tuple[Activity, ...]
    opening_us: tuple[float, ...]
    closing_us: tuple[float, ...]
    pushes: bool

    def shifted(self, by_us: float) -> Recording:
        """The same on a clock that is ahead by ``by_us``."""
        moved = (
            replace(each, start_us=each.start_us + by_us, end_us=each.end_us + by_us)
            for each in self.activities
        )
        opening, closing = (
            tuple(at + by_us for at in ends) for ends in (self.opening_us, self.closing_us)
        )
        return replace(self, activities=tuple(moved), opening_us=opening, closing_us=closing)


@dataclass(frozen=True)
class LayerRun:
    """One layer as one rank ran it. It begins where the layer before ended."""

    start_us: float
    end_us: float
    activities: tuple[Activity, ...]


def read_profile(trace: Mapping[str, Any], *, origin_ns: int = 0) -> list[Activity]:
    """The activities of a trace as torch.profiler exports it, by start.

    Args:
        trace: the JSON; Kineto's times are microseconds since its ``baseTimeNanoseconds``.
        origin_ns: Unix time that counts as 0. Near the trace, so that nanoseconds are not rounded.
    """
    on_gpu = any(entry.get("cat") in GPU_CATEGORIES for entry in trace["traceEvents"])
    categories = GPU_CATEGORIES if on_gpu else CPU_CATEGORIES
    base_ns = int(trace.get("baseTimeNanoseconds", 0)) - origin_ns
    found = []
    for entry in trace["traceEvents"]:
        if entry.get("ph") != "X" or entry.get("cat") not in categories:
            continue
        start_us = (base_ns + round(float(entry["ts"]) * 1e3)) / 1e3
        args = entry.get("args", {})
        found.append(
            Activity(
                name=str(entry["name"]),
                category=entry["cat"],
                stream=str(args.get("stream", entry.get("tid"))),
                start_us=start_us,
                end_us=start_us + float(entry.get("dur", 0.0)),
                num_bytes=int(args.get("bytes", 0)),
            )
        )
    found.sort(key=lambda each: (each.start_us, -each.end_us))
    return found if on_gpu else _outermost(found)


def _outermost(activities: Iterable[Activity]) -> list[Activity]:
    """Without operators that run inside another one of their thread."""
    found, end_us = [], dict[str, float]()
    for each in activities:
        if each.start_us >= end_us.get(each.stream, -math.inf):
            end_us[each.stream] = each.end_us
            found.append(each)
    return found


def recording_of(activities: Sequence[Activity], num_markers: int, *, pushes: bool) -> Recording:
    """What lies between the last two sets of ``num_markers`` all-reduces.

    Raises:
        NotSplit: there are too few of them.
    """
    markers = [each for each in activities if each.is_marker and each.category != "cpu_op"]
    if len(markers) < 2 * num_markers:
        names = ", ".join(sorted({_short(each.name) for each in activities})) or "nothing at all"
        raise NotSplit(
            f"{2 * num_markers} all-reduces were looked for, {len(markers)} recorded; all that was "
            f"recorded: {names}"
        )
    opening, closing = markers[-2 * num_markers : -num_markers], markers[-num_markers:]
    # From the start of the last one on: a host may go on a little before its record ends.
    begin_us, end_us = opening[-1].start_us, closing[0].start_us
    inside = tuple(
        each for each in activities if not each.is_marker and begin_us <= each.start_us < end_us
    )
    opened, closed = (tuple(each.end_us for each in part) for part in (opening, closing))
    return Recording(inside, opened, closed, pushes)


def align(recordings: Sequence[Recording]) -> tuple[list[Recording], list[float], float]:
    """All on rank 0's clock: their shifts, and how far the closing all-reduces are apart then.

    An all-reduce ends on all ranks at once, within the microsecond or two that its last step takes.
    """
    first = recordings[0]
    shifts = []
    for each in recordings:
        pairs = zip(first.opening_us, each.opening_us, strict=True)
        shifts.append(statistics.median([mine - theirs for mine, theirs in pairs] or [0.0]))
    aligned = [each.shifted(by) for each, by in zip(recordings, shifts, strict=True)]
    closing = zip(*(each.closing_us for each in aligned), strict=True)
    apart = [max(ends) - min(ends) for ends in closing]
    return aligned, shifts, statistics.median(apart or [0.0])


def classify(activity: Activity, *, pushes: bool) -> tuple[str, str]:
    """Its lane, and its name as a timeline shows it, whose first word decides the colour."""
    name, short = activity.name, _short(activity.name)
    if activity.category == STEP:
        lane = {"attend": ATTENTION, "put": TRANSFERS}.get(name.split()[0], OTHER)
        return lane, name
    if activity.category == "gpu_memcpy":
        if "PtoP" in name or (pushes and "DtoD" in name):
            return TRANSFERS, f"put {activity.num_bytes / 2**20:.2f} MiB"
        return OTHER, f"copy {name}"
    for pattern, lane, verb in (
        (_TRANSFER, TRANSFERS, "send and receive "),
        (_WAIT, OTHER, "wait "),
        (_ATTENTION, ATTENTION, "attend "),
        (_MERGE, OTHER, "merge "),
        (_COPY, OTHER, "copy "),
    ):
        if pattern.search(name):
            return lane, verb + short
    return OTHER, short


def _short(name: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    if name.startswith("kernel_cutlass_"):
        name = name.split("_object_at")[0]
    elif "aten::" not in name and not name.startswith(("Memcpy", "Memset")):
        name = re.split("[<(]", name)[0].split("::")[-1]
    return name[:MOST_LABEL] or "unnamed"


def split_layers(recording: Recording, num_layers: int) -> tuple[list[LayerRun], str]:
    """The layers of a recording, and by what they were told apart.

    ``activities``: each layer ran the same ones. Otherwise ``attention``, if each layer ran as many
    attention kernels: a layer then is what lies between the first one of it and of the next, and
    there is one less.

    Raises:
        NotSplit: neither fits.
    """
    activities = sorted(recording.activities, key=lambda each: each.start_us)
    parts = _chunks(activities, num_layers)
    if parts and len({tuple(sorted(Counter(a.name for a in part).items())) for part in parts}) == 1:
        start_us, found = recording.opening_us[-1], []
        for part in parts:
            end_us = max(start_us, *(each.end_us for each in part))
            found.append(LayerRun(start_us, end_us, tuple(part)))
            start_us = end_us
        return found, "activities"
    calls = [a for a in activities if classify(a, pushes=recording.pushes)[0] == ATTENTION]
    parts = _chunks(calls, num_layers)
    if len(parts) < 2:
        names = ", ".join(sorted({_short(each.name) for each in activities})) or "nothing"
        raise NotSplit(
            f"{num_layers} layers ran {len(activities)} activities, {len(calls)} of them attention,"
            f" which is no whole number for each; recorded: {names}"
        )
    bounds = pairwise(part[0].start_us for part in parts)
    return [
        LayerRun(start, end, tuple(a for a in activities if start <= a.start_us < end))
        for start, end in bounds
    ], "attention"


def _chunks(activities: Sequence[Activity], num_layers: int) -> list[Sequence[Activity]]:
    """Equal parts, or none."""
    each, rest = divmod(len(activities), num_layers)
    if rest or not each:
        return []
    return [activities[at : at + each] for at in range(0, len(activities), each)]


def covered_us(spans: Iterable[tuple[float, float]], start_us: float, end_us: float) -> float:
    """How much of an interval the spans cover together."""
    covered, reached = 0.0, start_us
    for start, end in sorted(spans):
        start, end = max(start, reached), min(end, end_us)
        if end > start:
            covered += end - start
            reached = end
    return covered


def layer_times(layer: LayerRun, *, pushes: bool) -> dict[str, float]:
    """Microseconds of one layer on one rank.

    ``exposed_us`` is its time without any attention kernel at work; in ``idle_us`` of it nothing
    was at work at all: the rank waited for a peer, or for its host.
    """
    lanes = [(classify(each, pushes=pushes)[0], each) for each in layer.activities]

    def covered(*wanted: str) -> float:
        spans = ((each.start_us, each.end_us) for lane, each in lanes if lane in wanted)
        return covered_us(spans, layer.start_us, layer.end_us)

    layer_us, attention_us = layer.end_us - layer.start_us, covered(ATTENTION)
    return {
        "layer_us": layer_us,
        "attention_us": attention_us,
        "transfers_us": covered(TRANSFERS),
        "exposed_us": layer_us - attention_us,
        "idle_us": layer_us - covered(*LANES),
    }


def to_events(rank: int, activities: Iterable[Activity], *, pushes: bool) -> list[Event]:
    """Events of our timeline. What overlaps in a lane goes to a second one, and so on."""
    ends: dict[str, list[float]] = {lane: [] for lane in LANES}
    events = []
    for each in sorted(activities, key=lambda each: each.start_us):
        lane, label = classify(each, pushes=pushes)
        free = [i for i, end in enumerate(ends[lane]) if end <= each.start_us]
        if not free:
            free = [len(ends[lane])]
            ends[lane].append(0.0)
        place = free[0]
        ends[lane][place] = each.end_us
        stream = lane if place == 0 else f"{lane} {place + 1}"
        events.append(Event(rank, stream, label, each.start_us, each.end_us))
    return events
