"""pg_cron in another database of the server: what the command line reads and does there.

None of our SQL functions is there, so what is run there stands here. Who connects there is often a
superuser. So nothing is run there that comes from objects in the database to be swept, which belong
to others: what the job is called, runs and runs as follows from who is connected to which database.
"""

# The messages in the SQL are not broken.
# ruff: noqa: E501

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

if TYPE_CHECKING:
    from collections.abc import Iterator

_THE_JOB = """
SELECT pg_catalog.jsonb_build_object(
    'database', pg_catalog.current_database(),
    'username', current_user,
    'command', 'CALL procrastinate_stalled.sweep()',
    'server', pg_catalog.pg_postmaster_start_time()
)
"""

# It is also the name in the hint of _require_pg_cron().
_PREPARE = """
SELECT set_config(
    'procrastinate_stalled.job',
    (job || jsonb_build_object('jobname', 'procrastinate_stalled ' || CASE
        WHEN octet_length(job ->> 'database') > 41 THEN hashtextextended(job ->> 'database', 0)::text
        ELSE job ->> 'database'
    END))::text,
    true
)
    FROM (SELECT %s::jsonb AS job) AS this
"""

_REQUIRE_PG_CRON = """
DO $$
DECLARE
    wanted CONSTANT jsonb := current_setting('procrastinate_stalled.job')::jsonb;
    cron_database text;
BEGIN
    IF pg_postmaster_start_time() <> (wanted ->> 'server')::timestamp with time zone THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('database "%s" is not on the server of database "%s"', current_database(), wanted ->> 'database'),
            DETAIL = format('The one server was started at %s, the other one at %s.', pg_postmaster_start_time(), wanted ->> 'server'),
            HINT = 'Nothing was changed. pg_cron works for the databases of its own server: correct --cron-database or --database-url.';
    END IF;

    BEGIN
        cron_database := current_setting('cron.database_name', true);
    EXCEPTION WHEN insufficient_privilege THEN
        cron_database := '';
    END;
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_cron')
        OR nullif(cron_database, '') <> current_database()
    THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('pg_cron is not in database "%s"', current_database()),
            DETAIL = CASE
                WHEN cron_database IS NULL THEN 'The server has not loaded it (shared_preload_libraries).'
                WHEN cron_database = '' THEN format('It lives in the database that cron.database_name says, which role "%s" may not see.', current_user)
                WHEN cron_database = current_database() THEN 'The server has loaded it for this database, but the extension is not created.'
                ELSE format('On this server it lives in database "%s" (cron.database_name).', cron_database)
            END,
            HINT = 'Nothing was changed. ' || CASE
                WHEN cron_database IS NULL THEN 'Add pg_cron to shared_preload_libraries, restart, CREATE EXTENSION pg_cron; or sweep from outside: procrastinate-stalled sweep'
                WHEN cron_database = '' THEN 'A superuser can say which one: SHOW cron.database_name;'
                WHEN cron_database = current_database() THEN format('There, as a superuser: CREATE EXTENSION pg_cron; GRANT USAGE ON SCHEMA cron TO %I;', current_user)
                ELSE format('Name that one: --cron-database %s', cron_database)
            END;
    END IF;

    IF NOT has_schema_privilege('cron', 'USAGE') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role "%s" may not use pg_cron in database "%s"', current_user, current_database()),
            DETAIL = 'It has no USAGE on schema "cron".',
            HINT = format('There, as a superuser: GRANT USAGE ON SCHEMA cron TO %I;', current_user);
    END IF;
END;
$$
"""

_SCHEDULE = """
DO $$
DECLARE
    wanted CONSTANT jsonb := current_setting('procrastinate_stalled.job')::jsonb;
    wanted_schedule CONSTANT text := current_setting('procrastinate_stalled.schedule');
    is_superuser CONSTANT boolean := (SELECT rolsuper FROM pg_roles WHERE rolname = current_user);
    is_for_another CONSTANT boolean := wanted ->> 'username' <> current_user;
    schedule_in_database CONSTANT oid := (
        SELECT oid
            FROM pg_proc
            WHERE pronamespace = 'cron'::regnamespace AND proname = 'schedule_in_database'
    );
    existing record;
    job_id bigint;
BEGIN
    IF current_database() = wanted ->> 'database' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('pg_cron lives in the very database that is to be swept, "%s"', current_database()),
            DETAIL = 'The job that sweeps that database is made without going into another one, and has another name.',
            HINT = 'Nothing was changed. Leave out --cron-database.';
    ELSIF schedule_in_database IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('the pg_cron in database "%s" is too old', current_database()),
            DETAIL = 'It has no function schedule_in_database, which came with pg_cron 1.4.',
            HINT = 'Nothing was changed. Upgrade it, and there, as a superuser: ALTER EXTENSION pg_cron UPDATE;';
    ELSIF is_for_another AND NOT is_superuser THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role "%s" may not schedule a job that runs as role "%s"', current_user, wanted ->> 'username'),
            DETAIL = 'pg_cron allows that to superusers only.',
            HINT = format('Nothing was changed. Connect to "%s" as the same role: --cron-database "dbname=%s user=%s"; or there as a superuser.', current_database(), current_database(), wanted ->> 'username');
    ELSIF NOT has_function_privilege(schedule_in_database, 'EXECUTE') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role "%s" may not schedule jobs for other databases than "%s"', current_user, current_database()),
            DETAIL = 'It has no EXECUTE on cron.schedule_in_database, which pg_cron leaves to superusers.',
            HINT = format('Nothing was changed. In database "%s", as a superuser: GRANT EXECUTE ON FUNCTION cron.schedule_in_database(%s) TO %I;', current_database(), oidvectortypes((SELECT proargtypes FROM pg_proc WHERE oid = schedule_in_database)), current_user);
    END IF;

    FOR existing IN
        SELECT jobid, jobname, schedule, command, database, active, nodeport
            FROM cron.job
            WHERE username = wanted ->> 'username'
                AND (jobname = wanted ->> 'jobname' OR database = wanted ->> 'database' AND command = wanted ->> 'command')
    LOOP
        IF existing.jobname = wanted ->> 'jobname'
            AND existing.schedule = wanted_schedule
            AND existing.command = wanted ->> 'command'
            AND existing.database = wanted ->> 'database'
            AND existing.nodeport = current_setting('port')::integer
            AND existing.active
        THEN
            job_id := existing.jobid;
        ELSE
            -- pg_cron leaves an existing job inactive, and in the database and on the port that it had.
            PERFORM cron.unschedule(existing.jobid);
        END IF;
    END LOOP;

    IF job_id IS NULL THEN
        BEGIN
            job_id := cron.schedule_in_database(
                wanted ->> 'jobname',
                wanted_schedule,
                wanted ->> 'command',
                wanted ->> 'database',
                CASE WHEN is_for_another THEN wanted ->> 'username' END
            );
        EXCEPTION WHEN invalid_parameter_value THEN
            RAISE EXCEPTION USING
                ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('pg_cron does not understand the schedule %L', wanted_schedule),
                DETAIL = format('pg_cron says: %s.', SQLERRM),
                HINT = 'Nothing was changed. Five fields as in crontab: ''* * * * *'' is each minute. ''30 seconds'' needs pg_cron 1.5.';
        END;
    END IF;
    PERFORM set_config('procrastinate_stalled.job_id', job_id::text, true);
END;
$$
"""

_UNSCHEDULE = """
SELECT cron.unschedule(cron_job.jobid)
    FROM cron.job AS cron_job, (SELECT current_setting('procrastinate_stalled.job')::jsonb AS job) AS this
    WHERE cron_job.jobname = job ->> 'jobname'
        OR cron_job.database = job ->> 'database'
            AND (cron_job.jobname = 'procrastinate_stalled' OR cron_job.command = job ->> 'command')
"""

# What _cron_jobs() reads of a pg_cron in its own database, with the last run of those that sweep ours.
_JOBS = """
SELECT jsonb_build_object(
    'database', current_database(),
    'role', current_user,
    'jobs', (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
                   'jobid', cron_job.jobid,
                   'jobname', cron_job.jobname,
                   'schedule', cron_job.schedule,
                   'command', cron_job.command,
                   'database', cron_job.database,
                   'username', cron_job.username,
                   'active', cron_job.active,
                   'nodeport', cron_job.nodeport,
                   'last_run', (
                       SELECT jsonb_build_object(
                                  'status', run.status,
                                  'return_message', run.return_message,
                                  'at', coalesce(run.end_time, run.start_time)
                              )
                           FROM cron.job_run_details AS run
                           WHERE cron_job.database = job ->> 'database'
                               AND run.jobid = cron_job.jobid
                               AND run.status IN ('succeeded', 'failed')
                           ORDER BY run.runid DESC
                           LIMIT 1
                   )
               )), '[]')
            FROM cron.job AS cron_job
            WHERE cron_job.jobname LIKE 'procrastinate\\_stalled%' OR cron_job.command = job ->> 'command'
    )
)
    FROM (SELECT current_setting('procrastinate_stalled.job')::jsonb AS job) AS this
"""


class NoConnectionToCronDatabase(psycopg.OperationalError):
    """The database where pg_cron lives cannot be reached, or its address cannot be understood."""


def address(cron_database: str, conninfo: str) -> str:
    """Return the address of the database where pg_cron lives.

    Parameters
    ----------
    cron_database :
        Its name; or an address as libpq understands it, in which what is left out is as in
        ``conninfo``: the server, and the role with its password.
    conninfo :
        The address of the database to be swept.

    Raises
    ------
    NoConnectionToCronDatabase
        libpq does not understand it.
    """
    # Not postgresql+psycopg://... either: as the name of a database it would be printed, with its password.
    if "=" not in cron_database and "://" not in cron_database:
        return make_conninfo(conninfo, dbname=cron_database)
    try:
        given = conninfo_to_dict(cron_database)
    except psycopg.ProgrammingError as error:
        raise NoConnectionToCronDatabase(*error.args) from error
    role, server = {"user", "password", "passfile"}, {"host", "hostaddr", "port", "service"}
    not_inherited: set[str] = set()
    if given.keys() & {"user", "service"}:
        not_inherited |= role
    if given.keys() & server:
        not_inherited |= server
    inherited = {name: value for name, value in conninfo_to_dict(conninfo).items() if name not in not_inherited}
    return make_conninfo("", **inherited | given)


def schedule(ours: psycopg.Connection[Any], cron_conninfo: str, schedule: str) -> int:
    """Let the pg_cron of another database sweep ours, as the role that is connected to ours; return the job's id.

    Called again, it changes the schedule of the existing job, activates it again, or sets it right.

    Raises
    ------
    psycopg.errors.InvalidAuthorizationSpecification
        The role cannot log in.
    psycopg.errors.ObjectNotInPrerequisiteState
        pg_cron is not in that database, or that is on another server.
    psycopg.errors.InsufficientPrivilege
        The role there may not schedule such a job.
    psycopg.errors.InvalidParameterValue
        pg_cron does not understand the schedule.
    """
    # Where it is not installed, this function is missing.
    ours.execute("SELECT procrastinate_stalled._require_login()")
    with _cron_database(ours, cron_conninfo) as there:
        there.execute("SELECT set_config('procrastinate_stalled.schedule', %s, true)", [schedule])
        there.execute(_SCHEDULE)
        ((job_id,),) = there.execute("SELECT current_setting('procrastinate_stalled.job_id')::bigint").fetchall()
    return int(job_id)


def unschedule(ours: psycopg.Connection[Any], cron_conninfo: str) -> bool:
    """Remove the job that sweeps our database from the pg_cron of another one; return whether there was one.

    It removes that of the role which connects there; if that is a superuser, everybody's.
    """
    with _cron_database(ours, cron_conninfo) as there:
        return there.execute(_UNSCHEDULE).rowcount > 0


def read_jobs(ours: psycopg.Connection[Any], cron_conninfo: str) -> dict[str, Any]:
    """Return what the pg_cron of another database knows of our jobs, for the function ``status()``."""
    with _cron_database(ours, cron_conninfo) as there:
        ((jobs,),) = there.execute(_JOBS).fetchall()
    return dict(jobs)


@contextmanager
def told(ours: psycopg.Connection[Any], jobs: dict[str, Any]) -> Iterator[None]:
    """Let the function ``status()`` judge these jobs instead of those that it would read itself."""
    with ours.transaction():
        ours.execute(
            "SELECT pg_catalog.set_config('procrastinate_stalled.cron_elsewhere', %s, true)", [json.dumps(jobs)]
        )
        yield


@contextmanager
def _cron_database(ours: psycopg.Connection[Any], cron_conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """Lend a connection to the database of pg_cron, in a transaction in which nobody else's objects are found by name."""
    ((job,),) = ours.execute(_THE_JOB).fetchall()
    try:
        connection = psycopg.connect(
            cron_conninfo,
            autocommit=True,
            client_encoding="utf8",
            fallback_application_name="procrastinate-stalled",
        )
    except (psycopg.OperationalError, psycopg.ProgrammingError) as error:
        raise NoConnectionToCronDatabase(*error.args) from error
    with connection as there, there.transaction():
        there.execute("SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true)")
        there.execute("SET LOCAL lock_timeout = '5s'")
        there.execute(_PREPARE, [json.dumps(job)])
        there.execute(_REQUIRE_PG_CRON)
        yield there
