"""Collects the steps of one rank's program; the builders speak through it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule.steps import (
    Attend,
    Block,
    Collect,
    Copy,
    Merge,
    Program,
    Put,
    Release,
    Step,
    Stream,
    TensorName,
    Wait,
)


class ProgramBuilder:
    """Records steps for ``rank``; ``finish`` adds the releases and returns the program."""

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        *,
        query_order: Sequence[int],
        key_order: Sequence[int],
        groups_per_rank: int = 1,
    ) -> None:
        self.mesh = mesh
        self.rank = rank
        self.at = mesh.coordinates(rank)
        self.query_order = tuple(query_order)
        self.key_order = tuple(key_order)
        self.groups_per_rank = groups_per_rank
        self._steps: list[Step] = []
        self._stage = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Label the steps recorded inside with a phase of the algorithm."""
        outer, self._stage = self._stage, name
        yield
        self._stage = outer

    def heads(self, rank: int, group: int = 0) -> int:
        """The ``group``-th head group that ``rank`` attends."""
        return self.mesh.head_group(rank) * self.groups_per_rank + group

    def put(self, tensors: str, peer: int, *, stream: Stream, group: int = 0) -> None:
        """Put this rank's own rows, for the heads that ``peer`` attends."""
        for tensor in _names(tensors):
            block = Block(tensor, self.rank, self.heads(peer, group))
            self._steps.append(Put(self._stage, stream, block, peer))

    def relay(self, tensors: str, chunk: int, peer: int, *, stream: Stream, group: int = 0) -> None:
        """Put received rows of ``chunk`` on to a peer that attends the same heads."""
        for tensor in _names(tensors):
            block = Block(tensor, chunk, self.heads(self.rank, group))
            self._steps.append(Put(self._stage, stream, block, peer))

    def wait(
        self,
        tensors: str,
        chunk: int,
        *,
        source: int | None = None,
        stream: Stream = "compute",
        group: int = 0,
    ) -> None:
        """Wait for rows of ``chunk``, put by ``source`` (their owner by default)."""
        if chunk == self.rank:
            return
        peer = chunk if source is None else source
        for tensor in _names(tensors):
            block = Block(tensor, chunk, self.heads(self.rank, group))
            self._steps.append(Wait(self._stage, stream, block, peer))

    def copy_own(self, *, stream: Stream, group: int = 0) -> None:
        """Place the own rows among the received ones, where operands will span several chunks."""
        heads = self.heads(self.rank, group)
        tensors = ("q" if len(self.query_order) > 1 else "") + (
            "kv" if len(self.key_order) > 1 else ""
        )
        for tensor in _names(tensors):
            self._steps.append(Copy(self._stage, stream, Block(tensor, self.rank, heads)))

    def attend(
        self,
        queries: Iterable[int],
        keys: Iterable[int],
        *,
        stream: Stream = "compute",
        group: int = 0,
        fused: bool = False,
    ) -> None:
        heads = self.heads(self.rank, group)
        self._steps.append(Attend(self._stage, stream, tuple(queries), tuple(keys), heads, fused))

    def merge_and_push(
        self,
        queries: Sequence[int],
        *,
        stream: Stream,
        merge_stream: Stream = "compute",
        own_stream: Stream = "compute",
        group: int = 0,
    ) -> None:
        """Finish the output of these query chunks and send home what is not this rank's.

        What others wait for comes first. Every rank begins with its own neighbour: were all to
        begin with the same rank, they would queue there.
        """
        heads = self.heads(self.rank, group)
        others = tuple(chunk for chunk in queries if chunk != self.rank)
        if others:
            self._steps.append(Merge(self._stage, merge_stream, others, heads))
        for chunk in sorted(others, key=self._offset):
            self._steps.append(Put(self._stage, stream, Block("o", chunk, heads), chunk))
        if len(others) < len(queries):
            self._steps.append(Merge(self._stage, own_stream, (self.rank,), heads))

    def _offset(self, rank: int) -> tuple[int, int]:
        """How far on the machines and in the machine a rank that shares the ring place is."""
        at = self.mesh.coordinates(rank)
        machines = (at.torus - self.at.torus) % self.mesh.torus
        return machines, (at.ulysses - self.at.ulysses) % self.mesh.ulysses

    def collect_output(self) -> None:
        """Take home this rank's output rows from every rank that attended them."""
        with self.stage("collect_o"):
            for group in range(self.groups_per_rank):
                peers = [peer for peer in self.query_order if peer != self.rank]
                blocks = [Block("o", self.rank, self.heads(peer, group)) for peer in peers]
                for block, peer in zip(blocks, peers, strict=True):
                    self._steps.append(Wait(self._stage, "compute", block, peer))
                self._steps += [Collect(self._stage, "compute", block) for block in blocks]

    def finish(self) -> Program:
        """The program, with every slot released at its end, and without copies nobody reads.

        Nobody waits for a release before the layer after next, so it holds up nothing that
        somebody does wait for: it follows the last puts, or the last collect of outputs, or on
        its stream the fused call that reads the slot.
        """
        waits = [step for step in self._steps if isinstance(step, Wait)]
        releases: list[Step] = []
        is_fused = any(isinstance(step, Attend) and step.fused for step in self._steps)
        for step in waits:
            stream: Stream = "torus" if self.mesh.torus > 1 else "ring"
            if step.block.tensor == "o" or is_fused:
                stream = "compute"
            releases.append(Release("release", stream, step.block, step.peer))
        program = Program(self.rank, self.query_order, self.key_order, (*self._steps, *releases))
        read = {block for step in program.steps for block in program.reads(step)}
        steps = [step for step in program.steps if not isinstance(step, Copy) or step.block in read]
        return replace(program, steps=tuple(steps))


def _names(tensors: str) -> Iterator[TensorName]:
    for name in tensors:
        assert name in ("q", "k", "v", "o"), name
        yield name  # type: ignore[misc]
