"""Installing and uninstalling, by every way there is, on databases of every kind."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, LiteralString

import pglast
import psycopg
import pytest
from port_for import get_port
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from yoyo.migrations import read_sql_migration  # type: ignore[import-untyped]

from procrastinate_stalled import Stalled, install, psql_script, uninstall
from procrastinate_stalled.installation import migration_sql
from tests.jobs import add_stalled_job, add_worker, pretend_old_server, rows
from tests.server import PROJECT, Server, install_procrastinate
from tests.wait import wait_until

MIGRATIONS = sorted(PROJECT.glob("sql/migrations/*.sql"))
FIRST = "procrastinate_stalled_0001_0.1.0"


def postgresql_program(name: str) -> str:
    bindir = subprocess.run([PROJECT / "scripts" / "postgresql-bindir"], capture_output=True, text=True, check=True)
    return str(Path(bindir.stdout.strip(), name))


def dump(conninfo: str, *options: str) -> str:
    """The definition of the database, or of a part of it."""
    command = [postgresql_program("pg_dump"), "--schema-only", *options, conninfo]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Newer versions of pg_dump write a random word into these lines.
    return re.sub(r"^\\(un)?restrict .*$", "", text, flags=re.MULTILINE)


def dump_ours(conninfo: str) -> str:
    """The definition of our schema, without what yoyo keeps there."""
    return dump(conninfo, "--schema=procrastinate_stalled", "--exclude-table=procrastinate_stalled._yoyo*")


def yoyo(command: str, conninfo: str, source: str = str(PROJECT / "procrastinate_stalled" / "migrations")) -> None:
    address = conninfo_to_dict(conninfo)
    url = "postgresql+psycopg://{user}@{host}:{port}/{dbname}".format(**address)
    run = [sys.executable, "-m", "yoyo", command, "--batch", "--no-config-file", "--database", url, source]
    subprocess.run(run, cwd=PROJECT, check=True, capture_output=True)


def psql(conninfo: str, script: str) -> None:
    command = [postgresql_program("psql"), "--no-psqlrc", "--quiet", conninfo]
    subprocess.run(command, input=script, text=True, capture_output=True, check=True)


def schemas(conninfo: str) -> set[str]:
    with psycopg.connect(conninfo) as connection:
        return {name for (name,) in connection.execute("SELECT nspname FROM pg_namespace")}


def is_installed(conninfo: str) -> bool:
    return "procrastinate_stalled" in schemas(conninfo)


def yoyo_tables(conninfo: str) -> set[str]:
    with psycopg.connect(conninfo) as connection:
        rows = connection.execute(
            """
            SELECT schemaname || '.' || tablename
                FROM pg_tables
                WHERE tablename LIKE '%yoyo%'
            """
        )
        return {name for (name,) in rows}


_roles = count(1)


@pytest.fixture
def owner(server: Server, empty_database: str) -> Iterator[str]:
    """The address of a database with Procrastinate for a role that owns its tables and nothing else."""
    yield from _own(server.conninfo(), empty_database)


def _own(superuser: str, database: str) -> Iterator[str]:
    role = f"owner_{next(_roles)}"
    dbname = conninfo_to_dict(database)["dbname"]
    with psycopg.connect(superuser, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN")
    try:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(f"GRANT ALL ON SCHEMA public TO {role}")
            connection.execute(f"GRANT CREATE ON DATABASE {dbname} TO {role}")
        conninfo = make_conninfo(database, user=role)
        install_procrastinate(conninfo)
        yield conninfo
    finally:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {role} CASCADE")
            connection.execute(f"DROP ROLE {role}")


def test_an_install_says_what_it_applied(procrastinate_database: str) -> None:
    assert install(procrastinate_database) == [FIRST]
    assert is_installed(procrastinate_database)


def test_installing_again_changes_nothing(procrastinate_database: str) -> None:
    install(procrastinate_database)
    before = dump(procrastinate_database)

    assert install(procrastinate_database) == []

    assert dump(procrastinate_database) == before


def test_install_and_uninstall_leave_the_database_byte_for_byte_as_it_was(procrastinate_database: str) -> None:
    before = dump(procrastinate_database)

    for _ in range(2):
        assert install(procrastinate_database) == [FIRST]
        assert dump(procrastinate_database) != before
        assert uninstall(procrastinate_database) is True
        assert dump(procrastinate_database) == before


def test_uninstalling_again_changes_nothing(procrastinate_database: str) -> None:
    before = dump(procrastinate_database)

    assert uninstall(procrastinate_database) is False

    assert dump(procrastinate_database) == before


def test_the_record_of_yoyo_lives_in_our_schema_only(procrastinate_database: str) -> None:
    install(procrastinate_database)

    assert yoyo_tables(procrastinate_database) == {
        "procrastinate_stalled._yoyo_log",
        "procrastinate_stalled._yoyo_migration",
        "procrastinate_stalled._yoyo_version",
    }


@pytest.mark.parametrize(
    "source", [str(PROJECT / "procrastinate_stalled" / "migrations"), "package:procrastinate_stalled:migrations"]
)
def test_the_plain_yoyo_command_makes_the_same_schema_and_takes_it_back(
    source: str, server: Server, procrastinate_database: str
) -> None:
    install(procrastinate_database)

    with server.database("procrastinate") as other:
        yoyo("apply", other, source)
        assert dump_ours(other) == dump_ours(procrastinate_database)
        yoyo("rollback", other, source)
        assert not is_installed(other)


def test_the_script_for_psql_makes_the_same_schema(server: Server, procrastinate_database: str) -> None:
    install(procrastinate_database)

    with server.database("procrastinate") as other:
        psql(other, psql_script())
        assert dump_ours(other) == dump_ours(procrastinate_database)


def test_the_script_for_psql_leaves_nothing_when_it_fails(empty_database: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        psql(empty_database, psql_script())

    assert "Procrastinate is not installed" in error.value.stderr
    assert not is_installed(empty_database)


@pytest.mark.parametrize("installed", [False, True])
def test_the_script_without_a_transaction_changes_nothing(procrastinate_database: str, installed: bool) -> None:
    if installed:
        install(procrastinate_database)
    before = dump(procrastinate_database)
    script = "\\unset ON_ERROR_STOP\n" + migration_sql()

    command = [postgresql_program("psql"), "--no-psqlrc", "--quiet", procrastinate_database]
    done = subprocess.run(command, input=script, text=True, capture_output=True, check=False)

    assert "ERROR:  this script must run in one transaction" in done.stderr
    assert dump(procrastinate_database) == before


def test_the_script_leaves_the_session_as_it_was(procrastinate_database: str) -> None:
    with psycopg.connect(procrastinate_database) as connection:
        before = rows(connection, SESSION)

        connection.execute(migration_sql().encode())
        connection.commit()

        assert rows(connection, SESSION) == before


SESSION: LiteralString = """
SELECT name, setting FROM pg_settings WHERE name !~ '^(procrastinate_stalled|plpgsql)[.]' ORDER BY name
"""


def test_only_the_owner_brings_an_installation_up_to_date(owner: str) -> None:
    install(owner)
    before = dump(owner)
    superuser = make_conninfo(owner, user="postgres")

    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="belongs to role") as refusal:
        install(superuser)

    assert "Connect as that role" in (refusal.value.diag.message_hint or "")
    assert dump(owner) == before
    assert install(owner) == []
    assert uninstall(superuser) is True


def test_an_installation_that_is_repeated_stays_with_its_procrastinate(empty_database: str) -> None:
    with psycopg.connect(empty_database) as connection:
        connection.execute("CREATE SCHEMA one; CREATE SCHEMA two; DROP SCHEMA public")
    one, two = (make_conninfo(empty_database, options=f"-c search_path={schema}") for schema in ("one", "two"))
    install_procrastinate(one)
    install_procrastinate(two)
    psql(one, psql_script())
    before = dump_ours(empty_database)

    for address in (two, empty_database):
        psql(address, psql_script())
        install(address)
        assert dump_ours(empty_database) == before


def test_a_role_of_any_name_installs_for_the_one_of_several_procrastinates_that_is_its_own(
    empty_database: str,
) -> None:
    dbname = conninfo_to_dict(empty_database)["dbname"]
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(
            f"""
            CREATE ROLE "My.App" LOGIN;
            GRANT CREATE ON DATABASE {dbname} TO "My.App";
            CREATE SCHEMA mine AUTHORIZATION "My.App";
            """.encode()
        )
        try:
            install_procrastinate(empty_database)
            mine = make_conninfo(empty_database, user="My.App", options="-c search_path=mine")
            install_procrastinate(mine)

            assert install(mine) == [FIRST]

            with psycopg.connect(mine) as role:
                assert rows(role, "SELECT detail FROM procrastinate_stalled.status() LIMIT 1")[0]["detail"].startswith(
                    "schema mine,"
                )
        finally:
            connection.execute('DROP OWNED BY "My.App" CASCADE; DROP ROLE "My.App"')


def test_an_upgrade_does_not_wait_for_those_who_write_records(procrastinate_database: str) -> None:
    install(procrastinate_database)
    with psycopg.connect(procrastinate_database) as writer, psycopg.connect(procrastinate_database) as connection:
        writer.execute("DELETE FROM procrastinate_stalled.rescues")
        writer.execute("DELETE FROM procrastinate_stalled.sweeps")
        connection.execute("SET deadlock_timeout = '10s'")

        connection.execute(migration_sql().replace("'10s'", "'100ms'").encode())


def test_an_install_takes_over_a_schema_that_psql_made_and_keeps_its_rows(procrastinate_database: str) -> None:
    psql(procrastinate_database, psql_script())
    with psycopg.connect(procrastinate_database, autocommit=True) as connection:
        connection.execute("DELETE FROM procrastinate_stalled.rules")
        connection.execute("INSERT INTO procrastinate_stalled.rules (name, queue_name) VALUES ('mine', 'emails')")
        before = dump_ours(procrastinate_database)

        assert install(procrastinate_database) == [FIRST]

        rules = connection.execute("SELECT name FROM procrastinate_stalled.rules").fetchall()
    assert rules == [("mine",)]
    assert dump_ours(procrastinate_database) == before
    assert install(procrastinate_database) == []


def test_an_uninstall_removes_what_psql_installed(procrastinate_database: str) -> None:
    before = dump(procrastinate_database)
    psql(procrastinate_database, psql_script())

    assert uninstall(procrastinate_database) is True

    assert dump(procrastinate_database) == before


def test_an_uninstall_drops_the_views_of_others_on_what_is_ours(procrastinate_database: str) -> None:
    install(procrastinate_database)
    with psycopg.connect(procrastinate_database) as connection:
        connection.execute(
            """
            CREATE VIEW on_a_table AS SELECT job_id FROM procrastinate_stalled.rescues;
            CREATE MATERIALIZED VIEW on_a_function AS SELECT name FROM procrastinate_stalled.status();
            CREATE VIEW on_a_view AS SELECT * FROM on_a_table;
            """
        )

    uninstall(procrastinate_database)

    with psycopg.connect(procrastinate_database) as connection:
        assert connection.execute("SELECT relname FROM pg_class WHERE relname ~ '^on_a_'").fetchall() == []


def test_an_uninstall_removes_what_the_yoyo_command_installed_and_nothing_of_the_applications(
    procrastinate_database: str, tmp_path: Path
) -> None:
    (tmp_path / "application_0001.sql").write_text("CREATE TABLE of_the_application ()")
    yoyo("apply", procrastinate_database, str(tmp_path))
    before = dump(procrastinate_database)
    yoyo("apply", procrastinate_database)

    assert uninstall(procrastinate_database) is True

    assert dump(procrastinate_database) == before
    with psycopg.connect(procrastinate_database) as connection:
        recorded = connection.execute("SELECT migration_id FROM _yoyo_migration").fetchall()
    assert recorded == [("application_0001",)]
    yoyo("apply", procrastinate_database)
    assert is_installed(procrastinate_database)


def test_an_uninstall_makes_the_yoyo_command_forget_a_schema_that_was_dropped_by_hand(
    procrastinate_database: str,
) -> None:
    yoyo("apply", procrastinate_database)
    with psycopg.connect(procrastinate_database) as connection:
        connection.execute("DROP SCHEMA procrastinate_stalled CASCADE")

    assert uninstall(procrastinate_database) is True
    assert uninstall(procrastinate_database) is False

    yoyo("apply", procrastinate_database)
    assert is_installed(procrastinate_database)


@pytest.mark.parametrize("path", MIGRATIONS, ids=lambda path: path.name)
def test_yoyo_splits_a_migration_into_the_statements_that_postgresql_sees(path: Path) -> None:
    _directives, _comment, statements = read_sql_migration(str(path))

    assert len(statements) == len(pglast.split(path.read_text()))


@pytest.mark.parametrize("path", MIGRATIONS, ids=lambda path: path.name)
def test_a_migration_is_plain_ascii_so_that_it_installs_into_a_database_of_any_encoding(path: Path) -> None:
    assert path.read_text().isascii()


def test_an_install_works_in_a_database_that_is_not_utf8(server: Server) -> None:
    dbname = "latin1"
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {dbname} ENCODING latin1 LOCALE 'C' TEMPLATE template0")
    try:
        install_procrastinate(server.conninfo(dbname))
        assert install(server.conninfo(dbname)) == [FIRST]
    finally:
        server.drop_database(dbname)


def test_procrastinate_may_live_in_any_schema(empty_database: str) -> None:
    with psycopg.connect(empty_database) as connection:
        connection.execute('CREATE SCHEMA "of the App"')
    with_path = make_conninfo(empty_database, options='-c search_path="of\\ the\\ App"')
    install_procrastinate(with_path)

    assert install(with_path) == [FIRST]

    with (
        psycopg.connect(with_path, autocommit=True) as application,
        psycopg.connect(empty_database, autocommit=True) as ours,
    ):
        pretend_old_server(ours)
        add_worker(application)
        job = add_stalled_job(application)
        Stalled(ours).sweep()
        assert application.execute("SELECT id, status FROM procrastinate_jobs").fetchall() == [(job, "todo")]
    assert uninstall(empty_database) is True


def test_of_several_procrastinates_the_search_path_chooses_one(empty_database: str) -> None:
    with psycopg.connect(empty_database) as connection:
        connection.execute("CREATE SCHEMA one; CREATE SCHEMA two; DROP SCHEMA public")
    for schema in ("one", "two"):
        install_procrastinate(make_conninfo(empty_database, options=f"-c search_path={schema}"))

    with pytest.raises(psycopg.errors.InvalidSchemaName) as error:
        install(empty_database)
    assert error.value.diag.message_detail is not None
    assert "one, two" in error.value.diag.message_detail
    assert error.value.diag.message_hint
    assert not is_installed(empty_database)

    assert install(make_conninfo(empty_database, options="-c search_path=two")) == [FIRST]
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("SET search_path = two")
        pretend_old_server(connection)
        add_worker(connection)
        job = add_stalled_job(connection)
        Stalled(connection).sweep()
        assert connection.execute("SELECT id, status FROM procrastinate_jobs").fetchall() == [(job, "todo")]


def test_the_owner_of_procrastinates_tables_needs_no_superuser(owner: str) -> None:
    before = dump(owner)

    assert install(owner) == [FIRST]
    with psycopg.connect(owner, autocommit=True) as connection:
        pretend_old_server(connection)
        add_worker(connection)
        job = add_stalled_job(connection)
        Stalled(connection).sweep()
        assert connection.execute("SELECT id, status FROM procrastinate_jobs").fetchall() == [(job, "todo")]

    assert install(owner) == []
    assert uninstall(owner) is True
    assert dump(owner) == before


def expect_refusal(conninfo: str, error: type[psycopg.Error], message: str) -> None:
    """See an install refused in three parts, and nothing created."""
    before = dump(conninfo) if "user=postgres" in conninfo else None

    with pytest.raises(error, match=message) as refusal:
        install(conninfo)

    assert refusal.value.diag.message_detail
    assert refusal.value.diag.message_hint
    assert not is_installed(conninfo)
    if before is not None:
        assert dump(conninfo) == before


def test_an_install_is_refused_where_procrastinate_is_absent(empty_database: str) -> None:
    expect_refusal(
        empty_database, psycopg.errors.ObjectNotInPrerequisiteState, "Procrastinate is not installed in database"
    )


def test_an_install_is_refused_where_procrastinate_has_no_heartbeats_yet(procrastinate_database: str) -> None:
    with psycopg.connect(procrastinate_database) as connection:
        connection.execute("DROP TABLE procrastinate_workers CASCADE")

    expect_refusal(procrastinate_database, psycopg.errors.ObjectNotInPrerequisiteState, "too old")


def test_an_install_is_refused_to_a_role_that_may_not_create_a_schema(owner: str) -> None:
    address = conninfo_to_dict(owner)
    with psycopg.connect(make_conninfo(owner, user="postgres")) as connection:
        connection.execute(f"REVOKE CREATE ON DATABASE {address['dbname']} FROM {address['user']}")

    expect_refusal(owner, psycopg.errors.InsufficientPrivilege, "may not create a schema")


def test_an_install_is_refused_to_a_role_that_may_not_change_procrastinates_jobs(owner: str) -> None:
    address = conninfo_to_dict(owner)
    with psycopg.connect(owner) as connection:
        connection.execute(f"REVOKE UPDATE ON procrastinate_jobs FROM {address['user']}")

    expect_refusal(owner, psycopg.errors.InsufficientPrivilege, "may not read and update")


def test_an_install_at_a_wrong_address_is_an_error_of_psycopg(empty_database: str) -> None:
    with pytest.raises(psycopg.OperationalError, match='database "nowhere" does not exist'):
        install(make_conninfo(empty_database, dbname="nowhere"))


# An event trigger stops the install in its middle: at its first statement, at a late one, and after all of ours, when
# yoyo makes its tables.
STEPS = ["CREATE SCHEMA", "CREATE PROCEDURE", "procrastinate_stalled._yoyo_log"]


def stop_at(connection: psycopg.Connection[Any], step: str, action: str) -> None:
    connection.execute(
        f"""
        CREATE FUNCTION public.stop() RETURNS event_trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF EXISTS (
                SELECT FROM pg_event_trigger_ddl_commands()
                WHERE '{step}' IN (command_tag, object_identity)
            ) THEN
                {action};
            END IF;
        END;
        $$;
        CREATE EVENT TRIGGER stop ON ddl_command_end EXECUTE FUNCTION public.stop();
        """
    )


def go_on(connection: psycopg.Connection[Any]) -> None:
    connection.execute("DROP EVENT TRIGGER stop; DROP FUNCTION public.stop()")


@pytest.mark.parametrize("step", STEPS)
def test_an_install_that_fails_leaves_nothing(step: str, procrastinate_database: str) -> None:
    before = dump(procrastinate_database)
    with psycopg.connect(procrastinate_database, autocommit=True) as connection:
        stop_at(connection, step, "RAISE EXCEPTION 'stopped'")

        with pytest.raises(psycopg.errors.RaiseException, match="stopped"):
            install(procrastinate_database)

        go_on(connection)
    assert dump(procrastinate_database) == before
    assert install(procrastinate_database) == [FIRST]


@pytest.mark.parametrize("step", STEPS)
def test_an_install_that_is_killed_leaves_nothing_and_can_be_run_again(step: str, procrastinate_database: str) -> None:
    before = dump(procrastinate_database)
    with psycopg.connect(procrastinate_database, autocommit=True) as connection:
        stop_at(connection, step, "PERFORM pg_advisory_xact_lock(42)")
        connection.execute("SELECT pg_advisory_lock(42)")
        process = subprocess.Popen(
            [sys.executable, "-m", "procrastinate_stalled", "--database-url", procrastinate_database, "install"],
            cwd=PROJECT,
        )
        wait_until(lambda: waiting(connection, "advisory") == 1, "the install stands still in its middle")
        process.kill()
        process.wait()
        connection.execute("SELECT pg_advisory_unlock(42)")
        wait_until(lambda: others(connection) == 0, "the server notices that the install is gone")
        go_on(connection)

    assert dump(procrastinate_database) == before
    assert install(procrastinate_database) == [FIRST]


def waiting(connection: psycopg.Connection[Any], event: str) -> int:
    """How many sessions of this database wait for a lock of a kind."""
    row = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = %s", [event]
    ).fetchone()
    assert row is not None
    return int(row[0])


def others(connection: psycopg.Connection[Any]) -> int:
    """How many other clients this database has."""
    row = connection.execute(
        """
        SELECT count(*)
            FROM pg_stat_activity
            WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
        """
    ).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("isolation", ["serializable", "repeatable\\ read", "read\\ committed"])
def test_of_two_installs_at_once_one_installs_and_the_other_finds_it_done(
    isolation: str, procrastinate_database: str
) -> None:
    conninfo = make_conninfo(procrastinate_database, options=f"-c default_transaction_isolation={isolation}")
    with psycopg.connect(procrastinate_database, autocommit=True) as connection, ThreadPoolExecutor() as threads:
        stop_at(connection, "CREATE SCHEMA", "PERFORM pg_advisory_xact_lock(42)")
        connection.execute("SELECT pg_advisory_lock(42)")
        installs = [threads.submit(install, conninfo) for _ in range(2)]
        wait_until(lambda: waiting(connection, "advisory") == 2, "one install waits for us, the other for it")
        connection.execute("SELECT pg_advisory_unlock(42)")
        results = [result.result() for result in installs]

    assert sorted(results) == [[], [FIRST]]


def test_an_install_that_waits_too_long_for_another_one_says_so(procrastinate_database: str) -> None:
    with psycopg.connect(procrastinate_database) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('procrastinate_stalled', 0))")

        expect_refusal(procrastinate_database, psycopg.errors.LockNotAvailable, "another install or uninstall")


def test_an_uninstall_removes_the_job_of_pg_cron(cron_database: str) -> None:
    with psycopg.connect(cron_database, autocommit=True) as connection:
        Stalled(connection).schedule()

        assert uninstall(cron_database) is True

        assert connection.execute("SELECT count(*) FROM cron.job").fetchone() == (0,)


def test_an_uninstall_removes_the_job_of_pg_cron_also_when_the_schema_is_gone(cron_database: str) -> None:
    with psycopg.connect(cron_database, autocommit=True) as connection:
        Stalled(connection).schedule()
        connection.execute("SELECT cron.schedule('of the application', '* * * * *', 'SELECT 1')")
        connection.execute("DROP SCHEMA procrastinate_stalled CASCADE")

        assert uninstall(cron_database) is True

        assert connection.execute("SELECT jobname FROM cron.job").fetchall() == [("of the application",)]
    assert uninstall(cron_database) is False


def test_an_uninstall_warns_of_jobs_that_pg_cron_does_not_show(
    cron_server: Server, cron_database: str, caplog: pytest.LogCaptureFixture
) -> None:
    uninstall(cron_database)
    with psycopg.connect(cron_database) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    for owner in _own(cron_server.conninfo(), cron_database):
        with psycopg.connect(cron_database, autocommit=True) as connection:
            connection.execute("CREATE ROLE sweeper")
            connection.execute(f"GRANT USAGE ON SCHEMA cron TO {conninfo_to_dict(owner)['user']}".encode())
            try:
                install(owner)
                connection.execute("GRANT EXECUTE ON PROCEDURE procrastinate_stalled.sweep TO sweeper")

                assert uninstall(owner) is True

                (warning,) = caplog.messages
                assert "of another role that may sweep (sweeper)" in warning
                caplog.clear()
                install(owner)
                uninstall(owner)
                assert caplog.messages == []
            finally:
                connection.execute("DROP OWNED BY sweeper; DROP ROLE sweeper")


def test_an_uninstall_by_an_ordinary_role_removes_its_job_of_pg_cron(cron_server: Server, cron_database: str) -> None:
    uninstall(cron_database)
    with psycopg.connect(cron_database) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    for owner in _own(cron_server.conninfo(), cron_database):
        role = conninfo_to_dict(owner)["user"]
        with psycopg.connect(cron_database, autocommit=True) as connection:
            connection.execute(f"GRANT USAGE ON SCHEMA cron TO {role}")
            install(owner)
            with psycopg.connect(owner, autocommit=True) as ordinary:
                Stalled(ordinary).schedule()
            assert connection.execute("SELECT username FROM cron.job").fetchall() == [(role,)]

            assert uninstall(owner) is True

            assert connection.execute("SELECT username FROM cron.job").fetchall() == []


def test_an_uninstall_warns_of_the_job_that_it_cannot_remove(
    other_database_on_cron_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert uninstall(other_database_on_cron_server) is True

    (warning,) = caplog.messages
    assert "was not removed" in warning
    assert "SELECT cron.unschedule(jobid) FROM cron.job WHERE database = " in warning
    caplog.clear()
    assert uninstall(other_database_on_cron_server) is False
    assert caplog.messages == []


@pytest.fixture
def pgbouncer(server: Server) -> Iterator[Server]:
    """PgBouncer in transaction mode in front of the server."""
    program = shutil.which("pgbouncer", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin")
    assert program is not None, "There is no pgbouncer on this machine. Run: make prepare"
    port = get_port(None)
    assert port is not None
    pooled = replace(server, port=port)
    configuration = server.folder / "pgbouncer.ini"
    configuration.write_text(
        f"""
        [databases]
        * = host={server.host} port={server.port} user={server.user}
        [pgbouncer]
        listen_addr = {server.host}
        listen_port = {port}
        unix_socket_dir =
        auth_type = any
        pool_mode = transaction
        """
    )
    # Like PostgreSQL it refuses to run as root.
    user = ["-u", "postgres"] if os.geteuid() == 0 else []

    def accepts_connections() -> bool:
        try:
            psycopg.connect(pooled.conninfo()).close()
        except psycopg.OperationalError:
            return False
        return True

    with subprocess.Popen([program, "--quiet", *user, configuration]) as process:
        try:
            wait_until(accepts_connections, "PgBouncer accepts connections")
            yield pooled
        finally:
            process.kill()


def test_install_and_uninstall_pass_through_pgbouncer(pgbouncer: Server, procrastinate_database: str) -> None:
    pooled = make_conninfo(procrastinate_database, port=pgbouncer.port)
    before = dump(procrastinate_database)

    assert install(pooled) == [FIRST]
    assert install(pooled) == []
    assert uninstall(pooled) is True

    assert dump(procrastinate_database) == before


def test_where_pgbouncer_refuses_the_connection_the_command_line_says_what_to_do(
    pgbouncer: Server, procrastinate_database: str
) -> None:
    refused = make_conninfo(procrastinate_database, port=pgbouncer.port, options="-c search_path=public")

    done = subprocess.run(
        [sys.executable, "-m", "procrastinate_stalled", "--database-url", refused, "install"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (3, "")
    message, *details, hint = done.stderr.splitlines()
    assert message == "Error: no connection to the database"
    assert "unsupported startup parameter" in " ".join(details)
    assert hint.startswith("Hint: That is PgBouncer. Connect to the server itself")
    assert not is_installed(procrastinate_database)
