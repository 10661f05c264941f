"""`status()`: what each row says when all is well and when it is not, and that it never raises."""

import re
from collections.abc import Callable, Iterator
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from procrastinate_stalled import Stalled, Status, install
from tests.conftest import Connect
from tests.jobs import (
    Connection,
    add_event,
    add_job,
    add_rule,
    add_stalled_job,
    add_worker,
    contents,
    insert,
    rows,
)
from tests.procrastinate_release import AS_OF
from tests.server import FAST, Server, database_name, install_procrastinate, streaming_standby, throwaway_server

NAMES = [
    "procrastinate",
    "schedule",
    "last_sweep",
    "available_since",
    "workers",
    "jobs",
    "given_up",
    "rules",
    "pauses",
    "false_rescues",
]
NAMES_WITH_SCHEDULE = [*NAMES[:2], "last_run", *NAMES[2:]]

HOUR = 3600
DAY = 86400
KEY: dict[str, Any] = {"queueing_lock": "key"}


def check_rows(connection: Connection, names: list[str] = NAMES) -> dict[str, Status]:
    """Ask for all rows, and check what holds for each: it states a fact, and a remedy where something is wrong."""
    status = Stalled(connection).status()
    assert [row.name for row in status] == names
    for row in status:
        assert row.level in {"ok", "warning", "error"}
        assert row.detail
        assert row.hint is None if row.level == "ok" else row.hint, f"The hint of {row} is wrong"
    return {row.name: row for row in status}


def add_sweep(connection: Connection, ago: str, *, duration: str | None = "1 second", error: str | None = None) -> None:
    """Note a sweep that started so long ago."""
    connection.execute(
        """
        INSERT INTO procrastinate_stalled.sweeps (started_at, duration, error)
        VALUES (now() - %s::interval, %s, %s)
        """,
        [ago, duration, error],
    )


def add_given_up_job(connection: Connection, key: str, started_ago: float, silent_for: float = 0) -> None:
    """Add a job in `doing` and another one in `todo` with its queueing lock."""
    worker_id = add_worker(connection, silent_for)
    add_job(connection, worker_id=worker_id, started_ago=started_ago, queueing_lock=key)
    add_job(connection, "todo", queueing_lock=key)


def add_busy_worker(connection: Connection, **columns: Any) -> None:
    """Add a living worker with a job."""
    add_job(connection, worker_id=add_worker(connection), **columns)


def pause(connection: Connection, **arguments: Any) -> None:
    Stalled(connection).pause(**arguments)


def become_a_stranger(connection: Connection) -> None:
    """Go on as a role that may read and do everything here, but is nobody on the server."""
    connection.execute(
        """
        CREATE ROLE stranger;
        GRANT USAGE ON SCHEMA procrastinate_stalled TO stranger;
        GRANT SELECT ON ALL TABLES IN SCHEMA procrastinate_stalled, public TO stranger;
        GRANT EXECUTE ON ALL ROUTINES IN SCHEMA procrastinate_stalled TO stranger;
        SET LOCAL ROLE stranger;
        """
    )


# Without pg_cron


Setup = Callable[[Connection], object]


def nothing(connection: Connection) -> None:
    """All is as the fixture makes it."""
    assert connection


def statement(text: LiteralString) -> Setup:
    return lambda connection: connection.execute(text)


def put(function: Callable[..., object], *arguments: object, **columns: object) -> Setup:
    return lambda connection: function(connection, *arguments, **columns)


def all_of(*setups: Setup) -> Setup:
    return lambda connection: [setup(connection) for setup in setups]


NO_WORKER = statement("DELETE FROM procrastinate_workers")
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S*"

FORMS: dict[str, tuple[str, Setup, str, str, str]] = {
    # name, what happened, level, pattern of the detail, part of the hint
    "found": ("procrastinate", nothing, "ok", f"schema public, as of Procrastinate {AS_OF}", ""),
    "3.3": (
        "procrastinate",
        statement("DROP FUNCTION IF EXISTS procrastinate_retry_job_v2"),
        "ok",
        f"schema public, as of Procrastinate {min(AS_OF, '3.2 or 3.3')}",
        "",
    ),
    "3.1": (
        "procrastinate",
        statement("DROP FUNCTION IF EXISTS procrastinate_retry_job_v2, procrastinate_defer_jobs_v1"),
        "ok",
        "schema public, as of Procrastinate 3.1",
        "",
    ),
    "without its index": (
        "procrastinate",
        statement("DROP INDEX procrastinate_jobs_lock_idx_v1"),
        "warning",
        ".*; its index procrastinate_jobs_lock_idx_v1 is missing, so each sweep reads all jobs that there ever were",
        "Apply all migrations",
    ),
    "gone": (
        "procrastinate",
        statement("DROP TABLE procrastinate_jobs CASCADE"),
        "error",
        r"there is no Procrastinate 3\.1 or later in schema public\. Missing there: procrastinate_jobs\.",
        "Apply its schema if that was dropped",
    ),
    "no pg_cron": (
        "schedule",
        nothing,
        "warning",
        'pg_cron is not installed in database ".*"',
        "or sweep from outside: procrastinate-stalled sweep",
    ),
    "one sweep is no schedule": (
        "schedule",
        put(add_sweep, "1 minute"),
        "warning",
        'pg_cron is not installed in database ".*"',
        "sweep from outside",
    ),
    "one sweep is no schedule, nor is one by a clock that was ahead": (
        "schedule",
        all_of(*[put(add_sweep, ago) for ago in ("-1 day", "1 minute")]),
        "warning",
        'pg_cron is not installed in database ".*"',
        "sweep from outside",
    ),
    "something else sweeps": (
        "schedule",
        all_of(*[put(add_sweep, ago) for ago in ("59 minutes", "1 minute")]),
        "ok",
        'pg_cron is not installed in database ".*"; something else sweeps: see last_sweep',
        "",
    ),
    "something else swept": (
        "schedule",
        all_of(*[put(add_sweep, ago) for ago in ("61 minutes", "1 minute")]),
        "warning",
        'pg_cron is not installed in database ".*"',
        "sweep from outside",
    ),
    "no sweep": (
        "last_sweep",
        nothing,
        "warning",
        "there is no record of a sweep",
        "See the row schedule. By hand: CALL procrastinate_stalled.sweep();",
    ),
    "a sweep": (
        "last_sweep",
        all_of(put(add_sweep, "2 days", error="old"), put(add_sweep, "192 seconds")),
        "ok",
        f"{TIME}, 3 min 12 s ago",
        "",
    ),
    "a sweep that is running": (
        "last_sweep",
        put(add_sweep, "10 minutes", duration=None),
        "ok",
        f"{TIME}, 10 min ago",
        "",
    ),
    "a sweep that never ended": (
        "last_sweep",
        put(add_sweep, "11 minutes", duration=None),
        "warning",
        f"the sweep of {TIME} has not ended in 11 min",
        "It is still running",
    ),
    "a sweep with an error": (
        "last_sweep",
        put(add_sweep, "1 minute", error="job 1: refused (P0001)"),
        "warning",
        re.escape("job 1: refused (P0001)"),
        "Remove the cause",
    ),
    "an hour without a sweep": (
        "last_sweep",
        put(add_sweep, "1 hour", error=None),
        "ok",
        f"{TIME}, 1 h ago",
        "",
    ),
    "more than an hour without a sweep": (
        "last_sweep",
        put(add_sweep, "61 minutes", error="e"),
        "warning",
        f"the last sweep was at {TIME}, 1 h 1 min ago",
        "See the rows schedule and last_run.",
    ),
    "a day without a sweep": (
        "last_sweep",
        put(add_sweep, "25 hours"),
        "error",
        f"the last sweep was at {TIME}, 1 d 1 h ago",
        "See the rows schedule and last_run.",
    ),
    "no table of sweeps": (
        "last_sweep",
        statement("DROP TABLE procrastinate_stalled.sweeps"),
        "error",
        'relation "procrastinate_stalled.sweeps" does not exist',
        "The installation is damaged.",
    ),
    "precise": (
        "available_since",
        statement("SET LOCAL tests.available_since = '2026-01-02 03:04:05+00'; SET LOCAL TimeZone = 'UTC'"),
        "ok",
        re.escape("the server has been available since 2026-01-02 03:04:05+00"),
        "",
    ),
    "approximate": (
        "available_since",
        become_a_stranger,
        "warning",
        ".*; role stranger cannot see whether it has recovered from a crash or was promoted since",
        "As a superuser: GRANT pg_read_all_stats TO stranger;",
    ),
    "precise by membership": (
        "available_since",
        all_of(become_a_stranger, statement("RESET ROLE; GRANT pg_read_all_stats TO stranger; SET ROLE stranger")),
        "ok",
        "the server has been available since .*",
        "",
    ),
    "unknown": (
        "available_since",
        statement("DROP FUNCTION procrastinate_stalled._available_since()"),
        "error",
        r"function procrastinate_stalled._available_since\(\) does not exist",
        "The installation is damaged.",
    ),
    "a worker": ("workers", nothing, "ok", "1 alive, 0 silent for 30 s, 0 of these with jobs in doing", ""),
    "workers of all kinds": (
        "workers",
        all_of(
            put(add_busy_worker),
            put(add_stalled_job, silent_for=31),
            put(add_worker, silent_for=31),
        ),
        "ok",
        "2 alive, 2 silent for 30 s, 1 of these with jobs in doing",
        "",
    ),
    "no worker": (
        "workers",
        NO_WORKER,
        "warning",
        "0 alive, 0 silent for 30 s, 0 of these with jobs in doing",
        "Start a worker",
    ),
    "only silent workers": (
        "workers",
        all_of(NO_WORKER, put(add_stalled_job)),
        "warning",
        "0 alive, 1 silent for 30 s, 1 of these with jobs in doing",
        "Start a worker",
    ),
    "no table of workers": (
        "workers",
        statement("DROP TABLE procrastinate_workers CASCADE"),
        "error",
        r"there is no Procrastinate 3\.1 or later in schema public",
        "See the row procrastinate.",
    ),
    "no jobs": ("jobs", nothing, "ok", "0 in doing, 0 stalled, 0 held", ""),
    "running jobs": (
        "jobs",
        all_of(
            put(add_stalled_job, silent_for=10),
            put(add_job),
            put(add_job, "todo"),
        ),
        "ok",
        "2 in doing, 0 stalled, 0 held",
        "",
    ),
    "ignored jobs": (
        "jobs",
        all_of(
            put(add_rule, "hands off", task_name="ignored", action="ignore"),
            put(add_stalled_job, silent_for=300, task_name="ignored"),
            put(add_busy_worker, task_name="ignored"),
        ),
        "ok",
        "2 in doing, 0 stalled, 0 held",
        "",
    ),
    "ignored jobs of silent workers and of none": (
        "jobs",
        all_of(
            # Whatever the other rules wait for.
            statement("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '1 day'"),
            put(add_rule, "hands off", task_name="ignored", action="ignore"),
            put(add_stalled_job, silent_for=301, task_name="ignored"),
            put(add_job, task_name="ignored"),
            put(add_stalled_job),
        ),
        "warning",
        "3 in doing, 0 stalled, 0 held, 2 ignored by the rules though the worker is silent or gone",
        (
            "No sweep touches the ignored ones; decide yourself: SELECT * FROM "
            "procrastinate_stalled.get_stalled_jobs(seconds_since_heartbeat => 300) WHERE action = 'ignore';"
        ),
    ),
    "jobs without a rule": (
        "jobs",
        all_of(statement("DELETE FROM procrastinate_stalled.rules"), put(add_stalled_job)),
        "warning",
        "1 in doing, 0 stalled, 0 held, 1 ignored by the rules though the worker is silent or gone",
        "get_stalled_jobs(seconds_since_heartbeat => 300) WHERE action = 'ignore'",
    ),
    "stalled and ignored jobs": (
        "jobs",
        all_of(
            put(add_rule, "hands off", task_name="ignored", action="ignore"),
            put(add_stalled_job, task_name="ignored"),
            put(add_stalled_job),
            put(add_sweep, "1 minute"),
        ),
        "warning",
        "2 in doing, 1 stalled, 0 held, 1 ignored by the rules though the worker is silent or gone",
        "explain_jobs() WHERE verdict IN ('stalled', 'held'); No sweep touches the ignored ones",
    ),
    "paused jobs are not ignored": (
        "jobs",
        all_of(put(add_stalled_job), put(pause)),
        "warning",
        r"1 in doing, 0 stalled, 1 held \(pause\)",
        "explain_jobs() WHERE verdict IN ('stalled', 'held');",
    ),
    "stalled jobs": (
        "jobs",
        all_of(put(add_stalled_job, silent_for=300 + HOUR), put(add_sweep, "1 minute")),
        "warning",
        "1 in doing, 1 stalled, 0 held",
        "explain_jobs() WHERE verdict IN ('stalled', 'held')",
    ),
    "jobs that wait": (
        "jobs",
        all_of(
            statement("UPDATE procrastinate_stalled.rules SET on_duplicate = 'wait'"),
            all_of(
                put(add_stalled_job, silent_for=2 * HOUR, **KEY),
                put(add_job, "todo", **KEY),
                put(add_stalled_job, silent_for=400),
                put(add_sweep, "59 minutes"),
            ),
        ),
        "warning",
        r"2 in doing, 2 stalled \(1 of them wait for a job with the same queueing lock\), 0 held",
        "explain_jobs()",
    ),
    "held jobs": (
        "jobs",
        all_of(
            NO_WORKER,
            all_of(
                put(add_stalled_job),
                put(add_stalled_job, silent_for=2 * HOUR),
                put(add_stalled_job, queue_name="mail"),
                put(pause, queue="mail"),
            ),
        ),
        "warning",
        r"3 in doing, 0 stalled, 3 held \(no living worker, pause queue 'mail'\)",
        "explain_jobs()",
    ),
    "stalled jobs that nobody sweeps": (
        "jobs",
        all_of(put(add_stalled_job, silent_for=301), put(add_sweep, "61 minutes")),
        "error",
        "1 in doing, 1 stalled, 0 held; and there was no sweep in the last hour",
        "See the rows schedule, last_run and last_sweep.",
    ),
    "stalled jobs, and a sweep by a clock that was ahead": (
        "jobs",
        all_of(put(add_stalled_job, silent_for=301), put(add_sweep, "-1 day")),
        "error",
        "1 in doing, 1 stalled, 0 held; and there was no sweep in the last hour",
        "See the rows schedule, last_run and last_sweep.",
    ),
    "no table of rules for the jobs": (
        "jobs",
        statement("DROP TABLE procrastinate_stalled.rules CASCADE"),
        "error",
        'relation "procrastinate_stalled.rules" does not exist',
        "The installation is damaged.",
    ),
    "nothing was given up": (
        "given_up",
        all_of(
            put(add_busy_worker, started_ago=DAY, **KEY),
            put(add_job, "todo", queueing_lock="other"),
            # Its worker will be found dead, or there is none.
            put(add_given_up_job, "silent", started_ago=DAY, silent_for=31),
            put(add_job, started_ago=DAY, queueing_lock="orphan"),
            put(add_job, "todo", queueing_lock="orphan"),
        ),
        "ok",
        "0 running under a living worker while a job with the same queueing lock waits",
        "",
    ),
    "it may run": (
        "given_up",
        put(add_given_up_job, "key", started_ago=300),
        "ok",
        r"1 running .* while a job with the same queueing lock waits: job \d+ \(for 5 min, while job \d+ waits\)",
        "",
    ),
    "it was given up": (
        "given_up",
        all_of(
            put(add_given_up_job, "key", started_ago=301),
            put(add_given_up_job, "older", started_ago=HOUR),
        ),
        "warning",
        r"2 running .*: job \d+ \(for 1 h, while job \d+ waits\), job \d+ \(for 5 min 1 s, while job \d+ waits\)",
        "Procrastinate issue 1446",
    ),
    "under a rule that waits longer": (
        "given_up",
        all_of(
            statement("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '2 hours'"),
            put(add_given_up_job, "key", started_ago=HOUR),
        ),
        "ok",
        "1 running under .*",
        "",
    ),
    "under a rule without heartbeat_timeout": (
        "given_up",
        all_of(
            statement("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = NULL"),
            put(add_given_up_job, "key", started_ago=301),
        ),
        "warning",
        "1 running under .*",
        "Procrastinate issue 1446",
    ),
    "more were given up than fit": (
        "given_up",
        all_of(*[put(add_given_up_job, f"{number}", HOUR + number) for number in range(6)]),
        "warning",
        r"6 running under .* waits: job \d+( \(for 1 h, while job \d+ waits\), job \d+){4} \([^)]*\), \.\.\.",
        "SET search_path = public; SELECT procrastinate_finish_job_v1(",
    ),
    "no table of events": (
        "given_up",
        statement("DROP TABLE procrastinate_events CASCADE"),
        "error",
        r"there is no Procrastinate 3\.1 or later in schema public",
        "See the row procrastinate.",
    ),
    "a rule": ("rules", nothing, "ok", "1 in force", ""),
    "rules that do not count": (
        "rules",
        all_of(
            put(add_rule, "off", enabled=False, heartbeat_timeout="1 second"),
            put(add_rule, "over", expires_at="yesterday", max_rescues=None),
            put(add_rule, "never", action="ignore", heartbeat_timeout="1 second"),
            put(add_rule, "soon over", expires_at="tomorrow", heartbeat_timeout="30 seconds"),
            put(add_rule, "fail", action="fail", max_rescues=None),
        ),
        "ok",
        "3 in force",
        "",
    ),
    "a hasty rule": (
        "rules",
        put(add_rule, "hasty", heartbeat_timeout="29.999 seconds"),
        "warning",
        '2 in force; "hasty" waits only 29 s',
        "A worker beats every 10 s",
    ),
    "an endless rule": (
        "rules",
        put(add_rule, "endless", max_rescues=None),
        "warning",
        '2 in force; "endless" retries without limit',
        "set max_rescues",
    ),
    "hasty and endless rules": (
        "rules",
        all_of(
            *[
                put(add_rule, name, max_rescues=None, heartbeat_timeout=f"{number} seconds")
                for name, number in (("a", 1), ("b", 2))
            ]
        ),
        "warning",
        '3 in force; "a" waits only 1 s; "b" waits only 2 s; "a" retries without limit; "b" retries without limit',
        "robs a busy one. A job that kills its workers goes on killing them: set max_rescues.",
    ),
    "no rule": (
        "rules",
        all_of(
            statement("UPDATE procrastinate_stalled.rules SET enabled = false"),
            put(add_rule, "never", action="ignore"),
        ),
        "error",
        "no rule is in force that calls any job stalled",
        "INSERT INTO procrastinate_stalled.rules (name, position) VALUES ('default', 2147483647) ON CONFLICT",
    ),
    "no table of rules": (
        "rules",
        statement("DROP TABLE procrastinate_stalled.rules CASCADE"),
        "error",
        'relation "procrastinate_stalled.rules" does not exist',
        "The installation is damaged.",
    ),
    "no pause": (
        "pauses",
        all_of(
            put(add_rule, "over", action="ignore", expires_at="yesterday"),
            put(add_rule, "off", action="ignore", expires_at="tomorrow", enabled=False),
            put(add_rule, "never", action="ignore"),
        ),
        "ok",
        "none",
        "",
    ),
    "pauses": (
        "pauses",
        all_of(
            put(add_rule, "night", action="ignore", expires_at="tomorrow"),
            put(pause, queue="mail", reason="deployment"),
        ),
        "warning",
        f'"pause queue \'mail\'" \\(deployment\\) until {TIME}; "night" until {TIME}',
        (
            "To end it: SELECT procrastinate_stalled.resume(queue => 'mail'); "
            "DELETE FROM procrastinate_stalled.rules WHERE name = 'night';"
        ),
    ),
    "no table of pauses": (
        "pauses",
        statement("DROP TABLE procrastinate_stalled.rules CASCADE"),
        "error",
        'relation "procrastinate_stalled.rules" does not exist',
        "The installation is damaged.",
    ),
    # The other forms of this row: tests.test_history.
    "no table of rescues": (
        "false_rescues",
        statement("DROP TABLE procrastinate_stalled.rescues CASCADE"),
        "error",
        r"function procrastinate_stalled\._false_rescues\(.*\) does not exist",
        "The installation is damaged.",
    ),
}


@pytest.mark.parametrize(("name", "setup", "level", "detail", "hint"), FORMS.values(), ids=FORMS)
def test_each_row_has_its_forms(
    transaction: Connection, name: str, setup: Setup, level: str, detail: str, hint: str
) -> None:
    setup(transaction)
    row = check_rows(transaction)[name]
    assert row.level == level
    assert re.fullmatch(detail, row.detail), row.detail
    assert hint in (row.hint or "")


def test_a_job_that_was_given_up_is_touched_by_a_run_timeout_only(transaction: Connection) -> None:
    add_given_up_job(transaction, "key", started_ago=HOUR)
    assert Stalled(transaction).retry_stalled_jobs() == []
    transaction.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '1 hour'")
    assert [rescue.reason for rescue in Stalled(transaction).retry_stalled_jobs()] == ["run_timeout"]


# It never raises


# What may be missing: statements, each of which takes one thing away.
MISSING = {
    "tables": """
        SELECT format('DROP TABLE %s CASCADE', oid::regclass)
        FROM pg_class
        WHERE relkind = 'r' AND relnamespace IN ('public'::regnamespace, 'procrastinate_stalled'::regnamespace)
            AND relname !~ 'yoyo|periodic_defers'
    """,
    "columns": """
        SELECT format('ALTER TABLE %s RENAME %I TO away', attrelid::regclass, attname)
        FROM pg_attribute
        JOIN pg_class AS class ON class.oid = attrelid
        WHERE relkind = 'r' AND relnamespace IN ('public'::regnamespace, 'procrastinate_stalled'::regnamespace)
            AND attnum > 0
    """,
    "routines": """
        SELECT format('DROP ROUTINE %s CASCADE', oid::regprocedure)
        FROM pg_proc
        WHERE pronamespace IN ('public'::regnamespace, 'procrastinate_stalled'::regnamespace)
            AND oid <> 'procrastinate_stalled.status()'::regprocedure
    """,
    "types": """
        SELECT format('DROP TYPE %s CASCADE', type.oid::regtype)
        FROM pg_type AS type
        LEFT JOIN pg_class AS class ON class.oid = typrelid
        WHERE typnamespace IN ('public'::regnamespace, 'procrastinate_stalled'::regnamespace)
            AND typcategory <> 'A' AND (class.relkind IS NULL OR class.relkind = 'c')
    """,
    "rows": """
        SELECT format('DELETE FROM %s', oid::regclass)
        FROM pg_class
        WHERE relkind = 'r' AND relnamespace IN ('public'::regnamespace, 'procrastinate_stalled'::regnamespace)
    """,
}

# What a role may be forbidden.
FORBIDDEN = {
    "tables": """
        SELECT format('REVOKE SELECT ON %s FROM stranger', oid::regclass)
        FROM pg_class
        WHERE relkind = 'r' AND relnamespace IN ('public'::regnamespace, 'procrastinate_stalled'::regnamespace)
    """,
    "routines": """
        SELECT format('REVOKE EXECUTE ON ROUTINE %s FROM stranger, PUBLIC', oid::regprocedure)
        FROM pg_proc
        WHERE pronamespace IN ('public'::regnamespace, 'procrastinate_stalled'::regnamespace)
            AND oid <> 'procrastinate_stalled.status()'::regprocedure
    """,
    "the server's": """
        SELECT format('REVOKE SELECT ON %s FROM PUBLIC', name)
        FROM unnest(ARRAY['pg_stat_activity', 'pg_roles', 'pg_extension', 'pg_class', 'pg_settings']) AS name
        UNION ALL
        SELECT format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', name)
        FROM unnest(ARRAY[
            'pg_postmaster_start_time()',
            'pg_stat_get_activity(integer)',
            'current_setting(text, boolean)',
            'has_table_privilege(name, text, text)',
            'pg_has_role(name, name, text)',
            'to_regclass(text)',
            'to_regproc(text)'
        ]) AS name
        UNION ALL
        SELECT 'REVOKE USAGE ON SCHEMA public FROM PUBLIC'
    """,
}


def populate(connection: Connection) -> None:
    """Put something into every row of `status()`."""
    add_given_up_job(connection, "key", started_ago=HOUR)
    add_stalled_job(connection)
    job = add_job(connection, "succeeded")
    add_event(connection, job, "deferred_for_retry", 60)
    insert(
        connection,
        "rescues",
        job_id=job,
        queue_name="q",
        task_name="t",
        action="retried",
        reason="heartbeat",
        attempts=0,
    )
    add_sweep(connection, "1 minute")
    Stalled(connection).pause(queue="mail")


def without_each(connection: Connection, query: LiteralString) -> Iterator[str]:
    """Take away one thing after the other; yields what was taken away."""
    taken = [row[0] for row in connection.execute(query).fetchall()]
    assert len(taken) > 4
    for what in taken:
        with connection.transaction(force_rollback=True):
            connection.execute(what)
            yield what


@pytest.fixture
def as_installed(procrastinate_database: str) -> Iterator[Connection]:
    """A connection to a database which knows how young its server is."""
    install(procrastinate_database)
    with psycopg.connect(procrastinate_database) as connection:
        add_worker(connection)
        populate(connection)
        yield connection
        connection.rollback()


@pytest.mark.parametrize("query", MISSING.values(), ids=MISSING)
def test_whatever_is_missing_it_answers(transaction: Connection, query: LiteralString) -> None:
    populate(transaction)
    complete = check_rows(transaction)
    changed = 0
    for what in without_each(transaction, query):
        status = check_rows(transaction)
        changed += status != complete
        if what.startswith("DROP TABLE"):
            assert "error" in {row.level for row in status.values()}, what
    assert changed > 2


@pytest.mark.parametrize("query", FORBIDDEN.values(), ids=FORBIDDEN)
def test_whatever_is_forbidden_it_answers(as_installed: Connection, query: LiteralString) -> None:
    become_a_stranger(as_installed)
    complete = check_rows(as_installed)
    as_installed.execute("RESET ROLE")
    changed = 0
    for _ in without_each(as_installed, query):
        as_installed.execute("SET LOCAL ROLE stranger")
        changed += check_rows(as_installed) != complete
    assert changed > 2


@pytest.mark.parametrize(
    ("forbidden", "level"),
    [
        ("SELECT ON pg_stat_activity", "warning"),
        ("EXECUTE ON FUNCTION pg_stat_get_activity(integer)", "warning"),
        ("EXECUTE ON FUNCTION pg_postmaster_start_time()", "error"),
    ],
)
def test_without_the_start_of_the_server_no_job_can_be_judged(
    as_installed: Connection, forbidden: LiteralString, level: str
) -> None:
    as_installed.execute(f"REVOKE {forbidden} FROM PUBLIC")
    become_a_stranger(as_installed)
    status = check_rows(as_installed)
    assert status["available_since"].level == level
    assert (status["jobs"].level == "error") == (level == "error")


def test_a_role_without_any_rights_gets_its_rows(transaction: Connection) -> None:
    populate(transaction)
    transaction.execute(
        """
        CREATE ROLE stranger;
        GRANT USAGE ON SCHEMA procrastinate_stalled TO stranger;
        GRANT EXECUTE ON FUNCTION procrastinate_stalled.status() TO stranger;
        SET LOCAL ROLE stranger;
        """
    )
    levels = {name: row.level for name, row in check_rows(transaction).items()}
    assert levels == dict.fromkeys(NAMES, "error") | {"schedule": "warning"}


def test_an_empty_database_is_told_without_an_exception(transaction: Connection) -> None:
    transaction.execute("DROP TABLE procrastinate_jobs, procrastinate_workers, procrastinate_events CASCADE")
    levels = {name: row.level for name, row in check_rows(transaction).items()}
    assert {name for name, level in levels.items() if level == "error"} == {
        "procrastinate",
        "workers",
        "jobs",
        "given_up",
        "false_rescues",
    }


def test_it_works_where_nothing_can_be_written(transaction: Connection) -> None:
    populate(transaction)
    before, writable = contents(transaction), check_rows(transaction)
    transaction.execute("SET LOCAL transaction_read_only = on")
    assert check_rows(transaction) == writable
    assert contents(transaction) == before


def test_it_works_on_a_standby(database: str, connection: Connection, server: Server) -> None:
    populate(connection)
    expected = {name: row.level for name, row in check_rows(connection).items()}
    with (
        streaming_standby(server) as standby,
        psycopg.connect(standby.conninfo(database_name(database))) as copy,
    ):
        assert {name: row.level for name, row in check_rows(copy).items()} == expected


# With pg_cron


@pytest.fixture
def cron(cron_database: str) -> Iterator[Connection]:
    """A connection to the database of pg_cron."""
    with psycopg.connect(cron_database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def scheduled(cron: Connection) -> Connection:
    """A connection to a database whose sweep is scheduled once a year, so that pg_cron does not run it meanwhile."""
    Stalled(cron).schedule(schedule="0 0 31 12 *")
    return cron


def add_run(connection: Connection, status: str, message: str = "CALL", end: str | None = "now") -> None:
    """Note a run of the pg_cron job, as pg_cron does."""
    connection.execute(
        """
        INSERT INTO cron.job_run_details (jobid, runid, database, username, command, status, return_message, start_time,
                                          end_time)
        SELECT jobid, nextval('cron.runid_seq'), database, username, command, %s, %s, %s, %s FROM cron.job
        """,
        [status, message, end, end],
    )


def test_without_a_schedule_the_remedy_is_named(cron: Connection) -> None:
    assert check_rows(cron)["schedule"] == Status(
        "schedule",
        "warning",
        'pg_cron has no job "procrastinate_stalled" that this role can see',
        "SELECT procrastinate_stalled.schedule();",
    )
    add_sweep(cron, "1 minute")
    add_sweep(cron, "2 minutes")
    assert check_rows(cron)["schedule"].level == "ok"


def test_a_schedule_is_ok(scheduled: Connection) -> None:
    row = check_rows(scheduled, NAMES_WITH_SCHEDULE)["schedule"]
    assert (row.level, row.hint) == ("ok", None)
    assert re.fullmatch(r'pg_cron job \d+, "0 0 31 12 \*", as role postgres', row.detail)


def test_an_inactive_schedule_is_an_error(scheduled: Connection) -> None:
    scheduled.execute("UPDATE cron.job SET active = false")
    row = check_rows(scheduled, NAMES_WITH_SCHEDULE)["schedule"]
    assert row.level == "error"
    assert re.fullmatch(r"pg_cron job \d+ of role postgres is not active", row.detail)
    assert row.hint == "SELECT procrastinate_stalled.schedule(); activates it again."


def test_a_schedule_of_a_role_that_cannot_log_in_is_an_error(scheduled: Connection) -> None:
    with scheduled.transaction(force_rollback=True):
        scheduled.execute('CREATE ROLE "No Login" NOLOGIN')
        scheduled.execute("UPDATE cron.job SET username = 'No Login'")
        status = check_rows(scheduled, NAMES_WITH_SCHEDULE)
        row = status["schedule"]
        assert row.level == "error"
        assert re.fullmatch(
            r"pg_cron job \d+ runs as role No Login, which cannot log in, so every run fails", row.detail
        )
        assert row.hint == 'ALTER ROLE "No Login" LOGIN; or unschedule it, and schedule it as another role.'
        # What the sweeps can see is what counts, not what the one who asks can.
        assert status["available_since"].level == "warning"
        assert status["available_since"].hint == 'As a superuser: GRANT pg_read_all_stats TO "No Login";'


def test_of_several_schedules_the_active_one_is_shown(scheduled: Connection) -> None:
    with scheduled.transaction(force_rollback=True):
        scheduled.execute("UPDATE cron.job SET active = false, username = 'somebody'")
        Stalled(scheduled).schedule()
        assert check_rows(scheduled, NAMES_WITH_SCHEDULE)["schedule"].level == "ok"


@pytest.mark.parametrize("change", ["jobname = 'other', command = 'SELECT 1'", "database = 'other'"])
def test_a_job_of_another_kind_or_database_is_no_schedule(scheduled: Connection, change: LiteralString) -> None:
    with scheduled.transaction(force_rollback=True):
        scheduled.execute(f"UPDATE cron.job SET {change}")
        assert check_rows(scheduled)["schedule"].level == "warning"


def test_a_job_of_another_name_that_sweeps_this_database_is_a_schedule(scheduled: Connection) -> None:
    with scheduled.transaction(force_rollback=True):
        scheduled.execute("UPDATE cron.job SET jobname = 'other'")
        assert check_rows(scheduled, NAMES_WITH_SCHEDULE)["schedule"].level == "ok"


@pytest.fixture
def role(cron: Connection) -> Iterator[str]:
    """A role without any rights."""
    cron.execute("CREATE ROLE somebody LOGIN")
    yield "somebody"
    cron.execute("DROP OWNED BY somebody; DROP ROLE somebody")


Grant = Callable[[Connection, str], object]


def let_look(cron: Connection, role: str) -> None:
    Stalled(cron).grant_monitor(role)


def let_retry(cron: Connection, role: str) -> None:
    Stalled(cron).grant_operator(role)


def let_look_and_use_pg_cron(cron: Connection, role: str) -> None:
    Stalled(cron).grant_monitor(role)
    cron.execute(f"GRANT USAGE ON SCHEMA cron TO {role}".encode())


MAY_NOT_SWEEP: dict[str, tuple[Grant, str]] = {
    "monitor": (let_look, 'role "somebody" may not use pg_cron'),
    "operator": (let_retry, 'role "somebody" may not use pg_cron'),
    "monitor who may use pg_cron": (
        let_look_and_use_pg_cron,
        'pg_cron has no job "procrastinate_stalled" that this role can see',
    ),
}


@pytest.mark.parametrize(("grant", "reason"), MAY_NOT_SWEEP.values(), ids=MAY_NOT_SWEEP)
def test_to_who_may_not_sweep_all_is_well_while_somebody_does(
    cron_database: str, scheduled: Connection, role: str, grant: Grant, reason: str
) -> None:
    add_worker(scheduled)
    add_sweep(scheduled, "2 minutes")
    grant(scheduled, role)
    with psycopg.connect(cron_database, user=role, autocommit=True) as connection:
        # One sweep is no schedule.
        levels = {name: row.level for name, row in check_rows(connection).items()}
        assert levels == dict.fromkeys(NAMES, "ok") | {"schedule": "warning", "available_since": "warning"}

        add_sweep(scheduled, "1 minute")

        status = check_rows(connection)
        assert {name: row.level for name, row in status.items()} == dict.fromkeys(NAMES, "ok")
        assert status["schedule"].detail == f"{reason}; who sweeps is not visible to this role: see last_sweep"
        assert "; whether it has recovered from a crash or was promoted since is not visible to this role" in (
            status["available_since"].detail
        )


def test_who_may_sweep_is_warned_that_it_cannot_see_crash_recoveries(
    cron_database: str, scheduled: Connection, role: str
) -> None:
    add_worker(scheduled)
    for ago in ("2 minutes", "1 minute"):
        add_sweep(scheduled, ago)
    Stalled(scheduled).grant_operator(role)
    scheduled.execute(f"GRANT EXECUTE ON PROCEDURE procrastinate_stalled.sweep TO {role}".encode())
    with psycopg.connect(cron_database, user=role, autocommit=True) as connection:
        status = check_rows(connection)
    assert status["schedule"].detail.endswith("; something else sweeps: see last_sweep")
    assert status["available_since"].level == "warning"
    assert status["available_since"].hint == "As a superuser: GRANT pg_read_all_stats TO somebody;"


def test_pg_cron_in_another_database_is_told(other_database_on_cron_server: str) -> None:
    with psycopg.connect(other_database_on_cron_server) as connection:
        row = check_rows(connection)["schedule"]
    assert row.level == "warning"
    assert row.detail.startswith('pg_cron is not in database "')
    assert "cron.schedule_in_database" in (row.hint or "")


def last_run(connection: Connection) -> Status:
    return check_rows(connection, NAMES_WITH_SCHEDULE)["last_run"]


def test_the_last_run_of_pg_cron_is_told_with_its_error(scheduled: Connection) -> None:
    assert last_run(scheduled).detail == "pg_cron has not run the job yet"
    assert last_run(scheduled).level == "warning"

    add_run(scheduled, "succeeded")
    assert last_run(scheduled).level == "ok"
    assert re.fullmatch(f"succeeded at {TIME}", last_run(scheduled).detail)

    for status in ("starting", "running", "connecting", "sending"):
        add_run(scheduled, status)
        assert last_run(scheduled).level == "ok"

    add_run(scheduled, "failed", "ERROR:  something\n")
    assert last_run(scheduled).level == "error"
    assert re.fullmatch(f"failed at {TIME}: ERROR:  something", last_run(scheduled).detail)
    assert "shows the same error" in (last_run(scheduled).hint or "")

    add_run(scheduled, "failed", "connection failed", end=None)
    assert last_run(scheduled).level == "error"
    assert last_run(scheduled).detail == "failed at an unknown time: connection failed"
    assert "log in" in (last_run(scheduled).hint or "")


@pytest.mark.parametrize(
    ("ago", "level", "detail"),
    [
        ("59 minutes", "ok", f"succeeded at {TIME}"),
        ("61 minutes", "warning", f"the last run was at {TIME}, 1 h 1 min ago"),
        ("23 hours", "warning", f"the last run was at {TIME}, 23 h ago"),
        ("49 hours", "error", f"the last run was at {TIME}, 2 d 1 h ago"),
    ],
)
def test_a_pg_cron_that_runs_nothing_any_more_is_told_though_somebody_sweeps(
    scheduled: Connection, ago: str, level: str, detail: str
) -> None:
    (row,) = rows(scheduled, "SELECT (now() - %s::interval)::text AS at", ago)
    add_run(scheduled, "succeeded", end=row["at"])
    Stalled(scheduled).retry_stalled_jobs(queue="x")

    status = check_rows(scheduled, NAMES_WITH_SCHEDULE)

    assert status["last_sweep"].level == "ok"
    assert status["last_run"].level == level
    assert re.fullmatch(detail, status["last_run"].detail), status["last_run"].detail
    assert level == "ok" or (status["last_run"].hint or "").startswith("Is pg_cron's launcher running?")


def test_the_runs_of_other_jobs_do_not_count(scheduled: Connection) -> None:
    add_run(scheduled, "failed")
    scheduled.execute("UPDATE cron.job_run_details SET jobid = jobid + 1")
    assert last_run(scheduled).detail == "pg_cron has not run the job yet"


def test_without_a_record_of_runs_none_is_missed() -> None:
    with (
        throwaway_server(cron_database="cron", settings=FAST | {"cron.log_run": "off"}) as server,
        psycopg.connect(server.conninfo("cron"), autocommit=True) as connection,
    ):
        install_procrastinate(server.conninfo("cron"))
        install(server.conninfo("cron"))
        Stalled(connection).schedule(schedule="0 0 31 12 *")
        unrecorded = Status(
            "last_run", "ok", "pg_cron keeps no record of runs, because cron.log_run is off: see last_sweep", None
        )
        assert last_run(connection) == unrecorded
        # Of the time before it was off.
        add_run(connection, "failed", end="epoch")
        assert last_run(connection) == unrecorded

        connection.execute(
            "TRUNCATE cron.job_run_details; CREATE ROLE ordinary; GRANT USAGE ON SCHEMA cron TO ordinary"
        )
        Stalled(connection).grant_monitor("ordinary")
        connection.execute("ALTER ROLE ordinary LOGIN; UPDATE cron.job SET username = 'ordinary'; SET ROLE ordinary")
        row = last_run(connection)
        assert (row.level, row.detail) == ("warning", "pg_cron has not run the job yet")
        connection.execute("RESET ROLE")
        connection.execute((row.hint or "").rpartition(": ")[2].encode())
        connection.execute("SET ROLE ordinary")
        assert last_run(connection) == unrecorded


def test_a_locked_table_is_told_and_not_waited_for(connect: Connect, connection: Connection) -> None:
    connect(autocommit=False).execute("LOCK TABLE procrastinate_workers")
    status = check_rows(connection)
    assert status["workers"].level == "error"
    assert status["workers"].detail == "canceling statement due to lock timeout"
    assert status["rules"].level == "ok"


def test_a_schema_whose_name_needs_quotes_is_understood(server: Server) -> None:
    with server.database() as database, psycopg.connect(database, autocommit=True) as connection:
        connection.execute('CREATE SCHEMA "my schema"')
        in_schema = make_conninfo(database, options='-c search_path="my\\ schema"')
        install_procrastinate(in_schema)
        install(database)
        with psycopg.connect(in_schema, autocommit=True) as procrastinate:
            add_given_up_job(procrastinate, "recent", 10)
            add_given_up_job(procrastinate, "old", 400)
        status = check_rows(connection)
        assert status["procrastinate"] == Status(
            "procrastinate", "ok", f'schema "my schema", as of Procrastinate {AS_OF}', None
        )

        # The statement in the hint ends the job that ran for longer than its heartbeat_timeout, and no other.
        connection.execute((status["given_up"].hint or "").rpartition(": ")[2].encode())

        ended = rows(connection, "SELECT queueing_lock FROM procrastinate_jobs WHERE status = 'failed'")
        assert ended == [{"queueing_lock": "old"}]
        assert check_rows(connection)["given_up"].level == "ok"


def test_a_start_of_the_server_in_the_future_is_a_warning(transaction: Connection) -> None:
    transaction.execute("SELECT set_config('tests.available_since', (now() + interval '1 hour')::text, true)")
    row = check_rows(transaction)["available_since"]
    assert row.level == "warning"
    assert "lies in the future" in row.detail


def test_a_sweep_of_the_future_is_a_warning(transaction: Connection) -> None:
    add_sweep(transaction, "-2 minutes")
    row = check_rows(transaction)["last_sweep"]
    assert row.level == "warning"
    assert "lies in the future" in row.detail


def test_each_remedy_against_a_pause_works_as_it_stands_there(connection: Connection) -> None:
    Stalled(connection).pause()
    Stalled(connection).pause(queue="it's", task_name="a\\_%")
    add_rule(connection, "it's night", action="ignore", expires_at="tomorrow")
    add_rule(connection, "first", position=-(2**31), action="ignore", expires_at="tomorrow", args={})
    row = check_rows(connection)["pauses"]
    assert row.hint is not None
    connection.execute(row.hint.removeprefix("To end it: ").encode())
    assert check_rows(connection)["pauses"] == Status("pauses", "ok", "none", None)


def test_the_remedy_against_rules_that_are_off_works_as_it_stands_there(connection: Connection) -> None:
    connection.execute("UPDATE procrastinate_stalled.rules SET enabled = false, heartbeat_timeout = NULL")
    row = check_rows(connection)["rules"]
    assert row.hint is not None
    connection.execute(row.hint.encode())
    assert check_rows(connection)["rules"] == Status("rules", "ok", "1 in force", None)


@pytest.mark.parametrize(
    "taken",
    [
        "ALTER TABLE cron.job RENAME TO away",
        "ALTER TABLE cron.job_run_details RENAME TO away",
        "REVOKE USAGE ON SCHEMA cron FROM stranger",
        "REVOKE SELECT ON cron.job FROM PUBLIC",
        "REVOKE SELECT ON cron.job_run_details FROM PUBLIC",
        "REVOKE SELECT ON pg_roles FROM PUBLIC",
        *(
            f"ALTER TABLE cron.job RENAME {column} TO away"
            for column in ("jobid", "schedule", "active", "username", "jobname", "database")
        ),
        *(
            f"ALTER TABLE cron.job_run_details RENAME {column} TO away"
            for column in ("jobid", "runid", "status", "return_message", "start_time", "end_time")
        ),
    ],
)
def test_whatever_of_pg_cron_is_missing_or_forbidden_it_answers(scheduled: Connection, taken: LiteralString) -> None:
    with scheduled.transaction(force_rollback=True):
        become_a_stranger(scheduled)
        scheduled.execute("RESET ROLE")
        scheduled.execute("GRANT USAGE ON SCHEMA cron TO stranger")
        # Each role sees its own jobs only.
        scheduled.execute("ALTER ROLE stranger LOGIN; UPDATE cron.job SET username = 'stranger'")
        add_run(scheduled, "succeeded")
        scheduled.execute("SET LOCAL ROLE stranger")
        status = check_rows(scheduled, NAMES_WITH_SCHEDULE)
        assert (status["schedule"].level, status["last_run"].level) == ("ok", "ok")
        scheduled.execute("RESET ROLE")
        scheduled.execute(taken)
        scheduled.execute("SET LOCAL ROLE stranger")

        names = NAMES_WITH_SCHEDULE if "job_run_details" in taken else NAMES
        status = check_rows(scheduled, names)

        assert status["last_run" if "job_run_details" in taken else "schedule"].level == "warning"
