"""What a run leaves: tables on the screen, and .bench/ with latest.json, the plots and, if asked for, the plans."""

from __future__ import annotations

import json
import os
import platform
import statistics
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psycopg
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from benchmarks.bench import Bench, Figure, Plot, Ratio, Result
from tests.server import PROJECT, Server

FOLDER = PROJECT / ".bench"
LATEST = FOLDER / "latest.json"


def table(name: str, result: Result) -> Table:
    """Show a case."""
    table = Table("", "median", "least", "most", "bar", title=name, title_justify="left")
    for ratio in result.ratios:
        table.add_row(ratio.name, *numbers(ratio), bar(ratio))
    table.add_section()
    for figure in result.figures:
        table.add_row(f"{figure.name} ({figure.unit})", *numbers(figure), "")
    return table


def numbers(measured: Ratio | Figure) -> tuple[str, str, str]:
    """The median, the least and the most, with as many digits as mean something."""
    values = measured.rounds
    return show(statistics.median(values)), show(min(values)), show(max(values))


def show(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def bar(ratio: Ratio) -> str:
    """What it must reach, and whether it does."""
    if ratio.bar is None:
        return ""
    relation = "at least" if ratio.better == "more" else "at most"
    return f"{relation} {ratio.bar:g}: {'reached' if ratio.is_reached else 'MISSED'}"


def write(results: dict[str, Result], bench: Bench) -> None:
    """Write latest.json and the plots. Cases that were not run this time are not in it."""
    FOLDER.mkdir(exist_ok=True)
    plots = [plot for result in results.values() for plot in result.plots]
    for plot in plots:
        draw(plot, FOLDER / f"{plot.name}.svg")
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(bench.server),
        "scale": bench.scale,
        "rounds": bench.rounds,
        "plots": {plot.name: plot.title for plot in plots},
        "cases": {name: case(result) for name, result in results.items()},
    }
    LATEST.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def case(result: Result) -> dict[str, Any]:
    """A case as in latest.json: its first ratio, then all of them, then the figures."""
    ratios = [
        {
            "ratio": ratio.median,
            "unit": ratio.name,
            "bar": ratio.bar,
            "better": ratio.better,
            "reached": ratio.is_reached,
            "rounds": ratio.rounds,
        }
        for ratio in result.ratios
    ]
    figures = [{"name": figure.name, "unit": figure.unit, "rounds": figure.rounds} for figure in result.figures]
    return {**ratios[0], "ratios": ratios, "figures": figures}


def machine() -> str:
    """The machine, as far as it says what it is."""
    models = [
        line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}, {memory:.0f} GiB of memory"


def versions(server: Server) -> dict[str, str]:
    """What was measured with what."""
    with psycopg.connect(server.conninfo()) as connection:
        (postgresql,) = connection.execute("SHOW server_version").fetchone() or ("?",)
    return {
        "PostgreSQL": postgresql,
        "Procrastinate": metadata.version("procrastinate"),
        "psycopg": metadata.version("psycopg"),
        "Python": platform.python_version(),
        "Linux": platform.release(),
        **json.loads((PROJECT / "benchmarks" / "pg_boss" / "package.json").read_text())["dependencies"],
    }


def draw(plot: Plot, file: Path) -> None:
    """Draw a plot as SVG."""
    style = mpl.rc_context(
        {
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "procrastinate-stalled",  # the same plot is the same file
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
        }
    )
    with style:
        drawing = Drawing(figsize=(7, 3.6), layout="constrained")
        axes = drawing.add_subplot()
        for curve in plot.curves:
            marker = "o" if len(curve.points) < 20 else None
            axes.plot(*zip(*curve.points, strict=True), label=curve.name, marker=marker, markersize=4)
        if plot.logarithmic:
            axes.set_xscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylim(bottom=0)
        axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
        axes.legend()
        drawing.savefig(file, metadata={"Date": None, "Creator": None})


def write_plans(server: Server) -> None:
    """Keep the log of the server, which has the plans in it."""
    (FOLDER / "plans.log").write_bytes((server.folder / "log").read_bytes())
