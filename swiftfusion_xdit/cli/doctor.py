"""`swiftfusion doctor`: what this machine offers, what is missing, and what mends it.

Every line is `ok`, `missing` with the command that mends it, or `unsuitable` with the reason. The
exit status is 0 if the CPU path works: without a GPU the lines about GPUs are missing and that is
no failure.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

from rich.console import Console
from rich.table import Table

from swiftfusion_xdit.cli.doctor_host import HOST_CHECKS
from swiftfusion_xdit.cli.findings import Check, Finding, Status

WIDTH = 120  # of a table that is written to a file or a pipe
COLOURS = {Status.OK: "green", Status.MISSING: "yellow", Status.UNSUITABLE: "red"}
# What must be ok for attention on CPU ranks under xDiT.
NEEDED = ("python", "torch", "xfuser", "shared memory", "attention on the CPU")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine: GPUs, links, libraries, kernels, the plugin itself",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check everything. 0: the CPU path works; 1: it does not."""
    findings = examine((*HOST_CHECKS, check_what_needs_torch))
    works = cpu_path_works(findings)
    if args.json:
        lines = [finding.as_dict() for finding in findings]
        print(json.dumps({"cpu_path_works": works, "findings": lines}, indent=1))
    else:
        show(findings, works=works)
    return 0 if works else 1


def check_what_needs_torch() -> list[Finding]:
    """The checks about GPUs; a torch that is missing or broken is a finding, too."""
    from swiftfusion_xdit.cli.doctor_cuda import CUDA_CHECKS

    return examine(CUDA_CHECKS)


def examine(checks: tuple[Check, ...]) -> list[Finding]:
    """Run every check; one that breaks becomes a finding itself."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            reason = f"the check failed: {type(error).__name__}: {error}"
            findings.append(Finding(name, Status.UNSUITABLE, reason))
    return findings


def cpu_path_works(findings: list[Finding]) -> bool:
    """Whether everything in NEEDED was checked and is ok."""
    good = {finding.name for finding in findings if finding.status is Status.OK}
    return good.issuperset(NEEDED)


def show(findings: list[Finding], *, works: bool) -> None:
    """Print the findings as a table, and what they come to."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(box=None, pad_edge=False)
    for heading in ("", "status", "what was found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        colour = COLOURS[finding.status]
        detail = finding.detail + (f"\n-> {finding.remedy}" if finding.remedy else "")
        # Brackets in what was found are no markup.
        cell = detail.replace("[", r"\[")
        table.add_row(finding.name, f"[{colour}]{finding.status.value}[/]", cell)
    console.print(table)
    counts = Counter(finding.status.value for finding in findings)
    console.print(", ".join(f"{counts[status.value]} {status.value}" for status in Status))
    verdict = "works" if works else "does not work: see the lines that are not ok"
    console.print(f"The CPU path {verdict}.", style="green" if works else "red")
