"""docs/compatibility.md says what runs here give."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import compatibility
from tests.distributed import RankPool

pytest.importorskip("xfuser")


def test_page_is_current(rank_pool: Callable[[int], RankPool]) -> None:
    expected = compatibility.page(rank_pool).splitlines()
    found = compatibility.PAGE.read_text(encoding="utf-8").splitlines()
    assert found == expected, "python -m tests.compatibility writes docs/compatibility.md anew"


@pytest.mark.parametrize("test", sorted({test for _, _, test in compatibility.FEATURES}))
def test_what_the_page_refers_to_exists(test: str) -> None:
    assert (compatibility.ROOT / "tests" / test).exists()
