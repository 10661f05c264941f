"""How soon a rescued job starts: after the rescue, and after its worker was killed."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, LiteralString

import psycopg
from procrastinate import App, PsycopgConnector
from procrastinate.worker import FETCH_JOB_POLLING_INTERVAL

from benchmarks.bench import SETTINGS, Bench, Figure, Ratio, Result
from benchmarks.rescue import documented_task, sweep
from procrastinate_stalled import install
from tests.jobs import add_stalled_job, pretend_old_server
from tests.server import has_real_pg_cron, install_procrastinate, throwaway_server
from tests.tasks import open_app
from tests.wait import wait_until
from tests.worker import start_worker

# The app of the workers that `start_worker` runs.
app = App(connector=PsycopgConnector(conninfo=os.environ.get("DATABASE_URL", "")))


@app.task
async def note_start(path: str, seconds: float = 0) -> None:
    """Add the time to a file, and run for so long."""
    with Path(path).open("a") as file:
        file.write(f"{time.time()}\n")
    await asyncio.sleep(seconds)


TASK = "benchmarks.pickup.note_start"
# It tells when a rescue was committed, to the microsecond.
SERVER_SETTINGS = SETTINGS | {"track_commit_timestamp": "on"}

COMMITTED = """
SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin))::double precision
    FROM procrastinate_events
    WHERE job_id = %s AND type = 'deferred_for_retry'
"""
LAST_HEARTBEAT = """
SELECT extract(epoch FROM last_heartbeat)::double precision
    FROM procrastinate_stalled.rescues
    WHERE job_id = %s
"""
SWEEP_BEGAN = """
SELECT extract(epoch FROM max(started_at))::double precision
    FROM procrastinate_stalled.sweeps
    WHERE retried > 0
"""


def pickup(bench: Bench) -> Result:
    """Measure from the commit of a rescue to the start of the job in a worker that waits, at its default settings.

    The documented task wakes nobody, so its jobs wait for the worker's next poll: between none and all of the time from
    one poll to the next, depending on when they are retried. They are retried at times that are spread evenly over it.
    Only the worker that runs the documented task need not wait: if it runs one job at a time, it fetches right after.
    """
    polls = max(2, bench.size(8))
    ours: list[float] = []
    task: list[float] = []
    with ExitStack() as stack:
        server = stack.enter_context(throwaway_server(settings=SERVER_SETTINGS))
        conninfo = stack.enter_context(replace(bench, server=server).database())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        connection = stack.enter_context(psycopg.connect(conninfo, autocommit=True))
        worker = start_worker(conninfo, folder / "worker.log", app="benchmarks.pickup.app")
        stack.callback(worker.kill)

        def measure(rescue: Callable[[], None], pause: float) -> float:
            starts = folder / f"starts-{time.time_ns()}"
            with connection.transaction():
                job_id = add_stalled_job(connection, task_name=TASK, args={"path": str(starts)})
            time.sleep(pause)  # the commit has woken the worker, and its time to the next poll has begun anew
            rescue()
            [started] = _wait_for_starts(starts, 1)
            return started - _value(connection, COMMITTED, job_id)

        for _ in range(bench.rounds):
            ours.append(median(measure(lambda: sweep(conninfo), pause=0.1) for _ in range(20)))
            pauses = [FETCH_JOB_POLLING_INTERVAL * (number + 0.5) / polls for number in range(polls)]
            task.append(median(measure(lambda: asyncio.run(documented_task(conninfo)), pause) for pause in pauses))
    return Result(
        ratios=[
            Ratio(
                "time after the documented task / time after a sweep",
                [other / our for other, our in zip(task, ours, strict=True)],
                bar=40,
                better="more",
            )
        ],
        figures=[
            Figure("a sweep: from its commit to the start of the job", "ms", [seconds * 1000 for seconds in ours]),
            Figure("the documented task: the same", "ms", [seconds * 1000 for seconds in task]),
        ],
    )


# Seconds.
HEARTBEAT_INTERVAL = 10  # of a worker
HEARTBEAT_TIMEOUT = 300  # of the default rule
MINUTE = 60  # from one sweep to the next
SECONDS_SINCE_HEARTBEAT = 30  # of the documented task
TEN_MINUTES = 600  # from one run of the documented task to the next
LIVE_HEARTBEAT_TIMEOUT = 20  # of the rule in what is measured


@dataclass(frozen=True)
class Restart:
    """When what happened to a job whose worker was killed, in seconds of the clock."""

    killed: float
    last_heartbeat: float
    sweep_began: float
    committed: float
    started: float

    @property
    def due(self) -> float:
        """The full minute that pg_cron ran the sweep for."""
        return self.sweep_began // MINUTE * MINUTE


def kill_to_restart(bench: Bench) -> Result:
    """Measure from the SIGKILL of a worker to the start of its job in another one, and compute it for the defaults.

    Measured is all that follows the full minute. Before it there are only settings: when the worker was killed it had
    beaten half an interval ago in the middle, and the next run of a schedule is half its period away; at worst it had
    beaten just now, and the last run was just before. What the documented task takes from its full ten minutes on is
    left out: a worker that runs one job at a time fetches again right after it, so that is little.
    """
    if not has_real_pg_cron():
        raise RuntimeError("this server has no pg_cron")
    with throwaway_server(cron_database="cron", settings=SERVER_SETTINGS) as server:
        conninfo = server.conninfo("cron")
        install_procrastinate(conninfo)
        install(conninfo)
        with psycopg.connect(conninfo, autocommit=True) as connection:
            pretend_old_server(connection)
            connection.execute(
                "UPDATE procrastinate_stalled.rules SET heartbeat_timeout = make_interval(secs => %s)",
                [LIVE_HEARTBEAT_TIMEOUT],
            )
            connection.execute("SELECT procrastinate_stalled.schedule()")
            # Each takes about a minute, whatever the size.
            restarts = [_kill_a_worker(connection, conninfo) for _ in range(bench.rounds if bench.scale == 1 else 1)]

    after_minute = [restart.started - restart.due for restart in restarts]
    typical = [_typical(HEARTBEAT_TIMEOUT, MINUTE) + seconds for seconds in after_minute]
    at_worst = [HEARTBEAT_TIMEOUT + MINUTE + seconds for seconds in after_minute]
    short_rule = [_typical(SECONDS_SINCE_HEARTBEAT, MINUTE) + seconds for seconds in after_minute]
    task_typical = _typical(SECONDS_SINCE_HEARTBEAT, TEN_MINUTES)
    task_at_worst = SECONDS_SINCE_HEARTBEAT + TEN_MINUTES
    return Result(
        ratios=[
            Ratio("typical time, ours / the documented task's", [seconds / task_typical for seconds in typical]),
            Ratio("time at worst, ours / the documented task's", [seconds / task_at_worst for seconds in at_worst]),
            Ratio(
                f"typical time, ours with a rule of {SECONDS_SINCE_HEARTBEAT} s / the documented task's",
                [seconds / task_typical for seconds in short_rule],
            ),
        ],
        figures=[
            Figure("ours: typical (computed, but for what follows the minute)", "s", typical),
            Figure("ours: at worst (computed, but for what follows the minute)", "s", at_worst),
            Figure(
                f"ours with a rule of {SECONDS_SINCE_HEARTBEAT} s: typical (computed, but for what follows the minute)",
                "s",
                short_rule,
            ),
            Figure("the documented task: typical (computed)", "s", [task_typical]),
            Figure("the documented task: at worst (computed)", "s", [task_at_worst]),
            Figure(
                f"with a rule of {LIVE_HEARTBEAT_TIMEOUT} s: from SIGKILL to the start (measured)",
                "s",
                [restart.started - restart.killed for restart in restarts],
            ),
            Figure(
                "from the full minute to the begin of the sweep (measured)",
                "ms",
                [1000 * (restart.sweep_began - restart.due) for restart in restarts],
            ),
            Figure(
                "from there to the commit of the rescue (measured)",
                "ms",
                [1000 * (restart.committed - restart.sweep_began) for restart in restarts],
            ),
            Figure(
                "from there to the start of the job (measured)",
                "ms",
                [1000 * (restart.started - restart.committed) for restart in restarts],
            ),
        ],
    )


def _typical(silence: float, period: float) -> float:
    """Return when a killed worker is found that must have been silent for so long, by such a schedule."""
    return silence - HEARTBEAT_INTERVAL / 2 + period / 2


def _kill_a_worker(connection: psycopg.Connection[Any], conninfo: str) -> Restart:
    """Kill a worker while it runs a job, and wait until pg_cron has let another one start that job."""
    connection.execute("TRUNCATE procrastinate_workers, procrastinate_jobs CASCADE")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        first = start_worker(conninfo, folder / "first.log", app="benchmarks.pickup.app")
        stack.callback(first.kill)
        starts = folder / "starts"
        with open_app(conninfo) as deferring:
            job_id = deferring.configure_task(TASK).defer(path=str(starts), seconds=600)
        _wait_for_starts(starts, 1)
        second = start_worker(conninfo, folder / "second.log", app="benchmarks.pickup.app")
        stack.callback(second.kill)
        time.sleep(random.uniform(0, HEARTBEAT_INTERVAL))

        killed = time.time()
        first.kill()
        _, started = _wait_for_starts(starts, 2)

    restart = Restart(
        killed=killed,
        last_heartbeat=_value(connection, LAST_HEARTBEAT, job_id),
        sweep_began=_value(connection, SWEEP_BEGAN),
        committed=_value(connection, COMMITTED, job_id),
        started=started,
    )
    if restart.due - MINUTE > restart.last_heartbeat + LIVE_HEARTBEAT_TIMEOUT:
        raise RuntimeError("a sweep has left the job to the next one")
    return restart


def _wait_for_starts(file: Path, number: int) -> list[float]:
    """Wait until the job was started so many times, and return when."""
    wait_until(lambda: len(_lines(file)) == number, f"the job was started {number} times", seconds=120)
    return [float(line) for line in _lines(file)]


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _value(connection: psycopg.Connection[Any], query: LiteralString, *parameters: object) -> float:
    [(value,)] = connection.execute(query, parameters).fetchall()
    return float(value)
