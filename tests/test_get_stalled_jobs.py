"""`get_stalled_jobs`: with seconds, exactly the jobs of Procrastinate's JobManager. For the rules see test_rules."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from procrastinate.jobs import Job
from psycopg.errors import InvalidParameterValue, ReadOnlySqlTransaction

from procrastinate_stalled import Stalled
from tests.job_manager import job_manager
from tests.jobs import Connection, add_event, add_job, add_rule, add_stalled_job, add_worker, rows, update_job
from tests.random_databases import SECOND, TIMEOUTS, RandomDatabase, databases, queues, tasks, with_examples

MILLISECOND = SECOND // 1000  # Procrastinate's query fails with less than a tenth of it.
microseconds = st.sampled_from(TIMEOUTS) | st.integers(MILLISECOND, 10**15)

BAD_SECONDS = (0.0, -0.0, -1.0, float("nan"), float("inf"), float("-inf"), 3155760001.0, 1e300)


@st.composite
def databases_and_seconds(draw: st.DrawFn) -> tuple[RandomDatabase, int]:
    """A database, and the microseconds to ask for."""
    threshold = draw(microseconds)
    return draw(databases(threshold)), threshold


def assert_same_jobs(connection: Connection, **arguments: Any) -> None:
    """Compare ours with JobManager's, job by job and column by column."""
    expected = asyncio.run(job_manager(connection).get_stalled_jobs(**arguments))
    expected_by_id = {job.id: job for job in expected if job.id is not None}

    stalled = Stalled(connection).get_stalled_jobs(**arguments)

    assert [job.id for job in stalled] == sorted(expected_by_id)
    table = {
        row["id"]: row
        for row in rows(
            connection,
            """
            SELECT job.*,
                   worker.last_heartbeat,
                   (SELECT max(at) FROM procrastinate_events WHERE job_id = job.id AND type = 'started') AS started_at
            FROM procrastinate_jobs AS job
            LEFT JOIN procrastinate_workers AS worker ON worker.id = job.worker_id
            """,
        )
    }
    for job in stalled:
        row = table[job.id]
        assert {name: getattr(job, name) for name in row} == row
        # JobManager does not ask for abort_requested: a Job of its always says False.
        assert Job.from_row(row).evolve(abort_requested=False) == expected_by_id[job.id]


@with_examples(100)
@given(example=databases_and_seconds(), other_seconds=microseconds, queue=queues, task_name=tasks)
@pytest.mark.filterwarnings("ignore:The `nb_seconds` parameter is deprecated:DeprecationWarning")
def test_with_seconds_it_returns_what_procrastinate_returns(
    transaction: Connection,
    example: tuple[RandomDatabase, int],
    other_seconds: int,
    queue: str | None,
    task_name: str | None,
) -> None:
    database, threshold = example
    seconds = threshold / SECOND
    with transaction.transaction(force_rollback=True):
        database.create(transaction)
        for names in ({}, {"queue": queue, "task_name": task_name}):
            assert_same_jobs(transaction, **names, seconds_since_heartbeat=seconds)
            assert_same_jobs(transaction, **names, nb_seconds=seconds)
            assert_same_jobs(transaction, **names, nb_seconds=seconds, seconds_since_heartbeat=other_seconds / SECOND)


def test_a_silence_of_exactly_the_seconds_is_not_enough(transaction: Connection) -> None:
    add_stalled_job(transaction, silent_for=30)
    longer = add_stalled_job(transaction, silent_for=30.000001)

    stalled = Stalled(transaction).get_stalled_jobs(seconds_since_heartbeat=30)

    assert [job.id for job in stalled] == [longer]


def test_a_run_of_exactly_the_seconds_is_not_enough(transaction: Connection) -> None:
    worker = add_worker(transaction)
    add_job(transaction, worker_id=worker, started_ago=30)
    longer = add_job(transaction, worker_id=worker, started_ago=30.000001)

    stalled = Stalled(transaction).get_stalled_jobs(nb_seconds=30)

    assert [job.id for job in stalled] == [longer]


def test_with_seconds_the_reason_and_the_date_are_those_of_the_argument(transaction: Connection) -> None:
    silent = add_job(transaction, worker_id=add_worker(transaction, 100), started_ago=1000)
    orphan = add_job(transaction, started_ago=1000)
    since_heartbeat = Stalled(transaction).get_stalled_jobs(seconds_since_heartbeat=40)
    since_start = Stalled(transaction).get_stalled_jobs(nb_seconds=400)

    (ago,) = rows(transaction, "SELECT now() - interval '60 s' AS minute, now() - interval '600 s' AS ten_minutes")
    assert [(job.id, job.reason, job.stalled_at) for job in since_heartbeat] == [
        (silent, "heartbeat", ago["minute"]),
        (orphan, "orphaned", None),
    ]
    assert [(job.id, job.reason, job.stalled_at) for job in since_start] == [
        (silent, "run_timeout", ago["ten_minutes"]),
        (orphan, "run_timeout", ago["ten_minutes"]),
    ]


def test_an_orphan_asked_for_by_silence_has_no_date(transaction: Connection) -> None:
    add_job(transaction)
    [stalled] = Stalled(transaction).get_stalled_jobs(seconds_since_heartbeat=30)
    assert stalled.reason == "orphaned"
    assert stalled.stalled_at is None


def test_with_seconds_the_action_is_still_that_of_the_rule(transaction: Connection) -> None:
    transaction.execute("DELETE FROM procrastinate_stalled.rules")
    add_rule(transaction, "protect", task_name="protected", action="ignore")
    add_rule(transaction, "end", task_name="ended", action="fail")
    add_rule(transaction, "hour", task_name="retried", heartbeat_timeout="1 hour")
    for name in ("protected", "ended", "retried", "other"):
        add_stalled_job(transaction, silent_for=60, task_name=name)

    stalled = Stalled(transaction).get_stalled_jobs(seconds_since_heartbeat=30)

    assert [(job.task_name, job.rule_name, job.action, job.detail) for job in stalled] == [
        ("protected", "protect", "ignore", "rule"),
        ("ended", "end", "fail", "rule"),
        ("retried", "hour", "retry", None),
        ("other", None, "ignore", "no rule"),
    ]


def test_an_abort_request_is_shown(transaction: Connection) -> None:
    add_stalled_job(transaction, abort_requested=True)
    (job,) = Stalled(transaction).get_stalled_jobs(seconds_since_heartbeat=30)
    assert (job.abort_requested, job.action, job.detail) == (True, "abort", "abort requested")


def test_only_jobs_of_the_queue_and_the_task_are_returned(transaction: Connection) -> None:
    both = add_stalled_job(transaction, queue_name="q_1", task_name="t_1")
    other_task = add_stalled_job(transaction, queue_name="q_1", task_name="tx1")
    other_queue = add_stalled_job(transaction, queue_name="qx1", task_name="t_1")

    def ids(**arguments: Any) -> list[int]:
        return [job.id for job in Stalled(transaction).get_stalled_jobs(**arguments)]

    assert ids() == [both, other_task, other_queue]
    assert ids(queue="q_1") == [both, other_task]
    assert ids(task_name="t_1") == [both, other_queue]
    assert ids(queue="q_1", task_name="t_1") == [both]
    assert ids(task_name="t%") == []
    assert ids(queue="") == []


@pytest.mark.parametrize("status", ["todo", "succeeded", "failed", "cancelled", "aborting", "aborted"])
def test_a_job_that_is_not_in_doing_is_not_stalled(transaction: Connection, status: str) -> None:
    add_stalled_job(transaction, status=status)
    assert Stalled(transaction).get_stalled_jobs() == []


def test_started_at_is_the_last_start(transaction: Connection) -> None:
    job = add_stalled_job(transaction, started_ago=100)
    add_event(transaction, job, "started", 300)
    add_event(transaction, job, "deferred_for_retry", 50)
    add_event(transaction, job, "started", None)

    (stalled,) = Stalled(transaction).get_stalled_jobs()

    (expected,) = rows(transaction, "SELECT now() - interval '100 s' AS at")
    assert stalled.started_at == expected["at"]


def test_a_job_without_events_is_stalled_all_the_same(transaction: Connection) -> None:
    job = add_stalled_job(transaction)
    transaction.execute("DELETE FROM procrastinate_events")
    (stalled,) = Stalled(transaction).get_stalled_jobs()
    assert (stalled.id, stalled.started_at) == (job, None)


def test_they_come_by_id_whatever_their_order_in_the_table(transaction: Connection) -> None:
    jobs = [add_stalled_job(transaction, lock=f"{9 - number}") for number in range(9)]
    for job in (jobs[3], jobs[0], jobs[7]):
        update_job(transaction, job, priority=1)
    assert [job.id for job in Stalled(transaction).get_stalled_jobs()] == jobs


@pytest.mark.parametrize("arguments", [{}, {"seconds_since_heartbeat": 30}, {"nb_seconds": 30}])
def test_it_writes_nothing(transaction: Connection, arguments: dict[str, Any]) -> None:
    add_stalled_job(transaction, started_ago=60)
    transaction.execute("SET LOCAL transaction_read_only = on")
    assert len(Stalled(transaction).get_stalled_jobs(**arguments)) == 1
    with pytest.raises(ReadOnlySqlTransaction):
        Stalled(transaction).retry_stalled_jobs(**arguments)


@pytest.mark.parametrize("argument", ["seconds_since_heartbeat", "nb_seconds"])
@pytest.mark.parametrize("seconds", BAD_SECONDS)
def test_seconds_that_make_no_sense_are_refused(transaction: Connection, argument: str, seconds: float) -> None:
    arguments: dict[str, Any] = {argument: seconds}
    with pytest.raises(InvalidParameterValue) as error:
        Stalled(transaction).get_stalled_jobs(**arguments)
    assert error.value.diag.message_primary == f"{argument} must be a positive number of seconds"
    assert (error.value.diag.message_detail or "").startswith("It is ")
    assert error.value.diag.message_hint == (
        "Pass a number above 0 and up to 3155760000 (100 years), or leave the argument out."
    )


def test_a_hundred_years_make_sense(transaction: Connection) -> None:
    add_stalled_job(transaction)
    assert Stalled(transaction).get_stalled_jobs(seconds_since_heartbeat=3155760000) == []
