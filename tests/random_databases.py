"""Databases made up by hypothesis: workers, jobs with their events, rules, notes of orphans and earlier rescues."""

import os
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.jobs import Connection, add_event, add_job, add_orphan_note, add_rule, add_worker, insert

SECOND = 1_000_000  # PostgreSQL's times count microseconds
DAY = 86_400 * SECOND
TIMEOUTS = (60 * SECOND, 300 * SECOND, 3600 * SECOND)
STATUSES = ("todo", "succeeded", "failed", "cancelled", "aborting", "aborted")
QUEUES = ("default", "q" * 128)
TASKS = ("billing.send", "billing_send", "Billing.send", "ümlaut 100%")
PATTERNS = ("billing.%", "billing_send", r"billing\_send", "%", "nothing")
KEYS = ("a", "")


def with_examples(number: int) -> settings:
    """Let hypothesis try so many examples, each in a transaction of its own; or a quarter in a cell of the matrix."""
    return settings(
        max_examples=number // 4 if "MATRIX_CELL" in os.environ else number,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@dataclass(frozen=True)
class RandomJob:
    """A job; times are microseconds ago, None is NULL."""

    status: str
    worker: int | None
    """The position of its worker."""
    columns: dict[str, Any]
    events: list[tuple[str | None, int | None]]
    """Type and time. They take the place of its real `started` event."""
    orphan_note: tuple[int, int] | None
    """Its attempts and time in `orphans`."""
    rescues: list[tuple[int, str, str]]
    """Attempts, action and reason of its rows in `rescues`."""


@dataclass(frozen=True)
class Night:
    """What befell all workers, and what the operator did about it."""

    available_for: int
    """How long ago the server became available, in microseconds."""
    outage_grace: int
    """In microseconds."""
    require_live_worker: bool
    heard: int
    """How long ago the workers that were there before beat, in microseconds."""
    pauses: list[dict[str, str | None]]
    """The arguments of `pause`."""

    def create(self, connection: Connection) -> None:
        """Let it befall the database of the connection."""
        connection.execute(
            "SELECT set_config('tests.available_since', (now() - make_interval(secs => %s))::text, true)",
            [self.available_for / SECOND],
        )
        connection.execute(
            """
            UPDATE procrastinate_stalled.settings
            SET outage_grace = make_interval(secs => %s), require_live_worker = %s
            """,
            [self.outage_grace / SECOND, self.require_live_worker],
        )
        connection.execute(
            "UPDATE procrastinate_workers SET last_heartbeat = now() - make_interval(secs => %s)",
            [self.heard / SECOND],
        )
        for pause in self.pauses:
            connection.execute(
                "SELECT procrastinate_stalled.pause('1 day', queue => %(queue)s, task_name => %(task_name)s)", pause
            )


@dataclass(frozen=True)
class RandomDatabase:
    """What to put into a database."""

    workers: list[int]
    """How long each worker has been silent, in microseconds."""
    jobs: list[RandomJob]
    rules: list[dict[str, Any]] = field(default_factory=list)
    """Instead of the rule of the install."""
    night: Night | None = None

    def create(self, connection: Connection) -> None:
        """Put all of it into the database of the connection."""
        connection.execute("DELETE FROM procrastinate_stalled.rules")
        if self.night is not None:
            self.night.create(connection)
        for number, rule in enumerate(self.rules):
            add_rule(connection, f"rule {number}", **rule)
        worker_ids = [add_worker(connection, silent_for / SECOND) for silent_for in self.workers]
        for job in self.jobs:
            worker_id = None if job.worker is None else worker_ids[job.worker]
            job_id = add_job(connection, job.status, worker_id=worker_id, **job.columns)
            connection.execute("DELETE FROM procrastinate_events WHERE job_id = %s AND type = 'started'", [job_id])
            for event_type, ago in job.events:
                add_event(connection, job_id, event_type, None if ago is None else ago / SECOND)
            if job.orphan_note is not None:
                attempts, ago = job.orphan_note
                add_orphan_note(connection, job_id, attempts, ago / SECOND)
            for attempts, action, reason in job.rescues:
                insert(
                    connection,
                    "rescues",
                    job_id=job_id,
                    queue_name="q",
                    task_name="t",
                    action=action,
                    reason=reason,
                    attempts=attempts,
                )


def moments(*thresholds: int) -> st.SearchStrategy[int]:
    """Microseconds ago: exactly at a threshold, one microsecond beside it, or anywhere."""
    near = st.builds(int.__add__, st.sampled_from((0, *TIMEOUTS, *thresholds)), st.integers(-1, 1))
    return near | st.just(DAY) | st.integers(-60 * SECOND, 10**13)


def usually(value: Any, otherwise: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The value two times out of three: the conditions for a rescue are many, and most must hold."""
    return st.just(value) | st.just(value) | otherwise


args = st.dictionaries(st.sampled_from(("a", "b")), st.none() | st.integers(0, 1) | st.lists(st.integers(0, 1)))
queues = usually(None, st.sampled_from(QUEUES))
tasks = usually(None, st.sampled_from(TASKS))
patterns = usually(None, st.sampled_from(PATTERNS))


def _in_seconds(microseconds: int) -> str:
    # PostgreSQL 14 knows no interval of more than 2147483647 microseconds, if they are called so.
    return f"{microseconds // SECOND}.{microseconds % SECOND:06} seconds"


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    """Rules of all kinds."""
    timeouts = usually("1 minute", st.none() | st.sampled_from(TIMEOUTS).map(_in_seconds))
    return {
        "position": draw(st.integers(0, 2)),
        "enabled": draw(usually(True, st.booleans())),
        "expires_at": draw(usually(None, st.sampled_from(("now", "tomorrow")))),
        "queue_name": draw(queues),
        "task_name": draw(patterns),
        "args": draw(usually(None, args)),
        "heartbeat_timeout": draw(timeouts),
        "run_timeout": draw(st.none() | timeouts),
        "action": draw(usually("retry", st.sampled_from(("fail", "ignore")))),
        "max_rescues": draw(st.none() | st.integers(0, 3)),
        "retry_delay": draw(st.sampled_from(("0", "1 minute", "1 day"))),
        "retry_backoff": draw(st.floats(1, 1000)),
        "retry_queue_name": draw(queues),
        "retry_priority": draw(st.none() | st.integers(-5, 5)),
        "on_duplicate": draw(st.sampled_from(("fail", "wait"))),
    }


@st.composite
def databases(draw: st.DrawFn, *thresholds: int) -> RandomDatabase:
    """Databases with up to four workers, twelve jobs and three rules, of which the last one may match every job.

    Parameters
    ----------
    thresholds :
        Microseconds ago, at and around which things shall have happened.
    """
    times = moments(*thresholds)
    workers = draw(usually([DAY], st.lists(times, max_size=4)))
    running: set[str | None] = {None}
    waiting: set[str | None] = {None}
    jobs = []
    for _ in range(draw(usually(8, st.integers(0, 12)))):
        status = draw(usually("doing", st.sampled_from(STATUSES)))
        lock = draw(usually(None, st.sampled_from(KEYS)))
        queueing_lock = draw(st.sampled_from((None, *KEYS)))
        # Procrastinate has unique indexes on these.
        if status == "doing" and lock in running:
            lock = None
        if status == "todo" and queueing_lock in waiting:
            queueing_lock = None
        if status == "doing":
            running.add(lock)
        if status == "todo":
            waiting.add(queueing_lock)
        attempts = draw(st.integers(0, 4))
        queue_name = draw(usually("default", st.sampled_from(QUEUES)))
        # Procrastinate notifies of an abort request, which fails in a queue with a long name.
        abort_requested = status != "todo" and len(queue_name) < 40 and draw(usually(False, st.booleans()))
        jobs.append(
            RandomJob(
                status=status,
                worker=draw(st.sampled_from((*range(len(workers)), None))),
                columns={
                    "queue_name": queue_name,
                    "task_name": draw(st.sampled_from(TASKS)),
                    "priority": draw(st.integers(-5, 5)),
                    "lock": lock,
                    "queueing_lock": queueing_lock,
                    "args": draw(args),
                    "scheduled_at": draw(usually(None, st.sampled_from(("yesterday", "tomorrow")))),
                    "attempts": attempts,
                    "abort_requested": abort_requested,
                },
                events=draw(
                    st.lists(
                        st.tuples(
                            usually("started", st.sampled_from(("deferred_for_retry", None))),
                            usually(DAY, st.none() | times),
                        ),
                        max_size=3,
                    )
                ),
                orphan_note=draw(st.none() | st.tuples(usually(attempts, st.just(attempts - 1)), usually(DAY, times))),
                rescues=draw(
                    st.lists(
                        st.tuples(
                            st.integers(0, 4),
                            usually("retried", st.just("failed")),
                            usually("heartbeat", st.just("manual")),
                        ),
                        max_size=3,
                    )
                ),
            )
        )
    catch_all: list[dict[str, Any]] = [
        {"run_timeout": "1 hour", "on_duplicate": "wait"},
        {"retry_delay": "1 minute", "max_rescues": 1},
        {},
        {"enabled": False},
    ]
    return RandomDatabase(workers, jobs, [*draw(st.lists(rules(), max_size=2)), draw(st.sampled_from(catch_all))])


@st.composite
def nights(draw: st.DrawFn) -> RandomDatabase:
    """Databases after a restart of the server, with pauses, and perhaps without a living worker."""
    near = st.builds(int.__add__, st.sampled_from((30 * SECOND, *TIMEOUTS, DAY)), st.integers(-1, 1))
    night = Night(
        available_for=draw(usually(10 * DAY, near | st.just(-SECOND * 60))),
        outage_grace=draw(st.sampled_from((0, *TIMEOUTS))),
        require_live_worker=draw(st.booleans()),
        heard=draw(usually(0, near)),
        pauses=draw(usually([], st.lists(st.fixed_dictionaries({"queue": queues, "task_name": patterns}), max_size=2))),
    )
    return replace(draw(databases()), night=night)
