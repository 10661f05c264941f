"""Retries many stalled jobs by Procrastinate's documented task and by a sweep, in turn, and prints the ratio.

Times on a shared machine mean little; the ratios of neighbouring runs do.
"""

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import cast

import psycopg
from procrastinate import JobContext, PsycopgConnector
from psycopg import sql
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.documented_task import app, retry_stalled_jobs
from procrastinate_stalled import install
from tests.jobs import pretend_old_server
from tests.server import DURABLE, install_procrastinate, throwaway_server

JOBS = 10_000
ROUNDS = 3

STALL = """
TRUNCATE procrastinate_jobs, procrastinate_events, procrastinate_workers, procrastinate_periodic_defers;
TRUNCATE procrastinate_stalled.rescues;
INSERT INTO procrastinate_workers (last_heartbeat)
    SELECT now() - interval '1 hour'
        FROM generate_series(1, 100);
INSERT INTO procrastinate_workers DEFAULT VALUES; -- without a living one nothing is put back
INSERT INTO procrastinate_jobs (queue_name, task_name, args)
    SELECT 'default', 'benchmark', jsonb_build_object('number', number)
        FROM generate_series(1, {jobs}) AS number;
UPDATE procrastinate_jobs
    SET status = 'doing', worker_id = (SELECT min(id) FROM procrastinate_workers) + id % 100;
"""


async def documented_task(conninfo: str) -> None:
    """Do what a worker does when the task is due."""
    with app.replace_connector(PsycopgConnector(conninfo=conninfo)):
        async with app.open_async():
            await retry_stalled_jobs(cast("JobContext", None), timestamp=0)


def sweep(conninfo: str) -> None:
    """Do what pg_cron does."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("CALL procrastinate_stalled.sweep()")


def stall(conninfo: str) -> None:
    """Leave 10,000 jobs in doing, of 100 dead workers."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(sql.SQL(STALL).format(jobs=JOBS))
        connection.execute("VACUUM ANALYZE")


def all_are_back(conninfo: str) -> bool:
    """Tell whether each job is in todo again."""
    with psycopg.connect(conninfo) as connection:
        jobs = connection.execute("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'").fetchone()
    return jobs == (JOBS,)


def measure() -> list[tuple[float, float]]:
    """Return the seconds of the documented task and of the sweep, for each round."""
    with throwaway_server(settings=DURABLE) as server:
        conninfo = server.create_database("benchmark")
        install_procrastinate(conninfo)
        install(conninfo)
        with psycopg.connect(conninfo) as connection:
            pretend_old_server(connection)
        methods: list[Callable[[], object]] = [
            lambda: asyncio.run(documented_task(conninfo)),
            lambda: sweep(conninfo),
        ]
        rounds = []
        for _ in track(range(ROUNDS), f"{JOBS} stalled jobs, {ROUNDS} times by each", transient=True):
            seconds = []
            for retry in methods:
                stall(conninfo)
                begin = time.perf_counter()
                retry()
                seconds.append(time.perf_counter() - begin)
                if not all_are_back(conninfo):
                    raise RuntimeError("not all jobs were retried")
            rounds.append((seconds[0], seconds[1]))
    return rounds


def main() -> None:
    """Print the rounds and the median ratio."""
    rounds = measure()
    table = Table("round", "documented task", "sweep", "ratio", title=f"{JOBS} stalled jobs back to todo")
    for number, (task, ours) in enumerate(rounds, 1):
        table.add_row(str(number), f"{task:.2f} s", f"{ours:.2f} s", f"{task / ours:.1f}")
    console = Console()
    console.print(table)
    console.print(f"The sweep is {statistics.median(task / ours for task, ours in rounds):.1f} times faster (median).")


if __name__ == "__main__":
    main()
