"""The oracle: attention in float64 by its definition, and how far a result is from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Scores are computed for as many query rows at a time as fit here.
_MAX_SCORE_BYTES = 128 * 2**20


def reference_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T) v in float64, for any floating inputs.

    Args:
        q: `[B, S_q, H, D]`, any strides.
        k, v: `[B, S_kv, H_kv, D]`, any strides; q head i uses kv head i // (H // H_kv).
        scale: factor of the scores; D ** -0.5 by default.

    Returns:
        `[B, S_q, H, D]`, float64; 0 if there are no keys.

    Raises:
        ValueError: H is not a multiple of H_kv.
    """
    batch, num_rows, num_heads, head_dim = q.shape
    num_keys, num_kv_heads = k.shape[1], k.shape[2]
    if num_heads % num_kv_heads != 0:
        raise ValueError(
            f"number of q heads must be a multiple of the number of kv heads; "
            f"got {num_heads} and {num_kv_heads}"
        )
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    if num_keys == 0:
        return out
    # b: sample, g: kv head, h: q head within the group, s: query row, t: key row
    queries = q.double().unflatten(2, (num_kv_heads, num_heads // num_kv_heads))
    keys, values = k.double(), v.double()
    step = max(1, _MAX_SCORE_BYTES // (8 * max(1, batch * num_heads * num_keys)))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        scores = scale * torch.einsum("bsghd,btgd->bghst", queries[:, rows], keys)
        shares = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        shares /= shares.sum(dim=-1, keepdim=True)
        out[:, rows] = torch.einsum("bghst,btgd->bsghd", shares, values).flatten(2, 3)
    return out


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in float64 over all elements; inf if `out` or `ref` has a nan.

    For ref = 0 (or empty): 0 if out is 0 too, otherwise inf.

    Raises:
        ValueError: different shapes.
    """
    if out.shape != ref.shape:
        raise ValueError(
            f"out and ref must have the same shape; got {tuple(out.shape)} and {tuple(ref.shape)}"
        )
    ref = ref.double()
    error = torch.linalg.vector_norm(out.double() - ref).item()
    norm = torch.linalg.vector_norm(ref).item()
    if error == 0.0:
        return 0.0
    quotient = error / norm if norm > 0.0 else math.inf
    return math.inf if math.isnan(quotient) else quotient
