"""Who may do what: a monitor, an operator, the role that sweeps, the role that installs, and everybody else."""

from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from procrastinate_stalled import Stalled, install
from procrastinate_stalled.installation import migration_sql
from tests.jobs import (
    Row,
    add_job,
    add_orphan_note,
    add_rule,
    add_stalled_job,
    add_worker,
    contents,
    get_job,
    insert,
    pretend_old_server,
    rows,
)
from tests.server import Server, database_name, install_procrastinate

Connection = psycopg.Connection[Any]

SCHEMA = "Tasks of app"
"""Where Procrastinate is, in these tests. In `public` everybody has rights from the start."""

READ_TABLES = {
    "SELECT procrastinate_jobs",
    "SELECT procrastinate_workers",
    "SELECT procrastinate_events",
    "SELECT rules",
    "SELECT settings",
    "SELECT rescues",
    "SELECT sweeps",
    "SELECT orphans",
}

READ_FUNCTIONS = {
    "_available_since",
    "_batches",
    "_can_sweep",
    "_classify_cron_jobs",
    "_cron_database",
    "_cron_jobs",
    "_doing_jobs",
    "_end_of_pause",
    "_explained",
    "_false_rescues",
    "_first_event_since",
    "_has_privilege",
    "_in_words",
    "_job_name_elsewhere",
    "_judge",
    "_privileges",
    "_require_login",
    "_require_pg_cron",
    "_require_procrastinate",
    "_require_writable",
    "_seconds",
    "_silent_since",
    "_sentence",
    "_snapshot_is_held",
    "_waiting_job",
    "explain_job",
    "explain_jobs",
    "get_stalled_jobs",
    "status",
    "task_runtimes",
    "version",
    "workers",
}

RESCUE_FUNCTIONS = {
    "_begin_sweep",
    "_end_sweep",
    "_lock_tables",
    "_note_orphans",
    "_notify",
    "_rescue",
    "_rescue_batch",
    "retry_job",
    "retry_stalled_jobs",
}

OWNER_FUNCTIONS = {
    "_first_rows",
    "_grant",
    "grant_monitor",
    "grant_operator",
    "pause",
    "resume",
    "schedule",
    "set_procrastinate_schema",
    "sweep",
    "unschedule",
}

MONITOR = (
    {f"USAGE {SCHEMA}", "USAGE procrastinate_stalled"}
    | READ_TABLES
    | {f"EXECUTE {function}" for function in READ_FUNCTIONS}
)

RESCUE_TABLES = {
    "UPDATE procrastinate_jobs.status",
    "UPDATE procrastinate_jobs.attempts",
    "UPDATE procrastinate_jobs.scheduled_at",
    "UPDATE procrastinate_jobs.queue_name",
    "UPDATE procrastinate_jobs.priority",
    "UPDATE procrastinate_jobs.lock",
    "UPDATE procrastinate_jobs.abort_requested",
    "UPDATE procrastinate_jobs.worker_id",
    "UPDATE procrastinate_workers.id",
    "INSERT procrastinate_events.job_id",
    "INSERT procrastinate_events.type",
    "INSERT procrastinate_events.at",
    "USAGE procrastinate_events_id_seq",
    "INSERT rescues.job_id",
    "INSERT rescues.queue_name",
    "INSERT rescues.task_name",
    "INSERT rescues.action",
    "INSERT rescues.reason",
    "INSERT rescues.detail",
    "INSERT rescues.rule_name",
    "INSERT rescues.worker_id",
    "INSERT rescues.last_heartbeat",
    "INSERT rescues.started_at",
    "INSERT rescues.attempts",
    "INSERT rescues.scheduled_at",
    "INSERT sweeps.doing",
    "INSERT sweeps.latest_heartbeat",
    "INSERT sweeps.newest_worker_id",
    "UPDATE sweeps.retried",
    "UPDATE sweeps.failed",
    "UPDATE sweeps.aborted",
    "UPDATE sweeps.waiting",
    "UPDATE sweeps.held",
    "UPDATE sweeps.held_reason",
    "UPDATE sweeps.duration",
    "UPDATE sweeps.error",
    "INSERT orphans.job_id",
    "INSERT orphans.attempts",
    "DELETE orphans",
}

OPERATOR = MONITOR | RESCUE_TABLES | {f"EXECUTE {function}" for function in RESCUE_FUNCTIONS}


@pytest.fixture(scope="module")
def template(server: Server) -> Iterator[str]:
    """The address of a database with Procrastinate in a schema of its own, and this product."""
    with server.database() as conninfo:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(SCHEMA)))
        install_procrastinate(in_schema(conninfo))
        install(conninfo)
        with psycopg.connect(conninfo) as connection:
            pretend_old_server(connection)
        yield conninfo


def in_schema(conninfo: str) -> str:
    """The address with Procrastinate's schema in the search_path."""
    return make_conninfo(conninfo, options="-c search_path={}".format(f'"{SCHEMA}"'.replace(" ", "\\ ")))


@pytest.fixture
def owner(template: str) -> Iterator[Connection]:
    """The owner's connection to it, rolled back in the end, with a living worker and some roles without any rights."""
    with psycopg.connect(in_schema(template)) as connection:
        connection.execute("CREATE ROLE stranger; CREATE ROLE monitor; CREATE ROLE operator")
        add_worker(connection)
        yield connection
        connection.rollback()


@pytest.fixture
def database_of_its_own(server: Server, template: str) -> Iterator[str]:
    """The address of a copy of it, for tests that commit; the role `worker` may log in, and nothing else."""
    with server.database(database_name(template)) as conninfo:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("CREATE ROLE worker LOGIN")
        yield in_schema(conninfo)
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("DROP OWNED BY worker; DROP ROLE worker")


def privileges(connection: Connection, role: str) -> set[str]:
    """All that a role may do, by whatever way: with both schemas and everything in them but Procrastinate's functions.

    A privilege for a column is named if the role does not have it for the whole table.
    """
    found = rows(
        connection,
        """
        WITH asked (role, schemas) AS (
            VALUES (%s::name, %s::name[])
        ), class AS (
            SELECT role, class.oid, relkind, relname
                FROM asked
                JOIN pg_namespace AS namespace ON nspname = ANY (schemas)
                JOIN pg_class AS class ON relnamespace = namespace.oid
                WHERE relname !~ '^_yoyo'
        )
        SELECT privilege || ' ' || nspname AS may
            FROM asked
            JOIN pg_namespace ON nspname = ANY (schemas)
            CROSS JOIN unnest(ARRAY['USAGE', 'CREATE']) AS privilege
            WHERE has_schema_privilege(role, oid, privilege)
        UNION ALL
        SELECT privilege || ' ' || relname
            FROM class
            CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER'])
                AS privilege
            WHERE relkind = 'r' AND has_table_privilege(role, oid, privilege)
        UNION ALL
        SELECT privilege || ' ' || relname || '.' || attname
            FROM class
            JOIN pg_attribute ON attrelid = oid AND attnum > 0 AND NOT attisdropped
            CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS privilege
            WHERE relkind = 'r'
                AND has_column_privilege(role, oid, attnum, privilege)
                AND NOT has_table_privilege(role, oid, privilege)
        UNION ALL
        SELECT privilege || ' ' || relname
            FROM class
            CROSS JOIN unnest(ARRAY['SELECT', 'USAGE', 'UPDATE']) AS privilege
            WHERE relkind = 'S' AND has_sequence_privilege(role, oid, privilege)
        UNION ALL
        SELECT CASE WHEN bool_and(may) THEN 'EXECUTE ' ELSE 'EXECUTE SOME ' END || proname
            FROM asked
            JOIN pg_proc ON pronamespace = 'procrastinate_stalled'::regnamespace
            CROSS JOIN LATERAL has_function_privilege(role, pg_proc.oid, 'EXECUTE') AS may
            GROUP BY proname
            HAVING bool_or(may)
        """,
        role,
        [SCHEMA, "procrastinate_stalled"],
    )
    return {row["may"] for row in found}


def grant(connection: Connection, kind: str, role: str | None) -> None:
    """Call the function of the product."""
    connection.execute(sql.SQL("SELECT procrastinate_stalled.{}(%s)").format(sql.Identifier(f"grant_{kind}")), [role])


# What each may


def test_every_function_is_for_somebody(owner: Connection) -> None:
    functions = rows(
        owner, "SELECT DISTINCT proname FROM pg_proc WHERE pronamespace = 'procrastinate_stalled'::regnamespace"
    )
    assert {row["proname"] for row in functions} == READ_FUNCTIONS | RESCUE_FUNCTIONS | OWNER_FUNCTIONS


def test_a_monitor_may_look_and_nothing_more(owner: Connection) -> None:
    grant(owner, "monitor", "monitor")

    assert privileges(owner, "monitor") == MONITOR


def test_an_operator_may_look_and_retry_and_nothing_more(owner: Connection) -> None:
    grant(owner, "operator", "operator")

    assert privileges(owner, "operator") == OPERATOR


def test_everybody_else_may_nothing(owner: Connection) -> None:
    assert privileges(owner, "stranger") == set()


def test_nobody_may_anything_whatever_the_default_privileges_are(server: Server) -> None:
    with server.database() as conninfo, psycopg.connect(conninfo) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {0}; SET search_path = {0}").format(sql.Identifier(SCHEMA)))
        connection.execute(resources.files("procrastinate.sql").joinpath("schema.sql").read_bytes())
        connection.execute(
            """
            ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO PUBLIC;
            ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC;
            ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO PUBLIC;
            ALTER DEFAULT PRIVILEGES GRANT ALL ON ROUTINES TO PUBLIC;
            CREATE ROLE stranger;
            """
        )

        connection.execute(migration_sql().encode())

        assert privileges(connection, "stranger") == set()
        connection.rollback()


def test_a_role_that_default_privileges_name_has_what_they_give_until_it_is_revoked(server: Server) -> None:
    with server.database() as conninfo, psycopg.connect(conninfo) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {0}; SET search_path = {0}").format(sql.Identifier(SCHEMA)))
        connection.execute(resources.files("procrastinate.sql").joinpath("schema.sql").read_bytes())
        connection.execute(
            """
            CREATE ROLE readonly;
            ALTER DEFAULT PRIVILEGES GRANT USAGE ON SCHEMAS TO readonly;
            ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO readonly;
            ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON ROUTINES TO readonly;
            """
        )

        connection.execute(migration_sql().encode())

        assert privileges(connection, "readonly") == (
            {"USAGE procrastinate_stalled"}
            | {table for table in READ_TABLES if "procrastinate" not in table}
            | {f"EXECUTE {function}" for function in READ_FUNCTIONS | RESCUE_FUNCTIONS | OWNER_FUNCTIONS}
        )
        connection.execute("REVOKE USAGE ON SCHEMA procrastinate_stalled FROM readonly; SET ROLE readonly")
        for statement in ("TABLE procrastinate_stalled.rescues", "SELECT procrastinate_stalled.version()"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="for schema"), connection.transaction():
                connection.execute(statement)
        connection.rollback()


def test_the_functions_that_a_monitor_may_call_cannot_write(owner: Connection) -> None:
    volatile = rows(
        owner,
        """
        SELECT DISTINCT proname
            FROM pg_proc
            WHERE pronamespace = 'procrastinate_stalled'::regnamespace AND provolatile = 'v'
        """,
    )
    assert {row["proname"] for row in volatile} == RESCUE_FUNCTIONS | OWNER_FUNCTIONS


# What each can do

MAY_LOOK = {"monitor", "operator"}
MAY_RETRY = {"operator"}

CALLS: dict[str, tuple[LiteralString, set[str]]] = {
    "explain_job": ("SELECT * FROM procrastinate_stalled.explain_job({job})", MAY_LOOK),
    "explain_jobs": ("SELECT * FROM procrastinate_stalled.explain_jobs()", MAY_LOOK),
    "get_stalled_jobs": (
        "SELECT * FROM procrastinate_stalled.get_stalled_jobs(seconds_since_heartbeat => 60)",
        MAY_LOOK,
    ),
    "grant_monitor": ("SELECT procrastinate_stalled.grant_monitor('stranger')", set()),
    "grant_operator": ("SELECT procrastinate_stalled.grant_operator('stranger')", set()),
    "pause": ("SELECT * FROM procrastinate_stalled.pause()", set()),
    "resume": ("SELECT procrastinate_stalled.resume()", set()),
    "retry_job": ("SELECT * FROM procrastinate_stalled.retry_job({job})", MAY_RETRY),
    "retry_stalled_jobs": ("SELECT * FROM procrastinate_stalled.retry_stalled_jobs()", MAY_RETRY),
    "schedule": ("SELECT procrastinate_stalled.schedule()", set()),
    "set_procrastinate_schema": ("SELECT procrastinate_stalled.set_procrastinate_schema({schema})", set()),
    "status": ("SELECT * FROM procrastinate_stalled.status()", MAY_LOOK),
    "sweep": ("CALL procrastinate_stalled.sweep()", set()),
    "task_runtimes": ("SELECT * FROM procrastinate_stalled.task_runtimes()", MAY_LOOK),
    "unschedule": ("SELECT procrastinate_stalled.unschedule()", set()),
    "version": ("SELECT procrastinate_stalled.version()", MAY_LOOK),
    "workers": ("SELECT * FROM procrastinate_stalled.workers()", MAY_LOOK),
}


def test_every_public_function_is_called_below(owner: Connection) -> None:
    functions = rows(
        owner,
        """
        SELECT proname
            FROM pg_proc
            WHERE pronamespace = 'procrastinate_stalled'::regnamespace AND proname !~ '^_'
        """,
    )
    assert {row["proname"] for row in functions} == CALLS.keys()


@pytest.mark.parametrize("role", ["stranger", "monitor", "operator"])
@pytest.mark.parametrize("function", CALLS)
def test_a_function_works_for_those_who_may_call_it_and_is_refused_to_others(
    function: str, role: str, owner: Connection
) -> None:
    grant(owner, "monitor", "monitor")
    grant(owner, "operator", "operator")
    job = add_stalled_job(owner)
    add_stalled_job(owner, queueing_lock="a")
    add_job(owner, "todo", queueing_lock="a")
    add_job(owner)
    statement, allowed = CALLS[function]
    call = sql.SQL(statement).format(job=sql.Literal(job), schema=sql.Literal(SCHEMA))
    before = contents(owner)

    if role not in allowed:
        with pytest.raises(psycopg.errors.InsufficientPrivilege), owner.transaction():
            call_as(owner, role, call)
        return

    answer = call_as(owner, role, call)
    if role == "monitor":
        assert contents(owner) == before
    if function not in {"retry_job", "retry_stalled_jobs", "status"}:
        assert answer == call_as(owner, "postgres", call)
    if function == "status":
        assert "permission denied" not in str(answer)


def call_as(connection: Connection, role: str, statement: sql.Composed | sql.SQL) -> list[Any]:
    """Run a statement as a role, and return its rows."""
    connection.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
    answer = connection.execute(statement).fetchall()
    connection.execute("RESET ROLE")
    return answer


@pytest.mark.parametrize("role", ["stranger", "monitor", "operator"])
@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO procrastinate_stalled.rules (name) VALUES ('mine')",
        "UPDATE procrastinate_stalled.rules SET enabled = false",
        "DELETE FROM procrastinate_stalled.rules",
        "UPDATE procrastinate_stalled.settings SET require_live_worker = false",
        "DELETE FROM procrastinate_stalled.rescues",
        "UPDATE procrastinate_stalled.rescues SET detail = 'it was nobody'",
        "DELETE FROM procrastinate_stalled.sweeps",
        "INSERT INTO {schema}.procrastinate_jobs (queue_name, task_name) VALUES ('mine', 'mine')",
        "UPDATE {schema}.procrastinate_jobs SET args = NULL",
        "DELETE FROM {schema}.procrastinate_jobs",
        "UPDATE {schema}.procrastinate_workers SET last_heartbeat = now()",
        "DELETE FROM {schema}.procrastinate_events",
        "CREATE TABLE procrastinate_stalled.mine ()",
    ],
)
def test_who_looks_or_retries_changes_nothing_else(statement: LiteralString, role: str, owner: Connection) -> None:
    grant(owner, "monitor", "monitor")
    grant(owner, "operator", "operator")

    with pytest.raises(psycopg.errors.InsufficientPrivilege), owner.transaction():
        call_as(owner, role, sql.SQL(statement).format(schema=sql.Identifier(SCHEMA)))


def test_an_operator_cannot_write_a_rescue_in_the_name_of_another(owner: Connection) -> None:
    grant(owner, "operator", "operator")
    columns = "job_id, queue_name, task_name, action, reason, attempts"
    values = "1, 'default', 'task', 'retried', 'manual', 0"
    owner.execute("SET LOCAL ROLE operator")

    for column, value in {"rescued_by": "'somebody'", "rescued_at": "'2000-01-01'", "id": "DEFAULT"}.items():
        query = f"INSERT INTO procrastinate_stalled.rescues ({columns}, {column}) VALUES ({values}, {value})"
        with pytest.raises(psycopg.errors.InsufficientPrivilege), owner.transaction():
            owner.execute(query.encode())


# An operator needs all that he gets


def lost_jobs(connection: Connection) -> int:
    """Add jobs for every kind of rescue, and one that is well; return the id of that."""
    add_rule(
        connection,
        "slow",
        position=1,
        task_name="slow",
        retry_delay="1 minute",
        retry_queue_name="other",
        retry_priority=7,
    )
    add_rule(connection, "end", position=1, task_name="end", action="fail")
    # A job that cannot be changed: its error is noted.
    connection.execute(
        """
        CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE OF worker_id ON procrastinate_jobs
            FOR EACH ROW WHEN (old.task_name = 'refused' AND old.status = 'doing' AND new.status = 'todo')
            EXECUTE FUNCTION public.refuse();
        """
    )
    for task_name in ("task", "slow", "end", "refused"):
        add_stalled_job(connection, task_name=task_name)
    add_stalled_job(connection, abort_requested=True)
    add_stalled_job(connection, queueing_lock="a")
    add_job(connection, "todo", queueing_lock="a")
    add_job(connection)
    orphan = add_job(connection)
    add_orphan_note(connection, orphan, attempts=0, seen_ago=3600)
    add_orphan_note(connection, job_id=4711, attempts=0, seen_ago=3600)
    return add_job(connection, worker_id=add_worker(connection))


def rescue_as(connection: Connection, role: str, running_job: int) -> dict[str, list[Row]]:
    """Rescue all that is stalled and one job more, as a role; return what has become of everything. All is undone."""
    with connection.transaction(force_rollback=True):
        connection.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
        Stalled(connection).retry_stalled_jobs()
        Stalled(connection).retry_job(running_job, queue="other", priority=9, lock="b")
        connection.execute("RESET ROLE")
        return {
            "jobs": rows(connection, "SELECT * FROM procrastinate_jobs ORDER BY id"),
            "events": rows(connection, "SELECT job_id, type, at FROM procrastinate_events ORDER BY job_id, id"),
            "rescues": without(
                {"id", "rescued_by"}, rows(connection, "SELECT * FROM procrastinate_stalled.rescues ORDER BY id")
            ),
            "sweeps": without(
                {"id", "started_at", "duration"},
                rows(connection, "SELECT *, duration IS NOT NULL AS ended FROM procrastinate_stalled.sweeps"),
            ),
            "orphans": rows(
                connection,
                "SELECT job_id, attempts, seen_at < now() FROM procrastinate_stalled.orphans ORDER BY job_id",
            ),
        }


def without(columns: set[str], found: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name not in columns} for row in found]


def test_an_operator_rescues_as_the_owner_does(owner: Connection) -> None:
    grant(owner, "operator", "operator")
    job = lost_jobs(owner)

    rescued = rescue_as(owner, "operator", job)

    assert rescued == rescue_as(owner, "postgres", job)
    assert {(rescue["action"], rescue["reason"]) for rescue in rescued["rescues"]} == {
        ("retried", "heartbeat"),
        ("retried", "orphaned"),
        ("retried", "manual"),
        ("failed", "heartbeat"),
        ("aborted", "heartbeat"),
    }
    (sweep,) = rescued["sweeps"]
    assert "refused" in sweep["error"]


def test_an_operator_needs_each_of_these_privileges(owner: Connection) -> None:
    grant(owner, "operator", "operator")
    job = lost_jobs(owner)
    complete = rescue_as(owner, "operator", job)
    grants = rows(
        owner,
        """
        SELECT *
            FROM procrastinate_stalled._privileges(true) AS privilege
            WHERE NOT EXISTS (
                SELECT
                    FROM procrastinate_stalled._privileges(false) AS monitor
                    WHERE (monitor.kind, monitor.object) = (privilege.kind, privilege.object)
                        AND monitor.privilege = privilege.privilege
                )
        """,
    )
    assert len(grants) == len(OPERATOR) - len(MONITOR)

    needless = []
    for row in grants:
        column = f' ("{row["column_name"]}")' if row["column_name"] else ""
        privilege = f"{row['privilege']}{column} ON {row['kind']} {row['object_name']}"
        with owner.transaction(force_rollback=True):
            owner.execute(f"REVOKE {privilege} FROM operator".encode())
            try:
                if rescue_as(owner, "operator", job) == complete:
                    needless.append(privilege)
            except psycopg.errors.InsufficientPrivilege:
                pass
    assert needless == []


def test_a_rescue_names_the_operator(owner: Connection) -> None:
    grant(owner, "operator", "operator")
    add_stalled_job(owner)
    owner.execute("SET LOCAL application_name = 'night watch'")
    owner.execute("SET LOCAL ROLE operator")

    (rescue,) = Stalled(owner).retry_stalled_jobs()

    assert rescue.rescued_by == "operator (night watch)"


def test_the_sweep_of_an_operator_leaves_outdated_records_to_others(owner: Connection) -> None:
    grant(owner, "operator", "operator")
    add_outdated_records(owner)
    owner.execute("SET LOCAL ROLE operator")

    Stalled(owner).retry_stalled_jobs()

    assert outdated_records(owner) == 2
    owner.execute("RESET ROLE")
    Stalled(owner).retry_stalled_jobs()
    assert outdated_records(owner) == 0


def add_outdated_records(connection: Connection) -> None:
    insert(connection, "sweeps", started_at="2000-01-01")
    insert(
        connection,
        "rescues",
        rescued_at="2000-01-01",
        job_id=4711,
        queue_name="default",
        task_name="task",
        action="failed",
        reason="heartbeat",
        attempts=0,
    )


def outdated_records(connection: Connection) -> int:
    (row,) = rows(
        connection,
        """
        SELECT (SELECT count(*) FROM procrastinate_stalled.rescues WHERE rescued_at = '2000-01-01')
                + (SELECT count(*) FROM procrastinate_stalled.sweeps WHERE started_at = '2000-01-01') AS number
        """,
    )
    return int(row["number"])


def test_an_operator_may_pause_when_that_is_granted_too(owner: Connection) -> None:
    grant(owner, "operator", "operator")
    owner.execute(PAUSES)
    owner.execute("SET LOCAL ROLE operator")

    Stalled(owner).pause(reason="a deployment")
    Stalled(owner).pause(reason="a long deployment")
    assert Stalled(owner).resume() is True

    for forbidden in (
        "UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '1 s'",
        "TRUNCATE procrastinate_stalled.rules",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), owner.transaction():
            owner.execute(forbidden.encode())


PAUSES: LiteralString = """
GRANT EXECUTE ON FUNCTION procrastinate_stalled.pause, procrastinate_stalled.resume TO operator;
GRANT INSERT (name, position, expires_at, queue_name, task_name, action, note),
    UPDATE (enabled, expires_at, queue_name, task_name, args, note), DELETE
    ON procrastinate_stalled.rules TO operator;
"""


# Granting


def test_granting_again_changes_nothing(owner: Connection) -> None:
    grant(owner, "operator", "operator")
    before = acls(owner)

    grant(owner, "operator", "operator")
    grant(owner, "monitor", "operator")

    assert acls(owner) == before


def acls(connection: Connection) -> list[Row]:
    """All that anybody was granted."""
    return rows(
        connection,
        """
        SELECT oid, 0 AS number, nspacl::text AS acl FROM pg_namespace
        UNION ALL
        SELECT oid, 0, relacl::text FROM pg_class
        UNION ALL
        SELECT attrelid, attnum, attacl::text FROM pg_attribute
        UNION ALL
        SELECT oid, 0, proacl::text FROM pg_proc
        ORDER BY 1, 2
        """,
    )


def test_a_role_may_have_any_name(owner: Connection) -> None:
    name = """a'b"c; DROP ROLE operator; --%I"""
    owner.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))

    grant(owner, "monitor", name)

    assert privileges(owner, name) == MONITOR


@pytest.mark.parametrize("kind", ["monitor", "operator"])
@pytest.mark.parametrize("role", ["nobody", "Monitor", "public", "PUBLIC", "", None, "monitor" + "r" * 60])
def test_a_role_that_is_not_there_is_an_error_that_grants_nothing(
    role: str | None, kind: str, owner: Connection
) -> None:
    owner.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier("monitor" + "r" * 56)))
    before = acls(owner)

    with pytest.raises(psycopg.errors.UndefinedObject, match="there is no role") as caught, owner.transaction():
        grant(owner, kind, role)

    assert caught.value.diag.message_detail
    assert (caught.value.diag.message_hint or "").startswith("Nothing was granted.")
    assert acls(owner) == before


def test_who_may_not_grant_is_told_so(owner: Connection) -> None:
    grant(owner, "operator", "operator")
    # PostgreSQL itself would only warn: the operator has a part of what is to be granted.
    owner.execute("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA procrastinate_stalled TO operator")
    before = acls(owner)
    notices: list[str | None] = []
    owner.add_notice_handler(lambda diagnostic: notices.append(diagnostic.message_primary))

    needed = len(rows(owner, "SELECT FROM procrastinate_stalled._privileges(false)"))
    owner.execute("SET LOCAL ROLE operator")
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught, owner.transaction():
        grant(owner, "monitor", "stranger")
    owner.execute("RESET ROLE")

    diagnostic = caught.value.diag
    assert diagnostic.message_primary == 'role "operator" may not grant all that role "stranger" needs'
    assert diagnostic.message_detail == (
        f'It lacks the right to grant {needed} privileges, such as USAGE on "{SCHEMA}".'
    )
    assert diagnostic.message_hint is not None
    assert diagnostic.message_hint.startswith("Nothing was granted. Call it as the owner of these objects (postgres);")
    assert acls(owner) == before
    assert notices == []


def test_who_owns_only_a_part_grants_nothing(owner: Connection) -> None:
    owner.execute("CREATE ROLE app; ALTER TABLE procrastinate_jobs OWNER TO app; GRANT pg_read_all_data TO app")
    hand_over(owner, "app")
    before = acls(owner)

    owner.execute("SET LOCAL ROLE app")
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught, owner.transaction():
        grant(owner, "monitor", "monitor")
    owner.execute("RESET ROLE")

    assert caught.value.diag.message_detail == (
        f'It lacks the right to grant 3 privileges, such as USAGE on "{SCHEMA}".'
    )
    assert acls(owner) == before

    # With grant options it goes without owning them.
    owner.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO app WITH GRANT OPTION").format(sql.Identifier(SCHEMA)))
    owner.execute("GRANT SELECT ON procrastinate_workers, procrastinate_events TO app WITH GRANT OPTION")
    owner.execute("SET LOCAL ROLE app")
    grant(owner, "monitor", "monitor")
    owner.execute("RESET ROLE")
    assert privileges(owner, "monitor") == MONITOR


def hand_over(connection: Connection, role: str) -> None:
    """Give our schema and all that is in it to a role."""
    connection.execute(
        sql.SQL(
            """
            DO $do$
            DECLARE
                statement text;
            BEGIN
                FOR statement IN
                    SELECT format('ALTER ROUTINE %s OWNER TO {0}', oid::regprocedure)
                        FROM pg_proc
                        WHERE pronamespace = 'procrastinate_stalled'::regnamespace
                    UNION ALL
                    SELECT format('ALTER TABLE %s OWNER TO {0}', oid::regclass)
                        FROM pg_class
                        WHERE relnamespace = 'procrastinate_stalled'::regnamespace AND relkind = 'r'
                LOOP
                    EXECUTE statement;
                END LOOP;
                ALTER SCHEMA procrastinate_stalled OWNER TO {0};
            END
            $do$
            """
        ).format(sql.Identifier(role))
    )


def test_who_is_a_member_of_the_owners_may_grant(owner: Connection) -> None:
    owner.execute("CREATE ROLE app; CREATE ROLE admin; GRANT app, pg_read_all_data TO admin; GRANT postgres TO admin")
    hand_over(owner, "app")

    owner.execute("SET LOCAL ROLE admin")
    grant(owner, "operator", "operator")
    owner.execute("RESET ROLE")

    assert privileges(owner, "operator") == OPERATOR


def test_what_was_granted_outlives_an_upgrade_but_for_public_and_what_is_new_is_granted_by_the_next_call(
    owner: Connection,
) -> None:
    grant(owner, "monitor", "monitor")
    grant(owner, "operator", "operator")
    owner.execute(
        """
        GRANT USAGE ON SCHEMA procrastinate_stalled TO PUBLIC;
        GRANT SELECT ON procrastinate_stalled.rescues TO PUBLIC;
        GRANT EXECUTE ON FUNCTION procrastinate_stalled.version TO PUBLIC;
        """
    )

    owner.execute(migration_sql().encode())

    assert privileges(owner, "monitor") == MONITOR
    assert privileges(owner, "operator") == OPERATOR
    assert privileges(owner, "stranger") == set()

    owner.execute(
        """
        CREATE FUNCTION procrastinate_stalled.news() RETURNS text LANGUAGE sql STABLE AS $$ SELECT 'none' $$;
        REVOKE ALL ON FUNCTION procrastinate_stalled.news() FROM PUBLIC;
        """
    )
    assert privileges(owner, "monitor") == MONITOR
    grant(owner, "monitor", "monitor")
    assert privileges(owner, "monitor") == MONITOR | {"EXECUTE news"}


def test_the_hint_of_status_is_enough(owner: Connection) -> None:
    owner.execute(
        """
        GRANT USAGE ON SCHEMA procrastinate_stalled TO stranger;
        GRANT EXECUTE ON FUNCTION procrastinate_stalled.status TO stranger;
        """
    )
    owner.execute("SET LOCAL ROLE stranger")
    hints = {
        check.hint for check in Stalled(owner).status() if check.level == "error" and check.name != "available_since"
    }
    owner.execute("RESET ROLE")
    (hint,) = hints
    assert hint is not None

    statement = hint.removeprefix("As the owner: ")
    assert statement == "SELECT procrastinate_stalled.grant_monitor('stranger');"
    owner.execute(statement.encode())

    owner.execute("SET LOCAL ROLE stranger")
    assert [check for check in Stalled(owner).status() if check.level == "error"] == []


# The role that sweeps

SWEEPER: LiteralString = """
SELECT procrastinate_stalled.grant_operator('worker');
GRANT EXECUTE ON PROCEDURE procrastinate_stalled.sweep TO worker;
GRANT DELETE, UPDATE (id) ON procrastinate_stalled.rescues TO worker;
GRANT DELETE ON procrastinate_stalled.sweeps TO worker;
"""


def test_a_role_of_its_own_can_sweep(database_of_its_own: str) -> None:
    with (
        psycopg.connect(database_of_its_own, autocommit=True) as owner,
        psycopg.connect(database_of_its_own, autocommit=True, user="worker") as sweeper,
    ):
        add_worker(owner)
        lost_jobs(owner)
        add_outdated_records(owner)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            Stalled(sweeper).sweep()
        owner.execute(SWEEPER)

        Stalled(sweeper).sweep()

        actions = rows(owner, "SELECT action, count(*) FROM procrastinate_stalled.rescues GROUP BY 1 ORDER BY 1")
        assert actions == [
            {"action": "aborted", "count": 1},
            {"action": "failed", "count": 2},
            {"action": "retried", "count": 3},
        ]
        assert outdated_records(owner) == 0
        (sweep,) = rows(owner, "SELECT * FROM procrastinate_stalled.sweeps")
        assert "refused" in sweep["error"]
        assert sweep["duration"] is not None


@pytest.mark.parametrize(
    "missing",
    [
        "DELETE ON procrastinate_stalled.rescues",
        "UPDATE (id) ON procrastinate_stalled.rescues",
        "DELETE ON procrastinate_stalled.sweeps",
    ],
)
def test_a_role_that_sweeps_needs_each_of_these_to_purge(missing: str, database_of_its_own: str) -> None:
    with (
        psycopg.connect(database_of_its_own, autocommit=True) as owner,
        psycopg.connect(database_of_its_own, autocommit=True, user="worker") as sweeper,
    ):
        add_outdated_records(owner)
        owner.execute(SWEEPER)
        owner.execute(f"REVOKE {missing} FROM worker".encode())

        with suppress(psycopg.errors.InsufficientPrivilege):
            Stalled(sweeper).sweep()

        assert outdated_records(owner) == 2


# The role that installs


INSTALLER = [
    "CREATE ON DATABASE {database}",
    "USAGE ON SCHEMA {schema}",
    "SELECT ON {schema}.procrastinate_jobs",
    "UPDATE ON {schema}.procrastinate_jobs",
]

# What it needs besides to sweep.
SWEEPING_INSTALLER = [
    "SELECT, UPDATE (id) ON {schema}.procrastinate_workers",
    "SELECT, INSERT (job_id, type, at) ON {schema}.procrastinate_events",
    "USAGE ON SEQUENCE {schema}.procrastinate_events_id_seq",
]


@pytest.fixture
def without_ours(database_of_its_own: str) -> Iterator[Connection]:
    """The owner's connection to a database with Procrastinate, and without this product."""
    with psycopg.connect(database_of_its_own, autocommit=True) as connection:
        connection.execute("SET client_min_messages = warning; DROP SCHEMA procrastinate_stalled CASCADE")
        yield connection


def grant_or_revoke(connection: Connection, verb: str, privilege: LiteralString) -> None:
    names = {"database": sql.Identifier(connection.info.dbname), "schema": sql.Identifier(SCHEMA)}
    direction = {"GRANT": " TO worker", "REVOKE": " FROM worker"}[verb]
    connection.execute(sql.SQL(f"{verb} {privilege}{direction}").format(**names))


def test_a_role_that_does_not_own_procrastinate_can_install_and_sweep(
    without_ours: Connection, database_of_its_own: str
) -> None:
    for privilege in INSTALLER:
        grant_or_revoke(without_ours, "GRANT", privilege)
    conninfo = make_conninfo(database_of_its_own, user="worker")

    assert install(conninfo) != []

    for privilege in SWEEPING_INSTALLER:
        grant_or_revoke(without_ours, "GRANT", privilege)
    pretend_old_server(without_ours)
    add_worker(without_ours)
    job = add_stalled_job(without_ours)
    with psycopg.connect(conninfo, autocommit=True) as installer:
        Stalled(installer).sweep()
        assert get_job(without_ours, job)["status"] == "todo"
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="may not grant all"):
            grant(installer, "monitor", "pg_monitor")


@pytest.mark.parametrize("missing", INSTALLER)
def test_the_role_that_installs_needs_each_of_these(
    missing: LiteralString, without_ours: Connection, database_of_its_own: str
) -> None:
    for privilege in INSTALLER:
        grant_or_revoke(without_ours, "GRANT", privilege)
    grant_or_revoke(without_ours, "REVOKE", missing)

    with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
        install(make_conninfo(database_of_its_own, user="worker"))

    assert caught.value.diag.message_detail
    assert caught.value.diag.message_hint
