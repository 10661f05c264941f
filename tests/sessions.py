"""Sessions that meet where a test wants them to: statements in threads, and points at which a sweep pauses."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, LiteralString

import psycopg
from psycopg.abc import Params

from tests.jobs import Connection
from tests.server import Server, database_name
from tests.wait import wait_until

SWEEP: LiteralString = "CALL procrastinate_stalled.sweep()"


class Point(Enum):
    """A point in a sweep. The value locks what the sweep needs to go on from there."""

    BEFORE_WORKER_LOCK = "SELECT pg_advisory_xact_lock(1, 3)"
    AFTER_WORKER_LOCK = "LOCK TABLE procrastinate_stalled.rescues IN SHARE MODE"
    AFTER_JUDGEMENT = "SELECT pg_advisory_xact_lock(1, 1)"
    WITHIN_UPDATE = "SELECT pg_advisory_xact_lock(1, 2)"
    """Just before the update of a job of the task `pause`; those with a higher id follow."""


# The statements of the product stay as they are. What waits at a point waits as long as the test wants.
_POINTS = """
CREATE SCHEMA points;

CREATE FUNCTION points.pass(point integer) RETURNS void LANGUAGE plpgsql SET lock_timeout = 0 AS $$
BEGIN
    IF current_setting('application_name') = 'pauses' THEN
        PERFORM pg_advisory_lock_shared(1, point);
        PERFORM pg_advisory_unlock_shared(1, point);
    END IF;
END;
$$;

ALTER FUNCTION procrastinate_stalled._judge SET SCHEMA points;
CREATE FUNCTION procrastinate_stalled._judge(
    queue text DEFAULT NULL,
    task_name text DEFAULT NULL,
    seconds_since_heartbeat interval DEFAULT NULL,
    nb_seconds interval DEFAULT NULL,
    job_ids bigint[] DEFAULT NULL,
    also_running boolean DEFAULT false
)
    RETURNS SETOF procrastinate_stalled._judged_job LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN QUERY
        SELECT * FROM points._judge(queue, task_name, seconds_since_heartbeat, nb_seconds, job_ids, also_running);
    IF job_ids IS NOT NULL THEN
        PERFORM points.pass(1);
    END IF;
END;
$$;

ALTER FUNCTION procrastinate_stalled._rescue SET SCHEMA points;
CREATE FUNCTION procrastinate_stalled._rescue(
    queue text,
    task_name text,
    seconds_since_heartbeat interval,
    nb_seconds interval,
    job_ids bigint[],
    OUT rescue_ids bigint[],
    OUT retried bigint,
    OUT failed bigint,
    OUT aborted bigint
)
    LANGUAGE plpgsql AS $$
BEGIN
    PERFORM points.pass(3);
    SELECT rescue.*
        INTO rescue_ids, retried, failed, aborted
        FROM points._rescue(queue, task_name, seconds_since_heartbeat, nb_seconds, job_ids) AS rescue;
END;
$$;

CREATE FUNCTION points.before_update() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM points.pass(2);
    RETURN NEW;
END;
$$;
CREATE TRIGGER pause BEFORE UPDATE ON procrastinate_jobs
    FOR EACH ROW WHEN (OLD.task_name = 'pause' AND OLD.status = 'doing') EXECUTE FUNCTION points.before_update();

-- It waits for half a second, which a busy machine may need to see that it waits.
ALTER FUNCTION procrastinate_stalled.retry_job SET lock_timeout = '10s';
"""


def add_points(connection: Connection) -> None:
    """Let sweeps in this database pause at the points."""
    connection.execute(_POINTS)


@dataclass(frozen=True)
class Running:
    """A statement that runs in a thread."""

    future: Future[list[tuple[Any, ...]]]
    pid: int
    observer: Connection

    def wait_until_it_waits(self) -> None:
        """Return once the statement waits for a lock of another session."""
        wait_until(lambda: self._ended() or self._waits(), "the statement waits for another session")
        assert not self._ended(), f"It did not wait: {self.future.result()}"

    def result(self) -> list[tuple[Any, ...]]:
        """Wait for the end of the statement and return its rows."""
        return self.future.result(timeout=30)

    def _ended(self) -> bool:
        return self.future.done()

    def _waits(self) -> bool:
        row = self.observer.execute("SELECT cardinality(pg_blocking_pids(%s)) > 0", [self.pid]).fetchone()
        assert row is not None
        return bool(row[0])


@contextmanager
def running(
    connection: Connection, observer: Connection, query: LiteralString, parameters: Params = ()
) -> Iterator[Running]:
    """Run a statement in a thread until it has ended; cancel it when the test fails before."""

    def execute() -> list[tuple[Any, ...]]:
        cursor = connection.execute(query, parameters)
        return cursor.fetchall() if cursor.description else []

    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(execute)
        try:
            yield Running(future, connection.info.backend_pid, observer)
        except BaseException:
            connection.cancel_safe()
            raise


@dataclass(frozen=True)
class Paused:
    """A sweep that has come to a point and stays there."""

    sweep: Running
    keeper: Connection

    def resume(self) -> None:
        """Let the sweep go on, and wait for its end."""
        self.keeper.rollback()
        self.sweep.result()


@contextmanager
def paused(connect: Callable[..., Connection], point: Point, query: LiteralString = SWEEP) -> Iterator[Paused]:
    """Run a sweep up to the point, in a database that has the points. The sweep ends with the block."""
    observer = connect()
    if point is Point.AFTER_WORKER_LOCK:
        observer.execute("ALTER FUNCTION points._rescue SET lock_timeout = 0")
    keeper = connect(autocommit=False)
    keeper.execute(point.value)
    with running(connect(application_name="pauses"), observer, query) as sweep:
        try:
            sweep.wait_until_it_waits()
            yield Paused(sweep, keeper)
        finally:
            keeper.rollback()


@contextmanager
def no_deadlock(server: Server, conninfo: str) -> Iterator[None]:
    """Check that the sessions of the block met without a deadlock, even one that nobody was told of.

    The block ends all its sessions, because a session may leave its statistics as late as then.
    """
    yield
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:

        def count(query: LiteralString) -> object:
            return connection.execute(query, [database_name(conninfo)]).fetchone()

        wait_until(
            lambda: count("SELECT count(*) FROM pg_stat_activity WHERE datname = %s") == (0,),
            "all sessions of the test have ended",
        )
        assert count("SELECT deadlocks FROM pg_stat_database WHERE datname = %s") == (0,)
