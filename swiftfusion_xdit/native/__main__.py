"""`python -m swiftfusion_xdit.native build` compiles the library where installation did not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from swiftfusion_xdit.native import build


def main(arguments: Sequence[str]) -> int:
    """``build``: compile the library and print where it is."""
    if list(arguments) != ["build"]:
        print(f"usage: {build.COMMAND}", file=sys.stderr)
        return 2
    try:
        print(build.build())
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
