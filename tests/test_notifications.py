"""A retried job is made known to the workers that wait, just as Procrastinate makes a deferred one known."""

from typing import LiteralString

import pytest
from psycopg import sql

from tests.conftest import Connect, RunWorker
from tests.jobs import Connection, add_job, add_rule, add_stalled_job, add_worker, get_job, rows
from tests.sessions import SWEEP
from tests.wait import wait_until

ANY_QUEUE = "procrastinate_any_queue_v1"
RESCUE: LiteralString = "SELECT * FROM procrastinate_stalled.retry_stalled_jobs()"

each_sweep = pytest.mark.parametrize("sweep", [SWEEP, RESCUE])


def channel(queue_name: str) -> str:
    return f"procrastinate_queue_v1#{queue_name}"


def payload(job_id: int) -> str:
    return f'{{"type" : "job_inserted", "job_id" : {job_id}}}'


class Listener:
    """A session that listens as workers do, to all queues and to those of the given names."""

    def __init__(self, connect: Connect, *queue_names: str) -> None:
        self.connection = connect()
        self.other_session = connect()
        for name in ("the end", ANY_QUEUE, *map(channel, queue_names)):
            self.connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(name)))

    def heard(self) -> list[tuple[str, str]]:
        """The channels and payloads of what was committed since it listens, or since the last call, in order."""
        self.other_session.execute('NOTIFY "the end"')
        heard: list[tuple[str, str]] = []
        for notification in self.connection.notifies(timeout=30):
            if notification.channel == "the end":
                return sorted(heard)
            heard.append((notification.channel, notification.payload))
        raise TimeoutError("not even the end was heard")


@each_sweep
def test_each_queue_of_retried_jobs_is_notified_once(
    sweep: LiteralString, connect: Connect, connection: Connection
) -> None:
    first, _, _ = [add_stalled_job(connection, queue_name="one") for _ in range(3)]
    second, _ = [add_stalled_job(connection, queue_name="two") for _ in range(2)]
    add_job(connection, "todo", queue_name="three")
    listener = Listener(connect, "one", "two", "three")

    connection.execute(sweep)

    assert listener.heard() == [
        (ANY_QUEUE, payload(first)),
        (ANY_QUEUE, payload(second)),
        (channel("one"), payload(first)),
        (channel("two"), payload(second)),
    ]


def test_a_queue_is_notified_once_however_many_looks_a_batch_needs(connect: Connect, connection: Connection) -> None:
    first = add_stalled_job(connection)
    for _ in range(3):
        add_stalled_job(connection, queueing_lock="key")
    listener = Listener(connect, "default")

    connection.execute(SWEEP)

    assert rows(connection, "SELECT retried, failed FROM procrastinate_stalled.sweeps") == [{"retried": 2, "failed": 2}]
    assert listener.heard() == [(ANY_QUEUE, payload(first)), (channel("default"), payload(first))]


def test_the_notifications_of_a_retried_job_are_those_of_a_deferred_one(
    connect: Connect, connection: Connection
) -> None:
    listener = Listener(connect, "default")
    job_id = add_stalled_job(connection)
    of_the_deferred = listener.heard()

    connection.execute(SWEEP)

    assert listener.heard() == of_the_deferred == [(ANY_QUEUE, payload(job_id)), (channel("default"), payload(job_id))]


@each_sweep
def test_nobody_is_woken_for_a_job_that_is_to_be_retried_later(
    sweep: LiteralString, connect: Connect, connection: Connection
) -> None:
    connection.execute("UPDATE procrastinate_stalled.rules SET retry_delay = '1 minute'")
    later = add_stalled_job(connection, queue_name="later")
    at_once = add_stalled_job(connection, lock="lock")
    listener = Listener(connect, "default", "later")

    connection.execute(sweep)

    assert get_job(connection, later)["scheduled_at"] is not None
    assert listener.heard() == [(ANY_QUEUE, payload(at_once)), (channel("default"), payload(at_once))]


def test_nobody_is_woken_for_a_job_that_has_ended(connect: Connect, connection: Connection) -> None:
    add_rule(connection, "fail", task_name="fail", action="fail")
    add_stalled_job(connection, task_name="fail")
    add_stalled_job(connection, abort_requested=True)
    listener = Listener(connect, "default")

    connection.execute(SWEEP)

    assert rows(connection, "SELECT failed, aborted FROM procrastinate_stalled.sweeps") == [{"failed": 1, "aborted": 1}]
    assert listener.heard() == []


def test_nobody_is_woken_by_a_rescue_that_is_rolled_back(connect: Connect, connection: Connection) -> None:
    add_stalled_job(connection)
    listener = Listener(connect, "default")
    sweep = connect(autocommit=False)

    sweep.execute(RESCUE)
    sweep.rollback()

    assert listener.heard() == []


@pytest.mark.parametrize(
    ("queue_name", "fits"),
    [
        ("q" * 40, True),
        ("q" * 41, False),
        ("q" * 128, False),
        ("ü" * 20, True),
        ("ü" * 20 + "q", False),
        ("🐘" * 10, True),
        ("🐘" * 11, False),
        ("🐘" * 128, False),
        ("\"quoted\" 'queue'; \\", True),
        ("", True),
    ],
)
def test_a_queue_whose_channel_would_be_too_long_is_notified_on_the_one_of_all_queues(
    queue_name: str, fits: bool, connect: Connect, connection: Connection
) -> None:
    # Procrastinate itself cannot insert a job into a queue with a name that long, but can retry it there.
    job_id = add_stalled_job(connection, queue_name=queue_name)
    other = add_stalled_job(connection, queue_name="other")
    listener = Listener(connect, queue_name, "other")

    connection.execute(SWEEP)

    assert listener.heard() == sorted(
        [
            (ANY_QUEUE, payload(job_id)),
            (ANY_QUEUE, payload(other)),
            (channel("other"), payload(other)),
            *([(channel(queue_name), payload(job_id))] if fits else []),
        ]
    )
    assert rows(connection, "SELECT retried, error FROM procrastinate_stalled.sweeps") == [
        {"retried": 2, "error": None}
    ]


def test_the_queue_is_notified_to_which_a_rule_moves_the_job(connect: Connect, connection: Connection) -> None:
    connection.execute("UPDATE procrastinate_stalled.rules SET retry_queue_name = 'new'")
    job_id = add_stalled_job(connection, queue_name="old")
    listener = Listener(connect, "old", "new")

    connection.execute(SWEEP)

    assert listener.heard() == [(ANY_QUEUE, payload(job_id)), (channel("new"), payload(job_id))]


def test_the_queue_of_a_waiting_sibling_is_notified_when_the_stalled_job_has_been_ended_for_it(
    connect: Connect, connection: Connection
) -> None:
    add_stalled_job(connection, queue_name="of the stalled one", lock="lock", queueing_lock="key")
    sibling = add_job(connection, "todo", queue_name="of the sibling", lock="lock", queueing_lock="key")
    listener = Listener(connect, "of the stalled one", "of the sibling")

    connection.execute(SWEEP)

    assert listener.heard() == [(ANY_QUEUE, payload(sibling)), (channel("of the sibling"), payload(sibling))]


@pytest.mark.parametrize(
    ("arguments", "queue_name"),
    [("", "default"), (", queue => 'other'", "other"), (", retry_at => now() + interval '1 hour'", None)],
)
def test_retry_job_notifies_the_queue_of_a_job_that_is_due(
    arguments: LiteralString, queue_name: str | None, connect: Connect, connection: Connection
) -> None:
    job_id = add_stalled_job(connection)
    listener = Listener(connect, "default", "other")

    connection.execute(f"SELECT procrastinate_stalled.retry_job(%s{arguments})", [job_id])

    if queue_name is None:
        assert listener.heard() == []
    else:
        assert listener.heard() == [(ANY_QUEUE, payload(job_id)), (channel(queue_name), payload(job_id))]


@pytest.mark.parametrize("queues", [None, ["a queue"]])
def test_a_worker_that_waits_starts_a_retried_job_at_once(
    queues: list[str] | None, database: str, connection: Connection, run_worker: RunWorker
) -> None:
    worker = run_worker(database, queues=queues, fetch_job_polling_interval=600, stalled_worker_timeout=86400)
    listens = "SELECT FROM pg_stat_activity WHERE starts_with(query, 'LISTEN') AND state = 'idle'"
    wait_until(lambda: rows(connection, listens), "the worker listens")
    is_busy = """
        SELECT
            FROM pg_stat_activity
            WHERE datname = current_database()
                AND pid <> pg_backend_pid()
                AND (state <> 'idle' OR state_change > clock_timestamp() - interval '0.5 seconds')
    """

    # Twice, because a notification that it cannot read would end its listening.
    for _ in range(2):
        # A notification that comes while it fetches is lost: it forgets them when the fetch has found no job.
        wait_until(lambda: not rows(connection, is_busy), "the worker waits")
        # Never in todo before, so that nothing else has woken the worker.
        (lost,) = rows(
            connection,
            """
            INSERT INTO procrastinate_jobs (queue_name, task_name, status, worker_id)
                VALUES ('a queue', 'tests.tasks.succeed', 'doing', %s)
                RETURNING id
            """,
            add_worker(connection, silent_for=3600),
        )
        connection.execute(SWEEP)

        def has_run(job_id: int = lost["id"]) -> bool:
            job = get_job(connection, job_id)
            return (job["status"], job["worker_id"]) == ("succeeded", worker.id)

        wait_until(has_run, "the worker has run the job")
