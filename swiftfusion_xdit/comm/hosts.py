"""What ranks that may be on several hosts need of each other's hosts: who is where, a board."""

from __future__ import annotations

import os
import struct

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from swiftfusion_xdit.comm import process, segment, shm
from swiftfusion_xdit.comm.board import Board, check_words

_WORDS = "=2q"


def one_host(group: dist.ProcessGroup) -> bool:
    """Collective: whether all ranks share one running host, and its shared memory."""
    return len({tuple(words) for words in segment.exchange(group, shm.host_words())}) == 1


def watch_processes(group: dist.ProcessGroup) -> list[process.PeerProcess]:
    """Collective: the processes of all ranks; those of other hosts cannot be seen from here."""
    host, pid = shm.host_words(), os.getpid()
    mine = (*host, process.pid_namespace(), pid, process.start_time(pid))
    visible = len(host) + 1
    return [
        process.PeerProcess(
            values[visible] if tuple(values[:visible]) == mine[:visible] else None,
            started=values[visible + 1],
        )
        for values in segment.exchange(group, mine)
    ]


def host_board(group: dist.ProcessGroup) -> Board:
    """Collective: a board of ranks of one host, in shared memory."""
    segments = segment.map_segments(group, num_bytes=Board.NUM_BYTES, num_flags=0)
    offset = segment.Layout(Board.NUM_BYTES, 0).data_offset
    return Board([memory[offset : offset + Board.NUM_BYTES] for memory in segments])


def make_board(group: dist.ProcessGroup) -> Board | StoreBoard:
    """Collective: the board for these ranks, on one host or several."""
    return host_board(group) if one_host(group) else StoreBoard(group)


class StoreBoard:
    """Two int64 words per rank, in the store through which the group was formed.

    For ranks that share no memory: a post or a look is a message to the store's server.
    """

    _num_boards = 0

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Collective: every rank of the group makes its boards in the same order."""
        StoreBoard._num_boards += 1
        (first, *_) = segment.exchange(group, [StoreBoard._num_boards])
        prefix = f"swiftfusion-board-{first[0]}"
        self._store = dist.PrefixStore(prefix, _get_process_group_store(group))
        self.post((0, 0), rank=dist.get_rank(group))
        segment.exchange(group, [0])  # from here on every rank's words can be read

    def post(self, words: tuple[int, int], *, rank: int) -> None:
        """Replace this ``rank``'s words."""
        check_words(words)
        # As text: the store's Python side takes strings.
        self._store.set(str(rank), struct.pack(_WORDS, *words).hex())

    def peek(self, peer: int) -> tuple[int, int]:
        """The words that ``peer`` posted last."""
        first, second = struct.unpack(_WORDS, bytes.fromhex(self._store.get(str(peer)).decode()))
        return first, second
