"""Throwaway PostgreSQL servers, for the tests, the demo, the linters and the benchmarks."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import count
from pathlib import Path

import psycopg
from mirakuru.exceptions import AlreadyRunning, ProcessExitedWithError
from port_for import get_port
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.wait import wait_until

PROJECT = Path(__file__).resolve().parent.parent
PG_CTL = PROJECT / "scripts" / "pg_ctl"

# For measurements: it writes to the disk as a server of yours does. PostgreSQLExecutor alone would switch fsync off.
DURABLE = {"fsync": "on", "max_connections": "200", "lc_messages": "C", "timezone": "UTC"}
# For the rest: what a server that lives for minutes can do without. Autovacuum would also bring other plans in the
# middle of a test, in which rows are locked at another moment.
FAST = DURABLE | {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_wal_size": "128MB",
    "autovacuum": "off",
}
# Most of a test's time would go into copying a database on a disk.
MEMORY = Path("/dev/shm")
ENOUGH_MEMORY = 8 << 30  # bytes


@dataclass(frozen=True)
class Server:
    """A running server, to which everybody on this machine may connect as its superuser."""

    port: int
    folder: Path
    """Holds the data, the log and the Unix socket."""
    host: str = "127.0.0.1"
    user: str = "postgres"

    def conninfo(self, dbname: str = "postgres") -> str:
        """The address of a database of this server."""
        return make_conninfo(host=self.host, port=self.port, user=self.user, dbname=dbname)

    def stop(self, mode: str = "fast") -> None:
        """Stop it as `pg_ctl stop -m` does: smart, fast or immediate."""
        self.pg_ctl("stop", "-m", mode)

    def start(self) -> None:
        """Start it after a `stop`, as it ran before."""
        self.pg_ctl("restart")  # which, unlike start, takes the options of the last time

    def promote(self) -> None:
        """Make a primary of this standby."""
        self.pg_ctl("promote")

    def pg_ctl(self, *arguments: str) -> None:
        """Run pg_ctl on it, and wait until that is done."""
        command: list[str | Path] = [PG_CTL, "-w", "-D", self.folder / "data", "-l", self.folder / "log", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    def create_database(self, dbname: str, template: str = "template1") -> str:
        """Create a database as a copy of another one and return its address."""
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        with psycopg.connect(self.conninfo(), autocommit=True) as connection:
            connection.execute(statement.format(sql.Identifier(dbname), sql.Identifier(template)))
        return self.conninfo(dbname)

    def drop_database(self, dbname: str) -> None:
        """Drop a database, whoever is still connected to it."""
        statement = sql.SQL("DROP DATABASE {} WITH (FORCE)")
        with psycopg.connect(self.conninfo(), autocommit=True) as connection:
            connection.execute(statement.format(sql.Identifier(dbname)))

    @contextmanager
    def database(self, template: str = "template1") -> Iterator[str]:
        """Lend a fresh copy of a database; yields its address."""
        dbname = f"database_{next(_numbers)}"
        conninfo = self.create_database(dbname, template)
        try:
            yield conninfo
        finally:
            self.drop_database(dbname)


_numbers = count(1)


def postgresql_program(name: str) -> Path:
    """A program of the PostgreSQL that the servers run."""
    bindir = subprocess.run([PROJECT / "scripts" / "postgresql-bindir"], check=True, stdout=subprocess.PIPE, text=True)
    return Path(bindir.stdout.strip(), name)


@cache
def has_real_pg_cron() -> bool:
    """Whether pg_cron is a library here, whose launcher runs the jobs."""
    pg_config = str(postgresql_program("pg_config"))
    libraries = subprocess.run([pg_config, "--pkglibdir"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return any(Path(libraries).glob("pg_cron.*"))


@contextmanager
def throwaway_server(cron_database: str | None = None, settings: dict[str, str] = FAST) -> Iterator[Server]:
    """Run a server in a temporary folder, and remove all traces of it at the end.

    Parameters
    ----------
    cron_database :
        Create a database of this name, and run pg_cron in it. Never drop it, nor terminate all of its backends:
        pg_cron 1.4 would not run again before the server restarts. Where the server has only `tests/pg_cron_fake`,
        jobs are kept but nothing runs them.
    settings :
        What to set in its configuration.
    """
    in_memory = (
        settings is FAST
        and "TMPDIR" not in os.environ
        and os.access(MEMORY, os.W_OK)
        and shutil.disk_usage(MEMORY).free > ENOUGH_MEMORY
    )
    folder = Path(tempfile.mkdtemp(prefix="procrastinate-stalled-", dir=MEMORY if in_memory else None))
    try:
        if os.geteuid() == 0:  # scripts/pg_ctl runs as this user then
            postgres = pwd.getpwnam("postgres")
            os.chown(folder, postgres.pw_uid, postgres.pw_gid)
        if cron_database is not None:
            settings = settings | {"cron.database_name": cron_database, "cron.host": str(folder)}
            if has_real_pg_cron():
                settings["shared_preload_libraries"] = "pg_cron"
        with _running(folder, settings) as port:
            server = Server(port=port, folder=folder)
            if cron_database is not None:
                _create_cron_database(server, cron_database)
            yield server
    finally:
        shutil.rmtree(folder)


@contextmanager
def streaming_standby(primary: Server, settings: dict[str, str] = FAST) -> Iterator[Server]:
    """Run a standby that follows a server of this machine, in a folder within that one's.

    Parameters
    ----------
    settings :
        What to set in its configuration.
    """
    folder = primary.folder / f"standby-{next(_numbers)}"
    backup = [str(postgresql_program("pg_basebackup")), "-D", f"{folder}/data", "-R", "-c", "fast"]
    user = "postgres" if os.geteuid() == 0 else None
    subprocess.run([*backup, "-d", primary.conninfo()], check=True, cwd="/", user=user, group=user)
    port = get_port(None)
    assert port is not None
    standby = Server(port=port, folder=folder)
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    standby.pg_ctl("start", "-o", f"-p {port} -k {folder} {options}")
    try:
        yield standby
    finally:
        standby.stop("immediate")


@contextmanager
def _running(folder: Path, settings: dict[str, str]) -> Iterator[int]:
    """Run a server on a free port; yields the port. If somebody takes the port in the meantime, try another one."""
    log = folder / "log"
    for _ in range(3):
        port = get_port(None)
        assert port is not None
        executor = PostgreSQLExecutor(
            executable=str(PG_CTL),
            host=Server.host,
            port=port,
            user=Server.user,
            dbname="postgres",
            datadir=str(folder / "data"),
            unixsocketdir=str(folder),
            logfile=str(log),
            startparams="-w",
            postgres_options=" ".join(f"-c {name}={value}" for name, value in settings.items()),
        )
        try:
            try:
                with _uninterrupted():
                    executor.start()
                    assert executor.process is not None
                    executor.process.wait(60)  # pg_ctl ends when connections are accepted
            except (AlreadyRunning, ProcessExitedWithError):
                continue
            yield port
            return
        finally:
            with _uninterrupted():
                if executor.running():
                    executor.stop()
    message = log.read_text() if log.exists() else "It left no log."
    raise RuntimeError(f"PostgreSQL did not start in three attempts.\n{message}")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and its like wait: a server that is half started or half stopped leaves things behind."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _create_cron_database(server: Server, dbname: str) -> None:
    conninfo = server.create_database(dbname)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        # Not in schema public, so that tests may drop that.
        connection.execute("CREATE EXTENSION pg_cron SCHEMA pg_catalog")
        if has_real_pg_cron():
            wait_until(lambda: cron_launcher(connection) is not None, "pg_cron's launcher is there")


def cron_launcher(connection: psycopg.Connection[tuple[int]]) -> int | None:
    """The process id of pg_cron's launcher, or None while it is not connected."""
    row = connection.execute("SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_cron launcher'").fetchone()
    return row[0] if row else None


def install_procrastinate(conninfo: str) -> None:
    """Create Procrastinate's objects, in the first schema of the search_path."""
    schema = resources.files("procrastinate.sql").joinpath("schema.sql").read_bytes()
    with psycopg.connect(conninfo) as connection:
        connection.execute(schema)


def database_name(conninfo: str) -> str:
    """The name of the database in an address."""
    return str(conninfo_to_dict(conninfo)["dbname"])
