"""pg_dump and pg_restore of a database with this product in it, by migrations and as an extension."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from procrastinate_stalled import Stalled, install
from tests.extension_server import server_with_extension
from tests.jobs import add_job, add_orphan_note, add_rule, add_worker, contents, get_job, pretend_old_server, rows
from tests.server import Server, database_name, install_procrastinate, postgresql_program
from tests.test_extension import create_extension, is_extension, release_members
from tests.test_installation import dump_ours

Connection = psycopg.Connection[Any]

FORMATS = ["plain", "custom", "directory"]
WAYS = ["migrations", "extension"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that has the files of the extension."""
    with server_with_extension() as server:
        yield server


@pytest.fixture
def original(server: Server, way: str) -> Iterator[str]:
    """The address of a database with Procrastinate and this product, and rows in each table."""
    with server.database() as conninfo:
        install_freshly(conninfo, way)
        with psycopg.connect(conninfo, autocommit=True) as connection:
            fill(connection)
        yield conninfo


@pytest.fixture
def copy(server: Server) -> Iterator[str]:
    """The address of an empty database."""
    with server.database() as conninfo:
        yield conninfo


def install_freshly(conninfo: str, way: str) -> None:
    install_procrastinate(conninfo)
    if way == "extension":
        create_extension(conninfo)
    else:
        install(conninfo)


def fill(connection: Connection) -> None:
    connection.execute("DELETE FROM procrastinate_stalled.rules")
    add_rule(connection, "slow", task_name="slow", run_timeout="1 minute")
    add_rule(connection, "rest", position=200, heartbeat_timeout="1 minute", note='It\'s \\ "quoted"')
    connection.execute("UPDATE procrastinate_stalled.settings SET outage_grace = '1 second', keep_sweeps = '1 day'")
    add_job(connection, task_name="slow", started_ago=3600)
    Stalled(connection).sweep()
    add_orphan_note(connection, add_job(connection), 0, 30)
    add_job(connection, task_name="slow", started_ago=3600)


def copy_database(original: str, copy: str, file_format: str, folder: Path, *options: str, **variables: str) -> None:
    """Dump a database and restore it into an empty one; any error fails."""
    dump = str(folder / "dump")
    subprocess.run(
        [postgresql_program("pg_dump"), f"--format={file_format}", f"--file={dump}", *options, original], check=True
    )
    program = str(postgresql_program("psql" if file_format == "plain" else "pg_restore"))
    if file_format == "plain":
        restore = [program, "--no-psqlrc", "--quiet", "--output=/dev/null", "--set=ON_ERROR_STOP=1", "-f", dump, copy]
    else:
        restore = [program, "--exit-on-error", f"--dbname={copy}", dump]
    subprocess.run(restore, check=True, env=os.environ | variables)


def definitions(conninfo: str) -> str:
    """The definition of our schema, whether or not it is an extension; the database is of no use afterwards."""
    with psycopg.connect(conninfo) as connection:
        extension = is_extension(connection)
    if extension:
        release_members(conninfo)
    return dump_ours(conninfo)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("way", WAYS)
def test_a_restored_copy_has_every_row_and_goes_on(
    original: str, copy: str, way: str, file_format: str, tmp_path: Path
) -> None:
    copy_database(original, copy, file_format, tmp_path)

    with psycopg.connect(original, autocommit=True) as there, psycopg.connect(copy, autocommit=True) as here:
        assert contents(here) == contents(there)
        assert is_extension(here) is (way == "extension")
        (stalled,) = Stalled(here).get_stalled_jobs(task_name="slow")
        Stalled(here).sweep()
        assert get_job(here, stalled.id)["status"] == "todo"
        assert rows(here, "SELECT id FROM procrastinate_stalled.rescues ORDER BY id") == [{"id": 1}, {"id": 2}]
        assert rows(here, "SELECT id FROM procrastinate_stalled.sweeps ORDER BY id") == [{"id": 1}, {"id": 2}]
        assert rows(here, "SELECT name FROM procrastinate_stalled.rules ORDER BY 1") == [
            {"name": "rest"},
            {"name": "slow"},
        ]
        assert {status.name for status in Stalled(here).status() if status.level == "error"} == set()
    assert definitions(copy) == definitions(original)


@pytest.mark.parametrize("way", WAYS)
def test_the_workers_of_the_original_are_not_alive_in_the_copy_so_nothing_of_theirs_is_retried(
    original: str, copy: str, tmp_path: Path, way: str
) -> None:
    del way
    with psycopg.connect(original) as connection:
        job = add_job(connection, worker_id=add_worker(connection, silent_for=20))

    copy_database(original, copy, "custom", tmp_path)

    with psycopg.connect(copy, autocommit=True) as connection:
        pretend_old_server(connection)
        connection.execute("UPDATE procrastinate_workers SET last_heartbeat = last_heartbeat - interval '1 day'")
        Stalled(connection).sweep()
        assert get_job(connection, job)["status"] == "doing"
        assert rows(connection, "SELECT held_reason FROM procrastinate_stalled.sweeps ORDER BY id DESC LIMIT 1") == [
            {"held_reason": "no living worker"}
        ]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_the_schema_alone_gets_the_first_rows_from_its_first_sweep(
    original: str, copy: str, way: str, file_format: str, tmp_path: Path
) -> None:
    copy_database(original, copy, file_format, tmp_path, "--schema-only")

    with psycopg.connect(copy, autocommit=True) as connection:
        assert is_extension(connection) is (way == "extension")
        assert Stalled(connection).get_stalled_jobs() == []
        assert {status.name for status in Stalled(connection).status() if status.level == "error"} == {"rules"}
        Stalled(connection).sweep()
        assert {status.name for status in Stalled(connection).status() if status.level == "error"} == set()
        (rule,) = rows(connection, "SELECT name, heartbeat_timeout::text, max_rescues FROM procrastinate_stalled.rules")
        assert rule == {"name": "default", "heartbeat_timeout": "00:05:00", "max_rescues": 3}
        (settings,) = rows(
            connection, "SELECT outage_grace::text, require_live_worker FROM procrastinate_stalled.settings"
        )
        assert settings == {"outage_grace": "00:10:00", "require_live_worker": True}
        connection.execute("UPDATE procrastinate_stalled.settings SET outage_grace = '0'")
        add_worker(connection)
        job = add_job(connection, worker_id=None)
        connection.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '1 second'")
        connection.execute("UPDATE procrastinate_events SET at = at - interval '1 hour'")
        Stalled(connection).sweep()
        assert get_job(connection, job)["status"] == "todo"
    assert definitions(copy) == definitions(original)


def copy_rows(original: str, copy: str, folder: Path) -> list[str]:
    """Dump the rows of a database, restore them into one that is installed, and return the tables that were refused."""
    dump = folder / "dump"
    subprocess.run(
        [postgresql_program("pg_dump"), "--data-only", "--format=custom", f"--file={dump}", original], check=True
    )
    done = subprocess.run(
        [postgresql_program("pg_restore"), "--data-only", "--disable-triggers", f"--dbname={copy}", dump],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return sorted(re.findall(r'COPY failed for table "(\w+)": ERROR:  duplicate key', done.stderr))


@pytest.mark.parametrize("way", WAYS)
def test_the_rows_of_a_dump_alone_are_refused_by_a_fresh_install_whose_own_rule_then_is_in_force(
    original: str, copy: str, tmp_path: Path, way: str
) -> None:
    install_freshly(copy, way)
    with psycopg.connect(original) as connection:
        add_rule(connection, "default", position=300, action="fail")

    refused = copy_rows(original, copy, tmp_path)

    yoyo = ["_yoyo_migration", "_yoyo_version"] if way == "migrations" else []
    assert refused == [*yoyo, "rules", "settings"]
    with psycopg.connect(copy) as connection:
        assert rows(connection, "SELECT name, action FROM procrastinate_stalled.rules") == [
            {"name": "default", "action": "retry"}
        ]


@pytest.mark.parametrize("way", WAYS)
def test_the_rows_of_a_dump_alone_are_restored_where_those_of_the_fresh_install_were_deleted_before(
    original: str, copy: str, tmp_path: Path, way: str
) -> None:
    install_freshly(copy, way)
    with psycopg.connect(copy) as connection:
        connection.execute("TRUNCATE procrastinate_stalled.rules, procrastinate_stalled.settings")
        if way == "migrations":
            connection.execute("TRUNCATE procrastinate_stalled._yoyo_migration, procrastinate_stalled._yoyo_version")

    assert copy_rows(original, copy, tmp_path) == []

    with psycopg.connect(original, autocommit=True) as there, psycopg.connect(copy, autocommit=True) as here:
        assert contents(here) == contents(there)
        Stalled(here).sweep()
        assert rows(here, "SELECT id FROM procrastinate_stalled.rescues ORDER BY id") == [{"id": 1}, {"id": 2}]
    if way == "migrations":
        assert install(copy) == []
    assert definitions(copy) == definitions(original)


@pytest.mark.parametrize("way", WAYS)
def test_a_sweeping_role_that_may_not_write_settings_sweeps_a_copy_without_rows_all_the_same(
    original: str, copy: str, tmp_path: Path, way: str
) -> None:
    del way
    copy_database(original, copy, "custom", tmp_path, "--schema-only")
    with psycopg.connect(copy, autocommit=True) as connection:
        connection.execute("CREATE ROLE sweeper")
        try:
            connection.execute(
                """
                GRANT USAGE ON SCHEMA procrastinate_stalled TO sweeper;
                GRANT EXECUTE ON ALL ROUTINES IN SCHEMA procrastinate_stalled TO sweeper;
                GRANT ALL ON ALL TABLES IN SCHEMA procrastinate_stalled, public TO sweeper;
                GRANT USAGE ON ALL SEQUENCES IN SCHEMA procrastinate_stalled, public TO sweeper;
                REVOKE INSERT ON procrastinate_stalled.settings, procrastinate_stalled.rules FROM sweeper;
                SET ROLE sweeper
                """
            )
            Stalled(connection).sweep()
            assert rows(connection, "SELECT count(*) FROM procrastinate_stalled.sweeps") == [{"count": 1}]
        finally:
            connection.execute("RESET ROLE; DROP OWNED BY sweeper; DROP ROLE sweeper")


@pytest.fixture
def original_in_another_schema(server: Server) -> Iterator[str]:
    """The address of a database whose Procrastinate is in schema `app`, with this product as an extension."""
    with server.database() as conninfo:
        with psycopg.connect(conninfo) as connection:
            connection.execute("CREATE SCHEMA app")
        install_procrastinate(make_conninfo(conninfo, options="-c search_path=app"))
        create_extension(conninfo)
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("SET search_path = app")
            fill(connection)
        yield conninfo


def test_an_extension_is_restored_for_procrastinate_in_another_schema(
    original_in_another_schema: str, copy: str, tmp_path: Path
) -> None:
    options = {"PGOPTIONS": "-c procrastinate_stalled.procrastinate_schema=app"}
    copy_database(original_in_another_schema, copy, "custom", tmp_path, **options)

    with psycopg.connect(copy, autocommit=True) as connection:
        assert len(Stalled(connection).get_stalled_jobs(task_name="slow")) == 1
    assert definitions(copy) == definitions(original_in_another_schema)


def test_an_extension_that_was_restored_for_the_wrong_schema_says_so_and_is_mended(
    original_in_another_schema: str, copy: str, tmp_path: Path
) -> None:
    copy_database(original_in_another_schema, copy, "custom", tmp_path)

    with psycopg.connect(copy, autocommit=True) as connection:
        (status, *_) = Stalled(connection).status()
        assert (status.name, status.level) == ("procrastinate", "error")
        assert status.detail.startswith("there is no Procrastinate 3.1 or later in schema public")
        assert "SELECT procrastinate_stalled.set_procrastinate_schema('app');" in (status.hint or "")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            Stalled(connection).sweep()

        connection.execute("SELECT procrastinate_stalled.set_procrastinate_schema('app')")

        (status, *_) = Stalled(connection).status()
        assert (status.name, status.level) == ("procrastinate", "ok")
        assert len(Stalled(connection).get_stalled_jobs(task_name="slow")) == 1
    assert definitions(copy) == definitions(original_in_another_schema)


@pytest.mark.parametrize("way", WAYS)
def test_a_database_that_is_copied_by_the_server_goes_on(server: Server, original: str, way: str) -> None:
    del way
    with server.database(database_name(original)) as copy:
        with psycopg.connect(copy, autocommit=True) as here, psycopg.connect(original, autocommit=True) as there:
            assert contents(here) == contents(there)
            Stalled(here).sweep()
            assert len(rows(here, "SELECT FROM procrastinate_stalled.rescues")) == 2
        assert definitions(copy) == definitions(original)
