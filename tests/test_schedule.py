"""`schedule()` and `unschedule()` on a real pg_cron, for each kind of role."""

from collections.abc import Iterator
from typing import Any, LiteralString

import psycopg
import pytest

from procrastinate_stalled import Stalled
from tests.jobs import rows

Connection = psycopg.Connection[Any]

GRANTS: LiteralString = """
GRANT USAGE ON SCHEMA procrastinate_stalled TO {0};
GRANT ALL ON ALL TABLES IN SCHEMA procrastinate_stalled TO {0};
GRANT EXECUTE ON ALL ROUTINES IN SCHEMA procrastinate_stalled TO {0};
"""


@pytest.fixture
def superuser(cron_database: str) -> Iterator[Connection]:
    with psycopg.connect(cron_database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def ordinary(superuser: Connection, cron_database: str) -> Iterator[Connection]:
    """A role that may use pg_cron and this product, and nothing else."""
    superuser.execute("CREATE ROLE ordinary LOGIN")
    superuser.execute(f"{GRANTS.format('ordinary')} GRANT USAGE ON SCHEMA cron TO ordinary".encode())
    with psycopg.connect(cron_database, user="ordinary", autocommit=True) as connection:
        yield connection
    superuser.execute("SELECT cron.unschedule(jobid) FROM cron.job WHERE username = 'ordinary'")
    superuser.execute("DROP OWNED BY ordinary; DROP ROLE ordinary")


def jobs(connection: Connection) -> list[tuple[object, ...]]:
    query = "SELECT jobid, jobname, username, schedule, command, database, active FROM cron.job ORDER BY jobid"
    return [tuple(row.values()) for row in rows(connection, query)]


def test_the_default_is_each_minute(superuser: Connection) -> None:
    job_id = Stalled(superuser).schedule()

    assert jobs(superuser) == [
        (
            job_id,
            "procrastinate_stalled",
            "postgres",
            "* * * * *",
            "CALL procrastinate_stalled.sweep()",
            "cron",
            True,
        )
    ]


def test_scheduling_again_changes_nothing(superuser: Connection) -> None:
    first = Stalled(superuser).schedule(schedule="*/2 * * * *")
    before = jobs(superuser)

    assert Stalled(superuser).schedule(schedule="*/2 * * * *") == first
    assert jobs(superuser) == before


def test_another_schedule_replaces_the_first(superuser: Connection) -> None:
    Stalled(superuser).schedule()

    job_id = Stalled(superuser).schedule(schedule="*/5 * * * *")

    assert [(job[0], job[3]) for job in jobs(superuser)] == [(job_id, "*/5 * * * *")]


def test_a_command_that_somebody_changed_is_set_right(superuser: Connection) -> None:
    Stalled(superuser).schedule()
    superuser.execute("UPDATE cron.job SET command = 'SELECT 1'")

    Stalled(superuser).schedule()

    assert [job[4] for job in jobs(superuser)] == ["CALL procrastinate_stalled.sweep()"]


def test_an_ordinary_role_activates_its_deactivated_job_again(superuser: Connection, ordinary: Connection) -> None:
    Stalled(ordinary).schedule()
    superuser.execute("UPDATE cron.job SET active = false")

    Stalled(ordinary).schedule()

    assert [(job[2], job[6]) for job in jobs(superuser)] == [("ordinary", True)]


def test_each_role_has_its_own_job_and_a_superuser_removes_them_all(
    superuser: Connection, ordinary: Connection
) -> None:
    Stalled(superuser).schedule()
    Stalled(ordinary).schedule()
    assert [job[2] for job in jobs(superuser)] == ["postgres", "ordinary"]

    assert Stalled(ordinary).unschedule()
    assert [job[2] for job in jobs(superuser)] == ["postgres"]
    assert not Stalled(ordinary).unschedule()

    Stalled(ordinary).schedule()
    assert Stalled(superuser).unschedule()
    assert jobs(superuser) == []
    assert not Stalled(superuser).unschedule()


def test_a_job_of_that_name_for_another_database_is_neither_replaced_nor_removed(superuser: Connection) -> None:
    superuser.execute("SELECT cron.schedule_in_database('procrastinate_stalled', '0 0 1 1 *', 'SELECT 1', 'template1')")
    before = jobs(superuser)

    with pytest.raises(psycopg.errors.DuplicateObject) as caught:
        Stalled(superuser).schedule()
    assert '"template1"' in (caught.value.diag.message_detail or "")
    assert caught.value.diag.message_hint is not None

    assert not Stalled(superuser).unschedule()
    assert jobs(superuser) == before


@pytest.mark.parametrize("schedule", ["60 seconds", "every minute", "", "61 * * * *", "'; DROP TABLE x; --", None])
def test_a_schedule_that_pg_cron_does_not_understand_is_refused(superuser: Connection, schedule: str | None) -> None:
    Stalled(superuser).schedule()
    before = jobs(superuser)

    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        superuser.execute("SELECT procrastinate_stalled.schedule(%s)", [schedule])

    diagnostic = caught.value.diag
    assert diagnostic.message_primary is not None
    assert diagnostic.message_primary.startswith("pg_cron does not understand the schedule ")
    assert (diagnostic.message_detail or "").startswith("pg_cron says: ")
    assert (diagnostic.message_hint or "").startswith("Nothing was changed.")
    assert jobs(superuser) == before


def test_a_role_without_a_right_on_pg_cron_is_told_which_one(superuser: Connection, ordinary: Connection) -> None:
    superuser.execute("REVOKE USAGE ON SCHEMA cron FROM ordinary")

    for function in (Stalled(ordinary).schedule, Stalled(ordinary).unschedule):
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
            function()
        assert caught.value.diag.message_hint == "As a superuser: GRANT USAGE ON SCHEMA cron TO ordinary;"


def test_a_role_that_cannot_log_in_is_refused_because_its_runs_would_fail(
    superuser: Connection, ordinary: Connection
) -> None:
    superuser.execute("ALTER ROLE ordinary NOLOGIN")

    with pytest.raises(psycopg.errors.InvalidAuthorizationSpecification) as caught:
        Stalled(ordinary).schedule()

    assert caught.value.diag.message_detail == "pg_cron runs a job as the role that scheduled it."
    assert jobs(superuser) == []


def test_where_pg_cron_is_not_loaded_there_is_nothing_to_unschedule(connection: Connection) -> None:
    assert not Stalled(connection).unschedule()
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as caught:
        Stalled(connection).schedule()
    assert "shared_preload_libraries" in (caught.value.diag.message_detail or "")


@pytest.mark.parametrize("role", ["postgres", "nobody_special"])
def test_where_pg_cron_lives_in_another_database_the_statement_for_it_is_given(
    other_database_on_cron_server: str, cron_database: str, role: str
) -> None:
    with (
        psycopg.connect(other_database_on_cron_server, autocommit=True) as connection,
        psycopg.connect(cron_database, autocommit=True) as there,
    ):
        name = connection.info.dbname
        if role != "postgres":
            connection.execute(f"CREATE ROLE {role} LOGIN; {GRANTS.format(role)} SET ROLE {role}".encode())
            there.execute(
                f"""
                GRANT USAGE ON SCHEMA cron TO {role};
                GRANT EXECUTE ON FUNCTION cron.schedule_in_database TO {role};
                """.encode()
            )
        try:
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as caught:
                Stalled(connection).schedule(schedule="*/3 * * * *")
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                Stalled(connection).unschedule()

            before = f'Or there, as role "{role}" with USAGE on schema cron and EXECUTE on this function: '
            statements = (caught.value.diag.message_hint or "").partition(before)[2].split("To end it, there:")
            schedule, unschedule = (part.strip() for part in statements)
            with psycopg.connect(cron_database, user=role, autocommit=True) as as_told:
                as_told.execute(schedule.encode())
                assert [job[1:] for job in jobs(there)] == [
                    (
                        f"procrastinate_stalled {name}",
                        role,
                        "*/3 * * * *",
                        "CALL procrastinate_stalled.sweep()",
                        name,
                        True,
                    )
                ]
                as_told.execute(unschedule.encode())
            assert jobs(there) == []
        finally:
            connection.execute("RESET ROLE")
            if role != "postgres":
                there.execute("SELECT cron.unschedule(jobid) FROM cron.job")
                there.execute(f"DROP OWNED BY {role}".encode())
                connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())
