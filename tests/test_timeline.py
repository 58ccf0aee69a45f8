"""A timeline is a valid Chrome trace and a legible picture, measured or simulated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from swiftfusion_xdit.simulate.timeline import (
    KINDS,
    Event,
    chrome_trace,
    classify,
    draw,
    lanes,
    write_chrome_trace,
)

STREAMS = ("compute", "ring", "push")


def layer(num_ranks: int) -> list[Event]:
    """A layer with puts, waits and attends on three streams, skewed from rank to rank."""
    events = []
    for rank in range(num_ranks):
        start = 1e9 + 10.0 * rank
        for stage in range(3):
            at = start + 400.0 * stage
            names = ("attend q 0 kv 1", f"wait kv {stage}", f"put q {stage}")
            for stream, name, delay in zip(STREAMS, names, (100.0, 0.0, 20.0), strict=True):
                duration = 300.0 if stream == "compute" else 80.0
                full_name = f"pull_kv[{stage}]: {name}"
                events.append(Event(rank, stream, full_name, at + delay, at + delay + duration))
    return events


events_strategy = st.lists(
    st.builds(
        lambda rank, stream, name, start, duration: Event(
            rank, stream, name, start, start + duration
        ),
        st.integers(0, 7),
        st.sampled_from(STREAMS),
        st.sampled_from(["put k 1", "wait k 1", "attend", 'odd "name"\n', ""]),
        st.floats(0, 1e12),
        st.floats(0, 1e6),
    ),
    max_size=40,
)


@given(events_strategy)
def test_trace_holds_every_event_once_with_names_for_every_lane(events: list[Event]) -> None:
    trace = json.loads(json.dumps(chrome_trace(events)))["traceEvents"]
    slices = [entry for entry in trace if entry["ph"] == "X"]
    threads = {
        (entry["pid"], entry["tid"]): entry["args"]["name"]
        for entry in trace
        if entry["ph"] == "M" and entry["name"] == "thread_name"
    }
    processes = {
        entry["pid"]: entry["args"]["name"]
        for entry in trace
        if entry["ph"] == "M" and entry["name"] == "process_name"
    }
    found = sorted((s["pid"], threads[s["pid"], s["tid"]], s["name"]) for s in slices)
    assert found == sorted((event.rank, event.stream, event.name) for event in events)
    assert processes == {rank: f"rank {rank}" for rank in {event.rank for event in events}}
    assert all(s["ts"] >= 0 and s["dur"] >= 0 and math.isfinite(s["ts"]) for s in slices)


def test_trace_keeps_the_distances_between_events(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    events = layer(2)
    write_chrome_trace(events, path)
    slices = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    origin = min(event.start_us for event in events)
    expected = sorted((e.start_us - origin, e.end_us - e.start_us, e.rank) for e in events)
    found = sorted((s["ts"], s["dur"], s["pid"]) for s in slices)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("put k chunk 3", "put"),
        ("pull_kv[1]: wait k chunk 3", "wait"),
        ("push_o[0]: put o 2", "put"),
        ("attend q 0 kv 1", "attend"),
        ("merge 2", "merge"),
        ("signal FULL", "release"),
        ("release k[chunk 1, heads 0] to rank 1", "release"),
        ("collect o[chunk 0, heads 1]", "copy"),
        ("something", "other"),
        ("", "other"),
    ],
)
def test_kind_is_the_action_and_not_the_stage(name: str, kind: str) -> None:
    assert classify(name) == kind


def test_colours_are_distinct() -> None:
    assert len({kind.color for kind in KINDS.values()}) == len(KINDS)


def test_streams_have_the_same_order_in_every_rank() -> None:
    events = [
        Event(0, "compute", "attend", 5, 6),
        Event(0, "push", "put", 1, 2),
        Event(1, "compute", "attend", 2, 3),
        Event(1, "push", "put", 4, 5),
    ]
    assert lanes(events) == [(0, "push"), (0, "compute"), (1, "push"), (1, "compute")]


def test_picture_of_eight_ranks_shows_every_kind_in_its_colour(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    draw(layer(8), path, title="8 ranks")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[0] >= 24 * 30, "a lane must be high enough to read its label"
    for key in ("put", "wait", "attend"):
        color = tuple(int(KINDS[key].color[i : i + 2], 16) for i in (1, 3, 5))
        count = int((pixels == color).all(axis=-1).sum())
        assert count > 1000, f"{key} covers only {count} pixels"


def test_an_instant_is_visible(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    events = [Event(0, "compute", "attend", 0, 1000), Event(0, "push", "release", 500, 500)]
    draw(events, path, title="an instant")
    pixels = np.asarray(Image.open(path).convert("RGB"))
    color = tuple(int(KINDS["release"].color[i : i + 2], 16) for i in (1, 3, 5))
    assert (pixels == color).all(axis=-1).sum() > 200


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="events must not be empty"):
        draw([], tmp_path / "timeline.png", title="nothing")


@pytest.mark.parametrize(("start", "end"), [(2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_impossible_times_are_an_error(start: float, end: float) -> None:
    with pytest.raises(ValueError, match="start_us"):
        Event(0, "compute", "attend", start, end)
