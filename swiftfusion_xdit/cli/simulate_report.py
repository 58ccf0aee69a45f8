"""The tables of `swiftfusion simulate`, for a terminal and for docs/simulator.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

from rich.table import Table as RichTable

from swiftfusion_xdit.simulate import paper
from swiftfusion_xdit.simulate.hardware import BYTES_PER_US, Cluster
from swiftfusion_xdit.simulate.measured import compare
from swiftfusion_xdit.simulate.models import Model
from swiftfusion_xdit.simulate.paper import COLUMNS, Prediction, best_swiftfusion, best_usp
from swiftfusion_xdit.simulate.search import Candidate, our_strategies, rank_strategies
from swiftfusion_xdit.simulate.step import Strategy
from swiftfusion_xdit.simulate.transport import CONSTANTS, Constants

ERROR_COLUMNS = ("mean error", "worst", "worst one-sided")
Machines = Callable[[int], Cluster]
HEADINGS = {"tas": "TAS", "torus_nccl": "Torus, NCCL", "one_sided": "Torus, one-sided"}


@dataclass(frozen=True)
class Table:
    """Rows of text under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", _line(self.columns), _line(["---"] * len(self.columns))]
        return "\n".join([*lines, *map(_line, self.rows), ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def step_table(model: Model, cluster: Cluster, sequence: int, found: Sequence[Candidate]) -> Table:
    """Step times side by side; the first one is the baseline."""
    rows = []
    for candidate in found:
        step, layer = candidate.step, candidate.step.layer
        rows.append(
            [
                str(candidate.strategy),
                candidate.strategy.across.name,
                f"{step.total_us / 1e3:.1f}",
                f"{found[0].total_us / step.total_us:.2f}",
                f"{step.rest_us / 1e3:.1f}",
                f"{layer.total_us / 1e3:.3f}",
                f"{layer.floor_us / 1e3:.3f}",
                f"{layer.exposed_us / 1e3:.3f}",
                f"{layer.bytes_across / 1e6:.1f}",
            ]
        )
    machines = f"{cluster.num_machines} x {cluster.gpus_per_machine} {cluster.gpu.name}"
    return Table(
        f"{model.name}, {sequence} rows of attention, {model.num_layers} layers on {cluster.name} "
        f"({machines}); milliseconds, MB a GPU and layer",
        (
            "schedule and mesh", "transport", "step", "speedup", "rest of the model",
            "attention layer", "floor", "exposed", "MB across",
        ),
        rows,
    )  # fmt: skip


def paper_tables(machines: Machines, constants: Constants = CONSTANTS) -> list[Table]:
    """Everything that is predicted of the paper."""
    prediction = paper.predict(machines, constants=constants)
    return [
        _constants(machines, constants),
        _assumptions(machines, constants),
        _speedups(prediction),
        _orderings(prediction),
        _two_machines(paper.two_machines(machines, constants=constants)),
        *_best_degrees(machines, constants),
    ]


def _constants(machines: Machines, chosen: Constants) -> Table:
    """The free constants, and how the errors move when one of them does."""
    rows = []
    for field in dataclasses.fields(Constants):
        value = getattr(chosen, field.name)
        for factor in (0.8, 1.0, 1.25):
            moved = dataclasses.replace(chosen, **{field.name: min(1.0, value * factor)})
            used = " (used)" if factor == 1 else ""
            prediction = paper.predict(machines, constants=moved)
            label = f"{getattr(moved, field.name):.3g}{used}"
            rows.append([field.name, label, *_error_cells(prediction)])
    columns = ("constant", "value", *ERROR_COLUMNS)
    return Table("Free constants, one moved at a time", columns, rows)


def _assumptions(machines: Machines, constants: Constants) -> Table:
    """What the errors owe to numbers that are fixed, but known roughly."""

    def faster(factor: float) -> Machines:
        def changed(num_machines: int) -> Cluster:
            cluster = machines(num_machines)
            rates = tuple((dim, factor * rate) for dim, rate in cluster.gpu.attention_tflops)
            gpu = dataclasses.replace(cluster.gpu, attention_tflops=rates)
            return dataclasses.replace(cluster, gpu=gpu)

        return changed

    def eager(factor: float) -> list[paper.Workload]:
        return [
            dataclasses.replace(row, model=row.model.with_eager_passes(factor))
            for row in paper.TABLE
        ]

    def holding(units: int) -> Callable[[Strategy], Strategy]:
        def changed(strategy: Strategy) -> Strategy:
            inside, across = (
                dataclasses.replace(t, held_units=units if t.two_sided else 0)
                for t in (strategy.inside, strategy.across)
            )
            return dataclasses.replace(strategy, inside=inside, across=across)

        return changed

    predict = partial(paper.predict, constants=constants)
    changes: dict[str, Prediction] = {}
    for factor in (0.9, 1.2):
        changes[f"attention rate x {factor}"] = predict(faster(factor))
    for factor in (0.5, 2):
        table = eager(factor)
        changes[f"the model's other traffic x {factor}"] = predict(machines, table=table)
    for units in (0, 8, 32):
        held = predict(machines, adjust=holding(units))
        changes[f"units that NCCL holds: {units} of 108"] = held
    rows = [[name, *_error_cells(prediction)] for name, prediction in changes.items()]
    return Table("Fixed numbers, changed", ("number", *ERROR_COLUMNS), rows)


def _error_cells(prediction: Prediction) -> list[str]:
    worst, worst_one_sided = prediction.worst(), prediction.worst(["one_sided"])
    return [f"{prediction.mean_error:.1%}", f"{worst:.0%}", f"{worst_one_sided:.0%}"]


def _speedups(prediction: Prediction) -> Table:
    rows = []
    for row in prediction.rows:
        cells = [row.workload.name, str(row.workload.num_machines)]
        for column, measured in zip(COLUMNS, row.workload.measured, strict=True):
            cells += [f"{measured:.2f}", f"{row.speedup(column):.2f}", f"{row.error(column):+.0%}"]
        rows.append(cells)
    for name, pick in (("mean error", mean), ("worst error", max)):
        cells = [name, ""]
        for column in COLUMNS:
            cells += ["", "", f"{pick(list(map(abs, prediction.errors([column])))):.0%}"]
        rows.append(cells)
    columns = ["workload", "machines"]
    for column in COLUMNS:
        columns += [f"{HEADINGS[column]}: paper", "simulated", "error"]
    title = (
        f"Speedup over USP of a step, the paper's table; mean absolute error over "
        f"{len(prediction.errors())} numbers {prediction.mean_error:.1%}, "
        f"worst {prediction.worst():.0%}"
    )
    return Table(title, columns, rows)


def _orderings(prediction: Prediction) -> Table:
    rows = []
    held = total = 0
    for row in prediction.rows:
        orderings = row.orderings()
        total += len(orderings)
        held += sum(holds for _, holds in orderings)
        broken = ", ".join(order for order, holds in orderings if not holds)
        kept = ", ".join(order for order, holds in orderings if holds)
        rows.append([f"{row.workload.name} x {row.workload.num_machines}", kept, broken])
    title = (
        f"Which column beats which by more than {paper.TIE} in the paper: {held} of {total} hold"
    )
    return Table(title, ("workload x machines", "holds", "does not"), rows)


def _two_machines(prediction: Prediction) -> Table:
    rows = [
        [row.workload.name, *(f"{row.speedup(column):.3f}" for column in COLUMNS)]
        for row in prediction.rows
    ]
    columns = ("workload", *(HEADINGS[column] for column in COLUMNS))
    return Table("Two machines: speedup over USP; TAS loses", columns, rows)


def _best_degrees(machines: Machines, constants: Constants) -> list[Table]:
    """The paper's comparison at best degrees, and our search on the same workloads."""
    against_usp, against_paper = [], []
    speedups, gains = [], []
    for workload in paper.TABLE:
        model, cluster = workload.model, machines(workload.num_machines)
        usp = best_usp(workload, cluster, constants)
        swift = best_swiftfusion(workload, cluster, constants)
        rule = paper.strategies(model, cluster, constants)["one_sided"]
        [at_rule] = rank_strategies(model, cluster, workload.sequence, [rule])
        candidates = our_strategies(model, cluster, constants)
        ours = rank_strategies(model, cluster, workload.sequence, candidates)[0]
        speedups.append(usp.total_us / swift.total_us)
        gains.append(at_rule.total_us / ours.total_us)
        name = f"{workload.name} x {workload.num_machines}"
        against_usp.append([name, *_named(usp), *_named(swift), f"{speedups[-1]:.2f}"])
        cells = [name, f"{at_rule.total_us / 1e3:.0f}", *_named(ours), f"{gains[-1]:.3f}"]
        cells += [f"{usp.total_us / ours.total_us:.2f}", *_layer_bounds(ours, cluster)]
        against_paper.append(cells)
    return [
        Table(
            f"Best degrees against best degrees: mean {mean(speedups):.2f}, "
            f"max {max(speedups):.2f} (paper {paper.PAPER_MEAN}, {paper.PAPER_MAX})",
            ("workload", "USP", "ms", "the paper's SwiftFusion", "ms", "speedup"),
            against_usp,
        ),
        Table(
            "Our schedules against the paper's SwiftFusion at its gcd rule: "
            f"mean {mean(gains):.3f}",
            (
                "workload", "the paper's, ms", "ours", "ms", "speedup", "over best USP",
                "layer, ms", "its attention", "its bytes across",
            ),
            against_paper,
        ),
    ]  # fmt: skip


def _layer_bounds(candidate: Candidate, cluster: Cluster) -> tuple[str, str, str]:
    """Milliseconds of a layer, and the two times that none can be below."""
    layer, across = candidate.step.layer, candidate.strategy.across.across
    assert cluster.across is not None
    share = cluster.across.gb_per_s * BYTES_PER_US * across.fraction / cluster.gpus_per_machine
    wire_us = layer.bytes_across / share
    return f"{layer.total_us / 1e3:.2f}", f"{layer.floor_us / 1e3:.2f}", f"{wire_us / 1e3:.2f}"


def _named(candidate: Candidate) -> tuple[str, str]:
    return str(candidate.strategy), f"{candidate.total_us / 1e3:.0f}"


def measured_tables(cluster: Cluster) -> list[Table]:
    """What two H200 measured, and the simulator of the same."""
    rows = []
    errors = []
    for row in compare(cluster):
        note = "bound by the host" if row.host_bound else ""
        if not row.host_bound:
            errors.append(abs(row.error))
        simulated = f"{row.simulated:.3f}"
        rows.append(
            [row.shape, row.what, f"{row.measured:.3f}", simulated, f"{row.error:+.1%}", note]
        )
    title = (
        f"Layer time over the floor on two H200, ours on two H100: worst error {max(errors):.1%}, "
        "where the host does not bound"
    )
    return [Table(title, ("shape", "layer", "measured", "simulated", "error", ""), rows)]
