"""What the events tell: `task_runtimes`, and the rescues that `status()` counts as mistakes."""

import json
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from procrastinate_stalled import Stalled, Status, TaskRuntime
from tests.jobs import (
    Connection,
    add_event,
    add_job,
    add_rule,
    add_stalled_job,
    add_worker,
    contents,
    get_events,
    get_job,
    insert,
    rows,
)
from tests.procrastinate_release import RELEASE, RETRY_AT_ONCE, needs_retry_of_failed_jobs
from tests.random_databases import with_examples

MINUTE = 60
DAY = 86400
WEEK = 7 * DAY
ENDS = ("succeeded", "failed", "deferred_for_retry", "aborted")
RETRIED = ("retried",) if RELEASE >= (3, 4) else ()  # the event
OTHERS = ("deferred", "cancelled", "abort_requested", "scheduled", *RETRIED, None)


@pytest.fixture
def empty(transaction: Connection) -> Connection:
    """A transaction without events."""
    transaction.execute("DELETE FROM procrastinate_events")
    return transaction


def add_history(connection: Connection, *events: tuple[str | None, float | None], task_name: str = "task") -> int:
    """Add a job with only these events, by type and seconds ago; return its id."""
    job = add_job(connection, task_name=task_name)
    connection.execute("DELETE FROM procrastinate_events WHERE job_id = %s", [job])
    for event_type, ago in events:
        add_event(connection, job, event_type, ago)
    return job


def add_run(connection: Connection, seconds: float, ago: float = MINUTE, task_name: str = "task") -> int:
    """Add a job that started so long ago and succeeded after so many seconds; return its id."""
    return add_history(connection, ("started", ago), ("succeeded", ago - seconds), task_name=task_name)


def runs(connection: Connection, since: str | None = None) -> dict[str, int]:
    """The number of runs of each task."""
    counted = rows(connection, "SELECT task_name, runs FROM procrastinate_stalled.task_runtimes(%s)", since)
    return {row["task_name"]: row["runs"] for row in counted}


def seconds(*numbers: float) -> list[timedelta]:
    return [timedelta(seconds=number) for number in numbers]


# Runtimes


def test_without_events_there_are_no_runtimes(empty: Connection) -> None:
    assert Stalled(empty).task_runtimes() == []
    assert runs(empty, "-infinity") == runs(empty, "infinity") == {}


def test_each_task_comes_with_its_percentiles(empty: Connection) -> None:
    for duration in range(1, 102):
        add_run(empty, duration, ago=1000, task_name="b")
    add_run(empty, 7, task_name="a")
    add_run(empty, 1, task_name="c")
    add_run(empty, 2, task_name="c")
    assert Stalled(empty).task_runtimes() == [
        TaskRuntime("a", 1, *seconds(7, 7, 7)),
        TaskRuntime("b", 101, *seconds(51, 100, 101)),
        TaskRuntime("c", 2, *seconds(1.5, 1.99, 2)),
    ]


def test_a_run_of_days_is_as_long_as_it_is(empty: Connection) -> None:
    add_run(empty, 3 * DAY + 5, ago=4 * DAY)
    add_run(empty, 30, ago=4 * DAY)
    assert Stalled(empty).task_runtimes()[0].longest == timedelta(days=3, seconds=5)


@pytest.mark.parametrize("end", ENDS)
def test_every_end_of_a_run_counts(empty: Connection, end: str) -> None:
    add_history(empty, ("deferred", 60), ("started", 50), (end, 40))
    assert Stalled(empty).task_runtimes() == [TaskRuntime("task", 1, *seconds(10, 10, 10))]


@pytest.mark.parametrize(
    "events",
    [
        [("started", 50)],
        [("succeeded", 50)],
        [("started", 50), ("cancelled", 40)],
        [("started", 50), ("abort_requested", 40)],
        [("started", 50), (None, 40)],
        [("started", None), ("succeeded", 40)],
        [("started", 50), ("succeeded", None)],
    ],
)
def test_a_run_without_a_start_or_an_end_does_not_count(
    empty: Connection, events: list[tuple[str | None, float | None]]
) -> None:
    add_history(empty, *events)
    assert runs(empty) == {}


def test_each_run_of_a_job_counts(empty: Connection) -> None:
    add_history(
        empty,
        ("deferred", 99),
        ("scheduled", -1000),
        ("started", 90),
        ("abort_requested", 85),
        ("deferred_for_retry", 80),
        ("scheduled", -DAY),
        ("started", 70),
        ("failed", 50),
        *((retried, 45) for retried in RETRIED),
        ("started", 44),  # this one was lost without an event
        ("started", 40),
        ("aborted", 10),
    )
    assert Stalled(empty).task_runtimes() == [TaskRuntime("task", 3, *seconds(20, 29.8, 30))]


def test_the_events_of_jobs_do_not_mix(empty: Connection) -> None:
    first, second = add_history(empty), add_history(empty)
    for job, event_type, ago in (
        (first, "started", 50),
        (second, "started", 40),
        (first, "succeeded", 30),
        (second, "failed", 10),
    ):
        add_event(empty, job, event_type, ago)
    assert Stalled(empty).task_runtimes() == [TaskRuntime("task", 2, *seconds(25, 29.9, 30))]


def test_a_run_that_a_rescue_ended_does_not_count(transaction: Connection) -> None:
    stalled = Stalled(transaction)
    add_rule(transaction, "fail", task_name="fail", action="fail")
    lost = add_stalled_job(transaction, started_ago=1000, task_name="lost")
    add_stalled_job(transaction, started_ago=1000, task_name="fail")
    add_stalled_job(transaction, started_ago=1000, task_name="abort", abort_requested=True)
    by_hand = add_job(transaction, started_ago=1000, task_name="by hand")
    assert len(stalled.retry_stalled_jobs()) == 3
    stalled.retry_job(by_hand)
    assert runs(transaction) == {}

    # Its next run counts.
    transaction.execute("SELECT procrastinate_fetch_job_v2(NULL, %s)", [add_worker(transaction)])
    assert get_job(transaction, lost)["status"] == "doing"
    transaction.execute("SELECT procrastinate_finish_job_v1(%s, 'succeeded', false)", [lost])
    transaction.execute("UPDATE procrastinate_events SET at = at + interval '1 second' WHERE type = 'succeeded'")
    assert runs(transaction) == {"lost": 1}


def test_a_retry_by_the_worker_of_a_job_that_was_rescued_before_counts(empty: Connection) -> None:
    job = add_run(empty, 10, ago=60)
    insert(
        empty,
        "rescues",
        job_id=job,
        queue_name="q",
        task_name="t",
        action="retried",
        reason="heartbeat",
        attempts=0,
        rescued_at="yesterday",
    )
    assert runs(empty) == {"task": 1}


def test_the_runs_of_deleted_jobs_do_not_count(empty: Connection) -> None:
    add_run(empty, 1)
    job = add_run(empty, 2, task_name="deleted")
    empty.execute("DELETE FROM procrastinate_jobs WHERE id = %s", [job])
    assert runs(empty) == {"task": 1}


@pytest.mark.parametrize(
    ("since", "counted"),
    [
        (None, 3),  # 7 days
        ("-infinity", 4),
        ("infinity", 0),
        ("1 hour ago", 1),
        ("1 day ago", 2),
    ],
)
def test_only_runs_that_started_since_then_count(empty: Connection, since: str | None, counted: int) -> None:
    for ago in (WEEK + 10, WEEK, DAY, 3600):
        add_run(empty, 1, ago=ago)
    if since is not None and since.endswith(" ago"):
        (row,) = rows(empty, "SELECT (now() - %s::interval)::text AS at", since.removesuffix(" ago"))
        since = row["at"]
    assert runs(empty, since) == ({"task": counted} if counted else {})


def test_a_run_that_started_a_microsecond_before_does_not_count(empty: Connection) -> None:
    add_run(empty, 1, ago=100.000001)
    (row,) = rows(empty, "SELECT now() - interval '100 seconds' AS at")
    since: datetime = row["at"]
    assert Stalled(empty).task_runtimes(since) == []
    assert Stalled(empty).task_runtimes(since - timedelta(microseconds=1))[0].runs == 1


def test_it_works_where_nothing_can_be_written(empty: Connection) -> None:
    add_run(empty, 1)
    before = contents(empty)
    empty.execute("SET LOCAL transaction_read_only = on")
    assert runs(empty) == {"task": 1}
    assert contents(empty) == before


Event = tuple[int, str | None, int | None]
"""The position of its job, its type, how many microseconds ago."""

events = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(("started", "started", "started", *ENDS, *ENDS, *OTHERS)),
        st.none() | st.integers(0, 2 * WEEK * 10**6) | st.integers(WEEK * 10**6 - 1, WEEK * 10**6 + 1),
    ),
    max_size=30,
)


def runtimes(history: list[Event], tasks: list[str], microseconds: int) -> dict[str, list[int]]:
    """Compute how many microseconds each run took, in a way of its own: event by event."""
    started: dict[int, int] = {}
    found = defaultdict(list)
    for job, event_type, ago in history:
        if ago is None or ago > microseconds:
            continue
        if event_type == "started":
            started[job] = ago
        elif event_type in ENDS and job in started:
            found[tasks[job]].append(started.pop(job) - ago)
    return {task: sorted(durations) for task, durations in found.items()}


def percentile(durations: list[int], fraction: float) -> timedelta:
    """Interpolate as percentile_cont does."""
    position = fraction * (len(durations) - 1)
    low = int(position)
    high = min(low + 1, len(durations) - 1)
    return timedelta(microseconds=durations[low] + (position - low) * (durations[high] - durations[low]))


@with_examples(40)
@given(
    history=events,
    tasks=st.lists(st.sampled_from(("a", "b")), min_size=4, max_size=4),
    microseconds=st.sampled_from((WEEK * 10**6, DAY * 10**6, 3 * WEEK * 10**6)),
)
def test_the_runtimes_are_those_of_the_events(
    empty: Connection, history: list[Event], tasks: list[str], microseconds: int
) -> None:
    # Events are written in the order of their times, except those of a schedule.
    in_order = sorted((event for event in history if event[2] is not None), key=lambda event: -(event[2] or 0))
    history = in_order + [event for event in history if event[2] is None]
    with empty.transaction(force_rollback=True):
        jobs = [add_history(empty, task_name=task) for task in tasks]
        empty.cursor().executemany(
            """
            INSERT INTO procrastinate_events (job_id, type, at)
            VALUES (%s, %s, CASE %s::text WHEN 'scheduled' THEN now() + interval '1 year'
                            ELSE now() - make_interval(secs => %s::float8 / 1e6) END)
            """,
            [(jobs[job], event_type, event_type, ago) for job, event_type, ago in history],
        )
        (row,) = rows(empty, "SELECT now() - make_interval(secs => %s) AS at", microseconds / 10**6)

        measured = Stalled(empty).task_runtimes(row["at"])

        expected = runtimes(history, tasks, microseconds)
        assert {runtime.task_name: runtime.runs for runtime in measured} == {
            task: len(durations) for task, durations in expected.items()
        }
        for runtime in measured:
            durations = expected[runtime.task_name]
            assert runtime.longest == timedelta(microseconds=durations[-1])
            for value, fraction in ((runtime.p50, 0.5), (runtime.p99, 0.99)):
                assert abs(value - percentile(durations, fraction)) <= timedelta(microseconds=2)


# Where the events of a time begin


def first_event_since(connection: Connection, ago: float) -> int:
    (row,) = rows(
        connection,
        "SELECT procrastinate_stalled._first_event_since(now() - make_interval(secs => %s)) AS id",
        ago,
    )
    return int(row["id"])


@with_examples(40)
@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 3),  # seconds since the event before
            st.integers(0, 5),  # for how many seconds its transaction had lasted
            st.integers(1, 4),  # the gap in the ids
            st.sampled_from(("started", "started", "scheduled", None)),
        ),
        min_size=1,
        max_size=40,
    ),
    since=st.integers(-5, 130),
)
def test_the_first_event_is_found_but_for_what_lasting_transactions_wrote_late(
    empty: Connection, steps: list[tuple[int, int, int, str | None]], since: int
) -> None:
    now = sum(step for step, _, _, _ in steps)
    clock, event_id = 0, 1000
    written: list[tuple[int, int]] = []
    with empty.transaction(force_rollback=True):
        job = add_history(empty)
        for step, lasted, gap, event_type in steps:
            clock += step
            event_id += gap
            ago = -1000 if event_type == "scheduled" else now - clock + lasted
            if event_type == "started":
                written.append((event_id, now - clock))
            empty.execute(
                """
                INSERT INTO procrastinate_events (id, job_id, type, at)
                VALUES (%s, %s, %s, now() - make_interval(secs => %s))
                """,
                [event_id, job, event_type, ago],
            )

        first = first_event_since(empty, since)

        longest = max(lasted for _, lasted, _, _ in steps)
        # What it leaves out was written before, or only just after by transactions that last.
        assert all(ago > since - longest for event_id, ago in written if event_id < first)
        # And it takes in nothing that was written before.
        assert all(ago <= since for event_id, ago in written if event_id >= first)


@pytest.mark.parametrize("count", range(1, 9))
def test_in_an_ordered_history_the_first_event_is_found_exactly(empty: Connection, count: int) -> None:
    add_history(empty, *(("started", ago) for ago in range(count, 0, -1)))
    written = rows(empty, "SELECT id FROM procrastinate_events ORDER BY id")
    ids = [event["id"] for event in written]
    found = [first_event_since(empty, ago) for ago in range(count + 1, -1, -1)]
    assert found == [ids[0], *ids, ids[-1] + 1]


def test_an_event_written_late_counts_by_its_time(empty: Connection) -> None:
    late = add_history(empty)
    for _ in range(20):
        add_run(empty, 1, ago=100)
    add_event(empty, late, "started", 5000)
    add_event(empty, late, "succeeded", 50)
    (row,) = rows(empty, "SELECT (now() - interval '1 hour')::text AS at")
    assert runs(empty, row["at"]) == {"task": 20}


def test_schedules_for_the_future_do_not_lead_the_search_astray(empty: Connection) -> None:
    for ago in range(2000, 1000, -50):
        add_history(empty, ("scheduled", -DAY), ("started", ago), ("scheduled", -DAY), ("scheduled", -DAY))
    (row,) = rows(empty, "SELECT min(id) AS id FROM procrastinate_events WHERE at >= now() - interval '1500 seconds'")
    first = first_event_since(empty, 1500)
    started = rows(
        empty, "SELECT now() - at AS ago FROM procrastinate_events WHERE id >= %s AND type = 'started'", first
    )
    assert max(event["ago"] for event in started) == timedelta(seconds=1500)
    assert row["id"] <= first


def test_the_last_hour_of_a_long_history_is_cheap(connection: Connection) -> None:
    connection.execute(
        """
        SET session_replication_role = replica;
        INSERT INTO procrastinate_jobs (queue_name, task_name) SELECT 'default', 'task' FROM generate_series(1, 1000);
        TRUNCATE procrastinate_events;
        INSERT INTO procrastinate_events (job_id, type, at)
            SELECT 1 + number / 2 % 1000,
                   CASE number % 2 WHEN 0 THEN 'started' ELSE 'succeeded' END::procrastinate_job_event_type,
                   now() - interval '300 days' + number * interval '86.4 seconds'
                FROM generate_series(0, 299999) AS number;
        ANALYZE procrastinate_events, procrastinate_jobs;
        SET track_functions = 'all';
        """
    )
    (row,) = rows(connection, "SELECT count(*) FROM procrastinate_events WHERE at >= now() - interval '1 hour'")
    recent = row["count"]
    assert 30 < recent < 50

    plans: list[str] = []
    connection.add_notice_handler(lambda notice: plans.append(notice.message_primary or ""))
    connection.execute(
        """
        LOAD 'auto_explain';
        SET auto_explain.log_min_duration = 0;
        SET auto_explain.log_analyze = on;
        SET auto_explain.log_timing = off;
        SET auto_explain.log_nested_statements = on;
        SET auto_explain.log_format = 'json';
        SET client_min_messages = 'log';
        """
    )
    runtimes = rows(connection, "SELECT * FROM procrastinate_stalled.task_runtimes(now() - interval '1 hour')")
    connection.execute("SET client_min_messages = 'notice'")

    assert [runtime["runs"] for runtime in runtimes] == [recent // 2]
    read = sum(rows_read(json.loads(plan[plan.index("{") :])["Plan"]) for plan in plans if "{" in plan)
    assert recent <= read < 10 * recent


def rows_read(plan: dict[str, Any]) -> int:
    """The rows of events that a plan read, also those that it threw away."""
    read = 0
    if plan.get("Relation Name") == "procrastinate_events":
        kept = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
        read = round(kept * plan["Actual Loops"])
    return read + sum(rows_read(child) for child in plan.get("Plans", []))


# Mistakes


@dataclass(frozen=True)
class Mistakes:
    """A database in which each step is a transaction of its own."""

    connection: Connection

    def rescue(self, **columns: Any) -> int:
        """Let a sweep retry a new stalled job; return its id."""
        job = add_stalled_job(self.connection, **columns)
        Stalled(self.connection).sweep()
        assert get_job(self.connection, job)["status"] == "todo"
        return job

    def fetch(self, job: int) -> None:
        """Let a living worker fetch the job."""
        self.connection.execute("SELECT procrastinate_fetch_job_v2(NULL, %s)", [add_worker(self.connection)])
        assert get_job(self.connection, job)["status"] == "doing"

    def finish(self, job: int, status: str = "succeeded", *, delete_job: bool = False) -> None:
        """Let a worker end the job, as it does without saying which one it is."""
        self.connection.execute("SELECT procrastinate_finish_job_v1(%s, %s, %s)", [job, status, delete_job])

    def lose(self, job: int) -> None:
        """Let the worker of the job fall silent, and a sweep come."""
        self.connection.execute("UPDATE procrastinate_workers SET last_heartbeat = now() - interval '1 hour'")
        add_worker(self.connection)
        Stalled(self.connection).sweep()
        assert get_job(self.connection, job)["status"] == "todo"

    def seen(self) -> list[int]:
        """The jobs of the rescues that were mistakes."""
        query = "SELECT job_id FROM procrastinate_stalled._false_rescues('-infinity') ORDER BY id"
        return [rescue["job_id"] for rescue in rows(self.connection, query)]

    def status(self) -> Status:
        """What `status` says of them."""
        [row] = [row for row in Stalled(self.connection).status() if row.name == "false_rescues"]
        return row


@pytest.fixture
def mistakes(connection: Connection) -> Mistakes:
    return Mistakes(connection)


@pytest.mark.parametrize("status", ["succeeded", "failed", "aborted"])
def test_a_former_run_that_ends_before_the_retry_starts_is_seen(mistakes: Mistakes, status: str) -> None:
    job = mistakes.rescue()
    mistakes.finish(job, status)
    assert mistakes.seen() == [job]
    assert get_job(mistakes.connection, job)["status"] == status


def test_a_retry_that_waits_or_runs_or_ends_is_no_mistake(mistakes: Mistakes) -> None:
    job = mistakes.rescue()
    assert mistakes.seen() == []
    mistakes.fetch(job)
    assert mistakes.seen() == []
    mistakes.finish(job)
    assert mistakes.seen() == []


@pytest.mark.parametrize("status", ["failed", "aborted"])
def test_a_retry_that_fails_is_no_mistake(mistakes: Mistakes, status: str) -> None:
    job = mistakes.rescue()
    mistakes.fetch(job)
    mistakes.finish(job, status)
    assert mistakes.seen() == []


def test_a_former_run_that_ends_while_the_retry_runs_cannot_be_seen(mistakes: Mistakes) -> None:
    job = mistakes.rescue()
    mistakes.fetch(job)
    mistakes.finish(job)  # by the worker that was thought dead: the events are those of the retry
    assert get_events(mistakes.connection, job) == ["deferred", "started", "deferred_for_retry", "started", "succeeded"]
    assert mistakes.seen() == []


def test_a_former_run_whose_end_deletes_the_job_cannot_be_seen(mistakes: Mistakes) -> None:
    job = mistakes.rescue()
    mistakes.finish(job, delete_job=True)
    assert mistakes.seen() == []


@pytest.mark.parametrize("abort", ["true", "false"])
def test_a_retry_that_is_cancelled_is_no_mistake(mistakes: Mistakes, abort: str) -> None:
    job = mistakes.rescue()
    mistakes.connection.execute("SELECT procrastinate_cancel_job_v1(%s, %s::boolean, false)", [job, abort])
    assert get_events(mistakes.connection, job)[-1] == "cancelled"
    assert mistakes.seen() == []


@needs_retry_of_failed_jobs
def test_a_mistake_stays_one_when_the_failed_job_is_retried(mistakes: Mistakes) -> None:
    job = mistakes.rescue()
    mistakes.finish(job, "failed")
    mistakes.connection.execute(RETRY_AT_ONCE, [job])
    assert mistakes.seen() == [job]
    mistakes.fetch(job)
    assert mistakes.seen() == [job]
    mistakes.finish(job)
    assert mistakes.seen() == [job]


def test_of_several_rescues_of_a_job_the_one_that_was_a_mistake_is_seen(mistakes: Mistakes) -> None:
    job = mistakes.rescue()
    mistakes.fetch(job)
    mistakes.lose(job)
    mistakes.fetch(job)
    mistakes.lose(job)
    assert mistakes.seen() == []
    mistakes.finish(job)
    query = "SELECT attempts FROM procrastinate_stalled._false_rescues('-infinity')"
    assert rows(mistakes.connection, query) == [{"attempts": 2}]


def test_a_delayed_retry_may_be_a_mistake_too(mistakes: Mistakes) -> None:
    mistakes.connection.execute("UPDATE procrastinate_stalled.rules SET retry_delay = '1 hour'")
    job = mistakes.rescue()
    assert "scheduled" in get_events(mistakes.connection, job)
    assert mistakes.seen() == []
    mistakes.finish(job)
    assert mistakes.seen() == [job]


@pytest.mark.parametrize("columns", [{"task_name": "fail"}, {"abort_requested": True}])
def test_only_retries_can_be_mistakes(mistakes: Mistakes, columns: dict[str, Any]) -> None:
    add_rule(mistakes.connection, "fail", task_name="fail", action="fail")
    add_stalled_job(mistakes.connection, **columns)
    Stalled(mistakes.connection).sweep()
    assert mistakes.seen() == []


def test_status_tells_how_many_there_were_and_who_made_them(mistakes: Mistakes) -> None:
    assert mistakes.status() == Status(
        "false_rescues", "ok", "0 of 0 retries of the last 7 days are known to have been mistakes", None
    )
    connection = mistakes.connection
    add_rule(connection, "hasty", task_name="hasty")
    wrong = [mistakes.rescue(task_name=name) for name in ("hasty", "task", "hasty")]
    mistakes.rescue(task_name="right")
    by_hand = add_job(connection)
    Stalled(connection).retry_job(by_hand)
    old = mistakes.rescue()
    assert mistakes.status().detail == "0 of 6 retries of the last 7 days are known to have been mistakes"

    for job in (*wrong, by_hand, old):
        mistakes.finish(job)
    for table, column in (("procrastinate_stalled.rescues", "rescued_at"), ("procrastinate_events", "at")):
        connection.execute(
            f"UPDATE {table} SET {column} = {column} - interval '7 days 1 second' WHERE job_id = %s", [old]
        )

    row = mistakes.status()
    assert row.level == "warning"
    assert row.detail == (
        "4 of 5 retries of the last 7 days (80.0 %) were of jobs whose former run finished after all: "
        '2 by rule "hasty", 1 by retry_job(), 1 by rule "default"'
    )
    assert row.hint
    assert "longer heartbeat_timeout" in row.hint


BY_RULE = "Give that rule a longer heartbeat_timeout or run_timeout."
BY_HAND = "Before retry_job(), see explain_job() and workers()."


def test_the_hint_is_for_those_who_made_the_mistakes(mistakes: Mistakes) -> None:
    def check_hint(*advice: str) -> None:
        assert mistakes.status().hint == " ".join(
            [
                "Their workers were alive.",
                *advice,
                "Only those that finished before their retry was started can be seen.",
            ]
        )

    by_hand = add_job(mistakes.connection)
    Stalled(mistakes.connection).retry_job(by_hand)
    mistakes.finish(by_hand)
    check_hint(BY_HAND)

    # The name of a rule may be any.
    add_rule(mistakes.connection, "retry_job()")
    by_rule = mistakes.rescue()
    mistakes.finish(by_rule)
    check_hint(BY_RULE, BY_HAND)

    mistakes.connection.execute("DELETE FROM procrastinate_stalled.rescues WHERE job_id = %s", [by_hand])
    check_hint(BY_RULE)
