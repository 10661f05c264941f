"""Procrastinate changes underneath: its migrations are applied one by one, it is dropped and made anew, or moved.

What is applied are the migrations that the installed version of Procrastinate ships, from its first one on. They come
in pairs: `pre` before the workers are upgraded, `post` after it, so that workers of both versions run between the two.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import resources
from itertools import count
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from procrastinate_stalled import Stalled, install, psql_script, uninstall
from tests.jobs import (
    Connection,
    add_job,
    add_orphan_note,
    add_rule,
    add_stalled_job,
    add_worker,
    contents,
    get_events,
    get_job,
    pretend_old_server,
    rows,
)
from tests.server import Server, database_name, install_procrastinate
from tests.sessions import SWEEP, Point, add_points, paused, running
from tests.test_installation import dump, dump_ours, expect_refusal, psql

HOUR = 3600

# By the names of their files, in their order.
MIGRATIONS: dict[str, LiteralString] = {
    file.name.removesuffix(".sql"): file.read_text(encoding="utf-8")
    for file in sorted(
        resources.files("procrastinate.sql").joinpath("migrations").iterdir(), key=lambda file: file.name
    )
    if file.name.endswith(".sql")
}
NAMES = list(MIGRATIONS)
TOO_OLD = [name for name in NAMES if name.startswith("03.00")]
FIRST_PRE, FIRST_POST = (name for name in NAMES if name.startswith("03.01"))
SUPPORTED = NAMES[NAMES.index(FIRST_PRE) :]
# Those after the first that need a lock on the whole table of jobs.
LOCKING = [name for name in SUPPORTED[2:] if " ON procrastinate_jobs" in MIGRATIONS[name]]


@pytest.fixture(scope="module")
def stages(server: Server) -> dict[str, str]:
    """Databases to copy from: by the name of a migration, the one in which this migration was the last."""
    names: dict[str, str] = {}
    former = "template1"
    pending: list[str] = []
    for name in NAMES:
        pending.append(name)
        if name in TOO_OLD or name in SUPPORTED:
            names[name] = f"procrastinate_{name}"
            conninfo = server.create_database(names[name], former)
            apply(conninfo, *pending)
            former = names[name]
            pending = []
    return names


def apply(conninfo: str, *names: str) -> None:
    """Apply migrations of Procrastinate, each in a transaction of its own."""
    with connected(conninfo) as connection:
        for name in names:
            connection.execute(MIGRATIONS[name])


def connected(conninfo: str, **options: Any) -> Connection:
    return psycopg.connect(conninfo, autocommit=True, **options)


def has_function(connection: Connection, name: str) -> bool:
    ((there,),) = connection.execute("SELECT to_regproc(%s) IS NOT NULL", [name]).fetchall()
    return bool(there)


# Jobs in flight, and what becomes of them.

_numbers = count(1)


@dataclass(frozen=True)
class Flight:
    """Jobs of every kind that a migration, or a sweep, may find."""

    outcomes: dict[str, tuple[str, str]]
    """By what each job is: its status and its last event after a sweep."""
    ids: dict[str, int]
    stalled: set[int]

    def states(self, connection: Connection) -> dict[str, tuple[str, str]]:
        """What `outcomes` expects, as it is."""
        return {
            name: (str(get_job(connection, job)["status"]), get_events(connection, job)[-1])
            for name, job in self.ids.items()
        }


def start_flight(connection: Connection) -> Flight:
    """Add jobs in flight, with a living worker."""
    number = next(_numbers)
    lock, key, other_key = f"lock {number}", f"key {number}", f"other key {number}"
    living, dead = add_worker(connection), add_worker(connection, HOUR)
    orphan = add_job(connection)
    # Where workers of Procrastinate 3.0 may run, no sweep notes one.
    orphans_count = not has_function(connection, "procrastinate_fetch_job_v1")
    if orphans_count:
        add_orphan_note(connection, orphan, 0, HOUR)
    ids = {
        "stalled": add_job(connection, worker_id=dead, args={"a": 1}),
        "stalled with a lock": add_job(connection, worker_id=dead, lock=lock),
        "waiting for that lock": add_job(connection, "todo", lock=lock),
        "stalled with a queueing lock": add_job(connection, worker_id=dead, queueing_lock=other_key),
        "stalled duplicate": add_job(connection, worker_id=dead, queueing_lock=key),
        "waiting with its queueing lock": add_job(connection, "todo", queueing_lock=key),
        "stalled and to be aborted": add_job(connection, worker_id=dead, abort_requested=True),
        "orphan": orphan,
        "running": add_job(connection, worker_id=living, lock=f"another {lock}"),
        "running and to be aborted": add_job(connection, worker_id=living, abort_requested=True),
        "todo": add_job(connection, "todo"),
        "scheduled": add_job(connection, "todo", scheduled_at="2100-01-01"),
        "ended": add_job(connection, "succeeded", worker_id=dead),
    }
    outcomes = {
        "stalled": ("todo", "deferred_for_retry"),
        "stalled with a lock": ("todo", "deferred_for_retry"),
        "waiting for that lock": ("todo", "deferred"),
        "stalled with a queueing lock": ("todo", "deferred_for_retry"),
        "stalled duplicate": ("failed", "failed"),
        "waiting with its queueing lock": ("todo", "deferred"),
        "stalled and to be aborted": ("aborted", "aborted"),
        "orphan": ("todo", "deferred_for_retry") if orphans_count else ("doing", "started"),
        "running": ("doing", "started"),
        "running and to be aborted": ("doing", "abort_requested"),
        "todo": ("todo", "deferred"),
        "scheduled": ("todo", "scheduled"),
        "ended": ("succeeded", "succeeded"),
    }
    stalled = {job for name, job in ids.items() if name.startswith("stalled")} | ({orphan} if orphans_count else set())
    return Flight(outcomes, ids, stalled)


def judge(connection: Connection, flight: Flight) -> None:
    """See all functions that only look know what is stalled."""
    stalled = Stalled(connection)
    assert {job.id for job in stalled.get_stalled_jobs()} >= flight.stalled
    assert {rescue.job_id for rescue in stalled.retry_stalled_jobs(dry_run=True)} >= flight.stalled
    explained = {job.job_id: job.verdict for job in stalled.explain_jobs()}
    for name, job in flight.ids.items():
        verdict = stalled.explain_job(job).verdict
        assert (name, verdict == "stalled") == (name, job in flight.stalled)
        assert verdict == explained.get(job, "not doing")
    assert stalled.workers()
    stalled.task_runtimes()


def sweep(connection: Connection, flight: Flight) -> None:
    """See exactly the stalled jobs rescued, all well then, and an operator's retry done."""
    stalled = Stalled(connection)
    judge(connection, flight)
    before = flight.states(connection)
    stalled.sweep()
    assert flight.states(connection) == flight.outcomes
    assert {name for name in before if before[name] != flight.outcomes[name]} == {
        name for name, job in flight.ids.items() if job in flight.stalled
    }
    stalled.sweep()
    assert flight.states(connection) == flight.outcomes
    assert [row for row in stalled.status() if row.level == "error"] == []
    errors = rows(connection, "SELECT error FROM procrastinate_stalled.sweeps WHERE error IS NOT NULL")
    assert errors == []
    retried = stalled.retry_job(flight.ids["running"])
    assert (retried.action, retried.reason) == ("retried", "manual")
    assert get_events(connection, flight.ids["running"])[-1] == "deferred_for_retry"


# Upgraded.


def test_sweeps_go_on_through_all_migrations_and_these_make_what_they_make_without_us(
    server: Server, stages: dict[str, str]
) -> None:
    with ExitStack() as stack:
        ours, plain = (stack.enter_context(server.database(stages[FIRST_PRE])) for _ in range(2))
        install(ours)
        old_session = stack.enter_context(connected(ours))
        pretend_old_server(old_session)
        for _ in range(6):  # from the sixth time on PostgreSQL may keep a plan
            sweep(old_session, start_flight(old_session))

        for name in SUPPORTED[1:]:
            flight, next_flight = start_flight(old_session), start_flight(old_session)
            apply(ours, name)
            apply(plain, name)

            without_us = dump(plain)
            assert dump(ours, "--exclude-schema=procrastinate_stalled") == without_us
            judge(old_session, flight)
            if name == FIRST_POST:
                # From now on they are orphans, which a sweep is yet to note.
                assert {flight.outcomes["orphan"], next_flight.outcomes["orphan"]} == {("doing", "started")}
            sweep(old_session, flight)
            with connected(ours) as new_session:
                assert next_flight.states(new_session) == next_flight.outcomes
                sweep(new_session, start_flight(new_session))

        newest = {row.name: row for row in Stalled(old_session).status()}["procrastinate"]
        assert newest.level == "ok"
        assert install(ours) == []
        uninstall(ours)
        assert dump(ours) == dump(plain)


@pytest.mark.parametrize("name", TOO_OLD)
def test_before_3_1_an_install_is_refused(name: str, server: Server, stages: dict[str, str]) -> None:
    with server.database(stages[name]) as conninfo:
        expect_refusal(conninfo, psycopg.errors.ObjectNotInPrerequisiteState, "too old")


@pytest.fixture(scope="module")
def newest_schema(server: Server) -> str:
    """What an install makes where Procrastinate's own `schema.sql` was applied."""
    with server.database("procrastinate") as conninfo:
        install(conninfo)
        return dump_ours(conninfo)


@pytest.mark.parametrize("name", SUPPORTED)
def test_from_the_first_migration_of_3_1_on_an_install_makes_the_same_schema_and_works(
    name: str, server: Server, stages: dict[str, str], newest_schema: str
) -> None:
    with server.database(stages[name]) as conninfo:
        install(conninfo)

        assert dump_ours(conninfo) == newest_schema
        with connected(conninfo) as connection:
            pretend_old_server(connection)
            sweep(connection, start_flight(connection))


# What the code of one or another version of Procrastinate calls. Between pre and post both versions run.
DEFER: dict[str, LiteralString] = {
    "procrastinate_defer_job_v1": "SELECT procrastinate_defer_job_v1('default', 'task', 0, NULL, NULL, '{}', NULL)",
    "procrastinate_defer_jobs_v1": """
        SELECT unnest(procrastinate_defer_jobs_v1(
            ARRAY[ROW('default', 'task', 0, NULL, NULL, '{}', NULL)::procrastinate_job_to_defer_v1]
        ))
    """,
}
FETCH: dict[str, LiteralString] = {
    "procrastinate_fetch_job_v1": "SELECT id FROM procrastinate_fetch_job_v1(NULL) WHERE %(worker)s > 0",
    "procrastinate_fetch_job_v2": "SELECT id FROM procrastinate_fetch_job_v2(NULL, %(worker)s)",
}
RETRY: dict[str, LiteralString] = {
    "procrastinate_retry_job_v1": "SELECT procrastinate_retry_job_v1(%(job)s, now(), NULL, NULL, NULL)",
    "procrastinate_retry_job_v2": "SELECT procrastinate_retry_job_v2(%(job)s, now(), NULL, NULL, NULL)",
}
FINISH: LiteralString = "SELECT procrastinate_finish_job_v1(%(job)s, 'succeeded', false)"


def available(connection: Connection, functions: dict[str, LiteralString]) -> list[LiteralString]:
    found = [query for name, query in functions.items() if has_function(connection, name)]
    assert found
    return found


def fetched(connection: Connection, query: LiteralString, worker: int) -> int | None:
    ((job,),) = connection.execute(query, {"worker": worker}).fetchall()
    assert job is None or isinstance(job, int)
    return job


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_code_of_either_version_runs_what_a_sweep_put_back(
    name: str, server: Server, stages: dict[str, str]
) -> None:
    with ExitStack() as stack:
        conninfo = stack.enter_context(server.database(stages[name]))
        install(conninfo)
        code, product = (stack.enter_context(connected(conninfo)) for _ in range(2))
        pretend_old_server(code)
        living = add_worker(code)
        newest_fetch = available(code, FETCH)[-1]
        for defer in available(code, DEFER):
            for fetch in available(code, FETCH):
                for retry in available(code, RETRY):
                    dead = add_worker(code, HOUR)
                    ((job,),) = code.execute(defer).fetchall()
                    assert fetched(code, newest_fetch, dead) == job
                    with product.transaction():
                        assert [rescue.job_id for rescue in Stalled(product).retry_stalled_jobs()] == [job]
                        # Not committed: neither this job nor another one makes anybody wait.
                        code.execute("SET lock_timeout = '1s'")
                        assert fetched(code, fetch, living) is None
                        ((other,),) = code.execute(defer).fetchall()
                        assert fetched(code, fetch, living) == other
                        code.execute(FINISH, {"job": other})
                    assert fetched(code, fetch, living) == job
                    code.execute(retry, {"job": job})
                    Stalled(product).sweep()
                    assert fetched(code, fetch, living) == job
                    Stalled(product).sweep()
                    code.execute(FINISH, {"job": job})
                    assert get_events(code, job)[-3:] == ["deferred_for_retry", "started", "succeeded"]
                    assert get_job(code, job)["attempts"] == 3


def test_a_job_of_a_worker_of_3_0_is_no_orphan(server: Server, stages: dict[str, str]) -> None:
    with server.database(stages[FIRST_PRE]) as conninfo:
        install(conninfo)
        with connected(conninfo) as connection:
            stalled = Stalled(connection)
            pretend_old_server(connection)
            add_worker(connection)
            add_job(connection, "todo")
            job = fetched(connection, FETCH["procrastinate_fetch_job_v1"], 1)
            assert job is not None

            stalled.sweep()
            assert rows(connection, "SELECT * FROM procrastinate_stalled.orphans") == []
            explained = stalled.explain_job(job)
            assert (explained.verdict, explained.stalled_at, explained.reason) == ("running", None, None)
            assert "Procrastinate 3.0" in explained.sentence
            assert explained.sentence.endswith("; rule default sets no other limit; it counts as running until it ends")
            with connection.transaction(force_rollback=True):
                connection.execute("UPDATE procrastinate_stalled.rules SET action = 'ignore'")
                ignored = stalled.explain_job(job).sentence
            assert "Procrastinate 3.0" in ignored
            assert ignored.endswith("; rule default ignores it: nothing is ever done to it")
            status = {row.name: row for row in stalled.status()}["procrastinate"]
            assert status.level == "warning"
            assert "procrastinate_fetch_job_v1" in status.detail
            assert status.hint is not None
            assert "3.1 post" in status.hint

            # Whoever noted it.
            add_orphan_note(connection, job, 0, HOUR)
            assert stalled.get_stalled_jobs() == []
            connection.execute("DELETE FROM procrastinate_stalled.orphans")

            # A run timeout asks for no worker.
            connection.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '10 years'")
            assert stalled.explain_job(job).reason == "run_timeout"

            apply(conninfo, FIRST_POST)
            assert {row.name: row.level for row in stalled.status()}["procrastinate"] == "ok"
            stalled.sweep()
            ((seen,),) = connection.execute("SELECT seen_at FROM procrastinate_stalled.orphans").fetchall()
            assert get_job(connection, job)["status"] == "doing"
            assert stalled.explain_job(job).stalled_at == seen + timedelta(minutes=5)


@pytest.mark.parametrize("name", LOCKING)
def test_a_migration_waits_for_the_batch_of_a_sweep(name: str, server: Server, stages: dict[str, str]) -> None:
    with ExitStack() as stack:
        conninfo = stack.enter_context(server.database(stages[NAMES[NAMES.index(name) - 1]]))
        install(conninfo)

        def connect(**options: Any) -> Connection:
            return stack.enter_context(psycopg.connect(conninfo, **({"autocommit": True} | options)))

        connection = connect()
        pretend_old_server(connection)
        add_points(connection)
        add_worker(connection)
        jobs = [add_stalled_job(connection, task_name=task) for task in ("pause", "task")]

        with paused(connect, Point.WITHIN_UPDATE) as pause:
            with running(connect(), connection, MIGRATIONS[name]) as migration:
                migration.wait_until_it_waits()
                # After its batch the sweep may meet the migration.
                with suppress(psycopg.errors.LockNotAvailable):
                    pause.resume()
            migration.result()

        assert {get_job(connection, job)["status"] for job in jobs} == {"todo"}
        job = add_stalled_job(connection)
        connection.execute(SWEEP)
        assert get_job(connection, job)["status"] == "todo"


@pytest.mark.parametrize("name", LOCKING)
def test_a_sweep_that_meets_a_migration_ends_and_the_next_one_goes_on(
    name: str, server: Server, stages: dict[str, str]
) -> None:
    with server.database(stages[NAMES[NAMES.index(name) - 1]]) as conninfo:
        install(conninfo)
        with connected(conninfo) as connection, psycopg.connect(conninfo) as migrating:
            pretend_old_server(connection)
            flight = start_flight(connection)
            migrating.execute(MIGRATIONS[name])

            with pytest.raises(psycopg.errors.LockNotAvailable, match="the table procrastinate_jobs is locked"):
                connection.execute(SWEEP)

            migrating.commit()
            sweep(connection, flight)


# Dropped and made anew.

# The functions that need Procrastinate, called so that they reach it.
NEEDING: dict[str, LiteralString] = {
    "get_stalled_jobs": "SELECT * FROM procrastinate_stalled.get_stalled_jobs()",
    "retry_stalled_jobs": "SELECT * FROM procrastinate_stalled.retry_stalled_jobs()",
    "retry_stalled_jobs in a dry run": "SELECT * FROM procrastinate_stalled.retry_stalled_jobs(dry_run => true)",
    "retry_job": "SELECT * FROM procrastinate_stalled.retry_job(1)",
    "sweep": SWEEP,
    "explain_job": "SELECT * FROM procrastinate_stalled.explain_job(1)",
    "explain_jobs": "SELECT * FROM procrastinate_stalled.explain_jobs()",
    "workers": "SELECT * FROM procrastinate_stalled.workers()",
    "task_runtimes": "SELECT * FROM procrastinate_stalled.task_runtimes()",
    "grant_monitor": "SELECT procrastinate_stalled.grant_monitor(current_user)",
    "grant_operator": "SELECT procrastinate_stalled.grant_operator(current_user)",
}
NOT_NEEDING = {"pause", "resume", "schedule", "unschedule", "status", "version", "set_procrastinate_schema"}
ROWS_WITHOUT_PROCRASTINATE = {"procrastinate", "workers", "jobs", "given_up", "false_rescues"}


def test_it_is_known_of_each_function_whether_it_needs_procrastinate(transaction: Connection) -> None:
    functions = rows(
        transaction,
        "SELECT proname FROM pg_proc WHERE pronamespace = 'procrastinate_stalled'::regnamespace AND proname !~ '^_'",
    )

    assert {row["proname"] for row in functions} == {name.partition(" ")[0] for name in NEEDING} | NOT_NEEDING


def expect_missing(connection: Connection, schema: str, detail: str, *, moved_to: str | None = None) -> None:
    """See that each function that needs Procrastinate says what is missing, and `status()` too."""
    hints = set()
    for query in NEEDING.values():
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as raised:
            connection.execute(query)
        diagnostic = raised.value.diag
        assert diagnostic.message_primary == f"there is no Procrastinate 3.1 or later in schema {schema}"
        assert diagnostic.message_detail == detail
        hints.add(diagnostic.message_hint)
    (hint,) = hints
    assert hint is not None
    assert "Apply its schema if that was dropped" in hint
    assert ("set_procrastinate_schema" in hint) == (moved_to is not None)
    assert moved_to is None or f"('{moved_to}')" in hint

    status = {row.name: row for row in Stalled(connection).status()}
    assert {name for name, row in status.items() if row.level == "error"} == ROWS_WITHOUT_PROCRASTINATE
    fact = f"there is no Procrastinate 3.1 or later in schema {schema}"
    assert (status["procrastinate"].detail, status["procrastinate"].hint) == (f"{fact}. {detail}", hint)
    for name in ROWS_WITHOUT_PROCRASTINATE - {"procrastinate"}:
        assert (status[name].detail, status[name].hint) == (fact, "See the row procrastinate.")


def our_rows(connection: Connection, *tables: str) -> list[list[str]]:
    found = contents(connection)
    return [found[f"procrastinate_stalled.{table}"] for table in tables]


@dataclass(frozen=True)
class Home:
    """A database in which a role owns Procrastinate, in a schema, and this product."""

    superuser: str
    role: str
    schema: str

    @property
    def conninfo(self) -> str:
        """The address for the role, with the search_path of its app."""
        return make_conninfo(self.superuser, user=self.role, options=f"-c search_path={self.schema}")

    def connect(self, **options: Any) -> Connection:
        return connected(self.conninfo, **options)

    def execute(self, statement: LiteralString) -> None:
        with self.connect() as connection:
            connection.execute(statement)


@contextmanager
def home(server: Server, role: str, schema: str) -> Iterator[Home]:
    with server.database() as conninfo, connected(conninfo) as superuser, ExitStack() as stack:
        if role != "postgres":
            superuser.execute(f"CREATE ROLE {role} LOGIN".encode())
            stack.callback(superuser.execute, f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}".encode())
            superuser.execute(f"GRANT CREATE ON DATABASE {database_name(conninfo)} TO {role}".encode())
        place = Home(conninfo, role, schema)
        if schema != "public":
            place.execute(f"CREATE SCHEMA {schema}")
        install_procrastinate(place.conninfo)
        install(place.conninfo)
        yield place


def drop_objects(connection: Connection) -> None:
    """Drop all that is Procrastinate's, one object after the other."""
    statements = connection.execute(
        r"""
        SELECT format('DROP TABLE %s CASCADE', oid::regclass), 1 AS number
            FROM pg_class
            WHERE relname ~ '^procrastinate_' AND relnamespace = 'public'::regnamespace AND relkind = 'r'
        UNION ALL
        SELECT format('DROP FUNCTION %s', oid::regprocedure), 2
            FROM pg_proc
            WHERE proname ~ '^procrastinate_' AND pronamespace = 'public'::regnamespace
                AND prorettype NOT IN (SELECT oid FROM pg_type WHERE typname = 'procrastinate_jobs')
        UNION ALL
        SELECT format('DROP TYPE %s CASCADE', type.oid::regtype), 3
            FROM pg_type AS type
            LEFT JOIN pg_class AS class ON class.oid = typrelid
            WHERE typname ~ '^procrastinate_' AND typnamespace = 'public'::regnamespace AND typtype IN ('c', 'e')
                AND (class.relkind IS NULL OR class.relkind = 'c')
        ORDER BY number
        """
    ).fetchall()
    for statement, _number in statements:
        connection.execute(statement)


Loss = Callable[[Connection], object]

LOSSES: dict[str, tuple[str, str, Loss]] = {
    "its objects": ("postgres", "public", drop_objects),
    "the schema public": (
        "postgres",
        "public",
        lambda connection: connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public"),
    ),
    "a schema of its own, by an ordinary role": (
        "dropping_owner",
        "app",
        lambda connection: connection.execute("DROP SCHEMA app CASCADE; CREATE SCHEMA app"),
    ),
}


@pytest.mark.parametrize(("role", "schema", "drop"), LOSSES.values(), ids=LOSSES)
def test_procrastinate_can_be_dropped_and_made_anew(role: str, schema: str, drop: Loss, server: Server) -> None:
    with home(server, role, schema) as place, place.connect() as old_session:
        pretend_old_server(old_session)
        add_rule(old_session, "mine", queue_name="emails", action="ignore")
        for _ in range(2):
            sweep(old_session, start_flight(old_session))
        kept = our_rows(old_session, "rules", "settings", "rescues")
        assert len(kept[2]) > 6
        definition = dump_ours(place.superuser)

        drop(old_session)

        assert dump_ours(place.superuser) == definition
        missing = "Missing there: procrastinate_jobs, procrastinate_workers, procrastinate_events."
        expect_missing(old_session, schema, missing)
        with place.connect() as new_session:
            expect_missing(new_session, schema, missing)
            Stalled(new_session).pause()
            assert Stalled(new_session).resume() is True
        assert our_rows(old_session, "rules", "settings", "rescues") == kept

        install_procrastinate(place.conninfo)

        sweep(old_session, start_flight(old_session))
        with place.connect() as new_session:
            sweep(new_session, start_flight(new_session))
        rules, settings, rescues = our_rows(old_session, "rules", "settings", "rescues")
        assert [rules, settings] == kept[:2]
        assert set(rescues) > set(kept[2])
        assert dump_ours(place.superuser) == definition


PARTS: dict[str, tuple[LiteralString, str]] = {
    "no workers": ("DROP TABLE procrastinate_workers CASCADE", "Missing there: procrastinate_workers."),
    "no events": ("DROP TABLE procrastinate_events CASCADE", "Missing there: procrastinate_events."),
    "no jobs": ("DROP TABLE procrastinate_jobs CASCADE", "Missing there: procrastinate_jobs."),
    "jobs without workers": (
        "ALTER TABLE procrastinate_jobs DROP COLUMN worker_id CASCADE",
        "Its procrastinate_jobs has no column worker_id.",
    ),
}


@pytest.mark.parametrize(("drop", "detail"), PARTS.values(), ids=PARTS)
def test_a_part_of_procrastinate_that_is_missing_is_named(
    drop: LiteralString, detail: str, connection: Connection
) -> None:
    connection.execute(drop)

    expect_missing(connection, "public", detail)


def test_without_procrastinate_it_can_be_uninstalled_and_not_be_installed(procrastinate_database: str) -> None:
    install(procrastinate_database)
    with connected(procrastinate_database) as connection:
        drop_objects(connection)

    assert uninstall(procrastinate_database) is True

    expect_refusal(
        procrastinate_database, psycopg.errors.ObjectNotInPrerequisiteState, "Procrastinate is not installed"
    )


def test_an_older_procrastinate_in_its_place_is_told_and_can_be_upgraded(procrastinate_database: str) -> None:
    install(procrastinate_database)
    with connected(procrastinate_database) as connection:
        pretend_old_server(connection)
        drop_objects(connection)
        apply(procrastinate_database, *NAMES[: NAMES.index(FIRST_PRE)])

        expect_missing(connection, "public", "Missing there: procrastinate_workers.")

        for name in SUPPORTED:
            apply(procrastinate_database, name)
            sweep(connection, start_flight(connection))


def test_who_may_not_use_the_schema_of_procrastinate_is_told_that_and_not_that_it_is_missing(
    transaction: Connection,
) -> None:
    transaction.execute(
        """
        CREATE ROLE stranger;
        REVOKE USAGE ON SCHEMA public FROM PUBLIC;
        GRANT USAGE ON SCHEMA procrastinate_stalled TO stranger;
        GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA procrastinate_stalled TO stranger;
        SET LOCAL ROLE stranger
        """
    )

    with pytest.raises(psycopg.errors.InsufficientPrivilege) as raised:
        transaction.execute(NEEDING["workers"])

    diagnostic = raised.value.diag
    assert (
        diagnostic.message_primary == 'role "stranger" may not use schema public, in which Procrastinate is looked for'
    )
    assert diagnostic.message_detail
    assert "grant_monitor('stranger')" in (diagnostic.message_hint or "")


# Moved.


def move_objects(connection: Connection, schema: str) -> None:
    """Move all that is Procrastinate's from schema app, one object after the other."""
    connection.execute(f'CREATE SCHEMA "{schema}"'.encode())
    statements = connection.execute(
        r"""
        SELECT format('ALTER TABLE %s SET SCHEMA', oid::regclass)
            FROM pg_class
            WHERE relnamespace = 'app'::regnamespace AND relkind = 'r'
        UNION ALL
        SELECT format('ALTER FUNCTION %s SET SCHEMA', oid::regprocedure)
            FROM pg_proc
            WHERE pronamespace = 'app'::regnamespace
        UNION ALL
        SELECT format('ALTER TYPE %s SET SCHEMA', type.oid::regtype)
            FROM pg_type AS type
            LEFT JOIN pg_class AS class ON class.oid = typrelid
            WHERE typnamespace = 'app'::regnamespace AND typtype IN ('c', 'e')
                AND (class.relkind IS NULL OR class.relkind = 'c')
        """
    ).fetchall()
    with connection.transaction():
        for (statement,) in statements:
            connection.execute(f'{statement} "{schema}"'.encode())


def rename_schema(connection: Connection, schema: str) -> None:
    connection.execute(f'ALTER SCHEMA app RENAME TO "{schema}"'.encode())


@pytest.mark.parametrize(
    ("role", "move", "target"),
    [
        ("postgres", rename_schema, "of the App"),
        ("moving_owner", rename_schema, "elsewhere"),
        ("moving_owner", move_objects, "of the App"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_procrastinate_that_was_moved_is_found_by_the_statement_of_the_hint(
    role: str, move: Callable[[Connection, str], None], target: str, server: Server
) -> None:
    with home(server, role, "app") as place, place.connect() as old_session:
        pretend_old_server(old_session)
        for _ in range(2):
            sweep(old_session, start_flight(old_session))

        move(old_session, target)

        missing = "Missing there: procrastinate_jobs, procrastinate_workers, procrastinate_events."
        expect_missing(old_session, "app", missing, moved_to=target)
        hint = Stalled(old_session).status()[0].hint or ""
        statement = re.search(r"SELECT procrastinate_stalled\.set_procrastinate_schema\(.*?\);", hint)
        assert statement is not None
        for _ in range(2):
            old_session.execute(statement.group().encode())

        old_session.execute(f'SET search_path = "{target}"'.encode())
        sweep(old_session, start_flight(old_session))
        with place.connect() as new_session:
            new_session.execute(f'SET search_path = "{target}"'.encode())
            sweep(new_session, start_flight(new_session))


FOLLOW: dict[str, Callable[[str], object]] = {
    "set_procrastinate_schema": lambda conninfo: psql(
        conninfo, "SELECT procrastinate_stalled.set_procrastinate_schema('of the App')"
    ),
    "the script again": lambda conninfo: psql(conninfo, psql_script()),
}


@pytest.mark.parametrize("follow", FOLLOW.values(), ids=FOLLOW)
def test_after_a_move_everything_is_as_if_it_had_been_installed_there(
    follow: Callable[[str], object], procrastinate_database: str
) -> None:
    install(procrastinate_database)
    with connected(procrastinate_database) as connection:
        connection.execute('ALTER SCHEMA public RENAME TO "of the App"; CREATE SCHEMA public')
    moved = dump_ours(procrastinate_database)

    follow(procrastinate_database)

    followed = dump_ours(procrastinate_database)
    uninstall(procrastinate_database)
    install(procrastinate_database)
    assert followed == dump_ours(procrastinate_database) != moved


@pytest.mark.parametrize(
    ("schema", "detail"),
    [
        ("nowhere", "procrastinate_jobs, procrastinate_workers, procrastinate_events"),
        ("PUBLIC", "procrastinate_jobs, procrastinate_workers, procrastinate_events"),
        (None, "procrastinate_jobs, procrastinate_workers, procrastinate_events"),
        ("partly", "procrastinate_workers, procrastinate_events"),
        ("procrastinate_stalled", "procrastinate_jobs, procrastinate_workers, procrastinate_events"),
    ],
)
def test_a_schema_without_procrastinate_is_refused_and_nothing_changed(
    schema: str | None, detail: str, database: str, connection: Connection
) -> None:
    connection.execute(
        """
        CREATE SCHEMA partly;
        CREATE TABLE partly.procrastinate_jobs ();
        CREATE SEQUENCE partly.procrastinate_events;
        """
    )
    before = dump_ours(database)

    with pytest.raises(psycopg.errors.InvalidSchemaName) as raised:
        connection.execute("SELECT procrastinate_stalled.set_procrastinate_schema(%s)", [schema])

    diagnostic = raised.value.diag
    named = "NULL" if schema is None else f'"{schema}"'
    assert diagnostic.message_primary == f"schema {named} has no Procrastinate"
    assert diagnostic.message_detail == f"Missing there: {detail}."
    assert (diagnostic.message_hint or "").startswith("Nothing was changed. Where it is: SELECT")
    assert dump_ours(database) == before


def test_who_does_not_own_the_functions_cannot_point_them_elsewhere(transaction: Connection) -> None:
    settings: LiteralString = """
        SELECT proname, proconfig FROM pg_proc WHERE pronamespace = 'procrastinate_stalled'::regnamespace ORDER BY oid
    """
    before = rows(transaction, settings)
    transaction.execute(
        """
        CREATE ROLE stranger;
        GRANT USAGE ON SCHEMA procrastinate_stalled TO stranger;
        GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA procrastinate_stalled TO stranger;
        -- Some of them are his.
        ALTER FUNCTION procrastinate_stalled.version() OWNER TO stranger;
        SET LOCAL ROLE stranger
        """
    )

    with pytest.raises(psycopg.errors.InsufficientPrivilege) as raised, transaction.transaction():
        Stalled(transaction).set_procrastinate_schema("public")

    diagnostic = raised.value.diag
    assert diagnostic.message_primary == 'role "stranger" may not change the functions of procrastinate_stalled'
    assert diagnostic.message_detail == 'Their owner is "postgres".'
    assert (diagnostic.message_hint or "").startswith("Nothing was changed.")
    transaction.execute("RESET ROLE")
    assert rows(transaction, settings) == before
