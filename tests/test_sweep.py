"""`CALL procrastinate_stalled.sweep()`: its batches, its row in `sweeps`, what it survives and what it refuses."""

import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from procrastinate_stalled import install
from tests.conftest import Connect
from tests.jobs import (
    Connection,
    Row,
    add_job,
    add_rule,
    add_stalled_job,
    add_worker,
    contents,
    get_events,
    get_job,
    insert,
    pretend_old_server,
    rows,
    update_job,
)
from tests.server import Server, database_name, install_procrastinate, streaming_standby
from tests.sessions import SWEEP, Point, add_points, paused

RESCUE: LiteralString = "SELECT procrastinate_stalled.retry_stalled_jobs()"


def get_sweeps(connection: Connection) -> list[Row]:
    """The rows of `sweeps`, without what differs each time."""
    return rows(
        connection,
        """
        SELECT doing, retried, failed, aborted, waiting, held, held_reason, error
        FROM procrastinate_stalled.sweeps
        ORDER BY id
        """,
    )


def sweep_row(**columns: object) -> Row:
    return {
        "doing": 0,
        "retried": 0,
        "failed": 0,
        "aborted": 0,
        "waiting": 0,
        "held": 0,
        "held_reason": None,
        "error": None,
    } | columns


def statuses(connection: Connection, job_ids: list[int]) -> list[str]:
    return [get_job(connection, job_id)["status"] for job_id in job_ids]


def rescued(connection: Connection) -> list[int]:
    """The jobs in `rescues`, in the order of rescue."""
    rescues = rows(connection, "SELECT job_id FROM procrastinate_stalled.rescues ORDER BY id")
    return [rescue["job_id"] for rescue in rescues]


def test_a_sweep_does_not_purge_its_own_row(connection: Connection) -> None:
    connection.execute("UPDATE procrastinate_stalled.settings SET keep_sweeps = '0'")
    connection.execute("DELETE FROM procrastinate_stalled.rules")
    for _ in range(2):
        connection.execute(SWEEP)
        assert get_sweeps(connection) == [sweep_row()]


def test_the_rows_that_judgements_read_are_kept_for_the_longest_heartbeat_timeout(connection: Connection) -> None:
    connection.execute("UPDATE procrastinate_stalled.settings SET keep_sweeps = '0'")
    add_rule(connection, "hour", heartbeat_timeout="1 hour")
    for minutes in (59, 61):
        connection.execute(
            "INSERT INTO procrastinate_stalled.sweeps (started_at, doing) VALUES (now() - %s, %s)",
            [timedelta(minutes=minutes), minutes],
        )
    connection.execute(SWEEP)
    assert [sweep["doing"] for sweep in get_sweeps(connection)] == [59, 0]


def test_a_sweep_notes_the_latest_heartbeat_and_the_newest_worker(connection: Connection) -> None:
    connection.execute("TRUNCATE procrastinate_workers CASCADE")
    connection.execute(SWEEP)
    older, newer = add_worker(connection, silent_for=10), add_worker(connection, silent_for=20)
    add_worker(connection, silent_for=-60)  # of a clock that was wrong
    connection.execute(SWEEP)
    assert rows(
        connection,
        """
        SELECT latest_heartbeat = (SELECT last_heartbeat FROM procrastinate_workers WHERE id = %s) AS latest,
               newest_worker_id - %s AS newest
        FROM procrastinate_stalled.sweeps
        ORDER BY id
        """,
        older,
        newer,
    ) == [{"latest": None, "newest": -newer}, {"latest": True, "newest": 1}]


def test_a_sweep_of_nothing_leaves_a_row_that_says_so(connection: Connection) -> None:
    add_job(connection, "todo")
    add_job(connection, "succeeded")

    connection.execute(SWEEP)

    assert get_sweeps(connection) == [sweep_row()]
    (sweep,) = rows(
        connection,
        """
        SELECT duration BETWEEN '0' AND '1 minute' AS duration, started_at > now() - interval '1 minute' AS started_at
        FROM procrastinate_stalled.sweeps
        """,
    )
    assert sweep == {"duration": True, "started_at": True}


@pytest.mark.parametrize("batch_size", [1, 2, 1000, 2147483647])
def test_a_sweep_counts_what_it_did(batch_size: int, connect: Connect, connection: Connection) -> None:
    add_rule(connection, "fail", task_name="fail", action="fail")
    add_rule(connection, "ignore", task_name="ignore", action="ignore")
    retried = [add_stalled_job(connection) for _ in range(3)]
    failed = [add_stalled_job(connection, task_name="fail") for _ in range(2)]
    aborted = add_stalled_job(connection, abort_requested=True)
    locked = add_stalled_job(connection)
    ignored = add_stalled_job(connection, task_name="ignore")
    alive = add_job(connection, worker_id=add_worker(connection))
    application = connect(autocommit=False)
    application.execute("SELECT FROM procrastinate_jobs WHERE id = %s FOR UPDATE", [locked])

    connection.execute("CALL procrastinate_stalled.sweep(%s)", [batch_size])

    assert get_sweeps(connection) == [sweep_row(doing=9, retried=3, failed=2, aborted=1, waiting=1)]
    assert statuses(connection, [*retried, *failed, aborted]) == ["todo"] * 3 + ["failed"] * 2 + ["aborted"]
    assert statuses(connection, [locked, ignored, alive]) == ["doing"] * 3
    assert rescued(connection) == [*retried, *failed, aborted]


def test_a_job_whose_abort_was_requested_is_aborted(connection: Connection) -> None:
    add_rule(connection, "fail", action="fail")
    job_id = add_stalled_job(connection, abort_requested=True)

    connection.execute(SWEEP)

    job = get_job(connection, job_id)
    assert (job["status"], job["abort_requested"], job["attempts"], job["worker_id"]) == ("aborted", False, 0, None)
    assert get_events(connection, job_id)[-1] == "aborted"
    (rescue,) = rows(connection, "SELECT action, detail FROM procrastinate_stalled.rescues")
    assert rescue == {"action": "aborted", "detail": "abort requested"}


def test_each_batch_is_a_transaction_of_its_own(connection: Connection) -> None:
    job_ids = [add_stalled_job(connection) for _ in range(5)]

    connection.execute("CALL procrastinate_stalled.sweep(batch_size => 2)")

    batches = rows(
        connection,
        """
        SELECT array_agg(job_id ORDER BY id) AS job_ids
        FROM procrastinate_stalled.rescues
        GROUP BY xmin::text
        ORDER BY min(id)
        """,
    )
    assert [batch["job_ids"] for batch in batches] == [job_ids[:2], job_ids[2:4], job_ids[4:]]
    assert get_sweeps(connection) == [sweep_row(doing=5, retried=5)]


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("end", ["pg_cancel_backend", "pg_terminate_backend"])
def test_a_sweep_that_is_ended_from_outside_leaves_its_row_and_the_batches_that_it_counts(
    end: LiteralString, count: int, connect: Connect, connection: Connection
) -> None:
    add_points(connection)
    job_ids = [add_stalled_job(connection) for _ in range(6)]
    update_job(connection, job_ids[count], task_name="pause")
    unfinished = ["todo"] * count + ["doing"] * (6 - count)

    with paused(connect, Point.WITHIN_UPDATE, "CALL procrastinate_stalled.sweep(batch_size => 2)") as sweep:
        assert statuses(connection, job_ids) == unfinished
        assert get_sweeps(connection) == [sweep_row(doing=6, retried=count)]

        connection.execute(f"SELECT {end}(%s)", [sweep.sweep.pid])
        with pytest.raises(psycopg.OperationalError):
            sweep.sweep.result()

    assert statuses(connection, job_ids) == unfinished
    assert rescued(connection) == job_ids[:count]
    assert get_sweeps(connection) == [sweep_row(doing=6, retried=count)]
    assert rows(connection, "SELECT duration FROM procrastinate_stalled.sweeps") == [{"duration": None}]

    connection.execute(SWEEP)

    assert rescued(connection) == job_ids
    assert get_sweeps(connection)[1:] == [sweep_row(doing=6 - count, retried=6 - count)]


# An error of an application, and one that only looks like a collision of queueing locks.
@pytest.mark.parametrize("errcode", ["ZZ999", "23505"])
@pytest.mark.parametrize("sweep", [SWEEP, "CALL procrastinate_stalled.sweep(batch_size => 2)", RESCUE])
def test_a_job_that_cannot_be_changed_is_named_and_does_not_stop_the_others(
    sweep: LiteralString, errcode: LiteralString, connection: Connection
) -> None:
    first, broken, broken_too, last = [add_stalled_job(connection) for _ in range(4)]
    connection.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'not this one' USING ERRCODE = '{errcode}';
        END;
        $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON procrastinate_jobs
            FOR EACH ROW WHEN (OLD.id IN ({broken}, {broken_too})) EXECUTE FUNCTION refuse();
        """
    )

    connection.execute(sweep)

    assert statuses(connection, [first, broken, broken_too, last]) == ["todo", "doing", "doing", "todo"]
    assert rescued(connection) == [first, last]
    error = f"job {broken}: not this one ({errcode})"
    assert get_sweeps(connection) == [sweep_row(doing=4, retried=2, waiting=2, error=error)]

    connection.execute("DROP TRIGGER refuse ON procrastinate_jobs")
    connection.execute(sweep)

    assert rescued(connection) == [first, last, broken, broken_too]
    assert get_sweeps(connection)[1:] == [sweep_row(doing=2, retried=2)]


def add_rescue(connection: Connection, job_id: int, ago: timedelta, **columns: object) -> None:
    """Add an outdated or a recent row of `rescues`."""
    columns = {"queue_name": "default", "task_name": "task", "action": "retried", "reason": "heartbeat"} | columns
    insert(connection, "rescues", job_id=job_id, attempts=0, **columns)
    connection.execute(
        """
        UPDATE procrastinate_stalled.rescues SET rescued_at = now() - %s
        WHERE id = (SELECT max(id) FROM procrastinate_stalled.rescues)
        """,
        [ago],
    )


def test_rescues_are_purged_when_they_are_older_than_the_setting(connection: Connection) -> None:
    connection.execute("UPDATE procrastinate_stalled.settings SET keep_rescues = '3 days'")
    add_rescue(connection, 1001, timedelta(days=2, hours=23))
    add_rescue(connection, 1002, timedelta(days=3, hours=1))
    add_rescue(connection, 1003, timedelta(days=300))

    connection.execute(SWEEP)

    assert rescued(connection) == [1001]


def test_by_default_rescues_are_kept_for_90_days_and_sweeps_for_7(connection: Connection) -> None:
    add_rescue(connection, 1001, timedelta(days=89))
    add_rescue(connection, 1002, timedelta(days=91))
    for days in (6, 8):
        connection.execute(
            "INSERT INTO procrastinate_stalled.sweeps (started_at, doing) VALUES (now() - %s, %s)",
            [timedelta(days=days), days],
        )

    connection.execute(SWEEP)

    assert rescued(connection) == [1001]
    assert get_sweeps(connection) == [sweep_row(doing=6), sweep_row()]


@pytest.mark.parametrize(
    ("status", "kept"),
    [
        ("todo", True),
        ("doing", True),
        ("failed", True),  # which Procrastinate can retry
        ("succeeded", False),
        ("cancelled", False),
        ("aborted", False),
        (None, False),
    ],
)
def test_a_rescue_that_still_counts_for_a_job_that_can_run_again_is_kept(
    status: str | None, kept: bool, connection: Connection
) -> None:
    if status is None:
        job_id = add_job(connection)
        connection.execute("DELETE FROM procrastinate_jobs WHERE id = %s", [job_id])
    else:
        job_id = add_job(connection, status, worker_id=add_worker(connection))
    add_rescue(connection, job_id, timedelta(days=1000))

    connection.execute(SWEEP)

    assert rescued(connection) == ([job_id] if kept else [])


@pytest.mark.parametrize("columns", [{"reason": "manual"}, {"action": "failed"}, {"action": "aborted"}], ids=str)
def test_a_rescue_that_never_counted_is_purged_whatever_its_job_does(
    columns: dict[str, object], connection: Connection
) -> None:
    add_rescue(connection, add_job(connection, "failed"), timedelta(days=1000), **columns)

    connection.execute(SWEEP)

    assert rescued(connection) == []


def test_a_sweep_purges_in_small_bites(connection: Connection) -> None:
    connection.execute(
        """
        INSERT INTO procrastinate_stalled.sweeps (started_at)
            SELECT now() - interval '8 days' FROM generate_series(1, 1500);
        INSERT INTO procrastinate_stalled.rescues (job_id, queue_name, task_name, action, reason, attempts, rescued_at)
            SELECT number, 'default', 'task', 'retried', 'heartbeat', 0, now() - interval '91 days'
            FROM generate_series(1, 1500) AS number;
        """
    )
    counts = """
        SELECT (SELECT count(*) FROM procrastinate_stalled.sweeps) AS sweeps,
               (SELECT count(*) FROM procrastinate_stalled.rescues) AS rescues
        """

    connection.execute(SWEEP)
    assert rows(connection, counts) == [{"sweeps": 501, "rescues": 500}]

    connection.execute(SWEEP)
    assert rows(connection, counts) == [{"sweeps": 2, "rescues": 0}]


def test_a_purge_does_not_wait_for_another_session(connect: Connect, connection: Connection) -> None:
    add_rescue(connection, 1001, timedelta(days=1000))
    add_rescue(connection, 1002, timedelta(days=1000))
    reader = connect(autocommit=False)
    reader.execute("SELECT FROM procrastinate_stalled.rescues WHERE job_id = 1001 FOR UPDATE")

    connection.execute(SWEEP)

    assert rescued(connection) == [1001]


def test_the_session_commits_as_before(connect: Connect, connection: Connection) -> None:
    add_stalled_job(connection)
    session = connect(options="-c synchronous_commit=on")

    session.execute(SWEEP)

    assert rows(session, "SHOW synchronous_commit") == [{"synchronous_commit": "on"}]


def test_a_sweep_finds_the_same_while_somebody_holds_a_snapshot(connection: Connection) -> None:
    jobs = [add_stalled_job(connection, lock=lock) for lock in ("b", "a", None)]
    connection.execute(
        """
        CREATE OR REPLACE FUNCTION procrastinate_stalled._snapshot_is_held() RETURNS boolean
            LANGUAGE sql AS 'SELECT true'
        """
    )

    connection.execute(SWEEP)

    assert statuses(connection, jobs) == ["todo"] * 3


@pytest.mark.parametrize("batch_size", [0, -1, None])
def test_a_batch_size_that_makes_no_sense_is_refused(batch_size: int | None, connection: Connection) -> None:
    add_stalled_job(connection)
    before = contents(connection)

    with pytest.raises(psycopg.errors.InvalidParameterValue) as error:
        connection.execute("CALL procrastinate_stalled.sweep(%s)", [batch_size])

    assert error.value.diag.message_primary == "batch_size must be a positive number of jobs"
    assert error.value.diag.message_detail == f"It is {'NULL' if batch_size is None else batch_size}."
    assert error.value.diag.message_hint
    assert contents(connection) == before


@pytest.mark.parametrize("count", [0, 3])
def test_a_sweep_within_a_transaction_block_is_refused(count: int, connection: Connection) -> None:
    for _ in range(count):
        add_stalled_job(connection)
    before = contents(connection)

    with pytest.raises(psycopg.errors.InvalidTransactionTermination), connection.transaction():
        connection.execute(SWEEP)

    assert contents(connection) == before


def test_a_sweep_leaves_the_settings_of_its_session_alone(connection: Connection) -> None:
    add_stalled_job(connection)
    connection.execute("SET lock_timeout = '7s'; SET search_path = pg_temp, public")
    settings = "SELECT name, setting FROM pg_settings WHERE name <> 'transaction_isolation' ORDER BY name"
    before = rows(connection, settings)

    connection.execute(SWEEP)

    assert rows(connection, settings) == before


# What an unwary session may have in front of Procrastinate's schema, and even of pg_catalog.
HOSTILE: LiteralString = """
CREATE SCHEMA hostile;
CREATE TABLE hostile.procrastinate_jobs (LIKE public.procrastinate_jobs);
CREATE TABLE hostile.procrastinate_workers (LIKE public.procrastinate_workers);
CREATE TABLE hostile.procrastinate_events (LIKE public.procrastinate_events);
CREATE TABLE hostile.rescues (LIKE procrastinate_stalled.rescues);
CREATE TEMPORARY TABLE procrastinate_jobs (LIKE public.procrastinate_jobs);
CREATE TEMPORARY TABLE procrastinate_events (LIKE public.procrastinate_events);
CREATE FUNCTION hostile.fail() RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    RAISE 'the search_path of the session was used';
END;
$$;
CREATE FUNCTION hostile.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT hostile.fail()::text::timestamptz';
CREATE FUNCTION hostile.pg_is_in_recovery() RETURNS boolean LANGUAGE sql AS 'SELECT hostile.fail()::boolean';
CREATE FUNCTION hostile.cardinality(bigint[]) RETURNS integer LANGUAGE sql AS 'SELECT hostile.fail()';
CREATE FUNCTION hostile.unnest(bigint[]) RETURNS SETOF bigint LANGUAGE sql AS 'SELECT hostile.fail()::bigint';
CREATE FUNCTION hostile.pg_notify(text, text) RETURNS void LANGUAGE sql AS 'SELECT hostile.fail()::text::void';
CREATE FUNCTION hostile.fail(bigint) RETURNS bigint LANGUAGE sql AS 'SELECT hostile.fail()::bigint';
CREATE AGGREGATE hostile.count(*) (SFUNC = hostile.fail, STYPE = bigint);
CREATE FUNCTION hostile.fail(integer, integer) RETURNS boolean LANGUAGE sql AS 'SELECT hostile.fail()::boolean';
CREATE FUNCTION hostile.fail(bigint, bigint) RETURNS boolean LANGUAGE sql AS 'SELECT hostile.fail()::boolean';
CREATE FUNCTION hostile.fail(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT hostile.fail()::boolean';
CREATE FUNCTION hostile.fail(boolean, boolean) RETURNS boolean LANGUAGE sql AS 'SELECT hostile.fail()::boolean';
CREATE OPERATOR hostile.<= (FUNCTION = hostile.fail, LEFTARG = integer, RIGHTARG = integer);
CREATE OPERATOR hostile.> (FUNCTION = hostile.fail, LEFTARG = integer, RIGHTARG = integer);
CREATE OPERATOR hostile.= (FUNCTION = hostile.fail, LEFTARG = bigint, RIGHTARG = bigint);
CREATE OPERATOR hostile.= (FUNCTION = hostile.fail, LEFTARG = text, RIGHTARG = text);
CREATE OPERATOR hostile.= (FUNCTION = hostile.fail, LEFTARG = boolean, RIGHTARG = boolean);
CREATE DOMAIN hostile.record AS boolean;
CREATE DOMAIN hostile.int8 AS boolean;
SET search_path = pg_temp, hostile, pg_catalog, public;
"""


@pytest.mark.parametrize("statement", [SWEEP, RESCUE, "SELECT procrastinate_stalled.retry_job(1)"])
def test_the_search_path_of_the_session_changes_nothing(
    statement: LiteralString, connect: Connect, connection: Connection
) -> None:
    job_id = add_stalled_job(connection)
    assert job_id == 1
    session = connect()
    session.execute(HOSTILE)

    session.execute(statement)

    assert get_events(connection, job_id) == ["deferred", "started", "deferred_for_retry"]
    assert rescued(connection) == [job_id]


def test_procrastinate_in_a_schema_of_another_name_is_swept(server: Server) -> None:
    with server.database() as database:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute('CREATE SCHEMA "my schema"')
        in_schema = make_conninfo(database, options='-c search_path="my\\ schema"')
        install_procrastinate(in_schema)
        install(database)
        with (
            psycopg.connect(in_schema, autocommit=True) as procrastinate,
            psycopg.connect(database, autocommit=True) as connection,
        ):
            pretend_old_server(connection)
            add_worker(procrastinate)
            job_id = add_stalled_job(procrastinate, queueing_lock="key")
            duplicate = add_stalled_job(procrastinate, queueing_lock="key")

            connection.execute(SWEEP)

            assert get_events(procrastinate, job_id) == ["deferred", "started", "deferred_for_retry"]
            assert get_events(procrastinate, duplicate) == ["deferred", "started", "failed"]
            assert get_sweeps(connection) == [sweep_row(doing=2, retried=1, failed=1)]


@pytest.fixture
def standby(server: Server) -> Iterator[Server]:
    """A streaming standby of `server`."""
    with streaming_standby(server) as standby:
        yield standby


def test_a_standby_is_not_swept_until_it_is_promoted(
    database: str, connection: Connection, request: pytest.FixtureRequest
) -> None:
    job_id = add_stalled_job(connection)
    standby = request.getfixturevalue("standby")
    notices: list[tuple[str | None, ...]] = []

    def note(notice: psycopg.errors.Diagnostic) -> None:
        notices.append((notice.severity, notice.message_primary, notice.message_hint))

    with psycopg.connect(standby.conninfo(database_name(database)), autocommit=True) as copy:
        copy.add_notice_handler(note)
        before = contents(copy)

        copy.execute(SWEEP)

        ((severity, message, hint),) = notices
        assert severity == "NOTICE"
        assert message == "procrastinate_stalled: nothing was swept, because this server is a standby"
        assert hint
        assert contents(copy) == before

        copy.execute("SELECT pg_promote()")
        copy.execute(SWEEP)

        assert get_events(copy, job_id) == ["deferred", "started", "deferred_for_retry"]
        assert len(notices) == 1
    assert get_events(connection, job_id) == ["deferred", "started"]


@pytest.fixture
def durable(connect: Connect) -> Iterator[Connection]:
    """A connection that waits for the disk at each commit, on a server where nobody else writes the WAL meanwhile."""
    connection = connect(options="-c synchronous_commit=on")
    [[walwriter]] = connection.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'")
    os.kill(walwriter, signal.SIGSTOP)
    try:
        yield connection
    finally:
        os.kill(walwriter, signal.SIGCONT)


def on_disk(connection: Connection) -> object:
    """How much of the WAL is on the disk."""
    return rows(connection, "SELECT pg_current_wal_flush_lsn()")


def test_what_a_sweep_has_rescued_is_on_disk_when_it_ends(durable: Connection) -> None:
    for _ in range(3):
        add_stalled_job(durable)
    before = on_disk(durable)

    durable.execute("CALL procrastinate_stalled.sweep(batch_size => 1)")

    assert on_disk(durable) != before
    assert [sweep["retried"] for sweep in get_sweeps(durable)] == [3]


def test_an_idle_sweep_does_not_wait_for_the_disk(durable: Connection) -> None:
    add_job(durable, "doing", worker_id=add_worker(durable))
    before = on_disk(durable)

    durable.execute(SWEEP)

    assert on_disk(durable) == before
    assert [sweep["doing"] for sweep in get_sweeps(durable)] == [1]
