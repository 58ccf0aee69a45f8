"""SwiftFusion's sequence parallelism for xDiT: Torus Attention with one-sided communication.

Importing the package is light: neither torch.distributed nor xfuser is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swiftfusion_xdit.sequence_parallel import SequenceParallel

__version__ = "0.1.0"

__all__ = ["SequenceParallel", "__version__", "disable", "enable"]


def enable(strategy: str | None = None, **options: Any) -> None:
    """Hook into xDiT, before or after xfuser was imported.

    Installing the package does this by itself, through the ``torch.backends`` entry point; call
    it where that is switched off, or to choose a strategy from Python. What is chosen here ranks
    below xDiT's command-line flags and above the environment variables.

    Args:
        strategy: ``usp``, ``tas`` or ``torus``; None leaves the choice to flags and environment.
        options: ``transport``, ``machines``, ``mesh``, ``schedule``, ``fallback``, ``wire``, with
            the values that ``--sp-transport`` and so on take.

    Raises:
        ValueError: an unknown option or a value that it cannot have.
        IncompatibleXfuserError: xfuser is loaded, a strategy other than ``usp`` is asked for, and
            this xfuser is not one that the plugin knows.
    """
    from swiftfusion_xdit.xdit import hooks

    hooks.enable(strategy, **options)


def disable() -> None:
    """Undo every change to xDiT and torch, exactly, and close what is open."""
    from swiftfusion_xdit.xdit import hooks

    hooks.disable()


def __getattr__(name: str) -> Any:
    if name == "SequenceParallel":
        from swiftfusion_xdit.sequence_parallel import SequenceParallel

        return SequenceParallel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
