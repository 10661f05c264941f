"""Puts the last full run into docs/speed.md: `make bench-page`.

It writes the two chapters of figures, and docs/speed/ with latest.json and the plots. The rest of the page is written
by hand, and is read again when the figures have changed.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from typing import Any

from benchmarks import report
from benchmarks.__main__ import CASES
from benchmarks.bench import Figure, Ratio
from tests.server import PROJECT

PAGE = PROJECT / "docs" / "speed.md"
FOLDER = PROJECT / "docs" / "speed"


def main() -> None:
    """Copy the run, and write its chapters."""
    if not report.LATEST.exists():
        sys.exit("There is no run: .bench/latest.json is missing. Run make bench, which takes half an hour.")
    run = json.loads(report.LATEST.read_text())
    if run["scale"] != 1 or list(run["cases"]) != list(CASES):
        sys.exit("The last run was not a full one. Nothing was written. Run make bench, without CASES.")
    FOLDER.mkdir(exist_ok=True)
    for name in [report.LATEST.name, *(f"{plot}.svg" for plot in run["plots"])]:
        shutil.copyfile(report.FOLDER / name, FOLDER / name)
    PAGE.write_text(with_figures(PAGE.read_text(), run))


def with_figures(page: str, run: dict[str, Any]) -> str:
    """Return the page with the chapters of this run."""
    for heading, content in [("The ratios", ratios(run)), ("All that was measured", figures(run))]:
        before, chapter, rest = re.split(rf"(?m)^(## {heading}\n)", page)
        after = re.search(r"(?m)^## ", rest)
        page = f"{before}{chapter}\n{content}\n\n{rest[after.start() :] if after else ''}"
    return page.rstrip("\n") + "\n"


def ratios(run: dict[str, Any]) -> str:
    """What was compared, and whether it is where it should be."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    lines = [
        f"On {run['date']}, {run['machine']}. {versions}. Medians of {run['rounds']} rounds.",
        "",
        "| case | what | median | least | most | should be | |",
        "|---|---|--:|--:|--:|---|---|",
    ]
    for name, case in run["cases"].items():
        for number, ratio in enumerate(case["ratios"]):
            measured = Ratio(ratio["unit"], ratio["rounds"], ratio["bar"], ratio["better"])
            target, _, verdict = report.bar(measured).partition(": ")
            lines.append(
                _row([f"`{name}`" if number == 0 else "", measured.name, *report.numbers(measured), target, verdict])
            )
    return "\n".join(lines)


def figures(run: dict[str, Any]) -> str:
    """What the ratios were made of."""
    lines = ["| case | what | unit | median | least | most |", "|---|---|---|--:|--:|--:|"]
    for name, case in run["cases"].items():
        for number, figure in enumerate(case["figures"]):
            measured = Figure(figure["name"], figure["unit"], figure["rounds"])
            lines.append(
                _row([f"`{name}`" if number == 0 else "", measured.name, measured.unit, *report.numbers(measured)])
            )
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
