"""`explain_job` and `explain_jobs`: each verdict and its sentence, and that what is announced comes true."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import assume, given
from psycopg.errors import InvalidParameterValue

from procrastinate_stalled import Stalled
from tests.jobs import (
    Connection,
    Row,
    add_job,
    add_orphan_note,
    add_rule,
    add_stalled_job,
    add_worker,
    contents,
    get_job,
    insert,
    rows,
    update_job,
)
from tests.procrastinate_release import RELEASE
from tests.random_databases import QUEUES, TASKS, RandomDatabase, nights, with_examples

MINUTE = 60
HOUR = 3600
DAY = 86400
DONE = {"retry": "retried", "fail": "failed", "abort": "aborted"}


@pytest.fixture
def noon(transaction: Connection) -> Connection:
    """A transaction in whose time zone it is past noon, so that what happened hours ago happened today."""
    set_hour(transaction, 12)
    return transaction


def set_hour(connection: Connection, hour: int) -> None:
    """Choose a time zone in which it is that hour of the day."""
    (row,) = rows(connection, "SELECT extract(hour FROM now() AT TIME ZONE 'UTC')::integer AS now")
    west = (row["now"] - hour + 12) % 24 - 12  # which the names of these zones count as positive
    connection.execute(f"SET LOCAL TimeZone = 'Etc/GMT{west:+}'")


@dataclass(frozen=True)
class Scene:
    """A job in `doing`, and what happened to it. Times are in seconds ago."""

    rule: dict[str, Any] | None = field(default_factory=lambda: {"name": "default"})
    """The only rule; None: there is none. Where it says nothing it is as the install makes it."""
    silent_for: float | None = 192
    """None: an orphan."""
    noted: float | None = None
    available_for: float = 30 * DAY
    alive: bool = True
    """Whether there is a living worker."""
    job: dict[str, Any] = field(default_factory=dict)
    """The other arguments of `add_job`."""
    waiting: dict[str, Any] | None = None
    """Columns of another job, in `todo`."""
    rescues: int = 0
    pause: dict[str, Any] | None = None

    def create(self, connection: Connection) -> int:
        """Put it into the database and return the id of the job."""
        connection.execute("DELETE FROM procrastinate_stalled.rules")
        if self.rule is not None:
            add_rule(connection, **self.rule)
        if not self.alive:
            connection.execute("DELETE FROM procrastinate_workers")
        connection.execute(
            "SELECT set_config('tests.available_since', (now() - make_interval(secs => %s))::text, true)",
            [self.available_for],
        )
        worker_id = None if self.silent_for is None else add_worker(connection, self.silent_for)
        job_id = add_job(connection, worker_id=worker_id, attempts=self.rescues, **self.job)
        if self.noted is not None:
            add_orphan_note(connection, job_id, self.rescues, self.noted)
        if self.waiting is not None:
            add_job(connection, "todo", **self.waiting)
        for _ in range(self.rescues):
            insert(
                connection,
                "rescues",
                job_id=job_id,
                queue_name="q",
                task_name="t",
                action="retried",
                reason="heartbeat",
                attempts=0,
            )
        if self.pause is not None:
            Stalled(connection).pause(**self.pause)
        return job_id


IMPORTS = {"name": "imports", "heartbeat_timeout": None}
KEY: dict[str, Any] = {"queueing_lock": "key"}
ORPHAN = "the row of its worker is gone, as a sweep saw first at <{}>"

# In a sentence {job} and {worker} are the ids of the job and its worker, {other} that of the job after it; <-60> is
# the time a minute ago.
SCENES = {
    # running
    "running": (
        Scene(),
        ("running", "heartbeat", 108, "retry", None),
        (
            "worker {worker} was last heard 3 min 12 s ago; rule default waits 5 min; "
            "stalled at <108> unless it beats again"
        ),
    ),
    "running for the last microsecond": (
        Scene(silent_for=299.999999),
        ("running", "heartbeat", 0.000001, "retry", None),
        (
            "worker {worker} was last heard 4 min 59 s ago; rule default waits 5 min; "
            "stalled at <0.000001> unless it beats again"
        ),
    ),
    "just heard": (
        Scene(silent_for=0),
        ("running", "heartbeat", 300, "retry", None),
        "worker {worker} was last heard 0 s ago; rule default waits 5 min; stalled at <300> unless it beats again",
    ),
    "heard in a fraction of a second": (
        Scene(silent_for=2.34),
        ("running", "heartbeat", 297.66, "retry", None),
        "worker {worker} was last heard 2.3 s ago; rule default waits 5 min; stalled at <297.66> unless it beats again",
    ),
    "a heartbeat of the future": (
        Scene(silent_for=-HOUR),
        ("running", "heartbeat", 3900, "retry", None),
        (
            "the last heartbeat of worker {worker} lies in the future (<3600>), because a clock was wrong; "
            "rule default waits 5 min; stalled at <3900> unless it beats again"
        ),
    ),
    "an orphan that was noted": (
        Scene(silent_for=None, noted=100),
        ("running", "orphaned", 200, "retry", None),
        f"{ORPHAN.format(-100)}; rule default waits 5 min; stalled at <200> unless it ends before",
    ),
    "an orphan that was not noted": (
        Scene(silent_for=None),
        ("running", "orphaned", 300, "retry", None),
        (
            "the row of its worker is gone, which the next sweep will note; rule default waits 5 min; "
            "stalled at <300> unless it ends before"
        ),
    ),
    "not heard since an outage": (
        Scene(silent_for=400, available_for=120),
        ("running", "heartbeat", 480, "retry", None),
        (
            "worker {worker} was last heard 6 min 40 s ago; that was before the server became available at <-120>; "
            "rule default waits 10 min from then (settings.outage_grace); stalled at <480> unless it beats again"
        ),
    ),
    "an orphan since before an outage": (
        Scene(silent_for=None, noted=60, available_for=120, job={"started_ago": 300}),
        ("running", "orphaned", 480, "retry", None),
        (
            f"{ORPHAN.format(-60)}; it was started before the server became available at <-120>; "
            "rule default waits 10 min from then (settings.outage_grace); stalled at <480> unless it ends before"
        ),
    ),
    "an orphan that has longer than the grace": (
        Scene(silent_for=None, noted=60, available_for=500, job={"started_ago": 1000}),
        ("running", "orphaned", 240, "retry", None),
        f"{ORPHAN.format(-60)}; rule default waits 5 min; stalled at <240> unless it ends before",
    ),
    "a run timeout": (
        Scene(rule=IMPORTS | {"run_timeout": "2 hours"}, job={"started_ago": HOUR}),
        ("running", "run_timeout", HOUR, "retry", None),
        "it has run for 1 h; rule imports allows 2 h; stalled at <3600> unless it ends before",
    ),
    "no limit": (
        Scene(rule=IMPORTS),
        ("running", None, None, "retry", None),
        "worker {worker} was last heard 3 min 12 s ago; rule imports sets no limit; it counts as running until it ends",
    ),
    "no limit for an orphan": (
        Scene(rule=IMPORTS, silent_for=None, noted=60),
        ("running", None, None, "retry", None),
        f"{ORPHAN.format(-60)}; rule imports sets no limit; it counts as running until it ends",
    ),
    "running, to be aborted": (
        Scene(job={"abort_requested": True}),
        ("running", "heartbeat", 108, "abort", "abort requested"),
        (
            "worker {worker} was last heard 3 min 12 s ago; rule default waits 5 min; "
            "stalled at <108> unless it beats again; "
            "a sweep then aborts it, as requested"
        ),
    ),
    "running, a duplicate waits": (
        Scene(job=KEY, waiting=KEY),
        ("running", "heartbeat", 108, "fail", "duplicate of job {other}"),
        (
            "worker {worker} was last heard 3 min 12 s ago; rule default waits 5 min; "
            "stalled at <108> unless it beats again; "
            "a sweep then fails it, because job {other} has the same queueing lock and does the same work"
        ),
    ),
    "running, to be failed, without a limit": (
        Scene(rule=IMPORTS | {"action": "fail"}),
        ("running", None, None, "fail", "rule"),
        "worker {worker} was last heard 3 min 12 s ago; rule imports sets no limit; it counts as running until it ends",
    ),
    "running in a pause": (
        Scene(pause={"duration": timedelta(hours=1)}),
        ("running", "heartbeat", 108, "retry", None),
        (
            "worker {worker} was last heard 3 min 12 s ago; rule default waits 5 min; "
            "stalled at <108> unless it beats again; "
            '"pause" holds it back until <3600>'
        ),
    ),
    # stalled
    "stalled": (
        Scene(silent_for=400),
        ("stalled", "heartbeat", -100, "retry", None),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule default waits 5 min; stalled since <-100>; "
            "the next sweep puts it back to todo"
        ),
    ),
    "stalled at this moment": (
        Scene(silent_for=300),
        ("stalled", "heartbeat", 0, "retry", None),
        (
            "worker {worker} was last heard 5 min ago; rule default waits 5 min; stalled since <0>; "
            "the next sweep puts it back to todo"
        ),
    ),
    "stalled orphan": (
        Scene(silent_for=None, noted=400),
        ("stalled", "orphaned", -100, "retry", None),
        f"{ORPHAN.format(-400)}; rule default waits 5 min; stalled since <-100>; the next sweep puts it back to todo",
    ),
    "stalled by its run timeout": (
        Scene(rule=IMPORTS | {"run_timeout": "2 hours"}, job={"started_ago": 7500}),
        ("stalled", "run_timeout", -300, "retry", None),
        "it has run for 2 h 5 min; rule imports allows 2 h; stalled since <-300>; the next sweep puts it back to todo",
    ),
    "stalled since an outage": (
        Scene(silent_for=800, available_for=700),
        ("stalled", "heartbeat", -100, "retry", None),
        (
            "worker {worker} was last heard 13 min 20 s ago; that was before the server became available at <-700>; "
            "rule default waits 10 min from then (settings.outage_grace); stalled since <-100>; "
            "the next sweep puts it back to todo"
        ),
    ),
    "a delayed retry": (
        Scene(rule={"name": "later", "retry_delay": "10 min"}, silent_for=400),
        ("stalled", "heartbeat", -100, "retry", None),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule later waits 5 min; stalled since <-100>; "
            "the next sweep puts it back to todo, to start 10 min later"
        ),
    ),
    "stalled, to be failed": (
        Scene(rule={"name": "my rule", "action": "fail"}, silent_for=400),
        ("stalled", "heartbeat", -100, "fail", "rule"),
        (
            'worker {worker} was last heard 6 min 40 s ago; rule "my rule" waits 5 min; stalled since <-100>; '
            "the next sweep fails it, because the rule says so"
        ),
    ),
    "aborting": (
        Scene(silent_for=400, job={"abort_requested": True}),
        ("stalled", "heartbeat", -100, "abort", "abort requested"),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule default waits 5 min; stalled since <-100>; "
            "the next sweep aborts it, as requested"
        ),
    ),
    "max_rescues used up": (
        Scene(silent_for=400, rescues=3),
        ("stalled", "heartbeat", -100, "fail", "max_rescues"),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule default waits 5 min; stalled since <-100>; "
            "the next sweep fails it, because it was retried 3 times already (max_rescues)"
        ),
    ),
    "a duplicate waits": (
        Scene(silent_for=400, job=KEY, waiting=KEY),
        ("stalled", "heartbeat", -100, "fail", "duplicate of job {other}"),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule default waits 5 min; stalled since <-100>; "
            "the next sweep fails it, because job {other} has the same queueing lock and does the same work"
        ),
    ),
    "it may not be retried at all": (
        Scene(rule={"name": "w", "max_rescues": 0}, silent_for=400),
        ("stalled", "heartbeat", -100, "fail", "max_rescues"),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule w waits 5 min; stalled since <-100>; "
            "the next sweep fails it, because its rule allows no retry (max_rescues)"
        ),
    ),
    "it may be retried once": (
        Scene(rule={"name": "w", "max_rescues": 1}, silent_for=400, rescues=1),
        ("stalled", "heartbeat", -100, "fail", "max_rescues"),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule w waits 5 min; stalled since <-100>; "
            "the next sweep fails it, because it was retried once already (max_rescues)"
        ),
    ),
    "it waits for its duplicate": (
        Scene(rule={"name": "w", "on_duplicate": "wait"}, silent_for=400, job=KEY, waiting=KEY),
        ("stalled", "heartbeat", -100, "wait", "duplicate of job {other}"),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule w waits 5 min; stalled since <-100>; "
            "the next sweep lets it wait for job {other}, which has the same queueing lock"
        ),
    ),
    "its duplicate waits for it": (
        Scene(
            rule={"name": "w", "on_duplicate": "wait"},
            silent_for=400,
            job=KEY | {"lock": "l"},
            waiting=KEY | {"lock": "l"},
        ),
        ("stalled", "heartbeat", -100, "fail", "duplicate of job {other}"),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule w waits 5 min; stalled since <-100>; "
            "the next sweep fails it, because job {other} has the same queueing lock and does the same work"
        ),
    ),
    # held
    "nobody is alive": (
        Scene(silent_for=400, alive=False),
        ("held", "heartbeat", -100, "retry", None),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule default waits 5 min; stalled since <-100>; "
            "held, because no worker at all was heard in the last 2 min 30 s, and none could run it "
            "(settings.require_live_worker); once a new worker has started, the next sweep puts it back to todo; "
            "if an old one is heard again, 5 min later"
        ),
    ),
    "nobody is alive, before its time": (
        Scene(alive=False),
        ("running", "heartbeat", 108, "retry", None),
        (
            "worker {worker} was last heard 3 min 12 s ago; rule default waits 5 min; "
            "stalled at <108> unless it beats again; held then while no worker at all is heard"
        ),
    ),
    "nobody is alive, until the run timeout": (
        Scene(
            rule={"name": "default", "run_timeout": "1 hour"},
            silent_for=400,
            alive=False,
            job={"started_ago": 3000, "abort_requested": True},
        ),
        ("held", "heartbeat", -100, "abort", "abort requested"),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule default waits 5 min; stalled since <-100>; "
            "held, because no worker at all was heard in the last 2 min 30 s, and none could run it "
            "(settings.require_live_worker); once a new worker has started, the next sweep aborts it, as requested; "
            "if an old one is heard again, 5 min later; "
            "its run timeout counts in any case, at <600>"
        ),
    ),
    "nobody is alive, beyond the run timeout": (
        Scene(
            rule={"name": "default", "run_timeout": "1 hour"}, silent_for=400, alive=False, job={"started_ago": 3660}
        ),
        ("stalled", "run_timeout", -60, "retry", None),
        "it has run for 1 h 1 min; rule default allows 1 h; stalled since <-60>; the next sweep puts it back to todo",
    ),
    "paused": (
        Scene(silent_for=400, pause={"duration": timedelta(minutes=30), "queue": "default", "reason": "deployment"}),
        ("held", "heartbeat", -100, "retry", None),
        (
            "worker {worker} was last heard 6 min 40 s ago; rule default waits 5 min; stalled since <-100>; "
            "\"pause queue 'default'\" (deployment) holds it back until <1800>; "
            "the first sweep after that puts it back to todo"
        ),
    ),
    "paused beyond the run timeout": (
        Scene(
            rule={"name": "default", "run_timeout": "1 hour"},
            silent_for=0,
            alive=False,
            job={"started_ago": 3660},
            rescues=3,
            pause={"duration": timedelta(minutes=30)},
        ),
        ("held", "run_timeout", -60, "fail", "max_rescues"),
        (
            "it has run for 1 h 1 min; rule default allows 1 h; stalled since <-60>; "
            '"pause" holds it back until <1800>; '
            "the first sweep after that fails it, because it was retried 3 times already (max_rescues)"
        ),
    ),
    # ignored
    "ignored": (
        Scene(rule={"name": "hands off", "action": "ignore", "run_timeout": "1 minute"}, silent_for=400),
        ("ignored", None, None, "ignore", "rule"),
        'worker {worker} was last heard 6 min 40 s ago; rule "hands off" ignores it: nothing is ever done to it',
    ),
    "ignored orphan": (
        Scene(rule={"name": "never", "action": "ignore"}, silent_for=None, noted=100),
        ("ignored", None, None, "ignore", "rule"),
        f"{ORPHAN.format(-100)}; rule never ignores it: nothing is ever done to it",
    ),
    "no rule": (
        Scene(rule=None, silent_for=400),
        ("ignored", None, None, "ignore", "no rule"),
        "worker {worker} was last heard 6 min 40 s ago; no rule matches it: nothing is ever done to it",
    ),
    "no rule for its task": (
        Scene(rule={"name": "default", "task_name": "other"}, silent_for=None),
        ("ignored", None, None, "ignore", "no rule"),
        (
            "the row of its worker is gone, which the next sweep will note; "
            "no rule matches it: nothing is ever done to it"
        ),
    ),
    "ignored in a pause": (
        Scene(rule={"name": "never", "action": "ignore"}, pause={}),
        ("ignored", None, None, "ignore", "rule"),
        "worker {worker} was last heard 3 min 12 s ago; rule never ignores it: nothing is ever done to it",
    ),
    "no rule behind a pause": (
        Scene(rule=None, pause={}),
        ("ignored", None, None, "ignore", "rule"),
        (
            "worker {worker} was last heard 3 min 12 s ago; "
            '"pause" ignores it, and no other rule matches it: nothing is ever done to it'
        ),
    ),
    # other days
    "since the day before yesterday": (
        Scene(silent_for=2 * DAY),
        ("stalled", "heartbeat", 300 - 2 * DAY, "retry", None),
        (
            "worker {worker} was last heard 2 d ago; rule default waits 5 min; stalled since <-172500>; "
            "the next sweep puts it back to todo"
        ),
    ),
    "the day after tomorrow": (
        Scene(rule={"name": "patient", "heartbeat_timeout": "50 hours"}, silent_for=HOUR),
        ("running", "heartbeat", 49 * HOUR, "retry", None),
        "worker {worker} was last heard 1 h ago; rule patient waits 2 d 2 h; stalled at <176400> unless it beats again",
    ),
}


def moment(connection: Connection) -> Callable[[float], str]:
    """Return how times are written: the time of day in the time zone of the session, the date if it is another one."""
    (row,) = rows(connection, "SELECT now()::timestamp")
    now: datetime = row["now"]

    def written(seconds: float) -> str:
        at = now + timedelta(seconds=seconds)
        return f"{at:%H:%M:%S}" if at.date() == now.date() else f"{at:%Y-%m-%d %H:%M:%S}"

    return written


def explain(connection: Connection, job_id: int) -> Row:
    """The row of `explain_job`, with the seconds until `stalled_at`."""
    (row,) = rows(
        connection,
        """
        SELECT *, extract(epoch FROM stalled_at - now())::double precision AS remaining
        FROM procrastinate_stalled.explain_job(%s)
        """,
        job_id,
    )
    return row


@pytest.mark.parametrize(("scene", "judgement", "sentence"), SCENES.values(), ids=SCENES)
def test_each_judgement_has_its_sentence(
    noon: Connection,
    scene: Scene,
    judgement: tuple[str, str | None, float | None, str, str | None],
    sentence: str,
) -> None:
    job = scene.create(noon)
    names = {"job": job, "worker": get_job(noon, job)["worker_id"], "other": job + 1}
    written = moment(noon)
    verdict, reason, remaining, action, detail = judgement

    explained = explain(noon, job)

    assert explained["sentence"] == re.sub(
        "<(.+?)>", lambda match: written(float(match[1])), sentence.format_map(names)
    )
    assert [explained[name] for name in ("verdict", "reason", "remaining", "action", "detail")] == [
        verdict,
        reason,
        remaining,
        action,
        detail and detail.format_map(names),
    ]


def test_the_evidence_stands_beside_the_sentence(transaction: Connection) -> None:
    scene = Scene(silent_for=None, noted=60, available_for=120, job={"started_ago": 300, "queue_name": "q"})
    job = scene.create(transaction)

    explained = Stalled(transaction).explain_job(job)

    (row,) = rows(transaction, "SELECT now()")
    now = row["now"]
    assert (explained.job_id, explained.queue_name, explained.task_name, explained.status, explained.attempts) == (
        job,
        "q",
        "task",
        "doing",
        0,
    )
    assert (explained.worker_id, explained.last_heartbeat) == (None, None)
    assert explained.seen_at == now - timedelta(seconds=60)
    assert explained.started_at == now - timedelta(seconds=300)
    assert explained.available_since == now - timedelta(seconds=120)
    assert explained.rule_name == "default"


def test_the_rule_of_a_paused_job_is_the_pause(transaction: Connection) -> None:
    job = Scene(pause={"queue": "default"}).create(transaction)
    assert Stalled(transaction).explain_job(job).rule_name == "pause queue 'default'"


ENDED = "it has ended, its status is {}: there is nothing to rescue"


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ("todo", "it waits in todo for a worker to fetch it: there is nothing to rescue"),
        *((status, ENDED.format(status)) for status in ("succeeded", "failed", "cancelled", "aborted")),
        ("aborting", "its status is aborting and not doing: there is nothing to rescue"),
    ],
)
def test_a_job_that_is_not_in_doing_is_not_judged(transaction: Connection, status: str, sentence: str) -> None:
    job = add_job(transaction, status, queue_name="q", attempts=2)

    explained = Stalled(transaction).explain_job(job)

    assert (explained.job_id, explained.queue_name, explained.task_name) == (job, "q", "task")
    assert (explained.status, explained.attempts, explained.verdict) == (status, 2, "not doing")
    assert (explained.sentence, explained.action, explained.stalled_at) == (sentence, None, None)
    assert Stalled(transaction).explain_jobs() == []


def sentence_of(connection: Connection, job: int) -> str:
    """The sentence about a job that is not in doing."""
    explained = Stalled(connection).explain_job(job)
    assert (explained.verdict, explained.action) == ("not doing", None)
    return explained.sentence


def is_fetched(connection: Connection, job: int) -> bool:
    """Whether a worker that fetches all jobs it can fetch now gets this one."""
    with connection.transaction(force_rollback=True):
        worker = add_worker(connection)
        while True:
            (fetched,) = rows(connection, "SELECT id FROM procrastinate_fetch_job_v2(NULL, %s)", worker)
            if fetched["id"] in {None, job}:
                return bool(fetched["id"] == job)


def test_of_a_scheduled_job_it_is_told_when_it_is_due(noon: Connection) -> None:
    (times,) = rows(
        noon, "SELECT now() AS now, now() + interval '90 seconds' AS later, now() + interval '2 days' AS far"
    )
    job = add_job(noon, "todo", scheduled_at=times["later"])
    assert not is_fetched(noon, job)
    assert sentence_of(noon, job) == f"it waits in todo; it is scheduled for {moment(noon)(90)}"

    update_job(noon, job, scheduled_at=times["far"])
    assert sentence_of(noon, job) == f"it waits in todo; it is scheduled for {moment(noon)(2 * DAY)}"

    update_job(noon, job, scheduled_at="infinity")
    assert sentence_of(noon, job) == "it waits in todo; it is scheduled for infinity"

    update_job(noon, job, scheduled_at=times["now"])
    assert sentence_of(noon, job) == "it waits in todo for a worker to fetch it: there is nothing to rescue"
    assert is_fetched(noon, job)


def test_of_a_job_whose_lock_another_one_holds_that_one_is_named(noon: Connection) -> None:
    running, first, job = (add_job(noon, "todo", lock="lock") for _ in range(3))
    update_job(noon, running, status="doing")
    (row,) = rows(noon, "SELECT now() + interval '1 hour' AS later")
    holder = f"job {running} in doing has its lock: see explain_job({running})"

    assert not is_fetched(noon, job)
    assert sentence_of(noon, job) == sentence_of(noon, first) == f"it waits in todo; {holder}"

    update_job(noon, job, scheduled_at=row["later"])
    assert sentence_of(noon, job) == f"it waits in todo; it is scheduled for {moment(noon)(HOUR)}; {holder}"


@pytest.mark.parametrize(
    ("other", "comes_first"),
    [
        # Whether it comes first if it is the older one, and if it is the newer one.
        ({"priority": 0}, {True: True, False: False}),
        ({"priority": 0, "scheduled_at": "infinity"}, {True: True, False: False}),
        ({"priority": 1}, {True: True, False: True}),
        ({"priority": 1, "lock": "other"}, {True: False, False: False}),
        ({"priority": 1, "lock": None}, {True: False, False: False}),
        ({"priority": 1, "status": "cancelled"}, {True: False, False: False}),
        ({"priority": -1}, {True: False, False: False}),
    ],
)
@pytest.mark.parametrize("is_older", [True, False])
def test_of_a_job_that_another_one_with_its_lock_precedes_that_one_is_named(
    transaction: Connection, other: dict[str, Any], comes_first: dict[bool, bool], *, is_older: bool
) -> None:
    ids = [add_job(transaction, "todo", lock="lock") for _ in range(2)]
    first, job = ids if is_older else reversed(ids)
    update_job(transaction, first, **other)
    is_named = comes_first[is_older] and (RELEASE >= (3, 4) or is_older)  # where that is not sure, nothing is said

    if is_named or RELEASE >= (3, 4):
        assert is_fetched(transaction, job) != is_named
    assert sentence_of(transaction, job) == (
        f"it waits in todo; job {first} in todo has its lock and comes first: see explain_job({first})"
        if is_named
        else "it waits in todo for a worker to fetch it: there is nothing to rescue"
    )


def test_jobs_without_a_lock_do_not_wait_for_each_other(transaction: Connection) -> None:
    add_job(transaction, lock=None)
    add_job(transaction, "todo", lock=None)
    job = add_job(transaction, "todo", lock=None)
    assert sentence_of(transaction, job) == "it waits in todo for a worker to fetch it: there is nothing to rescue"


@pytest.mark.parametrize("job", [0, -1, 2**63 - 1])
def test_a_job_that_does_not_exist_is_explained_too(transaction: Connection, job: int) -> None:
    explained = Stalled(transaction).explain_job(job)
    assert (explained.job_id, explained.verdict, explained.status) == (job, "no such job", None)
    assert explained.sentence == f"there is no job {job}: it was deleted, or never existed in this database"


def test_without_a_job_there_is_nothing_to_explain(transaction: Connection) -> None:
    with pytest.raises(InvalidParameterValue) as error:
        transaction.execute("SELECT procrastinate_stalled.explain_job(NULL)")
    assert error.value.diag.message_primary == "job_id must not be NULL"
    assert error.value.diag.message_detail == "It says which job to explain."
    assert error.value.diag.message_hint == "All jobs in doing: SELECT * FROM procrastinate_stalled.explain_jobs();"


def test_times_of_day_are_in_the_time_zone_of_the_session(transaction: Connection) -> None:
    job = Scene(silent_for=192).create(transaction)
    zones = {}
    for zone in ("UTC", "Asia/Kathmandu", "America/St_Johns"):
        transaction.execute(f"SET LOCAL TimeZone = '{zone}'")
        sentence = Stalled(transaction).explain_job(job).sentence
        assert f"stalled at {moment(transaction)(108)} unless" in sentence
        zones[zone] = sentence
    assert len(set(zones.values())) == 3


@pytest.mark.parametrize(
    ("hour", "silent_for", "is_today"), [(11, 11 * HOUR, True), (11, 13 * HOUR, False), (0, 2 * HOUR, False)]
)
def test_the_date_is_that_of_the_time_zone_of_the_session(
    transaction: Connection, hour: int, silent_for: float, *, is_today: bool
) -> None:
    set_hour(transaction, hour)
    job = Scene(silent_for=silent_for + 300).create(transaction)
    pattern = r"stalled since \d\d:\d\d:\d\d;" if is_today else r"stalled since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d;"
    assert re.search(pattern, Stalled(transaction).explain_job(job).sentence)


@pytest.mark.parametrize(
    ("duration", "words"),
    [
        ("0", "0 s"),
        ("-1 second", "0 s"),
        ("0.04 seconds", "0.04 s"),
        ("0.11 seconds", "0.1 s"),
        ("9.96 seconds", "10 s"),
        ("10.9 seconds", "10 s"),
        ("59.999999 seconds", "59 s"),
        ("1 minute", "1 min"),
        ("192 seconds", "3 min 12 s"),
        ("1 hour", "1 h"),
        ("1 hour 59 seconds", "1 h"),
        ("90 minutes", "1 h 30 min"),
        ("23:59:59", "23 h 59 min"),
        ("1 day", "1 d"),
        ("1 day 59 minutes", "1 d"),
        ("49 hours", "2 d 1 h"),
        ("10 years", "3652 d 12 h"),
    ],
)
def test_durations_are_told_with_their_two_largest_units(transaction: Connection, duration: str, words: str) -> None:
    assert rows(transaction, "SELECT procrastinate_stalled._in_words(%s::interval) AS words", duration) == [
        {"words": words}
    ]


def test_a_worker_of_several_that_were_silent_is_given_the_time_to_be_heard_again(noon: Connection) -> None:
    noon.execute("DELETE FROM procrastinate_workers")
    back, silent = add_worker(noon, silent_for=400), add_worker(noon, silent_for=400)
    job = add_job(noon, worker_id=silent)
    Stalled(noon).retry_stalled_jobs()
    noon.execute("UPDATE procrastinate_stalled.sweeps SET started_at = now() - interval '1 minute'")
    noon.execute("UPDATE procrastinate_workers SET last_heartbeat = now() WHERE id = %s", [back])
    explained = Stalled(noon).explain_job(job)
    assert explained.verdict == "running"
    assert re.sub(r"\d\d:\d\d:\d\d", "<time>", explained.sentence) == (
        f"worker {silent} was last heard 6 min 40 s ago; no worker at all was heard until <time>; "
        "rule default waits 5 min from then; stalled at <time> unless it beats again"
    )


def test_a_worker_that_was_declared_dead_was_never_heard(transaction: Connection) -> None:
    job = add_stalled_job(transaction)
    transaction.execute("UPDATE procrastinate_workers SET last_heartbeat = '-infinity' WHERE last_heartbeat < now()")
    (explained,) = rows(transaction, "SELECT sentence FROM procrastinate_stalled.explain_job(%s)", job)
    assert re.match(r"worker \d+ was never heard; the server became available at 2000-", explained["sentence"])


# Several jobs


def test_the_jobs_that_stall_first_come_first(transaction: Connection) -> None:
    add_rule(transaction, "never", position=1, task_name="never", heartbeat_timeout=None)
    never = add_stalled_job(transaction, task_name="never")
    later, sooner = (add_stalled_job(transaction, silent_for) for silent_for in (10, 20))
    twins = [add_stalled_job(transaction, silent_for=400) for _ in range(3)]
    update_job(transaction, twins[0], priority=1)
    add_job(transaction, "todo")
    explained = rows(transaction, "SELECT job_id FROM procrastinate_stalled.explain_jobs()")
    assert [row["job_id"] for row in explained] == [*twins, sooner, later, never]


def test_only_jobs_of_the_queue_and_the_task_are_explained(transaction: Connection) -> None:
    both = add_stalled_job(transaction, queue_name="q_1", task_name="t_1")
    other_task = add_stalled_job(transaction, queue_name="q_1", task_name="tx1")
    other_queue = add_stalled_job(transaction, queue_name="qx1", task_name="t_1")

    def ids(queue: str | None = None, task_name: str | None = None) -> list[int]:
        explained = rows(
            transaction, "SELECT job_id FROM procrastinate_stalled.explain_jobs(%s, %s) ORDER BY 1", queue, task_name
        )
        return [row["job_id"] for row in explained]

    assert ids() == [both, other_task, other_queue]
    assert ids(queue="q_1") == [both, other_task]
    assert ids(task_name="t_1") == [both, other_queue]
    assert ids(queue="q_1", task_name="t_1") == [both]
    assert ids(task_name="t%") == ids(queue="") == []


def test_of_two_jobs_with_one_queueing_lock_the_one_that_is_rescued_first_takes_the_place(
    transaction: Connection,
) -> None:
    transaction.execute("SET LOCAL tests.available_since = '2000-01-01'")
    running = add_stalled_job(transaction, silent_for=10, queueing_lock="key")
    other = add_stalled_job(transaction, silent_for=20, queueing_lock="key")

    def planned() -> list[tuple[int, str, str, str | None]]:
        explained = rows(transaction, "SELECT * FROM procrastinate_stalled.explain_jobs() ORDER BY job_id")
        for row in explained:
            alone = rows(transaction, "SELECT * FROM procrastinate_stalled.explain_job(%s)", row["job_id"])
            assert alone == [row]
        return [(row["job_id"], row["verdict"], row["action"], row["detail"]) for row in explained]

    # Nobody knows yet which one will stall.
    assert planned() == [(running, "running", "retry", None), (other, "running", "retry", None)]

    stalled = add_stalled_job(transaction, queueing_lock="key")
    twin = add_stalled_job(transaction, queueing_lock="key")
    duplicate = f"duplicate of job {stalled}"
    assert planned() == [
        (running, "running", "fail", duplicate),
        (other, "running", "fail", duplicate),
        (stalled, "stalled", "retry", None),
        (twin, "stalled", "fail", duplicate),
    ]

    Stalled(transaction).pause(task_name="twin")
    update_job(transaction, stalled, task_name="twin")
    assert planned()[2:] == [
        (stalled, "held", "fail", f"duplicate of job {twin}"),
        (twin, "stalled", "retry", None),
    ]


def test_it_works_where_nothing_can_be_written(transaction: Connection) -> None:
    job = Scene().create(transaction)
    before = contents(transaction)
    transaction.execute("SET LOCAL transaction_read_only = on")
    assert [explained.job_id for explained in Stalled(transaction).explain_jobs()] == [job]
    assert Stalled(transaction).explain_job(job).verdict == "running"
    assert contents(transaction) == before


def test_the_procedure_does_what_was_announced(connection: Connection) -> None:
    connection.execute("SET tests.available_since = '2000-01-01'")
    add_rule(connection, "fail", task_name="fail", action="fail")
    add_rule(connection, "ignore", task_name="ignore", action="ignore")
    add_rule(connection, "w", task_name="wait", on_duplicate="wait")
    add_rule(connection, "run", task_name="run", heartbeat_timeout=None, run_timeout="1 hour")
    add_job(connection, "todo", queueing_lock="a")
    add_stalled_job(connection, queueing_lock="a")
    add_stalled_job(connection, queueing_lock="a", task_name="wait")
    add_stalled_job(connection, queueing_lock="b")
    add_stalled_job(connection, queueing_lock="b")
    add_stalled_job(connection, abort_requested=True)
    for task_name in ("task", "fail", "ignore", "paused", "run"):
        add_stalled_job(connection, silent_for=1000, started_ago=2 * HOUR, task_name=task_name)
        add_stalled_job(connection, silent_for=10, started_ago=20, task_name=task_name)
    add_orphan_note(connection, add_job(connection), 0, HOUR)
    add_job(connection)
    Stalled(connection).pause(task_name="paused")
    announced = rows(connection, "SELECT * FROM procrastinate_stalled.explain_jobs() ORDER BY job_id")
    assert {row["verdict"] for row in announced} == {"stalled", "running", "held", "ignored"}

    Stalled(connection).sweep()

    assert_done(connection, announced)
    left = [row["job_id"] for row in announced if row["verdict"] != "stalled" or row["action"] == "wait"]
    assert {get_job(connection, job_id)["status"] for job_id in left} == {"doing"}


def assert_done(connection: Connection, announced: list[Row]) -> None:
    """Check that the rescues are those that `explain_jobs` had announced, and the last sweep held what it had."""
    done = rows(
        connection,
        """
        SELECT job_id, action, reason, rule_name, detail, attempts, worker_id, started_at
        FROM procrastinate_stalled.rescues
        WHERE rescued_at >= (SELECT max(started_at) - interval '1 minute' FROM procrastinate_stalled.sweeps)
            AND queue_name <> 'earlier'
        ORDER BY job_id
        """,
    )
    names = ("job_id", "reason", "rule_name", "detail", "attempts", "worker_id", "started_at")
    assert done == [
        {name: row[name] for name in names} | {"action": DONE[row["action"]]}
        for row in sorted(announced, key=lambda row: row["job_id"])
        if row["verdict"] == "stalled" and row["action"] in DONE
    ]
    (sweep,) = rows(connection, "SELECT * FROM procrastinate_stalled.sweeps ORDER BY id DESC LIMIT 1")
    assert sweep["held"] == sum(row["verdict"] == "held" for row in announced)
    assert sweep["waiting"] == sum(row["verdict"] == "stalled" and row["action"] == "wait" for row in announced)
    pauses = get_pauses(connection)
    held_by = {
        row["rule_name"] if row["rule_name"] in pauses else "no living worker"
        for row in announced
        if row["verdict"] == "held"
    }
    assert set((sweep["held_reason"] or "").split(", ")) == (held_by or {""})


def get_pauses(connection: Connection) -> set[str]:
    """The names of the rules that ignore jobs until they expire."""
    query = "SELECT name FROM procrastinate_stalled.rules WHERE action = 'ignore' AND expires_at IS NOT NULL"
    return {row["name"] for row in rows(connection, query)}


def explain_all(connection: Connection) -> list[Row]:
    return rows(connection, "SELECT * FROM procrastinate_stalled.explain_jobs()")


def all_jobs(connection: Connection) -> dict[int, Row]:
    return {row["id"]: row for row in rows(connection, "SELECT * FROM procrastinate_jobs")}


@with_examples(30)
@given(database=nights())
def test_the_next_sweep_does_what_was_announced_and_nothing_else(
    transaction: Connection, database: RandomDatabase
) -> None:
    with transaction.transaction(force_rollback=True):
        database.create(transaction)
        transaction.execute("UPDATE procrastinate_stalled.rescues SET queue_name = 'earlier'")
        announced = explain_all(transaction)
        before = all_jobs(transaction)
        listed = rows(transaction, "SELECT id, action, reason, detail FROM procrastinate_stalled.get_stalled_jobs()")

        transaction.execute("SELECT procrastinate_stalled.retry_stalled_jobs()")

        assert_done(transaction, announced)
        touched = {row["job_id"] for row in announced if row["verdict"] == "stalled" and row["action"] in DONE}
        after = all_jobs(transaction)
        assert {job_id for job_id in before if before[job_id] != after[job_id]} == touched
        # The list has the same jobs, and those that nobody alive could run.
        pauses = get_pauses(transaction)
        assert listed == [
            {"id": row["job_id"], "reason": row["reason"]}
            | (
                {"action": "hold", "detail": "no living worker"}
                if row["verdict"] == "held"
                else {"action": row["action"], "detail": row["detail"]}
            )
            for row in sorted(announced, key=lambda row: row["job_id"])
            if row["verdict"] == "stalled" or (row["verdict"] == "held" and row["rule_name"] not in pauses)
        ]


@with_examples(20)
@given(database=nights())
def test_one_job_is_explained_as_it_is_among_all_and_in_its_queue_and_task(
    transaction: Connection, database: RandomDatabase
) -> None:
    with transaction.transaction(force_rollback=True):
        database.create(transaction)
        explained = explain_all(transaction)
        doing = [job for job in all_jobs(transaction).values() if job["status"] == "doing"]
        assert sorted(row["job_id"] for row in explained) == sorted(job["id"] for job in doing)
        for row in explained:
            query = "SELECT * FROM procrastinate_stalled.explain_job(%s)"
            assert rows(transaction, query, row["job_id"]) == [row]
        for queue, task_name in ((QUEUES[0], None), (None, TASKS[0]), (QUEUES[1], TASKS[1])):
            query = "SELECT * FROM procrastinate_stalled.explain_jobs(%s, %s)"
            assert rows(transaction, query, queue, task_name) == [
                row for row in explained if queue in {None, row["queue_name"]} and task_name in {None, row["task_name"]}
            ]


def let_time_pass(connection: Connection, duration: timedelta) -> None:
    """Let all that happened have happened earlier. What the operator did stays: rules, pauses."""
    for table, column in (
        ("procrastinate_workers", "last_heartbeat"),
        ("procrastinate_events", "at"),
        ("procrastinate_stalled.orphans", "seen_at"),
        ("procrastinate_stalled.rescues", "rescued_at"),
    ):
        connection.execute(f"UPDATE {table} SET {column} = {column} - %s", [duration])
    connection.execute(
        """
        SELECT set_config(
            'tests.available_since', (current_setting('tests.available_since')::timestamptz - %s)::text, true
        )
        """,
        [duration],
    )


NONE_SEEN_IN_THE_FUTURE = "UPDATE procrastinate_stalled.orphans SET seen_at = now() WHERE seen_at > now()"


@with_examples(20)
@given(database=nights())
def test_a_job_stalls_at_the_announced_moment_and_not_before(transaction: Connection, database: RandomDatabase) -> None:
    # A server that becomes available only in the future changes what was announced.
    assume(database.night is not None and database.night.available_for > 0)
    with transaction.transaction(force_rollback=True):
        database.create(transaction)
        (row,) = rows(transaction, "SELECT now()")
        transaction.execute(NONE_SEEN_IN_THE_FUTURE)
        announced = [job for job in explain_all(transaction) if job["verdict"] == "running"]
        # An orphan that was not noted is announced as if a sweep came now.
        transaction.execute(
            "SELECT procrastinate_stalled._note_orphans(orphan_ids) FROM procrastinate_stalled._doing_jobs()"
        )
        transaction.execute(NONE_SEEN_IN_THE_FUTURE)
        moments = {job["stalled_at"] for job in announced if job["stalled_at"] is not None}
        for moment in sorted(moments)[:3]:
            with transaction.transaction(force_rollback=True):
                let_time_pass(transaction, moment - row["now"] - timedelta(microseconds=1))
                assert verdicts(transaction, announced, moment) == {"running"}
                let_time_pass(transaction, timedelta(microseconds=1))
                assert verdicts(transaction, announced, moment) <= {"stalled", "held"}
        with transaction.transaction(force_rollback=True):
            let_time_pass(transaction, timedelta(days=3660))
            assert verdicts(transaction, announced, None) <= {"running"}


def verdicts(connection: Connection, announced: list[Row], moment: datetime | None) -> set[str]:
    """The present verdicts on the jobs that were to stall at that moment."""
    job_ids = {job["job_id"] for job in announced if job["stalled_at"] == moment}
    return {job["verdict"] for job in explain_all(connection) if job["job_id"] in job_ids}
