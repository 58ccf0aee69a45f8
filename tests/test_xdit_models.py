"""Models through xDiT's own wrappers under torus agree with diffusers in one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import compat_models, xdit_models
from tests.distributed import RankPool


@pytest.mark.parametrize(("name", "feature"), compat_models.CASES)
def test_agrees_with_one_process(
    rank_pool: Callable[[int], RankPool], name: str, feature: str
) -> None:
    refused = getattr(xdit_models.load(name), "REFUSED_BY_XDIT", {})
    word, found = compat_models.outcome(rank_pool, name, feature, "torus")
    assert word == ("refused" if feature in refused else "exact"), (name, feature, found)


# Where xDiT's own launch goes wrong, in the wrapper of a model or in attention.
FAULTS = {
    ("flux", "uneven text"): "wrong",  # text is on every rank, and counts once a rank
    ("flux", "uneven image"): "fails",  # a method that does not exist
    ("flux2", "uneven image"): "wrong",  # padding joins the keys, as in those that follow
    ("qwen_image", "uneven image"): "wrong",
    ("qwen_image", "uneven text"): "wrong",
    ("krea2", "uneven image"): "wrong",
    ("krea2", "uneven text"): "wrong",
    ("ideogram4", "uneven image"): "wrong",
    ("ideogram4", "uneven text"): "wrong",
    ("wan", "uneven image"): "wrong",
    ("wan_i2v", "uneven image"): "wrong",
    ("wan_ti2v", "uneven image"): "wrong",
    ("wan_vace", "uneven image"): "wrong",
    ("hunyuan_video15", "uneven image"): "wrong",
    ("ltx2", "uneven image"): "wrong",
    ("qwen_image", "masked text"): "wrong",  # the mask is dropped
    ("z_image", "masked text"): "wrong",  # so are the lengths of the prompts of a batch
    ("krea2", "masked text"): "fails",  # a mask of one rank's rows, for all ranks' rows
    ("flux2", "uneven text"): "fails",  # unequal chunks of text: ranks wait for ever
    ("hunyuan_video", "uneven image"): "fails",  # unequal chunks of video: the collective aborts
    ("cosmos3", "even"): "wrong",  # text is on every rank, and counts once a rank
    ("latte", "even"): "wrong",  # attention across frames mixes the ranks' pixels
    ("sd35", "even"): "fails",  # a variable that is not set
    ("lumina2", "even"): "refused",  # rings
}


@pytest.mark.parametrize(("name", "feature"), FAULTS)
def test_fault_of_stock(rank_pool: Callable[[int], RankPool], name: str, feature: str) -> None:
    """If this fails xDiT has changed: perhaps a correction may go."""
    word, found = compat_models.outcome(rank_pool, name, feature, "usp")
    assert word == FAULTS[name, feature], (name, feature, found)
