"""`python -m benchmarks.peer_layer`: a run on CPU ranks, and how a peer that fails is treated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peer_layer
from benchmarks.peers import NOT_RUN, PEERS, Mode, Setting
from benchmarks.peers.bench import PeerBench, PeerCase, PeerConfig
from swiftfusion_xdit.cli.bench_config import MAX_ERROR, Shape
from swiftfusion_xdit.cli.bench_stock import NotRunnable


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("peers") / "peers.json"
    # Rows of the second shape do not divide by two ranks.
    shapes = ("--shapes", "1,64,4,16,2,65,4,16")
    arguments = ["--device", "cpu", "--ranks", "2", *shapes, "--rounds", "1", "--json", str(path)]
    assert peer_layer.main(arguments) == 0
    found: dict[str, Any] = json.loads(Path(path).read_text())
    return found


def rows(report: dict[str, Any], shape: int = 0) -> dict[str, dict[str, Any]]:
    return {case["name"]: case for case in report["shapes"][shape]["cases"]}


def is_exact(case: dict[str, Any]) -> bool:
    exact: bool = case["relative_error"] <= MAX_ERROR["float32"]
    return case["failure"] is None and exact and len(case["eager_ms"]) == 1


# Where torch is built for CUDA and finds no driver, diffusers asks for a GPU all the same.
anything_needs_a_driver = torch.version.cuda is not None and not torch.cuda.is_available()


@pytest.mark.parametrize("shape", [0, 1])
def test_every_row_is_exact_or_names_its_reason(report: dict[str, Any], shape: int) -> None:
    found = rows(report, shape)
    for name, case in found.items():
        assert case["failure"] or is_exact(case), (name, case)
        assert not (case["failure"] or "").startswith("wrong"), (name, case)
    assert is_exact(found["torus/auto cpu"]) and is_exact(found["floor: cpu alone"])


def test_peers_that_run_on_a_cpu(report: dict[str, Any]) -> None:
    found = rows(report)
    for name in (
        "diffusers ulysses 2 ring 1 native",
        *(() if anything_needs_a_driver else ("diffusers ulysses_anything native",)),
        "yunchang ulysses 2 ring 1 torch_math",
        "torch context parallel direct allgather cpu",
        "torch context parallel direct alltoall cpu",
        "torch ulysses all_to_all cpu",
    ):
        assert is_exact(found[name]), found[name]


def test_reasons_on_a_cpu(report: dict[str, Any]) -> None:
    found = rows(report)
    assert "log-sum-exp" in found["diffusers ulysses 1 ring 2 native"]["failure"]
    assert "needs GPUs" in found["torch ulysses push cpu"]["failure"]
    assert "flash-attn 2" in found["yunchang AsyncLongContextAttention"]["failure"]


def test_rows_that_do_not_divide(report: dict[str, Any]) -> None:
    found = rows(report, 1)
    assert anything_needs_a_driver or is_exact(found["diffusers ulysses_anything native"])
    assert "65 rows" in found["diffusers ulysses 2 ring 1 native"]["failure"]


def test_what_is_not_run_is_in_the_report(report: dict[str, Any]) -> None:
    assert report["not_run"] == NOT_RUN
    assert report["peers"]["diffusers"] == {
        "version": PEERS["diffusers"].version(),
        "not_run": None,
    }
    for peer in report["peers"].values():
        assert peer["version"] or "pip install" in peer["not_run"]


@pytest.mark.parametrize("peers", ["sage", "diffusers,diffusers", "diffusers,"])
def test_wrong_peers_are_named(peers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert peer_layer.main(["--device", "cpu", "--peers", peers]) == 2
    assert "--peers must be of diffusers" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PEERS)
def test_modes(name: str, device: str, ranks: int) -> None:
    backends = ("fa4", "cudnn") if device == "cuda" else ("cpu",)
    modes = PEERS[name].modes(Setting(device, ranks, backends))
    assert len({mode.name for mode in modes}) == len(modes) == len(set(modes))
    for mode in modes:
        assert mode.reason or mode.ulysses * mode.ring == ranks, mode
    assert any(not mode.reason for mode in modes)


class Alone:
    """The agreement of one rank, or of one whose peer has failed."""

    def __init__(self, peers_failure: str | None = None) -> None:
        self._peers_failure = peers_failure

    def first_failure(self, failure: str | None) -> str | None:
        return failure or self._peers_failure


def bench_of(layer: Any, ranks: Alone, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, PeerCase]:
    monkeypatch.setattr(type(PEERS["diffusers"]), "layer", layer)
    bench = PeerBench.__new__(PeerBench)
    bench.shape, bench.rows, bench._layers = Shape("x", 1, 4, 2, 2), [torch.zeros(1)] * 3, {}
    bench.ranks = ranks  # type: ignore[assignment]
    return bench, PeerCase(kind="peer", backend="cpu", peer="diffusers", mode=Mode("x"))


def test_a_layer_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(*_: Any) -> Any:
        raise AttributeError("gone in this version")

    bench, case = bench_of(layer, Alone(), monkeypatch)
    with pytest.raises(NotRunnable, match="AttributeError: gone in this version"):
        bench.layer(case)


def test_a_layer_that_another_rank_cannot_make(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, case = bench_of(lambda *_: torch.zeros, Alone("rank 1: no memory"), monkeypatch)
    with pytest.raises(NotRunnable, match="rank 1: no memory"):
        bench.layer(case)


def test_a_layer_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    bench, case = bench_of(lambda *_: made.append(1) or len, Alone(), monkeypatch)
    assert bench.layer(case) is bench.layer(case) is len
    assert made == [1]


def test_an_eight_bit_wire_may_round_more() -> None:
    bench = PeerBench.__new__(PeerBench)
    bench.config, _ = peer_layer.make_config(["--device", "cpu"])
    assert isinstance(bench.config, PeerConfig)
    modes = PEERS["cache_dit"].modes(Setting("cuda", 2, ("fa4",)))
    errors = {
        mode.name: bench._max_error(PeerCase(kind="lossy", backend="", peer="cache_dit", mode=mode))
        for mode in modes
    }
    assert errors["ulysses float8 native"] == 0.1
    assert errors["ulysses async native"] == MAX_ERROR["float32"]
