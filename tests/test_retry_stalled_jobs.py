"""`retry_stalled_jobs`: one sweep over the jobs of `get_stalled_jobs`, in the transaction of the caller."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.errors import InvalidParameterValue

from procrastinate_stalled import Rescue, Stalled, StalledJob
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
    rows,
)
from tests.random_databases import SECOND, TIMEOUTS, RandomDatabase, databases, queues, tasks, with_examples

DONE = {"retry": "retried", "fail": "failed", "abort": "aborted"}
STATUS = {"retry": "todo", "fail": "failed", "abort": "aborted"}
EVENT = {"retry": "deferred_for_retry", "fail": "failed", "abort": "aborted"}

seconds = st.sampled_from([timeout / SECOND for timeout in TIMEOUTS])
arguments_of_both = st.fixed_dictionaries(
    {},
    optional={
        "queue": queues,
        "task_name": tasks,
        "seconds_since_heartbeat": seconds,
        "nb_seconds": seconds,
    },
)


def all_jobs(connection: Connection) -> dict[int, Row]:
    """The rows of all jobs and the types of their events, by id."""
    return {
        row["id"]: row
        for row in rows(
            connection,
            """
            SELECT job.*, array_agg(event.type::text ORDER BY event.id) FILTER (WHERE event.id IS NOT NULL) AS events
            FROM procrastinate_jobs AS job
            LEFT JOIN procrastinate_events AS event ON event.job_id = job.id
            GROUP BY job.id
            """,
        )
    }


def after(job: Row, planned: StalledJob) -> Row:
    """What becomes of a job's row and events when the planned action is done."""
    done: Row = {"status": STATUS[planned.action], "worker_id": None, "abort_requested": False}
    events = [EVENT[planned.action]]
    if planned.action == "retry":
        done |= {"attempts": job["attempts"] + 1, "scheduled_at": planned.retry_at}
        if planned.retry_at is not None:
            events = ["scheduled", *events]
        if planned.retry_queue_name is not None:
            done["queue_name"] = planned.retry_queue_name
        if planned.retry_priority is not None:
            done["priority"] = planned.retry_priority
    return job | done | {"events": [*(job["events"] or []), *events]}


def by_job(rescues: Sequence[Rescue]) -> list[Rescue]:
    """Compare rescues without their own ids."""
    return [replace(rescue, id=None) for rescue in sorted(rescues, key=lambda rescue: rescue.job_id)]


def as_planned(job: StalledJob) -> Row:
    """The columns of `rescues` that `get_stalled_jobs` foretells."""
    return {
        "job_id": job.id,
        "queue_name": job.queue_name,
        "task_name": job.task_name,
        "action": DONE[job.action],
        "reason": job.reason,
        "detail": job.detail,
        "rule_name": job.rule_name,
        "worker_id": job.worker_id,
        "last_heartbeat": job.last_heartbeat,
        "started_at": job.started_at,
        "attempts": job.attempts,
        "scheduled_at": job.retry_at,
    }


@with_examples(120)
@given(database=databases(), arguments=arguments_of_both, max_jobs=st.none() | st.integers(1, 4))
def test_it_does_what_get_stalled_jobs_and_the_dry_run_foretell_and_nothing_else(
    transaction: Connection, database: RandomDatabase, arguments: dict[str, Any], max_jobs: int | None
) -> None:
    with transaction.transaction(force_rollback=True):
        database.create(transaction)
        stalled = Stalled(transaction)
        before = contents(transaction)
        jobs_before = all_jobs(transaction)

        planned = stalled.get_stalled_jobs(**arguments)
        dry = stalled.retry_stalled_jobs(**arguments, max_jobs=max_jobs, dry_run=True)
        assert contents(transaction) == before
        done = stalled.retry_stalled_jobs(**arguments, max_jobs=max_jobs)

        chosen = [job for job in planned if job.action in DONE][:max_jobs]
        assert [rescue.job_id for rescue in dry] == [job.id for job in chosen]
        assert [
            {name: asdict(rescue)[name] for name in as_planned(job)} for rescue, job in zip(dry, chosen, strict=True)
        ] == [as_planned(job) for job in chosen]
        assert by_job(done) == dry
        assert all_jobs(transaction) == jobs_before | {job.id: after(jobs_before[job.id], job) for job in chosen}
        table = rows(transaction, "SELECT * FROM procrastinate_stalled.rescues ORDER BY id")
        assert [Rescue(**row) for row in table[len(table) - len(done) :]] == sorted(
            done, key=lambda rescue: rescue.id or 0
        )
        assert len(table) == len(before["procrastinate_stalled.rescues"]) + len(done)

        (sweep,) = rows(transaction, "SELECT * FROM procrastinate_stalled.sweeps")
        where = {name: value for name, value in arguments.items() if name in {"queue", "task_name"}}
        explained = stalled.explain_jobs(**where) if arguments == where else []  # with seconds nothing is held
        doing = [
            job
            for job in jobs_before.values()
            if job["status"] == "doing"
            and arguments.get("queue") in {None, job["queue_name"]}
            and arguments.get("task_name") in {None, job["task_name"]}
        ]
        assert {name: sweep[name] for name in ("doing", "retried", "failed", "aborted", "held", "error")} == {
            "doing": len(doing),
            "retried": sum(rescue.action == "retried" for rescue in done),
            "failed": sum(rescue.action == "failed" for rescue in done),
            "aborted": sum(rescue.action == "aborted" for rescue in done),
            "held": sum(job.verdict == "held" for job in explained),
            "error": None,
        }
        left = stalled.get_stalled_jobs(**arguments)
        assert sweep["waiting"] == sum(job.action != "ignore" for job in left)
        if max_jobs is None:
            assert {job.action for job in left} <= {"wait", "ignore"}


@pytest.mark.parametrize("arguments", [{"seconds_since_heartbeat": 30}, {"nb_seconds": 30}])
def test_with_seconds_ignore_and_no_rule_protect_all_the_same(
    transaction: Connection, arguments: dict[str, Any]
) -> None:
    transaction.execute("DELETE FROM procrastinate_stalled.rules")
    add_rule(transaction, "protect", position=1, task_name="protected", action="ignore")
    add_rule(transaction, "patient", position=2, task_name="stalled", heartbeat_timeout=None)
    protected = add_stalled_job(transaction, task_name="protected", started_ago=3600)
    without_rule = add_stalled_job(transaction, task_name="other", started_ago=3600)
    stalled = add_stalled_job(transaction, task_name="stalled", started_ago=3600)
    untouched = [get_job(transaction, job) for job in (protected, without_rule)]

    rescues = Stalled(transaction).retry_stalled_jobs(**arguments)

    assert [(rescue.job_id, rescue.rule_name) for rescue in rescues] == [(stalled, "patient")]
    assert [get_job(transaction, job) for job in (protected, without_rule)] == untouched
    (sweep,) = rows(transaction, "SELECT doing, waiting FROM procrastinate_stalled.sweeps")
    assert sweep == {"doing": 3, "waiting": 0}


def test_with_seconds_a_living_worker_is_robbed_only_by_start(transaction: Connection) -> None:
    job = add_job(transaction, worker_id=add_worker(transaction), started_ago=60)
    assert Stalled(transaction).retry_stalled_jobs(seconds_since_heartbeat=1) == []
    (rescue,) = Stalled(transaction).retry_stalled_jobs(nb_seconds=59)
    assert (rescue.job_id, rescue.reason) == (job, "run_timeout")


def test_max_jobs_takes_the_lowest_ids_first(transaction: Connection) -> None:
    jobs = [add_stalled_job(transaction, silent_for=1000 + number, priority=number) for number in range(5)]
    assert [rescue.job_id for rescue in Stalled(transaction).retry_stalled_jobs(max_jobs=2)] == jobs[:2]
    (sweep,) = rows(transaction, "SELECT doing, retried, waiting FROM procrastinate_stalled.sweeps")
    assert sweep == {"doing": 5, "retried": 2, "waiting": 3}
    assert [rescue.job_id for rescue in Stalled(transaction).retry_stalled_jobs(max_jobs=2)] == jobs[2:4]
    assert [rescue.job_id for rescue in Stalled(transaction).retry_stalled_jobs(max_jobs=2)] == jobs[4:]


def test_jobs_that_wait_do_not_use_up_max_jobs(transaction: Connection) -> None:
    transaction.execute("UPDATE procrastinate_stalled.rules SET on_duplicate = 'wait'")
    add_job(transaction, "todo", queueing_lock="k")
    for _ in range(2):
        add_stalled_job(transaction, queueing_lock="k")
    job = add_stalled_job(transaction)
    assert [rescue.job_id for rescue in Stalled(transaction).retry_stalled_jobs(max_jobs=1)] == [job]


def test_jobs_that_another_session_has_locked_do_not_use_up_max_jobs(connect: Connect) -> None:
    connection = connect()
    jobs = [add_stalled_job(connection) for _ in range(4)]
    other = connect(autocommit=False)
    other.execute("SELECT FROM procrastinate_jobs WHERE id = %s FOR UPDATE", [jobs[0]])
    assert [rescue.job_id for rescue in Stalled(connection).retry_stalled_jobs(max_jobs=2)] == jobs[1:3]


def test_a_dry_run_works_where_nothing_can_be_written(transaction: Connection) -> None:
    job = add_stalled_job(transaction)
    transaction.execute("SET LOCAL transaction_read_only = on")
    (rescue,) = Stalled(transaction).retry_stalled_jobs(dry_run=True)
    assert (rescue.job_id, rescue.id) == (job, None)


def test_a_dry_run_of_null_is_a_dry_run(transaction: Connection) -> None:
    add_stalled_job(transaction)
    before = contents(transaction)
    assert len(rows(transaction, "SELECT * FROM procrastinate_stalled.retry_stalled_jobs(dry_run => NULL)")) == 1
    assert contents(transaction) == before


def test_more_jobs_than_fit_in_one_batch_are_rescued(transaction: Connection) -> None:
    worker = add_worker(transaction, silent_for=3600)
    transaction.execute(
        """
        INSERT INTO procrastinate_jobs (queue_name, task_name, status, worker_id, queueing_lock)
        SELECT 'default', 'task', 'doing', %s, nullif(number %% 1001, 7)::text
        FROM generate_series(1, 2500) AS number
        """,
        [worker],
    )
    dry = Stalled(transaction).retry_stalled_jobs(dry_run=True)
    done = Stalled(transaction).retry_stalled_jobs()
    assert len(done) == 2500
    assert by_job(done) == dry
    assert sum(rescue.action == "retried" for rescue in done) == 1003
    (sweep,) = rows(transaction, "SELECT doing, retried, failed, waiting FROM procrastinate_stalled.sweeps")
    assert sweep == {"doing": 2500, "retried": 1003, "failed": 1497, "waiting": 0}


def test_nothing_stalled_is_a_sweep_all_the_same(transaction: Connection) -> None:
    assert Stalled(transaction).retry_stalled_jobs() == []
    (sweep,) = rows(transaction, "SELECT * FROM procrastinate_stalled.sweeps")
    assert sweep["duration"] is not None
    assert {name: sweep[name] for name in ("doing", "retried", "failed", "aborted", "waiting", "held_reason")} == {
        "doing": 0,
        "retried": 0,
        "failed": 0,
        "aborted": 0,
        "waiting": 0,
        "held_reason": None,
    }


def test_a_rescued_job_is_not_stalled_any_more(transaction: Connection) -> None:
    job = add_stalled_job(transaction)
    assert len(Stalled(transaction).retry_stalled_jobs()) == 1
    assert Stalled(transaction).retry_stalled_jobs() == []
    assert get_events(transaction, job) == ["deferred", "started", "deferred_for_retry"]


def test_it_names_the_role_and_the_application(transaction: Connection) -> None:
    add_stalled_job(transaction)
    transaction.execute("CREATE ROLE operator")
    transaction.execute("GRANT ALL ON SCHEMA procrastinate_stalled TO operator")
    transaction.execute("GRANT ALL ON ALL TABLES IN SCHEMA public, procrastinate_stalled TO operator")
    transaction.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA public, procrastinate_stalled TO operator")
    transaction.execute("GRANT ALL ON ALL ROUTINES IN SCHEMA procrastinate_stalled TO operator")
    transaction.execute("SET LOCAL application_name = 'night watch'")
    transaction.execute("SET LOCAL ROLE operator")
    for dry_run in (True, False):
        (rescue,) = Stalled(transaction).retry_stalled_jobs(dry_run=dry_run)
        assert rescue.rescued_by == "operator (night watch)"


# The transaction of the caller


def test_a_rollback_undoes_everything(connect: Connect) -> None:
    watcher = connect()
    add_stalled_job(watcher, abort_requested=True)
    add_stalled_job(watcher)
    add_job(watcher)
    before = contents(watcher)
    caller = connect(autocommit=False)

    assert len(Stalled(caller).retry_stalled_jobs()) == 2
    changed = {table for table, content in contents(caller).items() if content != before[table]}
    assert changed == {
        "procrastinate_events",
        "procrastinate_jobs",
        "procrastinate_stalled.orphans",
        "procrastinate_stalled.rescues",
        "procrastinate_stalled.sweeps",
    }
    assert contents(watcher) == before
    caller.rollback()

    assert contents(watcher) == before


def test_a_commit_makes_it_so(connect: Connect) -> None:
    watcher = connect()
    job = add_stalled_job(watcher)
    caller = connect(autocommit=False)
    Stalled(caller).retry_stalled_jobs()
    assert get_job(watcher, job)["status"] == "doing"
    caller.commit()
    assert get_job(watcher, job)["status"] == "todo"


def test_it_leaves_the_settings_of_the_caller_alone(transaction: Connection) -> None:
    transaction.execute("SET LOCAL synchronous_commit = on")
    add_stalled_job(transaction, queueing_lock="k")
    before = rows(transaction, "SELECT name, setting FROM pg_settings")
    Stalled(transaction).retry_stalled_jobs()
    assert rows(transaction, "SELECT name, setting FROM pg_settings") == before


# Bad arguments


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("arguments", "message", "detail"),
    [
        ("seconds_since_heartbeat => 0", "seconds_since_heartbeat must be a positive number of seconds", "It is 0."),
        ("seconds_since_heartbeat => -1", "seconds_since_heartbeat must be a positive number of seconds", "It is -1."),
        (
            "seconds_since_heartbeat => 'NaN'",
            "seconds_since_heartbeat must be a positive number of seconds",
            "It is NaN.",
        ),
        ("nb_seconds => 0", "nb_seconds must be a positive number of seconds", "It is 0."),
        ("nb_seconds => '-Infinity'", "nb_seconds must be a positive number of seconds", "It is -Infinity."),
        ("nb_seconds => 'Infinity'", "nb_seconds must be a positive number of seconds", "It is Infinity."),
        ("nb_seconds => 1e300", "nb_seconds must be a positive number of seconds", "It is 1e+300."),
        (
            "nb_seconds => 30, seconds_since_heartbeat => 0",
            "seconds_since_heartbeat must be a positive number of seconds",
            "It is 0.",
        ),
        ("max_jobs => 0", "max_jobs must be a positive number of jobs", "It is 0."),
        ("max_jobs => -1", "max_jobs must be a positive number of jobs", "It is -1."),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    transaction: Connection, arguments: str, message: str, detail: str, *, dry_run: bool
) -> None:
    add_stalled_job(transaction, started_ago=3600)
    add_job(transaction)
    before = contents(transaction)
    with pytest.raises(InvalidParameterValue) as error, transaction.transaction():
        transaction.execute(f"SELECT procrastinate_stalled.retry_stalled_jobs({arguments}, dry_run => {dry_run})")
    diagnosis = error.value.diag
    assert (diagnosis.message_primary, diagnosis.message_detail) == (message, detail)
    assert diagnosis.message_hint == (
        "Nothing was changed. Leave it out to take all."
        if "max_jobs" in arguments
        else "Pass a number above 0 and up to 3155760000 (100 years), or leave the argument out."
    )
    assert contents(transaction) == before
