"""The servers, databases and workers that tests ask for."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import procrastinate
import psycopg
import pytest
from procrastinate import App
from psycopg import sql

from procrastinate_stalled import install
from tests.jobs import add_worker, pretend_old_server
from tests.server import Server, install_procrastinate, throwaway_server
from tests.tasks import open_app
from tests.worker import Worker, start_worker

# Whatever ends the tests ends them as Ctrl-C does, so that no server is left behind.
signal.signal(signal.SIGTERM, signal.default_int_handler)
# Who starts them in the background lets them ignore Ctrl-C, and whatever they start would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)

Connect = Callable[..., psycopg.Connection[Any]]
RunWorker = Callable[..., Worker]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server without pg_cron, with the databases `procrastinate` and `ours` to copy from."""
    with throwaway_server() as server:
        _create_templates(server)
        yield server


@pytest.fixture
def empty_database(server: Server) -> Iterator[str]:
    """The address of a database that has nothing in it."""
    with server.database() as conninfo:
        yield conninfo


@pytest.fixture
def procrastinate_database(server: Server) -> Iterator[str]:
    """The address of a database that has Procrastinate."""
    with server.database("procrastinate") as conninfo:
        yield conninfo


@pytest.fixture
def database(server: Server) -> Iterator[str]:
    """The address of a database with Procrastinate, this product and a living worker, on a server that looks old."""
    with server.database("ours") as conninfo:
        with psycopg.connect(conninfo) as connection:
            add_worker(connection)
        yield conninfo


@pytest.fixture
def connect(database: str) -> Iterator[Connect]:
    """Opens connections to `database`: `connect()`, or `connect(autocommit=False, ...)`."""
    with ExitStack() as connections:

        def connect(**options: Any) -> psycopg.Connection[Any]:
            options = {"autocommit": True} | options
            return connections.enter_context(psycopg.connect(database, **options))

        yield connect


@pytest.fixture
def connection(connect: Connect) -> psycopg.Connection[Any]:
    """A connection to `database` in autocommit mode."""
    return connect()


@pytest.fixture(scope="session")
def shared_database(server: Server) -> Iterator[str]:
    """The address of a database like `database`, for tests that commit nothing."""
    with server.database("ours") as conninfo:
        yield conninfo


@pytest.fixture
def transaction(shared_database: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to `shared_database` whose transaction, in which `now()` stands still, is rolled back in the end."""
    with psycopg.connect(shared_database) as connection:
        add_worker(connection)
        yield connection
        connection.rollback()


@pytest.fixture
def app(database: str) -> Iterator[App]:
    """The app of `tests.tasks`, connected to `database`. For another one: `tests.tasks.open_app`."""
    with open_app(database) as app:
        yield app


@pytest.fixture
def run_worker(tmp_path: Path) -> Iterator[RunWorker]:
    """Starts workers: `run_worker(database, update_heartbeat_interval=1)`, see `start_worker`."""
    numbers = count(1)
    with ExitStack() as workers:

        def run_worker(conninfo: str, **options: Any) -> Worker:
            worker = start_worker(conninfo, tmp_path / f"worker-{next(numbers)}.log", **options)
            workers.callback(end, worker)
            return worker

        def end(worker: Worker) -> None:
            worker.kill()
            print(f"\nThe log of worker {worker.id}:\n{worker.log.read_text()}")

        yield run_worker


CRON = "cron"  # the one database in which pg_cron lives


@pytest.fixture(scope="session")
def cron_server() -> Iterator[Server]:
    """A server with pg_cron."""
    with throwaway_server(cron_database=CRON) as server:
        _create_templates(server)
        yield server


@pytest.fixture
def bare_cron_database(cron_server: Server) -> Iterator[str]:
    """The address of the database of pg_cron, with nothing else in it."""
    conninfo = cron_server.conninfo(CRON)
    yield conninfo
    _clean_cron_database(conninfo)


@pytest.fixture
def cron_database(bare_cron_database: str) -> str:
    """The address of the database of pg_cron, with Procrastinate and this product."""
    install_procrastinate(bare_cron_database)
    install(bare_cron_database)
    return bare_cron_database


@pytest.fixture
def other_database_on_cron_server(cron_server: Server) -> Iterator[str]:
    """The address of a database with Procrastinate and this product whose server has pg_cron elsewhere."""
    with cron_server.database("ours") as conninfo:
        yield conninfo
        _clean_cron_database(cron_server.conninfo(CRON))


def _create_templates(server: Server) -> None:
    _check_versions(server)
    install_procrastinate(server.create_database("procrastinate"))
    conninfo = server.create_database("ours", "procrastinate")
    install(conninfo)
    with psycopg.connect(conninfo) as connection:
        pretend_old_server(connection)


def _check_versions(server: Server) -> None:
    """See that the tests test what the cell of the matrix says (`scripts/matrix.py`)."""
    expected = os.environ.get("MATRIX_CELL")
    if expected is not None:
        with psycopg.connect(server.conninfo()) as connection:
            postgresql = connection.info.server_version // 10000
        distribution = metadata.distribution("procrastinate")
        found = f"{postgresql}x{distribution.version}"
        imported, meant = Path(procrastinate.__file__), Path(str(distribution.locate_file("procrastinate/__init__.py")))
        assert (found, imported) == (expected, meant)


def _clean_cron_database(conninfo: str) -> None:
    """Remove all that a test left, without a harm to pg_cron's launcher, which lives here too."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("SELECT cron.unschedule(jobid) FROM cron.job")
        connection.execute(
            """
            SELECT pg_terminate_backend(pid, 5000)
            FROM pg_stat_activity
            WHERE datname = current_database()
                AND backend_type = 'client backend'
                AND pid <> pg_backend_pid()
            """
        )
        connection.execute("TRUNCATE cron.job_run_details")
        schemas = connection.execute(
            "SELECT nspname FROM pg_namespace WHERE nspname !~ '^(pg_.*|information_schema|cron)$'"
        ).fetchall()
        for (schema,) in schemas:
            connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
        connection.execute("CREATE SCHEMA public AUTHORIZATION pg_database_owner")
        connection.execute("GRANT USAGE ON SCHEMA public TO PUBLIC")
