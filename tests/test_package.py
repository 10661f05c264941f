"""The Python package: both clients against real databases, and what importing it costs."""

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row, namedtuple_row

import procrastinate_stalled
from procrastinate_stalled import AsyncStalled, Rescue, Stalled, StalledJob, Status
from tests.conftest import Connect
from tests.jobs import add_job, add_rule, add_stalled_job, get_job

Call = Callable[..., Any]


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


def test_pg_cron_runs_the_sweep_from_schedule_to_unschedule(call: Call, cron_database: str) -> None:
    job_id = call(cron_database, "schedule", schedule="*/5 * * * *")
    assert call(cron_database, "schedule", schedule="*/5 * * * *") == job_id

    with psycopg.connect(cron_database) as connection:
        jobs = connection.execute("SELECT jobid, schedule, command, active FROM cron.job").fetchall()
    assert jobs == [(job_id, "*/5 * * * *", "CALL procrastinate_stalled.sweep()", True)]

    assert call(cron_database, "unschedule") is True
    assert call(cron_database, "unschedule") is False


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
        ("sweep", {"batch_size": 0}, psycopg.errors.InvalidParameterValue),
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
        (Status, "SELECT * FROM procrastinate_stalled.status()"),
    ],
)
def test_a_row_has_the_columns_of_the_sql(
    row: type[StalledJob | Rescue | Status], columns: str, connection: psycopg.Connection[Any]
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
