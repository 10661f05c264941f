"""Many stalled jobs back in the queue: by a sweep, by Procrastinate's documented task, and by a bare UPDATE."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import psycopg
from procrastinate import JobContext, PsycopgConnector
from psycopg import sql

from benchmarks.bench import Bench, Figure, Ratio, Result, settle
from benchmarks.documented_task import app, retry_stalled_jobs

STALL = """
TRUNCATE procrastinate_jobs, procrastinate_events, procrastinate_workers, procrastinate_periodic_defers;
TRUNCATE procrastinate_stalled.rescues, procrastinate_stalled.sweeps;
INSERT INTO procrastinate_workers (last_heartbeat)
    SELECT now() - interval '1 hour'
        FROM generate_series(1, 100);
INSERT INTO procrastinate_workers DEFAULT VALUES; -- without a living one nothing is put back
INSERT INTO procrastinate_jobs (queue_name, task_name, args, queueing_lock)
    SELECT 'default',
           'benchmark',
           jsonb_build_object('number', number),
           CASE WHEN {have_queueing_locks} THEN 'key ' || number END
        FROM generate_series(1, {jobs}) AS number;
UPDATE procrastinate_jobs
    SET status = 'doing', worker_id = (SELECT min(id) FROM procrastinate_workers) + id % 100;
"""

LONGEST_LOCK = """
SELECT extract(epoch FROM clock_timestamp() - xact_start)::double precision
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_xid IS NOT NULL
"""


@dataclass
class Measurement:
    """What it took to retry all jobs once."""

    seconds: float
    wal_bytes: int
    longest_lock: float
    """Seconds that the longest transaction which had locked a row had been running, seen every few milliseconds."""


async def documented_task(conninfo: str) -> None:
    """Do what a worker does when the task is due."""
    with app.replace_connector(PsycopgConnector(conninfo=conninfo)):
        async with app.open_async():
            await retry_stalled_jobs(cast("JobContext", None), timestamp=0)


def sweep(conninfo: str) -> None:
    """Do what pg_cron does."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("CALL procrastinate_stalled.sweep()")


def bare_update(conninfo: str) -> None:
    """Do the least that there is to do: no evidence, no ledger, no notification, and all rows locked to the end."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("UPDATE procrastinate_jobs SET status = 'todo' WHERE status = 'doing'")


def stall(conninfo: str, jobs: int, *, have_queueing_locks: bool = False) -> None:
    """Leave so many jobs in doing, of 100 dead workers, each with a queueing lock of its own if asked for."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(sql.SQL(STALL).format(jobs=jobs, have_queueing_locks=have_queueing_locks))
    settle(conninfo)


def all_are_back(conninfo: str, jobs: int) -> bool:
    """Tell whether each job is in todo again."""
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'").fetchone()
    return row == (jobs,)


def measure(
    conninfo: str, jobs: int, method: Callable[[str], object], *, have_queueing_locks: bool = False
) -> Measurement:
    """Let a method retry so many stalled jobs."""
    stall(conninfo, jobs, have_queueing_locks=have_queueing_locks)
    longest_lock = 0.0
    is_over = threading.Event()

    def watch(connection: psycopg.Connection[tuple[float]]) -> None:
        nonlocal longest_lock
        while not is_over.wait(0.005):
            for (age,) in connection.execute(LONGEST_LOCK):
                longest_lock = max(longest_lock, age)

    with psycopg.connect(conninfo, autocommit=True) as watching, psycopg.connect(conninfo, autocommit=True) as asking:
        watcher = threading.Thread(target=watch, args=(watching,))
        watcher.start()
        try:
            wal_before = wal_position(asking)
            begin = time.perf_counter()
            method(conninfo)
            seconds = time.perf_counter() - begin
            wal_bytes = wal_position(asking) - wal_before
        finally:
            is_over.set()
            watcher.join()
    if not all_are_back(conninfo, jobs):
        raise RuntimeError("not all jobs were retried")
    return Measurement(seconds, wal_bytes, longest_lock)


def wal_position(connection: psycopg.Connection[tuple[int]]) -> int:
    """Return how many bytes of WAL the server has written in its life."""
    (position,) = connection.execute("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint").fetchone() or (0,)
    return position


def retry(bench: Bench, jobs: int) -> Result:
    """Compare the three in turn."""
    jobs = bench.size(jobs)
    methods: dict[str, Callable[[str], object]] = {
        "the documented task": lambda conninfo: asyncio.run(documented_task(conninfo)),
        "a sweep": sweep,
        "the bare UPDATE": bare_update,
    }
    locked = "a sweep, each job with a queueing lock"
    measured: dict[str, list[Measurement]] = {name: [] for name in [*methods, locked]}
    with bench.database() as conninfo:
        for _ in range(bench.rounds):
            for name, method in methods.items():
                measured[name].append(measure(conninfo, jobs, method))
            measured[locked].append(measure(conninfo, jobs, sweep, have_queueing_locks=True))
    task, ours, bare, ours_locked = measured.values()
    return Result(
        ratios=[
            Ratio(
                "time of the documented task / time of a sweep",
                [other.seconds / our.seconds for other, our in zip(task, ours, strict=True)],
                bar=20,
                better="more",
            ),
            Ratio(
                "time of a sweep / time of the bare UPDATE",
                [our.seconds / other.seconds for our, other in zip(ours, bare, strict=True)],
                bar=1.5,
            ),
            Ratio(
                "WAL of a sweep / WAL of the bare UPDATE",
                [our.wal_bytes / other.wal_bytes for our, other in zip(ours, bare, strict=True)],
                bar=1.4,
            ),
            Ratio(
                "longest row lock of a sweep / 1 s",
                [our.longest_lock for our in ours],
                bar=1,
            ),
            Ratio(
                "time of a sweep over jobs with queueing locks / over jobs without",
                [one.seconds / other.seconds for one, other in zip(ours_locked, ours, strict=True)],
            ),
        ],
        figures=[
            figure
            for name, measurements in measured.items()
            for figure in [
                Figure(f"{name}: time", "s", [one.seconds for one in measurements]),
                Figure(f"{name}: WAL", "bytes/job", [one.wal_bytes / jobs for one in measurements]),
                Figure(f"{name}: longest row lock", "s", [one.longest_lock for one in measurements]),
            ]
        ],
    )
