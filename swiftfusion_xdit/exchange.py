"""What the layers of a plan move, for transports whose receivers take part."""

from __future__ import annotations

from swiftfusion_xdit.comm import Transfer
from swiftfusion_xdit.plan import NUM_PARITIES, Plan
from swiftfusion_xdit.schedule.rounds import batches


def transfers(plan: Plan) -> tuple[Transfer, ...]:
    """Every put of an even and of an odd layer, the same on every rank, in order of batches."""
    result = []
    for parity in range(NUM_PARITIES):
        for batch, messages in enumerate(batches(plan.schedule, whole_rounds=plan.whole_rounds)):
            for src, dst, block in messages:
                result.append(
                    Transfer(
                        src,
                        dst,
                        plan.layouts[dst].slot(block, parity),
                        plan.full_flag(dst, block, parity),
                        plan.free_flag(src, dst, block, parity),
                        parity,
                        batch,
                    )
                )
    return tuple(result)
