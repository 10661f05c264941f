"""Sweeps with nothing to do: a long history, a churn, a held snapshot, and many workers, jobs and rules."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import psycopg
from procrastinate.sql import queries
from psycopg import sql

from benchmarks.bench import Bench, Curve, Figure, Plot, Ratio, Result, settle
from tests.jobs import Connection
from tests.server import database_name

# Ours and the stock query ask for the same silence: that of the rule "default".
STOCK_QUERY = queries["select_stalled_jobs_by_heartbeat"]
STOCK_ARGUMENTS = {"queue": None, "task_name": None, "seconds_since_heartbeat": 300}

# Procrastinate's triggers and foreign keys are off, so the events are written here. The jobs in doing are spread over
# the newest ids and over all workers; with workers that are silent, these have their share.
FILL = """
SET session_replication_role = replica;
INSERT INTO procrastinate_workers (last_heartbeat)
    SELECT CASE WHEN number <= {silent} THEN now() - interval '1 hour' ELSE now() END
        FROM generate_series(1, {silent} + {living}) AS number;
INSERT INTO procrastinate_jobs (queue_name, task_name, args, status, attempts, worker_id)
    SELECT 'default',
           'benchmark',
           jsonb_build_object('number', number),
           CASE WHEN is_doing THEN 'doing' ELSE 'succeeded' END::procrastinate_job_status,
           CASE WHEN is_doing THEN 0 ELSE 1 END,
           1 + number / {spread} * ({silent} + {living}) / {doing} % ({silent} + {living})
        FROM generate_series(1::bigint, {finished} + {doing}) AS number
        CROSS JOIN LATERAL (
            SELECT number % {spread} = 0 AND number > {finished} + {doing} - {spread} * {doing} AS is_doing
        ) AS job;
INSERT INTO procrastinate_events (job_id, type)
    SELECT id, type
        FROM procrastinate_jobs
        CROSS JOIN unnest('{{deferred, started, succeeded}}'::procrastinate_job_event_type[]) AS type
        WHERE type <> 'succeeded' OR status = 'succeeded';
RESET session_replication_role;
"""

# As pg_cron leaves it, and workers that beat every 10 seconds.
LIVE_ON = """
TRUNCATE procrastinate_stalled.sweeps;
INSERT INTO procrastinate_stalled.sweeps (started_at, duration, latest_heartbeat, newest_worker_id)
    SELECT started_at, interval '10 milliseconds', started_at, (SELECT max(id) FROM procrastinate_workers)
        FROM generate_series(now() - interval '7 days' + interval '1 hour', now(), interval '1 minute') AS started_at;
UPDATE procrastinate_workers
    SET last_heartbeat = now()
    WHERE last_heartbeat > now() - interval '50 minutes';
"""

BUSY_SWEEPS = """
SELECT count(*)
    FROM procrastinate_stalled.sweeps
    WHERE id > %s
        AND (doing <> %s OR retried + failed + aborted + waiting + held > 0 OR error IS NOT NULL OR duration IS NULL)
"""

FETCH = """
UPDATE procrastinate_jobs
    SET status = 'doing', worker_id = 1 + mod(id, (SELECT count(*) FROM procrastinate_workers))
    WHERE id BETWEEN %s AND %s
"""

FINISH = """
UPDATE procrastinate_jobs
    SET status = 'succeeded', attempts = attempts + 1
    WHERE id BETWEEN %s AND %s
"""

CLEAR = """
TRUNCATE procrastinate_jobs, procrastinate_events, procrastinate_workers, procrastinate_periodic_defers
    RESTART IDENTITY;
TRUNCATE procrastinate_stalled.rescues;
DELETE FROM procrastinate_stalled.rules WHERE name <> 'default';
"""

# The silence of the silent workers is longer than any rule's timeout but that of the last, the only one that matches.
# So nothing can be told of their jobs before all rules were tried.
ADD_RULES = """
UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '2 hours';
INSERT INTO procrastinate_stalled.rules (name, queue_name, task_name, args)
    SELECT 'rule ' || number,
           CASE number % 3 WHEN 0 THEN 'queue ' || number END,
           CASE number % 3 WHEN 1 THEN 'task ' || number || '.%' END,
           CASE number % 3 WHEN 2 THEN jsonb_build_object('customer', number) END
        FROM generate_series(1, {rules} - 1) AS number;
"""


def history(bench: Bench) -> Result:
    """Let the finished jobs become more and more."""
    doing = bench.size(1_000)
    sizes = [bench.size(10_000), bench.size(1_000_000), bench.size(10_000_000)]
    sweep_at = {size: f"a sweep, {size:,} finished jobs" for size in sizes}
    query_at = {size: f"the stock query, {size:,} finished jobs" for size in sizes}
    measured: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        conninfos = {size: stack.enter_context(bench.database()) for size in sizes}
        connections = {}
        for size, conninfo in conninfos.items():
            fill(conninfo, finished=size, doing=doing, living=bench.size(100))
            settle(conninfo)
            connections[size] = stack.enter_context(psycopg.connect(conninfo, autocommit=True))
        measures: dict[str, Callable[[], float]] = {}
        for size, connection in connections.items():
            measures[sweep_at[size]] = partial(sweep, connection)
            measures[query_at[size]] = partial(stock_query, connection)
        on_disk = "a sweep until all that it wrote is on disk"
        measures[on_disk] = partial(sweep_to_disk, connections[sizes[-1]])
        measures["a commit alone, on disk"] = partial(commit, connections[sizes[-1]])
        first_measures: dict[str, Callable[[], float]] = {}
        for size, conninfo in conninfos.items():
            first_measures[f"{sweep_at[size]}, first in a connection"] = partial(in_new_connection, conninfo, sweep)
            first_measures[f"{query_at[size]}, first in a connection"] = partial(
                in_new_connection, conninfo, stock_query
            )
        for _ in range(bench.rounds):
            with ExitStack() as idle:
                for conninfo in conninfos.values():
                    idle.enter_context(nothing_to_do(conninfo, doing))
                in_turn(measures, 12)  # by then each has the plan that it keeps
                for name, time_taken in (in_turn(measures, 40) | in_turn(first_measures, 5)).items():
                    measured[name].append(time_taken)
    smallest, *_, largest = sizes
    return Result(
        ratios=[
            Ratio(
                f"time of a sweep with {largest:,} finished jobs / with {smallest:,}",
                divide(measured[sweep_at[largest]], measured[sweep_at[smallest]]),
                bar=1.2,
            ),
            Ratio(
                f"time of a sweep / time of the stock query, {largest:,} finished jobs",
                divide(measured[sweep_at[largest]], measured[query_at[largest]]),
                bar=5,
            ),
            Ratio(
                f"time of {on_disk} / time of the stock query, {largest:,} finished jobs",
                divide(measured[on_disk], measured[query_at[largest]]),
            ),
        ],
        figures=figures(measured),
        plots=[
            Plot(
                "idle_history",
                "A sweep with nothing to do, as the history grows",
                "finished jobs",
                "time (ms)",
                [
                    Curve("a sweep", [(size, statistics.median(measured[sweep_at[size]])) for size in sizes]),
                    Curve("the stock query", [(size, statistics.median(measured[query_at[size]])) for size in sizes]),
                ],
                logarithmic=True,
            )
        ],
    )


def churn(bench: Bench) -> Result:
    """Let many jobs pass through doing since the last vacuum. A first call finds other indexes than the later ones."""
    doing = bench.size(1_000)
    methods: dict[str, Callable[[Connection], float]] = {"a sweep": sweep, "the stock query": stock_query}
    measured: dict[str, list[float]] = defaultdict(list)
    with bench.database() as conninfo:
        prepare_churn(conninfo, bench)
        pass_through_doing(conninfo)
        for number in range(bench.rounds):
            for name in list(methods)[:: -1 if number % 2 else 1]:
                # What the one leaves in the indexes would help the other.
                with bench.server.database(template=database_name(conninfo)) as copy, nothing_to_do(copy, doing):
                    with psycopg.connect(copy, autocommit=True) as connection:
                        first, *later = [methods[name](connection) for _ in range(21)]
                    measured[f"{name}, first call"].append(first)
                    measured[f"{name}, later calls"].append(statistics.median(later))
    return Result(
        ratios=[
            Ratio(
                "time of the stock query / time of a sweep, later calls",
                divide(measured["the stock query, later calls"], measured["a sweep, later calls"]),
                bar=20,
                better="more",
            ),
            Ratio(
                "time of the stock query / time of a sweep, first call",
                divide(measured["the stock query, first call"], measured["a sweep, first call"]),
                better="more",
            ),
        ],
        figures=figures(measured),
    )


def held_xmin(bench: Bench) -> Result:
    """Let a session hold a snapshot from before the churn, so that nothing that it left can be removed."""
    doing = bench.size(1_000)
    measured: dict[str, list[float]] = defaultdict(list)
    with bench.database() as conninfo:
        prepare_churn(conninfo, bench)
        with psycopg.connect(conninfo) as holding, psycopg.connect(conninfo, autocommit=True) as connection:
            holding.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            holding.execute("SELECT 1")
            pass_through_doing(conninfo)
            measures = {"a sweep": partial(sweep, connection), "the stock query": partial(stock_query, connection)}
            for _ in range(bench.rounds):
                with nothing_to_do(conninfo, doing):
                    in_turn(measures, 2)
                    for name, time_taken in in_turn(measures, 10).items():
                        measured[name].append(time_taken)
    return Result(
        ratios=[
            Ratio(
                "time of a sweep / time of the stock query",
                divide(measured["a sweep"], measured["the stock query"]),
                bar=1,
            ),
        ],
        figures=figures(measured),
    )


def many_workers(bench: Bench) -> Result:
    """Let one thing after the other become more, up to 10,000 workers, a tenth of them silent, and 100 rules."""
    most = {"doing": bench.size(10_000), "living": bench.size(9_000), "silent": bench.size(1_000), "rules": 100}
    parts = (0.125, 0.25, 0.5)
    both, all_alike = "doing and silent", "all"
    series = {
        "doing": [most | {"doing": round(most["doing"] * part)} for part in parts],
        "living": [most | {"living": round(most["living"] * part)} for part in parts],
        "silent": [most | {"silent": round(most["silent"] * part)} for part in parts],
        "rules": [most | {"rules": number} for number in (1, 10, 50)],
        both: [most | {"doing": round(most["doing"] * part), "silent": round(most["silent"] * part)} for part in parts],
        all_alike: [
            most | {name: round(most[name] * part) for name in ("doing", "living", "silent")} for part in parts
        ],
    }
    measured: dict[tuple[int, ...], list[float]] = defaultdict(list)
    rescues: list[float] = []
    with bench.database() as conninfo, psycopg.connect(conninfo, autocommit=True) as connection:
        for _ in range(bench.rounds):
            for numbers in [*(numbers for less in series.values() for numbers in less), most]:
                connection.execute(CLEAR)
                fill(conninfo, doing=numbers["doing"], living=numbers["living"], silent=numbers["silent"])
                connection.execute(sql.SQL(ADD_RULES).format(rules=numbers["rules"]))
                settle(conninfo)
                with nothing_to_do(conninfo, numbers["doing"]):
                    sweep(connection)
                    measured[tuple(numbers.values())].append(statistics.median(sweep(connection) for _ in range(5)))
            rescues.append(rescue(connection))

    least = series[all_alike][0]

    def times(numbers: Mapping[str, int]) -> list[float]:
        return measured[tuple(numbers.values())]

    def growth(name: str) -> list[float]:
        return divide(times(most), times(series[name][0]))

    def curve(name: str, label: str) -> Curve:
        return Curve(label, [(numbers[name], statistics.median(times(numbers))) for numbers in [*series[name], most]])

    def plot(name: str, what: str, x: str, *curves: Curve) -> Plot:
        return Plot(name, f"A sweep with nothing to do, as {what} grow in number", x, "time (ms)", list(curves))

    return Result(
        ratios=[
            Ratio(
                "growth of the time of a sweep / growth of jobs in doing and workers, of which a tenth are silent",
                [
                    grown * (least["doing"] + least["silent"]) / (most["doing"] + most["silent"])
                    for grown in growth(all_alike)
                ],
                bar=1,
            ),
            Ratio(
                "time of a sweep with 8 times the jobs in doing and the silent workers, so 58 times the jobs of these"
                " / with these",
                growth(both),
            ),
            Ratio("time of a sweep with 8 times the jobs in doing / with these", growth("doing")),
            Ratio("time of a sweep with 8 times the silent workers / with these", growth("silent")),
            Ratio("time of a sweep with 8 times the living workers / with these", growth("living")),
            Ratio("time of a sweep with 100 rules, the last one matching / with 1", growth("rules")),
        ],
        figures=[
            Figure("a sweep", "ms", times(most)),
            Figure("a sweep with an eighth of the jobs and workers", "ms", times(least)),
            Figure("a sweep that retries the jobs of the silent workers", "ms", rescues),
        ],
        plots=[
            plot("grows_with_jobs", "jobs in doing", "jobs in doing", curve("doing", "a sweep")),
            plot(
                "grows_with_workers",
                "living or silent workers",
                "workers",
                curve("living", "living"),
                curve("silent", "silent"),
            ),
            plot("grows_with_rules", "rules", "rules, of which the last one matches", curve("rules", "a sweep")),
        ],
    )


def fill(conninfo: str, *, finished: int = 0, doing: int, living: int, silent: int = 0) -> None:
    """Put workers and jobs into an empty database."""
    spread = min(10, 1 + finished // doing)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(
            sql.SQL(FILL).format(finished=finished, doing=doing, living=living, silent=silent, spread=spread)
        )


def prepare_churn(conninfo: str, bench: Bench) -> None:
    """Put in as many jobs in doing as with a history, and the jobs that are to pass through.

    Each of these has a lock of its own. Of equal keys, and no lock is one, a B-tree removes dead entries by itself.
    """
    doing = bench.size(1_000)
    fill(conninfo, finished=9 * doing, doing=doing, living=bench.size(100))
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            """
            INSERT INTO procrastinate_jobs (queue_name, task_name, lock)
                SELECT 'default', 'benchmark', md5(number::text)
                    FROM generate_series(1, %s) AS number
            """,
            [bench.size(1_000_000)],
        )
    settle(conninfo)


def pass_through_doing(conninfo: str) -> None:
    """Let each job in todo be fetched and finished, a thousand in each transaction."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("SET synchronous_commit = off")
        todo = connection.execute("SELECT min(id), max(id) FROM procrastinate_jobs WHERE status = 'todo'")
        first, last = todo.fetchone() or (0, 0)
        for low in range(first, last + 1, 1000):
            batch = [low, min(low + 999, last)]
            for step in (FETCH, FINISH):
                connection.execute(step, batch)
        # Autovacuum would do that sooner than vacuum.
        connection.execute("ANALYZE")


@contextmanager
def nothing_to_do(conninfo: str, doing: int) -> Iterator[None]:
    """Let the workers be alive and a week of sweeps be recorded; in the end make sure that the new ones were idle."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(LIVE_ON)
        # Not all tables: what churn has left in the others is measured.
        connection.execute("VACUUM ANALYZE procrastinate_workers, procrastinate_stalled.sweeps")
        connection.execute("CHECKPOINT")
        last = connection.execute("SELECT max(id) FROM procrastinate_stalled.sweeps").fetchone() or (0,)
    yield
    with psycopg.connect(conninfo) as connection:
        if connection.execute(BUSY_SWEEPS, [*last, doing]).fetchone() != (0,):
            raise RuntimeError("a sweep was not idle")


def sweep(connection: Connection) -> float:
    """Sweep once; return the milliseconds."""
    begin = time.perf_counter()
    connection.execute("CALL procrastinate_stalled.sweep()")
    return 1000 * (time.perf_counter() - begin)


def stock_query(connection: Connection) -> float:
    """Ask as JobManager.get_stalled_jobs does; return the milliseconds."""
    begin = time.perf_counter()
    stalled = connection.execute(STOCK_QUERY, STOCK_ARGUMENTS).fetchall()
    milliseconds = 1000 * (time.perf_counter() - begin)
    if stalled:
        raise RuntimeError("the stock query has found stalled jobs")
    return milliseconds


def commit(connection: Connection) -> float:
    """Write the least that there is to write, and wait for the disk; return the milliseconds."""
    begin = time.perf_counter()
    connection.execute("SELECT pg_logical_emit_message(true, '', '')")
    return 1000 * (time.perf_counter() - begin)


def sweep_to_disk(connection: Connection) -> float:
    """Sweep once and wait for the disk, even if the sweep does not; return the milliseconds."""
    return sweep(connection) + commit(connection)


def rescue(connection: Connection) -> float:
    """Let the jobs of the silent workers be stalled, and sweep once; return the milliseconds."""
    of_silent_workers = """
        SELECT count(*)
            FROM procrastinate_jobs AS job
            JOIN procrastinate_workers AS worker ON worker.id = job.worker_id
            WHERE worker.last_heartbeat < now() - interval '50 minutes'
                AND job.status = 'doing'
    """
    connection.execute("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '30 minutes' WHERE name = 'default'")
    stalled = connection.execute(of_silent_workers).fetchone()
    milliseconds = sweep(connection)
    if connection.execute("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'").fetchone() != stalled:
        raise RuntimeError("not all jobs of the silent workers were retried")
    return milliseconds


def in_new_connection(conninfo: str, method: Callable[[Connection], float]) -> float:
    """Do it as the first thing in a connection, as pg_cron does."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        return method(connection)


def in_turn(measures: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, float]:
    """Take each so many times, in turn, there and back; return the median of each."""
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(repetitions):
        for name in list(measures)[:: -1 if number % 2 else 1]:
            taken[name].append(measures[name]())
    return {name: statistics.median(times) for name, times in taken.items()}


def divide(dividends: list[float], divisors: list[float]) -> list[float]:
    """Divide round by round."""
    return [dividend / divisor for dividend, divisor in zip(dividends, divisors, strict=True)]


def figures(measured: Mapping[str, list[float]]) -> list[Figure]:
    """Tell all that was measured, in milliseconds."""
    return [Figure(name, "ms", rounds) for name, rounds in measured.items()]
