"""The SQL functions as methods, for synchronous connections.

Generated from client_async.py by scripts/generate_sync_client.py: change that file and run the script.
"""

from dataclasses import fields
from datetime import datetime, timedelta
from typing import Any, LiteralString, TypeVar

from psycopg import Connection, Cursor
from psycopg.rows import class_row, tuple_row
from psycopg.sql import SQL, Identifier

from procrastinate_stalled.rows import ExplainedJob, Rescue, Rule, StalledJob, Status, TaskRuntime, Worker

Row = TypeVar("Row", StalledJob, Rescue, ExplainedJob, Worker, Rule, Status, TaskRuntime)


class Stalled:
    """The functions of the schema ``procrastinate_stalled``, called through a connection of yours.

    Every method is one call of the SQL function of the same name, with the same arguments. All but
    `sweep` take part in the transaction of the connection, and neither commit nor roll back. Errors
    of psycopg pass through unchanged.

    Parameters
    ----------
    connection :
        An open connection of psycopg, with any ``row_factory``. It stays yours to commit and to
        close.
    """

    def __init__(self, connection: Connection[Any]) -> None:
        self.connection = connection

    def get_stalled_jobs(
        self,
        *,
        queue: str | None = None,
        task_name: str | None = None,
        seconds_since_heartbeat: float | None = None,
        nb_seconds: float | None = None,
    ) -> list[StalledJob]:
        """Return the stalled jobs, with the evidence and what a sweep would do. Writes nothing.

        Without seconds these are the jobs that the rules call stalled now; with seconds, exactly
        the jobs of Procrastinate's ``JobManager.get_stalled_jobs`` with the same argument.

        Parameters
        ----------
        queue :
            Only jobs of this queue.
        task_name :
            Only jobs of this task.
        seconds_since_heartbeat :
            Instead of the rules' timeouts: jobs whose worker has been silent for more seconds, and
            orphans.
        nb_seconds :
            Instead of all that: jobs that started more seconds ago, whatever their worker says.

        Returns
        -------
        :
            One row per job, by id.

        Raises
        ------
        psycopg.errors.InvalidParameterValue
            The seconds are zero, negative, NaN or above 100 years.
        """
        return self._fetch(
            StalledJob,
            """
            procrastinate_stalled.get_stalled_jobs(
                queue => %(queue)s,
                task_name => %(task_name)s,
                seconds_since_heartbeat => %(seconds_since_heartbeat)s::double precision,
                nb_seconds => %(nb_seconds)s::double precision
            )
            """,
            queue=queue,
            task_name=task_name,
            seconds_since_heartbeat=seconds_since_heartbeat,
            nb_seconds=nb_seconds,
        )

    def retry_stalled_jobs(
        self,
        *,
        queue: str | None = None,
        task_name: str | None = None,
        seconds_since_heartbeat: float | None = None,
        nb_seconds: float | None = None,
        max_jobs: int | None = None,
        dry_run: bool = False,
    ) -> list[Rescue]:
        """Rescue the stalled jobs in the transaction of the connection: one sweep over what `get_stalled_jobs` returns.

        The rules choose what is done to each job. Commit soon: until then a rescued job blocks
        whoever defers another one with its queueing lock.

        Parameters
        ----------
        queue :
            As for `get_stalled_jobs`.
        task_name :
            As for `get_stalled_jobs`.
        seconds_since_heartbeat :
            As for `get_stalled_jobs`.
        nb_seconds :
            As for `get_stalled_jobs`.
        max_jobs :
            Rescue at most so many jobs. None: all.
        dry_run :
            Write nothing, and return what would be done.

        Returns
        -------
        :
            One row per rescued job.

        Raises
        ------
        psycopg.errors.InvalidParameterValue
            The seconds are zero, negative, NaN or above 100 years, or ``max_jobs`` is not positive.
        psycopg.errors.LockNotAvailable
            Another session has locked the whole table of jobs.
        """
        return self._fetch(
            Rescue,
            """
            procrastinate_stalled.retry_stalled_jobs(
                queue => %(queue)s,
                task_name => %(task_name)s,
                seconds_since_heartbeat => %(seconds_since_heartbeat)s::double precision,
                nb_seconds => %(nb_seconds)s::double precision,
                max_jobs => %(max_jobs)s::integer,
                dry_run => %(dry_run)s
            )
            """,
            queue=queue,
            task_name=task_name,
            seconds_since_heartbeat=seconds_since_heartbeat,
            nb_seconds=nb_seconds,
            max_jobs=max_jobs,
            dry_run=dry_run,
        )

    def retry_job(
        self,
        job_id: int,
        *,
        retry_at: datetime | None = None,
        priority: int | None = None,
        queue: str | None = None,
        lock: str | None = None,
    ) -> Rescue:
        """Retry one job in ``doing``, whatever the rules and its worker say: an operator's decision.

        Parameters
        ----------
        job_id :
            The job.
        retry_at :
            When the retry may start. None: at once.
        priority :
            New priority. None: unchanged.
        queue :
            New queue. None: unchanged.
        lock :
            New lock. None: unchanged.

        Returns
        -------
        :
            The new row of ``rescues``.

        Raises
        ------
        psycopg.errors.NoDataFound
            There is no such job.
        psycopg.errors.ObjectNotInPrerequisiteState
            The job is not in ``doing``.
        psycopg.errors.UniqueViolation
            Another job waits with its queueing lock.
        psycopg.errors.LockNotAvailable
            Another session has locked it.
        psycopg.errors.InvalidParameterValue
            An argument makes no sense.
        """
        rescues = self._fetch(
            Rescue,
            """
            procrastinate_stalled.retry_job(
                job_id => %(job_id)s::bigint,
                retry_at => %(retry_at)s::timestamp with time zone,
                priority => %(priority)s::integer,
                queue => %(queue)s,
                lock => %(lock)s
            )
            """,
            job_id=job_id,
            retry_at=retry_at,
            priority=priority,
            queue=queue,
            lock=lock,
        )
        return rescues[0]

    def sweep(self, *, batch_size: int = 1000) -> None:
        """Find and rescue all stalled jobs, in batches of which each is committed: what pg_cron runs.

        The procedure commits, so the connection must be in autocommit mode and outside of a
        transaction. What was done stands in the tables ``rescues`` and ``sweeps``.

        Parameters
        ----------
        batch_size :
            How many jobs are rescued between two commits.

        Raises
        ------
        psycopg.errors.InvalidTransactionTermination
            The connection is not in autocommit mode, or a transaction is open.
        psycopg.errors.InvalidParameterValue
            ``batch_size`` is not positive.
        psycopg.errors.LockNotAvailable
            Another session has locked the whole table of jobs.
        """
        with Cursor(self.connection) as cursor:
            cursor.execute(
                "CALL procrastinate_stalled.sweep(batch_size => %(batch_size)s::integer)",
                {"batch_size": batch_size},
            )

    def explain_job(self, job_id: int) -> ExplainedJob:
        """Say whether a job is stalled, by which rule, on what evidence, and when it will be. Writes nothing.

        Parameters
        ----------
        job_id :
            The job, in any status. There need not be one.

        Returns
        -------
        :
            The verdict with its evidence, and the whole in one sentence.

        Raises
        ------
        psycopg.errors.InvalidParameterValue
            ``job_id`` is None.
        """
        explained_jobs = self._fetch(
            ExplainedJob, "procrastinate_stalled.explain_job(job_id => %(job_id)s::bigint)", job_id=job_id
        )
        return explained_jobs[0]

    def explain_jobs(self, *, queue: str | None = None, task_name: str | None = None) -> list[ExplainedJob]:
        """Explain every job in ``doing``, as `explain_job` does. Writes nothing.

        Parameters
        ----------
        queue :
            Only jobs of this queue.
        task_name :
            Only jobs of this task.

        Returns
        -------
        :
            One row per job: those that are or will be stalled first come first, then by id.
        """
        return self._fetch(
            ExplainedJob,
            "procrastinate_stalled.explain_jobs(queue => %(queue)s, task_name => %(task_name)s)",
            queue=queue,
            task_name=task_name,
        )

    def workers(self) -> list[Worker]:
        """Return the workers, with the age of their heartbeats and the number of their jobs. Writes nothing."""
        return self._fetch(Worker, "procrastinate_stalled.workers()")

    def pause(
        self,
        duration: timedelta = timedelta(hours=1),
        *,
        queue: str | None = None,
        task_name: str | None = None,
        reason: str | None = None,
    ) -> Rule:
        """Rescue no job for a while: a rule before all others that ignores jobs until it expires.

        Parameters
        ----------
        duration :
            For how long, from now.
        queue :
            Only jobs of this queue.
        task_name :
            Only jobs whose task is LIKE this pattern, such as ``billing.%``.
        reason :
            Free text for whoever meets the pause.

        Returns
        -------
        :
            The row of ``rules`` that is the pause.

        Raises
        ------
        psycopg.errors.InvalidParameterValue
            An argument makes no sense.
        """
        rules = self._fetch(
            Rule,
            """
            procrastinate_stalled.pause(
                duration => %(duration)s::interval,
                queue => %(queue)s,
                task_name => %(task_name)s,
                reason => %(reason)s
            )
            """,
            duration=duration,
            queue=queue,
            task_name=task_name,
            reason=reason,
        )
        return rules[0]

    def resume(self, *, queue: str | None = None, task_name: str | None = None) -> bool:
        """Remove the pause that was made with the same arguments. If other pauses remain, a notice says so.

        Parameters
        ----------
        queue :
            As it was given to `pause`.
        task_name :
            As it was given to `pause`.

        Returns
        -------
        :
            Whether it was in force.
        """
        was_paused: bool = self._fetch_value(
            "SELECT procrastinate_stalled.resume(queue => %(queue)s, task_name => %(task_name)s)",
            queue=queue,
            task_name=task_name,
        )
        return was_paused

    def schedule(self, *, schedule: str = "* * * * *") -> int:
        """Let pg_cron run the sweep. Called again, it changes the schedule and re-activates the job.

        Parameters
        ----------
        schedule :
            In the syntax of cron, or ``30 seconds`` with pg_cron 1.5 or later.

        Returns
        -------
        :
            The id of the pg_cron job.

        Raises
        ------
        psycopg.errors.ObjectNotInPrerequisiteState
            There is no pg_cron in this database; the hint says what to do.
        psycopg.errors.InvalidParameterValue
            pg_cron does not understand the schedule.
        psycopg.errors.InsufficientPrivilege
            The role may not use pg_cron.
        """
        job_id: int = self._fetch_value(
            "SELECT procrastinate_stalled.schedule(schedule => %(schedule)s)", schedule=schedule
        )
        return job_id

    def unschedule(self) -> bool:
        """Remove the pg_cron job.

        Returns
        -------
        :
            Whether there was one.
        """
        was_scheduled: bool = self._fetch_value("SELECT procrastinate_stalled.unschedule()")
        return was_scheduled

    def set_procrastinate_schema(self, schema: str) -> None:
        """Look for Procrastinate in another schema from now on: it was moved, or a dump was restored.

        Parameters
        ----------
        schema :
            The name of the schema. Upper and lower case count.

        Raises
        ------
        psycopg.errors.InvalidSchemaName
            There is no such schema, or no Procrastinate in it.
        psycopg.errors.InsufficientPrivilege
            The role does not own the functions.
        """
        with Cursor(self.connection) as cursor:
            cursor.execute(
                "SELECT procrastinate_stalled.set_procrastinate_schema(schema => %(schema)s)", {"schema": schema}
            )

    def status(self) -> list[Status]:
        """Return the health of the whole, one row per check. Writes nothing."""
        return self._fetch(Status, "procrastinate_stalled.status()")

    def task_runtimes(self, since: datetime | None = None) -> list[TaskRuntime]:
        """Return how long the runs of each task took: the basis for a ``run_timeout``. Writes nothing.

        Parameters
        ----------
        since :
            Only runs that started since then. None: in the last 7 days.

        Returns
        -------
        :
            One row per task, by name. Runs that a rescue ended are not counted.
        """
        return self._fetch(
            TaskRuntime,
            "procrastinate_stalled.task_runtimes(since => %(since)s::timestamp with time zone)",
            since=since,
        )

    def grant_monitor(self, role: str) -> None:
        """Let a role look at everything, and change nothing. Call it again after an upgrade.

        Parameters
        ----------
        role :
            The name of an existing role; upper and lower case count.

        Raises
        ------
        psycopg.errors.UndefinedObject
            There is no such role.
        psycopg.errors.InsufficientPrivilege
            You may not grant that; the hint says who may.
        """
        self._fetch_value("SELECT procrastinate_stalled.grant_monitor(role => %(role)s)", role=role)

    def grant_operator(self, role: str) -> None:
        """Let a role look at everything, and retry jobs. Call it again after an upgrade.

        Parameters
        ----------
        role :
            The name of an existing role; upper and lower case count.

        Raises
        ------
        psycopg.errors.UndefinedObject
            There is no such role.
        psycopg.errors.InsufficientPrivilege
            You may not grant that; the hint says who may.
        """
        self._fetch_value("SELECT procrastinate_stalled.grant_operator(role => %(role)s)", role=role)

    def version(self) -> str:
        """Return the version of the SQL that is installed in the database."""
        version: str = self._fetch_value("SELECT procrastinate_stalled.version()")
        return version

    def _fetch(self, row: type[Row], function_call: LiteralString, **arguments: Any) -> list[Row]:
        columns = [Identifier(field.name) for field in fields(row)]
        query = SQL("SELECT {columns} FROM {function_call}").format(
            columns=SQL(", ").join(columns), function_call=SQL(function_call)
        )
        with Cursor(self.connection, row_factory=class_row(row)) as cursor:
            cursor.execute(query, arguments)
            return cursor.fetchall()

    def _fetch_value(self, query: LiteralString, **arguments: Any) -> Any:
        with Cursor(self.connection, row_factory=tuple_row) as cursor:
            cursor.execute(query, arguments)
            rows = cursor.fetchall()
            return rows[0][0]
