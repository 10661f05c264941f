"""The rules: which jobs they match, when a job is stalled, what is done then; and the checks of the user's tables.

`retry_stalled_jobs` stands for the sweep: it does the same in one transaction, in which `now()` stands still.
"""

from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.errors import CheckViolation, NotNullViolation, UniqueViolation
from psycopg.types.json import Jsonb

from procrastinate_stalled import Rescue, Stalled, StalledJob
from tests.jobs import (
    Connection,
    add_event,
    add_job,
    add_orphan_note,
    add_rule,
    add_stalled_job,
    add_worker,
    contents,
    get_events,
    get_job,
    insert,
    rows,
    update_job,
)
from tests.procrastinate_release import RETRY_AT_ONCE, needs_retry_of_failed_jobs
from tests.random_databases import with_examples
from tests.server import PROJECT

HOUR = 3600


@pytest.fixture
def no_rules(transaction: Connection) -> Connection:
    """A transaction in which there is no rule yet."""
    transaction.execute("DELETE FROM procrastinate_stalled.rules")
    return transaction


def sweep(connection: Connection) -> list[Rescue]:
    """Rescue what the rules call stalled."""
    return Stalled(connection).retry_stalled_jobs()


def judge(connection: Connection) -> StalledJob:
    """Return the one job that is stalled."""
    (job,) = Stalled(connection).get_stalled_jobs()
    return job


def is_stalled(connection: Connection) -> bool:
    """Whether any job is stalled."""
    return Stalled(connection).get_stalled_jobs() != []


def now(connection: Connection) -> datetime:
    """Tell the time of the transaction."""
    (row,) = rows(connection, "SELECT now()")
    at: datetime = row["now"]
    return at


def lose_again(connection: Connection, job_id: int) -> None:
    """Let a worker fetch a job by Procrastinate's own function, and fall silent."""
    update_job(connection, job_id, scheduled_at=None)
    (fetched,) = rows(
        connection, "SELECT id FROM procrastinate_fetch_job_v2(NULL, %s)", add_worker(connection, silent_for=HOUR)
    )
    assert fetched["id"] == job_id


# Which jobs a rule matches


@pytest.mark.parametrize(
    ("rule", "job", "matches"),
    [
        (None, "mail", True),
        ("mail", "mail", True),
        ("mail", "Mail", False),
        ("mail", "mails", False),
        ("mail", "mail ", False),
        ("m_il", "mail", False),
        ("%", "mail", False),
        ("", "mail", False),
        ("ü" * 128, "ü" * 128, True),
    ],
)
def test_queue_name_matches_the_same_queue_only(
    no_rules: Connection, rule: str | None, job: str, *, matches: bool
) -> None:
    add_rule(no_rules, "r", queue_name=rule)
    add_stalled_job(no_rules, queue_name=job)
    assert is_stalled(no_rules) == matches


@pytest.mark.parametrize(
    ("rule", "job", "matches"),
    [
        (None, "billing.send", True),
        ("billing.send", "billing.send", True),
        ("billing.send", "billing.send_all", False),
        ("billing.send", "xbilling.send", False),
        ("billing.%", "billing.send", True),
        ("billing.%", "billing.", True),
        ("billing.%", "billing", False),
        ("billing.%", "billingXsend", False),
        ("%.send", "billing.send", True),
        ("Billing.%", "billing.send", False),
        ("%", "billing\nsend", True),
        ("", "billing", False),
        ("a_b", "axb", True),
        ("a_b", "a_b", True),
        ("a_b", "ab", False),
        (r"a\_b", "a_b", True),
        (r"a\_b", "axb", False),
        (r"100\%", "100%", True),
        (r"100\%", "1000", False),
        (r"a\\", "a\\", True),
        (r"a\\b", "a\\b", True),
        (r"\a", "a", True),
        ("a.b", "axb", False),
        ("[ab]", "a", False),
    ],
)
def test_task_name_is_a_like_pattern(no_rules: Connection, rule: str | None, job: str, *, matches: bool) -> None:
    add_rule(no_rules, "r", task_name=rule)
    add_stalled_job(no_rules, task_name=job)
    assert is_stalled(no_rules) == matches


@pytest.mark.parametrize(
    ("rule", "job", "matches"),
    [
        (None, {}, True),
        ({}, {}, True),
        ({}, {"a": 1}, True),
        ({"a": 1}, {}, False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ({"a": 1}, {"a": "1"}, False),
        ({"a": None}, {"a": None}, True),
        ({"a": None}, {}, False),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, True),
        ({"a": {"b": 1}}, {"b": 1}, False),
        ({"a": [2]}, {"a": [1, 2]}, True),
        ({"a": [3]}, {"a": [1, 2]}, False),
    ],
)
def test_args_must_be_contained_in_those_of_the_job(
    no_rules: Connection, rule: dict[str, Any] | None, job: dict[str, Any], *, matches: bool
) -> None:
    add_rule(no_rules, "r", args=rule)
    add_stalled_job(no_rules, args=job)
    assert is_stalled(no_rules) == matches


def test_every_condition_of_a_rule_must_hold(no_rules: Connection) -> None:
    add_rule(no_rules, "r", queue_name="mail", task_name="send", args={"a": 1})
    job = add_stalled_job(no_rules, queue_name="mail", task_name="send", args={"a": 1})
    add_stalled_job(no_rules, queue_name="default", task_name="send", args={"a": 1})
    add_stalled_job(no_rules, queue_name="mail", task_name="receive", args={"a": 1})
    add_stalled_job(no_rules, queue_name="mail", task_name="send", args={"a": 2})
    assert judge(no_rules).id == job


def test_a_rule_that_is_not_enabled_matches_nothing(no_rules: Connection) -> None:
    add_rule(no_rules, "off", enabled=False, action="fail")
    add_stalled_job(no_rules)
    assert not is_stalled(no_rules)
    add_rule(no_rules, "on", position=101)
    assert judge(no_rules).rule_name == "on"


@pytest.mark.parametrize(
    ("after", "matches"), [("-1 day", False), ("0", False), ("0.000001 seconds", True), ("1 day", True)]
)
def test_a_rule_is_void_from_expires_at_on(no_rules: Connection, after: str, *, matches: bool) -> None:
    add_rule(no_rules, "r")
    add_stalled_job(no_rules)
    no_rules.execute("UPDATE procrastinate_stalled.rules SET expires_at = now() + %s::interval", [after])
    assert is_stalled(no_rules) == matches


def test_the_lowest_position_wins_whatever_the_names(no_rules: Connection) -> None:
    add_rule(no_rules, "a", position=1)
    add_rule(no_rules, "z", position=-1)
    add_rule(no_rules, "b", position=0)
    add_stalled_job(no_rules)
    assert judge(no_rules).rule_name == "z"


def test_of_equal_positions_the_first_name_wins_whatever_the_order_of_writing(no_rules: Connection) -> None:
    for name in ("b", "a", "c"):
        add_rule(no_rules, name)
    add_stalled_job(no_rules)
    assert judge(no_rules).rule_name == "a"


def test_a_job_obeys_its_first_rule_only(no_rules: Connection) -> None:
    add_rule(no_rules, "patient", position=1, heartbeat_timeout="1 day")
    add_rule(no_rules, "strict", position=2, heartbeat_timeout="1 second", run_timeout="1 second")
    add_stalled_job(no_rules, started_ago=HOUR)
    assert not is_stalled(no_rules)


def test_a_rule_in_front_that_does_not_match_does_not_matter(no_rules: Connection) -> None:
    add_rule(no_rules, "other", position=1, task_name="other", action="ignore")
    add_rule(no_rules, "this", position=2)
    add_stalled_job(no_rules)
    assert judge(no_rules).rule_name == "this"


def test_without_any_rule_no_job_is_touched(no_rules: Connection) -> None:
    job = add_stalled_job(no_rules, started_ago=HOUR, abort_requested=True)
    add_orphan_note(no_rules, add_job(no_rules), 0, HOUR)
    before = get_job(no_rules, job)

    assert not is_stalled(no_rules)
    assert sweep(no_rules) == []
    assert Stalled(no_rules).retry_stalled_jobs(seconds_since_heartbeat=1) == []
    assert Stalled(no_rules).retry_stalled_jobs(nb_seconds=1) == []
    assert get_job(no_rules, job) == before


# When a job is stalled


@pytest.mark.parametrize(("silent_for", "stalled"), [(59.999999, False), (60, True), (60.000001, True), (-60, False)])
def test_a_worker_may_be_silent_for_less_than_heartbeat_timeout(
    no_rules: Connection, silent_for: float, *, stalled: bool
) -> None:
    add_rule(no_rules, "r", heartbeat_timeout="1 minute")
    add_stalled_job(no_rules, silent_for=silent_for, started_ago=HOUR)
    assert is_stalled(no_rules) == stalled


def test_a_silent_worker_is_named_as_the_reason(no_rules: Connection) -> None:
    add_rule(no_rules, "r", heartbeat_timeout="1 minute")
    worker = add_worker(no_rules, silent_for=100)
    add_job(no_rules, worker_id=worker)
    job = judge(no_rules)
    assert (job.reason, job.worker_id) == ("heartbeat", worker)
    assert job.last_heartbeat == now(no_rules) - timedelta(seconds=100)
    assert job.stalled_at == now(no_rules) - timedelta(seconds=40)


def test_without_heartbeat_timeout_silence_never_counts(no_rules: Connection) -> None:
    add_rule(no_rules, "r", heartbeat_timeout=None)
    add_stalled_job(no_rules, silent_for=10**9, started_ago=10**9)
    add_orphan_note(no_rules, add_job(no_rules, started_ago=10**9), 0, 10**9)
    assert not is_stalled(no_rules)


@pytest.mark.parametrize(("started_ago", "stalled"), [(59.999999, False), (60, True), (60.000001, True)])
def test_a_job_may_run_for_less_than_run_timeout_whatever_its_worker_says(
    no_rules: Connection, started_ago: float, *, stalled: bool
) -> None:
    add_rule(no_rules, "r", run_timeout="1 minute")
    add_stalled_job(no_rules, silent_for=0, started_ago=started_ago)
    assert is_stalled(no_rules) == stalled


def test_run_timeout_counts_from_the_last_start(no_rules: Connection) -> None:
    add_rule(no_rules, "r", run_timeout="1 minute")
    job = add_stalled_job(no_rules, silent_for=0, started_ago=100)
    add_event(no_rules, job, "started", ago=HOUR)
    stalled = judge(no_rules)
    assert (stalled.reason, stalled.stalled_at) == ("run_timeout", now(no_rules) - timedelta(seconds=40))
    add_event(no_rules, job, "started", ago=30)
    assert not is_stalled(no_rules)


def test_without_a_started_event_run_timeout_never_counts(no_rules: Connection) -> None:
    add_rule(no_rules, "r", run_timeout="1 minute")
    job = add_stalled_job(no_rules, silent_for=0, started_ago=HOUR)
    no_rules.execute("DELETE FROM procrastinate_events WHERE job_id = %s AND type = 'started'", [job])
    assert not is_stalled(no_rules)


@pytest.mark.parametrize(
    ("silent_for", "started_ago", "reason", "since"),
    [
        (400, 300, "heartbeat", 340),
        (200, 500, "run_timeout", 380),
        (0, 500, "run_timeout", 380),
        (400, 0, "heartbeat", 340),
        (100, 160, "run_timeout", 40),  # both at the same moment
    ],
)
def test_of_both_timeouts_the_one_that_ended_first_counts(
    no_rules: Connection, silent_for: float, started_ago: float, reason: str, since: float
) -> None:
    add_rule(no_rules, "r", heartbeat_timeout="60 seconds", run_timeout="120 seconds")
    add_stalled_job(no_rules, silent_for=silent_for, started_ago=started_ago)
    job = judge(no_rules)
    assert (job.reason, job.stalled_at) == (reason, now(no_rules) - timedelta(seconds=since))


# What is done then


def test_action_retry_puts_the_job_back(no_rules: Connection) -> None:
    add_rule(no_rules, "r")
    worker = add_worker(no_rules, silent_for=HOUR)
    job = add_job(
        no_rules,
        worker_id=worker,
        started_ago=2 * HOUR,
        args={"a": 1},
        priority=3,
        queueing_lock="k",
        attempts=5,
        scheduled_at="yesterday",
    )
    before = get_job(no_rules, job)

    (rescue,) = sweep(no_rules)

    assert get_job(no_rules, job) == before | {"status": "todo", "worker_id": None, "attempts": 6, "scheduled_at": None}
    assert get_events(no_rules, job) == ["deferred", "started", "deferred_for_retry"]
    (row,) = rows(no_rules, "SELECT * FROM procrastinate_stalled.rescues")
    assert {name: getattr(rescue, name) for name in row} == row
    assert row == {
        "id": row["id"],
        "rescued_at": now(no_rules),
        "job_id": job,
        "queue_name": "default",
        "task_name": "task",
        "action": "retried",
        "reason": "heartbeat",
        "detail": None,
        "rule_name": "r",
        "worker_id": worker,
        "last_heartbeat": now(no_rules) - timedelta(hours=1),
        "started_at": now(no_rules) - timedelta(hours=2),
        "attempts": 5,
        "scheduled_at": None,
        "rescued_by": "postgres",
    }


def test_action_fail_ends_the_job(no_rules: Connection) -> None:
    add_rule(no_rules, "r", action="fail", retry_delay="1 hour", retry_queue_name="other", retry_priority=9)
    job = add_stalled_job(no_rules, attempts=5, scheduled_at="yesterday", lock="l", queueing_lock="k")
    add_job(no_rules, "todo", queueing_lock="k")
    before = get_job(no_rules, job)

    (rescue,) = sweep(no_rules)

    assert get_job(no_rules, job) == before | {"status": "failed", "worker_id": None}
    assert get_events(no_rules, job) == ["deferred", "started", "failed"]
    assert (rescue.action, rescue.detail, rescue.attempts, rescue.scheduled_at) == ("failed", "rule", 5, None)


def test_action_ignore_protects_the_job(no_rules: Connection) -> None:
    add_rule(no_rules, "r", action="ignore", run_timeout="1 minute", max_rescues=0)
    job = add_stalled_job(no_rules, started_ago=HOUR, abort_requested=True)
    before = get_job(no_rules, job)

    assert not is_stalled(no_rules)
    assert sweep(no_rules) == []
    assert Stalled(no_rules).retry_stalled_jobs(seconds_since_heartbeat=1) == []
    assert Stalled(no_rules).retry_stalled_jobs(nb_seconds=1) == []
    assert get_job(no_rules, job) == before


@pytest.mark.parametrize("rule", [{}, {"action": "fail"}, {"max_rescues": 0}, {"on_duplicate": "wait"}])
def test_a_job_whose_abort_was_requested_is_aborted(no_rules: Connection, rule: dict[str, Any]) -> None:
    add_rule(no_rules, "r", **rule)
    job = add_stalled_job(no_rules, attempts=5, abort_requested=True, queueing_lock="k")
    add_job(no_rules, "todo", queueing_lock="k")
    before = get_job(no_rules, job)

    (rescue,) = sweep(no_rules)

    assert get_job(no_rules, job) == before | {"status": "aborted", "abort_requested": False, "worker_id": None}
    assert get_events(no_rules, job) == ["deferred", "started", "abort_requested", "aborted"]
    assert (rescue.action, rescue.detail, rescue.attempts) == ("aborted", "abort requested", 5)


# max_rescues


def test_after_max_rescues_a_job_is_failed(no_rules: Connection) -> None:
    add_rule(no_rules, "r", max_rescues=2)
    job = add_stalled_job(no_rules)
    actions = []
    for _ in range(3):
        actions += [(rescue.action, rescue.detail, rescue.attempts) for rescue in sweep(no_rules)]
        if get_job(no_rules, job)["status"] == "todo":
            lose_again(no_rules, job)

    assert actions == [("retried", None, 0), ("retried", None, 1), ("failed", "max_rescues", 2)]
    assert get_job(no_rules, job)["status"] == "failed"
    assert get_events(no_rules, job) == ["deferred", *["started", "deferred_for_retry"] * 2, "started", "failed"]


def test_with_max_rescues_0_a_job_is_failed_at_once(no_rules: Connection) -> None:
    add_rule(no_rules, "r", max_rescues=0)
    add_stalled_job(no_rules)
    job = judge(no_rules)
    assert (job.action, job.detail) == ("fail", "max_rescues")


def test_without_max_rescues_there_is_no_limit(no_rules: Connection) -> None:
    add_rule(no_rules, "r", max_rescues=None)
    job = add_stalled_job(no_rules)
    for _ in range(5):
        sweep(no_rules)
        lose_again(no_rules, job)
    assert judge(no_rules).action == "retry"


def test_retries_of_other_jobs_do_not_count_towards_max_rescues(no_rules: Connection) -> None:
    add_rule(no_rules, "r", max_rescues=1)
    for _ in range(3):
        add_stalled_job(no_rules)
    sweep(no_rules)
    add_stalled_job(no_rules, attempts=3)
    assert judge(no_rules).action == "retry"


@needs_retry_of_failed_jobs
def test_ends_of_the_same_job_do_not_count_towards_max_rescues(no_rules: Connection) -> None:
    add_rule(no_rules, "end", action="fail")
    job = add_stalled_job(no_rules)
    assert [rescue.action for rescue in sweep(no_rules)] == ["failed"]
    no_rules.execute(RETRY_AT_ONCE, [job])
    lose_again(no_rules, job)
    add_rule(no_rules, "retry", position=1, max_rescues=1)
    assert judge(no_rules).action == "retry"


def test_retries_by_hand_do_not_count_towards_max_rescues(no_rules: Connection) -> None:
    add_rule(no_rules, "r", max_rescues=1)
    job = add_stalled_job(no_rules)
    for _ in range(3):
        Stalled(no_rules).retry_job(job)
        lose_again(no_rules, job)
    assert judge(no_rules).action == "retry"


def test_retries_by_the_task_itself_do_not_count_towards_max_rescues(no_rules: Connection) -> None:
    add_rule(no_rules, "r", max_rescues=1)
    job = add_stalled_job(no_rules)
    for _ in range(3):
        no_rules.execute(RETRY_AT_ONCE, [job])
        lose_again(no_rules, job)
    assert judge(no_rules).action == "retry"


def test_retries_under_another_rule_count_towards_max_rescues(no_rules: Connection) -> None:
    add_rule(no_rules, "old", max_rescues=1)
    job = add_stalled_job(no_rules)
    sweep(no_rules)
    lose_again(no_rules, job)
    add_rule(no_rules, "new", position=1, max_rescues=1)
    assert (judge(no_rules).rule_name, judge(no_rules).action) == ("new", "fail")


def test_retries_with_seconds_count_towards_max_rescues(no_rules: Connection) -> None:
    add_rule(no_rules, "r", max_rescues=1)
    job = add_stalled_job(no_rules)
    Stalled(no_rules).retry_stalled_jobs(seconds_since_heartbeat=30)
    lose_again(no_rules, job)
    assert judge(no_rules).action == "fail"


def make_procrastinate_anew(connection: Connection) -> None:
    """Empty Procrastinate's tables, so that the next job is job 1 again, of which there are three rescues."""
    for attempts in range(3):
        insert(
            connection,
            "rescues",
            rescued_at="yesterday",
            job_id=1,
            queue_name="default",
            task_name="task",
            action="retried",
            reason="heartbeat",
            attempts=attempts,
        )
    connection.execute("TRUNCATE procrastinate_jobs RESTART IDENTITY CASCADE")


def test_rescues_of_another_job_that_had_the_same_id_do_not_count_towards_max_rescues(no_rules: Connection) -> None:
    add_rule(no_rules, "r", max_rescues=2)
    make_procrastinate_anew(no_rules)
    job = add_stalled_job(no_rules)
    assert job == 1

    actions = []
    for _ in range(3):
        actions += [rescue.action for rescue in sweep(no_rules)]
        if get_job(no_rules, job)["status"] == "todo":
            lose_again(no_rules, job)

    assert actions == ["retried", "retried", "failed"]


def test_nor_do_they_when_the_new_job_has_been_retried_by_itself(no_rules: Connection) -> None:
    add_rule(no_rules, "r", max_rescues=2)
    make_procrastinate_anew(no_rules)
    job = add_stalled_job(no_rules)
    for _ in range(3):
        no_rules.execute(RETRY_AT_ONCE, [job])
        lose_again(no_rules, job)
    assert judge(no_rules).action == "retry"


# The delay of the retry


def scheduled_after(connection: Connection) -> timedelta | None:
    """Sweep the one stalled job; return how long its retry has to wait."""
    planned = judge(connection).retry_at
    (rescue,) = sweep(connection)
    scheduled_at = get_job(connection, rescue.job_id)["scheduled_at"]
    assert rescue.scheduled_at == scheduled_at == planned
    return None if scheduled_at is None else scheduled_at - now(connection)


@pytest.mark.parametrize(
    ("rule", "waits"),
    [
        ({}, [None, None, None]),
        ({"retry_delay": "10 seconds"}, [10, 20, 40, 80, 160]),
        ({"retry_delay": "10 seconds", "retry_backoff": 1}, [10, 10, 10, 10]),
        ({"retry_delay": "4 seconds", "retry_backoff": 1.5}, [4, 6, 9, 13.5, 20.25]),
        ({"retry_delay": "1 second", "retry_backoff": 1000}, [1, 1000, 86400, 86400]),
        ({"retry_delay": "13 hours"}, [13 * HOUR, 86400, 86400]),
        ({"retry_delay": "1 day"}, [86400, 86400]),
        ({"retry_delay": "1 microsecond", "retry_backoff": 10}, [0.000001, 0.00001, 0.0001]),
    ],
)
def test_each_retry_waits_longer_up_to_a_day(
    no_rules: Connection, rule: dict[str, Any], waits: list[float | None]
) -> None:
    add_rule(no_rules, "r", max_rescues=None, **rule)
    job = add_stalled_job(no_rules)
    for wait in waits:
        assert scheduled_after(no_rules) == (None if wait is None else timedelta(seconds=wait))
        lose_again(no_rules, job)


def test_after_ever_so_many_rescues_the_wait_is_a_day(no_rules: Connection) -> None:
    add_rule(no_rules, "r", max_rescues=None, retry_delay="1 microsecond", retry_backoff=1000)
    job = add_stalled_job(no_rules, attempts=10_000)
    no_rules.execute(
        """
        INSERT INTO procrastinate_stalled.rescues (job_id, queue_name, task_name, action, reason, attempts)
        SELECT %s, 'q', 't', 'retried', 'heartbeat', generate_series(0, 9999)
        """,
        [job],
    )
    assert scheduled_after(no_rules) == timedelta(days=1)


def test_retries_by_hand_do_not_make_the_next_one_wait_longer(no_rules: Connection) -> None:
    add_rule(no_rules, "r", retry_delay="10 seconds")
    job = add_stalled_job(no_rules)
    Stalled(no_rules).retry_job(job)
    lose_again(no_rules, job)
    assert scheduled_after(no_rules) == timedelta(seconds=10)


def test_a_delayed_retry_gets_its_scheduled_event(no_rules: Connection) -> None:
    add_rule(no_rules, "r", retry_delay="10 seconds")
    job = add_stalled_job(no_rules)
    sweep(no_rules)
    assert sorted(get_events(no_rules, job)) == ["deferred", "deferred_for_retry", "scheduled", "started"]


def test_a_job_with_a_lock_is_retried_at_once(no_rules: Connection) -> None:
    add_rule(no_rules, "r", retry_delay="10 seconds")
    add_stalled_job(no_rules, lock="l", scheduled_at="yesterday")
    assert scheduled_after(no_rules) is None


# Where the retry goes


@pytest.mark.parametrize(
    ("rule", "queue_name", "priority"),
    [
        ({}, "default", 5),
        ({"retry_queue_name": "slow"}, "slow", 5),
        ({"retry_queue_name": "ü" * 128}, "ü" * 128, 5),
        ({"retry_priority": 0}, "default", 0),
        ({"retry_priority": -(2**31)}, "default", -(2**31)),
        ({"retry_queue_name": "slow", "retry_priority": 2**31 - 1}, "slow", 2**31 - 1),
    ],
)
def test_the_retry_goes_to_the_queue_and_the_priority_of_the_rule(
    no_rules: Connection, rule: dict[str, Any], queue_name: str, priority: int
) -> None:
    add_rule(no_rules, "r", **rule)
    job = add_stalled_job(no_rules, priority=5)
    (rescue,) = sweep(no_rules)
    row = get_job(no_rules, job)
    assert (row["queue_name"], row["priority"], rescue.queue_name) == (queue_name, priority, "default")


@pytest.mark.parametrize("ended", [{"abort_requested": True}, {"queueing_lock": "k"}])
def test_a_job_that_is_not_retried_stays_in_its_queue(no_rules: Connection, ended: dict[str, Any]) -> None:
    add_rule(no_rules, "r", retry_queue_name="slow", retry_priority=9, retry_delay="1 hour")
    add_job(no_rules, "todo", queueing_lock="k")
    job = add_stalled_job(no_rules, **ended)
    sweep(no_rules)
    row = get_job(no_rules, job)
    assert (row["queue_name"], row["priority"], row["scheduled_at"]) == ("default", 0, None)


# Queueing locks


def test_on_duplicate_fail_ends_the_stalled_job(no_rules: Connection) -> None:
    add_rule(no_rules, "r")
    waiting = add_job(no_rules, "todo", queueing_lock="k")
    job = add_stalled_job(no_rules, queueing_lock="k")
    other = add_stalled_job(no_rules, queueing_lock="other")
    untouched = get_job(no_rules, waiting)

    planned = Stalled(no_rules).get_stalled_jobs()
    rescues = sweep(no_rules)

    assert [(stalled.id, stalled.action, stalled.duplicate_of) for stalled in planned] == [
        (job, "fail", waiting),
        (other, "retry", None),
    ]
    assert [(rescue.job_id, rescue.action, rescue.detail) for rescue in rescues] == [
        (job, "failed", f"duplicate of job {waiting}"),
        (other, "retried", None),
    ]
    assert get_job(no_rules, job)["status"] == "failed"
    assert get_job(no_rules, waiting) == untouched


def test_on_duplicate_wait_leaves_the_stalled_job_until_the_other_one_is_gone(no_rules: Connection) -> None:
    add_rule(no_rules, "r", on_duplicate="wait")
    waiting = add_job(no_rules, "todo", queueing_lock="k")
    job = add_stalled_job(no_rules, queueing_lock="k")
    before = get_job(no_rules, job)

    stalled = judge(no_rules)
    assert (stalled.action, stalled.duplicate_of) == ("wait", waiting)
    assert stalled.detail == f"duplicate of job {waiting}"
    assert sweep(no_rules) == []
    assert get_job(no_rules, job) == before
    (sweep_row,) = rows(no_rules, "SELECT * FROM procrastinate_stalled.sweeps")
    assert (sweep_row["doing"], sweep_row["waiting"]) == (1, 1)

    no_rules.execute("SELECT procrastinate_cancel_job_v1(%s, false, false)", [waiting])
    assert [(rescue.job_id, rescue.action) for rescue in sweep(no_rules)] == [(job, "retried")]


def test_on_duplicate_wait_ends_the_stalled_job_that_the_other_one_waits_for(no_rules: Connection) -> None:
    add_rule(no_rules, "r", on_duplicate="wait")
    waiting = add_job(no_rules, "todo", queueing_lock="k", lock="l")
    job = add_stalled_job(no_rules, queueing_lock="k", lock="l")

    (rescue,) = sweep(no_rules)

    assert (rescue.job_id, rescue.action, rescue.detail) == (job, "failed", f"duplicate of job {waiting}")
    (fetched,) = rows(no_rules, "SELECT id FROM procrastinate_fetch_job_v2(NULL, %s)", add_worker(no_rules))
    assert fetched["id"] == waiting


@pytest.mark.parametrize(("waiting_lock", "stalled_lock"), [(None, "l"), ("l", None), ("m", "l"), (None, None)])
def test_on_duplicate_wait_waits_for_a_job_with_another_lock(
    no_rules: Connection, waiting_lock: str | None, stalled_lock: str | None
) -> None:
    add_rule(no_rules, "r", on_duplicate="wait")
    add_job(no_rules, "todo", queueing_lock="k", lock=waiting_lock)
    add_stalled_job(no_rules, queueing_lock="k", lock=stalled_lock)
    assert judge(no_rules).action == "wait"


@pytest.mark.parametrize("status", ["doing", "succeeded", "failed", "cancelled", "aborted"])
def test_a_job_that_does_not_wait_is_no_duplicate(no_rules: Connection, status: str) -> None:
    add_rule(no_rules, "r")
    add_job(no_rules, status, worker_id=add_worker(no_rules), queueing_lock="k")
    add_stalled_job(no_rules, queueing_lock="k")
    assert judge(no_rules).action == "retry"


def test_of_several_stalled_jobs_with_one_queueing_lock_the_first_is_retried(no_rules: Connection) -> None:
    add_rule(no_rules, "wait", position=1, task_name="wait", on_duplicate="wait")
    add_rule(no_rules, "fail", position=2)
    first, second = (add_stalled_job(no_rules, queueing_lock="k") for _ in range(2))
    third = add_stalled_job(no_rules, queueing_lock="k", task_name="wait")

    planned = Stalled(no_rules).get_stalled_jobs()
    rescues = sweep(no_rules)

    assert [(stalled.id, stalled.action, stalled.duplicate_of) for stalled in planned] == [
        (first, "retry", None),
        (second, "fail", first),
        (third, "wait", first),
    ]
    assert [(rescue.job_id, rescue.action, rescue.detail) for rescue in rescues] == [
        (first, "retried", None),
        (second, "failed", f"duplicate of job {first}"),
    ]
    assert [get_job(no_rules, job)["status"] for job in (first, second, third)] == ["todo", "failed", "doing"]


def test_a_job_that_will_not_be_retried_does_not_take_the_queueing_lock(no_rules: Connection) -> None:
    add_rule(no_rules, "end", position=1, task_name="end", action="fail")
    add_rule(no_rules, "retry", position=2)
    add_stalled_job(no_rules, queueing_lock="k", task_name="end")
    add_stalled_job(no_rules, queueing_lock="k", abort_requested=True)
    add_stalled_job(no_rules, queueing_lock="k")
    assert [job.action for job in Stalled(no_rules).get_stalled_jobs()] == ["fail", "abort", "retry"]
    assert [rescue.action for rescue in sweep(no_rules)] == ["failed", "aborted", "retried"]


@pytest.mark.parametrize("waiting", ["l", "K", "k ", "k1", "j", "", "ḱ"])
def test_a_similar_queueing_lock_is_not_the_same(no_rules: Connection, waiting: str) -> None:
    add_rule(no_rules, "r")
    add_job(no_rules, "todo", queueing_lock=waiting)
    add_stalled_job(no_rules, queueing_lock="k")
    assert judge(no_rules).action == "retry"
    assert [rescue.action for rescue in sweep(no_rules)] == ["retried"]


def test_an_empty_queueing_lock_is_a_queueing_lock(no_rules: Connection) -> None:
    add_rule(no_rules, "r")
    waiting = add_job(no_rules, "todo", queueing_lock="")
    add_stalled_job(no_rules, queueing_lock="")
    assert judge(no_rules).duplicate_of == waiting


# The rule of the install


def test_the_install_makes_one_rule_behind_all_others(transaction: Connection) -> None:
    (rule,) = rows(transaction, "SELECT * FROM procrastinate_stalled.rules")
    assert rule == {
        "name": "default",
        "position": 2**31 - 1,
        "enabled": True,
        "expires_at": None,
        "queue_name": None,
        "task_name": None,
        "args": None,
        "heartbeat_timeout": timedelta(minutes=5),
        "run_timeout": None,
        "action": "retry",
        "max_rescues": 3,
        "retry_delay": timedelta(0),
        "retry_backoff": 2,
        "retry_queue_name": None,
        "retry_priority": None,
        "on_duplicate": "fail",
        "note": rule["note"],
    }


def test_a_new_rule_has_the_values_of_the_default_one_and_position_100(transaction: Connection) -> None:
    add_rule(transaction, "new")
    default, new = rows(transaction, "SELECT * FROM procrastinate_stalled.rules ORDER BY name")
    assert new == default | {"name": "new", "position": 100, "note": None}


def test_the_settings_of_the_install(transaction: Connection) -> None:
    assert rows(transaction, "SELECT * FROM procrastinate_stalled.settings") == [
        {
            "only_row": True,
            "outage_grace": timedelta(minutes=10),
            "require_live_worker": True,
            "keep_rescues": timedelta(days=90),
            "keep_sweeps": timedelta(days=7),
        }
    ]


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM procrastinate_stalled.rules",
        "UPDATE procrastinate_stalled.rules SET name = 'mine', position = 5",
        "UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '1 hour', note = NULL",
        "UPDATE procrastinate_stalled.settings SET keep_sweeps = '1 day', outage_grace = '0'",
    ],
)
def test_what_the_user_changed_stays_when_the_migration_runs_again(connection: Connection, change: str) -> None:
    connection.execute(change)
    add_stalled_job(connection)
    sweep(connection)
    before = contents(connection)
    for migration in sorted((PROJECT / "sql" / "migrations").glob("*.sql")):
        if not migration.name.endswith(".rollback.sql"):
            connection.execute(migration.read_bytes())
    assert contents(connection) == before


# What the tables refuse


@pytest.mark.parametrize(
    ("column", "value", "constraint"),
    [
        ("name", "", "rules_name_not_empty"),
        ("task_name", "\\", "rules_task_name_is_a_like_pattern"),
        ("task_name", "billing.\\", "rules_task_name_is_a_like_pattern"),
        ("task_name", "a\n\\", "rules_task_name_is_a_like_pattern"),
        ("task_name", "a\\\\\\", "rules_task_name_is_a_like_pattern"),
        ("args", Jsonb([]), "rules_args_is_an_object"),
        ("args", Jsonb(None), "rules_args_is_an_object"),
        ("args", Jsonb("a"), "rules_args_is_an_object"),
        ("args", Jsonb(1), "rules_args_is_an_object"),
        ("args", Jsonb(True), "rules_args_is_an_object"),
        ("args", Jsonb({"a": "a" * 3992}), "rules_args_length"),
        ("heartbeat_timeout", "0", "rules_heartbeat_timeout_in_range"),
        ("heartbeat_timeout", "-1 second", "rules_heartbeat_timeout_in_range"),
        ("heartbeat_timeout", "10 years 1 second", "rules_heartbeat_timeout_in_range"),
        ("heartbeat_timeout", "178000000 years", "rules_heartbeat_timeout_in_range"),
        # It counts as one day in a comparison and as five million years in a sum.
        ("heartbeat_timeout", "5000000 years -1799999999 days", "rules_heartbeat_timeout_in_range"),
        ("run_timeout", "0", "rules_run_timeout_in_range"),
        ("run_timeout", "-1 second", "rules_run_timeout_in_range"),
        ("run_timeout", "10 years 1 second", "rules_run_timeout_in_range"),
        ("run_timeout", "5000000 years -1799999999 days", "rules_run_timeout_in_range"),
        ("action", "retried", "rules_action_known"),
        ("action", "Retry", "rules_action_known"),
        ("action", "", "rules_action_known"),
        ("max_rescues", -1, "rules_max_rescues_not_negative"),
        ("retry_delay", "-1 microsecond", "rules_retry_delay_in_range"),
        ("retry_delay", "1 day 1 microsecond", "rules_retry_delay_in_range"),
        ("retry_delay", "-5000000 years 1800000001 days", "rules_retry_delay_in_range"),
        ("retry_backoff", 0.999999, "rules_retry_backoff_in_range"),
        ("retry_backoff", -1, "rules_retry_backoff_in_range"),
        ("retry_backoff", 1000.001, "rules_retry_backoff_in_range"),
        ("retry_backoff", float("nan"), "rules_retry_backoff_in_range"),
        ("retry_backoff", float("inf"), "rules_retry_backoff_in_range"),
        ("retry_backoff", float("-inf"), "rules_retry_backoff_in_range"),
        ("retry_queue_name", "", "rules_retry_queue_name_length"),
        ("retry_queue_name", "q" * 129, "rules_retry_queue_name_length"),
        ("on_duplicate", "retry", "rules_on_duplicate_known"),
        ("on_duplicate", "", "rules_on_duplicate_known"),
    ],
)
def test_a_rule_with_a_bad_value_is_refused(
    transaction: Connection, column: str, value: object, constraint: str
) -> None:
    columns: dict[str, Any] = {"name": "r"} | {column: value}
    with pytest.raises(CheckViolation) as error:
        add_rule(transaction, **columns)
    assert error.value.diag.constraint_name == constraint


@pytest.mark.parametrize(
    "column", ["name", "position", "enabled", "action", "retry_delay", "retry_backoff", "on_duplicate"]
)
def test_a_rule_without_a_value_that_it_needs_is_refused(transaction: Connection, column: str) -> None:
    columns: dict[str, Any] = {"name": "r"} | {column: None}
    with pytest.raises(NotNullViolation) as error:
        add_rule(transaction, **columns)
    assert error.value.diag.column_name == column


def test_two_rules_with_one_name_are_refused(transaction: Connection) -> None:
    with pytest.raises(UniqueViolation):
        add_rule(transaction, "default")


@pytest.mark.parametrize(
    "values",
    [
        {"heartbeat_timeout": "10 years", "run_timeout": "10 years", "position": -(2**31) + 1},
        {"heartbeat_timeout": "1 microsecond", "run_timeout": "1 microsecond", "max_rescues": 2**31 - 1},
        {"retry_delay": "1 day", "retry_backoff": 1000, "retry_queue_name": "ü" * 128, "retry_priority": 2**31 - 1},
        {"task_name": "%\\\\", "queue_name": "", "args": {}, "expires_at": "1970-01-01 00:00+00"},
        {"retry_backoff": 1, "max_rescues": 0, "retry_priority": -(2**31), "on_duplicate": "wait"},
    ],
)
def test_a_rule_may_go_to_the_limits(no_rules: Connection, values: dict[str, Any]) -> None:
    add_rule(no_rules, "r", **values)
    add_stalled_job(no_rules, silent_for=10**9, started_ago=10**9)
    sweep(no_rules)


def test_the_deepest_args_of_a_rule_can_be_compared_with_those_of_any_job(no_rules: Connection) -> None:
    def deep(depth: int) -> str:
        return '{"":' + "[" * depth + "]" * depth + "}"

    longest = deep(1997)
    assert rows(no_rules, "SELECT length(%s::jsonb::text)", longest) == [{"length": 4000}]
    no_rules.execute("INSERT INTO procrastinate_stalled.rules (name, args) VALUES ('r', %s::jsonb)", [longest])
    job = add_stalled_job(no_rules)
    no_rules.execute("UPDATE procrastinate_jobs SET args = %s::jsonb WHERE id = %s", [deep(6000), job])
    sweep(no_rules)


intervals = st.builds(
    "{} years {} days {:.6f} seconds".format,
    st.integers(-20, 20),
    st.integers(-8000, 8000),
    st.integers(-(10**12), 10**12).map(lambda microseconds: microseconds / 10**6),
)
texts = st.text(st.sampled_from("\\%_.a\n") | st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@with_examples(200)
@given(
    rule=st.fixed_dictionaries(
        {"name": texts},
        optional={
            "task_name": texts,
            "queue_name": texts,
            "heartbeat_timeout": st.none() | intervals,
            "run_timeout": intervals,
            "max_rescues": st.none() | st.integers(-1, 2**31 - 1),
            "retry_delay": intervals,
            "retry_backoff": st.floats(),
            "retry_queue_name": texts,
            "retry_priority": st.integers(-(2**31), 2**31 - 1),
        },
    ),
    name=texts,
    rescues=st.integers(0, 1000),
)
def test_no_rule_that_is_accepted_makes_a_sweep_fail(
    transaction: Connection, rule: dict[str, Any], name: str, rescues: int
) -> None:
    with transaction.transaction(force_rollback=True):
        transaction.execute("DELETE FROM procrastinate_stalled.rules")
        try:
            with transaction.transaction():
                add_rule(transaction, **rule)
        except CheckViolation:
            return
        job = add_stalled_job(transaction, started_ago=HOUR, task_name=name, attempts=rescues)
        transaction.execute(
            """
            INSERT INTO procrastinate_stalled.rescues (job_id, queue_name, task_name, action, reason, attempts)
            SELECT %s, 'q', 't', 'retried', 'heartbeat', attempts
            FROM generate_series(0, %s) AS attempts
            """,
            [job, rescues - 1],
        )
        sweep(transaction)
        (row,) = rows(transaction, "SELECT error FROM procrastinate_stalled.sweeps")
        assert row["error"] is None


@pytest.mark.parametrize(
    ("column", "value", "constraint"),
    [
        ("only_row", False, "settings_has_one_row"),
        ("outage_grace", "-1 second", "settings_outage_grace_in_range"),
        ("outage_grace", "10 years 1 second", "settings_outage_grace_in_range"),
        ("keep_rescues", "-1 second", "settings_keep_rescues_in_range"),
        ("keep_rescues", "100 years 1 second", "settings_keep_rescues_in_range"),
        ("keep_sweeps", "-1 second", "settings_keep_sweeps_in_range"),
        ("keep_sweeps", "100 years 1 second", "settings_keep_sweeps_in_range"),
        ("outage_grace", "5000000 years -1799999999 days", "settings_outage_grace_in_range"),
        ("keep_rescues", "5000000 years -1799999999 days", "settings_keep_rescues_in_range"),
        ("keep_sweeps", "5000000 years -1799999999 days", "settings_keep_sweeps_in_range"),
    ],
)
def test_a_bad_setting_is_refused(transaction: Connection, column: str, value: object, constraint: str) -> None:
    with pytest.raises(CheckViolation) as error:
        transaction.execute(f"UPDATE procrastinate_stalled.settings SET {column} = %s", [value])
    assert error.value.diag.constraint_name == constraint


@pytest.mark.parametrize("column", ["only_row", "outage_grace", "require_live_worker", "keep_rescues", "keep_sweeps"])
def test_a_setting_cannot_be_null(transaction: Connection, column: str) -> None:
    with pytest.raises(NotNullViolation) as error:
        transaction.execute(f"UPDATE procrastinate_stalled.settings SET {column} = NULL")
    assert error.value.diag.column_name == column


def test_there_is_one_row_of_settings(transaction: Connection) -> None:
    with pytest.raises(UniqueViolation):
        insert(transaction, "settings", keep_sweeps="1 day")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("outage_grace", "0"),
        ("outage_grace", "10 years"),
        ("keep_rescues", "0"),
        ("keep_rescues", "100 years"),
        ("keep_sweeps", "0"),
        ("keep_sweeps", "100 years"),
    ],
)
def test_a_setting_may_go_to_the_limits(transaction: Connection, column: str, value: str) -> None:
    transaction.execute(f"UPDATE procrastinate_stalled.settings SET {column} = %s", [value])
    add_stalled_job(transaction)
    assert len(sweep(transaction)) == 1
