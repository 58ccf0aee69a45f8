"""fp8 on the wire is asked for by name, alike on all ranks, and refused where it has not run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from swiftfusion_xdit.sequence_parallel import SequenceParallel
from swiftfusion_xdit.xdit.options import Options


def construct(rank: int, world_size: int, by_rank: list[dict]) -> str:
    try:
        with SequenceParallel(**by_rank[rank]):
            return "accepted"
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


def test_unknown_format(rank_pool) -> None:
    for said in rank_pool(2).run(construct, [{"wire": "fp4"}] * 2):
        assert said == "ValueError: wire must be one of exact, fp8; got 'fp4'"


def test_ranks_must_agree(rank_pool) -> None:
    for said in rank_pool(2).run(construct, [{"wire": "fp8"}, {"wire": "exact"}]):
        assert "options must be the same on every rank: ranks [1] differ from rank 0" in said


def test_refused_on_gpus(rank_pool) -> None:
    for said in rank_pool(2).run(construct, [{"wire": "fp8", "device": "cuda"}] * 2):
        assert said == "NotImplementedError: wire='fp8' on device type 'cuda'"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_usp_call_on_a_gpu_is_refused_by_name(device: str) -> None:
    from swiftfusion_xdit.xdit import support

    query = torch.empty(0, device="cpu" if device == "cpu" else "meta")
    session = SimpleNamespace(
        options=Options("torus", wire="fp8"),
        state=SimpleNamespace(fp8_comms=None, num_pipeline_patch=1),
        kernel_for=lambda backend, device_type: "cpu",
    )
    arguments = dict.fromkeys(("backend", "attention_kwargs", "attn_layer", "joint_strategy"))
    said = support.unsupported(session, query, {"dropout_p": 0, "is_causal": False, **arguments})
    if device == "cpu":
        assert said is None
    else:
        assert said == "fp8 on the wire (--sp-wire, --use_fp8_comms) on meta"
