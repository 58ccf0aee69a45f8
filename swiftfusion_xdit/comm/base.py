"""What every transport offers: symmetric buffers, one-sided puts, and flags that order them.

A *symmetric buffer* has the same size on every rank. A rank puts data straight into a peer's
buffer and then signals one of the peer's flags; the peer waits for the flag, which clears it, and
reads. Flags are binary: a flag is signalled again only after its owner has waited for it, which
the owner says with a flag of its own in the other direction (FULL and FREE).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from swiftfusion_xdit.region import Region
from swiftfusion_xdit.topology import Link, Topology

if TYPE_CHECKING:
    from typing_extensions import Self


class PeerTimeout(RuntimeError):
    """A peer did not signal within the deadline, or its process ended before it did."""


@dataclass(frozen=True)
class Flag:
    """A flag of the rank that waits: its position there, and its name in a report."""

    index: int
    name: str


@dataclass(frozen=True)
class Transfer:
    """One put of a layer, as every rank of the group knows it beforehand.

    ``src`` puts it into ``region`` of ``dst`` and then signals ``full_flag`` there; ``src`` has
    waited for its own ``free_flag`` before. ``parity`` numbers the set of slots, ``batch`` the
    exchange that it belongs to: transfers of one batch need nothing of each other, and those of a
    batch need earlier ones only.
    """

    src: int
    dst: int
    region: Region
    full_flag: int
    free_flag: int
    parity: int
    batch: int


class Counters:
    """Bytes and messages that this rank moved, per class of link. Safe to use from threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def add(self, link: Link, num_bytes: int, *, num_messages: int = 1) -> None:
        """Count messages of ``num_bytes`` together; nothing was sent if that is zero."""
        if num_bytes == 0:
            return
        with self._lock:
            total = self._totals[link]
            total[0] += num_bytes
            total[1] += num_messages

    def as_dict(self) -> dict[str, dict[str, int]]:
        """``{"same_machine": {"bytes": n, "messages": n}, ...}``, a copy, with every class."""
        with self._lock:
            return {
                link.value: {"bytes": num_bytes, "messages": num_messages}
                for link, (num_bytes, num_messages) in self._totals.items()
            }

    def reset(self) -> None:
        with self._lock:
            self._totals = {link: [0, 0] for link in Link}


class SymmetricBuffer(ABC):
    """This rank's handle of one symmetric buffer; the communicator that allocated it owns it."""

    num_bytes: int
    num_flags: int

    @property
    @abstractmethod
    def local(self) -> Tensor:
        """This rank's memory: uint8 ``[num_bytes]``.

        Raises:
            RuntimeError: the buffer is closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Give this rank's mappings back; may be called twice. Tensors over them stay valid."""


class Communicator(ABC):
    """One-sided communication among the ranks of a group; a context manager that owns its buffers.

    ``context`` says what this rank is doing, for the report of a wait that fails; its user sets
    it. ``counters`` has the payload of every put and get.

    ``on_stream`` tells how calls happen: False, when they return; True, in the order of the CUDA
    stream that is current at the call, later. A layer is then put between ``begin_layer`` and
    ``end_layer``, sources of puts are kept by whoever made the call until the stream is past
    them, and a wait that fails ends the process with a report (``watchdog.py``).
    """

    on_stream: ClassVar[bool] = False
    # Whether every peer's memory and flags have an address here, so that a layer can be compiled.
    addressable: bool = False
    # Whether a put is a send that its receiver joins, in batches (`schedule/rounds.py`).
    two_sided: bool = False

    def __init__(self, *, rank: int, size: int, topology: Topology) -> None:
        if topology.num_ranks != size:
            raise ValueError(
                f"topology must place every rank of the group: it has {topology.num_ranks} ranks, "
                f"the group has {size}"
            )
        self.rank = rank
        self.size = size
        self.topology = topology
        self.counters = Counters()
        self.context = ""

    @abstractmethod
    def allocate(self, num_bytes: int, *, num_flags: int) -> SymmetricBuffer:
        """Collective: a buffer of ``num_bytes`` and ``num_flags`` flags per rank, all zero.

        Raises:
            ValueError: ranks disagree about a size, or a size is negative.
            OSError: a rank has no room, or cannot reach the memory of another.
        """

    @abstractmethod
    def free(self, buffer: SymmetricBuffer) -> None:
        """Collective: close a buffer and forget it. No put to it may come later on any rank."""

    @abstractmethod
    def put(self, src: Tensor, buffer: SymmetricBuffer, region: Region, peer: int) -> None:
        """Copy ``src`` (any strides) into ``region`` of the peer's buffer, without its help.

        The data is complete at the peer when it has waited for a later ``signal`` of this rank.

        Raises:
            ValueError: shape or dtype of ``src`` is not that of ``region``; ``region`` ends past
                the buffer; ``peer`` is not a rank.
        """

    @abstractmethod
    def get(self, buffer: SymmetricBuffer, region: Region, peer: int) -> Tensor:
        """A fresh contiguous copy of ``region`` of the peer's buffer; counted like a put.

        Raises:
            ValueError: ``region`` ends past the buffer; ``peer`` is not a rank.
        """

    @abstractmethod
    def signal(self, buffer: SymmetricBuffer, flag_index: int, peer: int) -> None:
        """Set a flag of the peer, after everything that this rank has put there and read there.

        The flag must be clear: signalling a set flag is an error of the protocol (an assertion).

        Raises:
            ValueError: ``flag_index`` is not a flag of the buffer; ``peer`` is not a rank.
        """

    @abstractmethod
    def wait(
        self,
        buffer: SymmetricBuffer,
        flag: Flag,
        peer: int,
        *,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        """Wait until this rank's own ``flag`` is set, then clear it; ``peer`` is who signals it.

        What the peer put before its signal can be read afterwards. ``on_wait`` is called now and
        then while the flag is not set; what it raises ends the wait.

        Raises:
            PeerTimeout: the deadline passed, or the peer's process ended, with the flag not set.
            ValueError: ``flag`` is not a flag of the buffer; ``peer`` is not a rank.
        """

    @abstractmethod
    def preset(self, buffer: SymmetricBuffer, flag_index: int) -> None:
        """Set one of this rank's own flags: how slots start out free."""

    @abstractmethod
    def clear(self, buffer: SymmetricBuffer, flag_index: int) -> None:
        """Clear one of this rank's own flags, set or not: how a layer that was given up ends."""

    def bind(  # noqa: B027, a hook
        self, buffer: SymmetricBuffer, transfers: Sequence[Transfer]
    ) -> None:
        """Collective: what a layer on this buffer moves; the same sequence on every rank.

        Called once for a buffer, before the first put. A transport whose peers take part in a
        transfer derives their part from this; one that needs nothing of them ignores it.
        """

    def name_flags(  # noqa: B027, a hook
        self, buffer: SymmetricBuffer, flags: Sequence[tuple[Flag, int]]
    ) -> None:
        """Name this rank's own flags, and who signals each, for reports from a stream."""

    def begin_layer(  # noqa: B027, a hook
        self, buffer: SymmetricBuffer, context: str, *, parity: int = 0
    ) -> None:
        """Say that the current stream begins a layer on this buffer; ``context`` names it."""

    def end_layer(self, buffer: SymmetricBuffer) -> None:  # noqa: B027, a hook
        """Say that the layer ends: the current stream is behind all that the layer has done."""

    def measure_across(self) -> float | None:
        """Collective: the GB/s that this rank gets to the next machine while all ranks send.

        None where the transport does not measure it, and on one machine.
        """
        return None

    @abstractmethod
    def post(self, words: tuple[int, int]) -> None:
        """Publish two int64 words on this rank's board, in place of the two before. One thread.

        Raises:
            ValueError: a word does not fit int64.
        """

    @abstractmethod
    def peek(self, peer: int) -> tuple[int, int]:
        """The two words that ``peer`` posted last, always a pair; ``(0, 0)`` before the first.

        What the peer put before it posted them can be read afterwards.
        """

    @abstractmethod
    def close(self) -> None:
        """Close every buffer; may be called twice. Not collective: peers keep their mappings."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
