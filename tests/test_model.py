"""The SQL and `tests.model`: whatever happens to a database, both say the same of each job, and do the same with it."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields
from datetime import datetime, timedelta
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
TIMEOUTS = (60 * SECOND, 300 * SECOND, 3600 * SECOND)
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
    detail: str
    is_paused: bool


class Comparison(RuleBasedStateMachine):
    """A database and a model to which the same happens.

    All of it is one transaction, in which `now()` stands still. So times agree to the microsecond, and time passes when
    all that has happened is put back.
    """

    connection: ClassVar[Connection]
    seen: ClassVar[Counter[Kind]]

    def __init__(self) -> None:
        super().__init__()
        self.connection.rollback()
        self.model = Model(rules={"default": Rule("default", position=2147483647)})
        (row,) = self.query("SELECT now()")
        self.now: datetime = row["now"]

    def teardown(self) -> None:
        self.connection.rollback()

    # What befalls workers and jobs.

    @initialize(
        jobs=st.lists(st.tuples(st.sampled_from(QUEUES), st.sampled_from((None, None, *KEYS))), min_size=3, max_size=8)
    )
    def begin(self, jobs: list[tuple[str, str | None]]) -> None:
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
    @rule(
        position=st.sampled_from((0, 100)),
        enabled=st.sampled_from((True, True, False)),
        expires_in=st.sampled_from((None, None, None, *TIMEOUTS)),
        queue_name=queues,
        task_name=patterns,
        args=usually(None, st.sampled_from(ARGS)),
        heartbeat_timeout=usually(TIMEOUTS[0], timeouts),
        run_timeout=timeouts,
        action=st.sampled_from(("retry", "retry", "fail", "ignore")),
        max_rescues=st.sampled_from((None, 0, 1, 2)),
        retry_delay=st.sampled_from((0, 0, SECOND, 3600 * SECOND)),
        retry_backoff=st.sampled_from((1, 2, 1000)),
        retry_queue_name=queues,
        retry_priority=st.none() | st.integers(-1, 1),
        on_duplicate=st.sampled_from(("fail", "wait")),
    )
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

    @rule(outage_grace=st.sampled_from((0, *TIMEOUTS)), require_live_worker=st.booleans())
    def change_settings(self, outage_grace: int, require_live_worker: bool) -> None:
        self.connection.execute(
            "UPDATE procrastinate_stalled.settings SET outage_grace = %s, require_live_worker = %s",
            [timedelta(microseconds=outage_grace), require_live_worker],
        )
        self.model.outage_grace = outage_grace
        self.model.require_live_worker = require_live_worker

    @rule()
    def restart_the_server(self) -> None:
        self.model.available_since = self.model.now
        self.set_available_since()

    @precondition(lambda self: self.model.doing())
    @rule(pick=picks)
    def retry_job(self, pick: int) -> None:
        job = self.pick_job(pick)
        queueing_lock = None if job.abort_requested else job.queueing_lock
        query: LiteralString = "SELECT job_id AS id FROM procrastinate_stalled.retry_job(%s)"
        if self.unless_its_queueing_lock_is_taken(queueing_lock, query, job.id) is not None:
            self.model.retry_job(job)
        self.compare_tables()

    # Sweeps.

    @rule(batch_size=st.sampled_from((1, 2, 1000)))
    def sweep(self, batch_size: int) -> None:
        self.connection.execute("CALL tests.sweep(%s)", [batch_size])
        self.model.sweep()
        self.compare_sweeps()

    @rule(queue=queues, max_jobs=st.none() | st.integers(1, 2))
    def retry_stalled_jobs(self, queue: str | None, max_jobs: int | None) -> None:
        query: LiteralString = "SELECT * FROM procrastinate_stalled.retry_stalled_jobs(%s, max_jobs => %s)"
        planned = self.query(query.replace(")", ", dry_run => true)"), queue, max_jobs)
        done = self.query(query, queue, max_jobs)
        expected = self.model.sweep(queue, max_jobs)
        assert self.as_rescues(done) == self.as_rescues(planned) == in_order(expected)
        self.compare_sweeps()

    @invariant()
    def compare_judgements(self) -> None:
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
        # It takes the time of the clock, not that of the transaction.
        self.connection.execute(
            """
            UPDATE procrastinate_stalled.sweeps SET started_at = now()
            WHERE id = (SELECT max(id) FROM procrastinate_stalled.sweeps)
            """
        )
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
        times = ("rescued_at", "last_heartbeat", "started_at", "scheduled_at")
        return in_order(
            [
                Rescue(
                    **{
                        field.name: self.time(row[field.name]) if field.name in times else row[field.name]
                        for field in fields(Rescue)
                    }
                )
                for row in written
            ]
        )


def in_order(rescues: list[Rescue]) -> list[Rescue]:
    """Sort the rescues of each sweep by job."""
    return sorted(rescues, key=lambda rescue: (rescue.rescued_at, rescue.job_id))


@pytest.fixture(scope="module")
def database(server: Server) -> Iterator[str]:
    """A database in which a transaction can sweep: the procedure of the product, without its commits."""
    with server.database("ours") as conninfo:
        with psycopg.connect(conninfo) as connection:
            (procedure,) = rows(
                connection, "SELECT prosrc FROM pg_proc WHERE oid = 'procrastinate_stalled.sweep'::regproc"
            )
            connection.execute("CREATE SCHEMA tests")
            connection.execute(
                sql.SQL("CREATE PROCEDURE tests.sweep(batch_size integer) LANGUAGE plpgsql AS {}").format(
                    procedure["prosrc"].replace("COMMIT;", "")
                )
            )
        yield conninfo


def test_the_sql_and_the_model_agree(connect: Connect) -> None:
    Comparison.connection = connect(autocommit=False)
    Comparison.seen = seen = Counter()

    run_state_machine_as_test(
        Comparison,
        settings=settings(with_examples(60), stateful_step_count=50, derandomize=True)
        if EXAMPLES is None
        else settings(with_examples(int(EXAMPLES)), stateful_step_count=100),
    )

    print(f"{seen.total()} judgements")
    for kind, number in seen.most_common():
        print(f"{number:7} {kind}")
    assert {kind.verdict for kind in seen} == {"stalled", "running", "held", "ignored"}
    assert {kind.reason for kind in seen if kind.verdict == "stalled"} == {"heartbeat", "orphaned", "run_timeout"}
    assert {kind.action for kind in seen} == {"retry", "fail", "abort", "wait", "ignore"}
    assert {kind.detail for kind in seen} == {"", "rule", "no rule", "abort requested", "max_rescues", "duplicate"}
    assert {kind.is_paused for kind in seen if kind.verdict == "held"} == {True, False}
