"""`--cron-database`: pg_cron lives in another database. And a restored copy, live."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from procrastinate_stalled import Stalled, install
from procrastinate_stalled.cron_database import address
from tests.conftest import CRON
from tests.jobs import add_stalled_job, add_worker, get_job, rows
from tests.server import (
    FAST,
    Server,
    database_name,
    install_procrastinate,
    postgresql_program,
    throwaway_server,
)
from tests.test_cli import ERROR, OK, WARNING, Run, expect_error, run, succeed
from tests.test_copied_database import COMMAND, EVERY_YEAR, jobs, local_check
from tests.test_schedule import GRANTS
from tests.wait import wait_until

Connection = psycopg.Connection[Any]

NEXT_RUN_OF_PG_CRON = 90


@pytest.fixture
def ours(other_database_on_cron_server: str) -> str:
    """The address of a database with this product, of a server that has pg_cron in the database `cron`."""
    return other_database_on_cron_server


@pytest.fixture
def there(ours: str) -> Iterator[Connection]:
    """A superuser's connection to the database of pg_cron."""
    with psycopg.connect(make_conninfo(ours, dbname=CRON), autocommit=True) as connection:
        yield connection


@pytest.fixture
def scheduled(ours: str, there: Connection) -> Connection:
    """The same; and our database is swept once a year."""
    schedule(ours)
    return there


@pytest.fixture
def ordinary(ours: str, there: Connection) -> Iterator[str]:
    """The address of our database for a role that may call this product, and nothing else."""
    with psycopg.connect(ours, autocommit=True) as connection:
        connection.execute("CREATE ROLE ordinary LOGIN")
        connection.execute(GRANTS.format("ordinary").encode())
        yield make_conninfo(ours, user="ordinary")
        there.execute("SELECT cron.unschedule(jobid) FROM cron.job WHERE username = 'ordinary'")
        there.execute("DROP OWNED BY ordinary")
        connection.execute("DROP OWNED BY ordinary; DROP ROLE ordinary")


def schedule(database: str, *arguments: str, cron_database: str = CRON) -> str:
    return succeed("schedule", *(arguments or [EVERY_YEAR]), "--cron-database", cron_database, database=database)


def expected_job(job_id: object, database: str, username: str = "postgres", schedule: str = EVERY_YEAR) -> Any:
    name = database_name(database)
    return (job_id, f"procrastinate_stalled {name}", username, schedule, COMMAND, name, True, True)


def checks(done: Run) -> dict[str, Any]:
    assert done.stderr == ""
    return {check["name"]: check for check in json.loads(done.stdout)}


def check(database: str, name: str = "schedule", cron_database: str = CRON) -> tuple[str, str, str]:
    """Return level, detail and hint of a row of status."""
    row = checks(run("status", "--json", "--cron-database", cron_database, database=database))[name]
    return row["level"], row["detail"], row["hint"] or ""


# schedule


def test_the_job_sweeps_our_database_as_the_role_that_is_connected_to_it(ours: str, there: Connection) -> None:
    printed = succeed("schedule", "--cron-database", CRON, database=ours)

    [job] = jobs(there)
    assert job == expected_job(job[0], ours, schedule="* * * * *")
    assert printed == f"Scheduled: pg_cron job {job[0]} runs at '* * * * *'.\n"


def test_a_superuser_there_schedules_for_the_role_that_is_connected_to_our_database(
    ordinary: str, there: Connection
) -> None:
    schedule(ordinary, cron_database=f"user=postgres dbname={CRON}")

    [job] = jobs(there)
    assert job == expected_job(job[0], ordinary, "ordinary")


def test_scheduling_again_changes_nothing(ours: str, there: Connection) -> None:
    first = schedule(ours)
    before = jobs(there)

    assert schedule(ours) == first
    assert jobs(there) == before


@pytest.mark.parametrize(
    "change",
    [
        "schedule = '*/5 * * * *'",
        "command = 'SELECT 1'",
        "active = false",
        "database = 'template1'",
        "database = 'former'",
        "nodeport = 1",
    ],
)
def test_what_somebody_changed_is_set_right(ours: str, scheduled: Connection, change: LiteralString) -> None:
    scheduled.execute(f"UPDATE cron.job SET {change}")

    schedule(ours)

    [job] = jobs(scheduled)
    assert job == expected_job(job[0], ours)


def test_a_job_that_was_made_by_hand_under_another_name_is_replaced(ours: str, there: Connection) -> None:
    for database in (database_name(ours), "template1"):
        there.execute(
            "SELECT cron.schedule_in_database(%s, '* * * * *', %s, %s)", [f"my {database}", COMMAND, database]
        )

    schedule(ours)

    assert [job[1] for job in jobs(there)] == ["my template1", f"procrastinate_stalled {database_name(ours)}"]


def test_jobs_of_databases_whose_long_names_begin_alike_are_kept_apart(cron_server: Server, there: Connection) -> None:
    # Before pg_cron 1.5 the names of jobs end after 63 bytes, as those of databases do.
    databases = [cron_server.create_database("x" * 62 + last, "ours") for last in "ab"]
    try:
        for database in databases:
            schedule(database)
            schedule(database)

        assert sorted(str(job[5]) for job in jobs(there)) == [*map(database_name, databases)]
        assert check(databases[0])[0] == "ok"
        with psycopg.connect(databases[0], autocommit=True) as connection:
            hint = re.search(r"SELECT cron\.schedule_in_database.*?\);", refusal(connection).message_hint or "")
        assert hint is not None
        there.execute(hint[0].encode())
        assert len(jobs(there)) == 2
        assert succeed("unschedule", "--cron-database", CRON, database=databases[0]) == "Unscheduled.\n"
        assert [job[5] for job in jobs(there)] == [database_name(databases[1])]
    finally:
        there.execute("SELECT cron.unschedule(jobid) FROM cron.job")
        for database in databases:
            cron_server.drop_database(database_name(database))


def refusal(connection: Connection) -> psycopg.errors.Diagnostic:
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as caught:
        Stalled(connection).schedule()
    return caught.value.diag


def test_a_schedule_that_pg_cron_does_not_understand_changes_nothing(ours: str, scheduled: Connection) -> None:
    before = jobs(scheduled)

    done = run("schedule", "now and then", "--cron-database", CRON, database=ours)

    expect_error(done, "pg_cron does not understand the schedule 'now and then'", hint="Nothing was changed. Five")
    assert "pg_cron says: " in done.stderr
    assert jobs(scheduled) == before


def test_each_missing_right_is_named_and_granting_it_suffices(ordinary: str, there: Connection) -> None:
    """Two rights, both to be granted in the database of pg_cron by a superuser."""
    for message in (
        'role "ordinary" may not use pg_cron in database "cron"',
        "may not schedule jobs for other databases",
    ):
        done = run("schedule", EVERY_YEAR, "--cron-database", CRON, database=ordinary)
        expect_error(done, message, hint="as a superuser: GRANT ")
        assert jobs(there) == []
        there.execute(done.stderr.rpartition("as a superuser: ")[2].encode())

    schedule(ordinary)

    [job] = jobs(there)
    assert job == expected_job(job[0], ordinary, "ordinary")
    assert check(ordinary)[0] == "ok"
    assert succeed("unschedule", "--cron-database", CRON, database=ordinary) == "Unscheduled.\n"
    assert jobs(there) == []


@pytest.mark.usefixtures("ordinary")
def test_only_a_superuser_schedules_for_another_role(ours: str, there: Connection) -> None:
    there.execute("GRANT USAGE ON SCHEMA cron TO ordinary")
    there.execute(
        "GRANT EXECUTE ON FUNCTION cron.schedule_in_database(text, text, text, text, text, boolean) TO ordinary"
    )

    done = run("schedule", "--cron-database", f"user=ordinary dbname={CRON}", database=ours)

    expect_error(
        done, 'role "ordinary" may not schedule a job that runs as role "postgres"', hint="Nothing was changed"
    )
    option = re.search(r'--cron-database "(.*?)"', done.stderr)
    assert option is not None
    schedule(ours, cron_database=option[1])
    assert [job[2] for job in jobs(there)] == ["postgres"]


@pytest.mark.usefixtures("ordinary")
def test_a_role_that_cannot_log_in_is_refused(ours: str, there: Connection) -> None:
    there.execute("ALTER ROLE ordinary NOLOGIN")

    # Connected as a superuser who has become that role.
    done = run("schedule", "--cron-database", CRON, database=make_conninfo(ours, options="-c role=ordinary"))

    expect_error(done, 'role "ordinary" cannot log in', hint="ALTER ROLE ... LOGIN")
    assert jobs(there) == []


def test_a_database_without_pg_cron_is_refused_with_the_name_of_the_right_one(ours: str, there: Connection) -> None:
    for command in ("schedule", "unschedule"):
        done = run(command, "--cron-database", "postgres", database=ours)
        expect_error(done, 'pg_cron is not in database "postgres"', hint=f"Name that one: --cron-database {CRON}")
    assert jobs(there) == []


def test_a_role_that_may_not_see_where_pg_cron_lives_is_told_how_to_learn_it(ordinary: str) -> None:
    done = run("schedule", "--cron-database", "postgres", database=ordinary)

    expect_error(done, 'pg_cron is not in database "postgres"', hint="SHOW cron.database_name;")


def test_where_the_extension_is_not_created_that_is_the_remedy(ours: str, there: Connection) -> None:
    there.execute("UPDATE pg_extension SET extname = 'away' WHERE extname = 'pg_cron'")
    try:
        done = run("schedule", "--cron-database", CRON, database=ours)
    finally:
        there.execute("UPDATE pg_extension SET extname = 'pg_cron' WHERE extname = 'away'")
    expect_error(done, f'pg_cron is not in database "{CRON}"', hint="CREATE EXTENSION pg_cron;")


def test_a_server_without_pg_cron_is_told(database: str) -> None:
    done = run("schedule", "--cron-database", "postgres", database=database)

    expect_error(done, 'pg_cron is not in database "postgres"', hint="shared_preload_libraries")


def test_a_database_of_another_server_is_refused(database: str, cron_server: Server, there: Connection) -> None:
    # pg_cron would look for a database of that name on its own server.
    for command in ("schedule", "unschedule"):
        done = run(command, "--cron-database", cron_server.conninfo(CRON), database=database)
        expect_error(done, f'database "{CRON}" is not on the server of database', hint="Nothing was changed")
    assert jobs(there) == []


def test_our_own_database_is_refused(cron_database: str) -> None:
    done = run("schedule", "--cron-database", CRON, database=cron_database)

    expect_error(done, "pg_cron lives in the very database that is to be swept", hint="Leave out --cron-database")


@pytest.mark.parametrize("command", ["schedule", "unschedule"])
def test_a_database_that_cannot_be_reached_is_explained(ours: str, command: str) -> None:
    done = run(command, "--cron-database", "nowhere", database=ours)

    expect_error(done, "no connection to the database of pg_cron", hint="--cron-database")


@pytest.mark.parametrize("address", ["postgresql://%zz", "=", "connect_timeout=soon"])
def test_an_address_that_makes_no_sense_is_explained(ours: str, address: str) -> None:
    for command in ("schedule", "unschedule"):
        done = run(command, "--cron-database", address, database=ours)
        expect_error(done, "no connection to the database of pg_cron", hint="Name it with --cron-database")

    schedule = checks(run("status", "--json", "--cron-database", address, database=ours))["schedule"]
    assert schedule["level"] == "warning"
    assert "no connection to the database of pg_cron" in schedule["detail"]


def test_where_this_product_is_not_installed_nothing_is_scheduled(cron_server: Server, there: Connection) -> None:
    with cron_server.database("procrastinate") as database:
        done = run("schedule", "--cron-database", CRON, database=database)
    expect_error(done, "procrastinate_stalled is not installed", hint="procrastinate-stalled install")
    assert jobs(there) == []


@pytest.mark.usefixtures("there")
def test_objects_of_others_in_either_database_are_not_used(ours: str) -> None:
    for conninfo in (ours, make_conninfo(ours, dbname=CRON)):
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute(
                """
                CREATE FUNCTION public.current_setting(text) RETURNS text LANGUAGE plpgsql AS $$
                    BEGIN RAISE 'robbed'; END $$;
                CREATE FUNCTION public.current_database() RETURNS name LANGUAGE plpgsql AS $$
                    BEGIN RAISE 'robbed'; END $$;
                CREATE FUNCTION public.set_config(text, text, boolean) RETURNS text LANGUAGE plpgsql AS $$
                    BEGIN RAISE 'robbed'; END $$;
                CREATE FUNCTION public.refuse(jsonb, text) RETURNS text LANGUAGE plpgsql AS $$
                    BEGIN RAISE 'robbed'; END $$;
                CREATE OPERATOR public.->> (LEFTARG = jsonb, RIGHTARG = text, FUNCTION = public.refuse);
                """
            )
    hostile = {"PGOPTIONS": "-c search_path=public,pg_catalog"}

    for command in (["schedule", EVERY_YEAR], ["status", "--json"], ["unschedule"]):
        done = run(*command, "--cron-database", CRON, database=ours, **hostile)
        assert "robbed" not in done.stdout + done.stderr
        assert done.returncode in {OK, WARNING}


# The address


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("postgres", "host=h port=1 user=app password=p sslmode=require dbname=postgres"),
        ("dbname=postgres", "host=h port=1 user=app password=p sslmode=require dbname=postgres"),
        ("user=admin dbname=x", "host=h port=1 user=admin sslmode=require dbname=x"),
        ("postgresql://admin:q@i/x", "host=i user=admin password=q sslmode=require dbname=x"),
        ("postgresql:///x", "host=h port=1 user=app password=p sslmode=require dbname=x"),
        ("service=cron", "service=cron sslmode=require dbname=shop"),
    ],
)
def test_what_an_address_leaves_out_is_as_for_our_database(given: str, expected: str) -> None:
    ours = "postgresql://app:p@h:1/shop?sslmode=require"
    assert conninfo_to_dict(address(given, ours)) == conninfo_to_dict(expected)


# unschedule


def test_unschedule_removes_what_sweeps_our_database_and_nothing_else(ours: str, scheduled: Connection) -> None:
    name = database_name(ours)
    add_job: LiteralString = "SELECT cron.schedule_in_database(%s, '0 0 31 12 *', %s, %s)"
    scheduled.execute(add_job, ["by hand", COMMAND, name])
    scheduled.execute(add_job, ["vacuum", "VACUUM", name])
    scheduled.execute(add_job, ["procrastinate_stalled template1", COMMAND, "template1"])
    scheduled.execute("SELECT cron.schedule('procrastinate_stalled', '0 0 31 12 *', %s)", [COMMAND])

    first = succeed("unschedule", "--cron-database", CRON, database=ours)
    again = succeed("unschedule", "--cron-database", CRON, database=ours)

    assert (first, again) == ("Unscheduled.\n", "Not scheduled, nothing to do.\n")
    assert [job[1] for job in jobs(scheduled)] == ["vacuum", "procrastinate_stalled template1", "procrastinate_stalled"]


def test_after_an_uninstall_the_job_can_still_be_removed(ours: str, scheduled: Connection) -> None:
    done = run("uninstall", database=ours)
    assert "procrastinate-stalled unschedule --cron-database" in done.stderr

    assert succeed("unschedule", "--cron-database", CRON, database=ours) == "Unscheduled.\n"
    assert jobs(scheduled) == []


# status


def test_status_judges_the_job_and_its_last_run_as_it_does_in_its_own_database(ours: str, there: Connection) -> None:
    where = f' in database "{CRON}"'
    level, detail, hint = check(ours)
    assert (level, detail) == (
        "warning",
        f'pg_cron{where} has no job for database "{database_name(ours)}" that role postgres can see',
    )
    assert hint == "procrastinate-stalled schedule --cron-database ..."

    schedule(ours)
    job_id = jobs(there)[0][0]
    assert check(ours) == ("ok", f'pg_cron job {job_id}{where}, "{EVERY_YEAR}", as role postgres', "")
    assert check(ours, "last_run")[:2] == ("warning", "pg_cron has not run the job yet")

    for status, message, end, expected in (
        ("succeeded", "CALL", "now", ("ok", "succeeded at ")),
        ("succeeded", "CALL", "epoch", ("error", "the last run was at ")),
        ("failed", "ERROR:  no\n", "now", ("error", "failed at ")),
        ("failed", "connection failed", None, ("error", "failed at an unknown time: connection failed")),
        ("running", "", None, ("error", "failed at an unknown time: connection failed")),
    ):
        there.execute(
            """
            INSERT INTO cron.job_run_details (jobid, runid, status, return_message, start_time, end_time)
                SELECT jobid, nextval('cron.runid_seq'), %s, %s, %s, %s FROM cron.job
            """,
            [status, message, end, end],
        )
        level, detail, _hint = check(ours, "last_run")
        assert level == expected[0]
        assert detail.startswith(expected[1])

    for change, words in (
        ("active = false", "is not active"),
        ("active = true, command = 'SELECT 1'", "does not sweep; it runs: SELECT 1"),
    ):
        there.execute(f"UPDATE cron.job SET {change}".encode())
        level, detail, hint = check(ours)
        assert level == "error"
        assert detail.startswith(f"pg_cron job {job_id}{where}")
        assert words in detail
        assert hint.startswith("procrastinate-stalled schedule --cron-database ... ")


def test_status_exits_with_the_worst_level_of_these_rows_too(ours: str, scheduled: Connection) -> None:
    with psycopg.connect(ours, autocommit=True) as connection:
        add_worker(connection)
        Stalled(connection).sweep()
    scheduled.execute(
        """
        INSERT INTO cron.job_run_details (jobid, runid, status, start_time, end_time)
            SELECT jobid, 1, 'succeeded', now(), now() FROM cron.job
        """
    )
    done = run("status", "--json", "--cron-database", CRON, database=ours)
    assert {check["level"] for check in checks(done).values()} == {"ok"}
    assert done.returncode == OK

    scheduled.execute("UPDATE cron.job SET active = false")
    assert run("status", "--cron-database", CRON, database=ours).returncode == ERROR


def test_the_right_to_see_crash_recoveries_is_asked_of_the_role_that_sweeps(ours: str, ordinary: str) -> None:
    schedule(ordinary, cron_database=f"user=postgres dbname={CRON}")

    level, detail, _hint = check(ours, "available_since")

    assert level == "warning"
    assert "role ordinary cannot see" in detail


def test_a_monitor_who_can_see_who_sweeps_is_warned_of_what_that_role_cannot_see(ours: str, ordinary: str) -> None:
    schedule(ordinary, cron_database=f"user=postgres dbname={CRON}")
    with psycopg.connect(ours, autocommit=True) as connection:
        connection.execute("CREATE ROLE monitor LOGIN")
        try:
            Stalled(connection).grant_monitor("monitor")
            connection.execute("INSERT INTO procrastinate_stalled.sweeps (duration) VALUES ('1 ms'), ('1 ms')")
            monitor = make_conninfo(ours, user="monitor")

            assert check(monitor, "available_since")[0] == "ok"
            level, detail, _hint = check(monitor, "available_since", f"user=postgres dbname={CRON}")
        finally:
            connection.execute("DROP OWNED BY monitor; DROP ROLE monitor")

    assert level == "warning"
    assert "role ordinary cannot see" in detail


def test_what_cannot_be_read_is_a_row_and_all_others_are_told(ours: str, ordinary: str) -> None:
    for database, cron_database, words in (
        (ours, "nowhere", 'no connection to the database of pg_cron: .*database "nowhere" does not exist'),
        (ours, "postgres", 'pg_cron is not in database "postgres"'),
        (ordinary, CRON, 'role "ordinary" may not use pg_cron in database "cron"'),
    ):
        done = run("status", "--json", "--cron-database", cron_database, database=database)
        rows = checks(done)
        assert rows["schedule"]["level"] == "warning"
        assert re.match(words, rows["schedule"]["detail"], re.DOTALL)
        assert rows["schedule"]["hint"]
        assert "Nothing was changed" not in rows["schedule"]["hint"]
        assert "last_run" not in rows
        assert rows["rules"]["level"] == "ok"


def test_without_the_option_status_names_the_command_with_it(ours: str) -> None:
    done = run("status", "--json", database=ours)

    assert f"procrastinate-stalled schedule --cron-database {CRON} " in checks(done)["schedule"]["hint"]


def test_an_extension_that_pg_cron_does_not_read_is_as_none(ours: str) -> None:
    # It is left behind when cron.database_name changes, and copied by CREATE DATABASE ... TEMPLATE.
    with psycopg.connect(ours) as connection:
        connection.execute("UPDATE pg_extension SET extname = 'pg_cron' WHERE extname = 'plpgsql'")
        connection.execute("CREATE SCHEMA cron")
        diagnostic = refusal(connection)
        connection.rollback()
    assert diagnostic.message_detail == f'On this server it lives in database "{CRON}" (cron.database_name).'


# Live


def test_a_database_is_swept_by_a_pg_cron_that_lives_in_database_postgres() -> None:
    settings = FAST | {"shared_preload_libraries": "pg_cron", "cron.database_name": "postgres"}
    with throwaway_server(settings=settings) as server:
        with psycopg.connect(server.conninfo(), autocommit=True) as superuser:
            superuser.execute("CREATE EXTENSION pg_cron")
            superuser.execute("CREATE ROLE app LOGIN")
            superuser.execute("CREATE DATABASE app OWNER app")
        app = make_conninfo(server.conninfo("app"), user="app")
        install_procrastinate(app)
        install(app)
        with psycopg.connect(app, autocommit=True) as connection:
            connection.execute(
                "UPDATE procrastinate_stalled.settings SET outage_grace = '0', require_live_worker = false"
            )
            connection.execute("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '1 second'")
            job_id = add_stalled_job(connection)

            scheduled = succeed("schedule", "--cron-database", "user=postgres dbname=postgres", database=app)
            assert scheduled.startswith("Scheduled: ")
            wait_until(
                lambda: get_job(connection, job_id)["status"] == "todo",
                "pg_cron has swept",
                seconds=NEXT_RUN_OF_PG_CRON,
            )

            [rescue] = rows(connection, "SELECT rescued_by FROM procrastinate_stalled.rescues")
            assert rescue == {"rescued_by": "app (pg_cron)"}
        cron_database = "user=postgres dbname=postgres"
        wait_until(lambda: check(app, "last_run", cron_database)[0] == "ok", "pg_cron has noted its run")
        level, detail, _hint = check(app, cron_database=cron_database)
        assert level == "ok"
        assert detail.endswith('in database "postgres", "* * * * *", as role app')
        unscheduled = succeed("unschedule", "--cron-database", cron_database, database=app)
        assert unscheduled == "Unscheduled.\n"
        with psycopg.connect(server.conninfo()) as superuser:
            assert jobs(superuser) == []


def test_a_restored_copy_is_not_swept_until_it_is_asked_for(cron_database: str, tmp_path: Path) -> None:
    with psycopg.connect(cron_database, autocommit=True) as original:
        Stalled(original).schedule()
        add_worker(original)
        add_stalled_job(original)
    dump = tmp_path / "dump.sql"
    subprocess.run([postgresql_program("pg_dump"), "-d", cron_database, "-f", dump], check=True)
    with psycopg.connect(cron_database, autocommit=True) as original:
        Stalled(original).unschedule()

    with throwaway_server(cron_database="copy") as server:
        conninfo = server.conninfo("copy")
        restored = subprocess.run(
            [postgresql_program("psql"), "-X", "-q", "-d", conninfo, "-f", dump],
            check=True,
            capture_output=True,
            text=True,
        )
        assert "ERROR" not in restored.stderr
        with psycopg.connect(conninfo, autocommit=True) as copy:
            (sweeps,) = rows(copy, "SELECT count(*) FROM procrastinate_stalled.sweeps")
            level, detail, hint = local_check(copy)
            assert level == "warning"
            assert detail.startswith('this database, "copy", is not swept by pg_cron; pg_cron job ')
            assert detail.endswith(f' of role postgres sweeps database "{CRON}", which does not exist')

            # pg_cron does run the job, for the other database.
            wait_until(
                lambda: rows(copy, "SELECT FROM cron.job_run_details WHERE status IN ('succeeded', 'failed')"),
                "pg_cron has run the job that came with the dump",
                seconds=NEXT_RUN_OF_PG_CRON,
            )
            assert rows(copy, "SELECT DISTINCT database FROM cron.job_run_details") == [{"database": CRON}]
            assert rows(copy, "SELECT count(*) FROM procrastinate_stalled.sweeps") == [sweeps]

            remedy = re.search(r"SELECT procrastinate_stalled\.schedule\(\);", hint)
            assert remedy is not None
            copy.execute(remedy[0].encode())
            [job] = jobs(copy)
            assert job[5:] == ("copy", True, True)
            assert local_check(copy)[0] == "ok"
            wait_until(
                lambda: rows(copy, "SELECT count(*) FROM procrastinate_stalled.sweeps") != [sweeps],
                "pg_cron has swept the copy",
                seconds=NEXT_RUN_OF_PG_CRON,
            )
