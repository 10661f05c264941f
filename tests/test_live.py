"""The main job from end to end: real workers, a real SIGKILL, and pg_cron that sweeps by itself."""

from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from tests.conftest import RunWorker
from tests.tasks import open_app
from tests.wait import wait_until

# pg_cron 1.4 has no schedule shorter than a minute.
NEXT_RUN_OF_PG_CRON = 90

WORKER = {"update_heartbeat_interval": 0.5, "fetch_job_polling_interval": 60}


def job(connection: psycopg.Connection[Any], job_id: int) -> dict[str, Any]:
    cursor = connection.cursor(row_factory=dict_row)
    row = cursor.execute("SELECT * FROM procrastinate_jobs WHERE id = %s", [job_id]).fetchone()
    assert row is not None
    return row


def events(connection: psycopg.Connection[Any], job_id: int) -> list[str]:
    rows = connection.execute("SELECT type::text FROM procrastinate_events WHERE job_id = %s ORDER BY id", [job_id])
    return [event for (event,) in rows]


def rescues(connection: psycopg.Connection[Any], job_id: int) -> list[dict[str, Any]]:
    cursor = connection.cursor(row_factory=dict_row)
    return cursor.execute(
        "SELECT * FROM procrastinate_stalled.rescues WHERE job_id = %s ORDER BY id", [job_id]
    ).fetchall()


def set_default_rule(connection: psycopg.Connection[Any], heartbeat_timeout: str) -> None:
    connection.execute(
        "UPDATE procrastinate_stalled.rules SET heartbeat_timeout = %s::text::interval WHERE name = 'default'",
        [heartbeat_timeout],
    )


def test_a_job_of_a_killed_worker_is_finished_by_another_one_because_pg_cron_swept(
    cron_database: str, run_worker: RunWorker, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    with psycopg.connect(cron_database, autocommit=True) as connection:
        set_default_rule(connection, "3 seconds")
        row = connection.execute("SELECT procrastinate_stalled.schedule()").fetchone()
        assert row is not None
        (cron_job_id,) = row
        with open_app(cron_database) as app:
            job_id = app.configure_task("tests.tasks.record").defer(path=str(runs), seconds=5)

        first = run_worker(cron_database, **WORKER)
        wait_until(runs.exists, "the job has started")
        first.kill()
        # A worker that waits for work: nothing but a notification can wake it within its polling interval.
        second = run_worker(cron_database, **WORKER)
        assert job(connection, job_id)["status"] == "doing"
        assert job(connection, job_id)["worker_id"] == first.id

        wait_until(
            lambda: job(connection, job_id)["status"] == "succeeded",
            "another worker has finished the job",
            seconds=NEXT_RUN_OF_PG_CRON,
        )

        assert runs.read_text().splitlines() == [f"started {first.pid}", f"started {second.pid}", f"ended {second.pid}"]
        assert job(connection, job_id)["attempts"] == 2
        assert events(connection, job_id) == ["deferred", "started", "deferred_for_retry", "started", "succeeded"]

        [rescue] = rescues(connection, job_id)
        assert (rescue["action"], rescue["reason"], rescue["detail"]) == ("retried", "heartbeat", None)
        assert (rescue["rule_name"], rescue["worker_id"], rescue["attempts"]) == ("default", first.id, 0)
        assert rescue["last_heartbeat"] < rescue["rescued_at"]
        assert rescue["rescued_by"] == "postgres (pg_cron)"

        cursor = connection.cursor(row_factory=dict_row)
        [sweep] = cursor.execute("SELECT * FROM procrastinate_stalled.sweeps WHERE retried > 0").fetchall()
        assert (sweep["doing"], sweep["retried"], sweep["failed"], sweep["aborted"]) == (1, 1, 0, 0)
        assert (sweep["waiting"], sweep["held"], sweep["error"]) == (0, 0, None)
        assert sweep["duration"] is not None
        runs_of_pg_cron = connection.execute(
            "SELECT DISTINCT status FROM cron.job_run_details WHERE jobid = %s AND end_time IS NOT NULL", [cron_job_id]
        ).fetchall()
        assert runs_of_pg_cron == [("succeeded",)]


def test_the_job_of_a_pruned_dead_worker_is_rescued_once_it_has_been_an_orphan_for_the_timeout(
    database: str, connection: psycopg.Connection[Any], run_worker: RunWorker, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    set_default_rule(connection, "2 seconds")
    with open_app(database) as app:
        job_id = app.configure_task("tests.tasks.record").defer(path=str(runs), seconds=1)
    first = run_worker(database, **WORKER)
    wait_until(runs.exists, "the job has started")
    first.kill()
    wait_until(
        lambda: (
            connection.execute(
                "SELECT FROM procrastinate_workers WHERE id = %s AND last_heartbeat < now() - interval '1 second'",
                [first.id],
            ).rowcount
        ),
        "the worker has been silent for a second",
    )
    run_worker(database, **WORKER, stalled_worker_timeout=1)
    assert job(connection, job_id)["worker_id"] is None

    connection.execute("CALL procrastinate_stalled.sweep()")
    assert rescues(connection, job_id) == []

    def rescued() -> bool:
        connection.execute("CALL procrastinate_stalled.sweep()")
        return bool(rescues(connection, job_id))

    wait_until(rescued, "the orphan has been rescued")
    [rescue] = rescues(connection, job_id)
    assert (rescue["reason"], rescue["worker_id"]) == ("orphaned", None)
    wait_until(lambda: job(connection, job_id)["status"] == "succeeded", "the job has succeeded")


def test_a_job_that_kills_its_workers_is_failed_after_max_rescues(
    database: str, connection: psycopg.Connection[Any], run_worker: RunWorker
) -> None:
    set_default_rule(connection, "3 seconds")
    connection.execute("UPDATE procrastinate_stalled.rules SET max_rescues = 2")
    run_worker(database, queues=["another"], **WORKER)
    with open_app(database) as app:
        job_id = app.configure_task("tests.tasks.poison").defer()

    for _ in range(3):
        assert job(connection, job_id)["status"] == "todo"
        worker = run_worker(database, **WORKER)
        assert worker.wait() == -9
        assert job(connection, job_id)["status"] == "doing"

        def rescued() -> bool:
            connection.execute("CALL procrastinate_stalled.sweep()")
            return bool(job(connection, job_id)["status"] != "doing")

        wait_until(rescued, "the job has been rescued")

    assert job(connection, job_id)["status"] == "failed"
    assert [(rescue["action"], rescue["detail"], rescue["attempts"]) for rescue in rescues(connection, job_id)] == [
        ("retried", None, 0),
        ("retried", None, 1),
        ("failed", "max_rescues", 2),
    ]
    assert events(connection, job_id)[-1] == "failed"


def test_a_job_of_a_living_worker_is_not_touched(
    database: str, connection: psycopg.Connection[Any], run_worker: RunWorker, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    set_default_rule(connection, "1.5 seconds")
    with open_app(database) as app:
        job_id = app.configure_task("tests.tasks.record").defer(path=str(runs), seconds=4)
    worker = run_worker(database, **WORKER)

    def ended() -> bool:
        connection.execute("CALL procrastinate_stalled.sweep()")
        return job(connection, job_id)["status"] != "doing" and runs.exists()

    wait_until(runs.exists, "the job has started")
    wait_until(ended, "the job has ended")

    assert runs.read_text().splitlines() == [f"started {worker.pid}", f"ended {worker.pid}"]
    assert rescues(connection, job_id) == []
    assert job(connection, job_id)["status"] == "succeeded"


def test_a_sweep_does_not_rob_a_worker_that_finishes_at_the_same_time(
    database: str, connection: psycopg.Connection[Any], run_worker: RunWorker
) -> None:
    # The rule calls every running job stalled at once; whoever comes first, each job has one end per run.
    connection.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '1 millisecond', max_rescues = NULL")
    with open_app(database) as app:
        for _ in range(200):
            app.configure_task("tests.tasks.succeed").defer()
    run_worker(database, **WORKER, concurrency=10)

    def all_ended() -> bool:
        connection.execute("CALL procrastinate_stalled.sweep()")
        unfinished = "SELECT FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
        return connection.execute(unfinished).rowcount == 0

    wait_until(all_ended, "all jobs have ended")
    assert connection.execute("SELECT DISTINCT status::text FROM procrastinate_jobs").fetchall() == [("succeeded",)]
    assert (
        connection.execute(
            """
        SELECT job_id
        FROM procrastinate_events
        GROUP BY job_id
        HAVING count(*) FILTER (WHERE type = 'deferred_for_retry')
            <> (SELECT count(*) FROM procrastinate_stalled.rescues WHERE rescues.job_id = procrastinate_events.job_id)
        """
        ).fetchall()
        == []
    )
