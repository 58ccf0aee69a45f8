"""`swiftfusion xdit ...`: xDiT's own launcher, with the plugin loaded explicitly.

The plugin normally comes with torch, through its `torch.backends` entry point. Where that is
switched off (`TORCH_DEVICE_BACKEND_AUTOLOAD=0`), or where the package is on the path without being
installed, this launches xDiT with the same arguments and the plugin in every rank.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

RUNNER = "xfuser.runner"
SHIM = "swiftfusion_xdit.cli.runner"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """List `xdit` among the commands; its arguments go to xDiT as they are."""
    parser = subparsers.add_parser(
        "xdit", help="launch xDiT with the plugin, whatever torch loads", add_help=False
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=lambda args: launch(args.arguments))


def launch(arguments: Sequence[str]) -> int:
    """Run xDiT's launcher on ``arguments`` and return its exit status."""
    from swiftfusion_xdit import bootstrap

    _make_importable()
    bootstrap.autoload()
    import xfuser.cli

    popen = xfuser.cli.subprocess.Popen

    class Subprocess:
        """xDiT's view of subprocess: it starts our runner, which loads the plugin, for its own."""

        @staticmethod
        def Popen(command: list[str], **options: object) -> object:
            return popen([SHIM if word == RUNNER else word for word in command], **options)

    xfuser.cli.subprocess = Subprocess
    try:
        xfuser.cli.main(list(arguments))
    except SystemExit as status:
        return status.code if isinstance(status.code, int) else int(bool(status.code))
    return 0


def _make_importable() -> None:
    """Let the ranks import this package also where it is not installed."""
    root = str(Path(__file__).parents[2])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
