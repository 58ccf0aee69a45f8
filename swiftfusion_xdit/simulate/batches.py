"""Two-sided transfers: which puts go together, when both ends enter, and what that holds.

The batches are those that the runtime uses (`schedule/rounds.py`), found in the same way but for
the ranks that are simulated. A rank works through its batches one after another. It enters one when
it has come to all of its puts in it, holds its units from then on, and leaves when everything it
sends and receives there is done. A transfer starts when both ends have entered.
"""

from __future__ import annotations

from collections import defaultdict

from swiftfusion_xdit.schedule.steps import Put, Wait
from swiftfusion_xdit.simulate.engine import Op, OpGraph
from swiftfusion_xdit.simulate.setting import Layer, Setting
from swiftfusion_xdit.simulate.wiring import Message, Wiring
from swiftfusion_xdit.topology import Link as LinkClass

TENSORS = "qkvo"
Use = tuple[int, int, int]  # (head group of the rank, stage, tensor)


def batch_order(
    wiring: Wiring, *, by_tensor: bool = False, whole_rounds: bool = False
) -> list[list[Message]]:
    """Every put of the simulated ranks, in batches, in the order in which ranks enter them.

    Args:
        by_tensor: see ``Transport``.
        whole_rounds: all puts of a round are one batch.

    Raises:
        ValueError: the schedule waits in a circle.
    """
    arrived: set[Message] = set()
    positions = {program.rank: 0 for program in wiring.programs}
    stages = _stage_order(wiring)
    result: list[list[Message]] = []
    while any(positions[p.rank] < len(p.steps) for p in wiring.programs):
        by_use: dict[Use, list[Message]] = defaultdict(list)
        before = dict(positions)
        for program in wiring.programs:
            rank = program.rank
            for step in program.steps[positions[rank] :]:
                if isinstance(step, Wait):
                    if wiring.message(step.peer, rank, step.block) not in arrived:
                        break
                elif isinstance(step, Put):
                    alone = by_tensor and step.stage == "scatter_heads"
                    tensor = TENSORS.index(step.block.tensor) if alone else 0
                    group = step.block.heads % wiring.groups_per_rank
                    use = (0, 0, 0) if whole_rounds else (group, stages[step.stage], tensor)
                    by_use[use].append((rank, step.peer, step.block))
                positions[rank] += 1
        if positions == before:
            raise ValueError(f"the schedule on {wiring.mesh} waits in a circle")
        for use in sorted(by_use):
            result.append(by_use[use])
            arrived.update(by_use[use])
    return result


def _stage_order(wiring: Wiring) -> dict[str, int]:
    """Stages by the first place at which any program puts for them."""
    first: dict[str, tuple[int, str]] = {}
    for program in wiring.programs:
        for index, step in enumerate(program.steps):
            if isinstance(step, Put):
                here = (index, step.stage)
                first[step.stage] = min(first.get(step.stage, here), here)
    return {stage: number for number, (_, stage) in enumerate(sorted(first.values()))}


def add_batches(graph: OpGraph, setting: Setting, layer: Layer) -> None:
    """Add the transfers of all two-sided puts of a layer."""
    by_tensor = setting.inside.by_tensor or setting.across.by_tensor
    if not (setting.inside.two_sided or setting.across.two_sided):
        return
    left: dict[int, Op] = {}
    order = batch_order(setting.wiring, by_tensor=by_tensor, whole_rounds=setting.whole_rounds)
    for batch in order:
        messages = [message for message in batch if message not in layer.flows]
        if messages:
            _add_batch(graph, setting, layer, messages, left)


def _add_batch(
    graph: OpGraph, setting: Setting, layer: Layer, messages: list[Message], left: dict[int, Op]
) -> None:
    """Add one batch; ``left`` is each rank's leave of the batch before."""
    by_rank: dict[int, list[Message]] = defaultdict(list)
    for message in messages:
        by_rank[message[0]].append(message)
        by_rank[setting.wiring.standing_for(message[1])] += []
    entered: dict[int, Op] = {}
    for rank, own in by_rank.items():
        after = [layer.posted[message] for message in own]
        after += [left[rank]] if rank in left else [layer.begins[rank]]
        entered[rank] = _enter(graph, setting, rank, own, after)
    touching: dict[int, list[Op]] = defaultdict(list)
    for message in messages:
        src, dst = message[0], setting.wiring.standing_for(message[1])
        flow = _flow(setting, message)
        graph.add(flow, [entered[rank] for rank in {src: 0, dst: 0}])
        layer.flows[message] = flow
        for rank in {src: 0, dst: 0}:
            touching[rank].append(flow)
    for rank in by_rank:
        name = f"send {len(by_rank[rank])} blocks, {messages[0][2].tensor} first"
        leave = Op(rank, "nccl", name, holds=-setting.held_units, since=entered[rank])
        left[rank] = graph.add(leave, touching[rank])


def _enter(graph: OpGraph, setting: Setting, rank: int, own: list[Message], after: list[Op]) -> Op:
    """Pack, then start: the kernel's launch, the meeting of both ends, each further message."""
    changing = [message for message in own if not _is_relay(message)]
    num_bytes = sum(setting.sizes.block_bytes(block) for _, _, block in changing)
    pack = Op(rank, "nccl", f"copy to and from buffers, {len(changing)} blocks")
    pack.delay_us = setting.pack_us(num_bytes)
    pack.drawn = pack.delay_us > 0
    graph.add(pack, after)
    delay: dict[LinkClass, float] = {}
    for src, dst, _ in own:
        link = setting.link(src, dst)
        start = setting.start_us(link) - setting.message_us(link)
        delay[link] = delay.get(link, start) + setting.message_us(link)
    enter = Op(rank, "nccl", "enter", holds=setting.held_units, drawn=False)
    enter.delay_us = max(delay.values(), default=0.0)
    return graph.add(enter, [pack])


def _flow(setting: Setting, message: Message) -> Op:
    src, dst, block = message
    link = setting.link(src, dst)
    flow = Op(src, "nccl", f"put {block} to rank {dst}", drawn=False)
    flow.num_bytes = setting.sizes.block_bytes(block)
    flow.links = setting.fabric.links(src, dst, link)
    flow.ends = (src, setting.wiring.standing_for(dst))
    flow.under_compute = setting.transport(link).under_compute
    return flow


def _is_relay(message: Message) -> bool:
    src, _, block = message
    return block.tensor != "o" and block.chunk != src
