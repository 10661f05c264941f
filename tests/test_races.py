"""What happens when a sweep meets workers, applications and other sweeps, at each step of it.

What must come out of a meeting is what comes out when its parts follow each other: each test here first lets them do
so, and then meet in the same database, emptied.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from tests.conftest import Connect
from tests.jobs import (
    Connection,
    add_job,
    add_orphan_note,
    add_rule,
    add_stalled_job,
    add_worker,
    get_events,
    get_job,
    rows,
    update_job,
)
from tests.procrastinate_release import RETRY_AT_ONCE, RETRY_JOB
from tests.server import Server, database_name
from tests.sessions import SWEEP, Point, add_points, no_deadlock, paused, running

NAME = operator.attrgetter("name")
RESCUE: LiteralString = "SELECT * FROM procrastinate_stalled.retry_stalled_jobs()"


@pytest.fixture(scope="module")
def database(server: Server) -> Iterator[str]:
    """One database for all: the tests empty it."""
    with server.database("ours") as conninfo:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            add_points(connection)
        yield conninfo


@pytest.fixture(autouse=True)
def _empty_database_without_deadlocks(server: Server, database: str) -> Iterator[None]:
    with psycopg.connect(database, autocommit=True) as connection:
        empty(connection)
    with no_deadlock(server, database):
        yield


@dataclass(frozen=True)
class Act:
    """What another session may do to a job that a sweep takes for stalled."""

    name: str
    query: LiteralString
    on_worker: bool = False
    """It locks the worker's row first."""
    ends_the_run: bool = True
    """What the sweep judged is no more."""


ACTS = [
    Act("finish", "SELECT procrastinate_finish_job_v1(%(job)s, 'succeeded', false)"),
    Act("finish as failed", "SELECT procrastinate_finish_job_v1(%(job)s, 'failed', false)"),
    Act("finish and delete", "SELECT procrastinate_finish_job_v1(%(job)s, 'succeeded', true)"),
    Act("retry v1", "SELECT procrastinate_retry_job_v1(%(job)s, '2100-01-01', 7, 'other', 'lock')"),
    Act("retry", f"SELECT {RETRY_JOB}(%(job)s, '2100-01-01', 7, 'other', 'lock')"),
    Act(
        "retry and fetch",
        f"""
        SELECT {RETRY_JOB}(%(job)s, NULL, NULL, NULL, NULL),
               procrastinate_fetch_job_v2('{{contested}}', %(worker)s)
        """,
    ),
    Act("abort", "SELECT procrastinate_cancel_job_v1(%(job)s, true, false)"),
    Act("delete", "DELETE FROM procrastinate_jobs WHERE id = %(job)s"),
    Act("new priority", "UPDATE procrastinate_jobs SET priority = 7 WHERE id = %(job)s", ends_the_run=False),
    Act("retry_job", "SELECT procrastinate_stalled.retry_job(%(job)s, '2100-01-01', 7, 'other', 'lock')"),
    Act("second sweep", "SELECT procrastinate_stalled.retry_stalled_jobs('contested')", on_worker=True),
    Act("prune", "SELECT procrastinate_prune_stalled_workers_v1(30)", on_worker=True),
    Act("unregister", "SELECT procrastinate_unregister_worker_v1(%(worker)s)", on_worker=True),
    Act("heartbeat", "SELECT procrastinate_update_heartbeat_v1(%(worker)s)", on_worker=True),
]


def acts(*names: str) -> list[Act]:
    return [act for act in ACTS if act.name in names]


WORKER_IS_LOCKED = (Point.AFTER_WORKER_LOCK, Point.AFTER_JUDGEMENT, Point.WITHIN_UPDATE)
# The point at which a sweep pauses, and an act that can go on there. None: the sweep has not begun.
MEETINGS = [
    pytest.param(point, act, id=f"{'before' if point is None else point.name.lower()}-{act.name}")
    for point in (None, *Point)
    for act in ACTS
    # From its lock on the worker belongs to the sweep, and `rescues` is what it is kept from there.
    if not (act.on_worker and point in WORKER_IS_LOCKED)
    and not ("stalled" in act.query and point is Point.AFTER_WORKER_LOCK)
]


@dataclass(frozen=True)
class Scene:
    """A job and its worker, between two orphans that no other session touches."""

    job: int
    worker: int
    first: int
    last: int

    @property
    def parameters(self) -> dict[str, int]:
        """The parameters of the acts."""
        return {"job": self.job, "worker": self.worker}

    def picture(self, connection: Connection) -> dict[str, object]:
        """All that can be seen of the job and its worker, whatever their ids and the time."""
        jobs = rows(connection, "SELECT * FROM procrastinate_jobs WHERE id = %s", self.job)
        return {
            "job": [job | {"id": None, "worker_id": job["worker_id"] is not None} for job in jobs],
            "events": get_events(connection, self.job),
            "rescues": rows(
                connection,
                """
                SELECT action, reason, detail, rule_name, worker_id IS NULL AS orphan, attempts, scheduled_at
                FROM procrastinate_stalled.rescues
                WHERE job_id = %s
                ORDER BY id
                """,
                self.job,
            ),
            "worker": rows(
                connection,
                "SELECT last_heartbeat < now() - interval '30 s' AS silent FROM procrastinate_workers WHERE id = %s",
                self.worker,
            ),
        }

    def assert_the_others_were_rescued_at_once(self, connection: Connection) -> None:
        """Check that the orphans were retried, once, together, and that nothing went wrong on the way."""
        rescues = rows(
            connection,
            """
            SELECT count(*), count(DISTINCT job_id) AS jobs, count(DISTINCT xmin::text) AS transactions
            FROM procrastinate_stalled.rescues
            WHERE job_id = ANY (%s)
            """,
            [self.first, self.last],
        )
        assert rescues == [{"count": 2, "jobs": 2, "transactions": 1}]
        for job_id in (self.first, self.last):
            assert get_events(connection, job_id) == ["deferred", "started", "deferred_for_retry"]
            assert get_job(connection, job_id)["status"] == "todo"
        assert rows(connection, "SELECT FROM procrastinate_stalled.sweeps WHERE error IS NOT NULL") == []


def empty(connection: Connection) -> None:
    connection.execute(
        """
        TRUNCATE procrastinate_jobs, procrastinate_events, procrastinate_workers, procrastinate_periodic_defers,
            procrastinate_stalled.rescues, procrastinate_stalled.sweeps, procrastinate_stalled.orphans
        """
    )
    connection.execute("DELETE FROM procrastinate_stalled.rules WHERE name <> 'default'")
    add_worker(connection)


def set_the_scene(connection: Connection) -> Scene:
    """Empty the database and add three stalled jobs, of which a sweep pauses at the first (`Point.WITHIN_UPDATE`)."""
    empty(connection)
    first = add_orphan(connection, task_name="pause")
    worker = add_worker(connection, silent_for=3600)
    job = add_job(connection, queue_name="contested", worker_id=worker)
    return Scene(job=job, worker=worker, first=first, last=add_orphan(connection))


def add_orphan(connection: Connection, **columns: Any) -> int:
    """Add a job that a sweep saw without a worker's row an hour ago."""
    job_id = add_job(connection, **columns)
    add_orphan_note(connection, job_id, attempts=0, seen_ago=3600)
    return job_id


def in_turn(connection: Connection, *queries: LiteralString) -> tuple[dict[str, object], str | None]:
    """The picture when the statements follow each other, and the SQLSTATE of the last one if it raises."""
    scene = set_the_scene(connection)
    error = None
    for query in queries:
        assert error is None
        error = error_of(lambda query=query: connection.execute(query, scene.parameters))  # type: ignore[misc]
    return scene.picture(connection), error


def error_of(call: Callable[[], object]) -> str | None:
    """The SQLSTATE of the error that a statement raises, if it does."""
    try:
        call()
    except psycopg.Error as error:
        return error.sqlstate
    return None


@pytest.mark.parametrize("ending", ["commits before", "commits afterwards", "rolls back afterwards"])
@pytest.mark.parametrize(("point", "act"), MEETINGS)
def test_a_sweep_leaves_a_job_to_the_session_that_came_first(
    point: Point | None, act: Act, ending: str, connect: Connect, connection: Connection
) -> None:
    acts = [] if ending == "rolls back afterwards" else [act.query]
    acted, _ = in_turn(connection, *acts)
    swept, _ = in_turn(connection, *acts, SWEEP)
    scene = set_the_scene(connection)
    other = connect(autocommit=False, options="-c lock_timeout=10s")

    with ExitStack() as stack:
        sweep = None if point is None else stack.enter_context(paused(connect, point))
        other.execute(act.query, scene.parameters)
        if ending == "commits before":
            other.commit()
        if sweep is None:
            connection.execute(SWEEP)
        else:
            sweep.resume()
    if ending == "commits afterwards":
        other.commit()
    other.rollback()

    is_seen = point in {None, Point.BEFORE_WORKER_LOCK, Point.AFTER_WORKER_LOCK}  # by the judgement
    at_once = ending == "commits before" and (is_seen or not act.ends_the_run)
    assert scene.picture(connection) == (swept if at_once else acted)
    scene.assert_the_others_were_rescued_at_once(connection)

    connection.execute(SWEEP)

    assert scene.picture(connection) == swept


@pytest.mark.parametrize("point", Point, ids=NAME)
def test_a_sweep_leaves_a_job_that_its_worker_failed_when_it_was_to_be_aborted(
    point: Point, connect: Connect, connection: Connection
) -> None:
    scene = set_the_scene(connection)
    update_job(connection, scene.job, abort_requested=True)

    with paused(connect, point) as sweep:
        connection.execute(RETRY_AT_ONCE, [scene.job])
        sweep.resume()

    assert get_job(connection, scene.job)["status"] == "failed"
    assert get_events(connection, scene.job) == ["deferred", "started", "abort_requested", "failed"]
    scene.assert_the_others_were_rescued_at_once(connection)


@pytest.mark.parametrize("act", acts("prune", "unregister", "retry and fetch"), ids=NAME)
@pytest.mark.parametrize("point", [Point.AFTER_JUDGEMENT, Point.WITHIN_UPDATE], ids=NAME)
def test_a_sweep_leaves_a_job_that_ran_for_too_long_when_it_changes_hands(
    point: Point, act: Act, connect: Connect, connection: Connection
) -> None:
    scene = set_the_scene(connection)
    add_rule(connection, "short", queue_name="contested", heartbeat_timeout=None, run_timeout=timedelta(minutes=1))
    connection.execute("UPDATE procrastinate_events SET at = at - interval '1 hour' WHERE job_id = %s", [scene.job])
    # Silent enough to be pruned, and not for a sweep, which does not lock it then.
    connection.execute(
        "UPDATE procrastinate_workers SET last_heartbeat = now() - interval '1 minute' WHERE id = %s", [scene.worker]
    )

    with paused(connect, point) as sweep:
        connection.execute(act.query, scene.parameters)
        sweep.resume()

    assert get_job(connection, scene.job)["status"] == "doing"
    assert rows(connection, "SELECT FROM procrastinate_stalled.rescues WHERE job_id = %s", scene.job) == []
    scene.assert_the_others_were_rescued_at_once(connection)


@pytest.mark.parametrize("ending", ["commits", "rolls back"])
@pytest.mark.parametrize("act", acts("prune", "unregister", "heartbeat"), ids=NAME)
@pytest.mark.parametrize("point", WORKER_IS_LOCKED, ids=NAME)
def test_a_worker_that_a_sweep_holds_is_changed_when_its_job_has_been_retried(
    point: Point, act: Act, ending: str, connect: Connect, connection: Connection
) -> None:
    expected, error = in_turn(connection, SWEEP, act.query) if ending == "commits" else in_turn(connection, SWEEP)
    assert error is None
    scene = set_the_scene(connection)
    other = connect(autocommit=False)

    with paused(connect, point) as sweep, running(other, connection, act.query, scene.parameters) as waiting:
        waiting.wait_until_it_waits()
        sweep.resume()
        waiting.result()
    other.commit() if ending == "commits" else other.rollback()

    assert scene.picture(connection) == expected
    scene.assert_the_others_were_rescued_at_once(connection)


@pytest.mark.parametrize("ending", ["commits", "rolls back"])
@pytest.mark.parametrize("act", [act for act in ACTS if act.name != "second sweep"], ids=NAME)
def test_who_comes_after_a_sweep_waits_for_its_end_and_finds_what_it_left(
    act: Act, ending: str, connect: Connect, connection: Connection
) -> None:
    expected = in_turn(connection, SWEEP, act.query) if ending == "commits" else in_turn(connection, act.query)
    scene = set_the_scene(connection)
    sweep = connect(autocommit=False)
    sweep.execute(RESCUE)

    with running(connect(), connection, act.query, scene.parameters) as waiting:
        waiting.wait_until_it_waits()
        sweep.commit() if ending == "commits" else sweep.rollback()
        error = error_of(waiting.result)

    assert (scene.picture(connection), error) == expected
    if ending == "commits":
        scene.assert_the_others_were_rescued_at_once(connection)


# What Procrastinate's functions answer for a job in todo, whoever has put it there.
NO_JOB = "P0001"


@pytest.mark.parametrize(
    ("name", "status", "events", "error"),
    [
        ("finish", "succeeded", ["cancelled"], None),
        ("finish as failed", "failed", ["cancelled"], None),
        ("finish and delete", None, None, None),
        ("retry v1", "todo", [], NO_JOB),
        ("retry", "todo", [], NO_JOB),
        ("retry and fetch", "todo", [], NO_JOB),
        ("abort", "cancelled", ["abort_requested", "cancelled"], None),
        ("delete", None, None, None),
        ("new priority", "todo", [], None),
        ("retry_job", "todo", [], "55000"),
        ("second sweep", "todo", [], None),
        ("prune", "todo", [], None),
        ("unregister", "todo", [], None),
        ("heartbeat", "todo", [], None),
    ],
)
def test_a_retried_job_is_a_job_in_todo_for_whoever_comes_then(
    name: str, status: str | None, events: list[str] | None, error: str | None, connection: Connection
) -> None:
    (act,) = acts(name)
    scene = set_the_scene(connection)
    connection.execute(SWEEP)

    assert error_of(lambda: connection.execute(act.query, scene.parameters)) == error

    picture: Any = scene.picture(connection)
    assert [job["status"] for job in picture["job"]] == ([] if status is None else [status])
    assert picture["events"] == ([] if events is None else ["deferred", "started", "deferred_for_retry", *events])
    assert [rescue["action"] for rescue in picture["rescues"]] == ["retried"]


def test_a_worker_fetches_other_jobs_while_a_sweep_holds_its_row(connect: Connect, connection: Connection) -> None:
    scene = set_the_scene(connection)
    other_job = add_job(connection, "todo")
    sweep = connect(autocommit=False)
    sweep.execute(RESCUE)

    fetched = rows(connection, "SELECT id FROM procrastinate_fetch_job_v2(NULL, %s)", scene.worker)

    assert fetched == [{"id": other_job}]


def test_a_worker_that_is_fetching_a_job_can_still_lose_another_one(connect: Connect, connection: Connection) -> None:
    scene = set_the_scene(connection)
    other_job = add_job(connection, "todo")
    worker = connect(autocommit=False)
    worker.execute("SELECT procrastinate_fetch_job_v2(NULL, %s)", [scene.worker])

    connection.execute(SWEEP)
    worker.commit()

    assert get_job(connection, scene.job)["status"] == "todo"
    assert get_job(connection, other_job)["status"] == "doing"


def test_a_retried_job_can_be_fetched_as_soon_as_the_sweep_has_committed(
    connect: Connect, connection: Connection
) -> None:
    scene = set_the_scene(connection)
    worker = add_worker(connection)
    fetch: LiteralString = "SELECT id FROM procrastinate_fetch_job_v2('{contested}', %s)"
    sweep = connect(autocommit=False)
    sweep.execute(RESCUE)

    assert rows(connection, fetch, worker) == [{"id": None}]
    sweep.commit()
    assert rows(connection, fetch, worker) == [{"id": scene.job}]
    assert (get_job(connection, scene.job)["attempts"], get_job(connection, scene.job)["worker_id"]) == (1, worker)


@pytest.mark.parametrize("point", [Point.AFTER_JUDGEMENT, Point.WITHIN_UPDATE], ids=NAME)
def test_two_sweeps_at_once_rescue_each_of_a_hundred_jobs_once(
    point: Point, connect: Connect, connection: Connection
) -> None:
    job_ids = [add_stalled_job(connection) for _ in range(100)]
    update_job(connection, job_ids[50], task_name="pause")

    with paused(connect, point) as sweep:
        connection.execute(SWEEP)
        sweep.resume()

    assert_each_was_retried_once(connection, job_ids)


def test_many_sweeps_at_once_rescue_each_of_a_hundred_jobs_once(connect: Connect, connection: Connection) -> None:
    job_ids = [add_stalled_job(connection, queueing_lock=f"lock {number}") for number in range(100)]

    with ExitStack() as stack:
        sweeps = [
            stack.enter_context(running(connect(), connection, "CALL procrastinate_stalled.sweep(batch_size => 7)"))
            for _ in range(4)
        ]
        for sweep in sweeps:
            sweep.result()
    connection.execute(SWEEP)

    assert_each_was_retried_once(connection, job_ids)


def assert_each_was_retried_once(connection: Connection, job_ids: list[int]) -> None:
    statuses = rows(connection, "SELECT status, attempts, count(*) FROM procrastinate_jobs GROUP BY 1, 2")
    assert statuses == [{"status": "todo", "attempts": 1, "count": len(job_ids)}]
    events = "SELECT job_id FROM procrastinate_events WHERE type = 'deferred_for_retry' ORDER BY job_id"
    assert [event["job_id"] for event in rows(connection, events)] == job_ids
    rescues = "SELECT job_id FROM procrastinate_stalled.rescues ORDER BY job_id"
    assert [rescue["job_id"] for rescue in rows(connection, rescues)] == job_ids
    sweeps = "SELECT sum(retried) AS retried, count(error) AS errors FROM procrastinate_stalled.sweeps"
    assert rows(connection, sweeps) == [{"retried": len(job_ids), "errors": 0}]


def test_a_sweep_goes_on_beside_a_retry_of_stalled_jobs_that_is_left_open(
    connect: Connect, connection: Connection
) -> None:
    scene = set_the_scene(connection)
    finished = add_orphan(connection)
    connection.execute("SELECT procrastinate_finish_job_v1(%s, 'succeeded', false)", [finished])
    add_job(connection, queue_name="orphaned now")
    left_open = connect(autocommit=False)
    left_open.execute("SELECT procrastinate_stalled.retry_stalled_jobs(queue => 'contested')")

    connection.execute(SWEEP)

    scene.assert_the_others_were_rescued_at_once(connection)
    assert get_job(connection, scene.job)["status"] == "doing"
    (sweep,) = rows(connection, "SELECT doing, retried, waiting FROM procrastinate_stalled.sweeps")
    assert sweep == {"doing": 4, "retried": 2, "waiting": 1}
    # Each has an opinion on the orphans: who comes second leaves them to the first.
    orphans = rows(connection, "SELECT job_id FROM procrastinate_stalled.orphans ORDER BY job_id")
    assert [orphan["job_id"] for orphan in orphans] == [scene.first, scene.last, finished]


@pytest.mark.parametrize("mode", ["FOR UPDATE", "FOR NO KEY UPDATE", "FOR SHARE"])
def test_a_job_that_an_application_keeps_locked_costs_the_others_nothing(
    mode: LiteralString, connect: Connect, connection: Connection
) -> None:
    scene = set_the_scene(connection)
    application = connect(autocommit=False)
    application.execute(f"SELECT FROM procrastinate_jobs WHERE id = %s {mode}", [scene.job])

    connection.execute(SWEEP)

    scene.assert_the_others_were_rescued_at_once(connection)
    assert rows(connection, "SELECT retried, waiting FROM procrastinate_stalled.sweeps") == [
        {"retried": 2, "waiting": 1}
    ]
    application.rollback()
    connection.execute(SWEEP)
    assert get_events(connection, scene.job) == ["deferred", "started", "deferred_for_retry"]


def test_a_job_whose_worker_is_locked_costs_the_others_nothing(connect: Connect, connection: Connection) -> None:
    scene = set_the_scene(connection)
    other_job = add_stalled_job(connection)
    application = connect(autocommit=False)
    application.execute("SELECT FROM procrastinate_workers WHERE id = %s FOR UPDATE", [scene.worker])

    connection.execute(SWEEP)

    scene.assert_the_others_were_rescued_at_once(connection)
    assert get_job(connection, other_job)["status"] == "todo"
    assert get_job(connection, scene.job)["status"] == "doing"


def test_a_prune_that_waits_for_a_rescue_lets_it_take_more_workers(connect: Connect, connection: Connection) -> None:
    """It has deleted both workers' rows by then: to wait for the second one would be a deadlock."""
    add_rule(connection, "short", queue_name="short", run_timeout=timedelta(minutes=1))
    held = add_stalled_job(connection, silent_for=60, started_ago=120, queue_name="short")
    more = add_stalled_job(connection)
    rescue = connect(autocommit=False)
    rescue.execute("SELECT procrastinate_stalled.retry_stalled_jobs(queue => 'short')")

    with running(connect(), connection, "SELECT procrastinate_prune_stalled_workers_v1(30)") as prune:
        prune.wait_until_it_waits()
        rescue.execute(RESCUE)
        rescue.commit()
        assert len(prune.result()) == 2

    assert (get_job(connection, held)["status"], get_job(connection, more)["status"]) == ("todo", "doing")
    assert get_job(connection, more)["worker_id"] is None
    assert rows(connection, "SELECT FROM procrastinate_stalled.sweeps WHERE error IS NOT NULL") == []


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_a_sweep_of_a_role_with_another_isolation_level_undoes_nothing_either(
    isolation: str, connect: Connect, connection: Connection, database: str
) -> None:
    scene = set_the_scene(connection)
    name = sql.Identifier(database_name(database))
    connection.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = {}").format(name, isolation))
    try:
        with paused(connect, Point.AFTER_JUDGEMENT) as sweep:
            connection.execute("SELECT procrastinate_finish_job_v1(%s, 'succeeded', false)", [scene.job])
            sweep.resume()
    finally:
        connection.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_isolation").format(name))

    assert get_events(connection, scene.job) == ["deferred", "started", "succeeded"]
    assert [get_job(connection, job)["status"] for job in (scene.first, scene.last)] == ["todo", "todo"]
    assert rows(connection, "SELECT retried, error FROM procrastinate_stalled.sweeps") == [
        {"retried": 2, "error": None}
    ]
