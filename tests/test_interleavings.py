"""All orders in which two or three sessions can take their steps, one of them ours, and what must hold after each.

`tests/test_races.py` chooses meetings and knows what comes out of each. Here nothing is chosen: the steps are all
statements, commits and points of a sweep, and what must come out is what comes out when the sessions follow each other.
Nor must a sweep have waited, but for who defers a job with the queueing lock of a stalled one. `retry_job`, which waits
for half a second, waits here until it can go on.

There are two exceptions, both because nobody shall wait for a sweep, nor a sweep for anybody:

* A sweep passes over a job that another session keeps locked, as if it had not come. The next sweep makes up for it.
* So does Procrastinate's fetch. The worker asks again.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product
from math import factorial, prod
from typing import Any, LiteralString

import psycopg
import pytest

from tests.conftest import Connect
from tests.jobs import Connection, Row, add_job, add_orphan_note, add_worker, get_events, get_job, rows
from tests.orders import Session, Step, all_orders, perform, performing
from tests.procrastinate_release import DEFER, RETRY_JOB
from tests.server import Server
from tests.sessions import SWEEP, Point, add_points, no_deadlock

RESCUE: LiteralString = "SELECT procrastinate_stalled.retry_stalled_jobs()"
FETCH: LiteralString = "SELECT procrastinate_fetch_job_v2('{contested}', %(living)s)"
FINISH: LiteralString = "SELECT procrastinate_finish_job_v1(%(job)s, 'succeeded', false)"
PRUNE: LiteralString = "SELECT procrastinate_prune_stalled_workers_v1(30)"
UNREGISTER: LiteralString = "SELECT procrastinate_unregister_worker_v1(%(worker)s)"
RETRY: LiteralString = f"SELECT {RETRY_JOB}(%(job)s, NULL, 7, NULL, NULL)"

# What is not waited for: whoever finds a row locked goes on without it.
PASSES_OVER = {SWEEP, RESCUE, FETCH, *Point}

sweep = Session("sweep", (SWEEP, *Point))
# At the point that is left out nobody can write `rescues`, and a sweep has no lock_timeout.
sweep_with_its_timeout = Session("sweep", tuple(step for step in sweep.steps if step is not Point.AFTER_WORKER_LOCK))
# Three sessions have 210 orders with these points, and 756 with all, which are slow. The pairs have all.
sweep_with_fewer_points = Session("sweep", (SWEEP, Point.AFTER_WORKER_LOCK, Point.WITHIN_UPDATE))
rescue = Session("rescue", (RESCUE, "COMMIT"))
rescue_in_vain = Session("rescue in vain", (RESCUE, "ROLLBACK"))
retry_job = Session("retry_job", ("SELECT procrastinate_stalled.retry_job(%(job)s, NULL, 7, NULL, NULL)", "COMMIT"))

fetch = Session("fetch", (FETCH, "COMMIT"))
finish = Session("finish", (FINISH, "COMMIT"))
fail = Session("fail", ("SELECT procrastinate_finish_job_v1(%(job)s, 'failed', false)", "COMMIT"), event="failed")
finish_and_delete = Session(
    "finish and delete", ("SELECT procrastinate_finish_job_v1(%(job)s, 'succeeded', true)", "COMMIT"), deletes=True
)
retry = Session("retry", (RETRY, "COMMIT"), event="deferred_for_retry")
retry_in_vain = Session("retry in vain", (RETRY, "ROLLBACK"))
abort = Session("abort", ("SELECT procrastinate_cancel_job_v1(%(job)s, true, false)", "COMMIT"))
delete = Session("delete", ("DELETE FROM procrastinate_jobs WHERE id = %(job)s", "COMMIT"), deletes=True)
prune = Session("prune", (PRUNE, "COMMIT"))
unregister = Session("unregister", (UNREGISTER, "COMMIT"))
heartbeat = Session("heartbeat", ("SELECT procrastinate_update_heartbeat_v1(%(worker)s)", "COMMIT"))
defer = Session("defer", (DEFER, "COMMIT"))
defer_in_vain = Session("defer in vain", (DEFER, "ROLLBACK"))
cancel_sibling = Session("cancel sibling", ("SELECT procrastinate_cancel_job_v1(%(sibling)s, false, false)", "COMMIT"))
delete_sibling = Session(
    "delete sibling", ("DELETE FROM procrastinate_jobs WHERE id = %(sibling)s", "COMMIT"), deletes=True
)
# Sessions of an application that does more in one transaction, and of workers that go on.
defer_and_finish = Session("defer and finish", (DEFER, FINISH, "COMMIT"))
finish_and_defer = Session("finish and defer", (FINISH, DEFER, "COMMIT"))
start = Session(
    "start of a worker",
    (PRUNE, "COMMIT", "SELECT procrastinate_register_worker_v1()", "COMMIT", FETCH, "COMMIT"),
)
retry_and_fetch = Session("retry and fetch", (RETRY, "COMMIT", FETCH, "COMMIT"), event="deferred_for_retry")
# The worker's retry of a job that is to be aborted fails it, and leaves it as it was but for the status.
abort_and_retry = Session(
    "abort and retry", ("SELECT procrastinate_cancel_job_v1(%(job)s, true, false)", RETRY, "COMMIT"), event="failed"
)
# Of an orphan: another worker gets it and is gone again, so that only the attempts tell that this is another run.
change_hands = Session(
    "change hands",
    (RETRY, "SELECT procrastinate_fetch_job_v2('{contested}', %(worker)s)", UNREGISTER, "COMMIT"),
    event="deferred_for_retry",
)

ACTS = [
    fetch,
    finish,
    fail,
    finish_and_delete,
    retry,
    retry_in_vain,
    abort,
    delete,
    prune,
    unregister,
    heartbeat,
    defer,
    defer_in_vain,
]
BESIDE_A_SIBLING = [fetch, finish, abort, prune, cancel_sibling, delete_sibling]
ON_AN_ORPHAN = [finish, fail, retry, abort, abort_and_retry, delete, change_hands]


@dataclass(frozen=True)
class Case:
    """Sessions that meet."""

    sessions: tuple[Session, ...]
    sibling: bool = False
    """Whether a job waits with the queueing lock of the stalled one."""
    orphan: bool = False
    """Whether the stalled one has lost its worker; else that is silent."""

    def __str__(self) -> str:
        """Their names, and how many orders there are."""
        lengths = [len(session.steps) for session in self.sessions]
        number = factorial(sum(lengths)) // prod(map(factorial, lengths))
        names = ", ".join(session.name for session in self.sessions)
        return f"{names}{' beside a sibling' * self.sibling}{' on an orphan' * self.orphan}: {number} orders"


BESIDE_ANOTHER = [(finish, fetch), (prune, delete)]
CASES = [
    *(Case(pair) for pair in product([rescue, rescue_in_vain, sweep, retry_job], ACTS)),
    *(Case(pair, sibling=True) for pair in product([rescue, sweep], BESIDE_A_SIBLING)),
    *(Case(pair, orphan=True) for pair in product([rescue, sweep, retry_job], ON_AN_ORPHAN)),
    *(Case(pair) for pair in product([rescue, sweep_with_its_timeout], [defer_and_finish, finish_and_defer])),
    *(Case(pair) for pair in product([rescue, sweep_with_its_timeout], [rescue, rescue_in_vain, retry_job])),
    Case((retry_job, retry_job)),
    *(Case((rescue, worker)) for worker in (start, retry_and_fetch)),
    Case((rescue, finish, fetch)),
    Case((rescue, prune, defer)),
    Case((rescue, retry, abort)),
    *(Case((sweep_with_fewer_points, *others)) for others in BESIDE_ANOTHER),
]
SLOW_CASES = [Case((sweep, *others)) for others in BESIDE_ANOTHER]

WRITES = {"retried": "deferred_for_retry", "failed": "failed", "aborted": "aborted"}
"""The event of a rescue, by its action."""

STATES = {
    ("", "deferred"): "todo",
    ("todo", "started"): "doing",
    ("todo", "cancelled"): "cancelled",
    ("doing", "deferred_for_retry"): "todo",
    ("doing", "succeeded"): "succeeded",
    ("doing", "failed"): "failed",
    ("doing", "aborted"): "aborted",
    ("failed", "retried"): "todo",
}
"""What follows a state by an event. What has ended stays so, but for a failed job that its user retries."""

# A job in todo that is finished has the event "cancelled" too.
ENDS = {state: {state} for state in STATES.values()} | {"cancelled": {"cancelled", "succeeded", "failed"}}


@dataclass(frozen=True)
class Scene:
    """A stalled job with a queueing lock, between two orphans that a sweep alone touches."""

    ids: dict[str, int]
    """Of the job, its worker, a living worker, and the sibling if there is one."""
    others: list[int]

    def jobs(self, connection: Connection) -> list[Row]:
        """The jobs but the others, each with its events, whose times are seconds."""
        return rows(
            connection,
            """
            SELECT job.*,
                   (
                       SELECT json_agg(json_build_object('type', type, 'at', extract(epoch FROM at)) ORDER BY id)
                       FROM procrastinate_events
                       WHERE job_id = job.id
                   ) AS events
            FROM procrastinate_jobs AS job
            WHERE id <> ALL (%s)
            ORDER BY id
            """,
            self.others,
        )

    def rescues(self, connection: Connection) -> list[Row]:
        """The rescues of these jobs, whose times are seconds."""
        return rows(
            connection,
            """
            SELECT job_id, action, reason, detail, rule_name, worker_id IS NULL AS orphan, attempts,
                   extract(epoch FROM rescued_at)::float8 AS rescued_at
            FROM procrastinate_stalled.rescues
            WHERE job_id <> ALL (%s)
            ORDER BY id
            """,
            self.others,
        )

    def picture(self, connection: Connection) -> dict[str, Any]:
        """All that can be seen of them and of the workers, whatever the ids and the time."""
        jobs = {self.ids["job"]: "job", self.ids.get("sibling"): "sibling"}
        workers = {self.ids["worker"]: "worker", self.ids["living"]: "living", None: None}
        return {
            "jobs": [
                row
                | {
                    "id": jobs.get(row["id"], "new"),
                    "worker_id": workers.get(row["worker_id"], "new"),
                    "events": [event["type"] for event in row["events"]],
                }
                for row in self.jobs(connection)
            ],
            "rescues": [
                row
                | {
                    "job_id": jobs.get(row["job_id"], "new"),
                    "detail": re.sub(r"\d+$", lambda number: jobs.get(int(number[0]), "new"), row["detail"] or ""),
                    "rescued_at": None,
                }
                for row in self.rescues(connection)
            ],
            "workers": rows(
                connection,
                "SELECT last_heartbeat < now() - interval '30 s' AS silent FROM procrastinate_workers ORDER BY id",
            ),
            # The next sweep forgets those that have ended.
            "noted": rows(
                connection,
                """
                SELECT orphan.attempts
                FROM procrastinate_stalled.orphans AS orphan JOIN procrastinate_jobs AS job ON job.id = orphan.job_id
                WHERE job_id <> ALL (%s) AND job.status = 'doing'
                """,
                self.others,
            ),
        }


@pytest.fixture(scope="module")
def database(server: Server) -> Iterator[str]:
    """One database for all orders, which each empties."""
    with server.database("ours") as conninfo:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            add_points(connection)
        yield conninfo


@pytest.fixture(autouse=True)
def _without_deadlocks(server: Server, database: str) -> Iterator[None]:
    with no_deadlock(server, database):
        yield


def set_the_scene(connection: Connection, case: Case) -> Scene:
    """Empty the database and put the jobs into it."""
    with connection.transaction():
        connection.execute("DELETE FROM procrastinate_jobs")
        connection.execute("DELETE FROM procrastinate_workers")
        connection.execute("DELETE FROM procrastinate_stalled.rescues")
        connection.execute("DELETE FROM procrastinate_stalled.sweeps")
        connection.execute("DELETE FROM procrastinate_stalled.orphans")
        ids = {"living": add_worker(connection), "worker": add_worker(connection, silent_for=3600)}
        first = add_job(connection, task_name="pause")
        ids["job"] = add_job(
            connection,
            queue_name="contested",
            worker_id=None if case.orphan else ids["worker"],
            queueing_lock="key",
        )
        last = add_job(connection)
        if case.sibling:
            ids["sibling"] = add_job(connection, "todo", queue_name="contested", queueing_lock="key")
        for orphan in (first, last, *([ids["job"]] if case.orphan else [])):
            add_orphan_note(connection, orphan, attempts=0, seen_ago=3600)
    return Scene(ids, [first, last])


def come_again(connection: Connection, case: Case, scene: Scene) -> None:
    """Let a sweep, and a worker that fetched, come once more when nobody else is there."""
    connection.execute(SWEEP)
    if any(FETCH in session.steps for session in case.sessions):
        connection.execute(FETCH, scene.ids)


def successions(case: Case) -> Iterator[list[tuple[int, Step]]]:
    """The moves of the sessions that follow each other; first with all that they do."""
    for leaves_out in product(
        *([False, True] if PASSES_OVER & {*session.steps} else [False] for session in case.sessions)
    ):
        steps = [
            [step for step in session.steps if not (leaves and step in PASSES_OVER)]
            for session, leaves in zip(case.sessions, leaves_out, strict=True)
        ]
        # Somebody must be there for whom the others pass over a job.
        if not all(leaves_out):
            for succession in permutations(range(len(steps))):
                yield [(number, step) for number in succession for step in steps[number]]


def check_invariants(connection: Connection, case: Case, scene: Scene) -> None:
    """Check what holds whatever has happened."""
    jobs = {row["id"]: row for row in scene.jobs(connection)}
    rescues = scene.rescues(connection)
    if not any(session.deletes for session in case.sessions):
        assert {scene.ids["job"], scene.ids.get("sibling", scene.ids["job"])} <= {*jobs}
    for job_id, job in jobs.items():
        events = [event["type"] for event in job["events"]]
        assert job["status"] in ENDS[replay(events)]
        ours = [(WRITES[row["action"]], row["rescued_at"]) for row in rescues if row["job_id"] == job_id]
        theirs = [(event["type"], event["at"]) for event in job["events"] if event["type"] in WRITES.values()]
        for event in ours:
            theirs.remove(event)
        assert len(theirs) <= sum(session.event is not None for session in case.sessions)
        # Procrastinate adds one for each run that it ends, too; but none when it fails a job instead of a retry.
        counting = {"deferred_for_retry", "retried", "succeeded"}
        if fail in case.sessions and not ours:
            counting.add("failed")
        assert job["attempts"] == sum(event in counting for event in events)
        if job["status"] == "todo" and not theirs:
            assert job["worker_id"] is None
    waiting = [job["queueing_lock"] for job in jobs.values() if job["status"] == "todo"]
    assert len(waiting) == len({*waiting})
    assert rows(connection, "SELECT FROM procrastinate_stalled.sweeps WHERE error IS NOT NULL") == []


def replay(events: list[str]) -> str:
    """The state to which the events of a job lead; each must be possible in the state before it."""
    state = ""
    for event in events:
        if event != "abort_requested":
            state = STATES[state, event]
    return state


def check_the_others(connection: Connection, scene: Scene) -> None:
    """Check that each of the other two was retried, once."""
    for job_id in scene.others:
        assert get_job(connection, job_id)["status"] == "todo"
        assert get_events(connection, job_id) == ["deferred", "started", "deferred_for_retry"]
        assert rows(connection, "SELECT action FROM procrastinate_stalled.rescues WHERE job_id = %s", job_id) == [
            {"action": "retried"}
        ]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)], ids=str
)
def test_sessions_leave_what_they_leave_when_they_follow_each_other(
    case: Case, connect: Connect, connection: Connection
) -> None:
    has_all_points = any(Point.AFTER_WORKER_LOCK in session.steps for session in case.sessions)
    connection.execute(f"ALTER FUNCTION points._rescue SET lock_timeout = {'0' if has_all_points else '100'}")
    with performing(case.sessions, connect, connection) as performers:

        def outcome(moves: list[tuple[int, Step]]) -> tuple[Row, Row]:
            """What is left at once, and when who passed over a job has come again."""
            scene = set_the_scene(connection, case)
            errors = perform(performers, moves, scene.ids)
            if not any(DEFER in session.steps for session in case.sessions):
                waited = [performer.session for performer in performers if performer.has_waited]
                assert not [session.name for session in waited if {SWEEP, RESCUE} & {*session.steps}]
            check_invariants(connection, case, scene)
            at_once = scene.picture(connection) | {"errors": errors}
            come_again(connection, case, scene)
            check_invariants(connection, case, scene)
            check_the_others(connection, scene)
            return at_once, scene.picture(connection)

        serial = [outcome(moves) for moves in successions(case)]
        # The first of these begins with the rescue, which finds all as it was.
        assert bool(serial[0][0]["rescues"]) == (case.sessions[0] is not rescue_in_vain)
        complete = factorial(len(case.sessions))
        for order in all_orders(*(len(session.steps) for session in case.sessions)):
            steps = [iter(session.steps) for session in case.sessions]
            at_once, later = outcome([(number, next(steps[number])) for number in order])
            assert at_once in [picture for picture, _ in serial], order
            assert later in [picture for _, picture in serial[:complete]], order
