"""Models: sequence lengths, sizes, and a step that is split over the ranks."""

from __future__ import annotations

import pytest

from swiftfusion_xdit.clusters import preset
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.simulate.models import MODELS, model_named
from swiftfusion_xdit.simulate.step import Strategy, rest_us, simulate_step
from swiftfusion_xdit.simulate.transport import one_sided


@pytest.mark.parametrize(
    "name, size, rows",
    [
        ("flux", (1024, 1024, 1), 4608),
        ("flux", (3072, 3072, 1), 37376),
        ("wan", (480, 832, 81), 32760),
        ("wan", (720, 1280, 81), 75600),
        ("cogvideox", (480, 720, 49), 17776),
        ("hunyuan", (720, 1280, 129), 119056),
    ],
)
def test_rows_of_attention(name: str, size: tuple[int, int, int], rows: int) -> None:
    assert model_named(name).sequence(*size) == rows


@pytest.mark.parametrize(
    "name, billions", [("flux", 6.5), ("cogvideox-5b", 4.8), ("wan2.1-14b", 11.9)]
)
def test_weights_that_a_row_meets(name: str, billions: float) -> None:
    model = MODELS[name]
    assert model.num_layers * model.layer_weights / 1e9 == pytest.approx(billions, rel=0.03)


def test_seconds_are_frames_and_the_first_one() -> None:
    assert model_named("cogvideox").frames_of(20) == 161


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: model_named("flux2"), "model must be one of .*flux.*got 'flux2'"),
        (lambda: MODELS["flux"].sequence(1000, 1024), "height must be a positive multiple of 16"),
        (lambda: MODELS["flux"].sequence(1024, 1024, 9), "frames must be 1"),
        (lambda: MODELS["flux"].frames_of(5), "need a video model"),
        (lambda: MODELS["wan2.1-14b"].frames_of(-1), "seconds must be positive"),
    ],
)
def test_wrong_sizes_are_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_step_is_its_layers_and_the_rest() -> None:
    model, cluster = MODELS["flux"], preset("p4de", num_machines=2)
    strategy = Strategy("torus", Mesh(2, 4, 2), one_sided(), one_sided())
    step = simulate_step(model, cluster, strategy, sequence=37376)
    assert step.total_us == pytest.approx(57 * step.layer.total_us + step.rest_us)
    assert step.rest_us == pytest.approx(57 * rest_us(model, cluster, 37376 / 16))
