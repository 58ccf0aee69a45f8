"""--sp-wire fp8, and xDiT's own --use_fp8_comms, put fp8 on the wire of torus."""

from __future__ import annotations

from typing import Any

import pytest

from tests import xdit_calls, xdit_cases

ROW_BYTES = {"exact": 4 * xdit_calls.D, "fp8": 2 * xdit_calls.D}  # D = 16: 16 + 16 in float32


def call(rank: int, world_size: int, arguments: dict[str, Any]) -> tuple[float, int]:
    """The error of one USP call, and the bytes that it sent."""
    from swiftfusion_xdit.xdit import session

    with xdit_cases.xdit_groups():
        xdit_calls.start(**arguments)
        error = xdit_calls.call(rank, joint=3, joint_strategy="rear")
        current = session.current()
        assert current is not None
        stats = current.sequence_parallel("cpu").stats()
        links = ("same_machine", "across_machines")
        return error, sum(stats[link]["bytes"] for link in links)


@pytest.mark.parametrize("arguments", [{"sp_wire": "fp8"}, {"use_fp8_comms": True}], ids=str)
def test_both_flags(rank_pool, arguments: dict[str, Any]) -> None:
    plain = rank_pool(4).run(call, {}, timeout_s=120)
    fp8 = rank_pool(4).run(call, arguments, timeout_s=120)
    for (exact_error, exact_bytes), (error, num_bytes) in zip(plain, fp8, strict=True):
        assert exact_error <= 2e-6
        assert 1e-3 <= error <= 0.1
        assert num_bytes * ROW_BYTES["exact"] == exact_bytes * ROW_BYTES["fp8"] > 0
