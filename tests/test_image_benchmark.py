"""The benchmark of whole images: in small on CPU ranks, and with programs in place of xDiT."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import image, image_checkpoint, image_launch
from benchmarks.image_config import MODEL, Case, Settings
from benchmarks.image_launch import Launched, Marks, read_plan, read_timings, xdit_command
from benchmarks.image_report import MAX_DIFFERENCE, difference, results_of
from benchmarks.step_models import flux

pytest.importorskip("xfuser")

USP, TORUS = Case("usp", "CUDNN", 2, 1), Case("torus", "FLASH_4", 2, 1)


def settings(tmp_path: Path, *words: str) -> Settings:
    args = vars(image.parser().parse_args(["--tiny", "--checkpoint", str(tmp_path), *words]))
    args.pop("json")
    return image.settings_of(args)


def full(tmp_path: Path, **changes: Any) -> Settings:
    """As on GPUs, which need not be there."""
    small = dataclasses.asdict(settings(tmp_path))
    asked = {"tiny": False, "size": 1024, "steps": 28, "backends": ("CUDNN", "FLASH_4")}
    return Settings(**small | asked | changes)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ranks", "1"), "--ranks must be above 1 and divide 6 heads, got 1"),
        (("--size", "100"), "--size must be a multiple of 16, got 100"),
        (("--size", "144"), "144 has 81 of the image and 64 of the text"),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--warmup-calls", "-1"), "--warmup-calls must be at least 0, got -1"),
        (("--launch-timeout", "0"), "--launch-timeout must be above 0, got 0.0"),
        (("--max-difference", "nan"), "--max-difference must be above 0, got nan"),
        (("--strategies", "usp,ring"), "--strategies must be of usp, tas, torus, got usp,ring"),
        (("--schedules", "fast"), "--schedules must be of auto, torus"),
        (("--only", "torus CUDNN"), "torus SDPA_FLASH; got torus CUDNN"),
    ],
)
def test_refusals_name_the_argument(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        settings(tmp_path, *words)
    assert says in str(refusal.value)


def test_without_enough_gpus_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["image", "--ranks", "2"])
    with pytest.raises(SystemExit) as end:
        image.main()
    assert end.value.code == 2
    assert "at most the number of GPUs, 1, got 2" in capsys.readouterr().err


def test_every_pair_of_degrees_counts_where_xdit_allows_it(tmp_path: Path) -> None:
    names = [case.name for case in full(tmp_path, ranks=4).cases()]
    assert names == [
        *("usp u4 r1 CUDNN", "usp u2 r2 CUDNN", "usp u1 r4 CUDNN", "usp u4 r1 FLASH_4"),
        *("torus CUDNN", "torus FLASH_4"),
    ]
    assert [case.name for case in full(tmp_path, only=("torus CUDNN",)).cases()] == ["torus CUDNN"]


def test_the_first_row_of_a_round_rotates(tmp_path: Path) -> None:
    asked = settings(tmp_path, "--rounds", "2", "--strategies", "usp,torus")
    cases = asked.cases()
    order = [case for _, case in image.turns(asked)]
    assert order == [*cases, *cases[1:], cases[0]]


def words_after(command: list[str]) -> dict[str, str]:
    return {
        word: after
        for word, after in zip(command, [*command[1:], "--"], strict=True)
        if word.startswith("--")
    }


def test_a_row_is_what_a_user_types(tmp_path: Path) -> None:
    asked = full(tmp_path, images=3)
    stock, ours = (xdit_command(asked, case, tmp_path) for case in (USP, TORUS))
    for command in (stock, ours):
        assert command[:4] == [sys.executable, "-m", "swiftfusion_xdit", "xdit"]
    flags = words_after(stock)
    expected = (
        f"--model {MODEL} --height 1024 --width 1024 --nproc_per_node 2 --ulysses_degree 2 "
        "--ring_degree 1 --attention_backend CUDNN --num_inference_steps 28 --num_iterations 4 "
        "--max_sequence_length 512"
    ).split()
    expected = dict(zip(expected[::2], expected[1::2], strict=True))
    assert flags | expected == flags
    assert not {"--sp-strategy", "--sp-schedule", "--use_torch_compile"} & flags.keys()
    changed = {"--attention_backend": "FLASH_4", "--sp-strategy": "torus", "--master_port": ""}
    assert words_after(ours) | {"--master_port": ""} == flags | changed
    forced = xdit_command(
        dataclasses.replace(asked, compile=True),
        dataclasses.replace(TORUS, schedule="fused"),
        tmp_path,
    )
    assert words_after(forced)["--sp-schedule"] == "fused" and "--use_torch_compile" in forced


def test_ranks_see_the_gpus_and_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "relative")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("SWIFTFUSION_SP_STRATEGY", "torus")
    env = image_launch.environment(full(tmp_path), tmp_path)
    assert env["CUDA_VISIBLE_DEVICES"] == "2,3" and "SWIFTFUSION_SP_STRATEGY" not in env
    assert env["PYTHONPATH"].split(":")[1] == str(Path("relative").resolve())
    assert image_launch.environment(settings(tmp_path), tmp_path)["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in image_launch.environment(full(tmp_path), tmp_path)


def test_timings_must_be_those_of_all_images(tmp_path: Path) -> None:
    written = tmp_path / "timings.json"
    written.write_text("[1.5, 2.5]")
    assert read_timings(tmp_path, 2) == [1.5, 2.5]
    for text in ("[1.5]", "[1.5, 2.5, 3.5]", "[1.5, 0.0]", "[1.5, null]"):
        written.write_text(text)
        with pytest.raises(ValueError, match="seconds of 2 images"):
            read_timings(tmp_path, 2)


def test_the_log_tells_loading_from_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.write_text("")
    now = iter((10.0, 25.0, 65.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    marks = Marks(log)
    for line in ("Loading model pipeline...", "Torch.compile enabled. Warming up torch compiler"):
        log.write_text(log.read_text() + line)
        marks.look()
    assert (marks.load_s(), marks.compile_s()) == (15.0, None)
    log.write_text(log.read_text() + "Model initialization complete.")
    marks.look()
    assert (marks.load_s(), marks.compile_s()) == (15.0, 40.0)


def test_the_strategy_that_ran_must_be_the_one_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("INFO:x:torus: mesh torus=1,ulysses=1,ring=2, schedule fused, 4608 rows\n")
    assert read_plan(log, TORUS) == "mesh torus=1,ulysses=1,ring=2, schedule fused"
    with pytest.raises(ValueError, match="usp was asked for"):
        read_plan(log, USP)
    log.write_text("INFO   sp_strategy: torus\n")
    assert read_plan(log, TORUS) is None
    with pytest.raises(ValueError, match="usp was asked for"):
        read_plan(log, USP)
    log.write_text("INFO   sp_strategy: None\n")
    assert read_plan(log, USP) is None
    with pytest.raises(ValueError, match="torus was asked for"):
        read_plan(log, TORUS)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def launched(seconds: list[float], shown: np.ndarray) -> Launched:
    return Launched(images_s=seconds, picture=shown, wall_s=1.0, load_s=0.5)


def test_a_wrong_picture_cannot_pass_for_a_fast_one() -> None:
    right = picture(0)
    wrong = right.copy()
    wrong[:8] = picture(1)[:8]
    nearly = right ^ 1  # the lowest bit of every level
    assert 0 < difference(nearly, right) < MAX_DIFFERENCE < difference(wrong, right)
    assert difference(right[:8], right) == float("inf")
    found = {USP: [launched([2.0, 4.0], right)], TORUS: [launched([1.5, 1.5], nearly)]}
    stock, ours = results_of(found, MAX_DIFFERENCE)
    assert stock["is_reference"] and stock["difference"] == 0 and stock["failure"] is None
    assert ours["failure"] is None and ours["usp_over"] == 2.0
    found[TORUS] += [launched([0.1, 0.1], wrong)]
    ours = results_of(found, MAX_DIFFERENCE)[1]
    assert "another picture" in ours["failure"] and "usp_over" not in ours
    assert ours["samples_s"] == [[1.5, 1.5], [0.1, 0.1]]


def test_a_flat_picture_agrees_with_nothing() -> None:
    flat = np.full((16, 16, 3), 127, dtype=np.uint8)
    rows = results_of({USP: [launched([1.0], flat)], TORUS: [launched([1.0], flat)]}, 0.1)
    assert all("of one colour" in row["failure"] for row in rows)


def test_others_are_compared_with_usp_wherever_it_stands() -> None:
    right, failed = picture(0), Launched(failure="exit status 1", picture=picture(1))
    other = dataclasses.replace(USP, ulysses=1, ring=2)
    rows = results_of({TORUS: [launched([1.0], picture(2))], USP: [failed], other: []}, 0.1)
    assert [row["is_reference"] for row in rows] == [True, False, False]
    same = launched([1.0], right.copy())
    found = {TORUS: [same], USP: [failed], other: [launched([1.0], right)]}
    rows = results_of(found, 0.1)
    assert [row["is_reference"] for row in rows] == [False, False, True]
    assert [row["failure"] for row in rows] == [None, "exit status 1", None]


# In place of xDiT: saves what that saves, unless it is asked to fail, to hang, or for another one.
PROGRAM = """
import json, pathlib, sys, time
import numpy as np
from PIL import Image
how, saved, images = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
print("INFO Model initialization complete.", flush=True)
if how == "fail":
    raise MemoryError("no room on the device")
if how == "hang":
    time.sleep(600)
if how == "torus":
    print("torus: mesh torus=1,ulysses=2,ring=1, schedule torus, 1 rows")
shown = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
Image.fromarray(shown).save(saved / "flux.png")
(saved / "timings.json").write_text(json.dumps([0.5] * images))
"""


def run_stand_ins(
    asked: Settings, hows: dict[str, str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], list[str]]:
    """A run with programs in place of xDiT: its report, what it said."""

    def command(given: Settings, case: Case, saved: Path) -> list[str]:
        words = [hows.get(case.name, case.strategy), str(saved), str(given.images)]
        return [sys.executable, "-c", PROGRAM, *words]

    asked.checkpoint.mkdir(exist_ok=True)
    monkeypatch.setattr(image_launch, "xdit_command", command)
    monkeypatch.setattr(image_checkpoint, "ensure", lambda _: "none")
    said: list[str] = []
    run = image.Image(asked, path)
    run.run(said.append)
    image.show(run.report, asked)
    return json.loads(path.read_text(encoding="utf-8")), said


def test_failing_and_hanging_launches_fail_their_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hows = {"usp u2 r1 SDPA_FLASH": "fail", "usp u1 r2 SDPA_FLASH": "hang"}
    asked = settings(tmp_path, "--launch-timeout", "5", "--rounds", "2")
    report, _ = run_stand_ins(asked, hows, tmp_path / "r.json", monkeypatch)
    failed, hung, good = report["results"]
    assert failed["failure"] == "exit status 1; MemoryError: no room on the device"
    assert failed["log"][-1] == "MemoryError: no room on the device"
    assert hung["failure"] == "no end within 5 s"
    assert hung["log"] == ["INFO Model initialization complete."]
    assert [len(row["launches_s"]) for row in (failed, hung, good)] == [1, 1, 2]
    assert good["failure"] is None and good["samples_s"] == [[0.5] * 3] * 2
    assert good["is_reference"] and report["complete"]
    printed = capsys.readouterr().out
    assert "FAILED: no end within 5 s" in printed and "no room on the device" in printed


def test_when_the_time_is_over_the_file_has_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(tmp_path, "--rounds", "100000", "--timeout", "8")
    start_s = time.monotonic()
    report, said = run_stand_ins(asked, {}, tmp_path / "r.json", monkeypatch)
    assert time.monotonic() - start_s < 60
    assert "the time is over" in said[-1] and not report["complete"]
    assert any(row["samples_s"] for row in report["results"])
    assert all(row["failure"] is None for row in report["results"])


def test_the_file_is_written_after_every_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    done: list[int] = []

    def fake(*_: Any) -> Launched:
        if path.exists():
            rows = json.loads(path.read_text())["results"]
            done.append(sum(len(row["samples_s"]) for row in rows))
        return launched([1.0], picture(0))

    monkeypatch.setattr(image, "run_case", fake)
    monkeypatch.setattr(image_checkpoint, "ensure", lambda _: "none")
    image.Image(settings(tmp_path, "--rounds", "1"), path).run(lambda _: None)
    assert done == [0, 1, 2]


def test_weights_are_split_into_shards_and_drawn_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    monkeypatch.setattr(image_checkpoint, "SHARD_BYTES", 300_000)
    vae = image_checkpoint.VAE | {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    for name in "ab":
        image_checkpoint.make_full(tmp_path / name, config=flux.TINY, vae=vae)
    folder = tmp_path / "a" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == sorted(p.name for p in folder.glob("*.safetensors"))
    for file in files:
        mine, others = load_file(folder / file), load_file(tmp_path / "b" / "transformer" / file)
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[name], others[name]) for name in mine)
    model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert (
        2 * sum(weight.numel() for weight in model.parameters())
        == (index["metadata"]["total_size"])
    )
    assert model.transformer_blocks[0].attn.norm_added_k.weight.unique().tolist() == [1.5]
    assert all(weight.dim() == 1 or weight.std() > 0 for weight in model.parameters())
    AutoencoderKL.from_pretrained(tmp_path / "a" / "vae")


def test_the_full_transformer_is_of_twelve_billion_parameters() -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**flux.CONFIG)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    assert 11.8e9 < sum(shape.numel() for shape in shapes.values()) < 12.0e9
    shards = list(image_checkpoint.split(shapes, 4 * 10**9))
    assert [name for names in shards for name in names] == list(shapes)
    for names in shards:
        assert 2 * sum(shapes[name].numel() for name in names) <= 4 * 10**9


def test_a_checkpoint_is_used_again_and_another_ones_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        if len(made) > 1:  # the first one is cut short
            (path / "model_index.json").write_text("{}")

    monkeypatch.setattr(image_checkpoint, "make_full", make)
    for _ in range(4):
        assert image_checkpoint.ensure(full(tmp_path)).startswith("random: ")
    assert made == [tmp_path / MODEL] * 2
    with pytest.raises(ValueError, match="--checkpoint must be another directory"):
        image_checkpoint.ensure(settings(tmp_path))
    (tmp_path / MODEL / "recipe.json").unlink()
    assert "not made by this benchmark" in image_checkpoint.ensure(full(tmp_path))
    assert len(made) == 2


def test_too_small_a_disk_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_checkpoint.warn_of_full_disk(tmp_path, 0)
    image_checkpoint.warn_of_full_disk(tmp_path, 10**18)
    assert capsys.readouterr().err.count("--checkpoint names another place") == 1


@pytest.mark.slow
def test_tiny_draws_the_same_image_with_each_strategy(tmp_path: Path) -> None:
    path = tmp_path / "image.json"
    words = ("--tiny", "--rounds", "1", "--images", "2", "--checkpoint", str(tmp_path / "made"))
    command = [sys.executable, "-m", "benchmarks.image", *words, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["benchmark"] == "image" and report["complete"]
    assert {"question", "command", "date", "hardware", "versions", "method"} <= report.keys()
    rows = report["results"]
    assert [row["name"] for row in rows] == [
        *("usp u2 r1 SDPA_FLASH", "usp u1 r2 SDPA_FLASH", "torus SDPA_FLASH")
    ]
    for row in rows:
        (samples,) = row["samples_s"]
        assert len(samples) == 2 and all(seconds > 0 for seconds in samples)
        assert min(samples) <= row["image_s"]["median"] <= max(samples)
        assert row["load_s"] > max(samples) and row["failure"] is None
        assert row["difference"] <= MAX_DIFFERENCE and row["usp_over"] > 0
    # Other degrees round otherwise: the same bits would mean that the same thing ran twice.
    assert rows[1]["difference"] > 0
    assert rows[2]["plan"].startswith("mesh torus=")
