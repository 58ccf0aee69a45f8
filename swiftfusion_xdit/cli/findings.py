"""One line of `swiftfusion doctor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    OK = "ok"
    MISSING = "missing"
    UNSUITABLE = "unsuitable"


@dataclass(frozen=True)
class Finding:
    """What was found about ``name``; ``remedy`` is the command that mends it."""

    name: str
    status: Status
    detail: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        return {
            "name": self.name,
            "status": self.status.value,
            "detail": self.detail,
            "remedy": self.remedy,
        }


Check = Callable[[], list[Finding]]


def ok(name: str, detail: str) -> list[Finding]:
    return [Finding(name, Status.OK, detail)]


def missing(name: str, detail: str, remedy: str) -> list[Finding]:
    return [Finding(name, Status.MISSING, detail, remedy)]


def unsuitable(name: str, detail: str, remedy: str | None = None) -> list[Finding]:
    return [Finding(name, Status.UNSUITABLE, detail, remedy)]
