"""`status()`: what each row says when all is well and when it is not."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from procrastinate_stalled import Stalled, Status
from tests.jobs import add_job, add_stalled_job, add_worker, insert

Connection = psycopg.Connection[Any]


def check(connection: Connection, name: str) -> Status:
    """The one row of that name."""
    [row] = [row for row in Stalled(connection).status() if row.name == name]
    return row


@pytest.fixture
def scheduled(cron_database: str) -> Iterator[Connection]:
    """A connection to a database whose sweep is scheduled."""
    with psycopg.connect(cron_database, autocommit=True) as connection:
        Stalled(connection).schedule()
        yield connection


def add_run(connection: Connection, status: str, message: str = "CALL") -> None:
    """Note a run of the pg_cron job, as pg_cron does."""
    connection.execute(
        """
        INSERT INTO cron.job_run_details (jobid, runid, database, username, command, status, return_message, start_time)
        SELECT jobid, nextval('cron.runid_seq'), database, username, command, %s, %s, now() FROM cron.job
        """,
        [status, message],
    )


def test_workers_are_counted_and_missed(connection: Connection) -> None:
    add_worker(connection, silent_for=31)
    assert check(connection, "procrastinate").level == "warning"
    assert check(connection, "procrastinate").detail == "schema public; 0 of 1 workers heard of in the last 30 s"

    add_worker(connection)
    assert check(connection, "procrastinate") == Status(
        "procrastinate", "ok", "schema public; 1 of 2 workers heard of in the last 30 s", None
    )


def test_a_missing_procrastinate_is_an_error_and_no_exception(connection: Connection) -> None:
    connection.execute("DROP TABLE procrastinate_jobs, procrastinate_workers, procrastinate_events CASCADE")

    levels = {row.name: row.level for row in Stalled(connection).status()}

    assert levels == {"procrastinate": "error", "schedule": "warning", "last_sweep": "warning", "jobs": "error"}


def test_a_role_that_may_see_nothing_gets_rows_and_no_exception(connection: Connection) -> None:
    connection.execute(
        """
        CREATE ROLE stranger;
        GRANT USAGE ON SCHEMA procrastinate_stalled TO stranger;
        GRANT EXECUTE ON FUNCTION procrastinate_stalled.status() TO stranger;
        SET ROLE stranger;
        """
    )
    try:
        levels = {row.name: row.level for row in Stalled(connection).status()}
    finally:
        connection.execute("RESET ROLE; DROP OWNED BY stranger; DROP ROLE stranger")
    assert levels == {"procrastinate": "error", "schedule": "warning", "last_sweep": "warning", "jobs": "error"}


def test_without_a_schedule_the_remedy_is_named(cron_database: str) -> None:
    with psycopg.connect(cron_database, autocommit=True) as connection:
        row = check(connection, "schedule")
        assert (row.level, row.hint) == ("warning", "SELECT procrastinate_stalled.schedule();")


def test_a_schedule_is_ok_and_an_inactive_one_an_error(scheduled: Connection) -> None:
    assert check(scheduled, "schedule").level == "ok"

    scheduled.execute("UPDATE cron.job SET active = false")

    assert check(scheduled, "schedule").level == "error"


def test_without_pg_cron_the_schedule_is_ok_when_something_else_sweeps(connection: Connection) -> None:
    assert check(connection, "schedule").level == "warning"

    connection.execute("CALL procrastinate_stalled.sweep()")
    assert check(connection, "schedule").level == "warning"
    connection.execute("CALL procrastinate_stalled.sweep()")

    assert check(connection, "schedule").level == "ok"
    assert check(connection, "schedule").detail.endswith("; something else sweeps: see last_sweep")


def test_the_last_run_of_pg_cron_is_told_with_its_error(scheduled: Connection) -> None:
    assert check(scheduled, "last_run").detail == "pg_cron has not run the job yet"
    assert check(scheduled, "last_run").level == "warning"

    add_run(scheduled, "succeeded")
    assert check(scheduled, "last_run").level == "ok"

    for status in ("starting", "running", "connecting", "sending"):
        add_run(scheduled, status)
        assert check(scheduled, "last_run").level == "ok"

    add_run(scheduled, "failed", "ERROR:  something\n")
    assert check(scheduled, "last_run").level == "error"
    assert check(scheduled, "last_run").detail.endswith(": ERROR:  something")

    add_run(scheduled, "failed", "connection failed")
    assert "log in" in (check(scheduled, "last_run").hint or "")


@pytest.mark.parametrize(
    ("columns", "level", "detail"),
    [
        ({"started_at": "now", "duration": "1 second"}, "ok", ""),
        ({"started_at": "now"}, "ok", ""),
        ({"started_at": "now", "duration": "1 second", "error": "job 1: refused (P0001)"}, "warning", "job 1: refused"),
        ({"started_at": "yesterday", "duration": "1 second"}, "warning", "the last sweep was at "),
        ({"started_at": "half an hour ago"}, "warning", "the sweep of "),
    ],
)
def test_the_last_sweep_is_told_with_its_age_and_error(
    connection: Connection, columns: dict[str, str], level: str, detail: str
) -> None:
    assert check(connection, "last_sweep").detail == "there is no record of a sweep"

    if columns["started_at"] == "half an hour ago":
        connection.execute(
            "INSERT INTO procrastinate_stalled.sweeps (started_at) VALUES (now() - interval '30 minutes')"
        )
    else:
        insert(connection, "sweeps", **columns)

    row = check(connection, "last_sweep")
    assert row.level == level
    assert row.detail.startswith(detail)


def test_stalled_jobs_are_counted_and_those_that_wait_too(connection: Connection) -> None:
    add_job(connection, worker_id=add_worker(connection))
    assert check(connection, "jobs") == Status("jobs", "ok", "1 in doing, 0 stalled", None)

    connection.execute("UPDATE procrastinate_stalled.rules SET on_duplicate = 'wait'")
    add_stalled_job(connection)
    add_stalled_job(connection, queueing_lock="key")
    add_job(connection, "todo", queueing_lock="key")

    row = check(connection, "jobs")
    assert row.level == "warning"
    assert row.detail.startswith("3 in doing, 2 stalled since ")
    assert row.detail.endswith(", 1 of them wait for a job with the same queueing lock")
