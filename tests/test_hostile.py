"""A hostile user: objects of the same names in front of the real ones, and a search_path that finds them first."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from procrastinate_stalled import Stalled, cli, install, uninstall
from procrastinate_stalled.installation import migration_sql, rollback_sql
from tests.jobs import Row, add_job, add_orphan_note, add_rule, add_stalled_job, add_worker, contents, insert, rows
from tests.server import Server, database_name, install_procrastinate
from tests.shadows import CAPTURED, captures, create_shadows
from tests.test_installation import dump_ours

Connection = psycopg.Connection[Any]

TASKS = "tasks"
"""The schema that Procrastinate is in."""

CLEAN_PATH = "pg_catalog, tasks, pg_temp"
"""The path that is pinned."""

# Every shadow is found, in the first one, and in the second one those that PostgreSQL has nothing like.
HOSTILE_PATHS = ["public, pg_catalog, tasks", "public, tasks"]

CALLS: dict[str, LiteralString] = {
    "_available_since": "SELECT procrastinate_stalled._available_since()",
    "_batches": "SELECT * FROM procrastinate_stalled._batches(ARRAY[1, 2], 1)",
    "_begin_sweep": "SELECT procrastinate_stalled._begin_sweep(NULL, NULL, NULL, NULL) IS NOT NULL",
    "_can_sweep": "SELECT procrastinate_stalled._can_sweep(1)",
    "_classify_cron_jobs": """
        SELECT *
            FROM procrastinate_stalled._classify_cron_jobs(
                '[{"jobid": 1, "database": "app", "username": "postgres", "active": true,
                   "command": "CALL procrastinate_stalled.sweep()"}]',
                'app'
            )
    """,
    "_cron_database": "SELECT procrastinate_stalled._cron_database()",
    "_cron_jobs": "SELECT procrastinate_stalled._cron_jobs()",
    "_doing_jobs": "SELECT * FROM procrastinate_stalled._doing_jobs()",
    "_end_of_pause": "SELECT procrastinate_stalled._end_of_pause(rule) FROM procrastinate_stalled.rules AS rule",
    "_end_sweep": """
        SELECT procrastinate_stalled._end_sweep(1, NULL, NULL, NULL, NULL, ids)
            FROM procrastinate_stalled._doing_jobs()
    """,
    "_explained": """
        SELECT procrastinate_stalled._explained(judged)
            FROM procrastinate_stalled._judge(also_running => true) AS judged
    """,
    "_false_rescues": "SELECT * FROM procrastinate_stalled._false_rescues('2000-01-01')",
    "_first_event_since": "SELECT procrastinate_stalled._first_event_since('2000-01-01')",
    "_first_rows": "SELECT procrastinate_stalled._first_rows()",
    "_grant": "SELECT procrastinate_stalled._grant('somebody', true)",
    "_has_privilege": """
        SELECT procrastinate_stalled._has_privilege('somebody', kind, object, column_name, privilege)
            FROM procrastinate_stalled._privileges(true)
    """,
    "_in_words": """
        SELECT procrastinate_stalled._in_words(INTERVAL '100 s'),
               procrastinate_stalled._in_words(TIMESTAMP WITH TIME ZONE '2000-01-01')
    """,
    "_job_name_elsewhere": "SELECT procrastinate_stalled._job_name_elsewhere('app')",
    "_judge": "SELECT * FROM procrastinate_stalled._judge(also_running => true)",
    "_lock_tables": "SELECT procrastinate_stalled._lock_tables()",
    "_note_orphans": """
        SELECT procrastinate_stalled._note_orphans(orphan_ids)
            FROM procrastinate_stalled._doing_jobs()
    """,
    "_notify": "SELECT procrastinate_stalled._notify(ARRAY(SELECT id FROM tasks.procrastinate_jobs))",
    "_privileges": "SELECT * FROM procrastinate_stalled._privileges(true)",
    "_require_login": "SELECT procrastinate_stalled._require_login()",
    "_require_pg_cron": "SELECT procrastinate_stalled._require_pg_cron()",
    "_require_procrastinate": "SELECT procrastinate_stalled._require_procrastinate()",
    "_require_writable": "SELECT procrastinate_stalled._require_writable()",
    "_rescue": """
        SELECT retried, failed, aborted
            FROM procrastinate_stalled._rescue(
                NULL, NULL, NULL, NULL, ARRAY(SELECT id FROM tasks.procrastinate_jobs)
            )
    """,
    "_rescue_batch": """
        SELECT one_by_one, found_no_room, disk_is_full
            FROM procrastinate_stalled._rescue_batch(
                1, NULL, NULL, NULL, NULL, ARRAY(SELECT id FROM tasks.procrastinate_jobs), 0
            )
    """,
    "_seconds": "SELECT procrastinate_stalled._seconds('nb_seconds', 5)",
    "_silent_since": "SELECT procrastinate_stalled._silent_since(NULL, NULL)",
    "_sentence": """
        SELECT procrastinate_stalled._sentence(judged)
            FROM procrastinate_stalled._judge(also_running => true) AS judged
    """,
    "_snapshot_is_held": "SELECT procrastinate_stalled._snapshot_is_held()",
    "_waiting_job": "SELECT * FROM procrastinate_stalled._waiting_job('a')",
    "explain_job": """
        SELECT explained.*
            FROM tasks.procrastinate_jobs AS job
            CROSS JOIN LATERAL procrastinate_stalled.explain_job(job.id) AS explained
            ORDER BY job.id
    """,
    "explain_jobs": "SELECT * FROM procrastinate_stalled.explain_jobs('default')",
    "get_stalled_jobs": "SELECT * FROM procrastinate_stalled.get_stalled_jobs(seconds_since_heartbeat => 60)",
    "grant_monitor": "SELECT procrastinate_stalled.grant_monitor('somebody')",
    "grant_operator": "SELECT procrastinate_stalled.grant_operator('somebody')",
    "pause": "SELECT * FROM procrastinate_stalled.pause('1 hour', 'default', 'task', 'a reason')",
    "resume": "SELECT procrastinate_stalled.resume()",
    "retry_job": """
        SELECT retried.job_id, retried.action, retried.scheduled_at
            FROM (SELECT job_id FROM procrastinate_stalled.explain_jobs() ORDER BY job_id LIMIT 1) AS job
            CROSS JOIN LATERAL procrastinate_stalled.retry_job(job.job_id, queue => 'other', priority => 5) AS retried
    """,
    "retry_stalled_jobs": """
        SELECT job_id, action, reason, detail, rescued_by
            FROM procrastinate_stalled.retry_stalled_jobs(max_jobs => 100)
    """,
    "schedule": "SELECT procrastinate_stalled.schedule()",
    "set_procrastinate_schema": "SELECT procrastinate_stalled.set_procrastinate_schema('tasks')",
    "status": "SELECT * FROM procrastinate_stalled.status()",
    "task_runtimes": "SELECT * FROM procrastinate_stalled.task_runtimes('2000-01-01')",
    "unschedule": "SELECT procrastinate_stalled.unschedule()",
    "version": "SELECT procrastinate_stalled.version()",
    "workers": "SELECT * FROM procrastinate_stalled.workers()",
}

# Of these the search_path does not matter, because nothing in them is looked up in it. That it is pinned all the same
# is tested too, since that will not remain so for ever.
WITHOUT_NAMES = {
    "version": "it returns a constant",
    "grant_monitor": "it calls one function, with its schema",
    "grant_operator": "it calls one function, with its schema",
    "_explained": "it builds a row, and calls one function, with its schema",
    "_first_rows": "it inserts constants into tables that it names with their schema",
}


@pytest.fixture(scope="module")
def besieged(server: Server) -> Iterator[str]:
    """The address of a database with this product, Procrastinate in a schema of its own, and shadows in `public`."""
    with server.database() as conninfo:
        with psycopg.connect(conninfo) as connection:
            connection.execute("CREATE SCHEMA tasks")
        install_procrastinate(make_conninfo(conninfo, options=f"-c search_path={TASKS}"))
        install(conninfo)
        with psycopg.connect(conninfo) as connection:
            # What some functions read, if it is there.
            connection.execute(
                """
                CREATE SCHEMA cron;
                CREATE TABLE cron.job (
                    jobid bigint, schedule text, command text, nodename text, nodeport integer, database text,
                    username text, active boolean, jobname text
                );
                """
            )
            create_shadows(connection, "public", TASKS)
        yield conninfo


@pytest.fixture
def connection(besieged: str) -> Iterator[Connection]:
    """A connection to it, in a transaction that is rolled back, with something for every function to do."""
    with psycopg.connect(besieged) as connection:
        connection.execute("SET LOCAL search_path = pg_catalog, tasks, pg_temp")
        connection.execute("CREATE ROLE somebody")
        add_lost_jobs(connection)
        yield connection
        connection.rollback()


def add_lost_jobs(connection: Connection) -> None:
    """Add jobs, workers, rules and records of all kinds; some of the jobs are stalled, however young the server is."""
    connection.execute("UPDATE procrastinate_stalled.settings SET outage_grace = '0', require_live_worker = false")
    add_rule(connection, "by time", position=5, run_timeout="1 minute", heartbeat_timeout="1 minute", retry_delay="1 s")
    add_rule(connection, "end", position=1, task_name="e%", action="fail", run_timeout="1 minute")
    add_rule(connection, "pause", position=1, task_name="p%", action="ignore", expires_at="2100-01-01")
    add_worker(connection)
    for task_name in ("task", "task", "end", "paused"):
        add_stalled_job(connection, task_name=task_name, started_ago=600, args={"a": [1]})
    add_stalled_job(connection, abort_requested=True, started_ago=600)
    add_stalled_job(connection, queueing_lock="a", started_ago=600, lock="l")
    add_job(connection, "todo", queueing_lock="a")
    add_job(connection, "succeeded")
    add_job(connection, started_ago=600)
    add_job(connection, worker_id=add_worker(connection), started_ago=1)
    add_orphan_note(connection, job_id=4711, attempts=0, seen_ago=3600)
    insert(connection, "sweeps", started_at="2000-01-01", retried=1)
    insert(
        connection,
        "rescues",
        rescued_at="2000-01-01",
        job_id=4711,
        queue_name="default",
        task_name="task",
        action="retried",
        reason="heartbeat",
        attempts=0,
    )
    connection.execute("INSERT INTO cron.job (jobid, jobname) VALUES (1, 'procrastinate_stalled')")


def look_up_in(connection: Connection, path: str) -> None:
    connection.execute("SELECT pg_catalog.set_config('search_path', %s, true)", [path])


def outcome(connection: Connection, path: str, call: Callable[[], object]) -> tuple[object, ...]:
    """What a call returns or raises with a search_path, and what it leaves in the tables. All is undone.

    What differs from one call to the next is left out: ids of new rows, and times that go on within a transaction.
    """
    with connection.transaction(force_rollback=True):
        look_up_in(connection, path)
        answer: object
        try:
            with connection.transaction():
                answer = call()
        except psycopg.Error as error:
            diagnostic = error.diag
            detail = re.sub(r"row contains \(\d+", "row contains (...", diagnostic.message_detail or "")
            answer = (error.sqlstate, diagnostic.message_primary, detail, diagnostic.message_hint)
        look_up_in(connection, CLEAN_PATH)
        return answer, *state(connection)


def state(connection: Connection) -> list[list[Row]]:
    queries: list[LiteralString] = [
        "SELECT * FROM procrastinate_jobs ORDER BY id",
        "SELECT * FROM procrastinate_workers ORDER BY id",
        "SELECT job_id, type FROM procrastinate_events ORDER BY job_id, id",
        """
        SELECT job_id, action, reason, detail, rule_name, rescued_by
            FROM procrastinate_stalled.rescues
            ORDER BY job_id
        """,
        """
        SELECT doing, retried, failed, aborted, waiting, held, held_reason, error, duration IS NULL AS open
            FROM procrastinate_stalled.sweeps
            ORDER BY id
        """,
        "SELECT job_id, attempts FROM procrastinate_stalled.orphans ORDER BY job_id",
        "SELECT * FROM procrastinate_stalled.rules ORDER BY name",
        "SELECT * FROM procrastinate_stalled.settings",
    ]
    return [rows(connection, query) for query in queries]


def execute(connection: Connection, function: str) -> Callable[[], object]:
    return lambda: connection.execute(CALLS[function]).fetchall()


def routines(connection: Connection) -> list[Row]:
    return rows(
        connection,
        """
        SELECT oid::regprocedure::text AS signature,
               proname AS name,
               proconfig AS settings,
               prokind = 'p' AS is_procedure
            FROM pg_proc
            WHERE pronamespace = 'procrastinate_stalled'::regnamespace
            ORDER BY 1
        """,
    )


# Functions


def test_every_function_is_called_here(connection: Connection) -> None:
    functions = {routine["name"] for routine in routines(connection) if not routine["is_procedure"]}

    assert CALLS.keys() == functions
    assert functions >= WITHOUT_NAMES.keys()


def test_every_function_pins_the_search_path_and_the_procedure_cannot(connection: Connection) -> None:
    pinned = {
        routine["signature"]: [setting for setting in routine["settings"] or [] if "search_path" in setting]
        for routine in routines(connection)
    }

    assert pinned.pop("procrastinate_stalled.sweep(integer)") == []
    assert {value for (value,) in pinned.values()} == {"search_path=pg_catalog, tasks, pg_temp"}


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_a_hostile_path_changes_nothing(path: str, connection: Connection) -> None:
    before = captures(connection, "public")

    assert changed_by(connection, path) == {}
    assert captures(connection, "public") == before


def changed_by(connection: Connection, path: str) -> dict[str, tuple[object, ...]]:
    """The functions of which the outcome is not as it is with the path that is pinned, with that outcome."""
    outcomes = {
        function: (outcome(connection, CLEAN_PATH, call), outcome(connection, path, call))
        for function, call in ((function, execute(connection, function)) for function in CALLS)
    }
    return {function: hostile for function, (expected, hostile) in outcomes.items() if hostile != expected}


def test_without_its_pin_a_function_would_be_captured(connection: Connection) -> None:
    untouched = set()
    for routine in routines(connection):
        if routine["is_procedure"]:
            continue
        call = execute(connection, routine["name"])
        expected = outcome(connection, CLEAN_PATH, call)
        with connection.transaction(force_rollback=True):
            connection.execute(f"ALTER FUNCTION {routine['signature']} RESET search_path".encode())
            if outcome(connection, HOSTILE_PATHS[0], call) == expected:
                untouched.add(routine["name"])

    assert untouched == WITHOUT_NAMES.keys()


@pytest.mark.parametrize("path", [CLEAN_PATH.removesuffix(", pg_temp"), "pg_temp, pg_catalog"])
def test_temporary_objects_change_nothing(path: str, connection: Connection) -> None:
    create_shadows(connection, "pg_temp", TASKS)

    assert changed_by(connection, path) == {}
    assert captures(connection, "pg_temp") == 0


def test_the_same_functions_and_operators_in_procrastinates_own_schema_change_nothing(connection: Connection) -> None:
    expected = {function: outcome(connection, CLEAN_PATH, execute(connection, function)) for function in CALLS}
    create_shadows(connection, TASKS, TASKS, fitting=False)

    for function in CALLS:
        assert outcome(connection, CLEAN_PATH, execute(connection, function)) == expected[function]
    assert captures(connection, TASKS) == 0


def test_there_is_something_for_them_to_do(connection: Connection) -> None:
    connection.execute(CALLS["_rescue"])

    rescued = connection.execute("SELECT action, reason FROM procrastinate_stalled.rescues").fetchall()
    assert set(rescued) >= {
        ("retried", "run_timeout"),
        ("failed", "run_timeout"),
        ("aborted", "run_timeout"),
    }


# The procedure, which cannot pin it


@pytest.fixture
def database(besieged: str, server: Server) -> Iterator[str]:
    """The address of a copy of the database, with lost jobs."""
    with server.database(database_name(besieged)) as conninfo:
        with psycopg.connect(conninfo) as connection:
            look_up_in(connection, CLEAN_PATH)
            connection.execute("ALTER SEQUENCE procrastinate_jobs_id_seq RESTART")
            add_lost_jobs(connection)
            # With it the batch fails, and each job is tried alone.
            connection.execute(
                """
                CREATE FUNCTION tasks.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$;
                CREATE TRIGGER refuse BEFORE UPDATE OF worker_id ON procrastinate_jobs
                    FOR EACH ROW WHEN (old.task_name = 'refused' AND old.status = 'doing' AND new.status = 'todo')
                    EXECUTE FUNCTION tasks.refuse();
                """
            )
            add_stalled_job(connection, task_name="refused", started_ago=600)
        yield conninfo


def at_path(conninfo: str, path: str) -> str:
    """The address with a search_path, as PGOPTIONS has it."""
    return make_conninfo(conninfo, options=f"-c search_path={path.replace(' ', '')}")


def swept(conninfo: str, path: str) -> list[list[Row]]:
    with psycopg.connect(at_path(conninfo, CLEAN_PATH)) as connection:
        before = captures(connection, "public")
        with psycopg.connect(at_path(conninfo, path), autocommit=True) as sweeper:
            sweeper.execute("CALL procrastinate_stalled.sweep()")
        assert captures(connection, "public") == before
        return [
            rows(connection, query)
            for query in (
                "SELECT id, status, attempts, worker_id FROM procrastinate_jobs ORDER BY id",
                "SELECT job_id, action, reason, detail FROM procrastinate_stalled.rescues ORDER BY job_id",
                "SELECT doing, retried, failed, aborted, error FROM procrastinate_stalled.sweeps ORDER BY id",
                "SELECT job_id, attempts FROM procrastinate_stalled.orphans ORDER BY job_id",
            )
        ]


def test_a_sweep_with_a_hostile_path_does_the_same(database: str, server: Server) -> None:
    found = []
    for path in (CLEAN_PATH, *HOSTILE_PATHS):
        with server.database(database_name(database)) as copy:
            found.append(swept(copy, path))
    expected, *others = found

    assert others == [expected] * len(HOSTILE_PATHS)
    _jobs, rescues, (sweep,), _orphans = expected
    assert "refused" in sweep["error"]
    assert len(rescues) == sweep["retried"] + sweep["failed"] + sweep["aborted"] >= 5


# What somebody might write into it, in place of what stands there.
CARELESS = [
    (
        "procrastinate_stalled._can_sweep(batch_size)",
        "(procrastinate_stalled._can_sweep(batch_size) AND batch_size > 0)",
    ),
    ("one_by_one boolean;", "one_by_one text;"),
    ("job_id bigint;", "job_id bigint := (SELECT NULL FROM procrastinate_jobs LIMIT 1);"),
    ("ARRAY[job_id]", "ARRAY[round(job_id)::bigint]"),
]


def test_an_operator_a_type_a_table_or_a_function_in_the_procedure_would_be_captured(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        (definition,) = connection.execute(
            "SELECT pg_get_functiondef('procrastinate_stalled.sweep'::regproc)"
        ).fetchone() or ("",)
        for harmless, careless in CARELESS:
            assert definition.count(harmless) == 1
            connection.execute(definition.replace(harmless, careless).encode())

            with pytest.raises(psycopg.errors.DatabaseError) as caught:
                swept(database, HOSTILE_PATHS[0])
            assert caught.value.sqlstate == CAPTURED


# What a job carries


SECRET = "s3cret of a customer"


@pytest.fixture
def secretive(database: str) -> Iterator[Connection]:
    """A connection to that database, in which each job has a secret in its args."""
    with psycopg.connect(at_path(database, CLEAN_PATH), autocommit=True) as connection:
        connection.execute("UPDATE procrastinate_jobs SET args = jsonb_build_object('password', %s::text)", [SECRET])
        yield connection


def our_rows(connection: Connection) -> str:
    """All that is in our tables."""
    ours = {name: found for name, found in contents(connection).items() if name.startswith("procrastinate_stalled.")}
    assert ours.keys() >= {f"procrastinate_stalled.{name}" for name in ("rescues", "sweeps", "orphans", "rules")}
    return str(ours)


def test_the_args_of_jobs_come_into_no_table_of_ours_and_into_no_log(secretive: Connection, server: Server) -> None:
    for call in CALLS.values():
        with secretive.transaction(force_rollback=True):
            secretive.execute("CREATE ROLE somebody")
            with suppress(psycopg.Error), secretive.transaction():
                secretive.execute(call)
            assert SECRET not in our_rows(secretive)

    (refused, *others) = rows(
        secretive, "SELECT id FROM procrastinate_jobs WHERE status = 'doing' ORDER BY task_name <> 'refused', id"
    )
    with pytest.raises(psycopg.errors.RaiseException):
        Stalled(secretive).retry_job(refused["id"])
    with secretive.transaction(force_rollback=True):
        for job in others:
            with suppress(psycopg.errors.UniqueViolation), secretive.transaction():
                Stalled(secretive).retry_job(job["id"])
        assert "manual" in our_rows(secretive)
        assert SECRET not in our_rows(secretive)
    Stalled(secretive).sweep()
    Stalled(secretive).retry_stalled_jobs(seconds_since_heartbeat=0.001)

    found = our_rows(secretive)
    for kind in ("retried", "failed", "aborted", f"job {refused['id']}: refused"):
        assert kind in found
    assert SECRET not in found
    log = (server.folder / "log").read_text()
    assert "ERROR:  refused" in log
    assert SECRET not in log


def test_the_error_of_a_trigger_of_the_users_is_kept_as_it_is_whatever_it_says(secretive: Connection) -> None:
    secretive.execute(
        """
        CREATE OR REPLACE FUNCTION tasks.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE 'refused: %', old.args;
        END;
        $$
        """
    )

    Stalled(secretive).sweep()

    (sweep,) = rows(secretive, "SELECT error FROM procrastinate_stalled.sweeps WHERE error IS NOT NULL")
    assert SECRET in sweep["error"]


# Tables


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_defaults_and_checks_are_those_that_they_were_at_the_install(path: str, connection: Connection) -> None:
    statements: list[LiteralString] = [
        "INSERT INTO procrastinate_stalled.rules (name) VALUES ('new') RETURNING *",
        "INSERT INTO procrastinate_stalled.rules (name) VALUES ('')",
        "INSERT INTO procrastinate_stalled.rules (name, task_name) VALUES ('new', 'a\\')",
        "INSERT INTO procrastinate_stalled.rules (name, heartbeat_timeout) VALUES ('new', '-1 s')",
        "INSERT INTO procrastinate_stalled.rules (name, retry_delay) VALUES ('new', '2 days')",
        "UPDATE procrastinate_stalled.settings SET keep_sweeps = '101 years'",
        """
        INSERT INTO procrastinate_stalled.rescues (job_id, queue_name, task_name, action, reason, attempts)
            VALUES (1, 'default', 'task', 'retried', 'manual', 0)
            RETURNING rescued_at, rescued_by
        """,
        """
        INSERT INTO procrastinate_stalled.rescues (job_id, queue_name, task_name, action, reason, attempts)
            VALUES (1, 'default', 'task', 'robbed', 'manual', 0)
        """,
        "INSERT INTO procrastinate_stalled.orphans (job_id, attempts) VALUES (1, 0) RETURNING job_id",
    ]

    before = captures(connection, "public")
    for statement in statements:
        run = partial(rows, connection, statement)
        assert outcome(connection, path, run) == outcome(connection, CLEAN_PATH, run)
    assert captures(connection, "public") == before


# The ways to a hostile path


def test_the_client_does_the_same_however_its_search_path_was_made_hostile(database: str, server: Server) -> None:
    path = HOSTILE_PATHS[0]
    conninfo = make_conninfo(database, user="victim")
    with psycopg.connect(server.conninfo(), autocommit=True) as superuser:
        superuser.execute("CREATE ROLE victim LOGIN SUPERUSER")
        try:
            expect_the_same_answers(at_path(conninfo, path))
            superuser.execute(f"ALTER ROLE victim SET search_path = {path}".encode())
            expect_the_same_answers(conninfo)
            superuser.execute("ALTER ROLE victim RESET search_path")
            superuser.execute(f"ALTER DATABASE {database_name(database)} SET search_path = {path}".encode())
            expect_the_same_answers(conninfo)
        finally:
            superuser.execute("DROP ROLE victim")


def expect_the_same_answers(conninfo: str) -> None:
    with psycopg.connect(conninfo) as connection:
        path = connection.execute("SHOW search_path").fetchone()
        assert path is not None
        assert path[0].startswith("public")
        before = captures(connection, "public")
        found = answers(connection)
        assert captures(connection, "public") == before

        look_up_in(connection, CLEAN_PATH)
        assert found == answers(connection)


ARGUMENTS: dict[str, dict[str, object]] = {
    "explain_job": {"job_id": 1},
    "explain_jobs": {"queue": "default"},
    "get_stalled_jobs": {"seconds_since_heartbeat": 60, "task_name": "task"},
    "grant_monitor": {"role": "victim"},
    "grant_operator": {"role": "victim"},
    "pause": {"queue": "default", "reason": "a reason"},
    "retry_job": {"job_id": 1, "retry_at": datetime(2100, 1, 1, tzinfo=UTC), "priority": 1, "queue": "q", "lock": "l"},
    "retry_stalled_jobs": {"max_jobs": 5},
    "set_procrastinate_schema": {"schema": TASKS},
    "task_runtimes": {"since": datetime(2000, 1, 1, tzinfo=UTC)},
}


def answers(connection: Connection) -> dict[str, object]:
    """What every method of the client but sweep() returns or raises, without the ids of new rows. All is undone."""
    found: dict[str, object] = {}
    for name, _method in inspect.getmembers(Stalled, inspect.isfunction):
        if name.startswith("_") or name == "sweep":
            continue
        try:
            with connection.transaction(force_rollback=True):
                answer = getattr(Stalled(connection), name)(**ARGUMENTS.get(name, {}))
        except psycopg.Error as error:
            answer = (error.sqlstate, error.diag.message_primary)
        found[name] = re.sub(r"\bid=\d+", "id=...", repr(answer))
    return found


COMMANDS = [
    ("status", cli.ERROR),
    ("list", cli.OK),
    ("explain 1", cli.OK),
    ("workers", cli.OK),
    ("runtimes --since 2000-01-01", cli.OK),
    ("pause --queue default", cli.OK),
    ("resume --queue default", cli.OK),
    ("sweep --dry-run", cli.OK),
    ("retry 1 --queue other --at 2100-01-01", cli.OK),
    ("sweep", cli.WARNING),
    ("grant-monitor pg_monitor", cli.OK),
    ("grant-operator pg_monitor", cli.OK),
    ("set-procrastinate-schema tasks", cli.OK),
    ("rules", cli.OK),
    ("rules add new --heartbeat-timeout 2min", cli.OK),
    ("rules add newer --heartbeat-timeout -2min", cli.FAILED),
    ("rules change default --enabled false", cli.OK),
    ("rules change default --position x", cli.FAILED),
    ("rules remove default", cli.OK),
    ("rules remove default", cli.FAILED),
    ("schedule", cli.FAILED),
    ("unschedule", cli.OK),
]


def test_the_command_line_does_the_same(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--database-url", at_path(database, HOSTILE_PATHS[0])]
    with psycopg.connect(database, autocommit=True) as connection:
        before = captures(connection, "public")

        codes = [(command, cli.run(cli.app, args=[*address, *command.split()])) for command, _code in COMMANDS]

        assert codes == COMMANDS
        assert captures(connection, "public") == before
    printed = capsys.readouterr()
    assert "captured" not in printed.out + printed.err


# Install and uninstall


@pytest.fixture
def not_installed(server: Server) -> Iterator[str]:
    """The address of a database with Procrastinate in a schema of its own, and shadows in `public`."""
    with server.database() as conninfo:
        with psycopg.connect(conninfo) as connection:
            connection.execute("CREATE SCHEMA tasks")
        install_procrastinate(at_path(conninfo, TASKS))
        with psycopg.connect(conninfo) as connection:
            create_shadows(connection, "public", TASKS)
            # Another table of that name is another question, which has a test of its own.
            connection.execute("DROP VIEW public.procrastinate_jobs")
        yield conninfo


@pytest.mark.parametrize("way", ["the package", "the script"])
def test_an_install_and_an_uninstall_with_a_hostile_path_are_the_same(
    way: str, besieged: str, not_installed: str
) -> None:
    def run(script: str, path: str) -> None:
        with psycopg.connect(at_path(not_installed, path)) as connection:
            connection.execute(script.encode())

    with psycopg.connect(not_installed, autocommit=True) as connection:
        for path in HOSTILE_PATHS:
            for _ in range(2):
                if way == "the package":
                    install(at_path(not_installed, path))
                else:
                    run(migration_sql(), path)
            assert dump_ours(not_installed) == dump_ours(besieged)
            assert rows(connection, FOREIGN_DEPENDENCIES) == []

            if way == "the package":
                assert uninstall(at_path(not_installed, path)) is True
            else:
                run(rollback_sql(), path)
            assert connection.execute("SELECT to_regnamespace('procrastinate_stalled')").fetchone() == (None,)
        assert captures(connection, "public") == 0


# What our objects need of others than PostgreSQL and Procrastinate: the operators of a CHECK, for example.
FOREIGN_DEPENDENCIES: LiteralString = """
SELECT pg_describe_object(classid, objid, objsubid) AS object,
       pg_describe_object(refclassid, refobjid, refobjsubid) AS needs
    -- Before PostgreSQL 15 it also has rows for what nobody can drop.
    FROM (SELECT * FROM pg_depend WHERE classid <> 0 OFFSET 0) AS depend
    CROSS JOIN LATERAL pg_identify_object(classid, objid, objsubid) AS object
    CROSS JOIN LATERAL pg_identify_object(refclassid, refobjid, refobjsubid) AS needed
    WHERE object.schema = 'procrastinate_stalled' AND needed.schema = 'public'
"""


# Those who came first


@pytest.fixture
def squatted(not_installed: str) -> Iterator[str]:
    """The address of a database in which somebody who may create schemas made ours first, with code in it."""
    name = database_name(not_installed)
    with psycopg.connect(not_installed, autocommit=True) as connection:
        connection.execute("CREATE ROLE squatter")
        connection.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO squatter").format(sql.Identifier(name)))
        connection.execute(
            """
            GRANT EXECUTE ON FUNCTION public.captured TO squatter;
            SET ROLE squatter;
            CREATE SCHEMA procrastinate_stalled;
            CREATE FUNCTION procrastinate_stalled.version() RETURNS text
                LANGUAGE sql AS $$ SELECT public.captured('version()')::text $$;
            CREATE FUNCTION procrastinate_stalled.unschedule() RETURNS boolean
                LANGUAGE sql AS $$ SELECT public.captured('unschedule()') $$;
            CREATE FUNCTION procrastinate_stalled.write() RETURNS trigger
                LANGUAGE plpgsql AS $$ BEGIN PERFORM public.captured('a trigger'); RETURN NEW; END $$;
            CREATE TABLE procrastinate_stalled.rules (name text, position integer, note text);
            CREATE TRIGGER write BEFORE INSERT ON procrastinate_stalled.rules
                FOR EACH ROW EXECUTE FUNCTION procrastinate_stalled.write();
            -- What yoyo reads before an install, and what an uninstall makes the yoyo command forget.
            CREATE TABLE procrastinate_stalled._yoyo_version AS SELECT 2 AS version, now() AS installed_at_utc;
            CREATE VIEW procrastinate_stalled._yoyo_migration AS
                SELECT public.captured('a view')::text AS migration_hash, 'x' AS migration_id, now() AS applied_at_utc;
            CREATE SCHEMA of_the_squatter;
            CREATE TABLE of_the_squatter._yoyo_migration (migration_id text);
            CREATE FUNCTION of_the_squatter.write() RETURNS trigger
                LANGUAGE plpgsql AS $$ BEGIN PERFORM public.captured('a trigger'); RETURN NULL; END $$;
            CREATE TRIGGER write BEFORE DELETE ON of_the_squatter._yoyo_migration
                FOR EACH STATEMENT EXECUTE FUNCTION of_the_squatter.write();
            GRANT USAGE ON SCHEMA procrastinate_stalled TO PUBLIC;
            GRANT SELECT ON ALL TABLES IN SCHEMA procrastinate_stalled TO PUBLIC;
            RESET ROLE;
            """
        )
        try:
            yield not_installed
        finally:
            connection.execute("DROP OWNED BY squatter CASCADE; DROP ROLE squatter")


def test_an_install_runs_no_code_of_who_made_the_schema_first(squatted: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match='belongs to role "squatter"') as caught:
        install(squatted)

    assert caught.value.diag.message_detail
    assert caught.value.diag.message_hint
    with psycopg.connect(squatted) as connection:
        assert captures(connection, "public") == 0


def test_an_uninstall_runs_no_code_of_who_made_the_schema_first(squatted: str) -> None:
    assert uninstall(squatted) is True

    with psycopg.connect(squatted) as connection:
        assert captures(connection, "public") == 0
        assert connection.execute("SELECT to_regnamespace('procrastinate_stalled')").fetchone() == (None,)


def test_an_install_does_not_take_the_tables_of_somebody_else_for_procrastinates(
    not_installed: str,
) -> None:
    with psycopg.connect(not_installed, autocommit=True) as connection:
        connection.execute(
            """
            CREATE ROLE squatter;
            CREATE TABLE public.procrastinate_jobs (LIKE tasks.procrastinate_jobs);
            ALTER TABLE public.procrastinate_jobs OWNER TO squatter;
            """
        )
        try:
            with pytest.raises(psycopg.errors.InvalidSchemaName) as caught:
                install(not_installed)
        finally:
            connection.execute("DROP OWNED BY squatter CASCADE; DROP ROLE squatter")

    assert "public" in (caught.value.diag.message_detail or "")
    assert "squatter" in (caught.value.diag.message_detail or "")
