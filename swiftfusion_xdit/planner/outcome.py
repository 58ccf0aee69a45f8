"""What the planner predicts, what it chooses, and why the others lost."""

from __future__ import annotations

from dataclasses import dataclass

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.planner.candidates import Candidate

SAME_TIME = 1e-3  # relative: closer predictions are ties, for which the simulator has no opinion


@dataclass(frozen=True)
class Prediction:
    """One attention layer on the busiest GPU.

    ``floor_us`` is its attention in one call, ``attention_us`` in the calls of the schedule;
    ``exposed_us`` is what the layer takes beyond those: communication, merges and copies that
    nothing hides. ``bytes_across`` is what the GPU sends to other machines and ``symmetric_bytes``
    its slots (0 where xDiT's collectives run).
    """

    layer_us: float
    floor_us: float
    attention_us: float
    exposed_us: float
    bytes_across: int
    symmetric_bytes: int


@dataclass(frozen=True)
class Outcome:
    """A candidate, what was predicted for it (None: it was not simulated), and why it lost."""

    candidate: Candidate
    prediction: Prediction | None
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the others: first those simulated, best first."""

    policy: str
    candidate: Candidate
    prediction: Prediction
    others: tuple[Outcome, ...] = ()

    @property
    def mesh(self) -> Mesh:
        return self.candidate.mesh

    @property
    def schedule(self) -> str:
        return self.candidate.schedule

    @property
    def groups_per_rank(self) -> int:
        return self.candidate.groups_per_rank

    @property
    def edge_heads(self) -> int:
        return self.candidate.edge_heads

    def describe(self) -> str:
        """One line for a log."""
        found = self.prediction
        text = (
            f"planned {self.candidate} ({self.policy}): {found.layer_us / 1e3:.3f} ms a layer, "
            f"{found.exposed_us / 1e3:.3f} ms exposed, {found.bytes_across / 1e6:.1f} MB across"
        )
        if self.others and self.others[0].prediction is not None:
            text += f"; next {self.others[0].candidate}, {self.others[0].reason}"
        return text


def ranked(predicted: list[Outcome], paper: Mesh) -> list[Outcome]:
    """By time; among ties the paper's mesh first, then fewer bytes across and fewer calls."""

    def time_us(outcome: Outcome) -> float:
        assert outcome.prediction is not None
        return outcome.prediction.layer_us

    def preference(outcome: Outcome) -> tuple:
        found, candidate = outcome.prediction, outcome.candidate
        assert found is not None
        groups = candidate.groups_per_rank
        return candidate.mesh != paper, found.bytes_across, groups, str(candidate)

    by_time = sorted(predicted, key=lambda outcome: (time_us(outcome), str(outcome.candidate)))
    tie_us = time_us(by_time[0]) * (1 + SAME_TIME)
    best = min((o for o in by_time if time_us(o) <= tie_us), key=preference)
    return [best, *(outcome for outcome in by_time if outcome is not best)]


def slower(outcome: Outcome, best: Prediction) -> str:
    found = outcome.prediction
    assert found is not None
    if found.layer_us < best.layer_us * (1 - SAME_TIME):
        return f"{1 - found.layer_us / best.layer_us:.1%} faster, less than the simulator can tell"
    if found.layer_us <= best.layer_us * (1 + SAME_TIME):
        return "as fast"
    ratio = found.layer_us / max(best.layer_us, 1e-3) - 1
    attention_us = found.attention_us - best.attention_us
    exposed_us = found.exposed_us - best.exposed_us
    causes = []
    if exposed_us > 0:
        causes.append(f"{exposed_us / 1e3:.3f} ms more exposed")
    if attention_us > 0:
        causes.append(f"its attention calls take {attention_us / 1e3:.3f} ms more")
    if attention_us > exposed_us:
        causes.reverse()
    return f"{ratio:.1%} slower: {', '.join(causes)}"
