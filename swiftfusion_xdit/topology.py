"""Which ranks share a machine, and what kind of link joins two ranks."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


class Link(enum.Enum):
    """The class of path between two ranks; byte counters are kept per class."""

    SAME_RANK = "same_rank"
    SAME_MACHINE = "same_machine"
    ACROSS_MACHINES = "across_machines"


@dataclass(frozen=True)
class Topology:
    """The machine of every rank of one group.

    ``machine_of[rank]`` is a machine index; machines are numbered in the order in which their
    first rank appears, so that two topologies with the same placement compare equal.
    """

    machine_of: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.machine_of:
            raise ValueError("machine_of must name a machine for at least one rank, got ()")
        seen = list(dict.fromkeys(self.machine_of))
        if seen != list(range(len(seen))):
            raise ValueError(
                "machine_of must number machines 0, 1, ... in order of first appearance, "
                f"got {self.machine_of}"
            )

    @classmethod
    def split(cls, num_ranks: int, num_machines: int) -> Topology:
        """Split consecutive ranks evenly: how one machine plays a cluster.

        Raises:
            ValueError: ``num_machines`` does not divide ``num_ranks``.
        """
        if num_machines < 1 or num_ranks < 1 or num_ranks % num_machines:
            raise ValueError(
                f"machines must divide the ranks: {num_ranks} ranks / {num_machines} machines"
            )
        ranks_per_machine = num_ranks // num_machines
        return cls(tuple(rank // ranks_per_machine for rank in range(num_ranks)))

    @classmethod
    def from_hosts(cls, hosts: Sequence[Hashable]) -> Topology:
        """Build from one host identity per rank; equal identities share a machine."""
        index = {host: i for i, host in enumerate(dict.fromkeys(hosts))}
        return cls(tuple(index[host] for host in hosts))

    @property
    def num_ranks(self) -> int:
        return len(self.machine_of)

    @property
    def num_machines(self) -> int:
        return max(self.machine_of) + 1

    @property
    def is_even(self) -> bool:
        """Whether machines hold equally many, consecutive ranks (what a mesh axis needs)."""
        if self.num_ranks % self.num_machines:
            return False
        return self.machine_of == Topology.split(self.num_ranks, self.num_machines).machine_of

    def link(self, a: int, b: int) -> Link:
        """The class of the path from rank ``a`` to rank ``b``."""
        if a == b:
            return Link.SAME_RANK
        same = self.machine_of[a] == self.machine_of[b]
        return Link.SAME_MACHINE if same else Link.ACROSS_MACHINES
