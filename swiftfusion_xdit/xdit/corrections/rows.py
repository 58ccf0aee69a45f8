"""Rows of sequences that are padded at their ends and cut into one chunk a rank."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from swiftfusion_xdit.xdit.key_rows import Ranges, within
from swiftfusion_xdit.xdit.session import OnlyKeys, Session


def pad(rows: Tensor, session: Session) -> Tensor:
    """``[..., s, c]`` with zero rows at its end, so that ``s`` divides by the ranks."""
    return functional.pad(rows, (0, 0, 0, -rows.shape[-2] % session.size))


def padded_parts(session: Session, *num_rows: int) -> OnlyKeys:
    """Inside, local rows are chunks of several padded sequences, one after another.

    No padding is a key. Calls with another number of local key rows are left alone.

    Args:
        num_rows: of each whole sequence, without its padding.
    """
    return parts(session, *((num, ((0, num),)) for num in num_rows))


def parts(session: Session, *sequences: tuple[int, Ranges]) -> OnlyKeys:
    """Like :func:`padded_parts`, of sequences ``(number of rows, those that are keys)``."""
    kept = []
    end = 0
    total: list[int] = []
    for num_rows, valid in sequences:
        chunk_rows = -(-num_rows // session.size)
        first = session.rank * chunk_rows
        mine = within(valid, first, first + chunk_rows)
        kept += [(end + start, end + stop) for start, stop in mine]
        end += chunk_rows
        total += [num_rows, *(row for pair in valid for row in pair)]
    return session.only_keys(end, kept, total=total)
