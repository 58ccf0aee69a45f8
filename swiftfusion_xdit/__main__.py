"""`python -m swiftfusion_xdit` is the command `swiftfusion`."""

from __future__ import annotations

import sys

from swiftfusion_xdit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
