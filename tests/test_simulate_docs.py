"""The tables in docs/simulator.md are what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from swiftfusion_xdit.cli.main import main

PAGE = Path(__file__).parent.parent / "docs" / "simulator.md"


@pytest.mark.parametrize("tables", ["measured", "paper"])
def test_tables_are_generated(tables: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", f"--{tables}", "--markdown"]) == 0
    printed = capsys.readouterr().out
    begin, end = f"<!-- begin {tables} -->\n", f"<!-- end {tables} -->"
    written = PAGE.read_text(encoding="utf-8").split(begin)[1].split(end)[0]
    command = f"swiftfusion simulate --{tables} --markdown"
    assert written == printed, f"paste the output of `{command}` between the marks of {PAGE.name}"
