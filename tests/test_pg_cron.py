"""What our SQL relies on in pg_cron: the same tests for the real one and for the fake one (`tests/pg_cron_fake`).

What later versions do differently is asked of the server by trying, as the SQL does.
"""

from collections.abc import Iterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from tests.jobs import rows
from tests.server import Server

Connection = psycopg.Connection[Any]


@pytest.fixture
def superuser(bare_cron_database: str) -> Iterator[Connection]:
    with psycopg.connect(bare_cron_database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def ordinary(superuser: Connection, bare_cron_database: str) -> Iterator[Connection]:
    """A role that may use the schema of pg_cron, and nothing else."""
    superuser.execute("CREATE ROLE ordinary LOGIN; GRANT USAGE ON SCHEMA cron TO ordinary")
    with psycopg.connect(bare_cron_database, user="ordinary", autocommit=True) as connection:
        yield connection
    superuser.execute("DELETE FROM cron.job; DROP OWNED BY ordinary; DROP ROLE ordinary")


@pytest.fixture
def nologin(superuser: Connection) -> Iterator[str]:
    """A role that cannot log in, and may use the schema of pg_cron."""
    superuser.execute("CREATE ROLE nologin; GRANT USAGE ON SCHEMA cron TO nologin")
    yield "nologin"
    superuser.execute("RESET ROLE; DELETE FROM cron.job; DROP OWNED BY nologin; DROP ROLE nologin")


def one(connection: Connection, query: LiteralString, *parameters: object) -> Any:
    """The only value of the only row."""
    [row] = rows(connection, query, *parameters)
    [value] = row.values()
    return value


def schedule(connection: Connection, name: str = "job", schedule: str = "* * * * *", command: str = "SELECT 1") -> int:
    return int(one(connection, "SELECT cron.schedule(%s, %s, %s)", name, schedule, command))


def jobs(connection: Connection) -> list[tuple[object, ...]]:
    query = "SELECT jobid, jobname, username, schedule, command, database, active FROM cron.job ORDER BY jobid"
    return [tuple(row.values()) for row in rows(connection, query)]


def understands(connection: Connection, text: str) -> bool:
    """Whether this is a schedule."""
    try:
        with connection.transaction(force_rollback=True):
            schedule(connection, "tried", text)
    except psycopg.errors.InvalidParameterValue:
        return False
    return True


def is_newer(connection: Connection) -> bool:
    """Whether it is 1.5 or later."""
    return understands(connection, "1 second")


# What is there


def test_jobs_have_these_columns(superuser: Connection) -> None:
    assert columns(superuser, "cron.job") == [
        ("jobid", "bigint", True, "nextval('cron.jobid_seq'::regclass)"),
        ("schedule", "text", True, None),
        ("command", "text", True, None),
        ("nodename", "text", True, "'localhost'::text"),
        ("nodeport", "integer", True, "inet_server_port()"),
        ("database", "text", True, "current_database()"),
        ("username", "text", True, "CURRENT_USER"),
        ("active", "boolean", True, "true"),
        ("jobname", "text" if is_newer(superuser) else "name", False, None),
    ]


def test_runs_have_these_columns(superuser: Connection) -> None:
    assert columns(superuser, "cron.job_run_details") == [
        ("jobid", "bigint", False, None),
        ("runid", "bigint", True, "nextval('cron.runid_seq'::regclass)"),
        ("job_pid", "integer", False, None),
        ("database", "text", False, None),
        ("username", "text", False, None),
        ("command", "text", False, None),
        ("status", "text", False, None),
        ("return_message", "text", False, None),
        ("start_time", "timestamp with time zone", False, None),
        ("end_time", "timestamp with time zone", False, None),
    ]


def columns(connection: Connection, table: str) -> list[tuple[object, ...]]:
    query: LiteralString = """
        SELECT attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid)
            FROM pg_attribute
            LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
            WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
            ORDER BY attnum
    """
    return connection.execute(query, [table]).fetchall()


def test_a_job_has_an_id_and_its_name_is_unique_for_its_role(superuser: Connection) -> None:
    query: LiteralString = """
        SELECT conname, pg_get_constraintdef(oid)
            FROM pg_constraint
            WHERE connamespace = 'cron'::regnamespace AND contype <> 'n'
            ORDER BY conname
    """
    assert superuser.execute(query).fetchall() == [
        ("job_pkey", "PRIMARY KEY (jobid)"),
        ("job_run_details_pkey", "PRIMARY KEY (runid)"),
        ("jobname_username_uniq", "UNIQUE (jobname, username)"),
    ]


def test_it_has_these_functions_and_some_of_them_are_not_for_everybody(superuser: Connection) -> None:
    # The fake one has helpers whose names begin with an underscore.
    query: LiteralString = r"""
        SELECT format('%s(%s) %s', proname, pg_get_function_arguments(oid), pg_get_function_result(oid)), proisstrict,
               has_function_privilege('pg_monitor', oid, 'EXECUTE')
            FROM pg_proc
            WHERE pronamespace = 'cron'::regnamespace AND proname NOT LIKE '\_%'
            ORDER BY 1
    """
    name = "text" if is_newer(superuser) else "name"
    alter_job = (
        "job_id bigint, schedule text DEFAULT NULL::text, command text DEFAULT NULL::text, "
        "database text DEFAULT NULL::text, username text DEFAULT NULL::text, active boolean DEFAULT NULL::boolean"
    )
    schedule_in_database = (
        "job_name text, schedule text, command text, database text, "
        "username text DEFAULT NULL::text, active boolean DEFAULT true"
    )
    assert superuser.execute(query).fetchall() == [
        (f"alter_job({alter_job}) void", False, False),
        ("job_cache_invalidate() trigger", False, True),
        ("schedule(job_name text, schedule text, command text) bigint", False, True),
        ("schedule(schedule text, command text) bigint", True, True),
        (f"schedule_in_database({schedule_in_database}) bigint", False, False),
        ("unschedule(job_id bigint) boolean", True, True),
        (f"unschedule(job_name {name}) boolean", True, True),
    ]


def test_everybody_has_these_rights_and_no_right_on_the_schema(superuser: Connection) -> None:
    query: LiteralString = """
        SELECT relname, string_agg(privilege_type, ', ' ORDER BY privilege_type)
            FROM pg_class
            CROSS JOIN LATERAL aclexplode(relacl)
            WHERE relnamespace = 'cron'::regnamespace AND grantee = 0
            GROUP BY relname
            ORDER BY relname
    """
    assert superuser.execute(query).fetchall() == [
        ("job", "SELECT"),
        ("job_run_details", "DELETE, SELECT"),
        ("jobid_seq", "SELECT"),
        ("runid_seq", "SELECT"),
    ]
    assert one(superuser, "SELECT has_schema_privilege('pg_monitor', 'cron', 'USAGE')") is False


def test_a_role_sees_its_own_rows_by_a_policy_that_the_owner_is_not_subject_to(superuser: Connection) -> None:
    query: LiteralString = """
        SELECT polname, polrelid::regclass::text, relrowsecurity, relforcerowsecurity, polcmd, polroles,
               pg_get_expr(polqual, polrelid), polwithcheck
            FROM pg_policy
            JOIN pg_class AS class ON class.oid = polrelid
            WHERE relnamespace = 'cron'::regnamespace
            ORDER BY polname
    """
    own_rows = "(username = CURRENT_USER)"
    assert superuser.execute(query).fetchall() == [
        ("cron_job_policy", "cron.job", True, False, "*", [0], own_rows, None),
        ("cron_job_run_details_policy", "cron.job_run_details", True, False, "*", [0], own_rows, None),
    ]


def test_a_dump_has_the_jobs(superuser: Connection) -> None:
    query: LiteralString = """
        SELECT configuration::regclass::text
            FROM pg_extension
            CROSS JOIN LATERAL unnest(extconfig) AS configuration
            WHERE extname = 'pg_cron'
            ORDER BY 1
    """
    assert [name for (name,) in superuser.execute(query)] == [
        "cron.job",
        "cron.job_run_details",
        "cron.jobid_seq",
        "cron.runid_seq",
    ]


def test_it_can_be_created_in_one_database_only(cron_server: Server) -> None:
    with cron_server.database() as conninfo, psycopg.connect(conninfo, autocommit=True) as connection:
        assert one(connection, "SELECT current_setting('cron.database_name')") == "cron"

        with pytest.raises(psycopg.errors.RaiseException) as caught:
            connection.execute("CREATE EXTENSION pg_cron")

        assert caught.value.diag.message_primary == "can only create extension in database cron"
        assert connection.execute("SELECT to_regnamespace('cron')").fetchone() == (None,)


def test_where_the_server_has_not_loaded_it_it_cannot_be_created(empty_database: str) -> None:
    with psycopg.connect(empty_database) as connection, pytest.raises(psycopg.errors.UndefinedObject) as caught:
        connection.execute("CREATE EXTENSION pg_cron")
    assert caught.value.diag.message_primary == 'unrecognized configuration parameter "cron.database_name"'


# Schedule


def test_a_job_is_the_callers_in_the_database_of_pg_cron_and_active(
    cron_server: Server, superuser: Connection, ordinary: Connection
) -> None:
    job_id = schedule(ordinary, "job", "*/5 * * * *", "SELECT 2")

    assert jobs(superuser) == [(job_id, "job", "ordinary", "*/5 * * * *", "SELECT 2", "cron", True)]
    assert rows(superuser, "SELECT nodename, nodeport FROM cron.job") == [
        {"nodename": str(cron_server.folder), "nodeport": cron_server.port}
    ]


def test_a_job_may_have_no_name_and_then_nothing_is_replaced(superuser: Connection) -> None:
    first = one(superuser, "SELECT cron.schedule('* * * * *', 'SELECT 1')")
    second = one(superuser, "SELECT cron.schedule('* * * * *', 'SELECT 1')")

    assert [(job[0], job[1]) for job in jobs(superuser)] == [(first, None), (second, None)]


def test_a_job_of_the_same_name_is_changed_and_stays_as_inactive_as_it_was(superuser: Connection) -> None:
    job_id = schedule(superuser, "job", "*/2 * * * *", "SELECT 1")
    superuser.execute("UPDATE cron.job SET active = false")

    assert schedule(superuser, "job", "*/3 * * * *", "SELECT 2") == job_id

    assert jobs(superuser) == [(job_id, "job", "postgres", "*/3 * * * *", "SELECT 2", "cron", False)]


def test_each_role_has_its_own_job_of_a_name(superuser: Connection, ordinary: Connection) -> None:
    first, second = schedule(superuser), schedule(ordinary)

    assert [(job[0], job[2]) for job in jobs(superuser)] == [(first, "postgres"), (second, "ordinary")]


def test_a_job_belongs_to_the_current_role_not_to_the_one_that_logged_in(
    superuser: Connection, ordinary: Connection, nologin: str
) -> None:
    superuser.execute(
        """
        CREATE FUNCTION public.schedule_as_owner() RETURNS bigint LANGUAGE sql SECURITY DEFINER
            AS $$ SELECT cron.schedule('by a function', '* * * * *', 'SELECT 1') $$
        """
    )
    superuser.execute("GRANT USAGE ON SCHEMA public TO ordinary")

    ordinary.execute("SELECT public.schedule_as_owner()")
    superuser.execute("SET ROLE ordinary")
    schedule(superuser, "after SET ROLE")
    superuser.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(nologin)))
    schedule(superuser, "as a role that cannot log in")
    superuser.execute("RESET ROLE")

    assert [(job[1], job[2]) for job in jobs(superuser)] == [
        ("by a function", "postgres"),
        ("after SET ROLE", "ordinary"),
        ("as a role that cannot log in", "nologin"),
    ]


def test_a_job_belongs_to_the_transaction_of_the_caller(superuser: Connection) -> None:
    with superuser.transaction(force_rollback=True):
        schedule(superuser)
    assert jobs(superuser) == []


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ((None, None, None), "job_name"),
        (("job", None, None), "schedule"),
        (("job", "* * * * *", None), "command"),
    ],
)
def test_null_is_an_internal_error_for_a_job_with_a_name(
    superuser: Connection, arguments: tuple[str | None, ...], missing: str
) -> None:
    with pytest.raises(psycopg.errors.InternalError_) as caught:
        superuser.execute("SELECT cron.schedule(%s::text, %s::text, %s::text)", arguments)
    assert caught.value.diag.message_primary == f"{missing} can not be NULL"
    assert one(superuser, "SELECT cron.schedule(NULL, 'SELECT 1')") is None
    assert jobs(superuser) == []


@pytest.mark.parametrize(
    "text",
    [
        "* * * * *",
        "*/10 * * * *",
        "0-59/59 0-23/23 1-31/31 1-12/12 0-7/7",
        "59 23 31 12 7",
        "0 0 1 1 0",
        "1,2,3-5,*/7 * * * *",
        "007 * * * *",
        "5-3 * * * *",
        "0 0 * jan,FEB,Mar-dec sun,Mon-FRI",
        "  \t0   0\t1 1   0  ",
        "* * * * * whatever follows",
        "5;6 *x *-2 * 1.5",
        "# a comment\n\n \t# another one\n* * * * *",
        "@hourly",
        "@reboot",
        "@daily then something else",
        " @midnight",
    ],
)
def test_these_are_schedules(superuser: Connection, text: str) -> None:
    assert understands(superuser, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "*",
        "* * * *",
        "* * *\n* *",
        "* * * * \n",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * 32 * *",
        "* * * 0 *",
        "* * * 13 *",
        "* * * * 8",
        "-1 * * * *",
        "0-60 * * * *",
        "5/10 * * * *",
        "*/0 * * * *",
        "*/ * * * *",
        "*/x * * * *",
        "5- * * * *",
        "1-2/ * * * *",
        "1, * * * *",
        ",1 * * * *",
        "5x * * * *",
        "jan * * * *",
        "* * * sun *",
        "* * * january *",
        "* * * * jan",
        "99999 * * * *",
        "# nothing but a comment",
        "@",
        "@Hourly",
        "@every 5 minutes",
        "every minute",
        "'; DROP TABLE x; --",
        "* " * 600,
        "0 seconds",
        "60 seconds",
        "-5 seconds",
        "1.5 seconds",
        "30 secs",
        "30 second x",
        "30 seconds x",
        "seconds",
        "30",
    ],
)
def test_these_are_no_schedules(superuser: Connection, text: str) -> None:
    assert not understands(superuser, text)


@pytest.mark.parametrize(
    "text", ["1 second", "59 seconds", "2 second", "30seconds", " 30 SECONDS ", "+007 seconds", "30\tseconds\n"]
)
def test_a_schedule_in_seconds_is_one_of_all_or_none_by_version(superuser: Connection, text: str) -> None:
    assert understands(superuser, text) == is_newer(superuser)


@pytest.mark.parametrize(("text", "since_1_6"), [("0 0 $ * *", True), ("0 0 $* * *", False), ("$ 0 0 * *", False)])
def test_a_dollar_is_the_last_day_of_the_month_by_version(superuser: Connection, text: str, *, since_1_6: bool) -> None:
    # 1.5 knows seconds and no dollar.
    assert understands(superuser, text) == (since_1_6 and understands(superuser, "0 0 $ * *"))
    assert is_newer(superuser) or not understands(superuser, text)


def test_a_schedule_that_is_refused_leaves_the_job_as_it_was(superuser: Connection) -> None:
    schedule(superuser)
    before = jobs(superuser)
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        schedule(superuser, "job", "now and then")
    assert caught.value.diag.message_primary == "invalid schedule: now and then"
    assert jobs(superuser) == before


# Unschedule


def test_a_job_is_removed_by_its_id_or_by_its_name_and_comes_back_with_another_id(superuser: Connection) -> None:
    first = schedule(superuser)
    assert one(superuser, "SELECT cron.unschedule(%s::bigint)", first) is True
    assert jobs(superuser) == []

    second = schedule(superuser)
    assert second > first
    assert one(superuser, "SELECT cron.unschedule('job')") is True
    assert jobs(superuser) == []
    assert one(superuser, "SELECT cron.unschedule(NULL::bigint)") is None


def test_to_remove_an_absent_job_is_an_internal_error(superuser: Connection) -> None:
    with pytest.raises(psycopg.errors.InternalError_) as caught:
        superuser.execute("SELECT cron.unschedule(123456)")
    assert caught.value.diag.message_primary == "could not find valid entry for job 123456"

    with pytest.raises(psycopg.errors.InternalError_) as caught:
        superuser.execute("SELECT cron.unschedule('absent')")
    assert caught.value.diag.message_primary == "could not find valid entry for job 'absent'"


def test_a_superuser_removes_the_jobs_of_others_by_id_only_and_others_do_not(
    superuser: Connection, ordinary: Connection
) -> None:
    theirs, mine = schedule(ordinary, "theirs"), schedule(superuser, "mine")

    with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
        ordinary.execute("SELECT cron.unschedule(%s::bigint)", [mine])
    assert caught.value.diag.message_primary == "permission denied for table job"
    for connection, name in ((ordinary, "mine"), (superuser, "theirs")):
        with pytest.raises(psycopg.errors.InternalError_):
            connection.execute("SELECT cron.unschedule(%s)", [name])

    superuser.execute("SELECT cron.unschedule(%s::bigint)", [theirs])
    assert [job[0] for job in jobs(superuser)] == [mine]


def test_who_may_delete_from_the_table_removes_the_jobs_of_others(superuser: Connection, ordinary: Connection) -> None:
    job_id = schedule(superuser)
    superuser.execute("GRANT DELETE ON cron.job TO ordinary")

    assert one(ordinary, "SELECT cron.unschedule(%s::bigint)", job_id) is True

    assert jobs(superuser) == []


# Rights


def test_without_a_right_on_the_schema_even_its_name_is_an_error(superuser: Connection, ordinary: Connection) -> None:
    superuser.execute("REVOKE USAGE ON SCHEMA cron FROM ordinary")

    for query in ("SELECT cron.schedule('job', '* * * * *', 'SELECT 1')", "SELECT to_regclass('cron.job')"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
            ordinary.execute(query.encode())
        assert caught.value.diag.message_primary == "permission denied for schema cron"
    assert one(ordinary, "SELECT has_schema_privilege('cron', 'USAGE')") is False
    assert one(ordinary, "SELECT count(*) FROM pg_extension WHERE extname = 'pg_cron'") == 1


def test_an_ordinary_role_sees_its_own_rows_only_and_may_delete_its_runs_only(
    superuser: Connection, ordinary: Connection
) -> None:
    schedule(superuser)
    job_id = schedule(ordinary)
    superuser.execute("INSERT INTO cron.job_run_details (username) VALUES ('postgres'), ('ordinary')")

    assert [job[0] for job in jobs(ordinary)] == [job_id]
    assert rows(ordinary, "SELECT username FROM cron.job_run_details") == [{"username": "ordinary"}]

    ordinary.execute("DELETE FROM cron.job_run_details")
    assert rows(superuser, "SELECT username FROM cron.job_run_details") == [{"username": "postgres"}]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT cron.alter_job(1, active => true)",
        "SELECT cron.schedule_in_database('job', '* * * * *', 'SELECT 1', 'cron')",
        "INSERT INTO cron.job (schedule, command) VALUES ('* * * * *', 'SELECT 1')",
        "UPDATE cron.job SET active = true",
        "DELETE FROM cron.job",
        "UPDATE cron.job_run_details SET status = 'succeeded'",
        "SELECT nextval('cron.jobid_seq')",
    ],
)
def test_an_ordinary_role_may_not_do_this(superuser: Connection, ordinary: Connection, statement: str) -> None:
    schedule(ordinary)
    before = jobs(superuser)

    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        ordinary.execute(statement.encode())

    assert jobs(superuser) == before


# Another database


def test_a_superuser_schedules_a_job_for_another_database_and_role(superuser: Connection, ordinary: Connection) -> None:
    query: LiteralString = "SELECT cron.schedule_in_database('job', '* * * * *', 'SELECT 1', 'template1'{})"
    mine = one(superuser, query.format(""))
    theirs = one(superuser, query.format(", 'ordinary', false"))

    assert jobs(superuser) == [
        (mine, "job", "postgres", "* * * * *", "SELECT 1", "template1", True),
        (theirs, "job", "ordinary", "* * * * *", "SELECT 1", "template1", False),
    ]
    assert [job[0] for job in jobs(ordinary)] == [theirs]


def test_a_job_of_that_name_is_replaced_and_stays_as_inactive_as_it_was(superuser: Connection) -> None:
    job_id = schedule(superuser)
    superuser.execute("UPDATE cron.job SET active = false")

    query: LiteralString = "SELECT cron.schedule_in_database('job', '@daily', 'SELECT 2', 'template1', active => true)"
    assert one(superuser, query) == job_id

    [(_, _, _, schedule_now, command, database, active)] = jobs(superuser)
    assert (schedule_now, command, active) == ("@daily", "SELECT 2", False)
    # Until 1.6.3 it stayed in its database.
    assert database == "template1" or (database == "cron" and not is_newer(superuser))


@pytest.mark.parametrize(
    ("database", "role", "error", "message"),
    [
        ("absent", "postgres", psycopg.errors.InvalidCatalogName, 'database "absent" does not exist'),
        ("cron", "absent", psycopg.errors.InternalError_, 'role "absent" does not exist'),
        ("cron", "nologin", psycopg.errors.InternalError_, 'role "nologin" can not log in'),
        (
            "template0",
            "ordinary",
            psycopg.errors.InternalError_,
            "User ordinary does not have CONNECT privilege on template0",
        ),
    ],
)
def test_a_job_that_could_not_run_there_is_refused(
    superuser: Connection,
    ordinary: Connection,
    nologin: str,
    database: str,
    role: str,
    error: type[psycopg.Error],
    message: str,
) -> None:
    assert (ordinary.info.user, nologin) == ("ordinary", "nologin")
    superuser.execute("REVOKE CONNECT ON DATABASE template0 FROM PUBLIC")
    try:
        with pytest.raises(error) as caught:
            superuser.execute(
                "SELECT cron.schedule_in_database('job', '* * * * *', 'SELECT 1', %s, %s)", [database, role]
            )
    finally:
        superuser.execute("GRANT CONNECT ON DATABASE template0 TO PUBLIC")

    assert caught.value.diag.message_primary == message
    assert jobs(superuser) == []


def test_a_role_that_was_granted_it_schedules_for_itself_in_another_database(
    superuser: Connection, ordinary: Connection
) -> None:
    superuser.execute("GRANT EXECUTE ON FUNCTION cron.schedule_in_database TO ordinary")
    query: LiteralString = "SELECT cron.schedule_in_database('job', '* * * * *', 'SELECT 1', 'template1'{})"

    one(ordinary, query.format(""))
    with pytest.raises(psycopg.errors.InternalError_) as caught:
        one(ordinary, query.format(", 'ordinary'"))

    assert caught.value.diag.message_primary == "must be superuser to create a job for another role"
    assert [(job[2], job[5]) for job in jobs(superuser)] == [("ordinary", "template1")]


# Alter a job


def test_a_superuser_alters_any_job_and_what_is_not_given_stays(superuser: Connection, ordinary: Connection) -> None:
    job_id = schedule(ordinary)

    superuser.execute("SELECT cron.alter_job(%s, active => false)", [job_id])
    assert jobs(superuser) == [(job_id, "job", "ordinary", "* * * * *", "SELECT 1", "cron", False)]

    superuser.execute("SELECT cron.alter_job(%s, '@daily', 'SELECT 2', 'template1', 'postgres', true)", [job_id])
    assert jobs(superuser) == [(job_id, "job", "postgres", "@daily", "SELECT 2", "template1", True)]


def test_a_role_that_was_granted_it_alters_its_own_jobs_only(superuser: Connection, ordinary: Connection) -> None:
    mine, theirs = schedule(superuser), schedule(ordinary)
    superuser.execute("GRANT EXECUTE ON FUNCTION cron.alter_job TO ordinary")

    ordinary.execute("SELECT cron.alter_job(%s, active => false)", [theirs])
    for statement, message in (
        (f"SELECT cron.alter_job({mine}, active => false)", f"Job {mine} does not exist or you don't own it"),
        (f"SELECT cron.alter_job({theirs}, username => 'postgres')", "must be superuser to alter username"),
    ):
        with pytest.raises(psycopg.errors.InternalError_) as caught:
            ordinary.execute(statement.encode())
        assert caught.value.diag.message_primary == message

    assert [(job[0], job[6]) for job in jobs(superuser)] == [(mine, True), (theirs, False)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("NULL, active => true", psycopg.errors.InternalError_, "job_id can not be NULL"),
        ("123456, active => true", psycopg.errors.InternalError_, "Job 123456 does not exist or you don't own it"),
        ("1", psycopg.errors.InternalError_, "no updates specified"),
        ("1, '61 * * * *'", psycopg.errors.InvalidParameterValue, "invalid schedule: 61 * * * *"),
        ("1, database => 'absent'", psycopg.errors.InvalidCatalogName, 'database "absent" does not exist'),
    ],
)
def test_what_cannot_be_altered_is_an_error(
    superuser: Connection, arguments: str, error: type[psycopg.Error], message: str
) -> None:
    schedule(superuser)
    with pytest.raises(error) as caught:
        superuser.execute(f"SELECT cron.alter_job({arguments})".encode())
    assert caught.value.diag.message_primary == message
