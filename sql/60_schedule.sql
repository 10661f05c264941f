-- pg_cron. It may be absent, in another database, or closed to this role: each is said, with the way out.
-- cron.job shows a role its own jobs only; a superuser sees all.

CREATE OR REPLACE FUNCTION procrastinate_stalled._cron_database()
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN current_setting('cron.database_name', true);
EXCEPTION WHEN insufficient_privilege THEN
    -- The setting exists, but only members of pg_read_all_settings may see it.
    RETURN '';
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._cron_database() IS
    'The database that pg_cron lives in, as the server is configured. NULL: the server has not loaded it. Empty: this role may not see it.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._job_name_elsewhere(
    database text DEFAULT current_database()
)
    RETURNS text
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    -- pg_cron keeps one job per name and role, so the name says which database it is for. Before pg_cron 1.5 the column
    -- takes 63 bytes, and cuts off what is longer.
    RETURN 'procrastinate_stalled ' || CASE
        WHEN octet_length(database) > 41 THEN hashtextextended(database, 0)::text
        ELSE database
    END;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._job_name_elsewhere(text) IS
    'The name of the job that sweeps a database, where pg_cron lives in another one.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._require_login()
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    IF NOT (SELECT rolcanlogin FROM pg_roles WHERE rolname = current_user) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_authorization_specification',
            MESSAGE = format('role "%s" cannot log in, so every run of its job would fail', current_user),
            DETAIL = 'pg_cron runs a job as the role that scheduled it.',
            HINT = 'Schedule as a role that can log in (RESET ROLE), or ALTER ROLE ... LOGIN.';
    END IF;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._require_login() IS
    'Raises invalid_authorization_specification unless the current role can log in, as pg_cron must for it.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._require_pg_cron(
    schedule text DEFAULT '* * * * *'
)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
DECLARE
    cron_database text;
BEGIN
    cron_database := procrastinate_stalled._cron_database();
    -- CREATE DATABASE ... TEMPLATE copies the extension too, but pg_cron does not read what is in the copy.
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_cron')
        OR nullif(cron_database, '') <> current_database()
    THEN
        IF cron_database IS NULL THEN
            RAISE EXCEPTION USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('pg_cron is not installed in database "%s"', current_database()),
                DETAIL = 'The server has not loaded it (shared_preload_libraries).',
                HINT = 'Add pg_cron to shared_preload_libraries, restart, CREATE EXTENSION pg_cron; or sweep from outside: procrastinate-stalled sweep, or procrastinate_stalled.add_periodic_sweep(app).';
        ELSIF cron_database = current_database() THEN
            RAISE EXCEPTION USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('pg_cron is not installed in database "%s"', current_database()),
                DETAIL = 'The server has loaded it for this database, but the extension is not created.',
                HINT = format('As a superuser: CREATE EXTENSION pg_cron; GRANT USAGE ON SCHEMA cron TO %I;', current_user);
        ELSE
            RAISE EXCEPTION USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('pg_cron is not in database "%s"', current_database()),
                DETAIL = CASE cron_database
                    WHEN '' THEN 'It lives in the database that cron.database_name says, which this role may not see.'
                    ELSE format('On this server it lives in database "%s" (cron.database_name).', cron_database)
                END,
                HINT = format(
                    'In the shell: procrastinate-stalled schedule%s --cron-database %s   Or there, as role "%s" with USAGE on schema cron and EXECUTE on this function: SELECT cron.schedule_in_database(%L, %L, %L, %L);   To end it, there: SELECT cron.unschedule(jobid) FROM cron.job WHERE database = %L AND command = %L;',
                    CASE WHEN schedule <> '* * * * *' THEN format(' %L', schedule) ELSE '' END,
                    CASE WHEN cron_database = '' THEN '...' WHEN cron_database ~ '^\w+$' THEN cron_database ELSE quote_literal(cron_database) END,
                    -- Not with the role as fifth argument: pg_cron refuses that to all but superusers, even where it is their own.
                    current_user, procrastinate_stalled._job_name_elsewhere(), schedule, 'CALL procrastinate_stalled.sweep()', current_database(),
                    current_database(), 'CALL procrastinate_stalled.sweep()'
                );
        END IF;
    END IF;

    IF NOT has_schema_privilege('cron', 'USAGE') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role "%s" may not use pg_cron', current_user),
            DETAIL = 'It has no USAGE on schema "cron".',
            HINT = format('As a superuser: GRANT USAGE ON SCHEMA cron TO %I;', current_user);
    END IF;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._require_pg_cron(text) IS
    'Raises object_not_in_prerequisite_state or insufficient_privilege, with the way out, unless this role can use pg_cron in this database.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._cron_jobs()
    RETURNS jsonb
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
                   'jobid', jobid,
                   'jobname', jobname,
                   'schedule', schedule,
                   'command', command,
                   'database', database,
                   'username', username,
                   'active', active,
                   'nodeport', nodeport
               )), '[]')
            FROM cron.job
            WHERE jobname LIKE 'procrastinate\_stalled%' OR command = 'CALL procrastinate_stalled.sweep()'
    );
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._cron_jobs() IS
    'The rows of cron.job that may have to do with procrastinate_stalled, of any database: an array of objects.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._classify_cron_jobs(
    jobs jsonb,
    cron_database text
)
    RETURNS TABLE (
        jobid bigint,
        schedule text,
        command text,
        database text,
        username text,
        active boolean,
        nodeport integer,
        last_run jsonb,
        can_log_in boolean,
        sweeps text
    )
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
#variable_conflict use_column
DECLARE
    own_name CONSTANT text := CASE
        WHEN cron_database = current_database() THEN 'procrastinate_stalled'
        ELSE procrastinate_stalled._job_name_elsewhere()
    END;
BEGIN
    RETURN QUERY
        SELECT job.jobid,
               job.schedule,
               job.command,
               job.database,
               job.username,
               job.active,
               job.nodeport,
               job.last_run,
               (SELECT rolcanlogin FROM pg_roles WHERE rolname = job.username),
               CASE
                   WHEN job.database <> current_database() THEN CASE
                       WHEN EXISTS (SELECT FROM pg_database WHERE datname = job.database) THEN
                           CASE WHEN job.jobname = own_name THEN 'another' ELSE 'not ours' END
                       WHEN job.jobname = own_name THEN 'lost'
                       ELSE 'nothing'
                   END
                   WHEN job.jobname IN ('procrastinate_stalled', procrastinate_stalled._job_name_elsewhere())
                       OR job.command = 'CALL procrastinate_stalled.sweep()'
                   THEN 'this'
                   ELSE 'not ours'
               END
            FROM jsonb_to_recordset(jobs) AS job (
                jobid bigint,
                jobname text,
                schedule text,
                command text,
                database text,
                username text,
                active boolean,
                nodeport integer,
                last_run jsonb
            )
            ORDER BY job.active DESC, job.jobid;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._classify_cron_jobs(jsonb, text) IS
$$Says which database each of some pg_cron jobs sweeps; active ones first.

Arguments:
  jobs           as _cron_jobs() returns them
  cron_database  the database in which they were read
Returns sweeps, besides columns of cron.job and whether the role can log in:
  this      this database
  another   it has the name of the job for this database, but sweeps another one
  lost      the same, and that other database does not exist: this one was renamed, or restored from a dump
  nothing   it has another name, and sweeps a database that does not exist
  not ours  none of these$$;


CREATE OR REPLACE FUNCTION procrastinate_stalled.schedule(
    schedule text DEFAULT '* * * * *'
)
    RETURNS bigint
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '5s'
AS $$
#variable_conflict use_column
DECLARE
    command CONSTANT text := 'CALL procrastinate_stalled.sweep()';
    existing record;
BEGIN
    PERFORM procrastinate_stalled._require_pg_cron(schedule.schedule);
    PERFORM procrastinate_stalled._require_login();
    PERFORM procrastinate_stalled._require_writable();

    SELECT jobid, job.schedule, job.command, database, active, nodeport
        INTO existing
        FROM cron.job AS job
        WHERE jobname = 'procrastinate_stalled' AND username = current_user;
    -- Where that database does not exist, this one was renamed or restored from a dump, which has pg_cron's jobs in it.
    IF existing.database <> current_database()
        AND EXISTS (SELECT FROM pg_database WHERE datname = existing.database)
    THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('role "%s" has a pg_cron job "procrastinate_stalled" for another database', current_user),
            DETAIL = format('Job %s sweeps database "%s"; pg_cron keeps one job per name and role.', existing.jobid, existing.database),
            HINT = format('If it shall not do that: SELECT cron.unschedule(%s); and then schedule again. Otherwise schedule one of the two databases as another role.', existing.jobid);
    END IF;
    IF existing.schedule = schedule.schedule
        AND existing.command = command
        AND existing.database = current_database()
        AND existing.nodeport = current_setting('port')::integer
        AND existing.active
    THEN
        RETURN existing.jobid;
    END IF;

    -- cron.schedule leaves an existing job inactive, and in the database and on the port that it had. Only a superuser may
    -- call cron.alter_job.
    IF existing.jobid IS NOT NULL THEN
        PERFORM cron.unschedule(existing.jobid);
    END IF;
    BEGIN
        RETURN cron.schedule('procrastinate_stalled', coalesce(schedule.schedule, ''), command);
    EXCEPTION WHEN invalid_parameter_value THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('pg_cron does not understand the schedule %s', coalesce(quote_literal(schedule.schedule), 'NULL')),
            DETAIL = format('pg_cron says: %s.', SQLERRM),
            HINT = 'Nothing was changed. Five fields as in crontab: ''* * * * *'' is each minute. ''30 seconds'' needs pg_cron 1.5.';
    END;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.schedule(text) IS
$$Lets pg_cron run CALL procrastinate_stalled.sweep() as the current role in this database. Idempotent: it changes the
schedule of the existing job, or activates it again. A job that has come here with a dump, or is for the former name of
this database, is set right. Takes effect when the transaction commits.

Argument:
  schedule  five fields as in crontab; with pg_cron 1.5 or later also '1 second' to '59 seconds'
Returns the id of the pg_cron job (cron.job.jobid).
Errors, after which nothing is changed: object_not_in_prerequisite_state (pg_cron is absent, or in another database; the
HINT has the statement to run there), insufficient_privilege (no USAGE on schema cron), invalid_parameter_value (unknown
schedule), invalid_authorization_specification (the role cannot log in), duplicate_object (the role's job of that name sweeps another
database), read_only_sql_transaction.$$;


CREATE OR REPLACE FUNCTION procrastinate_stalled.unschedule()
    RETURNS boolean
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '5s'
AS $$
DECLARE
    removed boolean := false;
    existing bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_cron')
        AND procrastinate_stalled._cron_database() IS NULL
    THEN
        RETURN false;
    END IF;

    PERFORM procrastinate_stalled._require_pg_cron();
    PERFORM procrastinate_stalled._require_writable();
    FOR existing IN
        SELECT jobid
            FROM procrastinate_stalled._classify_cron_jobs(procrastinate_stalled._cron_jobs(), current_database())
            WHERE sweeps IN ('this', 'lost')
    LOOP
        removed := cron.unschedule(existing);
    END LOOP;
    RETURN removed;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.unschedule() IS
$$Removes the pg_cron job that sweeps this database, or did so under its former name: the current role's; called by a
superuser, everybody's.

Returns whether there was one. Without pg_cron on the server there is none.
Errors: object_not_in_prerequisite_state (pg_cron is in another database; the HINT has the statement to run there),
insufficient_privilege (no USAGE on schema cron), read_only_sql_transaction.$$;
