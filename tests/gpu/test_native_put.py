"""The put kernel: the same blocks to several peers in one launch, and flags that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from swiftfusion_xdit import native
from swiftfusion_xdit.native import ABSOLUTE, Op, Place, PutArgs, PutItem
from swiftfusion_xdit.native.structs import MAX_PUT_ITEMS, MAX_PUT_PEERS
from tests.gpu.native_cases import LAYOUTS, copy_ops, empty, fill, needs_gpu, same_bits, storage

pytestmark = [*needs_gpu, pytest.mark.timeout(120)]

# Other GPUs where there are some; else other memory of the same one stands for them.
PEER_DEVICES = [
    f"cuda:{i}"
    for i in range(1, torch.cuda.device_count())
    if torch.cuda.can_device_access_peer(0, i)
] or ["cuda:0"]


def peers(num_peers: int) -> list[str]:
    return [PEER_DEVICES[i % len(PEER_DEVICES)] for i in range(num_peers)]


@dataclass
class Block:
    """One item: a `[B, S, H, D]`, where it goes at each peer, and its flags there, if any."""

    src: Tensor
    dsts: list[Tensor]
    flags: list[Tensor] = field(default_factory=list)

    @classmethod
    def to_peers(
        cls, src: Tensor, devices: Sequence[str], *, layout: str = "bshd", pad_heads: int = 0
    ) -> Block:
        b, s, h, d = src.shape
        dsts = [
            empty((b, s, h, d), layout, dtype=src.dtype, device=x, pad_heads=pad_heads)
            for x in devices
        ]
        return cls(src, dsts)

    def item(self) -> PutItem:
        size, dst = self.src.element_size(), self.dsts[0]
        assert all(x.stride() == dst.stride() for x in self.dsts)
        item = PutItem(src=self.src.data_ptr())
        for peer, x in enumerate(self.dsts):
            item.dst[peer] = x.data_ptr()
        for peer, x in enumerate(self.flags):
            item.flag[peer] = x.data_ptr()
        item.src_stride[:] = [x * size for x in self.src.stride()[:3]]
        item.dst_stride[:] = [x * size for x in dst.stride()[:3]]
        item.batch, item.rows, item.heads = self.src.shape[:3]
        item.head_bytes = self.src.shape[3] * size
        return item

    def check(self, name: str = "") -> None:
        """The destinations have the source's bits, and what lies beside them is still poison."""
        for peer, dst in enumerate(self.dsts):
            memory = storage(dst)
            wanted = torch.full_like(memory, torch.nan)
            wanted.as_strided(dst.shape, dst.stride(), dst.storage_offset()).copy_(self.src)
            assert same_bits(memory, wanted), f"{name} peer {peer}"


class Flags:
    """A flag of every item at every peer, with a word on either side, and the counters."""

    def __init__(self, num_items: int, devices: Sequence[str]) -> None:
        self.words = [
            torch.zeros(num_items + 2, dtype=torch.int32, device=device) for device in devices
        ]
        self.counters = torch.zeros(MAX_PUT_ITEMS, dtype=torch.int32, device="cuda:0")

    def of(self, item: int) -> list[Tensor]:
        return [words[item + 1 :] for words in self.words]

    def check(self, wanted: Sequence[int], name: str = "") -> None:
        for peer, words in enumerate(self.words):
            assert words.tolist() == [0, *wanted, 0], f"{name} flags of peer {peer}"
        assert not self.counters.any(), f"{name} counters {self.counters.tolist()}"


def put_args(blocks: Sequence[Block], counters: Tensor | None, *, num_blocks: int) -> PutArgs:
    args = PutArgs(
        counters=None if counters is None else counters.data_ptr(),
        num_items=len(blocks),
        num_peers=len(blocks[0].dsts),
        num_blocks=num_blocks,
    )
    for i, block in enumerate(blocks):
        args.items[i] = block.item()
    return args


def wait_for_all() -> None:
    for device in {"cuda:0", *PEER_DEVICES}:
        torch.cuda.synchronize(device)


def launch(args: PutArgs) -> None:
    native.load().put(args, stream=torch.cuda.current_stream().cuda_stream)


def run(blocks: Sequence[Block], counters: Tensor | None, *, num_blocks: int = 16) -> None:
    """One launch; every GPU is idle before and after it."""
    wait_for_all()
    launch(put_args(blocks, counters, num_blocks=num_blocks))
    wait_for_all()


@pytest.fixture(scope="module", autouse=True)
def peer_access() -> None:
    for device in PEER_DEVICES:
        torch.zeros(1, device="cuda:0").to(device)  # torch enables it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [128, 72, 7, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_put_moves_every_element(dtype: torch.dtype, head_dim: int, layout: str) -> None:
    devices, blocks = peers(3), []
    flags = Flags(4, devices)
    for i, rows in enumerate((65, 300, 1, 0)):
        src = fill(empty((2, rows, 3, head_dim), layout, dtype=dtype, pad_heads=i), i)
        block = Block.to_peers(src, devices, layout=LAYOUTS[i % 3], pad_heads=3 - i)
        block.flags = flags.of(i)
        blocks.append(block)
    run(blocks, flags.counters, num_blocks=7)
    for i, block in enumerate(blocks):
        block.check(f"item {i}")
    flags.check([1] * 4)


@pytest.mark.parametrize("num_blocks", [1, 7, 16])
@pytest.mark.parametrize("num_peers", range(1, MAX_PUT_PEERS + 1))
def test_any_number_of_peers_and_blocks(num_peers: int, num_blocks: int) -> None:
    """More units than the threads of sixteen blocks have in flight at once, and no multiple."""
    devices, blocks = peers(num_peers), []
    flags = Flags(2, devices)
    for i in range(2):
        src = fill(empty((1, 1111, 12, 128), pad_heads=2), i)
        block = Block.to_peers(src, devices, pad_heads=1)
        block.flags = flags.of(i)
        blocks.append(block)
    run(blocks, flags.counters, num_blocks=num_blocks)
    for i, block in enumerate(blocks):
        block.check(f"item {i}")
    flags.check([1, 1])


def test_head_groups_go_to_slices_and_nothing_beside_them_is_written() -> None:
    devices, blocks = peers(4), []
    flags = Flags(3, devices)
    src = fill(empty((2, 333, 12, 128)), 0)
    memory = [empty((2, 999, 14, 128), device=device) for device in devices]
    for i, (begin, end) in enumerate(((0, 5), (5, 9), (9, 12))):
        targets = [x[:, 333:666, 1 + begin : 1 + end] for x in memory]
        blocks.append(Block(src[:, :, begin:end], targets, flags.of(i)))
    run(blocks, flags.counters)
    for peer, got in enumerate(memory):
        wanted = torch.full_like(got, torch.nan)
        wanted[:, 333:666, 1:13] = src.to(got.device)
        assert same_bits(got, wanted), f"peer {peer}"
    flags.check([1] * 3)


def test_sixteen_items_of_which_some_have_flags() -> None:
    devices, blocks = peers(2), []
    flags = Flags(MAX_PUT_ITEMS, devices)
    for i in range(MAX_PUT_ITEMS):
        block = Block.to_peers(fill(empty((1, 9 + i, 2, 64)), i), devices)
        if i % 3 == 1:
            block.flags = flags.of(i)
        blocks.append(block)
    run(blocks, flags.counters)
    for i, block in enumerate(blocks):
        block.check(f"item {i}")
    flags.check([int(i % 3 == 1) for i in range(MAX_PUT_ITEMS)])


def test_without_flags_there_are_no_counters() -> None:
    blocks = [Block.to_peers(fill(empty((1, 77, 3, 64)), i), peers(2)) for i in range(2)]
    run(blocks, None)
    for i, block in enumerate(blocks):
        block.check(f"item {i}")


@pytest.mark.parametrize("num_blocks", [1, 16])
def test_an_empty_item_sets_its_flags(num_blocks: int) -> None:
    devices = peers(3)
    nothing = [Block.to_peers(empty((1, 0, 3, 128)), devices) for _ in range(2)]
    something = Block.to_peers(fill(empty((1, 40, 3, 128)), 0), devices)
    flags = Flags(3, devices)
    blocks = [nothing[0], something, nothing[1]]
    nothing[0].flags, nothing[1].flags = flags.of(0), flags.of(2)
    run(blocks, flags.counters, num_blocks=num_blocks)
    something.check()
    flags.check([1, 0, 1])
    flags = Flags(1, devices)
    nothing[0].flags = flags.of(0)
    run(nothing[:1], flags.counters, num_blocks=num_blocks)
    flags.check([1])


@pytest.mark.parametrize("num_blocks", [1, 7])
@pytest.mark.parametrize(
    ("start", "head_bytes", "gap"),
    [
        *[(16, 48, 0), (16, 48, 16)],
        *[(4, 48, 16), (16, 20, 4), (16, 48, 4)],
        *[(2, 48, 16), (16, 6, 2), (16, 48, 6)],
        *[(1, 48, 16), (16, 5, 0), (16, 48, 3)],
    ],
)
def test_every_alignment(start: int, head_bytes: int, gap: int, num_blocks: int) -> None:
    """Units of 16, 4, 2 and 1 bytes. Only the last destination begins at `start`."""
    devices, step, starts = peers(3), head_bytes + gap, (0, 0, start)
    flags = Flags(1, devices)
    shape, stride = (2, 50, 3, head_bytes), (150 * step, 3 * step, step, 1)
    num_bytes = 16 + 300 * step
    src = torch.arange(num_bytes, dtype=torch.int32, device="cuda:0").remainder(251)
    memory = [torch.full((num_bytes,), 255, dtype=torch.uint8, device=x) for x in devices]
    block = Block(
        src.to(torch.uint8).as_strided(shape, stride, 0),
        [x.as_strided(shape, stride, at) for x, at in zip(memory, starts, strict=True)],
        flags.of(0),
    )
    run([block], flags.counters, num_blocks=num_blocks)
    for peer, (got, at) in enumerate(zip(memory, starts, strict=True)):
        wanted = torch.full_like(got, 255)
        wanted.as_strided(shape, stride, at).copy_(block.src)
        assert torch.equal(got, wanted), f"peer {peer}"
    flags.check([1])


@pytest.mark.parametrize("captured", [False, True])
def test_launches_repeat(captured: bool) -> None:
    devices, blocks = peers(3), []
    flags = Flags(2, devices)
    for i in range(2):
        block = Block.to_peers(empty((1, 200, 6, 64), pad_heads=i), devices, pad_heads=2)
        block.flags = flags.of(i)
        blocks.append(block)
    args = put_args(blocks, flags.counters, num_blocks=16)
    native.load().preload()
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            launch(args)
    for repeat in range(20):
        for i, block in enumerate(blocks):
            fill(block.src, 2 * repeat + i)
        for words in flags.words:
            words.zero_()
        wait_for_all()
        if captured:
            graph.replay()
        else:
            launch(args)
        wait_for_all()
        for i, block in enumerate(blocks):
            block.check(f"launch {repeat} item {i}")
        flags.check([1, 1], f"launch {repeat}")


@pytest.mark.parametrize("num_blocks", [1, 16])
def test_a_peer_sees_what_was_put_before_its_flag(num_blocks: int) -> None:
    """The peer's stream waits for each item and copies it away while the next one is on its way.

    Every wait is for something enqueued before it: two streams of a GPU may share one queue.
    """
    device = PEER_DEVICES[0]
    flags, blocks, ops, memory = Flags(3, [device]), list[Block](), list[Op](), list[Tensor]()
    for i, rows in enumerate((64, 4096, 512)):
        src, dst, seen = (
            torch.zeros((1, rows, 8, 64), dtype=torch.int32, device=x)
            for x in ("cuda:0", device, device)
        )
        block = Block(src, [dst], flags.of(i))
        flag = Place(ABSOLUTE, block.flags[0].data_ptr())
        ops += [Op.wait(0, flag), Op.clear(0, flag)]
        ops += copy_ops(0, (2 * i, dst), (2 * i + 1, seen), by_kernel=True)
        blocks.append(block)
        memory += [dst, seen]
    with torch.cuda.device(device):
        program = native.load().program(ops)
        reader = torch.cuda.Stream()
    args, writer = put_args(blocks, flags.counters, num_blocks=num_blocks), torch.cuda.Stream()
    native.load().preload()
    wait_for_all()
    for i in range(100):
        with torch.cuda.stream(writer):
            if i < 10:
                torch.cuda._sleep(2_000_000)  # about a millisecond, in which the reader waits
            for block in blocks:
                block.src.fill_(i + 1)
            launch(args)
        with torch.cuda.device(device):
            bases = [x.data_ptr() for x in memory]
            program.run(0, None, bases, [reader.cuda_stream])
        reader.synchronize()
        for item, seen in enumerate(memory[1::2]):
            assert seen.eq(i + 1).all(), f"round {i} item {item}"
    wait_for_all()
    flags.check([0] * 3)
