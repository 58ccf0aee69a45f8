"""xDiT's runner with the plugin loaded first: `python -m swiftfusion_xdit.cli.runner ...`."""

from __future__ import annotations

import runpy

from swiftfusion_xdit import bootstrap

if __name__ == "__main__":
    bootstrap.autoload()
    runpy.run_module("xfuser.runner", run_name="__main__", alter_sys=True)
