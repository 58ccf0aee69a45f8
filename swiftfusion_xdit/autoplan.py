"""The planner at run time: describes the running job once, then plans each shape for it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch

from swiftfusion_xdit import detect
from swiftfusion_xdit.agreement import Agreement
from swiftfusion_xdit.comm import Communicator
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.plan import AttentionShape
from swiftfusion_xdit.planner import Choice
from swiftfusion_xdit.planner import plan as plan_layer
from swiftfusion_xdit.planner.candidates import KNOWN_SCHEDULES, SCHEDULES, Candidate
from swiftfusion_xdit.planner.memory import layer_shape
from swiftfusion_xdit.simulate.transport import CONSTANTS, Transport, nccl, one_sided

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


def with_way_across(
    probe: detect.Probe, comm: Communicator, hosts: Sequence[Hashable]
) -> detect.Probe:
    """``probe`` with what the transport gets to another machine, if that is known. Collective.

    Args:
        hosts: of the ranks. Machines that one host plays reach each other as it reaches itself.
    """
    if (gb_per_s := comm.measure_across()) is not None:
        return replace(probe, across_mb_per_s=round(gb_per_s * 1e3))
    if len(set(hosts)) > 1:
        return probe
    return replace(probe, across_mb_per_s=probe.inside_mb_per_s, across_ns=probe.inside_ns)


def transport_of(comm: Communicator, *, is_known: bool) -> Transport:
    """What the simulator takes a transport for.

    Args:
        is_known: whether the way across machines is what this very transport gets of it.
    """
    if comm.two_sided:
        return nccl(replace(CONSTANTS, nccl_fraction=1.0) if is_known else CONSTANTS)
    return one_sided(replace(CONSTANTS, one_sided_fraction=1.0) if is_known else CONSTANTS)


class AutoPlanner:
    """Chooses mesh and schedule by predicted time, on all ranks of a group alike."""

    def __init__(self, agreement: Agreement, comm: Communicator, device: torch.device) -> None:
        """Collective: measures this rank's machine and gathers what all ranks found."""
        self._agreement = agreement
        hosts = agreement.hosts()
        mine = with_way_across(detect.probe(device, machine_set=hosts), comm, hosts)
        everyone = agreement.gather("what ranks see of their machines", mine.words())
        probes = [detect.Probe.from_words(words) for words in everyone]
        self.cluster = detect.describe(probes, comm.topology)
        self.transport = transport_of(comm, is_known=all(p.across_mb_per_s for p in probes))

    def choose(
        self,
        shape: AttentionShape,
        *,
        degrees: Mesh | Mapping[str, int] | None,
        schedule: str,
        has_lse: bool,
        can_fuse: bool,
    ) -> Choice:
        """Collective: the fastest way for a shape.

        Args:
            degrees: a forced mesh, or axes of it, or None.
            schedule: a forced schedule, or ``auto``.
            has_lse: whether the attention kernel returns a log-sum-exp.
            can_fuse: whether it can wait for its keys itself.

        Raises:
            ValueError: nothing fits, or ranks decide differently.
        """
        choice = plan_layer(
            self.cluster,
            layer_shape(shape),
            degrees,
            schedules=(KNOWN_SCHEDULES if can_fuse else SCHEDULES)
            if schedule == "auto"
            else (schedule,),
            has_lse=has_lse,
            transport=self.transport,
        )
        self._agreement.require_equal("planned mesh and schedule", str(choice.candidate))
        return choice
