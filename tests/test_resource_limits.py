"""A server that runs out of something: a sweep ends with a clear error or finishes, and the next one goes on."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from procrastinate_stalled import install
from tests.conftest import Connect
from tests.jobs import Connection, add_job, add_stalled_job, add_worker, get_job, pretend_old_server, rows
from tests.server import FAST, Server, database_name, install_procrastinate, postgresql_program, throwaway_server
from tests.sessions import SWEEP
from tests.wait import wait_until

RETRY: LiteralString = "SELECT procrastinate_stalled.retry_stalled_jobs()"
NEXT_RUN_OF_PG_CRON = 90


def rescued(connection: Connection) -> int:
    """Return how many jobs were rescued, after a look whether each was so completely and once, and the others not."""
    half_done = rows(
        connection,
        """
        WITH rescue AS (
            SELECT job_id, count(*) AS rescues FROM procrastinate_stalled.rescues GROUP BY job_id
        ), event AS (
            SELECT job_id, count(*) AS retries
                FROM procrastinate_events WHERE type = 'deferred_for_retry' GROUP BY job_id
        )
        SELECT id, status, attempts, job.worker_id, rescues, retries
            FROM procrastinate_jobs AS job
            FULL JOIN rescue ON rescue.job_id = id
            FULL JOIN event ON event.job_id = id
            WHERE ROW(status::text, attempts, worker_id IS NULL, rescues, retries)
                IS DISTINCT FROM ROW('todo', 1, true, 1::bigint, 1::bigint)
                AND ROW(status::text, attempts, worker_id IS NULL, rescues, retries)
                IS DISTINCT FROM ROW('doing', 0, false, NULL::bigint, NULL::bigint)
            LIMIT 5
        """,
    )
    assert half_done == []
    [counted] = rows(
        connection,
        """
        SELECT (SELECT count(*) FROM procrastinate_stalled.rescues) AS rescues,
               (SELECT coalesce(sum(retried), 0) FROM procrastinate_stalled.sweeps) AS retried
        """,
    )
    assert counted["rescues"] == counted["retried"]
    return int(counted["rescues"])


def add_stalled_jobs(connection: Connection, number: int) -> None:
    """Add many jobs of one silent worker, past the triggers for the sake of speed."""
    worker_id = add_worker(connection, silent_for=3600)
    with connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute(
            """
            INSERT INTO procrastinate_jobs (queue_name, task_name, status, worker_id)
            SELECT 'default', 'task', 'doing', %s FROM generate_series(1, %s)
            """,
            [worker_id, number],
        )
    connection.execute("ANALYZE procrastinate_jobs")


def last_sweep(connection: Connection) -> dict[str, object]:
    [sweep] = rows(connection, "SELECT * FROM procrastinate_stalled.sweeps ORDER BY id DESC LIMIT 1")
    return sweep


@contextmanager
def role(connection: Connection, name: str, **settings: str) -> Iterator[None]:
    """A superuser who has these settings by ALTER ROLE."""
    connection.execute(sql.SQL("CREATE ROLE {} SUPERUSER LOGIN").format(sql.Identifier(name)))
    try:
        for setting, value in settings.items():
            statement = sql.SQL("ALTER ROLE {} SET {} = {}")
            connection.execute(statement.format(sql.Identifier(name), sql.Identifier(setting), sql.Literal(value)))
        yield
    finally:
        connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


# A full disk

LEDGER = "procrastinate_stalled.rescues"


@contextmanager
def full_disk(server: Server, connection: Connection, *tables: str) -> Iterator[None]:
    """Let the files of these tables, which are empty, be on a full device for the sessions that begin in the block."""
    files = []
    for table in tables:
        [found] = rows(connection, "SELECT pg_relation_filepath(%s) AS path", table)
        files.append(server.folder / "data" / found["path"])
    for file in files:
        assert file.stat().st_size == 0
        file.rename(f"{file}.kept")
        file.symlink_to("/dev/full")
    try:
        yield
    finally:
        for file in files:
            file.unlink()
            Path(f"{file}.kept").rename(file)


@pytest.mark.parametrize("query", [SWEEP, "CALL procrastinate_stalled.sweep(1)", RETRY])
@pytest.mark.parametrize("jobs", [1, 300, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_full_disk_under_the_ledger_ends_a_sweep_at_once_and_the_next_one_rescues_all(
    connection: Connection, connect: Connect, server: Server, query: LiteralString, jobs: int
) -> None:
    add_stalled_jobs(connection, jobs)
    with full_disk(server, connection, LEDGER), connect() as sweeper:
        # Each job that is tried alone takes a number.
        [before] = rows(connection, "SELECT nextval('procrastinate_stalled.rescues_id_seq') AS number")

        sweeper.execute(query)

    [after] = rows(connection, "SELECT nextval('procrastinate_stalled.rescues_id_seq') AS number")
    assert after["number"] - before["number"] <= 105
    sweep = last_sweep(connection)
    assert (sweep["retried"], sweep["waiting"]) == (0, jobs)
    assert "No space left on device (53100)" in str(sweep["error"])
    assert sweep["duration"] is not None
    [status] = rows(connection, "SELECT * FROM procrastinate_stalled.status() WHERE name = 'last_sweep'")
    assert status["level"] != "ok"
    assert "No space left on device" in status["detail"]
    assert "Make room" in status["hint"]
    assert rescued(connection) == 0
    connection.execute(RETRY if query is RETRY else SWEEP)
    assert rescued(connection) == jobs
    assert last_sweep(connection)["error"] is None


def test_a_full_disk_under_the_events_of_procrastinate_ends_a_sweep_too(
    connection: Connection, connect: Connect, server: Server
) -> None:
    add_stalled_jobs(connection, 300)
    with full_disk(server, connection, "procrastinate_events"), connect() as sweeper:
        sweeper.execute(SWEEP)

    assert "job 100: could not extend file" in str(last_sweep(connection)["error"])
    assert rescued(connection) == 0
    connection.execute(SWEEP)
    assert rescued(connection) == 300


def refuse_to_change(connection: Connection, last: int, condition: str) -> None:
    """Let each UPDATE of the jobs up to this one fail with this condition, as a trigger of the user's may do."""
    connection.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE {condition}; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON procrastinate_jobs
            FOR EACH ROW WHEN (old.id <= {last}) EXECUTE FUNCTION refuse();
        """.encode()
    )


def test_the_error_of_a_sweep_is_that_which_ended_it_not_one_before(
    connection: Connection, connect: Connect, server: Server
) -> None:
    first = add_stalled_job(connection)
    add_stalled_jobs(connection, 200)
    refuse_to_change(connection, first, "internal_error")
    with full_disk(server, connection, LEDGER), connect() as sweeper:
        sweeper.execute(SWEEP)

    assert str(last_sweep(connection)["error"]).startswith(f"job {first + 100}: could not extend file")


@pytest.mark.parametrize("query", [SWEEP, RETRY])
def test_where_the_disk_has_no_room_even_for_the_row_of_the_sweep_its_caller_is_told(
    connection: Connection, connect: Connect, server: Server, query: LiteralString
) -> None:
    add_stalled_jobs(connection, 300)
    with (
        full_disk(server, connection, LEDGER, "procrastinate_stalled.sweeps"),
        connect() as sweeper,
        pytest.raises(psycopg.errors.DiskFull, match="No space left on device"),
    ):
        sweeper.execute(query)

    assert rescued(connection) == 0
    connection.execute(query)
    assert rescued(connection) == 300


@contextmanager
def tiny_disk(server: Server, megabytes: int) -> Iterator[Path]:
    """Let the server go on with a file system of its own, of this size, which nobody else can see.

    Needs the right to make a namespace of users, which a container may have taken away.
    """
    folder = server.folder / "tiny"
    # As pg_ctl: not as root, who has no place in the namespace of the other user.
    as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.geteuid() == 0 else []
    in_namespace = [*as_postgres, "unshare", "--user", "--map-current-user", "--mount", "--keep-caps"]
    mount = f'mkdir -p {folder} && mount -t tmpfs -o size={megabytes}m tmpfs {folder} && exec "$@"'

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        whole = [*in_namespace, "sh", "-c", mount, "sh", *command]
        return subprocess.run(whole, cwd="/", capture_output=True, text=True)

    tried = run("true")
    if tried.returncode != 0:
        pytest.skip(f"no private file system can be mounted here: {tried.stderr.strip()}")
    pg_ctl = [str(postgresql_program("pg_ctl")), "-w", "-D", f"{server.folder}/data", "-l", f"{server.folder}/log"]
    run(*pg_ctl, "restart").check_returncode()
    yield folder


def test_where_the_disk_fills_up_during_a_sweep_whole_batches_are_done_and_the_next_one_does_the_rest() -> None:
    with throwaway_server() as server, tiny_disk(server, megabytes=3) as folder, server.database() as conninfo:
        prepare(conninfo)
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE TABLESPACE tiny LOCATION {}").format(sql.Literal(str(folder))))
            connection.execute(
                """
                ALTER TABLE procrastinate_stalled.rescues SET TABLESPACE tiny;
                ALTER INDEX procrastinate_stalled.rescues_pkey SET TABLESPACE tiny;
                CREATE TABLE filler TABLESPACE tiny AS
                    SELECT repeat('x', 1900) FROM generate_series(1, 1000);
                """
            )
            add_stalled_jobs(connection, 9000)

            connection.execute(SWEEP)

            sweep = last_sweep(connection)
            first = rescued(connection)
            assert 1000 < first < 8000
            assert (sweep["retried"], sweep["waiting"]) == (first, 9000 - first)
            assert "No space left on device (53100)" in str(sweep["error"])
            connection.execute(SWEEP)
            assert "No space left on device (53100)" in str(last_sweep(connection)["error"])
            connection.execute("DROP TABLE filler")
            connection.execute(SWEEP)
            assert rescued(connection) == 9000


@pytest.mark.parametrize("condition", ["disk_full", "out_of_memory", "io_error", "data_corrupted", "internal_error"])
@pytest.mark.parametrize("jobs", [1, 99, 120])
def test_what_fails_for_some_jobs_alone_does_not_end_the_sweep(
    connection: Connection, condition: str, jobs: int
) -> None:
    """But for a disk that is full for a hundred of them."""
    add_stalled_jobs(connection, jobs)
    last = add_stalled_job(connection)
    refuse_to_change(connection, last - 1, condition)

    connection.execute(SWEEP)

    ended = condition == "disk_full" and jobs > 100
    sweep = last_sweep(connection)
    assert (sweep["retried"], sweep["waiting"]) == ((0, jobs + 1) if ended else (1, jobs))
    assert get_job(connection, last)["status"] == ("doing" if ended else "todo")
    assert condition in str(sweep["error"])


# Time limits of the role


def test_the_statement_timeout_of_a_role_ends_a_sweep_after_whole_batches(
    connection: Connection, database: str
) -> None:
    add_stalled_jobs(connection, 200)
    connection.execute(
        """
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(60); RETURN new; END $$;
        CREATE TRIGGER wait BEFORE UPDATE ON procrastinate_jobs
            FOR EACH ROW WHEN (old.id = 150) EXECUTE FUNCTION wait();
        """
    )
    with (
        role(connection, "hasty", statement_timeout="5s"),
        psycopg.connect(database, user="hasty", autocommit=True) as sweeper,
        pytest.raises(psycopg.errors.QueryCanceled),
    ):
        sweeper.execute("CALL procrastinate_stalled.sweep(20)")

    assert rescued(connection) == 140
    assert last_sweep(connection)["duration"] is None
    connection.execute("DROP TRIGGER wait ON procrastinate_jobs")
    connection.execute(SWEEP)
    assert rescued(connection) == 200


@pytest.mark.parametrize("timeout", ["1ms", "1h"])
@pytest.mark.parametrize("query", [SWEEP, RETRY])
def test_the_lock_timeout_of_a_role_makes_no_difference(
    connection: Connection, connect: Connect, database: str, query: LiteralString, timeout: str
) -> None:
    add_stalled_jobs(connection, 30)
    with (
        role(connection, "patient", lock_timeout=timeout),
        psycopg.connect(database, user="patient", autocommit=True) as sweeper,
    ):
        with connect(autocommit=False) as other:
            other.execute("SELECT FROM procrastinate_jobs ORDER BY id LIMIT 1 FOR UPDATE")
            sweeper.execute(query)
            assert rescued(connection) == 29
            other.execute("LOCK TABLE procrastinate_jobs IN SHARE MODE")
            sweeper.execute("SET statement_timeout = '5s'")
            with pytest.raises(psycopg.errors.LockNotAvailable, match="the table procrastinate_jobs is locked"):
                sweeper.execute(query)
        sweeper.execute(query)
    assert rescued(connection) == 30


# Read-only

CHANGES: dict[str, LiteralString] = {
    "sweep": SWEEP,
    "retry_stalled_jobs": RETRY,
    "retry_job": "SELECT procrastinate_stalled.retry_job(min(id)) FROM procrastinate_jobs",
    "pause": "SELECT procrastinate_stalled.pause()",
    "resume": "SELECT procrastinate_stalled.resume()",
    "grant_monitor": "SELECT procrastinate_stalled.grant_monitor('pg_monitor')",
    "set_procrastinate_schema": "SELECT procrastinate_stalled.set_procrastinate_schema('public')",
}

READS: list[LiteralString] = [
    "SELECT * FROM procrastinate_stalled.get_stalled_jobs()",
    "SELECT * FROM procrastinate_stalled.retry_stalled_jobs(dry_run => true)",
    "SELECT * FROM procrastinate_stalled.explain_jobs()",
    "SELECT * FROM procrastinate_stalled.workers()",
    "SELECT * FROM procrastinate_stalled.status()",
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("source", ["database", "user", "database user", "session"])
def test_in_a_read_only_database_it_is_said_why_and_what_to_do_and_nothing_is_changed(
    connection: Connection, database: str, change: str, source: str
) -> None:
    job_id = add_stalled_job(connection)
    with role(connection, "reader"):
        names = {"database": sql.Identifier(database_name(database))}
        alter = {
            "database": sql.SQL("ALTER DATABASE {database} SET default_transaction_read_only = on"),
            "user": sql.SQL("ALTER ROLE reader SET default_transaction_read_only = on"),
            "database user": sql.SQL("ALTER ROLE reader IN DATABASE {database} SET default_transaction_read_only = on"),
            "session": sql.SQL("SELECT 1"),
        }
        connection.execute(alter[source].format(**names))

        with psycopg.connect(database, user="reader", autocommit=True) as reader:
            if source == "session":
                reader.execute("SET default_transaction_read_only = on")
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction) as caught:
                reader.execute(CHANGES[change])
            detail, hint = caught.value.diag.message_detail, caught.value.diag.message_hint or ""
            assert database_name(database) in (caught.value.diag.message_primary or "")
            assert detail == f"default_transaction_read_only is on. Where that was set: {source}."
            for query in READS:
                assert rows(reader, query) != []
            assert (rescued(connection), get_job(connection, job_id)["status"]) == (0, "doing")

            # What the hint says is enough.
            [in_session, *for_all] = re.findall(r"(?:SET|ALTER) [^;]+;", hint)
            reader.execute(in_session.encode())
            for statement in for_all:
                reader.execute(statement.encode())
            reader.execute(CHANGES[change])
        with psycopg.connect(database, user="reader", autocommit=True) as again:
            assert rows(again, "SHOW default_transaction_read_only") == [{"default_transaction_read_only": "off"}]


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "sweep"])
def test_in_a_read_only_transaction_it_is_said_that_it_is_one(connection: Connection, change: str) -> None:
    add_stalled_job(connection)
    connection.execute("BEGIN READ ONLY")

    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction) as caught:
        connection.execute(CHANGES[change])

    assert caught.value.diag.message_detail == "The transaction was made so by a statement."
    connection.execute("ROLLBACK")
    assert rescued(connection) == 0


@pytest.mark.parametrize("change", ["schedule", "unschedule"])
def test_pg_cron_is_told_nothing_in_a_read_only_transaction(cron_database: str, change: str) -> None:
    with psycopg.connect(cron_database, autocommit=True) as connection:
        connection.execute("BEGIN READ ONLY")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction, match="nothing can be changed"):
            connection.execute(f"SELECT procrastinate_stalled.{change}()".encode())


# Locks


@pytest.fixture(scope="module")
def small_server() -> Iterator[Server]:
    """A server with room for few locks and few connections."""
    with throwaway_server(settings=FAST | {"max_locks_per_transaction": "10", "max_connections": "6"}) as server:
        yield server


@pytest.fixture
def small_database(small_server: Server) -> Iterator[str]:
    """The address of a database of it, with Procrastinate, this product and a living worker."""
    with small_server.database() as conninfo:
        prepare(conninfo)
        yield conninfo


def prepare(conninfo: str) -> None:
    install_procrastinate(conninfo)
    install(conninfo)
    with psycopg.connect(conninfo) as connection:
        pretend_old_server(connection)
        add_worker(connection)


ALL_LOCKS: LiteralString = "SELECT pg_advisory_lock(number) FROM generate_series(1, 100000) AS number"
NO_LOCKS: LiteralString = "SELECT pg_advisory_unlock_all()"


def test_without_a_free_lock_a_sweep_says_so_and_the_next_one_goes_on(small_database: str) -> None:
    with psycopg.connect(small_database, autocommit=True) as connection:
        add_stalled_jobs(connection, 300)
        with psycopg.connect(small_database, autocommit=True) as other:
            with pytest.raises(psycopg.errors.OutOfMemory, match="out of shared memory"):
                other.execute(ALL_LOCKS)

            for query in (SWEEP, RETRY):
                with pytest.raises(psycopg.errors.OutOfMemory, match="out of shared memory") as caught:
                    connection.execute(query)
                assert "max_locks_per_transaction" in (caught.value.diag.message_hint or "")
            other.execute(NO_LOCKS)

        assert rescued(connection) == 0
        connection.execute(SWEEP)
        assert rescued(connection) == 300


def test_when_the_locks_run_out_during_a_sweep_whole_batches_are_done_and_the_next_one_goes_on(
    small_database: str,
) -> None:
    with psycopg.connect(small_database, autocommit=True) as connection:
        add_stalled_jobs(connection, 300)
        connection.execute(
            """
            CREATE FUNCTION take_all_locks() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                PERFORM pg_advisory_lock(number) FROM generate_series(1, 100000) AS number;
            END;
            $$;
            CREATE TRIGGER take_all_locks BEFORE UPDATE ON procrastinate_jobs
                FOR EACH ROW WHEN (old.id = 150) EXECUTE FUNCTION take_all_locks();
            """
        )
        with psycopg.connect(small_database, autocommit=True) as sweeper:
            with pytest.raises(psycopg.errors.OutOfMemory, match="out of shared memory"):
                sweeper.execute("CALL procrastinate_stalled.sweep(20)")
            sweeper.execute(NO_LOCKS)

        assert rescued(connection) == 140
        connection.execute("DROP TRIGGER take_all_locks ON procrastinate_jobs")
        connection.execute(SWEEP)
        assert rescued(connection) == 300


def test_a_sweep_takes_no_more_locks_for_many_jobs_than_for_one(small_database: str) -> None:
    with psycopg.connect(small_database, autocommit=True) as connection:
        connection.execute(
            """
            CREATE TABLE seen (locks bigint);
            CREATE FUNCTION count_locks() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                INSERT INTO seen SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid();
                RETURN NULL;
            END;
            $$;
            CREATE TRIGGER count_locks AFTER UPDATE OF status ON procrastinate_jobs EXECUTE FUNCTION count_locks();
            """
        )
        for number in (1, 3000):
            add_stalled_jobs(connection, number)
            connection.execute("CALL procrastinate_stalled.sweep(3000)")
        one, many = [row["locks"] for row in rows(connection, "SELECT locks FROM seen")]
        assert many == one < 100
        assert rescued(connection) == 3001


# Connections


def test_who_is_connected_sweeps_though_nobody_else_can_connect(small_database: str) -> None:
    with psycopg.connect(small_database, autocommit=True) as connection, ExitStack() as others:
        add_stalled_jobs(connection, 300)

        def connect_often() -> None:
            while True:
                others.enter_context(psycopg.connect(small_database))

        with pytest.raises(psycopg.OperationalError, match="too many clients already"):
            connect_often()
        connection.execute(SWEEP)
        assert rescued(connection) == 300


@pytest.mark.slow
def test_pg_cron_that_cannot_connect_writes_that_down_and_sweeps_in_the_next_minute_in_which_it_can(
    cron_database: str,
) -> None:
    with psycopg.connect(cron_database, autocommit=True) as connection:
        pretend_old_server(connection)
        add_worker(connection)
        add_stalled_jobs(connection, 30)
        # It may do what the owner may, who is a superuser; but for a superuser there would be no limit.
        connection.execute("CREATE ROLE app LOGIN CONNECTION LIMIT 0 IN ROLE postgres")
        try:
            connection.execute("SET ROLE app; SELECT procrastinate_stalled.schedule(); RESET ROLE")

            def runs(status: str) -> list[dict[str, object]]:
                query: LiteralString = "SELECT return_message FROM cron.job_run_details WHERE status = %s"
                return rows(connection, query, status)

            wait_until(lambda: runs("failed"), "a run of pg_cron has failed", seconds=NEXT_RUN_OF_PG_CRON)
            assert rescued(connection) == 0
            [last_run] = rows(
                connection, "SELECT level, detail FROM procrastinate_stalled.status() WHERE name = 'last_run'"
            )
            assert last_run["level"] == "error"

            connection.execute("ALTER ROLE app CONNECTION LIMIT -1")
            add_worker(connection)
            wait_until(lambda: runs("succeeded"), "a run of pg_cron has succeeded", seconds=NEXT_RUN_OF_PG_CRON)
            assert rescued(connection) == 30
        finally:
            connection.execute("SELECT cron.unschedule(jobid) FROM cron.job; DROP OWNED BY app; DROP ROLE app")


# Clocks


@pytest.mark.parametrize(
    ("heartbeat", "status", "sentence"),
    [
        ("-infinity", "todo", "was never heard"),
        ("4714-11-24 00:00:00+00 BC", "todo", "was last heard 24"),
        ("0001-01-01 BC", "todo", "was last heard 7"),
        ("1970-01-01", "todo", "was last heard 2"),
        ("tomorrow", "doing", "lies in the future"),
        ("294276-12-31 23:59:59+00", "doing", "lies in the future (294276-12-31"),
        ("infinity", "doing", "lies in the future (infinity)"),
    ],
)
def test_a_heartbeat_of_any_time_is_explained_and_neither_robs_its_worker_nor_holds_others(
    connection: Connection, heartbeat: str, status: str, sentence: str
) -> None:
    worker_id = add_worker(connection)
    job_id = add_job(connection, worker_id=worker_id)
    stalled = add_stalled_job(connection)
    connection.execute(
        "UPDATE procrastinate_workers SET last_heartbeat = %s::text::timestamptz WHERE id = %s", [heartbeat, worker_id]
    )

    [explained] = rows(connection, "SELECT verdict, sentence FROM procrastinate_stalled.explain_job(%s)", job_id)
    assert explained["verdict"] == ("stalled" if status == "todo" else "running")
    assert f"worker {worker_id}" in explained["sentence"]
    assert sentence in explained["sentence"]
    # psycopg has no such times.
    queries: list[LiteralString] = [
        "SELECT state, age::text FROM procrastinate_stalled.workers()",
        "SELECT level FROM procrastinate_stalled.status()",
        "SELECT id FROM procrastinate_stalled.get_stalled_jobs()",
        "SELECT id FROM procrastinate_stalled.get_stalled_jobs(seconds_since_heartbeat => 1)",
    ]
    for query in queries:
        assert rows(connection, query) != []
    connection.execute(SWEEP)
    assert last_sweep(connection)["error"] is None
    connection.execute(RETRY)

    assert [get_job(connection, job)["status"] for job in (job_id, stalled)] == [status, "todo"]
    assert rescued(connection) == (2 if status == "todo" else 1)


# Memory


@pytest.mark.parametrize("jobs", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_stalled_jobs_are_rescued_with_the_smallest_work_mem(
    connection: Connection, connect: Connect, jobs: int
) -> None:
    # It takes longer than the one worker, who does not beat, counts as alive.
    connection.execute("UPDATE procrastinate_stalled.settings SET require_live_worker = false")
    add_stalled_jobs(connection, jobs)
    sweeper = connect()
    sweeper.execute("SET work_mem = '64kB'")

    sweeper.execute(SWEEP)

    sweep = last_sweep(connection)
    assert (sweep["doing"], sweep["retried"], sweep["waiting"], sweep["error"]) == (jobs, jobs, 0, None)
    assert rescued(connection) == jobs
    assert peak_memory(sweeper) < 500_000


def peak_memory(connection: Connection) -> int:
    """How much memory the server process of this session had at most, with what it shares, in kB."""
    status = Path(f"/proc/{connection.info.backend_pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0])
