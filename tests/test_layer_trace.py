"""The benchmark of where a layer's time goes: its arithmetic, its pictures, a run on CPU ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import layer_trace
from benchmarks.trace_events import (
    ATTENTION,
    LANES,
    OTHER,
    STEP,
    TRANSFERS,
    Activity,
    NotSplit,
    Recording,
    align,
    classify,
    covered_us,
    layer_times,
    read_profile,
    recording_of,
    split_layers,
    to_events,
)
from swiftfusion_xdit.cli import performance

MARKERS = 2
FA4 = "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__t"
FUSED = "kernel_cutlass_fused_kernel_swiftfusion_xditattentionfa4_fused_kernelFused_object_at__0"
PACK = "void (anonymous namespace)::pack_kernel<uint4>((anonymous namespace)::PackLaunch)"
MERGE = "void (anonymous namespace)::merge_kernel<__nv_bfloat16, 4>((anonymous namespace)::M)"
REDUCE = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


@pytest.mark.parametrize(
    ("name", "category", "lane", "label"),
    [
        (FA4, "kernel", ATTENTION, "attend kernel_cutlass_kernel_flash_attncuteflash"),
        (FUSED, "kernel", ATTENTION, "attend kernel_cutlass_fused_kernel"),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7",
            "kernel",
            ATTENTION,
            "attend cudnn_generated_fort_native_sdpa",
        ),
        (
            "void flash::flash_fwd_kernel<flash::traits<128>>(p)",
            "kernel",
            ATTENTION,
            "attend flash_fwd",
        ),
        (
            "void cutlass::device_kernel<flash::FlashAttnFwdSm90<int>>(p)",
            "kernel",
            ATTENTION,
            "attend",
        ),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(p)", "kernel", ATTENTION, "attend fmha"),
        ("ncclDevKernel_SendRecv(args)", "kernel", TRANSFERS, "send and receive ncclDevKernel"),
        ("Memcpy PtoP (Device -> Device)", "gpu_memcpy", TRANSFERS, "put 3.00 MiB"),
        ("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", OTHER, "copy Memcpy HtoD"),
        (PACK, "kernel", OTHER, "copy pack_kernel"),
        (MERGE, "kernel", OTHER, "merge merge_kernel"),
        (
            "void at::native::direct_copy_kernel_cuda<int>(p)",
            "kernel",
            OTHER,
            "copy direct_copy_kernel",
        ),
        ("Memset (Device)", "gpu_memset", OTHER, "Memset (Device)"),
        ("void something::new<1, 2>(int)", "kernel", OTHER, "new"),
        ("", "kernel", OTHER, "unnamed"),
        ("put k[chunk 0] to rank 1", STEP, TRANSFERS, "put k[chunk 0]"),
        ("attend q[0] with kv[1], heads 0", STEP, ATTENTION, "attend q[0]"),
        ("wait k[chunk 1] from rank 1", STEP, OTHER, "wait k"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, category: str, lane: str, label: str) -> None:
    activity = Activity(name, category, "7", 0, 1, num_bytes=3 * 2**20)
    found = classify(activity, pushes=False)
    assert found[0] == lane and found[1].startswith(label), found


def test_copies_that_cuda_takes_for_local_are_transfers_of_ours_alone() -> None:
    copy = Activity("Memcpy DtoD (Device -> Device)", "gpu_memcpy", "7", 0, 1, num_bytes=2**20)
    assert classify(copy, pushes=True) == (TRANSFERS, "put 1.00 MiB")
    assert classify(copy, pushes=False)[0] == OTHER


def test_spans_that_overlap_count_once() -> None:
    spans = [(0.0, 4.0), (2.0, 5.0), (3.0, 4.0), (7.0, 8.0), (9.0, 30.0), (-5.0, 1.0)]
    assert covered_us(spans, 1.0, 10.0) == 4.0 + 1.0 + 1.0
    assert covered_us([], 1.0, 10.0) == 0.0


def kernel(name: str, start_us: float, end_us: float, stream: str = "7") -> Activity:
    category = "gpu_memcpy" if name.startswith("Memcpy") else "kernel"
    return Activity(name, category, stream, start_us, end_us)


def torus_layer(start_us: float) -> list[Activity]:
    """100 us: two attention kernels that overlap for 10, 60 together; a put of 20 beside them."""
    return [
        kernel(PACK, start_us + 5, start_us + 10),
        kernel("Memcpy PtoP (Device -> Device)", start_us + 10, start_us + 30, "20"),
        kernel(FA4, start_us + 20, start_us + 55),
        kernel(FA4, start_us + 45, start_us + 80, "13"),
        kernel(MERGE, start_us + 85, start_us + 100),
    ]


def markers(end_us: float) -> list[Activity]:
    return [kernel(REDUCE, end_us - 8, end_us - 4), kernel(REDUCE, end_us - 4, end_us)]


def profiled(num_layers: int, late_us: float = 0.0) -> list[Activity]:
    """Two windows, the first with a layer that took long; the second ends its markers at 1000."""
    slow = [*markers(late_us + 100), kernel(FA4, late_us + 110, late_us + 800)]
    layers = [torus_layer(late_us + 1000 + 100 * i) for i in range(num_layers)]
    end_us = late_us + 1000 + 100 * num_layers + 20
    return [
        *slow,
        *markers(late_us + 900),
        *markers(late_us + 1000),
        *(each for layer in layers for each in layer),
        *markers(end_us),
    ]


def test_exposed_is_what_attention_does_not_cover() -> None:
    recording = recording_of(profiled(3), MARKERS, pushes=True)
    layers, how = split_layers(recording, 3)
    assert how == "activities"
    assert [(layer.start_us, layer.end_us) for layer in layers] == [
        (1000, 1100),
        (1100, 1200),
        (1200, 1300),
    ]
    assert layer_times(layers[1], pushes=True) == {
        "layer_us": 100,
        "attention_us": 60,
        "transfers_us": 20,
        "exposed_us": 40,
        "idle_us": 10,  # the first 5 us, and 5 before the merge
    }


def test_layers_that_differ_are_told_apart_by_their_attention() -> None:
    activities = profiled(4)
    extra = next(i for i, each in enumerate(activities) if each.start_us > 1200)
    activities.insert(extra, kernel("Memset (Device)", 1201, 1202))
    layers, how = split_layers(recording_of(activities, MARKERS, pushes=True), 4)
    assert how == "attention"
    assert [(layer.start_us, layer.end_us) for layer in layers] == [
        (1020, 1120),
        (1120, 1220),
        (1220, 1320),
    ]
    assert [layer_times(layer, pushes=True)["exposed_us"] for layer in layers] == [40, 40, 40]


def test_what_cannot_be_split_says_what_was_recorded() -> None:
    recording = recording_of(profiled(4), MARKERS, pushes=True)
    with pytest.raises(NotSplit, match=r"3 layers ran 20 activities, 8 of them attention.*pack_k"):
        split_layers(recording, 3)
    with pytest.raises(NotSplit, match=r"4 all-reduces were looked for, 0 recorded.*pack_kernel"):
        recording_of(torus_layer(0), MARKERS, pushes=True)


def test_clocks_are_aligned_by_the_ends_of_all_reduces() -> None:
    ranks = [recording_of(profiled(2, late), MARKERS, pushes=True) for late in (0.0, 250.0)]
    aligned, shifts_us, residual_us = align(ranks)
    assert shifts_us == [0.0, -250.0] and residual_us == 0.0
    assert aligned[1] == aligned[0]
    drifted = Recording(ranks[1].activities, ranks[1].opening_us, (1473.0, 1478.0), pushes=True)
    assert align([ranks[0], drifted])[2] == (7 + 8) / 2  # against 1216 and 1220


def test_what_overlaps_in_a_lane_gets_a_lane_of_its_own() -> None:
    events = to_events(1, torus_layer(0), pushes=True)
    assert {(event.rank, event.stream) for event in events} == {
        (1, ATTENTION),
        (1, f"{ATTENTION} 2"),
        (1, TRANSFERS),
        (1, OTHER),
    }
    assert [e.kind for e in events] == ["copy", "put", "attend", "attend", "merge"]


def kineto(activities: list[Activity], base_ns: int) -> dict[str, Any]:
    """A trace as torch.profiler exports it, with entries that are not of a GPU's streams."""
    entries = [
        {
            "ph": "X",
            "cat": each.category,
            "name": each.name,
            "pid": 0,
            "tid": int(each.stream),
            "ts": each.start_us,
            "dur": each.end_us - each.start_us,
            "args": {"device": 0, "stream": int(each.stream), "bytes": 2**20},
        }
        for each in activities
    ]
    others = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1010, "dur": 5},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "flash", "ts": 1010, "dur": 500},
    ]
    return {"baseTimeNanoseconds": base_ns, "traceEvents": [*others, *reversed(entries)]}


def test_times_of_a_profile_keep_their_nanoseconds() -> None:
    base_ns = 1_760_000_000_123_456_789
    (found,) = read_profile(
        kineto([kernel(FA4, 5.001, 7.25)], base_ns), origin_ns=base_ns - 1_000_000
    )
    assert (found.start_us, found.end_us) == (1005.001, pytest.approx(1007.25))
    assert (found.stream, found.num_bytes) == ("7", 2**20)


def traced_case(num_layers: int) -> dict[str, Any]:
    """Two ranks' profiles, the second one's clock 250 us ahead, through to recordings."""
    recordings = [
        recording_of(read_profile(kineto(profiled(num_layers, late), 0)), MARKERS, pushes=True)
        for late in (0.0, 250.0)
    ]
    plan = "strategy torus, 1 machines, mesh torus=1,ulysses=2,ring=1, schedule folded, 5 bytes"
    return {
        "kind": "torus",
        "name": "torus/auto fa4",
        "backend": "fa4",
        "schedule": "auto",
        "mode": "graph",
        "plan": plan,
        "failure": None,
        "untraced_us": 99.0,
        "host_was_ahead": True,
        "recordings": recordings,
    }


def test_profiles_become_numbers_a_picture_and_a_section(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    num_layers = layer_trace.WARM_LAYERS + 2
    case, layers = layer_trace.summarise(traced_case(num_layers), num_layers)
    assert (case["layer_us"]["median"], case["exposed_us"]["median"]) == (100, 40)
    assert case["exposed_percent"] == 40 and len(case["ranks"]) == 2
    assert case["clocks"] == {"shift_us": [0.0, -250.0], "residual_us": 0.0}
    assert case["names"][TRANSFERS] == {"put 1.00 MiB": [1, 20]}
    case |= layer_trace.draw(case, layers, tmp_path, shape="flux1024", where="2 x GPU")
    alone = case | {"kind": "floor", "name": "floor", "plan": None, "mode": "eager", "picture": ""}
    cases = [alone, case]
    layer_trace.add_over_alone(cases)

    trace = json.loads((tmp_path / case["timeline"]).read_text())["traceEvents"]
    slices = [entry for entry in trace if entry["ph"] == "X"]
    assert len(slices) == 2 * len(torus_layer(0))
    begins = [min(e["ts"] for e in slices if e["pid"] == rank) for rank in (0, 1)]
    assert begins == [0, 0]  # on one clock
    attends = [e for e in slices if e["cat"] == "attend"]
    assert [e["dur"] for e in attends] == [35] * 4

    report = {
        "benchmark": "layer_trace",
        "command": "python -m benchmarks.layer_trace",
        "date": "2026-01-02T03:04:05+00:00",
        "settings": {"device": "cuda"},
        "method": layer_trace.METHOD,
        "hardware": {"gpus": [{"name": "GPU"}] * 2},
        "versions": {"torch": "2"},
        "shapes": [{"shape": {"name": "flux1024"}, "cases": [*cases, {"failure": "wrong"}]}],
    }
    (tmp_path / "layer_trace.json").write_text(json.dumps(report))
    output = tmp_path / "docs" / "speed"
    page, chart, picture = performance.write(tmp_path, output)
    (section,) = performance.read(tmp_path)
    assert section.rows == (
        ("flux1024", "kernel alone, eager", "floor", "100.0", "60.0", "40.0", "40.0", "40.0"),
        (
            "flux1024",
            "torus/auto, graph",
            "folded on ulysses=2, fa4",
            *("100.0", "60.0", "40.0", "40.0", "40.0"),
        ),
    )
    assert [(bar.label, bar.median) for bar in section.bars] == [("torus/auto, graph", 40)]
    assert (chart.name, picture.name) == ("layer_trace.png", case["picture"])
    assert picture.read_bytes() == (tmp_path / case["picture"]).read_bytes()
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 300_000
    text = page.read_text(encoding="utf-8")
    assert "## Where the time goes: one layer on 2 x GPU" in text
    assert f"![flux1024, torus/auto fa4, graph](speed/{case['picture']})" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--layers", "3"), "--layers"),
        (("--ahead",), "--ahead"),
        (("--graph",), "--graph"),
        (("--backend", "fa4"), "fa4"),
        (("--schedules", "best"), "--schedules"),
    ],
)
def test_wrong_arguments_are_named(
    words: tuple[str, ...], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert layer_trace.main(["--device", "cpu", "--output", str(output), *words]) == 2
    assert named in capsys.readouterr().err
    assert not output.exists()


def test_layers_of_cpu_ranks_are_recorded_both_ways(tmp_path: Path) -> None:
    pytest.importorskip("xfuser")
    pytest.importorskip("matplotlib")
    words = ("--device", "cpu", "--shapes", "1,256,4,32", "--layers", "4", "--timeout", "120")
    assert layer_trace.main([*words, "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "layer_trace.json").read_text(encoding="utf-8"))
    assert report["hardware"]["cores"] and report["versions"]["torch"]
    (found,) = report["shapes"]
    assert [case["kind"] for case in found["cases"]] == ["floor", "usp", "torus"]
    for case in found["cases"]:
        times = {key: case[f"{key}_us"]["median"] for key in ("layer", "attention", "exposed")}
        assert 0 < times["attention"] < times["layer"] and times["exposed"] > 0
        assert len(case["ranks"]) == 2 and list(case["names"]) == list(LANES)
        assert case["names"][ATTENTION]
        assert bool(case["names"][TRANSFERS]) == (case["kind"] != "floor")
        if case["kind"] != "floor":
            assert (tmp_path / case["picture"]).read_bytes().startswith(b"\x89PNG")
            trace = json.loads((tmp_path / case["timeline"]).read_text())["traceEvents"]
            assert {entry["pid"] for entry in trace} == {0, 1}
            assert {"attend", "put"} <= {entry.get("cat") for entry in trace}
