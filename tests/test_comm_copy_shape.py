"""A strided copy is cut into two-dimensional ones that move every element, once, to its place."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from swiftfusion_xdit.comm.driver import copy_shape


def carry_out(src: torch.Tensor, dst: torch.Tensor) -> int:
    """Do with Python what the copy engine would; returns the number of its copies."""
    item = src.element_size()
    cut = copy_shape(tuple(src.shape), src.stride(), dst.stride(), item)
    source = src.untyped_storage()
    target = dst.untyped_storage()
    for src_start, dst_start in cut.starts:
        for row in range(cut.height):
            a = src.storage_offset() * item + src_start + row * cut.src_pitch
            b = dst.storage_offset() * item + dst_start + row * cut.dst_pitch
            for byte in range(cut.width):
                target[b + byte] = source[a + byte]
        if cut.height > 1:
            assert min(cut.src_pitch, cut.dst_pitch) >= cut.width, "what cudaMemcpy2D demands"
    return len(cut.starts)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    tensors = []
    for _ in range(2):
        extra = [draw(st.integers(0, 2)) for _ in shape]
        order = draw(st.permutations(range(len(shape))))
        whole = torch.zeros([shape[i] + extra[i] for i in order], dtype=torch.int16)
        view = whole.permute([order.index(i) for i in range(len(shape))])
        tensors.append(view[tuple(slice(e, e + n) for n, e in zip(shape, extra, strict=True))])
    src, dst = tensors
    src.copy_(torch.arange(1, src.numel() + 1).view(src.shape))
    if draw(st.booleans()) and shape[0] > 1:
        src = src[:1].expand(shape)
    return src, dst


@given(pairs())
def test_every_element_arrives_and_nothing_else(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    src, dst = pair
    carry_out(src, dst)
    assert torch.equal(dst, src), (src.shape, src.stride(), dst.stride())
    whole = torch.empty(0, dtype=dst.dtype).set_(dst.untyped_storage())
    assert whole.count_nonzero() == dst.count_nonzero(), "wrote outside of the region"


def test_heads_of_a_group_are_one_copy_a_batch() -> None:
    q = torch.zeros(2, 5, 8, 4)[:, :, 2:5]
    slot = torch.zeros(2, 7, 3, 4)[:, 1:6]
    cut = copy_shape(tuple(q.shape), q.stride(), slot.stride(), 2)
    assert (cut.width, cut.height, len(cut.starts)) == (3 * 4 * 2, 5, 2)
    whole = copy_shape((2, 5, 8, 4), (160, 32, 4, 1), (160, 32, 4, 1), 2)
    assert (whole.width, whole.height, whole.starts) == (2 * 5 * 8 * 4 * 2, 1, ((0, 0),))
