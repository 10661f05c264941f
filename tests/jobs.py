"""Puts workers, jobs, events and rules into the states that tests need, past Procrastinate's real triggers.

Times are in seconds before `now()`, which stands still within a transaction.
"""

from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

Connection = psycopg.Connection[Any]
Row = dict[str, Any]


def pretend_old_server(connection: Connection) -> None:
    """Let the product believe that the server has been available for years.

    Test servers live for minutes, and the silence of workers that were not heard of since its start is forgiven for a
    while. `SET tests.available_since` says otherwise.
    """
    connection.execute(
        """
        CREATE OR REPLACE FUNCTION procrastinate_stalled._available_since()
            RETURNS timestamp with time zone
            LANGUAGE plpgsql
            STABLE
        AS $$
        BEGIN
            RETURN coalesce(nullif(current_setting('tests.available_since', true), ''), '2000-01-01');
        END;
        $$
        """
    )


def add_worker(connection: Connection, silent_for: float = 0) -> int:
    """Register a worker that beat last so many seconds ago; return its id."""
    (worker,) = rows(
        connection,
        "INSERT INTO procrastinate_workers (last_heartbeat) VALUES (now() - make_interval(secs => %s)) RETURNING id",
        silent_for,
    )
    return int(worker["id"])


def add_job(
    connection: Connection,
    status: str = "doing",
    *,
    queue_name: str = "default",
    task_name: str = "task",
    worker_id: int | None = None,
    started_ago: float | None = None,
    **columns: object,
) -> int:
    """Add a job and take it through Procrastinate's states to this one; return its id.

    Parameters
    ----------
    started_ago :
        The seconds since its `started` event; None: just now.
    columns :
        Other columns of `procrastinate_jobs`, such as args, lock, scheduled_at, abort_requested.
    """
    (job,) = rows(
        connection,
        "INSERT INTO procrastinate_jobs (queue_name, task_name) VALUES ('default', %s) RETURNING id",
        task_name,
    )
    job_id = int(job["id"])
    if status not in {"todo", "cancelled"}:
        update_job(connection, job_id, status="doing")
        if started_ago is not None:
            connection.execute(
                """
                UPDATE procrastinate_events SET at = now() - make_interval(secs => %s)
                WHERE job_id = %s AND type = 'started'
                """,
                [started_ago, job_id],
            )
    # All else comes last: its locks, or an INSERT into a queue with a long name, could forbid the steps to this state.
    update_job(connection, job_id, status=status, queue_name=queue_name, worker_id=worker_id, **columns)
    return job_id


def add_stalled_job(connection: Connection, silent_for: float = 3600, **columns: Any) -> int:
    """Add a job in `doing` whose worker is silent; return its id. The arguments are those of `add_job`."""
    return add_job(connection, worker_id=add_worker(connection, silent_for), **columns)


def update_job(connection: Connection, job_id: int, **columns: object) -> None:
    """Set columns of a job."""
    assignments = [sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder()) for name in columns]
    connection.execute(
        sql.SQL("UPDATE procrastinate_jobs SET {} WHERE id = %s").format(sql.SQL(", ").join(assignments)),
        [*map(_parameter, columns.values()), job_id],
    )


def add_event(connection: Connection, job_id: int, event_type: str | None, ago: float | None) -> None:
    """Add an event of a job; None stands for NULL."""
    connection.execute(
        "INSERT INTO procrastinate_events (job_id, type, at) VALUES (%s, %s, now() - make_interval(secs => %s))",
        [job_id, event_type, ago],
    )


def add_orphan_note(connection: Connection, job_id: int, attempts: int, seen_ago: float) -> None:
    """Note an orphan, as a sweep does at first sight."""
    connection.execute(
        """
        INSERT INTO procrastinate_stalled.orphans (job_id, attempts, seen_at)
        VALUES (%s, %s, now() - make_interval(secs => %s))
        """,
        [job_id, attempts, seen_ago],
    )


def add_rule(connection: Connection, name: str, **columns: object) -> None:
    """Add a rule."""
    insert(connection, "rules", name=name, **columns)


def insert(connection: Connection, table: str, **columns: object) -> None:
    """Insert a row into a table of this product."""
    connection.execute(
        sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
            sql.Identifier("procrastinate_stalled", table),
            sql.SQL(", ").join(map(sql.Identifier, columns)),
            sql.SQL(", ").join([sql.Placeholder()] * len(columns)),
        ),
        [*map(_parameter, columns.values())],
    )


def get_job(connection: Connection, job_id: int) -> Row:
    """Read the row of a job."""
    (job,) = rows(connection, "SELECT * FROM procrastinate_jobs WHERE id = %s", job_id)
    return job


def get_events(connection: Connection, job_id: int) -> list[str]:
    """Read the types of the events of a job, oldest first."""
    events = rows(connection, "SELECT type FROM procrastinate_events WHERE job_id = %s ORDER BY id", job_id)
    return [event["type"] for event in events]


def rows(connection: Connection, query: LiteralString, *parameters: object) -> list[Row]:
    """Run a query and return its rows."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query, parameters).fetchall()


def contents(connection: Connection) -> dict[str, list[str]]:
    """Everything that is in the tables of Procrastinate and of this product, to be compared with later."""
    tables = rows(
        connection,
        """
        SELECT oid::regclass::text AS name
        FROM pg_class
        WHERE relkind = 'r' AND (relnamespace = 'procrastinate_stalled'::regnamespace OR relname ~ '^procrastinate_')
        """,
    )
    return {
        table["name"]: [
            row["row"] for row in rows(connection, f"SELECT r::text AS row FROM {table['name']} AS r ORDER BY 1")
        ]
        for table in tables
    }


def _parameter(value: object) -> object:
    return Jsonb(value) if isinstance(value, dict | list) else value
