"""Stalled jobs with a queueing lock, of which only one may be in todo, and the jobs that wait with the same lock."""

import asyncio
from collections.abc import Iterator
from typing import LiteralString

import psycopg
import pytest
from procrastinate.exceptions import UniqueViolation

from tests.conftest import Connect, RunWorker
from tests.job_manager import job_manager
from tests.jobs import (
    Connection,
    Row,
    add_job,
    add_rule,
    add_stalled_job,
    add_worker,
    get_events,
    get_job,
    rows,
    update_job,
)
from tests.procrastinate_release import DEFER
from tests.server import Server
from tests.sessions import SWEEP, Point, add_points, no_deadlock, paused, running
from tests.wait import wait_until

RESCUE: LiteralString = "SELECT * FROM procrastinate_stalled.retry_stalled_jobs()"

# Each way to sweep, with batches of all sizes.
each_sweep = pytest.mark.parametrize(
    "sweep",
    [
        "CALL procrastinate_stalled.sweep()",
        "CALL procrastinate_stalled.sweep(batch_size => 1)",
        "CALL procrastinate_stalled.sweep(batch_size => 3)",
        "SELECT procrastinate_stalled.retry_stalled_jobs()",
    ],
)


@pytest.fixture(autouse=True)
def _without_deadlocks(server: Server, database: str) -> Iterator[None]:
    with no_deadlock(server, database):
        yield


def rescue_of(connection: Connection, job_id: int) -> Row | None:
    """The row of `rescues` of a job, which has at most one."""
    rescues = rows(
        connection, "SELECT action, detail, attempts FROM procrastinate_stalled.rescues WHERE job_id = %s", job_id
    )
    assert len(rescues) <= 1
    return rescues[0] if rescues else None


def is_untouched(connection: Connection, job_id: int) -> bool:
    """Whether a stalled job is as it was."""
    job = get_job(connection, job_id)
    events = get_events(connection, job_id)
    return (
        (job["status"], job["attempts"]) == ("doing", 0)
        and job["worker_id"] is not None
        and events == ["deferred", "started"]
        and rescue_of(connection, job_id) is None
    )


def is_retried(connection: Connection, *job_ids: int) -> bool:
    """Whether stalled jobs were retried, once."""
    return all(
        (get_job(connection, job_id)["status"], get_job(connection, job_id)["attempts"]) == ("todo", 1)
        and get_events(connection, job_id) == ["deferred", "started", "deferred_for_retry"]
        and rescue_of(connection, job_id) == {"action": "retried", "detail": None, "attempts": 0}
        for job_id in job_ids
    )


def is_ended_as_duplicate(connection: Connection, job_id: int, of: int) -> bool:
    """Whether a stalled job was ended, once, because the other one waits."""
    job = get_job(connection, job_id)
    return (
        (job["status"], job["attempts"], job["worker_id"]) == ("failed", 0, None)
        and get_events(connection, job_id) == ["deferred", "started", "failed"]
        and rescue_of(connection, job_id) == {"action": "failed", "detail": f"duplicate of job {of}", "attempts": 0}
    )


def get_sweep(connection: Connection) -> Row:
    """The counts and the error of the newest sweep."""
    sweeps = rows(
        connection,
        "SELECT retried, failed, waiting, error FROM procrastinate_stalled.sweeps ORDER BY id DESC LIMIT 1",
    )
    return sweeps[0]


@each_sweep
def test_a_stalled_job_whose_sibling_waits_is_ended_as_its_duplicate(
    sweep: LiteralString, connection: Connection
) -> None:
    before = add_stalled_job(connection)
    stalled = add_stalled_job(connection, queueing_lock="key")
    sibling = add_job(connection, "todo", queueing_lock="key")
    after = add_stalled_job(connection, queueing_lock="other key")

    connection.execute(sweep)

    assert is_ended_as_duplicate(connection, stalled, of=sibling)
    assert is_retried(connection, before, after)
    assert (get_job(connection, sibling)["status"], get_events(connection, sibling)) == ("todo", ["deferred"])
    assert get_sweep(connection) == {"retried": 2, "failed": 1, "waiting": 0, "error": None}


@each_sweep
@pytest.mark.parametrize("count", [2, 20])
def test_of_stalled_jobs_with_one_queueing_lock_the_first_is_retried_and_the_others_end(
    count: int, sweep: LiteralString, connection: Connection
) -> None:
    before = add_stalled_job(connection)
    first, *others = [add_stalled_job(connection, queueing_lock="key") for _ in range(count)]
    after = add_stalled_job(connection)

    connection.execute(sweep)

    assert is_retried(connection, before, first, after)
    assert all(is_ended_as_duplicate(connection, other, of=first) for other in others)
    assert get_sweep(connection) == {"retried": 3, "failed": count - 1, "waiting": 0, "error": None}


@each_sweep
def test_a_job_that_is_not_to_be_retried_gives_its_queueing_lock_to_the_next(
    sweep: LiteralString, connection: Connection
) -> None:
    aborted = add_stalled_job(connection, queueing_lock="key", abort_requested=True)
    failed = add_stalled_job(connection, queueing_lock="key", queue_name="fail")
    ignored = add_stalled_job(connection, queueing_lock="key", queue_name="ignore")
    retried = add_stalled_job(connection, queueing_lock="key")
    add_rule(connection, "fail", queue_name="fail", action="fail")
    add_rule(connection, "ignore", queue_name="ignore", action="ignore")

    connection.execute(sweep)

    assert is_retried(connection, retried)
    assert is_untouched(connection, ignored)
    assert get_events(connection, aborted)[-1] == "aborted"
    assert rescue_of(connection, failed) == {"action": "failed", "detail": "rule", "attempts": 0}


def test_a_job_with_both_locks_whose_sibling_waits_blocks_the_lock_for_ever_but_for_a_sweep(
    database: str, connection: Connection, run_worker: RunWorker
) -> None:
    """The wedge of Procrastinate's issues 1446 and 1543."""
    task = "tests.tasks.succeed"
    stalled = add_stalled_job(connection, task_name=task, lock="lock", queueing_lock="key")
    sibling = add_job(connection, "todo", task_name=task, lock="lock", queueing_lock="key")
    other = add_stalled_job(connection, task_name=task)
    run_worker(database, stalled_worker_timeout=86400)
    manager = job_manager(connection)

    async def retry_stalled_jobs() -> None:
        for job in await manager.get_stalled_jobs():
            await manager.retry_job(job)

    def let_the_worker_run_all_that_it_can() -> None:
        with connection.transaction():
            last = add_job(connection, "todo", task_name=task, priority=-1)
        wait_until(lambda: get_job(connection, last)["status"] == "succeeded", "the worker has nothing else to run")

    for _ in range(2):
        with pytest.raises(UniqueViolation):
            asyncio.run(retry_stalled_jobs())
    let_the_worker_run_all_that_it_can()
    statuses = [get_job(connection, job_id)["status"] for job_id in (stalled, sibling, other)]
    assert statuses == ["doing", "todo", "doing"]

    connection.execute(SWEEP)
    let_the_worker_run_all_that_it_can()

    assert is_ended_as_duplicate(connection, stalled, of=sibling)
    assert [get_job(connection, job_id)["status"] for job_id in (sibling, other)] == ["succeeded", "succeeded"]


def test_on_duplicate_wait_leaves_the_stalled_job_until_its_sibling_has_started(connection: Connection) -> None:
    connection.execute("UPDATE procrastinate_stalled.rules SET on_duplicate = 'wait'")
    stalled = add_stalled_job(connection, lock="lock", queueing_lock="key")
    sibling = add_job(connection, "todo", queueing_lock="key")
    other = add_stalled_job(connection)

    connection.execute(SWEEP)

    assert is_untouched(connection, stalled)
    assert is_retried(connection, other)
    assert get_sweep(connection) == {"retried": 1, "failed": 0, "waiting": 1, "error": None}

    update_job(connection, sibling, status="doing", worker_id=add_worker(connection))
    connection.execute(SWEEP)

    assert is_retried(connection, stalled)


@each_sweep
def test_on_duplicate_wait_retries_the_first_of_several_stalled_jobs(
    sweep: LiteralString, connection: Connection
) -> None:
    connection.execute("UPDATE procrastinate_stalled.rules SET on_duplicate = 'wait'")
    first, second = [add_stalled_job(connection, queueing_lock="key") for _ in range(2)]

    connection.execute(sweep)

    assert is_retried(connection, first)
    assert is_untouched(connection, second)


@pytest.mark.parametrize("point", Point, ids=lambda point: point.name)
def test_a_sibling_deferred_while_a_sweep_is_on_its_way_costs_only_the_stalled_job_its_turn(
    point: Point, connect: Connect, connection: Connection
) -> None:
    add_points(connection)
    before = add_stalled_job(connection, task_name="pause")
    stalled = add_stalled_job(connection, queueing_lock="key")
    after = add_stalled_job(connection)

    with paused(connect, point) as sweep:
        (sibling,) = rows(connection, DEFER)
        sweep.resume()

    # One job at a time it is judged again, and the sibling seen.
    assert is_ended_as_duplicate(connection, stalled, of=sibling["id"])
    assert is_retried(connection, before, after)
    assert get_job(connection, sibling["id"])["status"] == "todo"
    assert get_sweep(connection) == {"retried": 2, "failed": 1, "waiting": 0, "error": None}


def test_a_sibling_deferred_in_the_last_moment_costs_the_stalled_job_its_turn_and_is_no_error(
    connect: Connect, connection: Connection
) -> None:
    add_points(connection)
    before = add_stalled_job(connection)
    stalled = add_stalled_job(connection, task_name="pause", queueing_lock="key")
    after = add_stalled_job(connection)

    with paused(connect, Point.WITHIN_UPDATE, "CALL procrastinate_stalled.sweep(batch_size => 1)") as sweep:
        (sibling,) = rows(connection, DEFER)
        sweep.resume()

    assert is_untouched(connection, stalled)
    assert is_retried(connection, before, after)
    assert get_sweep(connection) == {"retried": 2, "failed": 0, "waiting": 1, "error": None}

    connection.execute(SWEEP)

    assert is_ended_as_duplicate(connection, stalled, of=sibling["id"])


@pytest.mark.parametrize("committed", [True, False])
@each_sweep
def test_a_sweep_does_not_wait_for_a_sibling_that_is_being_deferred(
    sweep: LiteralString, committed: bool, connect: Connect, connection: Connection
) -> None:
    before = add_stalled_job(connection)
    stalled = add_stalled_job(connection, queueing_lock="key")
    after = add_stalled_job(connection)
    application = connect(autocommit=False)
    (sibling,) = rows(application, DEFER)

    # Twice the lock_timeout of 0.1 s, and some time for a busy machine.
    connection.execute("SET statement_timeout = '5s'")
    connection.execute(sweep)

    assert is_untouched(connection, stalled)
    assert is_retried(connection, before, after)
    assert get_sweep(connection) == {"retried": 2, "failed": 0, "waiting": 1, "error": None}

    application.commit() if committed else application.rollback()
    connection.execute(sweep)

    if committed:
        assert is_ended_as_duplicate(connection, stalled, of=sibling["id"])
    else:
        assert is_retried(connection, stalled)


def test_an_application_that_defers_and_then_waits_for_a_stalled_job_gets_it(
    connect: Connect, connection: Connection
) -> None:
    """It waits for a row of the batch, which waits for its queueing lock: it is the sweep that gives in."""
    first = add_stalled_job(connection)
    stalled = add_stalled_job(connection, queueing_lock="key")
    add_points(connection)
    update_job(connection, first, task_name="pause")
    application = connect(autocommit=False)

    with paused(connect, Point.WITHIN_UPDATE) as sweep:
        application.execute(DEFER)
        lock: LiteralString = "SELECT FROM procrastinate_jobs WHERE id = %s FOR UPDATE"
        with running(application, connection, lock, [first]) as waiting:
            waiting.wait_until_it_waits()
            sweep.resume()
            waiting.result()
    application.rollback()
    connection.execute(SWEEP)

    assert is_retried(connection, first, stalled)


SIBLING_LEAVES: dict[str, LiteralString] = {
    "cancelled": "SELECT procrastinate_cancel_job_v1(%(sibling)s, false, false)",
    "aborted": "SELECT procrastinate_cancel_job_v1(%(sibling)s, true, false)",
    "cancelled and deleted": "SELECT procrastinate_cancel_job_v1(%(sibling)s, false, true)",
    "deleted": "DELETE FROM procrastinate_jobs WHERE id = %(sibling)s",
    "fetched": "SELECT procrastinate_fetch_job_v2('{sibling}', %(worker)s)",
    "rekeyed": "UPDATE procrastinate_jobs SET queueing_lock = 'other' WHERE id = %(sibling)s",
}


@pytest.mark.parametrize("ending", ["commits before", "commits afterwards", "rolls back afterwards"])
@pytest.mark.parametrize("point", [Point.AFTER_JUDGEMENT, Point.AFTER_WORKER_LOCK], ids=lambda point: point.name)
@pytest.mark.parametrize("leaves", SIBLING_LEAVES)
def test_a_stalled_job_is_not_ended_as_the_duplicate_of_a_job_that_waits_no_more(
    leaves: str, point: Point, ending: str, connect: Connect, connection: Connection
) -> None:
    add_points(connection)
    before = add_stalled_job(connection, task_name="pause")
    stalled = add_stalled_job(connection, queueing_lock="key")
    after = add_stalled_job(connection)
    sibling = add_job(connection, "todo", queue_name="sibling", queueing_lock="key")
    other = connect(autocommit=False, options="-c lock_timeout=10s")

    with paused(connect, point) as sweep:
        other.execute(SIBLING_LEAVES[leaves], {"sibling": sibling, "worker": add_worker(connection)})
        if ending == "commits before":
            other.commit()
        sweep.resume()

    assert is_retried(connection, before, after)
    if ending == "commits before":
        # The sweep looks once more at those that it did not end.
        assert is_retried(connection, stalled)
        return
    assert is_untouched(connection, stalled)
    assert get_sweep(connection) == {"retried": 2, "failed": 0, "waiting": 1, "error": None}

    other.rollback() if ending == "rolls back afterwards" else other.commit()
    connection.execute(SWEEP)

    if ending == "rolls back afterwards":
        assert is_ended_as_duplicate(connection, stalled, of=sibling)
    else:
        assert is_retried(connection, stalled)


@pytest.mark.parametrize("leaves", [leaves for leaves in SIBLING_LEAVES if leaves != "fetched"])
def test_a_sibling_stays_where_it_is_until_the_job_that_was_ended_for_it_is_committed(
    leaves: str, connect: Connect, connection: Connection
) -> None:
    stalled = add_stalled_job(connection, queueing_lock="key")
    sibling = add_job(connection, "todo", queueing_lock="key")
    sweep = connect(autocommit=False)
    sweep.execute(RESCUE)

    with running(connect(), connection, SIBLING_LEAVES[leaves], {"sibling": sibling}) as waiting:
        waiting.wait_until_it_waits()
        sweep.rollback()
        waiting.result()

    assert is_untouched(connection, stalled)


def test_a_sibling_is_fetched_only_when_the_job_that_was_ended_for_it_is_committed(
    connect: Connect, connection: Connection
) -> None:
    stalled = add_stalled_job(connection, lock="lock", queueing_lock="key")
    sibling = add_job(connection, "todo", lock="lock", queueing_lock="key")
    fetch: LiteralString = "SELECT id FROM procrastinate_fetch_job_v2(NULL, %s)"
    worker = add_worker(connection)
    sweep = connect(autocommit=False)
    sweep.execute(RESCUE)

    assert rows(connection, fetch, worker) == [{"id": None}]
    sweep.commit()
    assert rows(connection, fetch, worker) == [{"id": sibling}]
    assert is_ended_as_duplicate(connection, stalled, of=sibling)


def test_a_stalled_job_is_retried_when_the_one_before_it_ends_by_itself(
    connect: Connect, connection: Connection
) -> None:
    add_points(connection)
    first, second = [add_stalled_job(connection, queueing_lock="key") for _ in range(2)]

    with paused(connect, Point.AFTER_JUDGEMENT) as sweep:
        connection.execute("SELECT procrastinate_finish_job_v1(%s, 'succeeded', false)", [first])
        sweep.resume()
    connection.execute(SWEEP)

    assert get_events(connection, first) == ["deferred", "started", "succeeded"]
    assert is_retried(connection, second)


@each_sweep
def test_a_stalled_job_is_retried_when_the_one_before_it_is_locked(
    sweep: LiteralString, connect: Connect, connection: Connection
) -> None:
    first, second = [add_stalled_job(connection, queueing_lock="key") for _ in range(2)]
    application = connect(autocommit=False)
    application.execute("SELECT FROM procrastinate_jobs WHERE id = %s FOR UPDATE", [first])

    connection.execute(sweep)

    assert is_untouched(connection, first)
    assert is_retried(connection, second)
    assert get_sweep(connection) == {"retried": 1, "failed": 0, "waiting": 1, "error": None}

    application.rollback()
    connection.execute(sweep)

    assert is_ended_as_duplicate(connection, first, of=second)


def test_a_sweep_does_not_wait_for_another_one_that_rescues_a_sibling(connect: Connect, connection: Connection) -> None:
    first = add_stalled_job(connection, queue_name="other", queueing_lock="key")
    stalled = add_stalled_job(connection, queueing_lock="key")
    after = add_stalled_job(connection)
    left_open = connect(autocommit=False)
    left_open.execute("SELECT procrastinate_stalled.retry_stalled_jobs('other')")

    connection.execute(SWEEP)

    assert is_retried(connection, after)
    assert is_untouched(connection, stalled)
    assert is_untouched(connection, first)

    left_open.commit()
    connection.execute(SWEEP)

    assert is_retried(connection, first)
    assert is_ended_as_duplicate(connection, stalled, of=first)


def test_two_rescues_that_want_each_other_s_queueing_locks_give_in(connect: Connect, connection: Connection) -> None:
    held = [add_stalled_job(connection, queue_name=name, queueing_lock=name) for name in ("one", "two")]
    wanted = [
        add_stalled_job(connection, queue_name="wants two", queueing_lock="two"),
        add_stalled_job(connection, queue_name="wants one", queueing_lock="one"),
    ]
    rescue: LiteralString = "SELECT procrastinate_stalled.retry_stalled_jobs(queue => %s)"
    one, two = connect(autocommit=False), connect(autocommit=False)
    one.execute(rescue, ["one"])
    two.execute(rescue, ["two"])

    with (
        running(one, connection, rescue, ["wants two"]) as of_one,
        running(two, connection, rescue, ["wants one"]) as of_two,
    ):
        assert of_one.result() == of_two.result() == []
    one.commit()
    two.commit()

    assert is_retried(connection, *held)
    assert all(is_untouched(connection, job_id) for job_id in wanted)


@pytest.mark.parametrize("committed", [True, False])
def test_an_application_defers_once_the_sweep_that_retries_a_sibling_has_ended(
    committed: bool, connect: Connect, connection: Connection
) -> None:
    stalled = add_stalled_job(connection, queueing_lock="key")
    sweep = connect(autocommit=False)
    sweep.execute(RESCUE)

    with running(connect(), connection, DEFER) as defer:
        defer.wait_until_it_waits()
        if committed:
            sweep.commit()
            with pytest.raises(psycopg.errors.UniqueViolation):  # which Procrastinate calls AlreadyEnqueued
                defer.result()
        else:
            sweep.rollback()
            defer.result()

    assert is_retried(connection, stalled) if committed else is_untouched(connection, stalled)
