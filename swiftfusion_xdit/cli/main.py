"""The `swiftfusion` command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from swiftfusion_xdit import __version__

# Each module has add_parser(subparsers), which sets the default `run`, a function of the parsed
# arguments that returns the exit status.
COMMANDS = ("bench", "demo", "doctor", "plan", "simulate", "xdit")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swiftfusion",
        description="SwiftFusion's sequence parallelism for xDiT.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"swiftfusion_xdit.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; a usage error exits with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["xdit"]:
        # All that follows belongs to xDiT, --help too: argparse must not look at it.
        from swiftfusion_xdit.cli import xdit

        return xdit.launch(arguments[1:])
    args = build_parser().parse_args(arguments)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
