"""Which key rows a rank brings: ranges, shares and padding."""

from __future__ import annotations

import pytest
import torch

from swiftfusion_xdit.xdit.key_rows import KeyRows, share, valid_rows


def test_ranges_are_joined_and_empty_ones_dropped() -> None:
    assert KeyRows.of(10, [(0, 2), (2, 4), (5, 5), (7, 10)]).kept == ((0, 4), (7, 10))


@pytest.mark.parametrize("kept", [[(0, 11)], [(-1, 2)], [(3, 2)], [(4, 6), (5, 7)]])
def test_ranges_that_do_not_fit_are_refused(kept: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="within 10 rows"):
        KeyRows.of(10, kept)


def test_selection() -> None:
    rows = torch.arange(10.0).reshape(1, 1, 10, 1)
    one = KeyRows.of(10, [(2, 5)]).select(rows)
    assert one.flatten().tolist() == [2, 3, 4]
    assert one.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    assert KeyRows.of(10, [(0, 1), (8, 10)]).select(rows).flatten().tolist() == [0, 8, 9]
    assert KeyRows.of(10, []).select(rows).shape == (1, 1, 0, 1)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 10])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_shares_cover_all_rows_once(num_rows: int, size: int) -> None:
    shares = [share(num_rows, rank, size) for rank in range(size)]
    assert [row for start, stop in shares for row in range(start, stop)] == list(range(num_rows))
    lengths = [stop - start for start, stop in shares]
    assert max(lengths) - min(lengths) <= 1


def test_padding_is_at_the_end_of_the_whole_sequence() -> None:
    assert [valid_rows(9, chunk, 4) for chunk in range(4)] == [(0, 4), (0, 4), (0, 1), (0, 0)]
