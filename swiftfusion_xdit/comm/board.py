"""Two words per rank in shared memory, for what ranks tell each other without a message."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from swiftfusion_xdit.comm import semaphore

_INT64 = range(-(2**63), 2**63)


def check_words(words: Sequence[int]) -> None:
    """Check that both words fit a board.

    Raises:
        ValueError: naming them.
    """
    if len(words) != 2 or words[0] not in _INT64 or words[1] not in _INT64:
        raise ValueError(f"board words must fit int64, got {words}")


class Board:
    """Two int64 words per rank that others read whole, whatever the writer is doing meanwhile.

    A board has two places and the number of posts so far, ``n``; place ``n % 2`` holds the last
    pair. A post fills the other place and then sets ``n + 1``, so the place that ``n`` names is
    whole at any time, even if the writer dies halfway. It is overwritten only by the second post
    from now, after ``n + 1`` was set: a reader that finds ``n`` unchanged after reading the pair
    has a whole pair. Fences keep those accesses in that order. Each word is one aligned 8-byte
    access.
    """

    NUM_BYTES = 64

    def __init__(self, memories: list[Tensor]) -> None:
        self._memories = memories  # keeps mapped what the addresses below point to
        self._words = [(ctypes.c_int64 * 5).from_address(memory.data_ptr()) for memory in memories]

    def post(self, words: tuple[int, int], *, rank: int) -> None:
        """Replace this ``rank``'s words; one thread of it only."""
        check_words(words)
        board = self._words[rank]
        num_posts = board[0] + 1
        place = 1 + 2 * (num_posts % 2)
        semaphore.fence()  # orders the last post's count before the words that replace older ones
        board[place], board[place + 1] = words
        semaphore.fence()  # orders this rank's puts and the words before the count
        board[0] = num_posts

    def peek(self, peer: int) -> tuple[int, int]:
        """The words that ``peer`` posted last; ``(0, 0)`` before the first."""
        if not 0 <= peer < len(self._words):
            raise ValueError(f"peer must be a rank in [0, {len(self._words)}), got {peer}")
        board = self._words[peer]
        while True:
            num_posts = board[0]
            semaphore.fence()  # orders the count before the words
            place = 1 + 2 * (num_posts % 2)
            words = (board[place], board[place + 1])
            semaphore.fence()  # orders the words before the second look at the count
            if board[0] == num_posts:
                return words
