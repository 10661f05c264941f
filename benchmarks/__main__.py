"""Runs the cases and prints what came out: `make bench`, `make bench-quick`, `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from rich.console import Console

from benchmarks import idle, interference, pg_boss, pickup, report, rescue
from benchmarks.bench import SETTINGS, Bench, Result
from tests.server import throwaway_server

CASES: dict[str, Callable[[Bench], Result]] = {
    "retry_10k": lambda bench: rescue.retry(bench, 10_000),
    "retry_100k": lambda bench: rescue.retry(bench, 100_000),
    "pg_boss_10k": pg_boss.expire,
    "idle_history": idle.history,
    "idle_churn": idle.churn,
    "held_xmin": idle.held_xmin,
    "many_workers": idle.many_workers,
    "interference": interference.interference,
    "pickup": pickup.pickup,
    "kill_to_restart": pickup.kill_to_restart,
}

# Each statement within a function too, with its plan. It makes everything slower, so the figures mean nothing then.
PLANS = {
    "session_preload_libraries": "auto_explain",
    "auto_explain.log_min_duration": "1",
    "auto_explain.log_nested_statements": "on",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_buffers": "on",
}


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of {', '.join(CASES)}; without any: all")
    parser.add_argument("--quick", action="store_true", help="a tenth of the size, in a few minutes")
    parser.add_argument(
        "--plans", action="store_true", help="write the plans to .bench/plans.log; the figures mean nothing"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")

    console = Console()
    with throwaway_server(settings=SETTINGS | (PLANS if arguments.plans else {})) as server:
        bench = Bench(server, scale=0.1, rounds=3) if arguments.quick else Bench(server)
        results: dict[str, Result] = {}
        for name in arguments.cases or CASES:
            with console.status(name):
                results[name] = CASES[name](bench)
            console.print(report.table(name, results[name]))
        report.write(results, bench)
        if arguments.plans:
            report.write_plans(server)
    console.print(f"Written to {report.FOLDER.name}/. Times on a shared machine mean little; the ratios of a run do.")
    missed = [name for name, result in results.items() if not all(ratio.is_reached for ratio in result.ratios)]
    if missed:
        console.print(f"Missed in: {', '.join(missed)}")


if __name__ == "__main__":
    main()
