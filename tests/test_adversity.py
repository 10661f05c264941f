"""Bad data and bad luck: one row or one cancelled sweep must not keep the other jobs from being rescued."""

from typing import LiteralString

import psycopg
import pytest

from procrastinate_stalled import Stalled
from tests.jobs import (
    Connection,
    add_job,
    add_rule,
    add_stalled_job,
    add_worker,
    get_job,
    insert,
    rows,
)
from tests.server import PROJECT

SWEEP: LiteralString = "CALL procrastinate_stalled.sweep()"
RETRY: LiteralString = "SELECT procrastinate_stalled.retry_stalled_jobs()"


def refuse_to_change(connection: Connection, *job_ids: int) -> None:
    """Let each UPDATE of the jobs fail, as a trigger of the user's may do."""
    connection.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON procrastinate_jobs
            FOR EACH ROW WHEN (old.id = ANY ('{{{",".join(map(str, job_ids))}}}')) EXECUTE FUNCTION refuse();
        """.encode()
    )


def the_sweep(connection: Connection) -> dict[str, object]:
    [sweep] = rows(connection, "SELECT * FROM procrastinate_stalled.sweeps")
    return sweep


def test_a_unique_violation_other_than_of_a_queueing_lock_is_an_error_of_the_sweep(connection: Connection) -> None:
    job_id = add_stalled_job(connection)
    # What a restore or a switchover leaves when it forgets the sequences.
    connection.execute("SELECT setval('procrastinate_events_id_seq', 1, false)")

    connection.execute(SWEEP)

    assert get_job(connection, job_id)["status"] == "doing"
    error = the_sweep(connection)["error"]
    assert isinstance(error, str)
    assert error.startswith(f"job {job_id}: duplicate key")
    assert "procrastinate_events_pkey" in error


def test_a_retry_of_one_job_tells_such_a_violation_as_it_is(connection: Connection) -> None:
    job_id = add_stalled_job(connection)
    connection.execute("SELECT setval('procrastinate_events_id_seq', 1, false)")

    with pytest.raises(psycopg.errors.UniqueViolation) as caught:
        Stalled(connection).retry_job(job_id)

    assert caught.value.diag.constraint_name == "procrastinate_events_pkey"
    assert get_job(connection, job_id)["status"] == "doing"


def test_a_sweep_that_is_ended_in_its_first_batch_leaves_its_row_and_its_orphans(connection: Connection) -> None:
    add_stalled_job(connection)
    orphan = add_job(connection)
    connection.execute(
        """
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(10); RETURN new; END $$;
        CREATE TRIGGER slow BEFORE UPDATE ON procrastinate_jobs FOR EACH ROW EXECUTE FUNCTION slow();
        SET statement_timeout = '1s';
        """
    )

    with pytest.raises(psycopg.errors.QueryCanceled):
        connection.execute(SWEEP)

    assert [row["job_id"] for row in rows(connection, "SELECT job_id FROM procrastinate_stalled.orphans")] == [orphan]
    assert (the_sweep(connection)["doing"], the_sweep(connection)["duration"]) == (2, None)


def test_with_max_jobs_a_job_that_cannot_be_changed_does_not_stand_in_the_way_of_the_next(
    connection: Connection,
) -> None:
    jobs = [add_stalled_job(connection) for _ in range(4)]
    refuse_to_change(connection, jobs[0])

    rescued = [
        [rescue.job_id for rescue in Stalled(connection).retry_stalled_jobs(max_jobs=max_jobs)] for max_jobs in (1, 5)
    ]

    assert rescued == [[jobs[1]], [jobs[2], jobs[3]]]


@pytest.mark.parametrize("heartbeat", ["294276-12-31 12:00", "infinity"])
def test_a_time_far_in_the_future_does_not_make_a_sweep_fail(connection: Connection, heartbeat: str) -> None:
    connection.execute(
        "UPDATE procrastinate_stalled.rules SET run_timeout = '10 years', heartbeat_timeout = '10 years'"
    )
    add_rule(connection, "soon", queue_name="soon", heartbeat_timeout="1 second")
    of_the_future = add_job(connection, worker_id=add_worker(connection))
    connection.execute("UPDATE procrastinate_workers SET last_heartbeat = %s", [heartbeat])
    add_worker(connection)
    connection.execute("UPDATE procrastinate_events SET at = %s", [heartbeat])
    stalled = add_stalled_job(connection, queue_name="soon")

    connection.execute(SWEEP)

    assert get_job(connection, of_the_future)["status"] == "doing"
    assert get_job(connection, stalled)["status"] == "todo"
    assert the_sweep(connection)["error"] is None
    assert Stalled(connection).get_stalled_jobs(nb_seconds=3e9) == []
    assert Stalled(connection).get_stalled_jobs(seconds_since_heartbeat=3e9) == []


def test_rescues_that_never_count_towards_max_rescues_are_purged_though_their_job_can_run_again(
    connection: Connection,
) -> None:
    job_id = add_job(connection, "failed")
    for action, reason in (("retried", "heartbeat"), ("retried", "manual"), ("failed", "heartbeat")):
        insert(
            connection,
            "rescues",
            rescued_at="2020-01-01",
            job_id=job_id,
            queue_name="default",
            task_name="task",
            action=action,
            reason=reason,
            attempts=0,
        )

    connection.execute(SWEEP)

    kept = rows(connection, "SELECT action, reason FROM procrastinate_stalled.rescues")
    assert kept == [{"action": "retried", "reason": "heartbeat"}]


def test_two_transactions_that_note_an_orphan_conflict_as_serializable_ones_do(
    connection: Connection, database: str
) -> None:
    add_job(connection)
    with psycopg.connect(database) as other:
        other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        other.execute("SELECT FROM procrastinate_jobs")
        connection.execute(SWEEP)
        with pytest.raises(psycopg.errors.SerializationFailure):
            Stalled(other).retry_stalled_jobs()


def test_megabytes_of_args_do_not_matter_to_a_sweep(connection: Connection) -> None:
    jobs = [add_stalled_job(connection, args={"text": "x" * 2_000_000}) for _ in range(20)]
    connection.execute("SET work_mem = '64kB'")

    connection.execute(SWEEP)

    assert {get_job(connection, job_id)["status"] for job_id in jobs} == {"todo"}
    [stalled] = rows(connection, "SELECT count(*) FROM procrastinate_stalled.rescues")
    assert stalled["count"] == 20


def test_the_migration_refuses_to_run_outside_of_a_transaction(procrastinate_database: str) -> None:
    migration = PROJECT / "sql/migrations/procrastinate_stalled_0001_0.1.0.sql"
    with psycopg.connect(procrastinate_database, autocommit=True) as connection:
        statements = migration.read_text().split("$$;\n", 2)
        connection.execute(f"{statements[0]}$$;".encode())
        with pytest.raises(psycopg.errors.NoActiveSqlTransaction) as caught:
            connection.execute(f"{statements[1]}$$;".encode())
        assert caught.value.diag.message_hint is not None
        assert "--single-transaction" in caught.value.diag.message_hint


WRITTEN = (
    "procrastinate_jobs",
    "procrastinate_events",
    "procrastinate_stalled.rescues",
    "procrastinate_stalled.sweeps",
    "procrastinate_stalled.orphans",
)
READ = ("procrastinate_workers", "procrastinate_stalled.rules", "procrastinate_stalled.settings")


LOCKS = [*((table, "SHARE") for table in WRITTEN), *((table, "ACCESS EXCLUSIVE") for table in (*WRITTEN, *READ))]


@pytest.mark.parametrize(
    ("sweep", "table", "lock"),
    [
        *((SWEEP, *lock) for lock in LOCKS),
        # PostgreSQL itself waits for the table whose rows the function returns.
        *((RETRY, *lock) for lock in LOCKS if lock != ("procrastinate_stalled.rescues", "ACCESS EXCLUSIVE")),
    ],
)
def test_a_lock_on_a_whole_table_ends_a_sweep_at_once_and_says_so(
    connection: Connection, database: str, sweep: LiteralString, table: str, lock: str
) -> None:
    jobs = [add_stalled_job(connection) for _ in range(30)]
    add_job(connection)  # an orphan, to be noted
    with psycopg.connect(database) as other:
        other.execute(f"LOCK TABLE {table} IN {lock} MODE".encode())

        connection.execute("SET statement_timeout = '2s'")  # 30 jobs one by one, 100 ms each, would take longer
        with pytest.raises(psycopg.errors.LockNotAvailable) as caught:
            connection.execute(sweep)

        assert caught.value.diag.message_primary == f"the table {table} is locked by another session"
        hint = (caught.value.diag.message_hint or "").partition("Who it is: ")[2]
        pids = {row["pid"] for row in rows(connection, hint)}
        assert other.info.backend_pid in pids
    connection.execute(sweep)
    assert {get_job(connection, job_id)["status"] for job_id in jobs} == {"todo"}
