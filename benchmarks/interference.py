"""What workers notice of sweeps: how many jobs they fetch and finish in a second, and how long that takes at worst.

The workers are clients of pgbench, which call what Procrastinate's workers call, as fast as they can. They serve a
queue of their own, in the table that the stalled jobs are in. Its jobs are older than the stalled ones. A fetch reads
the jobs in todo of all queues in the order of their ids, so it would have to read past all that came back before it
found one of its own, whoever brought them back.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import LiteralString

import psycopg
from procrastinate.sql import queries
from psycopg import sql

from benchmarks.bench import Bench, Curve, Figure, Plot, Ratio, Result, settle
from benchmarks.rescue import documented_task, sweep
from tests.server import postgresql_program

CLIENTS = 4
WARM_UP = 1.0  # seconds, in which pgbench connects and the server plans
WAITING = 10_000  # jobs in the queue of the clients, for each second that they work: more than they finish
DOING = 1_000  # jobs that living workers seem to run

# Workers 1 to 100 are alive, 101 to 200 are dead.
FILL = """
TRUNCATE procrastinate_jobs, procrastinate_events, procrastinate_workers, procrastinate_periodic_defers
    RESTART IDENTITY;
TRUNCATE procrastinate_stalled.rescues, procrastinate_stalled.sweeps;
INSERT INTO procrastinate_workers (last_heartbeat)
    SELECT now() - CASE WHEN number <= 100 THEN interval '0' ELSE interval '1 hour' END
        FROM generate_series(1, 200) AS number;
INSERT INTO procrastinate_jobs (queue_name, task_name)
    SELECT 'busy', 'benchmark'
        FROM generate_series(1, {waiting});
INSERT INTO procrastinate_jobs (queue_name, task_name)
    SELECT 'other', 'benchmark'
        FROM generate_series(1, {doing} + {stalled});
UPDATE procrastinate_jobs
    SET status = 'doing', worker_id = 1 + id % 100 + CASE WHEN id <= {waiting} + {doing} THEN 0 ELSE 100 END
    WHERE queue_name = 'other';
"""
REFILL = """
INSERT INTO procrastinate_jobs (queue_name, task_name)
    SELECT 'busy', 'benchmark'
        FROM generate_series(1, %s - (SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'));
"""

# What a rescue costs the workers if it takes nothing but a processor from them.
COMPUTE = """
DO $$
DECLARE
    enough CONSTANT timestamp with time zone := clock_timestamp() + make_interval(secs => {seconds});
BEGIN
    WHILE clock_timestamp() < enough LOOP
        NULL;
    END LOOP;
END;
$$
"""

SWEEPS = "SELECT count(*) FROM procrastinate_stalled.sweeps"
RETRIED = "SELECT count(*) FROM procrastinate_events WHERE type = 'deferred_for_retry'"

# A worker fetches a job and finishes it, each in a transaction of its own.
WORKER = "\n".join(
    [
        r"\set worker :client_id + 1",
        queries["fetch_job"].removesuffix(";") % {"queues": "'{busy}'", "worker_id": ":worker"} + r" \gset",
        queries["finish_job"] % {"job_id": ":id", "status": "'succeeded'", "delete_job": "false"},
    ]
)


@dataclass(frozen=True)
class Window:
    """What the clients did while something else went on."""

    begin: float
    end: float
    jobs: list[tuple[float, float]]
    """When each was finished, and the milliseconds that its fetch and finish took. Those before and after it too."""

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.end - self.begin

    @property
    def during(self) -> list[float]:
        """The milliseconds of the jobs within it."""
        return [latency for finished, latency in self.jobs if self.begin <= finished < self.end]

    @property
    def before(self) -> list[float]:
        """The milliseconds of the jobs before it."""
        return [latency for finished, latency in self.jobs if finished < self.begin]


@dataclass(frozen=True)
class Rescue(Window):
    """The same during a rescue."""

    retried: int
    """How many stalled jobs came back."""


def interference(bench: Bench) -> Result:
    """Compare times with sweeps and without, and the rescue of many jobs by a sweep and by the documented task."""
    turns = max(2, bench.size(6))  # in each round; each is twice without sweeps and twice with them
    seconds = bench.size(2)  # of each of the four
    margin = bench.size(5)  # seconds before a rescue, and after it
    waiting = WAITING * 4 * margin
    stalled = bench.size(100_000)
    computing: list[Window] = []
    without: list[list[Window]] = []
    sweeping: list[list[Window]] = []
    ours: list[Rescue] = []
    task: list[Rescue] = []
    with bench.database() as conninfo:
        methods: list[tuple[list[Rescue], Callable[[], None]]] = [
            (ours, lambda: sweep(conninfo)),
            (task, lambda: _run_task(conninfo, ours[-1].seconds)),
        ]
        for number in range(bench.rounds):
            _fill(conninfo, waiting, stalled=0)
            windows_without, windows_sweeping = _take_turns(conninfo, waiting, turns, seconds)
            without.append(windows_without)
            sweeping.append(windows_sweeping)
            for rescues, method in reversed(methods) if number % 2 else methods:
                _fill(conninfo, waiting, stalled)
                [window] = _under_load(conninfo, [method], margin)
                rescues.append(Rescue(window.begin, window.end, window.jobs, _count(conninfo, RETRIED)))
            _fill(conninfo, waiting, stalled=0)
            computing += _under_load(conninfo, [partial(_compute, conninfo, ours[-1].seconds)], margin)
    if any(rescue.retried != stalled for rescue in ours) or any(rescue.retried == 0 for rescue in task):
        raise RuntimeError("stalled jobs were not retried")

    speed = [_speed(windows) for windows in without]
    speed_sweeping = [_speed(windows) for windows in sweeping]
    return Result(
        ratios=[
            Ratio(
                "jobs/s with a sweep each second / without",
                [one / other for one, other in zip(speed_sweeping, speed, strict=True)],
                bar=0.97,
                better="more",
            ),
            Ratio(
                "p99 during the rescue by a sweep / before it",
                [_p99(window.during) / _p99(window.before) for window in ours],
                bar=3,
            ),
            Ratio(
                "p99 during the rescue by a sweep / by the documented task",
                [_p99(our.during) / _p99(other.during) for our, other in zip(ours, task, strict=True)],
                bar=1,
            ),
            Ratio(
                "p99 beside a session that only computes, for as long as the sweep / before it",
                [_p99(window.during) / _p99(window.before) for window in computing],
            ),
            Ratio(
                "p99 during the documented task / before it",
                [_p99(window.during) / _p99(window.before) for window in task],
            ),
        ],
        figures=[
            Figure("without sweeps: throughput", "jobs/s", speed),
            Figure("a sweep each second: throughput", "jobs/s", speed_sweeping),
            Figure("without sweeps: p99", "ms", [_p99(_latencies(windows)) for windows in without]),
            Figure("a sweep each second: p99", "ms", [_p99(_latencies(windows)) for windows in sweeping]),
            Figure("rescue by a sweep: p99 before it", "ms", [_p99(window.before) for window in ours]),
            Figure("rescue by a sweep: p99", "ms", [_p99(window.during) for window in ours]),
            Figure("rescue by a sweep: throughput", "jobs/s", [_speed([window]) for window in ours]),
            Figure("rescue by a sweep: time", "s", [window.seconds for window in ours]),
            Figure("documented task: p99 before it", "ms", [_p99(window.before) for window in task]),
            Figure("documented task: p99", "ms", [_p99(window.during) for window in task]),
            Figure("documented task: throughput", "jobs/s", [_speed([window]) for window in task]),
            Figure(
                "documented task: time (computed from its speed)",
                "s",
                [rescue.seconds * stalled / rescue.retried for rescue in task],
            ),
        ],
        plots=[
            Plot(
                name="interference",
                title=f"Fetch and finish while {stalled:,} stalled jobs are rescued",
                x="time since the rescue began (s)",
                y="p99 of each 0.1 s (ms)",
                curves=[
                    Curve("a sweep", _course(ours)),
                    Curve("the documented task, its beginning", _course(task)),
                ],
            )
        ],
    )


def _take_turns(conninfo: str, waiting: int, turns: int, seconds: int) -> tuple[list[Window], list[Window]]:
    """Let the clients work without sweeps and with one each second, again and again; return the windows of both."""
    without: list[Window] = []
    sweeping: list[Window] = []
    deeds: list[tuple[list[Window], Callable[[], None]]] = [
        (without, lambda: time.sleep(seconds)),
        (sweeping, lambda: _sweep_each_second(conninfo, seconds)),
    ]
    for turn in range(turns):
        _refill(conninfo, waiting)
        first, second = reversed(deeds) if turn % 2 else deeds
        order = [first, second, second, first]
        for (windows, _), window in zip(order, _under_load(conninfo, [deed for _, deed in order]), strict=True):
            windows.append(window)
    if _count(conninfo, SWEEPS) != 2 * turns * seconds:
        raise RuntimeError("not all sweeps took place")
    return without, sweeping


def _fill(conninfo: str, waiting: int, stalled: int) -> None:
    """Begin anew, with so many jobs in the queue of the clients, and so many stalled ones."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(sql.SQL(FILL).format(waiting=waiting, doing=DOING, stalled=stalled))
    settle(conninfo)
    _beat(conninfo)


def _refill(conninfo: str, waiting: int) -> None:
    """Let as many jobs wait as in the beginning."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(REFILL, [waiting])
    settle(conninfo)
    _beat(conninfo)


def _beat(conninfo: str) -> None:
    with psycopg.connect(conninfo) as connection:
        connection.execute("UPDATE procrastinate_workers SET last_heartbeat = now() WHERE id <= 100")


def _count(conninfo: str, query: LiteralString) -> int:
    with psycopg.connect(conninfo) as connection:
        (count,) = connection.execute(query).fetchone() or (0,)
    return int(count)


def _sweep_each_second(conninfo: str, seconds: int) -> None:
    """Sweep as pg_cron does, in a session of its own each time, so that everything is planned anew."""
    begin = time.monotonic()
    for second in range(1, seconds + 1):
        sweep(conninfo)
        time.sleep(max(0, begin + second - time.monotonic()))


def _run_task(conninfo: str, seconds: float) -> None:
    """Let the documented task run, for so long at most."""
    with contextlib.suppress(TimeoutError):
        asyncio.run(asyncio.wait_for(documented_task(conninfo), seconds))


def _compute(conninfo: str, seconds: float) -> None:
    """Keep a processor busy for so long, with a session that locks, reads and writes nothing."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(sql.SQL(COMPUTE).format(seconds=seconds))


def _under_load(conninfo: str, deeds: list[Callable[[], None]], margin: float = 0) -> list[Window]:
    """Do one thing after another while the clients work, who begin so many seconds earlier and go on for as many."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "worker.sql")
        script.write_text(WORKER)
        command = [str(postgresql_program("pgbench")), "--no-vacuum", f"--client={CLIENTS}", "--protocol=prepared"]
        command += [f"--file={script}", "--log", f"--log-prefix={folder}/log", "--time=86400", conninfo]
        pgbench = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            time.sleep(WARM_UP + margin)
            times = [time.time()]
            for deed in deeds:
                deed()
                times.append(time.time())
            time.sleep(margin)
            pgbench.send_signal(signal.SIGALRM)  # its own timer, so that it ends as if --time were over
            _, messages = pgbench.communicate()
        finally:
            pgbench.kill()
            pgbench.wait()
        if pgbench.returncode != 0:
            raise RuntimeError(f"pgbench failed, or ran out of jobs.\n{messages}")
        # Each line: client, transaction, microseconds, script, and when it ended: seconds, microseconds.
        lines = [line.split() for log in Path(folder).glob("log.*") for line in log.read_text().splitlines()]
    jobs = [(int(line[4]) + int(line[5]) / 1e6, int(line[2]) / 1e3) for line in lines]
    jobs = [(finished, latency) for finished, latency in jobs if finished >= times[0] - margin]
    return [Window(begin, end, jobs) for begin, end in pairwise(times)]


def _latencies(windows: list[Window]) -> list[float]:
    return [latency for window in windows for latency in window.during]


def _speed(windows: list[Window]) -> float:
    return len(_latencies(windows)) / sum(window.seconds for window in windows)


def _p99(latencies: list[float]) -> float:
    return quantiles(latencies, n=100, method="inclusive")[98]


def _course(windows: Sequence[Window]) -> list[tuple[float, float]]:
    """Return the p99 of each tenth of a second, of all rounds together."""
    tenths: dict[int, list[float]] = defaultdict(list)
    for window in windows:
        for finished, latency in window.jobs:
            tenths[math.floor((finished - window.begin) * 10)].append(latency)
    return [(tenth / 10, _p99(latencies)) for tenth, latencies in sorted(tenths.items()) if len(latencies) > 1]
