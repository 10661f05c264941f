"""The benchmarks measure what they say, at a size at which the figures mean nothing."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from benchmarks import idle, page, report, rescue
from benchmarks.__main__ import CASES
from benchmarks.bench import Bench, Curve, Figure, Plot, Ratio, Result
from tests.server import Server

RESULT = Result(
    ratios=[
        Ratio("time of a / time of b", [0.9, 1.1, 4], bar=1.2),
        Ratio("WAL of b / WAL of a", [1, 2, 3], bar=3, better="more"),
    ],
    figures=[Figure("a: time", "ms", [1234.5, 5.678, 0.012345])],
    plots=[Plot("grows", "It grows", "jobs", "time (ms)", [Curve("a", [(1, 1), (10, 2)])], logarithmic=True)],
)


@pytest.mark.parametrize(
    ("case", "scale"),
    [
        (lambda bench: rescue.retry(bench, 10_000), 0.001),
        (idle.history, 0.001),
        (idle.churn, 0.001),
        (idle.held_xmin, 0.001),
        (idle.many_workers, 0.01),
    ],
    ids=["retry", "history", "churn", "held_xmin", "many_workers"],
)
def test_a_case_measures_each_round(case: Callable[[Bench], Result], scale: float, server: Server) -> None:
    result = case(Bench(server, scale=scale, rounds=1))

    rounds = {ratio.name: ratio.rounds for ratio in result.ratios}
    rounds |= {figure.name: figure.rounds for figure in result.figures}
    assert all(len(values) == 1 for values in rounds.values())
    # So few rows are not locked for long enough to be seen.
    assert {name for name, values in rounds.items() if values[0] <= 0 and "lock" not in name} == set()
    assert all(len(curve.points) > 2 for plot in result.plots for curve in plot.curves)


def test_the_table_says_which_bar_is_reached() -> None:
    console = Console(file=StringIO(), width=120)
    console.print(report.table("case", RESULT))
    assert isinstance(console.file, StringIO)

    lines = [line.split("│") for line in console.file.getvalue().splitlines()]
    cells = {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines if len(line) > 2}

    assert cells == {
        "time of a / time of b": ["1.1", "0.9", "4", "at most 1.2: reached"],
        "WAL of b / WAL of a": ["2", "1", "3", "at least 3: MISSED"],
        "a: time (ms)": ["5.68", "0.0123", "1,234", ""],
    }


def test_a_run_leaves_its_figures_and_plots(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "LATEST", tmp_path / "latest.json")

    report.write({"case": RESULT}, Bench(server, scale=0.1, rounds=3))

    run = json.loads((tmp_path / "latest.json").read_text())
    assert run["scale"] == 0.1
    assert run["versions"].keys() >= {"PostgreSQL", "Procrastinate", "pg-boss"}
    case = run["cases"]["case"]
    assert (case["ratio"], case["unit"], case["reached"]) == (1.1, "time of a / time of b", True)
    assert case["figures"] == [{"name": "a: time", "unit": "ms", "rounds": [1234.5, 5.678, 0.012345]}]
    assert ET.parse(tmp_path / "grows.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_figures_of_the_page_are_those_of_a_full_run() -> None:
    run = json.loads((page.FOLDER / "latest.json").read_text())

    assert run["scale"] == 1
    assert list(run["cases"]) == list(CASES)
    assert page.with_figures(page.PAGE.read_text(), run) == page.PAGE.read_text()
    assert {file.stem for file in page.FOLDER.glob("*.svg")} == set(run["plots"])
