"""Every attention kernel that is installed: out and lse against the oracle, in place, uncopied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from swiftfusion_xdit.attention import Backend, attend, select_backend
from swiftfusion_xdit.attention import merge as merging
from swiftfusion_xdit.attention.merge import merge
from swiftfusion_xdit.attention.reference import reference_attention, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = torch.device("cuda", 0)
NAMES = ("fa4", "fa3", "cudnn", "fa2", "sdpa_flash")
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
# A logarithm of base 2 would be off by 44 %.
LSE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """One call. Layouts are those of q, k and v."""

    batch: int
    rows: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    layouts: tuple[str, str, str] = ("bshd", "bshd", "bshd")
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        rng = torch.Generator(DEVICE).manual_seed(self.seed)
        q_shape = (self.batch, self.rows, self.heads, self.head_dim)
        kv_shape = (self.batch, self.keys, self.kv_heads, self.head_dim)
        q, k, v = (
            in_layout(torch.randn(shape, generator=rng, device=DEVICE).to(self.dtype), layout)[0]
            for shape, layout in zip((q_shape, kv_shape, kv_shape), self.layouts, strict=True)
        )
        return q, k, v


# Layouts that kernels read in place: the dims in any order, parts of rows, heads or a fused tensor.
IN_PLACE = ("bshd", "bhsd", "sbhd", "fused", "some_heads", "some_rows", "every_other_row")
COPIED = ("dim_strided", "unaligned")


def in_layout(x: Tensor, layout: str, *, around: float = torch.nan) -> tuple[Tensor, Tensor]:
    """A view equal to x [B, S, H, D] inside other memory, and that memory, `around` elsewhere."""
    b, s, h, d = x.shape

    def filled(*shape: int) -> Tensor:
        return torch.full(shape, around, dtype=x.dtype, device=x.device)

    memory, select = {
        "bshd": (lambda: filled(b, s, h, d), lambda m: m),
        "bhsd": (lambda: filled(b, h, s, d), lambda m: m.transpose(1, 2)),
        "sbhd": (lambda: filled(s, b, h, d), lambda m: m.transpose(0, 1)),
        "fused": (lambda: filled(b, s, 3, h, d), lambda m: m[:, :, 1]),
        "some_heads": (lambda: filled(b, s, h + 3, d), lambda m: m[:, :, 1:-2]),
        "some_rows": (lambda: filled(b, s + 5, h, d), lambda m: m[:, 2:-3]),
        "every_other_row": (lambda: filled(b, 2 * s, h, d), lambda m: m[:, ::2]),
        "dim_strided": (lambda: filled(b, s, d, h), lambda m: m.transpose(2, 3)),
        "unaligned": (lambda: filled(b, s, h, d + 3), lambda m: m[..., 1:-2]),
    }[layout]
    storage = memory()
    view = select(storage)
    view.copy_(x)
    return view, storage


SHAPES = (
    Case(1, 1000, 777, 6, 6, 128),
    Case(2, 129, 131, 3, 3, 128),
    Case(1, 1, 5, 4, 4, 128),
    Case(2, 300, 1, 2, 2, 128),
    Case(1, 1, 1, 1, 1, 64),
    Case(3, 63, 2, 2, 2, 64),
    Case(2, 257, 513, 8, 8, 64),
    Case(1, 3001, 4608, 12, 12, 128),
    Case(2, 200, 300, 4, 2, 128),
    Case(1, 384, 1100, 6, 2, 64, torch.float16),
    Case(2, 130, 64, 5, 5, 128, torch.float16),
)
MIXED = tuple(
    replace(
        case,
        layouts=tuple(IN_PLACE[(index + shift) % len(IN_PLACE)] for shift in (0, 2, 5)),
        seed=index,
    )
    for index, case in enumerate(SHAPES)
)


@pytest.fixture(scope="module", params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    try:
        return select_backend(request.param, DEVICE)
    except (ImportError, NotImplementedError) as error:
        pytest.skip(str(error))


def reference_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    keys = k.double().repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = scale * torch.einsum("bshd,bthd->bhst", q.double(), keys)
    return torch.logsumexp(scores, dim=-1)


def assert_matches_the_oracle(case: Case, backend: Backend) -> None:
    q, k, v = case.tensors()
    out, lse = attend(q, k, v, scale=case.scale, backend=backend)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (case.batch, case.heads, case.rows) and lse.dtype == torch.float32
    error = relative_error(out, reference_attention(q, k, v, scale=case.scale))
    assert error <= TOLERANCE[case.dtype], (case, error)
    lse_error = (lse - reference_lse(q, k, case.scale)).abs().max().item()
    assert lse_error <= LSE_TOLERANCE, (case, lse_error)


@pytest.mark.parametrize("case", SHAPES + MIXED, ids=str)
def test_out_and_lse_match_the_oracle(backend: Backend, case: Case) -> None:
    assert_matches_the_oracle(case, backend)


@pytest.mark.parametrize("layout", (*IN_PLACE, *COPIED))
def test_any_layout(backend: Backend, layout: str) -> None:
    assert_matches_the_oracle(Case(2, 129, 131, 3, 3, 128, layouts=(layout,) * 3), backend)


def test_expanded_batch_and_heads(backend: Backend) -> None:
    q = torch.randn(2, 70, 4, 128, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(1, 90, 1, 128, device=DEVICE, dtype=torch.bfloat16).expand(2, 90, 4, 128)
    out, _ = attend(q, k, k, scale=0.1, backend=backend)
    assert relative_error(out, reference_attention(q, k, k, scale=0.1)) <= TOLERANCE[q.dtype]


@pytest.mark.parametrize(("rows", "keys"), [(5, 0), (0, 5)])
def test_empty_queries_or_keys(backend: Backend, rows: int, keys: int) -> None:
    q, k, v = Case(2, rows, keys, 4, 4, 128).tensors()
    into = torch.full_like(q, torch.nan)
    for out in (None, into):
        result, lse = attend(q, k, v, scale=1.0, backend=backend, out=out)
        assert torch.equal(result, torch.zeros_like(q))
        assert torch.equal(lse, torch.full((2, 4, rows), -torch.inf, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", (*IN_PLACE, *COPIED))
def test_out_goes_where_it_is_wanted(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    case = Case(2, 129, 131, 3, 3, 128)
    q, k, v = case.tensors()
    expected, expected_lse = attend(q, k, v, scale=case.scale, backend=backend)
    out, storage = in_layout(torch.zeros_like(q, dtype=dtype), layout, around=7.0)
    result, lse = attend(q, k, v, scale=case.scale, backend=backend, out=out)
    assert result is out
    assert torch.equal(out, expected.to(dtype)) and torch.equal(lse, expected_lse)
    out.fill_(7.0)
    assert bool((storage == 7.0).all()), "stored outside of out"


def copies_in(run: Callable[[], object]) -> list[str]:
    """The copy kernels that `run` launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    assert names, "the profiler saw no kernel"
    return [
        name
        for name in names
        if "Memcpy" in name or ("at::native" in name and "copy" in name.lower())
    ]


def peak_bytes(run: Callable[[], object]) -> int:
    """How much more device memory than now was allocated at once while `run` ran."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("layout", IN_PLACE)
def test_no_hidden_copy(backend: Backend, layout: str) -> None:
    case = Case(2, 2048, 2304, 8, 8, 128, layouts=(layout,) * 3)
    q, k, v = case.tensors()

    def run() -> object:
        return attend(q, k, v, scale=case.scale, backend=backend)

    out, lse = attend(q, k, v, scale=case.scale, backend=backend)
    assert copies_in(run) == []
    assert peak_bytes(run) < out.nbytes + lse.nbytes + q.nbytes // 2


def test_a_copy_would_be_found(backend: Backend) -> None:
    case = Case(2, 2048, 2304, 8, 8, 128, layouts=("dim_strided",) * 3)
    q, k, v = case.tensors()

    def run() -> object:
        return attend(q, k, v, scale=case.scale, backend=backend)

    out, lse = attend(q, k, v, scale=case.scale, backend=backend)
    assert len(copies_in(run)) == 3
    assert peak_bytes(run) > out.nbytes + lse.nbytes + q.nbytes // 2


@pytest.mark.parametrize("layout", IN_PLACE)
def test_a_backend_that_writes_out_copies_nothing(backend: Backend, layout: str) -> None:
    if not backend.writes_out:
        pytest.skip(f"{backend.name} does not write into out")
    case = Case(2, 2048, 2304, 8, 8, 128)
    q, k, v = case.tensors()
    out, _ = in_layout(torch.zeros_like(q), layout)

    def run() -> object:
        return attend(q, k, v, scale=case.scale, backend=backend, out=out)

    _, lse = attend(q, k, v, scale=case.scale, backend=backend, out=out)
    assert copies_in(run) == []
    assert peak_bytes(run) < lse.nbytes + q.nbytes // 2


def test_graph_replays_give_the_bits_of_eager(backend: Backend) -> None:
    case = Case(1, 1000, 777, 6, 6, 128)
    q, k, v = case.tensors()
    attend(q, k, v, scale=case.scale, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(q, k, v, scale=case.scale, backend=backend)
    for seed in range(5):
        for x, fresh in zip((q, k, v), replace(case, seed=seed).tensors(), strict=True):
            x.copy_(fresh)
        expected, expected_lse = attend(q, k, v, scale=case.scale, backend=backend)
        graph.replay()
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse), seed


def test_runs_on_the_current_stream(backend: Backend) -> None:
    case = Case(1, 1000, 777, 6, 6, 128)
    q, k, v = case.tensors()
    expected, _ = attend(q, k, v, scale=case.scale, backend=backend)
    late = torch.full_like(q, torch.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(q)
        out, _ = attend(late, k, v, scale=case.scale, backend=backend)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_parts_of_the_keys_merge_to_the_whole(
    backend: Backend, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(merging, "_compiled", lambda: None)
    elif merging._compiled() is None:
        pytest.skip("the compiled part is not built")
    case = Case(2, 257, 700, 4, 4, 128)
    q, k, v = case.tensors()
    expected = reference_attention(q, k, v, scale=case.scale)
    cuts = (0, 130, 130, 131, 500, 700)  # one part without keys, one of a single key
    partials = [
        attend(q, k[:, a:b], v[:, a:b], scale=case.scale, backend=backend)
        for a, b in pairwise(cuts)
    ]
    for layout in ("bshd", "some_heads"):
        out, _ = in_layout(torch.full_like(q, torch.nan, dtype=dtype), layout)
        assert merge(partials, out=out) is out
        error = relative_error(out, expected)
        assert error <= 1e-2, (layout, error)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float32, 128), (torch.bfloat16, 100), (torch.bfloat16, 264)],
    ids=str,
)
def test_what_it_does_not_support(backend: Backend, dtype: torch.dtype, head_dim: int) -> None:
    q = torch.zeros(1, 8, 2, head_dim, device=DEVICE, dtype=dtype)
    with pytest.raises(NotImplementedError, match=rf"backend '{backend.name}'; supported: "):
        attend(q, q, q, scale=1.0, backend=backend)


def test_auto_takes_the_first_that_is_there() -> None:
    chosen = select_backend("auto", DEVICE)
    for name in NAMES:
        try:
            select_backend(name, DEVICE)
        except (ImportError, NotImplementedError):
            continue
        if torch.cuda.get_device_capability(DEVICE)[0] in (9, 10):
            assert chosen.name == name
        return
