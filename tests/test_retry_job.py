"""`retry_job`: what Procrastinate's `JobManager.retry_job` does, to a job in `doing` only, with a row in `rescues`."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from procrastinate.exceptions import UniqueViolation
from procrastinate.jobs import Job

from procrastinate_stalled import Stalled
from tests.conftest import Connect
from tests.job_manager import job_manager
from tests.jobs import (
    Connection,
    Row,
    add_event,
    add_job,
    add_rule,
    add_stalled_job,
    add_worker,
    contents,
    get_events,
    get_job,
    rows,
    update_job,
)
from tests.random_databases import with_examples

# Procrastinate's connector stumbles over the error of a queueing lock with a line break.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\n"), max_size=128)
integers = st.integers(-(2**31), 2**31 - 1)
times = st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 30), timezones=st.just(UTC))  # noqa: DTZ001

jobs = st.fixed_dictionaries(
    {
        "silent_for": st.none() | st.sampled_from((0, 3600)),
        "abort_requested": st.booleans(),
        "attempts": st.integers(0, 5),
        "priority": integers,
        "lock": st.none() | texts,
        "queueing_lock": st.none() | texts,
        "args": st.sampled_from(({}, {"a": 1})),
        "scheduled_at": st.none() | times,
        "waiting_duplicate": st.booleans(),
    }
)
arguments_of_retry_job = st.fixed_dictionaries(
    {},
    optional={
        "retry_at": times,
        "priority": integers,
        "queue": texts.filter(bool),
        "lock": texts,
    },
)


def everything_of(connection: Connection, job_id: int) -> list[Row]:
    """The row of a job without its worker, and its events."""
    job = get_job(connection, job_id)
    del job["worker_id"]
    events = rows(connection, "SELECT type, at FROM procrastinate_events WHERE job_id = %s ORDER BY id", job_id)
    return [job, *events]


@with_examples(200)
@given(columns=jobs, arguments=arguments_of_retry_job)
def test_it_leaves_the_row_and_the_events_that_procrastinate_leaves(
    transaction: Connection, columns: dict[str, Any], arguments: dict[str, Any]
) -> None:
    with transaction.transaction(force_rollback=True):
        columns = dict(columns)
        silent_for = columns.pop("silent_for")
        waiting_duplicate = columns.pop("waiting_duplicate")
        worker = None if silent_for is None else add_worker(transaction, silent_for)
        job = add_job(transaction, worker_id=worker, started_ago=60, **columns)
        if waiting_duplicate:
            add_job(transaction, "todo", queueing_lock=columns["queueing_lock"])

        with transaction.transaction(force_rollback=True):
            refused = False
            stock_job = Job.from_row(get_job(transaction, job))
            try:
                with transaction.transaction():
                    asyncio.run(job_manager(transaction).retry_job(stock_job, **arguments))
            except UniqueViolation:
                refused = True
            expected = everything_of(transaction, job)
        if not refused and "retry_at" not in arguments and not columns["abort_requested"]:
            # JobManager puts the present time of its computer then; a job of ours is as due as a new one.
            expected[0]["scheduled_at"] = None
            (scheduled,) = (row for row in expected if row.get("type") == "scheduled" and row["at"] is not None)
            expected.remove(scheduled)

        try:
            with transaction.transaction():
                Stalled(transaction).retry_job(job, **arguments)
        except psycopg.errors.UniqueViolation:
            assert refused
        else:
            assert not refused
            assert get_job(transaction, job)["worker_id"] is None
        assert everything_of(transaction, job) == expected


def test_it_returns_its_row_of_rescues(transaction: Connection) -> None:
    transaction.execute("SET LOCAL application_name = 'night watch'")
    worker = add_worker(transaction, silent_for=7)
    job = add_job(transaction, worker_id=worker, started_ago=60, attempts=4, queue_name="mail", task_name="send")
    add_event(transaction, job, "started", ago=3600)
    at = datetime(2100, 1, 1, tzinfo=UTC)

    rescue = Stalled(transaction).retry_job(job, retry_at=at, queue="slow")

    (row,) = rows(transaction, "SELECT rescues.*, now() FROM procrastinate_stalled.rescues")
    now = row.pop("now")
    assert {name: getattr(rescue, name) for name in row} == row
    assert row == {
        "id": row["id"],
        "rescued_at": now,
        "job_id": job,
        "queue_name": "mail",
        "task_name": "send",
        "action": "retried",
        "reason": "manual",
        "detail": None,
        "rule_name": None,
        "worker_id": worker,
        "last_heartbeat": now - timedelta(seconds=7),
        "started_at": now - timedelta(seconds=60),
        "attempts": 4,
        "scheduled_at": at,
        "rescued_by": "postgres (night watch)",
    }


def test_the_rescue_of_an_orphan_without_events_has_nulls(transaction: Connection) -> None:
    job = add_job(transaction)
    transaction.execute("DELETE FROM procrastinate_events")
    rescue = Stalled(transaction).retry_job(job)
    assert (rescue.worker_id, rescue.last_heartbeat, rescue.started_at, rescue.scheduled_at) == (None, None, None, None)


def test_a_job_whose_abort_was_requested_is_failed(transaction: Connection) -> None:
    job = add_stalled_job(transaction, abort_requested=True, scheduled_at="yesterday")
    rescue = Stalled(transaction).retry_job(job, retry_at=datetime(2100, 1, 1, tzinfo=UTC), queue="slow")
    assert (rescue.action, rescue.detail, rescue.scheduled_at) == ("failed", "abort requested", None)
    assert get_job(transaction, job)["status"] == "failed"


@pytest.mark.parametrize("rule", [{"action": "ignore"}, {"action": "fail"}, {"max_rescues": 0}, {"enabled": False}])
def test_it_retries_whatever_the_rules_and_the_worker_say(transaction: Connection, rule: dict[str, Any]) -> None:
    transaction.execute("DELETE FROM procrastinate_stalled.rules")
    add_rule(transaction, "r", **rule)
    job = add_job(transaction, worker_id=add_worker(transaction))
    assert Stalled(transaction).retry_job(job).action == "retried"


def test_it_touches_no_other_job(transaction: Connection) -> None:
    other = add_stalled_job(transaction)
    before = get_job(transaction, other)
    Stalled(transaction).retry_job(add_stalled_job(transaction))
    assert get_job(transaction, other) == before
    assert rows(transaction, "SELECT * FROM procrastinate_stalled.sweeps") == []


def test_a_job_can_be_retried_again_and_again(transaction: Connection) -> None:
    job = add_stalled_job(transaction)
    for attempts in range(5):
        assert Stalled(transaction).retry_job(job).attempts == attempts
        update_job(transaction, job, status="doing")
    assert get_events(transaction, job) == ["deferred", *["started", "deferred_for_retry"] * 5, "started"]


def test_it_takes_part_in_the_transaction_of_the_caller(connect: Connect) -> None:
    watcher = connect()
    job = add_stalled_job(watcher)
    before = contents(watcher)
    caller = connect(autocommit=False)

    Stalled(caller).retry_job(job)
    assert contents(watcher) == before
    caller.rollback()
    assert contents(watcher) == before

    Stalled(caller).retry_job(job)
    caller.commit()
    assert get_job(watcher, job)["status"] == "todo"


# Errors


@contextmanager
def refusal(connection: Connection, error: type[psycopg.Error]) -> Iterator[dict[str, str | None]]:
    """See an error, and nothing changed. Yields what receives its `message`, `detail` and `hint`."""
    before = contents(connection)
    parts: dict[str, str | None] = {}
    with pytest.raises(error) as raised, connection.transaction():
        yield parts
    diagnosis = raised.value.diag
    parts |= {
        "message": diagnosis.message_primary,
        "detail": diagnosis.message_detail,
        "hint": diagnosis.message_hint,
    }
    assert contents(connection) == before


def test_a_job_that_does_not_exist_is_refused(transaction: Connection) -> None:
    with refusal(transaction, psycopg.errors.NoDataFound) as parts:
        Stalled(transaction).retry_job(12345)
    assert parts == {
        "message": "there is no job 12345",
        "detail": "It was deleted, or never existed in this database.",
        "hint": ("The running jobs: SELECT id, queue_name, task_name FROM procrastinate_jobs WHERE status = 'doing';"),
    }
    assert rows(transaction, "SELECT id, queue_name, task_name FROM procrastinate_jobs WHERE status = 'doing';") == []


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        ("todo", "Nothing needs to be done: a worker will fetch it."),
        ("failed", "Retry a failed job with Procrastinate: "),
        ("succeeded", "It has ended. Defer a new job if the work must be done again."),
        ("cancelled", "It has ended. Defer a new job if the work must be done again."),
        ("aborted", "It has ended. Defer a new job if the work must be done again."),
    ],
)
def test_a_job_that_is_not_in_doing_is_refused(transaction: Connection, status: str, hint: str) -> None:
    job = add_stalled_job(transaction, status=status)
    with refusal(transaction, psycopg.errors.ObjectNotInPrerequisiteState) as parts:
        Stalled(transaction).retry_job(job)
    assert parts["message"] == f"job {job} is not in doing"
    assert parts["detail"] == f"Its status is {status}."
    assert (parts["hint"] or "").startswith(hint)


def test_a_job_whose_queueing_lock_another_one_has_is_refused(transaction: Connection) -> None:
    job = add_stalled_job(transaction, queueing_lock="%s k")
    waiting = add_job(transaction, "todo", queueing_lock="%s k")
    with refusal(transaction, psycopg.errors.UniqueViolation) as parts:
        Stalled(transaction).retry_job(job)
    assert parts == {
        "message": f"job {job} cannot be retried: another job waits with its queueing lock",
        "detail": f'The queueing lock is "%s k"; job {waiting} has it in todo.',
        "hint": (
            "Nothing was changed. The waiting job does the same work. A sweep ends this one once it is stalled: "
            f"see explain_job({job}). If its worker lives and gave it up: "
            f"SELECT procrastinate_finish_job_v1({job}, 'failed', false);"
        ),
    }

    # As it stands there, for a worker that gave it up.
    transaction.execute((parts["hint"] or "").rpartition(": ")[2].encode())

    assert (get_job(transaction, job)["status"], get_job(transaction, waiting)["status"]) == ("failed", "todo")


@pytest.mark.parametrize(
    ("arguments", "message", "detail"),
    [
        ("NULL", "job_id must not be NULL", "job_id is NULL, retry_at is NULL, queue has no characters."),
        (
            "{job}, retry_at => 'infinity'",
            "retry_at must be a time from 1970 to 9999-12-30",
            "job_id is {job}, retry_at is infinity, queue has no characters.",
        ),
        (
            "{job}, retry_at => '-infinity'",
            "retry_at must be a time from 1970 to 9999-12-30",
            "job_id is {job}, retry_at is -infinity, queue has no characters.",
        ),
        (
            "{job}, retry_at => '1969-12-31 23:59:59+00'",
            "retry_at must be a time from 1970 to 9999-12-30",
            "job_id is {job}, retry_at is 1969-12-31 23:59:59+00, queue has no characters.",
        ),
        (
            "{job}, retry_at => '9999-12-31 00:00+00'",
            "retry_at must be a time from 1970 to 9999-12-30",
            "job_id is {job}, retry_at is 9999-12-31 00:00:00+00, queue has no characters.",
        ),
        (
            "{job}, queue => ''",
            "queue must have 1 to 128 characters",
            "job_id is {job}, retry_at is NULL, queue has 0 characters.",
        ),
        (
            "{job}, queue => repeat('q', 129)",
            "queue must have 1 to 128 characters",
            "job_id is {job}, retry_at is NULL, queue has 129 characters.",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    transaction: Connection, arguments: str, message: str, detail: str
) -> None:
    job = add_stalled_job(transaction)
    transaction.execute("SET LOCAL TimeZone = 'UTC'")
    with refusal(transaction, psycopg.errors.InvalidParameterValue) as parts:
        transaction.execute(f"SELECT procrastinate_stalled.retry_job({arguments.format(job=job)})")
    assert parts == {
        "message": message,
        "detail": detail.format(job=job),
        "hint": "Nothing was changed. Example: SELECT * FROM procrastinate_stalled.retry_job(42);",
    }


@pytest.mark.parametrize("retry_at", ["1970-01-01 00:00+00", "9999-12-30 23:59:59.999999+00"])
def test_a_worker_can_read_the_earliest_and_the_latest_time(transaction: Connection, retry_at: str) -> None:
    job = add_stalled_job(transaction)
    transaction.execute("SELECT procrastinate_stalled.retry_job(%s, retry_at => %s)", [job, retry_at])
    assert get_job(transaction, job)["scheduled_at"] == datetime.fromisoformat(retry_at)


LOCKED = {
    "detail": (
        "Somebody is finishing, retrying or aborting it at this moment, or defers a job with its queueing lock."
    ),
    "hint": "Nothing was changed. Look at the job again, and retry it if it is still in doing.",
}


def test_a_job_that_another_session_has_locked_is_refused_after_half_a_second(connect: Connect) -> None:
    connection = connect()
    job = add_stalled_job(connection)
    finishing = connect(autocommit=False)
    finishing.execute("SELECT procrastinate_finish_job_v1(%s, 'succeeded', false)", [job])

    (began,) = rows(connection, "SELECT clock_timestamp() AS at")
    with refusal(connection, psycopg.errors.LockNotAvailable) as parts:
        Stalled(connection).retry_job(job)
    (ended,) = rows(connection, "SELECT clock_timestamp() AS at")

    assert parts == {"message": f"job {job} is locked by another session"} | LOCKED
    assert timedelta(seconds=0.5) <= ended["at"] - began["at"] < timedelta(seconds=10)
    finishing.commit()
    assert get_job(connection, job)["status"] == "succeeded"


def test_a_queueing_lock_that_another_session_is_about_to_take_is_not_waited_for(connect: Connect) -> None:
    connection = connect()
    job = add_stalled_job(connection, queueing_lock="k")
    deferring = connect(autocommit=False)
    add_job(deferring, "todo", queueing_lock="k")

    with refusal(connection, psycopg.errors.LockNotAvailable) as parts:
        Stalled(connection).retry_job(job)

    assert parts == {"message": f"job {job} is locked by another session"} | LOCKED


def test_a_failed_insert_into_rescues_undoes_the_retry(transaction: Connection) -> None:
    job = add_stalled_job(transaction)
    transaction.execute("ALTER TABLE procrastinate_stalled.rescues ADD CHECK (task_name <> 'task')")
    with refusal(transaction, psycopg.errors.CheckViolation):
        Stalled(transaction).retry_job(job)
    assert get_job(transaction, job)["status"] == "doing"
