"""The Python package: both clients against real databases, and what importing it costs."""

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row, namedtuple_row

import procrastinate_stalled
from procrastinate_stalled import (
    AsyncStalled,
    ExplainedJob,
    Rescue,
    Rule,
    Stalled,
    StalledJob,
    Status,
    TaskRuntime,
    Worker,
)
from tests.conftest import Connect
from tests.jobs import add_event, add_job, add_orphan_note, add_rule, add_stalled_job, add_worker, get_job, rows

Call = Callable[..., Any]

AVAILABLE_SINCE = datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)
# The servers of tests seem to be available since -infinity, which no datetime can hold.
LATER = {"options": f"-c tests.available_since={AVAILABLE_SINCE:%Y-%m-%dT%H:%M:%SZ}"}


def call_sync(
    conninfo: str, method: str, *args: object, options: dict[str, Any] | None = None, **kwargs: object
) -> Any:
    with psycopg.connect(conninfo, **{"autocommit": True, **(options or {})}) as connection:
        return getattr(Stalled(connection), method)(*args, **kwargs)


def call_async(
    conninfo: str, method: str, *args: object, options: dict[str, Any] | None = None, **kwargs: object
) -> Any:
    async def call() -> Any:
        async with await psycopg.AsyncConnection.connect(
            conninfo, **{"autocommit": True, **(options or {})}
        ) as connection:
            return await getattr(AsyncStalled(connection), method)(*args, **kwargs)

    return asyncio.run(call())


@pytest.fixture(params=[call_sync, call_async], ids=["Stalled", "AsyncStalled"])
def call(request: pytest.FixtureRequest) -> Call:
    """Calls a method of a client: `call(conninfo, method, ..., options={...of the connection})`."""
    function: Call = request.param
    return function


def test_a_stalled_job_comes_with_its_evidence_and_the_planned_action(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    job = add_stalled_job(
        connection,
        queue_name="emails",
        task_name="send",
        args={"to": ["a", 1, None]},
        lock="lock",
        queueing_lock="queueing lock",
        priority=7,
    )

    (stalled_job,) = call(database, "get_stalled_jobs")

    row = get_job(connection, job)
    assert isinstance(stalled_job, StalledJob)
    assert {name: getattr(stalled_job, name) for name in row} == row
    assert stalled_job.args == {"to": ["a", 1, None]}
    assert stalled_job.last_heartbeat is not None
    assert stalled_job.started_at is not None
    assert stalled_job.stalled_at is not None
    assert stalled_job.stalled_at.tzinfo is not None
    assert (stalled_job.rule_name, stalled_job.reason) == ("default", "heartbeat")
    assert (stalled_job.action, stalled_job.detail) == ("retry", None)


def test_stalled_jobs_are_selected_by_each_argument(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    old = add_stalled_job(connection, queue_name="old", task_name="send", started_ago=500)
    new = add_stalled_job(connection, silent_for=100, queue_name="new", task_name="read", started_ago=50)

    def ids(**arguments: object) -> list[int]:
        return [job.id for job in call(database, "get_stalled_jobs", **arguments)]

    assert ids() == [old]
    assert ids(seconds_since_heartbeat=60) == [old, new]
    assert ids(seconds_since_heartbeat=60.5, queue="new") == [new]
    assert ids(seconds_since_heartbeat=60, task_name="send") == [old]
    assert ids(seconds_since_heartbeat=200) == [old]
    assert ids(nb_seconds=100) == [old]
    assert ids(nb_seconds=10) == [old, new]


def test_an_orphan_that_is_asked_for_by_seconds_has_no_date(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    add_job(connection)

    (orphan,) = call(database, "get_stalled_jobs", seconds_since_heartbeat=1)

    assert (orphan.reason, orphan.worker_id, orphan.stalled_at) == ("orphaned", None, None)


def test_a_dry_run_returns_what_would_be_done_and_changes_nothing(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    job = add_stalled_job(connection)

    (rescue,) = call(database, "retry_stalled_jobs", dry_run=True)

    assert isinstance(rescue, Rescue)
    assert (rescue.id, rescue.job_id, rescue.action, rescue.reason) == (None, job, "retried", "heartbeat")
    assert get_job(connection, job)["status"] == "doing"


def test_the_rescued_jobs_are_selected_by_each_argument(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    def ids(**arguments: object) -> list[int]:
        return [rescue.job_id for rescue in call(database, "retry_stalled_jobs", **arguments)]

    first, second = (add_stalled_job(connection, task_name="send", started_ago=500) for _ in range(2))
    emails = add_stalled_job(connection, queue_name="emails", task_name="send", started_ago=5)
    reading = add_stalled_job(connection, silent_for=100, task_name="read", started_ago=5)

    assert ids(max_jobs=1) == [first]
    assert ids(nb_seconds=100) == [second]
    assert ids(seconds_since_heartbeat=60, task_name="read") == [reading]
    assert ids(queue="default") == []
    assert ids() == [emails]


def test_a_rescue_is_a_row_of_the_ledger(call: Call, database: str, connection: psycopg.Connection[Any]) -> None:
    job = add_stalled_job(connection, attempts=2)

    (rescue,) = call(database, "retry_stalled_jobs", options={"application_name": "an operator"})

    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute("SELECT * FROM procrastinate_stalled.rescues").fetchone()
    assert {field.name: getattr(rescue, field.name) for field in fields(rescue)} == row
    assert (rescue.job_id, rescue.attempts, rescue.rescued_by) == (job, 2, "postgres (an operator)")


def test_a_rescue_belongs_to_the_transaction_of_the_caller(connect: Connect) -> None:
    connection, other = connect(autocommit=False), connect()
    job = add_stalled_job(other)

    assert len(Stalled(connection).retry_stalled_jobs()) == 1
    assert get_job(connection, job)["status"] == "todo"
    assert get_job(other, job)["status"] == "doing"
    connection.rollback()

    assert get_job(other, job)["status"] == "doing"


def test_retry_job_obeys_each_argument(call: Call, database: str, connection: psycopg.Connection[Any]) -> None:
    job = add_stalled_job(connection, silent_for=0)
    at = datetime(2100, 1, 2, 3, 4, 5, tzinfo=UTC)

    rescue = call(database, "retry_job", job, retry_at=at, priority=-3, queue="slow", lock="new lock")

    assert (rescue.job_id, rescue.action, rescue.reason, rescue.scheduled_at) == (job, "retried", "manual", at)
    row = get_job(connection, job)
    assert row["status"] == "todo"
    assert (row["scheduled_at"], row["priority"], row["queue_name"], row["lock"]) == (at, -3, "slow", "new lock")


def test_a_sweep_rescues_by_the_rules(call: Call, database: str, connection: psycopg.Connection[Any]) -> None:
    add_rule(connection, "end them", position=1, task_name="end", action="fail")
    ended = add_stalled_job(connection, task_name="end")
    retried = [add_stalled_job(connection) for _ in range(3)]

    assert call(database, "sweep", batch_size=2) is None

    assert get_job(connection, ended)["status"] == "failed"
    assert {get_job(connection, job)["status"] for job in retried} == {"todo"}


def test_a_sweep_in_a_transaction_is_an_error_and_changes_nothing(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    job = add_stalled_job(connection)

    with pytest.raises(psycopg.errors.InvalidTransactionTermination):
        call(database, "sweep", options={"autocommit": False})

    assert get_job(connection, job)["status"] == "doing"


def test_a_running_job_is_explained_with_all_its_evidence(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    job = add_stalled_job(connection, 100, queue_name="emails", task_name="send", attempts=2, started_ago=200)

    explained = call(database, "explain_job", job, options=LATER)

    assert isinstance(explained, ExplainedJob)
    assert (explained.job_id, explained.queue_name, explained.task_name) == (job, "emails", "send")
    assert (explained.status, explained.attempts) == ("doing", 2)
    (worker,) = rows(connection, "SELECT * FROM procrastinate_workers ORDER BY id DESC LIMIT 1")
    assert (explained.worker_id, explained.last_heartbeat) == (worker["id"], worker["last_heartbeat"])
    assert explained.last_heartbeat is not None
    assert explained.started_at is not None
    assert timedelta(seconds=90) < explained.last_heartbeat - explained.started_at < timedelta(seconds=110)
    assert (explained.seen_at, explained.available_since) == (None, AVAILABLE_SINCE)
    assert (explained.rule_name, explained.verdict, explained.reason) == ("default", "running", "heartbeat")
    assert explained.stalled_at == explained.last_heartbeat + timedelta(minutes=5)
    assert (explained.action, explained.detail) == ("retry", None)
    assert "last heard 1 min 4" in explained.sentence


def test_an_orphan_is_explained_by_when_it_was_seen_first(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    job = add_job(connection)
    add_orphan_note(connection, job, 0, 100)

    explained = call(database, "explain_job", job, options=LATER)

    assert (explained.worker_id, explained.reason) == (None, "orphaned")
    assert explained.stalled_at == explained.seen_at + timedelta(minutes=5)


def test_a_job_that_is_not_there_is_explained_too(call: Call, database: str) -> None:
    explained = call(database, "explain_job", 4242)

    assert (explained.job_id, explained.verdict, explained.status) == (4242, "no such job", None)
    assert "4242" in explained.sentence


def test_the_explained_jobs_are_selected_by_each_argument_and_the_most_urgent_comes_first(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    add_rule(connection, "alone", position=1, task_name="alone", action="ignore")
    never = add_job(connection, task_name="alone", worker_id=add_worker(connection))
    late = add_stalled_job(connection, 10, queue_name="emails", task_name="send")
    soon = add_stalled_job(connection, 200, task_name="send")
    add_job(connection, "todo", task_name="send")

    def explained(**arguments: object) -> list[tuple[int, str]]:
        jobs = call(database, "explain_jobs", **arguments, options=LATER)
        assert all(isinstance(job, ExplainedJob) for job in jobs)
        return [(job.job_id, job.verdict) for job in jobs]

    assert explained() == [(soon, "running"), (late, "running"), (never, "ignored")]
    assert explained(queue="emails") == [(late, "running")]
    assert explained(task_name="send") == [(soon, "running"), (late, "running")]
    assert explained(task_name="send", queue="default") == [(soon, "running")]


def test_the_workers_come_with_the_age_of_their_heartbeats_and_the_number_of_their_jobs(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("DELETE FROM procrastinate_workers")
    alive, silent = add_worker(connection, 5), add_worker(connection, 100)
    for worker in (alive, silent, silent):
        add_job(connection, worker_id=worker)

    first, second = call(database, "workers")

    assert isinstance(first, Worker)
    assert (first.worker_id, first.doing, first.state) == (alive, 1, "alive")
    assert (second.worker_id, second.doing, second.state) == (silent, 2, "silent")
    assert timedelta(seconds=100) <= second.age < timedelta(seconds=130)
    assert second.last_heartbeat.tzinfo is not None


def test_a_job_that_nobody_could_run_is_held(call: Call, database: str, connection: psycopg.Connection[Any]) -> None:
    connection.execute("DELETE FROM procrastinate_workers")
    job = add_stalled_job(connection)

    (stalled_job,) = call(database, "get_stalled_jobs")

    assert (stalled_job.id, stalled_job.action, stalled_job.detail) == (job, "hold", "no living worker")
    assert call(database, "explain_job", job, options=LATER).verdict == "held"


def test_a_pause_is_a_rule_that_holds_the_matching_jobs_until_it_is_resumed(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    paused = add_stalled_job(connection, queue_name="emails", task_name="billing.send")
    other = add_stalled_job(connection)
    before = datetime.now(UTC)

    rule = call(
        database, "pause", timedelta(days=2, hours=3), queue="emails", task_name="billing.%", reason="the network"
    )

    assert isinstance(rule, Rule)
    (row,) = rows(connection, "SELECT * FROM procrastinate_stalled.rules WHERE name = %s", rule.name)
    assert {field.name: getattr(rule, field.name) for field in fields(rule)} == row
    assert (rule.action, rule.queue_name, rule.task_name, rule.note) == ("ignore", "emails", "billing.%", "the network")
    assert rule.expires_at is not None
    assert timedelta(0) <= rule.expires_at - before - timedelta(days=2, hours=3) < timedelta(seconds=30)
    assert [job.id for job in call(database, "get_stalled_jobs")] == [other]
    assert call(database, "explain_job", paused, options=LATER).verdict == "held"

    assert call(database, "resume") is False
    assert call(database, "resume", queue="emails") is False
    assert call(database, "resume", queue="emails", task_name="billing.%") is True
    assert [job.id for job in call(database, "get_stalled_jobs")] == [paused, other]


def test_a_pause_lasts_as_long_as_the_sql_function_says_when_nothing_is_said(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    (by_sql,) = rows(connection, "SELECT expires_at - now() AS duration FROM procrastinate_stalled.pause()")
    before = datetime.now(UTC)

    rule = call(database, "pause")

    assert timedelta(0) <= rule.expires_at - before - by_sql["duration"] < timedelta(seconds=30)


def test_the_runtimes_of_a_task_are_taken_from_its_events(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    for ended_ago, seconds in ((86400, 10), (86400, 20), (86400, 90), (86400 * 30, 500)):
        job = add_job(connection, "succeeded", task_name="send", started_ago=ended_ago + seconds)
        connection.execute("DELETE FROM procrastinate_events WHERE job_id = %s AND type = 'succeeded'", [job])
        add_event(connection, job, "succeeded", ended_ago)

    (week,) = call(database, "task_runtimes")
    (all_time,) = call(database, "task_runtimes", datetime.now(UTC) - timedelta(days=60))
    (by_name,) = call(database, "task_runtimes", since=datetime.now(UTC) - timedelta(days=60))

    def in_seconds(duration: timedelta) -> int:
        return round(duration.total_seconds())

    assert isinstance(week, TaskRuntime)
    assert (week.task_name, week.runs) == ("send", 3)
    assert [in_seconds(duration) for duration in (week.p50, week.longest)] == [20, 90]
    assert week.p50 <= week.p99 <= week.longest
    assert (all_time.runs, in_seconds(all_time.longest)) == (4, 500)
    assert by_name == all_time


def test_pg_cron_runs_the_sweep_from_schedule_to_unschedule(call: Call, cron_database: str) -> None:
    job_id = call(cron_database, "schedule", schedule="*/5 * * * *")
    assert call(cron_database, "schedule", schedule="*/5 * * * *") == job_id

    with psycopg.connect(cron_database) as connection:
        jobs = connection.execute("SELECT jobid, schedule, command, active FROM cron.job").fetchall()
    assert jobs == [(job_id, "*/5 * * * *", "CALL procrastinate_stalled.sweep()", True)]

    assert call(cron_database, "unschedule") is True
    assert call(cron_database, "unschedule") is False


def test_procrastinate_is_found_again_in_the_schema_that_it_was_moved_to(
    call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("ALTER SCHEMA public RENAME TO app")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        call(database, "workers")

    call(database, "set_procrastinate_schema", "app")

    assert len(call(database, "workers")) == 1


def test_the_status_has_a_row_per_check(call: Call, database: str) -> None:
    checks = call(database, "status")

    assert all(isinstance(check, Status) for check in checks)
    assert {"procrastinate", "schedule", "jobs"} <= {check.name for check in checks}
    assert all(check.hint for check in checks if check.level != "ok")


def test_package_and_sql_have_the_same_version(call: Call, database: str) -> None:
    assert call(database, "version") == procrastinate_stalled.__version__


@pytest.mark.parametrize(
    ("method", "arguments", "error"),
    [
        ("get_stalled_jobs", {"nb_seconds": 0}, psycopg.errors.InvalidParameterValue),
        ("get_stalled_jobs", {"seconds_since_heartbeat": float("nan")}, psycopg.errors.InvalidParameterValue),
        ("retry_stalled_jobs", {"max_jobs": 0}, psycopg.errors.InvalidParameterValue),
        ("retry_stalled_jobs", {"max_jobs": 2**40}, psycopg.errors.NumericValueOutOfRange),
        ("retry_job", {"job_id": 42}, psycopg.errors.NoDataFound),
        ("retry_job", {"job_id": 2**70}, psycopg.errors.NumericValueOutOfRange),
        ("explain_job", {"job_id": None}, psycopg.errors.InvalidParameterValue),
        ("explain_job", {"job_id": 2**70}, psycopg.errors.NumericValueOutOfRange),
        ("pause", {"duration": timedelta(0)}, psycopg.errors.InvalidParameterValue),
        ("sweep", {"batch_size": 0}, psycopg.errors.InvalidParameterValue),
        ("set_procrastinate_schema", {"schema": "nowhere"}, psycopg.errors.InvalidSchemaName),
        ("schedule", {}, psycopg.errors.ObjectNotInPrerequisiteState),
    ],
)
def test_errors_of_the_database_pass_through_unchanged(
    method: str, arguments: dict[str, object], error: type[psycopg.Error], call: Call, database: str
) -> None:
    with pytest.raises(error) as raised:
        call(database, method, **arguments)

    assert type(raised.value) is error
    assert raised.value.diag.message_primary


@pytest.mark.parametrize(
    "options",
    [{"row_factory": dict_row}, {"row_factory": namedtuple_row}],
    ids=lambda options: options["row_factory"].__name__,
)
def test_the_rows_do_not_depend_on_the_row_factory_of_the_connection(
    options: dict[str, Any], call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    job = add_stalled_job(connection)

    assert [stalled.id for stalled in call(database, "get_stalled_jobs", options=options)] == [job]
    assert call(database, "version", options=options) == procrastinate_stalled.__version__


def test_the_rows_do_not_depend_on_the_cursor_factory_of_the_connection(database: str) -> None:
    assert call_sync(database, "get_stalled_jobs", options={"cursor_factory": psycopg.RawCursor}, nb_seconds=1) == []
    assert (
        call_async(database, "get_stalled_jobs", options={"cursor_factory": psycopg.AsyncRawCursor}, nb_seconds=1) == []
    )


def test_rows_cannot_be_changed(database: str) -> None:
    status = call_sync(database, "status")[0]

    with pytest.raises(FrozenInstanceError):
        status.level = "ok"
    with pytest.raises((AttributeError, TypeError)):
        status.new = "no such field"


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (StalledJob, "SELECT * FROM procrastinate_stalled.get_stalled_jobs()"),
        (Rescue, "SELECT * FROM procrastinate_stalled.rescues"),
        (ExplainedJob, "SELECT * FROM procrastinate_stalled.explain_job(1)"),
        (ExplainedJob, "SELECT * FROM procrastinate_stalled.explain_jobs()"),
        (Worker, "SELECT * FROM procrastinate_stalled.workers()"),
        (Rule, "SELECT * FROM procrastinate_stalled.rules"),
        (Rule, "SELECT * FROM procrastinate_stalled.pause()"),
        (TaskRuntime, "SELECT * FROM procrastinate_stalled.task_runtimes()"),
        (Status, "SELECT * FROM procrastinate_stalled.status()"),
    ],
)
def test_a_row_has_the_columns_of_the_sql(
    row: type[StalledJob | Rescue | ExplainedJob | Worker | Rule | TaskRuntime | Status],
    columns: str,
    connection: psycopg.Connection[Any],
) -> None:
    description = connection.execute(columns.encode()).description

    assert description is not None
    assert [field.name for field in fields(row)] == [column.name for column in description]


@pytest.mark.parametrize("client", [Stalled, AsyncStalled])
def test_a_client_has_a_method_for_each_sql_function_with_the_same_arguments(
    client: type[Stalled | AsyncStalled], connection: psycopg.Connection[Any]
) -> None:
    functions = connection.execute(
        r"""
        SELECT proname, coalesce(proargnames[1:pronargs], '{}')
            FROM pg_proc
            WHERE pronamespace = 'procrastinate_stalled'::regnamespace AND proname !~ '^_'
        """
    ).fetchall()
    methods = [
        (name, list(inspect.signature(method).parameters)[1:])
        for name, method in inspect.getmembers(client, inspect.isfunction)
        if not name.startswith("_")
    ]

    assert sorted(methods) == sorted(functions)


@pytest.mark.parametrize(
    ("method", "may_retry"), [("grant_monitor", False), ("grant_operator", True)], ids=["monitor", "operator"]
)
def test_a_role_can_be_let_look_or_retry(
    method: str, may_retry: bool, call: Call, database: str, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("CREATE ROLE somebody")
    try:
        assert call(database, method, "somebody") is None

        privilege = "SELECT has_function_privilege('somebody', %s, 'EXECUTE')"
        looks = connection.execute(privilege, ["procrastinate_stalled.status()"]).fetchone()
        retries = connection.execute(
            privilege, ["procrastinate_stalled.retry_job(bigint, timestamptz, integer, text, text)"]
        ).fetchone()
        assert (looks, retries) == ((True,), (may_retry,))
        with pytest.raises(psycopg.errors.UndefinedObject):
            call(database, method, "nobody")
    finally:
        connection.execute("DROP OWNED BY somebody; DROP ROLE somebody")


def modules_after(statement: str) -> set[str]:
    """Which modules a fresh Python has loaded after a statement."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_no_driver() -> None:
    assert {"psycopg", "yoyo", "typer", "rich", "procrastinate"}.isdisjoint(
        modules_after("import procrastinate_stalled")
    )


def test_a_worker_with_the_periodic_sweep_loads_neither_yoyo_nor_the_command_line() -> None:
    modules = modules_after("from procrastinate_stalled import add_periodic_sweep")

    assert "procrastinate_stalled.periodic" in modules
    assert {"yoyo", "typer", "rich"}.isdisjoint(modules)


def test_everything_that_the_package_exports_is_there() -> None:
    exported = {name: getattr(procrastinate_stalled, name) for name in procrastinate_stalled.__all__}

    assert exported["Stalled"] is Stalled
    assert all(callable(value) for value in exported.values())
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        procrastinate_stalled.nonsense  # noqa: B018
