"""What the tests of the compiled part share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swiftfusion_xdit.native import Op, Place

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1),
    reason="needs two GPUs with peer access",
)
LAYOUTS = ("bshd", "bhsd", "sbhd")


def fill(tensor: Tensor, seed: int) -> Tensor:
    """Random values, every bit pattern finite; the same for one seed."""
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return tensor.copy_(torch.randn(tensor.shape, generator=generator, device=tensor.device))


def empty(
    shape: tuple[int, int, int, int],
    layout: str = "bshd",
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda:0",
    pad_heads: int = 0,
) -> Tensor:
    """`[B, S, H, D]` of a memory layout, poisoned; with `pad_heads`, a slice of more heads.

    It ends where its allocation ends, so that what runs past it is seen by compute-sanitizer.
    """
    sizes = dict(zip("bshd", shape, strict=True))
    sizes["h"] += pad_heads
    memory = torch.full([sizes[x] for x in layout], torch.nan, dtype=dtype, device=device)
    return memory.permute([layout.index(x) for x in "bshd"])[:, :, pad_heads:]


def storage(tensor: Tensor) -> Tensor:
    """All of the memory behind a tensor, with what lies between its elements."""
    num_bytes = tensor.untyped_storage().nbytes()
    return tensor.as_strided((num_bytes // tensor.element_size(),), (1,), 0)


def copy_ops(
    stream: int, src: tuple[int, Tensor], dst: tuple[int, Tensor], *, by_kernel: bool = False
) -> list[Op]:
    """A copy between tensors whose addresses are entries of the table of bases."""
    return Op.copies(
        stream,
        Place(src[0], 0),
        Place(dst[0], 0),
        shape=src[1].shape,
        src_stride=src[1].stride(),
        dst_stride=dst[1].stride(),
        itemsize=src[1].element_size(),
        by_kernel=by_kernel,
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as integers, so that nan equals nan and 0 is not -0."""
    as_int = torch.int32 if a.element_size() == 4 else torch.int16
    return torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))
