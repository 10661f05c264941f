"""The evidence: by what and when a job in `doing` counts as stalled, and when that is not acted upon."""

import os
import signal
from datetime import datetime, timedelta
from typing import Any, LiteralString

import psycopg
import pytest

from procrastinate_stalled import Stalled, install
from tests.conftest import Connect
from tests.jobs import (
    Connection,
    add_job,
    add_orphan_note,
    add_rule,
    add_stalled_job,
    add_worker,
    contents,
    get_job,
    rows,
    update_job,
)
from tests.server import Server, database_name, install_procrastinate, streaming_standby, throwaway_server
from tests.wait import wait_until

HOUR = 3600
MICROSECOND = 0.000001


@pytest.fixture
def minute(transaction: Connection) -> Connection:
    """A transaction with one rule, whose heartbeat_timeout is one minute; outage_grace is ten."""
    transaction.execute("DELETE FROM procrastinate_stalled.rules")
    add_rule(transaction, "minute", heartbeat_timeout="1 minute")
    return transaction


def set_available(connection: Connection, ago: float | None) -> None:
    """Let the server have become available so many seconds ago; None: long ago."""
    if ago is not None:
        connection.execute(
            "SELECT set_config('tests.available_since', (now() - make_interval(secs => %s))::text, true)", [ago]
        )


def set_timeouts(connection: Connection, heartbeat_timeout: float, outage_grace: float) -> None:
    """Set the heartbeat_timeout of the rule, and the grace after an outage, in seconds."""
    connection.execute(
        "UPDATE procrastinate_stalled.rules SET heartbeat_timeout = make_interval(secs => %s)", [heartbeat_timeout]
    )
    connection.execute(
        "UPDATE procrastinate_stalled.settings SET outage_grace = make_interval(secs => %s)", [outage_grace]
    )


def judge(connection: Connection, job_id: int) -> tuple[str, str | None, float | None]:
    """The verdict, the reason, and the seconds until the job counts as stalled."""
    (row,) = rows(
        connection,
        "SELECT verdict, reason, stalled_at - now() AS remaining FROM procrastinate_stalled.explain_job(%s)",
        job_id,
    )
    remaining: timedelta | None = row["remaining"]
    return row["verdict"], row["reason"], None if remaining is None else remaining.total_seconds()


def assert_stalled_in(connection: Connection, job_id: int, reason: str, seconds: float) -> None:
    """Check when the job counts as stalled, and that every function agrees on whether it does so now."""
    is_stalled = seconds <= 0
    assert judge(connection, job_id) == ("stalled" if is_stalled else "running", reason, seconds)
    stalled = Stalled(connection)
    expected = [(job_id, reason)] if is_stalled else []
    assert [(job.id, job.reason) for job in stalled.get_stalled_jobs()] == expected
    assert [(rescue.job_id, rescue.reason) for rescue in stalled.retry_stalled_jobs(dry_run=True)] == expected
    assert [(rescue.job_id, rescue.reason) for rescue in stalled.retry_stalled_jobs()] == expected


# Silence


@pytest.mark.parametrize(
    ("silent_for", "remaining"),
    [
        (0, 60),
        (59.999999, MICROSECOND),
        (60, 0),
        (60.000001, -MICROSECOND),
        (HOUR, -3540),
        (-30, 90),
    ],
)
def test_silence_counts_from_the_last_heartbeat(minute: Connection, silent_for: float, remaining: float) -> None:
    job = add_stalled_job(minute, silent_for)
    assert_stalled_in(minute, job, "heartbeat", remaining)


@pytest.mark.parametrize(
    ("heartbeat_timeout", "outage_grace", "silent_for", "available_for", "remaining"),
    [
        # heard of since the outage
        (60, 600, 30, 31, 30),
        (60, 600, 60, 60, 0),
        (60, 600, 100, 100, -40),
        # not heard of since the outage, even by a microsecond
        (60, 600, 100.000001, 100, 500),
        (60, 600, HOUR, 599.999999, MICROSECOND),
        (60, 600, HOUR, 600, 0),
        (60, 600, HOUR, 600.000001, -MICROSECOND),
        # a heartbeat_timeout that is longer than the grace counts anew
        (600, 60, 100.000001, 100, 500),
        (600, 60, HOUR, 600, 0),
        (600, 600, HOUR, 600, 0),
        # without a grace the down time is forgiven all the same
        (60, 0, HOUR, 59.999999, MICROSECOND),
        (60, 0, HOUR, 60, 0),
        (60, 0, 30, 10, 50),
    ],
)
def test_silence_since_before_an_outage_counts_from_its_end_and_for_at_least_outage_grace(
    minute: Connection,
    heartbeat_timeout: float,
    outage_grace: float,
    silent_for: float,
    available_for: float,
    remaining: float,
) -> None:
    set_timeouts(minute, heartbeat_timeout, outage_grace)
    set_available(minute, available_for)
    job = add_stalled_job(minute, silent_for)
    assert_stalled_in(minute, job, "heartbeat", remaining)


def test_without_heartbeat_timeout_neither_silence_nor_an_outage_counts(minute: Connection) -> None:
    minute.execute("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = NULL")
    set_available(minute, HOUR)
    silent, orphan = add_stalled_job(minute, 2 * HOUR), add_job(minute, started_ago=2 * HOUR)
    assert judge(minute, silent) == judge(minute, orphan) == ("running", None, None)


def test_an_outage_of_the_future_is_ignored_as_are_heartbeats_of_the_far_future(minute: Connection) -> None:
    set_available(minute, -HOUR)
    silent = add_stalled_job(minute, silent_for=60)
    far = add_job(minute, worker_id=add_worker(minute))
    worker = get_job(minute, far)["worker_id"]
    minute.execute("UPDATE procrastinate_workers SET last_heartbeat = 'infinity' WHERE id = %s", [worker])

    assert judge(minute, silent) == ("stalled", "heartbeat", 0)
    assert judge(minute, far) == ("running", None, None)
    assert rows(minute, "SELECT available_since FROM procrastinate_stalled.explain_job(%s)", silent) == [
        {"available_since": None}
    ]


# Orphans


@pytest.mark.parametrize(
    ("seen_ago", "started_ago", "available_for", "remaining"),
    [
        # no outage
        (59.999999, HOUR, None, MICROSECOND),
        (60, HOUR, None, 0),
        (None, HOUR, None, 60),
        # started after the outage, or at its very end
        (60, 99, 100, 0),
        (60, 100, 100, 0),
        (None, 99, 100, 60),
        # started before the outage and noted after it
        (60, 100.000001, 100, 500),
        (60, HOUR, 600, 0),
        (60, HOUR, 599.999999, MICROSECOND),
        (30, HOUR, 600, 30),
        # noted before the outage
        (300, HOUR, 200, 400),
        (HOUR, 2 * HOUR, 600, 0),
        # noted before the outage, but started after it: a clock was wrong
        (300, 100, 200, -240),
        # never noted, since before the outage
        (None, HOUR, 200, 400),
        (None, HOUR, 550, 60),
        # it is not known when it started
        (60, None, 100, 500),
        (60, None, 600, 0),
        (None, None, 100, 500),
        (60, None, None, 0),
    ],
)
def test_an_orphan_counts_from_its_first_sight_and_from_an_outage_since_its_start(
    minute: Connection,
    seen_ago: float | None,
    started_ago: float | None,
    available_for: float | None,
    remaining: float,
) -> None:
    set_available(minute, available_for)
    job = add_job(minute, started_ago=started_ago, attempts=2)
    if started_ago is None:
        minute.execute("DELETE FROM procrastinate_events WHERE type = 'started'")
    if seen_ago is not None:
        add_orphan_note(minute, job, 2, seen_ago)
    assert_stalled_in(minute, job, "orphaned", remaining)


def test_the_note_of_another_run_of_an_orphan_does_not_count(minute: Connection) -> None:
    job = add_job(minute, attempts=2)
    add_orphan_note(minute, job, 1, HOUR)
    assert_stalled_in(minute, job, "orphaned", 60)


def test_a_note_does_not_count_for_a_job_that_has_a_worker(minute: Connection) -> None:
    job = add_stalled_job(minute, silent_for=30)
    add_orphan_note(minute, job, 0, HOUR)
    assert_stalled_in(minute, job, "heartbeat", 30)


def test_an_orphan_that_was_not_noted_is_stalled_when_it_was_announced(minute: Connection) -> None:
    job = add_job(minute, started_ago=HOUR)
    assert judge(minute, job) == ("running", "orphaned", 60)
    Stalled(minute).retry_stalled_jobs()
    minute.execute("UPDATE procrastinate_stalled.orphans SET seen_at = now() - interval '60 seconds'")
    assert_stalled_in(minute, job, "orphaned", 0)


# A living worker


@pytest.fixture
def nobody(minute: Connection) -> Connection:
    """A transaction as `minute` in which no worker is registered."""
    minute.execute("DELETE FROM procrastinate_workers")
    return minute


@pytest.mark.parametrize(
    ("beat_ago", "verdict"),
    [(0, "stalled"), (30, "stalled"), (30.000001, "held"), (59, "held"), (-60, "held")],
)
def test_a_worker_lives_while_its_heartbeat_is_within_half_of_heartbeat_timeout(
    nobody: Connection, beat_ago: float, verdict: str
) -> None:
    job = add_stalled_job(nobody, silent_for=100)
    add_worker(nobody, beat_ago)
    assert judge(nobody, job) == (verdict, "heartbeat", -40)


def test_a_worker_that_beats_while_the_transaction_lasts_is_alive(nobody: Connection) -> None:
    job = add_stalled_job(nobody, silent_for=100)
    nobody.execute("INSERT INTO procrastinate_workers (last_heartbeat) VALUES (clock_timestamp())")
    assert judge(nobody, job)[0] == "stalled"


def test_half_is_half_of_the_rule_of_each_job(nobody: Connection) -> None:
    add_rule(nobody, "hour", position=1, task_name="patient", heartbeat_timeout="1 hour")
    job = add_stalled_job(nobody, silent_for=2 * HOUR)
    patient = add_stalled_job(nobody, silent_for=2 * HOUR, task_name="patient")
    add_worker(nobody, silent_for=1000)
    assert (judge(nobody, job)[0], judge(nobody, patient)[0]) == ("held", "stalled")


def test_without_require_live_worker_nobody_needs_to_live(nobody: Connection) -> None:
    nobody.execute("UPDATE procrastinate_stalled.settings SET require_live_worker = false")
    job = add_stalled_job(nobody, silent_for=60)
    assert_stalled_in(nobody, job, "heartbeat", 0)


def test_while_nobody_lives_no_silence_is_acted_upon_and_no_orphan(nobody: Connection) -> None:
    silent = add_stalled_job(nobody, silent_for=60)
    orphan = add_job(nobody)
    add_orphan_note(nobody, orphan, 0, 60)
    abort = add_stalled_job(nobody, abort_requested=True)
    add_rule(nobody, "fail", position=1, task_name="fail", action="fail", heartbeat_timeout="1 minute")
    failing = add_stalled_job(nobody, task_name="fail")
    running = add_stalled_job(nobody, silent_for=59)
    held = [silent, orphan, abort, failing]
    before = contents(nobody)

    assert [judge(nobody, job)[0] for job in [*held, running]] == ["held"] * 4 + ["running"]
    stalled = Stalled(nobody)
    assert [(job.id, job.action, job.detail) for job in stalled.get_stalled_jobs()] == [
        (job, "hold", "no living worker") for job in held
    ]
    assert stalled.retry_stalled_jobs(dry_run=True) == []
    assert stalled.retry_stalled_jobs() == []

    assert contents(nobody) | {"procrastinate_stalled.sweeps": []} == before
    assert rows(nobody, "SELECT doing, retried, waiting, held, held_reason FROM procrastinate_stalled.sweeps") == [
        {"doing": 5, "retried": 0, "waiting": 0, "held": 4, "held_reason": "no living worker"}
    ]

    add_worker(nobody)
    assert [rescue.job_id for rescue in stalled.retry_stalled_jobs()] == held


def test_a_dry_run_shows_no_held_job_and_max_jobs_does_not_count_it(nobody: Connection) -> None:
    add_stalled_job(nobody)
    nobody.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '1 hour'")
    overdue = add_job(nobody, started_ago=HOUR)
    assert [rescue.job_id for rescue in Stalled(nobody).retry_stalled_jobs(max_jobs=1, dry_run=True)] == [overdue]
    assert [rescue.job_id for rescue in Stalled(nobody).retry_stalled_jobs(max_jobs=1)] == [overdue]


def beat(connection: Connection, job_id: int) -> None:
    """Let the worker of a job be heard again."""
    connection.execute("SELECT procrastinate_update_heartbeat_v1(%s)", [get_job(connection, job_id)["worker_id"]])


@pytest.fixture
def held(nobody: Connection) -> list[int]:
    """Jobs that a sweep held 20 seconds ago: those of two workers that were silent for two minutes, and an orphan."""
    jobs = [add_stalled_job(nobody, silent_for=120), add_stalled_job(nobody, silent_for=120), add_job(nobody)]
    add_orphan_note(nobody, jobs[2], 0, 120)
    assert Stalled(nobody).retry_stalled_jobs() == []
    nobody.execute("UPDATE procrastinate_stalled.sweeps SET started_at = now() - interval '20 seconds'")
    return jobs


def test_when_one_of_the_silent_workers_is_heard_again_the_others_get_the_time_to_be_heard_too(
    nobody: Connection, held: list[int]
) -> None:
    back, silent, orphan = held
    beat(nobody, back)
    assert judge(nobody, back) == ("running", "heartbeat", 60)
    assert judge(nobody, orphan) == ("running", "orphaned", 60)
    assert_stalled_in(nobody, silent, "heartbeat", 60)


@pytest.mark.parametrize("seconds", [0, 580])
def test_that_time_counts_from_the_next_sweep_however_rare_they_are(
    nobody: Connection, held: list[int], seconds: int
) -> None:
    let_time_pass(nobody, seconds)
    back, silent, orphan = held
    beat(nobody, back)
    assert [judge(nobody, job)[0] for job in held] == ["running"] * 3
    assert Stalled(nobody).retry_stalled_jobs() == []
    let_time_pass(nobody, 59)
    beat(nobody, back)
    assert Stalled(nobody).retry_stalled_jobs() == []
    let_time_pass(nobody, 2)
    assert [rescue.job_id for rescue in Stalled(nobody).retry_stalled_jobs()] == [silent, orphan]


def test_a_sweep_by_a_clock_that_was_ahead_holds_nothing(nobody: Connection, held: list[int]) -> None:
    beat(nobody, held[0])
    nobody.execute("UPDATE procrastinate_stalled.sweeps SET started_at = started_at + interval '1 day'")
    assert [judge(nobody, job)[0] for job in held] == ["running", "stalled", "stalled"]


def test_a_beat_between_the_start_of_a_sweep_and_its_judgement_releases_nobody_else(nobody: Connection) -> None:
    back, silent = (add_stalled_job(nobody, silent_for=120) for _ in range(2))
    (sweep,) = rows(nobody, "SELECT * FROM procrastinate_stalled._begin_sweep(NULL, NULL, NULL, NULL)")
    assert sweep["suspect_ids"] == [back, silent]
    beat(nobody, back)
    nobody.execute("SELECT procrastinate_stalled._rescue(NULL, NULL, NULL, NULL, %s)", [sweep["suspect_ids"]])
    assert rows(nobody, "SELECT FROM procrastinate_stalled.rescues") == []
    assert judge(nobody, silent)[0] == "running"


def test_as_long_as_nobody_is_heard_a_held_job_stays_so(nobody: Connection, held: list[int]) -> None:
    for _ in range(2):
        assert Stalled(nobody).retry_stalled_jobs() == []
        assert [judge(nobody, job) for job in held] == [
            ("held", "heartbeat", -60),
            ("held", "heartbeat", -60),
            ("held", "orphaned", -60),
        ]


def test_a_worker_that_is_new_tells_nothing_of_the_silent_ones(nobody: Connection, held: list[int]) -> None:
    add_worker(nobody)
    assert [judge(nobody, job)[0] for job in held] == ["stalled"] * 3


def test_a_hold_that_is_over_does_not_put_off_a_silence_that_began_later(nobody: Connection, held: list[int]) -> None:
    back, silent, _ = held
    beat(nobody, back)
    nobody.execute(
        "UPDATE procrastinate_workers SET last_heartbeat = now() - interval '10 seconds' WHERE id = %s",
        [get_job(nobody, silent)["worker_id"]],
    )
    assert judge(nobody, silent) == ("running", "heartbeat", 50)


def test_a_hold_that_is_over_does_not_put_off_a_run_timeout_nor_what_is_asked_for_with_seconds(
    nobody: Connection, held: list[int]
) -> None:
    back, silent, _ = held
    beat(nobody, back)
    nobody.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '1 hour'")
    overdue = add_job(nobody, started_ago=HOUR, worker_id=get_job(nobody, silent)["worker_id"])
    assert judge(nobody, overdue) == ("stalled", "run_timeout", 0)
    seconds = Stalled(nobody).get_stalled_jobs(seconds_since_heartbeat=60)
    assert [job.id for job in seconds] == [*held[1:], overdue]


def test_a_pause_is_no_hold_for_want_of_a_worker(minute: Connection) -> None:
    job = add_stalled_job(minute, silent_for=120)
    Stalled(minute).pause()
    assert Stalled(minute).retry_stalled_jobs() == []
    assert rows(minute, "SELECT held FROM procrastinate_stalled.sweeps") == [{"held": 1}]
    Stalled(minute).resume()
    assert judge(minute, job)[0] == "stalled"


def test_a_sweep_sees_that_nobody_lives_before_any_job_is_due(nobody: Connection) -> None:
    jobs = [add_stalled_job(nobody, silent_for=50) for _ in range(2)]
    assert Stalled(nobody).retry_stalled_jobs() == []
    assert rows(nobody, "SELECT held FROM procrastinate_stalled.sweeps") == [{"held": 0}]
    let_time_pass(nobody, 40)
    beat(nobody, jobs[0])
    assert judge(nobody, jobs[1]) == ("running", "heartbeat", 60)


def test_who_was_overdue_before_all_fell_silent_gets_no_more_time(nobody: Connection) -> None:
    dead = add_stalled_job(nobody, silent_for=200)
    back = add_stalled_job(nobody, silent_for=140)
    assert Stalled(nobody).retry_stalled_jobs() == []
    beat(nobody, back)
    assert judge(nobody, dead)[0] == "stalled"


def test_without_require_live_worker_nobody_waits_for_those_who_come_back(nobody: Connection, held: list[int]) -> None:
    beat(nobody, held[0])
    nobody.execute("UPDATE procrastinate_stalled.settings SET require_live_worker = false")
    assert [judge(nobody, job)[0] for job in held] == ["running", "stalled", "stalled"]


def let_time_pass(connection: Connection, seconds: float) -> None:
    """Set back all that was seen."""
    for table, columns in {
        "procrastinate_workers": ["last_heartbeat"],
        "procrastinate_events": ["at"],
        "procrastinate_stalled.orphans": ["seen_at"],
        "procrastinate_stalled.sweeps": ["started_at", "latest_heartbeat"],
    }.items():
        for column in columns:
            connection.execute(f"UPDATE {table} SET {column} = {column} - make_interval(secs => {seconds})".encode())


@pytest.mark.parametrize("interval", [10, 24, 36, 48, 60, 96])
@pytest.mark.parametrize("hasty_rule", [False, True])
def test_a_worker_that_seldom_beats_does_not_put_off_the_job_of_a_dead_one_for_ever(
    nobody: Connection, interval: int, hasty_rule: bool
) -> None:
    worker = add_worker(nobody)
    job = add_stalled_job(nobody, silent_for=0)
    if hasty_rule:
        # Its job waits for its duplicate, and is held now and then.
        add_rule(nobody, "hasty", position=1, task_name="t", heartbeat_timeout="16 s", on_duplicate="wait")
        add_stalled_job(nobody, task_name="t", queueing_lock="key")
        add_job(nobody, "todo", task_name="t", queueing_lock="key")
    for seconds in range(1, 400):
        let_time_pass(nobody, 1)
        if seconds % interval == 0:
            nobody.execute("SELECT procrastinate_update_heartbeat_v1(%s)", [worker])
        if seconds % 12 == 0 and [rescue.job_id for rescue in Stalled(nobody).retry_stalled_jobs()] == [job]:
            break
    # It is due after 60 seconds; then comes the next beat, one timeout, and the next moment at which somebody lives.
    assert seconds <= 60 + interval + 60 + interval + 12
    if interval <= 30:
        assert seconds <= 72


@pytest.mark.parametrize("heartbeat", ["-infinity", "0001-01-01"])
def test_a_worker_that_was_declared_dead_is_silent(minute: Connection, heartbeat: str) -> None:
    job = add_stalled_job(minute)
    minute.execute(
        "UPDATE procrastinate_workers SET last_heartbeat = %s WHERE id = %s",
        [heartbeat, get_job(minute, job)["worker_id"]],
    )
    (explained,) = rows(
        minute,
        """
        SELECT verdict, stalled_at < now() - interval '20 years' AS long_ago
        FROM procrastinate_stalled.explain_job(%s)
        """,
        job,
    )
    assert explained == {"verdict": "stalled", "long_ago": True}
    assert {row.level for row in Stalled(minute).status() if row.name in {"workers", "jobs", "given_up"}} == {
        "ok",
        "error",  # jobs: there was no sweep
    }
    rescued = "SELECT job_id FROM procrastinate_stalled.retry_stalled_jobs()"
    assert rows(minute, rescued) == [{"job_id": job}]


def test_the_procedure_counts_what_it_held(connection: Connection) -> None:
    connection.execute("DELETE FROM procrastinate_workers")
    held, paused = add_stalled_job(connection), add_stalled_job(connection, queue_name="paused")
    Stalled(connection).pause(queue="paused")

    Stalled(connection).sweep()

    assert rows(connection, "SELECT held, held_reason, waiting FROM procrastinate_stalled.sweeps") == [
        {"held": 2, "held_reason": "no living worker, pause queue 'paused'", "waiting": 0}
    ]
    assert (get_job(connection, held)["status"], get_job(connection, paused)["status"]) == ("doing", "doing")


# The run timeout


@pytest.mark.parametrize(("started_ago", "remaining"), [(59.999999, MICROSECOND), (60, 0), (60.000001, -MICROSECOND)])
@pytest.mark.parametrize("available_for", [None, 10])
def test_the_run_timeout_counts_from_the_start_whatever_the_worker_says_and_the_server_did(
    nobody: Connection, started_ago: float, remaining: float, available_for: float | None
) -> None:
    nobody.execute("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '1 hour', run_timeout = '1 minute'")
    set_available(nobody, available_for)
    job = add_job(nobody, worker_id=add_worker(nobody), started_ago=started_ago)
    assert_stalled_in(nobody, job, "run_timeout", remaining)


def test_a_run_timeout_is_acted_upon_while_nobody_lives_though_the_silence_came_first(nobody: Connection) -> None:
    nobody.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '1 hour'")
    job = add_stalled_job(nobody, silent_for=3550, started_ago=3599.999999)
    assert judge(nobody, job) == ("held", "heartbeat", -3490)

    nobody.execute("UPDATE procrastinate_events SET at = at - interval '1 microsecond'")

    assert_stalled_in(nobody, job, "run_timeout", 0)


def test_while_somebody_lives_the_evidence_that_came_first_is_the_reason(minute: Connection) -> None:
    minute.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '1 hour'")
    job = add_stalled_job(minute, silent_for=1000, started_ago=3700)
    assert_stalled_in(minute, job, "heartbeat", -940)


def test_no_run_timeout_is_acted_upon_during_a_pause(nobody: Connection) -> None:
    nobody.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '1 minute'")
    job = add_stalled_job(nobody, silent_for=30, started_ago=60)
    Stalled(nobody).pause()
    assert judge(nobody, job) == ("held", "run_timeout", 0)
    assert Stalled(nobody).retry_stalled_jobs() == []


def test_a_start_in_the_far_future_is_no_start(minute: Connection) -> None:
    minute.execute("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = NULL, run_timeout = '1 minute'")
    job = add_job(minute, worker_id=add_worker(minute))
    minute.execute("UPDATE procrastinate_events SET at = 'infinity' WHERE type = 'started'")
    assert judge(minute, job) == ("running", None, None)


# Asked for by seconds


@pytest.mark.parametrize("arguments", [{"seconds_since_heartbeat": 30}, {"nb_seconds": 30}])
def test_with_seconds_neither_an_outage_nor_the_lack_of_a_worker_counts(
    nobody: Connection, arguments: dict[str, Any]
) -> None:
    # Right after a restart: a living worker that has not beaten yet is robbed.
    set_available(nobody, 10)
    job = add_stalled_job(nobody, silent_for=50, started_ago=50)
    stalled = Stalled(nobody)
    assert stalled.get_stalled_jobs() == []

    assert [(job.id, job.action) for job in stalled.get_stalled_jobs(**arguments)] == [(job, "retry")]
    assert [rescue.job_id for rescue in stalled.retry_stalled_jobs(**arguments)] == [job]
    assert rows(nobody, "SELECT held, held_reason FROM procrastinate_stalled.sweeps") == [
        {"held": 0, "held_reason": None}
    ]


# The settings


def test_changed_settings_count_at_once(nobody: Connection) -> None:
    set_available(nobody, 300)
    job = add_stalled_job(nobody, HOUR)
    assert judge(nobody, job) == ("running", "heartbeat", 300)
    nobody.execute("UPDATE procrastinate_stalled.settings SET outage_grace = '4 minutes'")
    assert judge(nobody, job) == ("held", "heartbeat", -60)
    nobody.execute("UPDATE procrastinate_stalled.settings SET require_live_worker = false")
    assert judge(nobody, job) == ("stalled", "heartbeat", -60)


def test_without_the_row_of_settings_there_is_no_grace_and_a_worker_must_live(nobody: Connection) -> None:
    nobody.execute("DELETE FROM procrastinate_stalled.settings")
    set_available(nobody, 60)
    job = add_stalled_job(nobody, HOUR)
    assert judge(nobody, job) == ("held", "heartbeat", 0)
    add_worker(nobody)
    assert judge(nobody, job) == ("stalled", "heartbeat", 0)


# When the server became available


AVAILABLE_SINCE: LiteralString = """
    SELECT procrastinate_stalled._available_since() AS at,
           pg_postmaster_start_time() AS started_at,
           (SELECT backend_start FROM pg_stat_activity WHERE backend_type = 'walwriter') AS seen_at,
           clock_timestamp() AS now
"""


def ask(conninfo: str) -> dict[str, Any]:
    """Since when the server is available, and what is visible of that."""
    with psycopg.connect(conninfo) as connection:
        (row,) = rows(connection, AVAILABLE_SINCE)
        return row


def has_recovered(conninfo: str, since: datetime) -> bool:
    """Whether the server has a walwriter that is newer. For a moment after a crash the old processes still answer."""
    try:
        seen_at = ask(conninfo)["seen_at"]
    except psycopg.OperationalError:
        return False
    return seen_at is not None and seen_at > since


def test_the_server_is_available_since_its_start_or_its_recovery_from_a_crash() -> None:
    with throwaway_server() as server:
        admin = server.create_database("ours")
        install_procrastinate(admin)
        install(admin)
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(
                """
                CREATE ROLE stranger LOGIN;
                GRANT USAGE ON SCHEMA procrastinate_stalled TO stranger;
                GRANT EXECUTE ON FUNCTION procrastinate_stalled._available_since() TO stranger;
                """
            )
        stranger = admin.replace("user=postgres", "user=stranger")

        first = ask(admin)
        assert first["started_at"] <= first["at"] == first["seen_at"] <= first["now"]
        assert ask(stranger)["at"] == first["started_at"]

        server.stop()
        server.start()
        restarted = ask(admin)
        assert first["now"] < restarted["started_at"] <= restarted["at"] == restarted["seen_at"]
        assert ask(stranger)["at"] == restarted["started_at"]

        with psycopg.connect(admin) as connection:
            connection.execute("SET LOCAL synchronous_commit = on")
            add_worker(connection)
            job = add_stalled_job(connection, silent_for=30 * 86400)
            connection.commit()
            before = ask(admin)["now"]
            os.kill(connection.info.backend_pid, signal.SIGKILL)
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT pg_sleep(60)")
        wait_until(lambda: has_recovered(admin, before), "the server has recovered")
        crashed = ask(admin)
        assert before < crashed["at"] == crashed["seen_at"]
        assert crashed["started_at"] == restarted["started_at"]
        assert ask(stranger)["at"] == restarted["started_at"]

        with psycopg.connect(admin, autocommit=True) as connection:
            assert rows(
                connection,
                """
                SELECT verdict, reason, stalled_at - available_since AS grace, available_since
                FROM procrastinate_stalled.explain_job(%s)
                """,
                job,
            ) == [
                {
                    "verdict": "running",
                    "reason": "heartbeat",
                    "grace": timedelta(minutes=10),
                    "available_since": crashed["at"],
                }
            ]
            connection.execute("GRANT pg_read_all_stats TO stranger")
            assert ask(stranger)["at"] == crashed["at"]
            connection.execute("REVOKE SELECT ON pg_stat_activity FROM PUBLIC")
            # The superuser's view of it stays, the stranger falls back.
            assert ask(admin)["at"] == crashed["at"]
            with psycopg.connect(stranger) as copy:
                assert rows(copy, "SELECT procrastinate_stalled._available_since() AS at") == [
                    {"at": restarted["started_at"]}
                ]


def test_a_standby_is_available_since_its_promotion(server: Server) -> None:
    with server.database("procrastinate") as primary:
        install(primary)
        with psycopg.connect(primary) as connection:
            add_worker(connection)
            job = add_stalled_job(connection, silent_for=HOUR)
        with streaming_standby(server) as standby:
            conninfo = standby.conninfo(database_name(primary))
            before = ask(conninfo)
            assert before["seen_at"] is None
            assert before["at"] == before["started_at"]

            standby.promote()

            promoted = ask(conninfo)
            assert promoted["started_at"] == before["started_at"]
            assert before["now"] < promoted["at"] == promoted["seen_at"] <= promoted["now"]
            with psycopg.connect(conninfo, autocommit=True) as connection:
                Stalled(connection).sweep()
                assert get_job(connection, job)["status"] == "doing"
                explained = Stalled(connection).explain_job(job)
                assert explained.verdict == "running"
                assert explained.stalled_at == promoted["at"] + timedelta(minutes=10)


def test_the_judgement_is_made_anew_for_each_batch(connect: Connect, connection: Connection) -> None:
    job = add_stalled_job(connection)
    worker = get_job(connection, job)["worker_id"]
    update_job(connection, job, task_name="first")
    second = add_stalled_job(connection)
    # While the first batch is written the worker of the second one is heard of.
    session = connect()
    session.execute(
        f"""
        CREATE FUNCTION pg_temp.beat() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            UPDATE procrastinate_workers SET last_heartbeat = now() WHERE id > {worker};
            RETURN NEW;
        END;
        $$;
        CREATE TRIGGER beat BEFORE UPDATE ON procrastinate_jobs
            FOR EACH ROW WHEN (OLD.task_name = 'first') EXECUTE FUNCTION pg_temp.beat();
        """
    )
    session.execute("CALL procrastinate_stalled.sweep(1)")
    assert (get_job(connection, job)["status"], get_job(connection, second)["status"]) == ("todo", "doing")
