"""Many jobs of a dead worker back in the queue: by a sweep, and by the supervision of pg-boss, a queue for Node.js."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from benchmarks.bench import Bench, Figure, Ratio, Result, settle
from benchmarks.rescue import all_are_back, bare_update, stall, sweep, wal_position
from tests.server import PROJECT, database_name

SOURCE = Path(__file__).with_suffix("")
# Besides pg-boss and what it needs, a Node.js that is new enough for it, 200 MB in all.
INSTALLED = PROJECT / ".bench" / "pg_boss"


@dataclass(frozen=True)
class Measurement:
    """What it took to return all jobs once."""

    seconds: float
    wal_bytes: int


def expire(bench: Bench) -> Result:
    """Compare the two, and the least that Procrastinate's triggers allow, in turn: on one server, in two databases."""
    jobs = bench.size(10_000)
    _install()
    with bench.database() as our_conninfo, bench.server.database() as conninfo:
        url = f"postgresql://{bench.server.user}@{bench.server.host}:{bench.server.port}/{database_name(conninfo)}"
        with _pg_boss(url, jobs) as ask:
            methods = {
                "pg-boss": lambda: _measure_pg_boss(conninfo, jobs, ask),
                "a sweep": lambda: _measure(our_conninfo, jobs, sweep),
                "the bare UPDATE": lambda: _measure(our_conninfo, jobs, bare_update),
            }
            measured: dict[str, list[Measurement]] = {name: [] for name in methods}
            # The first round warms all up. In it pg-boss also does what it does once a day.
            for number in range(bench.rounds + 1):
                for name in [*methods, *methods][number % 3 : number % 3 + 3]:
                    measurement = methods[name]()
                    if number > 0:
                        measured[name].append(measurement)
    theirs, ours, bare = measured.values()
    return Result(
        ratios=[
            Ratio(
                "time per job of pg-boss / time per job of a sweep",
                [their.seconds / our.seconds for their, our in zip(theirs, ours, strict=True)],
                bar=1,
                better="more",
            ),
            Ratio(
                "time per job of pg-boss / time per job of the bare UPDATE",
                [their.seconds / least.seconds for their, least in zip(theirs, bare, strict=True)],
            ),
            Ratio(
                "WAL of a sweep / WAL of pg-boss",
                [our.wal_bytes / their.wal_bytes for our, their in zip(ours, theirs, strict=True)],
            ),
        ],
        figures=[
            figure
            for name, measurements in measured.items()
            for figure in [
                Figure(f"{name}: time", "µs/job", [one.seconds / jobs * 1e6 for one in measurements]),
                Figure(f"{name}: WAL", "bytes/job", [one.wal_bytes / jobs for one in measurements]),
            ]
        ],
    )


def _measure(conninfo: str, jobs: int, method: Callable[[str], None]) -> Measurement:
    """Return the cost of a method in Procrastinate's tables, with its new connection."""
    stall(conninfo, jobs)

    def seconds() -> float:
        begin = time.perf_counter()
        method(conninfo)
        return time.perf_counter() - begin

    measurement = _with_wal(conninfo, seconds)
    if not all_are_back(conninfo, jobs):
        raise RuntimeError("not all jobs were returned")
    return measurement


def _measure_pg_boss(conninfo: str, jobs: int, ask: Callable[[str], float]) -> Measurement:
    """Return the cost of what pg-boss does each minute, with the connections that it has."""
    ask("stall")
    settle(conninfo)
    measurement = _with_wal(conninfo, lambda: ask("supervise"))
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("SELECT count(*) FROM pgboss.job WHERE state = 'retry'").fetchone()
    if row != (jobs,):
        raise RuntimeError("pg-boss did not return all jobs")
    return measurement


def _with_wal(conninfo: str, seconds: Callable[[], float]) -> Measurement:
    """Add to the seconds that something tells of itself how much it wrote."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        before = wal_position(connection)
        return Measurement(seconds(), wal_position(connection) - before)


def _install() -> None:
    """Let npm install what is missing. It is done at once when all is there, and goes nowhere then."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            "There is no npm on the PATH. The case pg_boss_10k installs pg-boss with it. "
            "Install npm (Debian 12: apt-get install npm), or name the cases to run without this one."
        )
    shutil.copytree(SOURCE, INSTALLED, dirs_exist_ok=True)
    options = ["--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run([npm, "install", *options], cwd=INSTALLED, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def _pg_boss(url: str, jobs: int) -> Iterator[Callable[[str], float]]:
    """Run the script; yields a function that lets it do `stall` or `supervise`, and returns the seconds this took."""
    script: list[str | Path] = [INSTALLED / "node_modules" / ".bin" / "node", INSTALLED / "expire.js", url, str(jobs)]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        commands, answers = process.stdin, process.stdout
        assert commands is not None
        assert answers is not None

        def ask(command: str) -> float:
            print(command, file=commands, flush=True)
            answer = answers.readline()
            if not answer:
                raise RuntimeError(f"pg-boss ended at {command}; its message is above")
            return float(answer)

        yield ask
