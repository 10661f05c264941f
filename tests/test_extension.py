"""`CREATE EXTENSION procrastinate_stalled`, after `make install`, and the same script through pg_tle."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from procrastinate_stalled import Stalled, install, psql_script, tle_script, uninstall
from tests.extension_server import make_install, server_with_extension
from tests.jobs import add_stalled_job, add_worker, get_job, pretend_old_server, rows
from tests.server import PROJECT, Server, install_procrastinate, postgresql_program
from tests.test_installation import dump, dump_ours, is_installed, psql, yoyo

Connection = psycopg.Connection[Any]


@pytest.fixture(scope="module")
def extension_server() -> Iterator[Server]:
    """A server that has the files of the extension, with the database `procrastinate` to copy from."""
    with server_with_extension() as server:
        install_procrastinate(server.create_database("procrastinate"))
        yield server


@pytest.fixture
def database(extension_server: Server) -> Iterator[str]:
    """The address of a database with Procrastinate."""
    with extension_server.database("procrastinate") as conninfo:
        yield conninfo


@pytest.fixture
def connection(database: str) -> Iterator[Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


def create_extension(conninfo: str) -> None:
    with psycopg.connect(conninfo) as connection:
        connection.execute("CREATE EXTENSION procrastinate_stalled")


def is_extension(connection: Connection) -> bool:
    return bool(rows(connection, "SELECT FROM pg_extension WHERE extname = 'procrastinate_stalled'"))


def release_members(conninfo: str) -> None:
    """Take all objects out of the extension and drop it, so that pg_dump shows them."""
    query: LiteralString = """
        SELECT object.type, object.identity
            FROM pg_depend
            CROSS JOIN pg_identify_object(classid, objid, 0) AS object
            WHERE refclassid = 'pg_extension'::regclass
                AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'procrastinate_stalled')
                AND deptype = 'e'
            -- Since PostgreSQL 17 a table takes its types along.
            ORDER BY classid = 'pg_class'::regclass DESC, right(object.identity, 2) = '[]'
            LIMIT 1
    """
    with psycopg.connect(conninfo) as connection:
        while members := rows(connection, query):
            kind = members[0]["type"].removeprefix("composite ")
            connection.execute(f"ALTER EXTENSION procrastinate_stalled DROP {kind} {members[0]['identity']}".encode())
        connection.execute("DROP EXTENSION procrastinate_stalled")


def test_the_control_file_says_that_no_superuser_is_needed(connection: Connection) -> None:
    (version,) = rows(
        connection,
        """
        SELECT version, superuser, relocatable, requires, schema
            FROM pg_available_extension_versions
            WHERE name = 'procrastinate_stalled'
        """,
    )
    assert version == {
        "version": "0.1.0",
        "superuser": False,
        "relocatable": False,
        "requires": None,
        "schema": "pg_catalog",
    }


def test_it_makes_the_same_schema_as_the_migrations(extension_server: Server, database: str) -> None:
    create_extension(database)
    release_members(database)

    with extension_server.database("procrastinate") as other:
        install(other)
        assert dump_ours(database) == dump_ours(other)


def test_everything_belongs_to_the_extension_and_goes_with_it(connection: Connection, database: str) -> None:
    before = dump(database)

    create_extension(database)
    assert is_installed(database)
    connection.execute("DROP EXTENSION procrastinate_stalled")

    assert dump(database) == before


def test_an_ordinary_role_that_owns_procrastinate_creates_it_and_sweeps(
    extension_server: Server, connection: Connection
) -> None:
    connection.execute("CREATE ROLE owner LOGIN")
    try:
        with extension_server.database() as empty:
            with psycopg.connect(empty) as superuser:
                superuser.execute(f"GRANT CREATE ON DATABASE {superuser.info.dbname} TO owner".encode())
                superuser.execute("GRANT ALL ON SCHEMA public TO owner")
            address = make_conninfo(empty, user="owner")
            install_procrastinate(address)
            create_extension(address)
            with psycopg.connect(address, autocommit=True) as owner:
                add_worker(owner)
                job = add_stalled_job(owner)
                owner.execute("UPDATE procrastinate_stalled.settings SET outage_grace = '0'")
                pretend_old_server(owner)
                Stalled(owner).sweep()
                assert get_job(owner, job)["status"] == "todo"
                owner.execute("DROP EXTENSION procrastinate_stalled")
    finally:
        connection.execute("DROP ROLE owner")


@pytest.mark.parametrize("way", ["install", "psql", "yoyo"])
def test_another_way_over_an_extension_is_refused_with_what_to_do(
    connection: Connection, database: str, way: str
) -> None:
    create_extension(database)
    connection.execute("UPDATE procrastinate_stalled.rules SET note = 'mine'")
    before = dump(database)

    if way == "install":
        with pytest.raises(psycopg.errors.DuplicateObject) as refusal:
            install(database)
        assert refusal.value.diag.message_primary is not None
        assert "is installed as an extension" in refusal.value.diag.message_primary
        assert "version 0.1.0" in (refusal.value.diag.message_detail or "")
        assert "ALTER EXTENSION procrastinate_stalled UPDATE;" in (refusal.value.diag.message_hint or "")
    else:
        with pytest.raises(subprocess.CalledProcessError) as failure:
            psql(database, psql_script()) if way == "psql" else yoyo("apply", database)
        assert "is installed as an extension" in str(failure.value.stderr)

    assert dump(database, "--exclude-table=*yoyo*") == before
    assert rows(connection, "SELECT name, note FROM procrastinate_stalled.rules") == [
        {"name": "default", "note": "mine"}
    ]


@pytest.mark.parametrize("way", ["install", "psql"])
def test_an_extension_over_another_way_is_refused_with_what_to_do(
    connection: Connection, database: str, way: str
) -> None:
    if way == "install":
        install(database)
    else:
        psql(database, psql_script())
    before = dump(database)

    with pytest.raises(psycopg.errors.DuplicateObject, match="and not as an extension") as refusal:
        create_extension(database)

    assert '"postgres", made by its migrations or its script' in (refusal.value.diag.message_detail or "")
    assert "procrastinate-stalled install" in (refusal.value.diag.message_hint or "")
    assert dump(database) == before
    assert not is_extension(connection)


def test_an_uninstall_removes_the_extension_too(connection: Connection, database: str) -> None:
    before = dump(database)
    create_extension(database)

    assert uninstall(database) is True

    assert not is_extension(connection)
    assert dump(database) == before
    create_extension(database)


def test_the_extension_is_not_dropped_from_under_a_view_of_the_users(connection: Connection, database: str) -> None:
    create_extension(database)
    connection.execute("CREATE VIEW mine AS SELECT job_id FROM procrastinate_stalled.rescues")

    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        connection.execute("DROP EXTENSION procrastinate_stalled")


def test_it_is_refused_where_procrastinate_is_absent(extension_server: Server) -> None:
    with extension_server.database() as empty:
        before = dump(empty)
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="Procrastinate is not installed"):
            create_extension(empty)
        assert dump(empty) == before


def test_of_several_procrastinates_the_setting_chooses_one(connection: Connection, database: str) -> None:
    connection.execute("CREATE SCHEMA other")
    install_procrastinate(make_conninfo(database, options="-c search_path=other"))

    with pytest.raises(psycopg.errors.InvalidSchemaName) as refusal:
        create_extension(database)
    assert "other, public" in (refusal.value.diag.message_detail or "")

    connection.execute("SET procrastinate_stalled.procrastinate_schema = other")
    connection.execute("CREATE EXTENSION procrastinate_stalled")
    (status, *_) = Stalled(connection).status()
    assert status.detail.startswith("schema other,")


def test_a_session_that_looks_like_a_restore_gets_the_same_where_procrastinate_is_there(
    connection: Connection,
) -> None:
    connection.execute("CREATE SCHEMA aaa; CREATE TABLE aaa.procrastinate_jobs (); SET row_security = off")

    with pytest.raises(psycopg.errors.InvalidSchemaName, match="several schemas"):
        connection.execute("CREATE EXTENSION procrastinate_stalled")

    connection.execute("DROP SCHEMA aaa CASCADE")
    connection.execute("CREATE EXTENSION procrastinate_stalled")
    assert rows(connection, "SELECT name FROM procrastinate_stalled.rules") == [{"name": "default"}]


def test_the_script_given_to_psql_itself_does_nothing_and_says_what_to_do(database: str) -> None:
    before = dump(database)
    shared = subprocess.run(
        [postgresql_program("pg_config"), "--sharedir"], check=True, capture_output=True, text=True
    ).stdout.strip()
    script = f"{shared}/extension/procrastinate_stalled--0.1.0.sql"

    done = subprocess.run(
        [postgresql_program("psql"), "--no-psqlrc", f"--file={script}", database],
        check=True,
        capture_output=True,
        text=True,
    )

    assert done.stdout.startswith('Use "CREATE EXTENSION procrastinate_stalled"')
    assert dump(database) == before


def test_make_install_and_uninstall_leave_no_file_behind(extension_server: Server) -> None:
    del extension_server
    pg_config = postgresql_program("pg_config")
    shared = subprocess.run([pg_config, "--sharedir"], check=True, capture_output=True, text=True).stdout.strip()
    extensions = Path(shared, "extension")
    command = ["make", "--no-print-directory", "--directory", str(PROJECT), "uninstall", f"PG_CONFIG={pg_config}"]

    assert sorted(file.name for file in extensions.glob("procrastinate*")) == [
        "procrastinate_stalled--0.1.0.sql",
        "procrastinate_stalled.control",
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert list(extensions.glob("procrastinate*")) == []
    make_install(PROJECT, pg_config)


def test_make_installcheck_is_green(extension_server: Server, tmp_path: Path) -> None:
    options = f"REGRESS_OPTS=--inputdir=tests/installcheck --outputdir={tmp_path}"
    pg_config, python = f"PG_CONFIG={postgresql_program('pg_config')}", f"PYTHON={sys.executable}"
    command = ["make", "--no-print-directory", "--directory", str(PROJECT), "installcheck", options, pg_config, python]

    subprocess.run(command, check=True, env=environment(extension_server))


def environment(server: Server) -> dict[str, str]:
    """The variables by which the programs of PostgreSQL find a server."""
    return os.environ | {"PGHOST": server.host, "PGPORT": str(server.port), "PGUSER": server.user}


# What pg_tle's functions do with their arguments is its own affair; here they keep them for a look. The names, the
# arguments and the results are those of pg_tle 1.5.
PG_TLE = sql.SQL(
    """
    CREATE SCHEMA pgtle;
    CREATE TABLE pgtle.script (name text, source text, version text, ext text);
    CREATE TABLE pgtle.control (name name, default_version text, comment text);
    CREATE FUNCTION pgtle.available_extensions(OUT name name, OUT default_version text, OUT comment text)
        RETURNS SETOF record LANGUAGE sql AS 'SELECT * FROM pgtle.control';
    CREATE FUNCTION pgtle.available_extension_versions(OUT name name, OUT version text)
        RETURNS SETOF record LANGUAGE sql AS 'SELECT name, version FROM pgtle.script';
    CREATE FUNCTION pgtle.install_extension(
        name text, version text, description text, ext text, requires text[] DEFAULT NULL, schema text DEFAULT NULL
    ) RETURNS boolean LANGUAGE sql AS $$
        INSERT INTO pgtle.control VALUES (name, version, description);
        INSERT INTO pgtle.script VALUES (name, NULL, version, ext);
        SELECT true;
    $$;
    CREATE FUNCTION pgtle.install_extension_version_sql(name text, version text, ext text)
        RETURNS boolean LANGUAGE sql AS $$
        INSERT INTO pgtle.script VALUES (name, NULL, version, ext);
        SELECT true;
    $$;
    CREATE FUNCTION pgtle.install_update_path(name text, fromvers text, tovers text, ext text)
        RETURNS boolean LANGUAGE sql AS $$
        INSERT INTO pgtle.script VALUES (name, fromvers, tovers, ext);
        SELECT true;
    $$;
    CREATE FUNCTION pgtle.set_default_version(name text, version text) RETURNS boolean LANGUAGE sql AS $$
        UPDATE pgtle.control SET default_version = set_default_version.version
            WHERE control.name = set_default_version.name;
        SELECT true;
    $$;
    """
)


def test_pg_tle_gets_the_same_script_as_make_install(connection: Connection, database: str) -> None:
    connection.execute(PG_TLE)

    for _ in range(2):
        psql(database, tle_script())

        assert rows(connection, "SELECT name, default_version FROM pgtle.control") == [
            {"name": "procrastinate_stalled", "default_version": "0.1.0"}
        ]
        (script,) = rows(connection, "SELECT source, version, ext FROM pgtle.script")
        assert (script["source"], script["version"]) == (None, "0.1.0")
        installed = PROJECT.joinpath("build/extension/procrastinate_stalled--0.1.0.sql").read_text()
        assert script["ext"].strip() == installed.partition("\n")[2].strip()
