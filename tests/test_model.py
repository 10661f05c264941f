"""The SQL and `tests.model`: whatever happens to a database, both say the same of each job, and do the same with it."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from functools import partial
from typing import Any, ClassVar, LiteralString, NamedTuple

import psycopg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg import sql
from psycopg.errors import UniqueViolation
from psycopg.types.json import Jsonb

from tests.conftest import Connect
from tests.jobs import Connection, Row, add_rule, add_worker, rows
from tests.model import DAY, LONG_AGO, PAUSE, SECOND, Job, Model, Rescue, Rule
from tests.procrastinate_release import RETRY_AT_ONCE
from tests.random_databases import usually, with_examples
from tests.server import Server

QUEUES = ("default", "slow")
TASKS = ("billing.send", "billing_send", "mail")
PATTERNS = ("billing.%", r"billing\_send", "billing_send", "%")
KEYS = ("a", "b")
MINUTE, HOUR = 60 * SECOND, 3600 * SECOND
TIMEOUTS = (MINUTE, 5 * MINUTE, HOUR)
ARGS: tuple[dict[str, int], ...] = ({}, {"a": 0}, {"a": 1}, {"a": 0, "b": 1})

# `make test-model` asks for more, and for other ones each time.
EXAMPLES = os.environ.get("MODEL_EXAMPLES")

picks = st.integers(0, 11)
"""Chooses one of those that there are."""
queues = usually(None, st.sampled_from(QUEUES))
patterns = usually(None, st.sampled_from(PATTERNS))
timeouts = st.none() | st.sampled_from(TIMEOUTS)
passing = st.sampled_from((1, 31 * SECOND, *TIMEOUTS, DAY)) | st.integers(1, 700 * SECOND)
heard = st.sampled_from((0, 0, 1, 2, None))

columns_of_a_rule: dict[str, Any] = {
    "position": st.sampled_from((0, 100)),
    "enabled": st.sampled_from((True, True, False)),
    "expires_in": st.sampled_from((None, None, None, *TIMEOUTS)),
    "queue_name": queues,
    "task_name": patterns,
    "args": usually(None, st.sampled_from(ARGS)),
    "heartbeat_timeout": usually(TIMEOUTS[0], timeouts),
    "run_timeout": timeouts,
    "action": st.sampled_from(("retry", "retry", "fail", "ignore")),
    "max_rescues": st.sampled_from((None, 0, 1, 2)),
    "retry_delay": st.sampled_from((0, 0, SECOND, HOUR)),
    "retry_backoff": st.sampled_from((1, 2, 1000)),
    "retry_queue_name": queues,
    "retry_priority": st.none() | st.integers(-1, 1),
    "on_duplicate": st.sampled_from(("fail", "wait")),
}

TIMES: dict[LiteralString, tuple[LiteralString, ...]] = {
    "procrastinate_workers": ("last_heartbeat",),
    "procrastinate_events": ("at",),
    "procrastinate_jobs": ("scheduled_at",),
    "procrastinate_stalled.orphans": ("seen_at",),
    "procrastinate_stalled.rescues": ("rescued_at", "last_heartbeat", "started_at", "scheduled_at"),
    "procrastinate_stalled.sweeps": ("started_at", "latest_heartbeat"),
    "procrastinate_stalled.rules": ("expires_at",),
}


class Kind(NamedTuple):
    """A kind of judgement."""

    verdict: str
    reason: str | None
    action: str
    detail: str = ""
    is_paused: bool = False


class Comparison(RuleBasedStateMachine):
    """A database and a model to which the same happens.

    All of it is one transaction, in which `now()` stands still. So times agree to the microsecond, and time passes when
    all that has happened is put back.
    """

    connection: ClassVar[Connection]
    seen: ClassVar[Counter[Kind]]
    examples: ClassVar[int]
    steps: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        Comparison.examples += 1
        self.connection.rollback()
        # What was rolled back is dead, and would be read again and again.
        self.connection.autocommit = True
        self.connection.execute(f"VACUUM {', '.join(TIMES)}")
        self.connection.autocommit = False
        self.model = Model(rules={"default": Rule("default", position=2147483647)})
        (row,) = self.query("SELECT now()")
        self.now: datetime = row["now"]

    def teardown(self) -> None:
        self.connection.rollback()

    # What befalls workers and jobs.

    def begin(self, jobs: list[tuple[str, str | None]]) -> None:
        """Add three workers, and jobs with these queues and queueing locks, which they fetch in turn."""
        for _ in range(3):
            self.add_worker()
        for number, (queue_name, queueing_lock) in enumerate(jobs):
            self.defer(queue_name, "mail", None, queueing_lock, {}, number)

    @rule()
    def add_worker(self) -> None:
        self.model.workers[add_worker(self.connection)] = self.model.now

    @rule(duration=passing, heard=heard)
    def let_time_pass(self, duration: int, heard: int | None) -> None:
        """Let time pass; then a worker is heard."""
        self.shift(duration)
        if heard is not None and self.model.workers:
            worker = self.pick(self.model.workers, heard)
            self.query("SELECT procrastinate_update_heartbeat_v1(%s)", worker)
            self.model.workers[worker] = self.model.now

    @precondition(lambda self: self.time_until_one_stalls() is not None)
    @rule(early=st.sampled_from((0, 0, 1)), heard=heard)
    def let_time_pass_until_one_stalls(self, early: int, heard: int | None) -> None:
        """Let time pass until a job is stalled, or all but the last microsecond."""
        self.let_time_pass((self.time_until_one_stalls() or 0) - early, heard)

    @rule(seconds=st.sampled_from((30, 600)), unregisters=st.none() | picks)
    def prune(self, seconds: int, unregisters: int | None) -> None:
        """Let a worker leave, or another one remove those that are silent."""
        if unregisters is None or not self.model.workers:
            pruned = self.query("SELECT worker_id FROM procrastinate_prune_stalled_workers_v1(%s)", seconds)
            assert {row["worker_id"] for row in pruned} == self.model.prune(seconds)
        else:
            worker = self.pick(self.model.workers, unregisters)
            self.query("SELECT procrastinate_unregister_worker_v1(%s)", worker)
            self.model.remove_worker(worker)

    @rule(
        queue_name=st.sampled_from(QUEUES),
        task_name=st.sampled_from(TASKS),
        lock=st.sampled_from((None, None, *KEYS)),
        queueing_lock=st.sampled_from((None, *KEYS)),
        args=st.sampled_from(ARGS),
        worker=st.none() | picks,
    )
    def defer(
        self,
        queue_name: str,
        task_name: str,
        lock: str | None,
        queueing_lock: str | None,
        args: dict[str, int],
        worker: int | None,
    ) -> None:
        """Defer a job, and let a worker fetch one."""
        job_id = self.unless_its_queueing_lock_is_taken(
            queueing_lock,
            """
            INSERT INTO procrastinate_jobs (queue_name, task_name, lock, queueing_lock, args)
            VALUES (%s, %s, %s, %s, %s)
            RETURNING id
            """,
            queue_name,
            task_name,
            lock,
            queueing_lock,
            Jsonb(args),
        )
        if job_id is not None:
            self.model.jobs[job_id] = Job(job_id, queue_name, task_name, 0, lock, queueing_lock, args, None)
        if worker is not None:
            self.fetch(worker, 1)

    @rule(pick=picks, count=st.integers(1, 4))
    def fetch(self, pick: int, count: int) -> None:
        if not self.model.workers:
            return
        worker = self.pick(self.model.workers, pick)
        for _ in range(count):
            (row,) = self.query("SELECT id FROM procrastinate_fetch_job_v2(NULL, %s)", worker)
            if row["id"] is not None:
                job = self.model.jobs[row["id"]]
                job.status, job.worker_id, job.started_at = "doing", worker, self.model.now

    @precondition(lambda self: self.model.doing())
    @rule(pick=picks, status=st.sampled_from(("succeeded", "failed", None)))
    def end_a_run(self, pick: int, status: str | None) -> None:
        """Let a worker finish a job, or retry it."""
        job = self.pick_job(pick)
        if status is not None:
            self.query("SELECT procrastinate_finish_job_v1(%s, %s, false)", job.id, status)
            job.status, job.abort_requested = status, False
            job.attempts += 1
        elif job.abort_requested:
            self.query(RETRY_AT_ONCE, job.id)
            job.status = "failed"
        elif self.unless_its_queueing_lock_is_taken(job.queueing_lock, f"{RETRY_AT_ONCE}, 0 AS id", job.id) is not None:
            job.status, job.scheduled_at = "todo", None
            job.attempts += 1

    @precondition(lambda self: self.model.jobs)
    @rule(pick=picks, deletes=st.sampled_from((False, False, False, True)))
    def delete_or_abort(self, pick: int, deletes: bool) -> None:
        job = self.model.jobs[self.pick(self.model.jobs, pick)]
        if deletes:
            self.connection.execute("DELETE FROM procrastinate_jobs WHERE id = %s", [job.id])
            del self.model.jobs[job.id]
        elif job.status == "doing":
            self.query("SELECT procrastinate_cancel_job_v1(%s, true, false)", job.id)
            job.abort_requested = True

    # What operators do.

    @precondition(lambda self: len(self.model.rules) < 6)
    @rule(**columns_of_a_rule)
    def add_rule(self, expires_in: int | None, **columns: Any) -> None:
        expires_at = None if expires_in is None else self.model.now + expires_in
        name = next(f"rule {number}" for number in range(7) if f"rule {number}" not in self.model.rules)
        new = Rule(name, expires_at=expires_at, **columns)
        add_rule(
            self.connection,
            **asdict(new)
            | {"expires_at": self.at(expires_at)}
            | {
                name: None if columns[name] is None else timedelta(microseconds=columns[name])
                for name in ("heartbeat_timeout", "run_timeout", "retry_delay")
            },
        )
        self.model.rules[name] = new

    @precondition(lambda self: len(self.model.rules) > 1)
    @rule(pick=picks)
    def remove_rule(self, pick: int) -> None:
        # The last name is that of a rule of one's own, if there is one.
        name = sorted(self.model.rules)[-1 - pick // 8 % len(self.model.rules)]
        self.connection.execute("DELETE FROM procrastinate_stalled.rules WHERE name = %s", [name])
        del self.model.rules[name]

    @rule(duration=st.sampled_from(TIMEOUTS), queue=queues, task_name=patterns)
    def pause(self, duration: int, queue: str | None, task_name: str | None) -> None:
        (row,) = self.query(
            "SELECT name FROM procrastinate_stalled.pause(%s, %s, %s)",
            timedelta(microseconds=duration),
            queue,
            task_name,
        )
        for old in self.pauses():
            if not self.is_in_force(old):
                del self.model.rules[old.name]
        self.model.rules[row["name"]] = Rule(
            row["name"], PAUSE, True, self.model.now + duration, queue, task_name, action="ignore"
        )

    @precondition(lambda self: self.pauses())
    @rule(pick=picks)
    def resume(self, pick: int) -> None:
        pause = self.pauses()[pick % len(self.pauses())]
        (row,) = self.query(
            "SELECT procrastinate_stalled.resume(%s, %s) AS was_in_force", pause.queue_name, pause.task_name
        )
        assert row["was_in_force"] == self.is_in_force(pause)
        del self.model.rules[pause.name]

    @rule(
        outage_grace=st.sampled_from((0, *TIMEOUTS)),
        require_live_worker=st.booleans(),
        keep_rescues=st.sampled_from((0, *TIMEOUTS, 90 * DAY)),
    )
    def change_settings(self, outage_grace: int, require_live_worker: bool, keep_rescues: int) -> None:
        self.connection.execute(
            "UPDATE procrastinate_stalled.settings SET outage_grace = %s, require_live_worker = %s, keep_rescues = %s",
            [timedelta(microseconds=outage_grace), require_live_worker, timedelta(microseconds=keep_rescues)],
        )
        self.model.outage_grace = outage_grace
        self.model.require_live_worker = require_live_worker
        self.model.keep_rescues = keep_rescues

    @rule()
    def restart_the_server(self) -> None:
        self.model.available_since = self.model.now
        self.set_available_since()

    @precondition(lambda self: self.model.doing())
    @rule(
        pick=picks,
        retry_in=st.sampled_from((None, 0, MINUTE)),
        priority=st.sampled_from((None, 1)),
        queue=queues,
        lock=st.sampled_from((None, None, *KEYS)),
    )
    def retry_job(
        self, pick: int, retry_in: int | None, priority: int | None, queue: str | None, lock: str | None
    ) -> None:
        job = self.pick_job(pick)
        retry_at = None if retry_in is None else self.model.now + retry_in
        retried = self.unless_its_queueing_lock_is_taken(
            None if job.abort_requested else job.queueing_lock,
            "SELECT job_id AS id FROM procrastinate_stalled.retry_job(%s, %s, %s, %s, %s)",
            job.id,
            self.at(retry_at),
            priority,
            queue,
            lock,
        )
        if retried is not None:
            self.model.retry_job(job, retry_at, priority, queue, lock)
        self.compare_tables()

    # Sweeps.

    @rule(batch_size=st.sampled_from((1, 2, 1000)))
    def sweep(self, batch_size: int) -> None:
        self.connection.execute("CALL tests.sweep(%s)", [batch_size])
        self.model.sweep()
        self.compare_sweeps()

    @rule(queue=queues, task_name=usually(None, st.sampled_from(TASKS)), max_jobs=st.none() | st.integers(1, 2))
    def retry_stalled_jobs(self, queue: str | None, task_name: str | None, max_jobs: int | None) -> None:
        query: LiteralString = "SELECT * FROM procrastinate_stalled.retry_stalled_jobs(%s, %s, max_jobs => %s)"
        planned = self.query(query.replace(")", ", dry_run => true)"), queue, task_name, max_jobs)
        done = self.query(query, queue, task_name, max_jobs)
        expected = self.model.sweep(queue, task_name, max_jobs)
        assert self.as_rescues(done) == self.as_rescues(planned) == in_order(expected)
        self.compare_sweeps()

    @rule(times=st.integers(2, 4), count=st.integers(1, 3))
    def lose_workers_again_and_again(self, times: int, count: int) -> None:
        """Let the jobs that are due be fetched by a new worker, lose that, and be swept; and that several times."""
        for _ in range(times):
            self.add_worker()
            self.shift(self.time_until_one_is_due())
            self.fetch(-1, count)
            self.compare_judgements()
            self.shift(self.time_until_one_stalls() or 0)
            self.add_worker()
            self.compare_judgements()
            self.sweep(1000)

    @invariant()
    def compare_after_a_step(self) -> None:
        Comparison.steps += 1
        self.compare_judgements()

    def compare_judgements(self) -> None:
        """Compare what both say of each job in `doing`."""
        judgements = self.model.judge()
        explained = {row["job_id"]: row for row in self.query("SELECT * FROM procrastinate_stalled.explain_jobs()")}
        assert {*explained} == {*judgements}
        for judgement in judgements.values():
            row = explained[judgement.job_id]
            job = self.model.jobs[judgement.job_id]
            assert (row["rule_name"], row["verdict"], row["reason"], self.time(row["stalled_at"])) == (
                judgement.rule_name,
                judgement.verdict,
                judgement.reason,
                judgement.stalled_at,
            )
            assert (row["action"], row["detail"]) == (judgement.action, judgement.detail)
            assert self.time(row["seen_at"]) == self.model.seen_at(job)
            detail = re.sub(" of job .*", "", judgement.detail or "")
            self.seen[Kind(judgement.verdict, judgement.reason, judgement.action, detail, judgement.is_paused)] += 1

        stalled = self.query("SELECT * FROM procrastinate_stalled.get_stalled_jobs()")
        listed = [
            judgement
            for judgement in judgements.values()
            if judgement.verdict == "stalled" or (judgement.verdict == "held" and not judgement.is_paused)
        ]
        assert [row["id"] for row in stalled] == [judgement.job_id for judgement in listed]
        for row, judgement in zip(stalled, listed, strict=True):
            held = judgement.verdict == "held"
            assert row["action"] == ("hold" if held else judgement.action)
            assert row["detail"] == ("no living worker" if held else judgement.detail)
            assert (row["rule_name"], row["reason"], self.time(row["stalled_at"])) == (
                judgement.rule_name,
                judgement.reason,
                judgement.stalled_at,
            )
            assert (self.time(row["retry_at"]), row["retry_queue_name"], row["retry_priority"]) == (
                judgement.retry_at,
                judgement.retry_queue_name,
                judgement.retry_priority,
            )

    def compare_sweeps(self) -> None:
        """Compare what the last sweep wrote."""
        (row,) = self.query("SELECT * FROM procrastinate_stalled.sweeps ORDER BY id DESC LIMIT 1")
        assert (row["error"], row["duration"] is not None) == (None, True)
        expected = asdict(self.model.sweeps[-1])
        reasons = ", ".join(sorted((row["held_reason"] or "").split(", "))) or None
        times = {name: self.time(row[name]) for name in ("started_at", "latest_heartbeat")}
        assert {name: (row | times | {"held_reason": reasons})[name] for name in expected} == expected
        orphans = self.query("SELECT * FROM procrastinate_stalled.orphans")
        assert self.model.orphans == {
            orphan["job_id"]: (orphan["attempts"], self.time(orphan["seen_at"])) for orphan in orphans
        }
        self.compare_tables()
        self.shift(1)  # so that no two sweeps have the same time

    def compare_tables(self) -> None:
        """Compare jobs and rescues."""
        for row in self.query("SELECT * FROM procrastinate_jobs"):
            expected = asdict(self.model.jobs[row["id"]])
            del expected["started_at"]
            assert row | {"scheduled_at": self.time(row["scheduled_at"])} == expected
        rescues = self.query("SELECT * FROM procrastinate_stalled.rescues ORDER BY id")
        assert self.as_rescues(rescues) == in_order(self.model.rescues)

    # Between the two.

    def query(self, query: LiteralString, *parameters: object) -> list[Row]:
        return rows(self.connection, query, *parameters)

    def unless_its_queueing_lock_is_taken(
        self, queueing_lock: str | None, query: LiteralString, *parameters: object
    ) -> int | None:
        """Run a query that returns an id; see it fail, and return None, if another job waits with the queueing lock."""
        if self.model.waiting_job(queueing_lock) is None:
            (row,) = self.query(query, *parameters)
            return int(row["id"])
        with pytest.raises(UniqueViolation), self.connection.transaction():
            self.query(query, *parameters)
        return None

    def pick(self, ids: dict[int, Any], pick: int) -> int:
        return sorted(ids)[pick % len(ids)]

    def pick_job(self, pick: int) -> Job:
        doing = self.model.doing()
        return doing[pick % len(doing)]

    def pauses(self) -> list[Rule]:
        return [rule for _, rule in sorted(self.model.rules.items()) if rule.position == PAUSE]

    def is_in_force(self, pause: Rule) -> bool:
        return pause.expires_at is not None and pause.expires_at > self.model.now

    def time_until_one_stalls(self) -> int | None:
        """How long it is until the next one of the running jobs is stalled."""
        moments = [judgement.stalled_at for judgement in self.model.judge().values() if judgement.verdict == "running"]
        return min((moment - self.model.now for moment in moments if moment is not None), default=None)

    def time_until_one_is_due(self) -> int:
        """How long it is until the next one of the jobs in `todo` may start."""
        moments = [job.scheduled_at or 0 for job in self.model.jobs.values() if job.status == "todo"]
        return max(0, min(moments, default=0) - self.model.now)

    def shift(self, duration: int) -> None:
        """Put back all that has happened."""
        interval = timedelta(microseconds=duration)
        for table, columns in TIMES.items():
            assignments = ", ".join(f"{column} = {column} - %(interval)s" for column in columns)
            self.connection.execute(f"UPDATE {table} SET {assignments}", {"interval": interval})
        self.model.now += duration
        self.set_available_since()

    def time(self, at: datetime | None) -> int | None:
        """The model's time for one of the database."""
        return None if at is None else self.model.now + (at - self.now) // timedelta(microseconds=1)

    def at(self, time: int | None) -> datetime | None:
        """The database's time for one of the model."""
        return None if time is None else self.now + timedelta(microseconds=time - self.model.now)

    def set_available_since(self) -> None:
        if self.model.available_since != LONG_AGO:
            self.query(
                "SELECT set_config('tests.available_since', %s::timestamptz::text, true)",
                self.at(self.model.available_since),
            )

    def as_rescues(self, written: list[Row]) -> list[Rescue]:
        rescues = []
        for row in written:
            times = {
                name: self.time(row[name]) for name in ("rescued_at", "last_heartbeat", "started_at", "scheduled_at")
            }
            rescues.append(Rescue(**{field.name: (row | times)[field.name] for field in fields(Rescue)}))
        return in_order(rescues)


def in_order(rescues: list[Rescue]) -> list[Rescue]:
    """Sort the rescues of each sweep by job."""
    return sorted(rescues, key=lambda rescue: (rescue.rescued_at, rescue.job_id))


@pytest.fixture(scope="module")
def database(server: Server) -> Iterator[str]:
    """A database in which a transaction can sweep: the procedure of the product, without its commits.

    A sweep, and an orphan, is dated by the transaction, not by the clock: else a worker may be alive, and not when the
    sweep started.
    """
    with server.database("ours") as conninfo:
        with psycopg.connect(conninfo) as connection:
            (procedure,) = rows(
                connection, "SELECT prosrc FROM pg_proc WHERE oid = 'procrastinate_stalled.sweep'::regproc"
            )
            connection.execute("ALTER TABLE procrastinate_stalled.sweeps ALTER COLUMN started_at SET DEFAULT now()")
            connection.execute("ALTER TABLE procrastinate_stalled.orphans ALTER COLUMN seen_at SET DEFAULT now()")
            connection.execute("CREATE SCHEMA tests")
            connection.execute(
                sql.SQL("CREATE PROCEDURE tests.sweep(batch_size integer) LANGUAGE plpgsql AS {}").format(
                    procedure["prosrc"].replace("COMMIT;", "")
                )
            )
        yield conninfo


Step = Callable[[Comparison], object]


def begin(*queueing_locks: str | None) -> Step:
    """Begin with jobs with these queueing locks."""
    return partial(Comparison.begin, jobs=[("default", queueing_lock) for queueing_lock in queueing_locks])


def defer(worker: int | None = None, **columns: Any) -> Step:
    """Defer a job, and let a worker fetch one."""
    columns = {"task_name": "mail", "lock": None, "queueing_lock": None, "args": {}} | columns
    return partial(Comparison.defer, queue_name="default", worker=worker, **columns)


def obey(**columns: Any) -> Step:
    """Add a rule."""
    columns = asdict(Rule("", heartbeat_timeout=MINUTE)) | {"expires_in": None} | columns
    del columns["name"], columns["expires_at"]
    return partial(Comparison.add_rule, **columns)


def wait(duration: int, heard: int | None = 1) -> Step:
    """Let time pass; then the second worker is heard, or the one that is named, or none."""
    return partial(Comparison.let_time_pass, duration=duration, heard=heard)


def change_settings(**columns: Any) -> Step:
    """Change some settings; the others get their defaults."""
    defaults = {"outage_grace": 10 * MINUTE, "require_live_worker": True, "keep_rescues": 90 * DAY}
    return partial(Comparison.change_settings, **defaults | columns)


fetch = partial(Comparison.fetch, pick=-1, count=1)  # the newest worker
sweep = partial(Comparison.sweep, batch_size=1000)
prune = partial(Comparison.prune, seconds=30, unregisters=None)
pause = partial(Comparison.pause, duration=HOUR, queue=None, task_name=None)
ask_to_abort = partial(Comparison.delete_or_abort, pick=0, deletes=False)
remove_the_rule = partial(Comparison.remove_rule, pick=0)
retry_job = partial(Comparison.retry_job, pick=0, retry_in=None, priority=None, queue=None, lock=None)
retry_one = partial(Comparison.retry_stalled_jobs, queue=None, task_name=None, max_jobs=1)
restart = Comparison.restart_the_server
is_lost: list[Step] = [Comparison.add_worker, fetch, wait(MINUTE)]


def is_lost_twice(first: int, second: int) -> list[Step]:
    """A worker falls silent, and the job waits for so long; then another one does, and it waits again."""
    return [*is_lost, sweep, wait(first), *is_lost, sweep, wait(second)]


HISTORIES: dict[str, tuple[Kind, list[Step]]] = {
    "its worker was heard": (
        Kind("running", "heartbeat", "retry"),
        [begin(None), wait(5 * MINUTE - 1)],
    ),
    "its worker is silent": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(None), wait(5 * MINUTE)],
    ),
    "nobody is alive": (
        Kind("held", "heartbeat", "retry"),
        [begin(None), wait(HOUR, None)],
    ),
    "nobody was heard within half of the timeout": (
        Kind("held", "heartbeat", "retry"),
        [begin(None), wait(150 * SECOND), wait(150 * SECOND + 1, None)],
    ),
    "somebody was heard within half of the timeout": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(None), wait(150 * SECOND), wait(150 * SECOND, None)],
    ),
    "nobody is alive, and nobody needs to be": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(None), change_settings(require_live_worker=False), wait(HOUR, None)],
    ),
    "nobody was alive, and one is heard again": (
        Kind("running", "heartbeat", "retry"),
        [begin(None), wait(4 * MINUTE, None), sweep, wait(MINUTE)],
    ),
    "nobody was alive, and one has been heard again for long": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(None), wait(4 * MINUTE, None), sweep, wait(MINUTE), sweep, wait(5 * MINUTE)],
    ),
    "nobody was alive, and a new worker has come": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(None), wait(4 * MINUTE, None), sweep, wait(MINUTE), Comparison.add_worker],
    ),
    "nobody was alive, and its worker was overdue before": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(None), wait(5 * MINUTE), wait(3 * MINUTE, None), sweep, wait(SECOND)],
    ),
    "its worker was not heard since an outage": (
        Kind("running", "heartbeat", "retry"),
        [begin(None), wait(MINUTE), restart, wait(10 * MINUTE - 1)],
    ),
    "its worker was not heard for long since an outage": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(None), wait(MINUTE), restart, wait(10 * MINUTE)],
    ),
    "its worker is gone, and no sweep saw that": (
        Kind("running", "orphaned", "retry"),
        [begin(None), wait(HOUR), prune, wait(HOUR)],
    ),
    "its worker is gone, and a sweep saw that": (
        Kind("stalled", "orphaned", "retry"),
        [begin(None), wait(MINUTE), prune, sweep, wait(5 * MINUTE)],
    ),
    "its worker is gone, and a sweep saw that of the one before": (
        Kind("running", "orphaned", "retry"),
        [
            *(begin(None), wait(MINUTE), prune, sweep, wait(5 * MINUTE), sweep),
            *(Comparison.add_worker, fetch, wait(MINUTE, 0), prune, wait(HOUR)),
        ],
    ),
    "its worker is gone, and there was an outage": (
        Kind("running", "orphaned", "retry"),
        [begin(None), wait(MINUTE), prune, restart, sweep, wait(10 * MINUTE - 2)],
    ),
    "it runs for too long": (
        Kind("stalled", "run_timeout", "retry"),
        [begin(None), obey(run_timeout=MINUTE), wait(MINUTE, 0)],
    ),
    "it runs for too long while nobody is alive": (
        Kind("stalled", "run_timeout", "retry"),
        [begin(None), obey(run_timeout=HOUR), wait(HOUR, None)],
    ),
    "a pause is in force": (
        Kind("held", "heartbeat", "retry", is_paused=True),
        [begin(None), pause, wait(5 * MINUTE)],
    ),
    "a pause is over": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(None), pause, wait(HOUR)],
    ),
    "a pause is in force for jobs with other arguments": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(), obey(action="ignore", args={"a": 0}, expires_in=HOUR), defer(0, args={"a": 1}), wait(5 * MINUTE)],
    ),
    "its rule ignores it": (
        Kind("ignored", None, "ignore", "rule"),
        [begin(None), obey(action="ignore"), wait(HOUR)],
    ),
    "it has no rule": (
        Kind("ignored", None, "ignore", "no rule"),
        [begin(None), remove_the_rule, wait(HOUR)],
    ),
    "its rule fails it": (
        Kind("stalled", "heartbeat", "fail", "rule"),
        [
            *(begin(None), obey(action="ignore", position=0, enabled=False), obey(action="ignore")),
            *(obey(action="fail", position=0), wait(MINUTE)),
        ],
    ),
    "its rule is for its task and arguments": (
        Kind("stalled", "heartbeat", "fail", "rule"),
        [
            *(begin(), obey(task_name=r"billing\_send", args={"a": 0}, action="fail")),
            *(defer(0, task_name="billing_send", args={"a": 0, "b": 1}), wait(MINUTE)),
        ],
    ),
    "another rule fails jobs with other arguments": (
        Kind("running", "heartbeat", "retry"),
        [begin(), obey(args={"a": 0}, action="fail"), defer(0, args={"a": 1}), wait(MINUTE)],
    ),
    "somebody asked to abort it": (
        Kind("stalled", "heartbeat", "abort", "abort requested"),
        [begin(None), obey(action="fail", max_rescues=0), ask_to_abort, wait(MINUTE)],
    ),
    "it goes to another queue": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(None), obey(retry_queue_name="slow", retry_priority=1), wait(MINUTE)],
    ),
    "it has lost two workers, and waits longer each time": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(), defer(), obey(retry_delay=SECOND), *is_lost_twice(SECOND, 2 * SECOND), *is_lost],
    ),
    "it has lost two workers, and waits for a day at most": (
        Kind("stalled", "heartbeat", "retry"),
        [
            *(begin(), defer(), obey(retry_delay=SECOND, retry_backoff=1000)),
            *is_lost_twice(SECOND, 1000 * SECOND),
            *is_lost,
        ],
    ),
    "it has a lock, and does not wait": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(), obey(retry_delay=SECOND), defer(0, lock="b"), wait(MINUTE)],
    ),
    "it has lost as many workers as it may": (
        Kind("stalled", "heartbeat", "fail", "max_rescues"),
        [begin(), defer(), obey(max_rescues=2), *is_lost, sweep, *is_lost, sweep, *is_lost],
    ),
    "it has lost as many workers as it may, one of them long ago": (
        Kind("stalled", "heartbeat", "fail", "max_rescues"),
        [
            begin(),
            defer(),
            obey(max_rescues=1),
            *is_lost,
            sweep,
            change_settings(keep_rescues=0),
            wait(DAY),
            sweep,
            *is_lost,
        ],
    ),
    "its turn has not come": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(None, None), wait(5 * MINUTE, 2), retry_one],
    ),
    "an operator retried it": (
        Kind("stalled", "heartbeat", "retry"),
        [begin(None), obey(max_rescues=1), retry_job, *is_lost],
    ),
    "another job waits with its queueing lock": (
        Kind("stalled", "heartbeat", "fail", "duplicate"),
        [begin("a"), defer(queueing_lock="a"), wait(5 * MINUTE)],
    ),
    "another job waits with its queueing lock, and it is to wait for that": (
        Kind("stalled", "heartbeat", "wait", "duplicate"),
        [begin("a"), defer(queueing_lock="a"), obey(on_duplicate="wait"), wait(MINUTE)],
    ),
    "another job waits with both of its locks, and it is to wait for that": (
        Kind("stalled", "heartbeat", "fail", "duplicate"),
        [
            *(begin(), defer(0, lock="b", queueing_lock="a"), defer(lock="b", queueing_lock="a")),
            *(obey(on_duplicate="wait"), wait(MINUTE)),
        ],
    ),
    "another one with its queueing lock is stalled, too": (
        Kind("stalled", "heartbeat", "fail", "duplicate"),
        [begin("a", "a"), wait(5 * MINUTE, 2)],
    ),
    "a later one with its queueing lock is stalled, and a pause holds it": (
        Kind("held", "heartbeat", "fail", "duplicate", is_paused=True),
        [
            *(begin(), obey(action="ignore", args={"a": 0}, expires_in=HOUR)),
            *(defer(0, args={"a": 0}, queueing_lock="a"), defer(1, queueing_lock="a"), wait(5 * MINUTE, 2)),
        ],
    ),
}
"""The kind of a judgement after the last of some steps, by what they bring about."""


class DrawnHistory(Comparison):
    """Anything, at times after one of the histories."""

    @initialize(
        history=st.none() | st.sampled_from([*HISTORIES]),
        jobs=st.lists(st.tuples(st.sampled_from(QUEUES), st.sampled_from((None, None, *KEYS))), min_size=3, max_size=8),
        rules=st.lists(st.fixed_dictionaries(columns_of_a_rule), max_size=3),
    )
    def begin_anywhere(
        self, history: str | None, jobs: list[tuple[str, str | None]], rules: list[dict[str, Any]]
    ) -> None:
        if history is not None:
            _, steps = HISTORIES[history]
            for step in steps:
                step(self)
                self.compare_after_a_step()
        self.begin(jobs)
        for columns in rules:
            self.add_rule(**columns)


@pytest.fixture(autouse=True)
def empty_comparison(connect: Connect) -> Iterator[None]:
    """Give the machine a connection, and let it have seen nothing."""
    Comparison.connection = connect(autocommit=False)
    Comparison.seen = Counter()
    Comparison.examples = Comparison.steps = 0
    yield
    Comparison.connection.rollback()


@pytest.mark.parametrize("history", HISTORIES)
def test_the_sql_and_the_model_agree_on_a_job_when(history: str) -> None:
    kind, steps = HISTORIES[history]
    state = Comparison()
    for step in steps:
        Comparison.seen.clear()
        step(state)
        state.compare_after_a_step()
    assert kind in Comparison.seen
    state.sweep(1000)
    state.compare_after_a_step()


def test_the_histories_have_every_kind_of_judgement() -> None:
    kinds = {kind for kind, _ in HISTORIES.values()}
    assert {kind.verdict for kind in kinds} == {"stalled", "running", "held", "ignored"}
    assert {kind.reason for kind in kinds if kind.verdict == "stalled"} == {"heartbeat", "orphaned", "run_timeout"}
    assert {kind.action for kind in kinds} == {"retry", "fail", "abort", "wait", "ignore"}
    assert {kind.detail for kind in kinds} == {"", "rule", "no rule", "abort requested", "max_rescues", "duplicate"}
    assert {kind.is_paused for kind in kinds if kind.verdict == "held"} == {True, False}


def test_the_sql_and_the_model_agree_whatever_happens() -> None:
    run_state_machine_as_test(
        DrawnHistory,
        settings=settings(with_examples(60), stateful_step_count=50, derandomize=True)
        if EXAMPLES is None
        else settings(with_examples(int(EXAMPLES)), stateful_step_count=100),
    )

    seen = Comparison.seen
    print(
        f"\n{Comparison.examples} examples, {Comparison.steps} steps, {seen.total()} judgements of {len(seen)} kinds:"
    )
    for kind, number in seen.most_common():
        print(f"{number:7} {kind}")
    assert Comparison.steps > 10 * Comparison.examples
