"""Changes to other people's objects, with an exact undo."""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from typing import Any

_MISSING = object()


class Patches:
    """A log of changes; ``undo`` reverts them, last first."""

    def __init__(self) -> None:
        self._log: list[tuple[Any, Any, Any, bool]] = []
        self._followed: list[tuple[Any, Any]] = []

    def __len__(self) -> int:
        return len(self._log)

    def set(self, owner: Any, name: str, value: Any, *, follow: bool = False) -> None:
        """Set an attribute of a module, class, function or instance.

        Args:
            follow: also in every module that holds the same object by a name of its own, now or,
                for the undo, by then: ``from xfuser.envs import f`` copies f. ``value`` must be an
                object made for this change alone.
        """
        # Through __dict__, so that a staticmethod is put back as the staticmethod it was.
        before = vars(owner).get(name, _MISSING) if name != "__code__" else owner.__code__
        self._log.append((owner, name, before, False))
        setattr(owner, name, value)
        if follow and before is not _MISSING:
            self._followed.append((before, value))
            _rebind(before, value)

    def set_item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set an item of a mapping."""
        self._log.append((mapping, key, mapping.get(key, _MISSING), True))
        mapping[key] = value

    def undo(self) -> None:
        while self._followed:
            before, value = self._followed.pop()
            _rebind(value, before)
        while self._log:
            owner, name, before, is_item = self._log.pop()
            if is_item:
                if before is _MISSING:
                    owner.pop(name, None)
                else:
                    owner[name] = before
            elif before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def _rebind(old: Any, new: Any) -> None:
    for namespace in _namespaces():
        for name in [name for name, value in namespace.items() if value is old]:
            namespace[name] = new


def _namespaces() -> Iterator[dict[str, Any]]:
    """Of all modules but torch's, which mean what they say, and this package's."""
    for name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", None)
        if isinstance(namespace, dict) and name.partition(".")[0] not in (
            "torch",
            "swiftfusion_xdit",
        ):
            yield namespace
