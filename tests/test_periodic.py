"""The sweep as a periodic task of Procrastinate, run by real workers."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from procrastinate import App, PsycopgConnector
from procrastinate.connector import BaseConnector
from procrastinate.contrib.aiopg import AiopgConnector
from procrastinate.exceptions import AlreadyEnqueued, TaskAlreadyRegistered
from psycopg.conninfo import make_conninfo

from procrastinate_stalled import add_periodic_sweep, install
from tests.jobs import add_stalled_job, get_job, pretend_old_server, rows, update_job
from tests.server import install_procrastinate
from tests.wait import wait_until

SWEEP = "procrastinate_stalled.sweep"
EACH_SECOND = "* * * * * *"

CONNECTORS: dict[str, Callable[[str], BaseConnector]] = {
    "psycopg": lambda conninfo: PsycopgConnector(conninfo=conninfo),
    "psycopg with one connection": lambda conninfo: PsycopgConnector(conninfo=conninfo, min_size=1, max_size=1),
    "aiopg": lambda conninfo: AiopgConnector(dsn=conninfo),
}


def sweeping_app(conninfo: str, connector: str = "psycopg") -> App:
    app = App(connector=CONNECTORS[connector](conninfo))
    add_periodic_sweep(app, cron=EACH_SECOND)
    return app


async def work_until(app: App, happened: Callable[[], object], what: str) -> None:
    """Run a worker of the queue `default` in this process."""
    worker = asyncio.create_task(
        app.run_worker_async(queues=["default"], install_signal_handlers=False, fetch_job_polling_interval=0.1)
    )
    try:
        await asyncio.to_thread(wait_until, happened, what)
    finally:
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker


def work_until_rescued(app: App, connection: psycopg.Connection[Any], job: int) -> None:
    async def work() -> None:
        async with app.open_async():
            await work_until(app, lambda: rescues_of(connection, job), "a sweep has rescued the job")

    asyncio.run(work())


def lose_job(connection: psycopg.Connection[Any], **columns: Any) -> int:
    """Add a job that is stalled, but whose worker one that starts does not remove yet, as it does after 30 s."""
    connection.execute("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '15 seconds'")
    return add_stalled_job(connection, silent_for=20, **columns)


def rescues_of(connection: psycopg.Connection[Any], job: int) -> list[dict[str, Any]]:
    return rows(connection, "SELECT * FROM procrastinate_stalled.rescues WHERE job_id = %s", job)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_worker_sweeps_through_the_connector_of_its_app(
    connector: str, database: str, connection: psycopg.Connection[Any]
) -> None:
    job = lose_job(connection, queue_name="served by nobody here")

    work_until_rescued(sweeping_app(database, connector), connection, job)

    assert get_job(connection, job)["status"] == "todo"


@pytest.mark.parametrize("autocommit", [True, False])
def test_a_sweep_gives_its_connection_back_as_it_was(
    autocommit: bool, database: str, connection: psycopg.Connection[Any]
) -> None:
    async def configure(pooled: psycopg.AsyncConnection[Any]) -> None:
        await pooled.set_autocommit(autocommit)

    connector = PsycopgConnector(conninfo=database, configure=configure, min_size=1, max_size=1)
    app = App(connector=connector)
    add_periodic_sweep(app, cron=EACH_SECOND)
    job = lose_job(connection, queue_name="served by nobody here")

    async def work() -> bool:
        async with app.open_async():
            await work_until(app, lambda: rescues_of(connection, job), "a sweep has rescued the job")
            async with connector.pool.connection() as pooled:
                return pooled.autocommit

    assert asyncio.run(work()) is autocommit


def test_an_app_that_was_used_synchronously_before_sweeps_too(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    app = sweeping_app(database)
    job = lose_job(connection, queue_name="served by nobody here")
    with app.open():
        app.configure_task("some.task", queue="served by nobody here").defer()

    work_until_rescued(app, connection, job)


def test_procrastinate_may_live_in_any_schema(empty_database: str) -> None:
    conninfo = make_conninfo(empty_database, options="-c search_path=custom")
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA custom")
        install_procrastinate(conninfo)
        install(conninfo)
        pretend_old_server(connection)
        job = lose_job(connection, queue_name="served by nobody here")

        work_until_rescued(sweeping_app(conninfo), connection, job)


def test_a_sweep_that_was_lost_with_its_worker_is_rescued_by_the_next_one(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    app = sweeping_app(database)
    with app.open():
        lost_sweep = app.tasks[SWEEP].defer(timestamp=0)
    silent_worker = get_job(connection, lose_job(connection))["worker_id"]
    update_job(connection, lost_sweep, status="doing", worker_id=silent_worker)

    work_until_rescued(app, connection, lost_sweep)


def test_sweeps_do_not_pile_up_while_no_worker_runs(database: str) -> None:
    app = sweeping_app(database)
    with app.open():
        app.tasks[SWEEP].defer(timestamp=0)

        with pytest.raises(AlreadyEnqueued):
            app.tasks[SWEEP].defer(timestamp=1)


def test_by_default_it_sweeps_every_ten_minutes() -> None:
    app = App(connector=PsycopgConnector())
    add_periodic_sweep(app)

    (periodic,) = app.periodic_registry.periodic_tasks.values()
    assert (periodic.task.name, periodic.cron) == (SWEEP, "*/10 * * * *")


def test_adding_the_sweep_to_an_app_twice_is_an_error() -> None:
    app = sweeping_app("")

    with pytest.raises(TaskAlreadyRegistered):
        add_periodic_sweep(app)
