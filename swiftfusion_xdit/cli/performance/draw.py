"""A section's chart."""

from __future__ import annotations

from pathlib import Path

from swiftfusion_xdit.cli.performance.section import Section

FEW = 2  # ways, whose groups of bars are narrow
COLOURS = ("#9a9a9a", "#e08e2b", "#2b7bba", "#3a9d5d", "#8a5fb0")


def draw(section: Section, path: Path) -> None:
    """Write a section's bars as a PNG, whiskers from quartile to quartile.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing results needs matplotlib: pip install 'swiftfusion-xdit[plots]'"
        ) from error
    groups = list(dict.fromkeys(bar.group for bar in section.bars))
    labels = list(dict.fromkeys(bar.label for bar in section.bars))
    inches = 1.6 if len(labels) > FEW else 0.8  # of a group of bars
    figure = Figure(figsize=(max(6.5, inches * len(groups)), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(labels)
    for number, label in enumerate(labels):
        bars = [bar for bar in section.bars if bar.label == label]
        places = [groups.index(bar.group) + (number + 0.5) * width - 0.4 for bar in bars]
        medians = [bar.median for bar in bars]
        below = [bar.median - bar.low for bar in bars]
        above = [bar.high - bar.median for bar in bars]
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(places, medians, width, yerr=(below, above), color=colour, label=label, capsize=2)
        for place, bar in zip(places, bars, strict=True):
            text = f"{bar.median:.2f}" if section.line else f"{bar.median:.0f}"
            axes.annotate(
                text, (place, bar.high), (0, 2), textcoords="offset points", ha="center", size=6
            )
    if section.line is not None:
        axes.axhline(section.line, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups, size=None if len(labels) > FEW else 5)
    axes.set_ylabel(section.unit)
    axes.set_title(section.title, size=9)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
