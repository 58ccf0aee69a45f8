"""The planner at run time: describes the running job once, then plans each shape for it."""

from __future__ import annotations

import torch

from swiftfusion_xdit import detect
from swiftfusion_xdit.agreement import Agreement
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.plan import AttentionShape
from swiftfusion_xdit.planner import Choice
from swiftfusion_xdit.planner import plan as plan_layer
from swiftfusion_xdit.planner.candidates import KNOWN_SCHEDULES, SCHEDULES, Candidate
from swiftfusion_xdit.planner.memory import layer_shape
from swiftfusion_xdit.simulate.transport import nccl, one_sided
from swiftfusion_xdit.topology import Topology

NEAR = 1.25  # of the best prediction: what timing may find to be the best
MOST_NEAR = 3


def near(choice: Choice) -> list[Candidate]:
    """The other candidates that may be the fastest, best first: one of each mesh and schedule."""
    limit_us = NEAR * choice.prediction.layer_us
    found: dict[tuple[Mesh, str], Candidate] = {}
    for outcome in choice.others:
        candidate, prediction = outcome.candidate, outcome.prediction
        kind = (candidate.mesh, candidate.schedule)
        is_near = prediction is not None and prediction.layer_us <= limit_us
        if is_near and candidate.strategy == "torus" and kind != (choice.mesh, choice.schedule):
            found.setdefault(kind, candidate)
    return list(found.values())[:MOST_NEAR]


class AutoPlanner:
    """Chooses mesh and schedule by predicted time, on all ranks of a group alike."""

    def __init__(self, agreement: Agreement, topology: Topology, device: torch.device) -> None:
        """Collective: measures this rank's machine and gathers what all ranks found."""
        self._agreement = agreement
        mine = detect.probe(device, machine_set=agreement.hosts()).words()
        everyone = agreement.gather("what ranks see of their machines", mine)
        self.cluster = detect.describe(
            [detect.Probe.from_words(words) for words in everyone], topology
        )

    def choose(
        self,
        shape: AttentionShape,
        *,
        mesh: Mesh | None,
        schedule: str,
        has_lse: bool,
        can_fuse: bool,
        two_sided: bool,
    ) -> Choice:
        """Collective: the fastest way for a shape.

        Args:
            mesh: a forced mesh, or None.
            schedule: a forced schedule, or ``auto``.
            has_lse: whether the attention kernel returns a log-sum-exp.
            can_fuse: whether it can wait for its keys itself.
            two_sided: whether the transport needs its receivers.

        Raises:
            ValueError: nothing fits, or ranks decide differently.
        """
        choice = plan_layer(
            self.cluster,
            layer_shape(shape),
            mesh,
            schedules=(KNOWN_SCHEDULES if can_fuse else SCHEDULES)
            if schedule == "auto"
            else (schedule,),
            has_lse=has_lse,
            transport=nccl() if two_sided else one_sided(),
        )
        self._agreement.require_equal("planned mesh and schedule", str(choice.candidate))
        return choice
