"""Orphans: jobs in `doing` whose worker row is gone. Its loss has no date, so the clock starts when a sweep sees it."""

from datetime import timedelta

import pytest

from procrastinate_stalled import Stalled
from tests.jobs import (
    Connection,
    Row,
    add_job,
    add_orphan_note,
    add_rule,
    add_worker,
    contents,
    get_job,
    rows,
    update_job,
)
from tests.procrastinate_release import RETRY_AT_ONCE

HOUR = 3600


@pytest.fixture
def minute(transaction: Connection) -> Connection:
    """A transaction with one rule, whose heartbeat_timeout is one minute."""
    transaction.execute("DELETE FROM procrastinate_stalled.rules")
    add_rule(transaction, "minute", heartbeat_timeout="1 minute")
    return transaction


def sweep(connection: Connection) -> list[tuple[int, str]]:
    """Rescue what the rules call stalled; return ids and reasons. It takes no time."""
    rescues = Stalled(connection).retry_stalled_jobs()
    connection.execute("UPDATE procrastinate_stalled.orphans SET seen_at = now() WHERE seen_at > now()")
    return [(rescue.job_id, rescue.reason) for rescue in rescues]


def notes(connection: Connection) -> list[Row]:
    """What is known of orphans, and how long ago they were seen."""
    return rows(
        connection,
        "SELECT job_id, attempts, now() - seen_at AS ago FROM procrastinate_stalled.orphans ORDER BY job_id",
    )


def let_time_pass(connection: Connection, seconds: float) -> None:
    """Make what was noted older."""
    connection.execute(
        "UPDATE procrastinate_stalled.orphans SET seen_at = seen_at - make_interval(secs => %s)", [seconds]
    )


def test_a_sweep_notes_an_orphan_and_leaves_it(minute: Connection) -> None:
    job = add_job(minute, attempts=3, started_ago=HOUR)
    before = get_job(minute, job)

    assert sweep(minute) == []

    assert notes(minute) == [{"job_id": job, "attempts": 3, "ago": timedelta(0)}]
    assert get_job(minute, job) == before
    assert Stalled(minute).get_stalled_jobs() == []


def test_an_orphan_that_no_sweep_has_seen_is_not_stalled_ever_so_late(minute: Connection) -> None:
    add_job(minute, started_ago=10**9)
    assert Stalled(minute).get_stalled_jobs() == []


@pytest.mark.parametrize(("seconds", "stalled"), [(59.999999, False), (60, True), (60.000001, True)])
def test_an_orphan_is_stalled_heartbeat_timeout_after_the_first_sight(
    minute: Connection, seconds: float, *, stalled: bool
) -> None:
    job = add_job(minute, started_ago=HOUR)
    sweep(minute)
    let_time_pass(minute, seconds)
    assert sweep(minute) == ([(job, "orphaned")] if stalled else [])


def test_an_orphan_is_dated_from_the_first_sight(minute: Connection) -> None:
    add_job(minute)
    sweep(minute)
    let_time_pass(minute, 100)

    (job,) = Stalled(minute).get_stalled_jobs()

    (ago,) = rows(minute, "SELECT now() - interval '40 seconds' AS at")
    assert (job.reason, job.stalled_at, job.worker_id, job.last_heartbeat) == ("orphaned", ago["at"], None, None)


def test_later_sweeps_do_not_restart_the_clock(minute: Connection) -> None:
    job = add_job(minute)
    sweep(minute)
    let_time_pass(minute, 30)
    assert sweep(minute) == []
    let_time_pass(minute, 30)
    assert sweep(minute) == [(job, "orphaned")]


def test_each_orphan_has_its_own_clock_and_rule(minute: Connection) -> None:
    add_rule(minute, "hour", position=1, task_name="patient", heartbeat_timeout="1 hour")
    add_rule(minute, "never", position=1, task_name="never", heartbeat_timeout=None)
    first = add_job(minute)
    patient = add_job(minute, task_name="patient")
    add_job(minute, task_name="never")
    sweep(minute)
    let_time_pass(minute, 60)
    second = add_job(minute)
    assert sweep(minute) == [(first, "orphaned")]
    let_time_pass(minute, 60)
    assert sweep(minute) == [(second, "orphaned")]
    let_time_pass(minute, HOUR)
    assert sweep(minute) == [(patient, "orphaned")]


@pytest.mark.parametrize(
    "end",
    [
        "SELECT procrastinate_finish_job_v1(%s, 'succeeded', false)",
        "SELECT procrastinate_finish_job_v1(%s, 'failed', false)",
        "SELECT procrastinate_finish_job_v1(%s, 'failed', true)",
        RETRY_AT_ONCE,
        "SELECT procrastinate_stalled.retry_job(%s)",
        "DELETE FROM procrastinate_jobs WHERE id = %s",
    ],
)
def test_a_sweep_forgets_an_orphan_that_is_not_running_any_more(minute: Connection, end: str) -> None:
    job = add_job(minute)
    other = add_job(minute)
    sweep(minute)
    minute.execute(end, [job])
    sweep(minute)
    assert [note["job_id"] for note in notes(minute)] == [other]


@pytest.mark.parametrize("action", ["retry", "fail"])
def test_a_rescued_orphan_is_forgotten_by_the_next_sweep(minute: Connection, action: str) -> None:
    minute.execute("UPDATE procrastinate_stalled.rules SET action = %s", [action])
    job = add_job(minute)
    sweep(minute)
    let_time_pass(minute, 60)
    assert sweep(minute) == [(job, "orphaned")]
    assert sweep(minute) == []
    assert notes(minute) == []


def test_an_orphan_of_a_later_run_starts_anew(minute: Connection) -> None:
    job = add_job(minute, attempts=1)
    sweep(minute)
    let_time_pass(minute, HOUR)
    update_job(minute, job, attempts=2)

    assert Stalled(minute).get_stalled_jobs() == []
    assert sweep(minute) == []
    assert notes(minute) == [{"job_id": job, "attempts": 2, "ago": timedelta(0)}]


def test_an_orphan_is_dated_from_when_it_was_seen_not_from_the_start_of_a_long_transaction(minute: Connection) -> None:
    minute.execute("SELECT pg_sleep(0.1)")
    add_job(minute)
    Stalled(minute).retry_stalled_jobs()
    [note] = notes(minute)
    assert note["ago"] < timedelta(seconds=-0.1)


def test_an_orphan_that_was_seen_by_a_clock_that_was_ahead_is_dated_anew(minute: Connection) -> None:
    add_job(minute)
    sweep(minute)
    let_time_pass(minute, -HOUR)
    assert Stalled(minute).retry_stalled_jobs() == []
    [note] = notes(minute)
    assert timedelta(minutes=-1) < note["ago"] <= timedelta(0)


def test_a_job_that_has_a_worker_again_is_no_orphan(minute: Connection) -> None:
    job = add_job(minute)
    sweep(minute)
    let_time_pass(minute, HOUR)
    update_job(minute, job, worker_id=add_worker(minute))
    assert Stalled(minute).get_stalled_jobs() == []
    assert sweep(minute) == []
    assert notes(minute) == []


def test_only_jobs_in_doing_without_a_worker_are_noted(minute: Connection) -> None:
    add_job(minute, worker_id=add_worker(minute))
    for status in ("todo", "succeeded", "failed", "cancelled", "aborting", "aborted"):
        add_job(minute, status)
    orphan = add_job(minute)
    sweep(minute)
    assert [note["job_id"] for note in notes(minute)] == [orphan]


def test_a_silent_worker_that_is_pruned_gives_its_jobs_a_new_term(minute: Connection) -> None:
    job = add_job(minute, worker_id=add_worker(minute, silent_for=59))
    minute.execute("SELECT procrastinate_prune_stalled_workers_v1(30)")
    assert get_job(minute, job)["worker_id"] is None
    assert sweep(minute) == []
    let_time_pass(minute, 59)
    assert sweep(minute) == []
    let_time_pass(minute, 1)
    assert sweep(minute) == [(job, "orphaned")]


def test_run_timeout_takes_an_orphan_at_once(minute: Connection) -> None:
    minute.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '1 hour'")
    job = add_job(minute, started_ago=HOUR)
    assert sweep(minute) == [(job, "run_timeout")]


def test_of_both_clocks_of_an_orphan_the_one_that_ended_first_counts(minute: Connection) -> None:
    minute.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '1 hour'")
    orphaned_first = add_job(minute, started_ago=HOUR + 30)
    add_orphan_note(minute, orphaned_first, attempts=0, seen_ago=100)
    late_first = add_job(minute, started_ago=HOUR + 30)
    add_orphan_note(minute, late_first, attempts=0, seen_ago=80)
    assert sweep(minute) == [(orphaned_first, "orphaned"), (late_first, "run_timeout")]


def test_an_orphan_asked_for_by_seconds_does_not_wait(minute: Connection) -> None:
    job = add_job(minute)
    assert [stalled.id for stalled in Stalled(minute).get_stalled_jobs(seconds_since_heartbeat=HOUR)] == [job]
    (rescue,) = Stalled(minute).retry_stalled_jobs(seconds_since_heartbeat=HOUR)
    assert (rescue.job_id, rescue.reason, rescue.worker_id, rescue.last_heartbeat) == (job, "orphaned", None, None)


def test_a_dry_run_notes_nothing(minute: Connection) -> None:
    add_job(minute)
    Stalled(minute).retry_stalled_jobs(dry_run=True)
    assert notes(minute) == []


def test_the_procedure_notes_waits_and_rescues(connection: Connection) -> None:
    job = add_job(connection, started_ago=HOUR)
    stalled = Stalled(connection)

    stalled.sweep()
    assert [note["job_id"] for note in notes(connection)] == [job]
    assert get_job(connection, job)["status"] == "doing"
    before = contents(connection)["procrastinate_stalled.orphans"]
    stalled.sweep()
    assert contents(connection)["procrastinate_stalled.orphans"] == before

    let_time_pass(connection, 300)
    stalled.sweep()
    assert get_job(connection, job)["status"] == "todo"
    stalled.sweep()
    assert notes(connection) == []
