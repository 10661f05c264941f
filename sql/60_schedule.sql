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
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_cron') THEN
        cron_database := procrastinate_stalled._cron_database();
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
                -- pg_cron keeps one job per name and role, so the name says which database it is for.
                HINT = format(
                    'There, as a role that may: SELECT cron.schedule_in_database(%L, %L, %L, %L, %L);   To end it, there: SELECT cron.unschedule(jobid) FROM cron.job WHERE database = %L AND command = %L;',
                    'procrastinate_stalled ' || current_database(), schedule, 'CALL procrastinate_stalled.sweep()', current_database(), current_user,
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

    IF NOT (SELECT rolcanlogin FROM pg_roles WHERE rolname = current_user) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_authorization_specification',
            MESSAGE = format('role "%s" cannot log in, so every run of its job would fail', current_user),
            DETAIL = 'pg_cron runs a job as the role that scheduled it.',
            HINT = 'Schedule as a role that can log in (RESET ROLE), or ALTER ROLE ... LOGIN.';
    END IF;

    SELECT jobid, job.schedule, job.command, database, active
        INTO existing
        FROM cron.job AS job
        WHERE jobname = 'procrastinate_stalled' AND username = current_user;
    IF existing.database <> current_database() THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('role "%s" has a pg_cron job "procrastinate_stalled" for another database', current_user),
            DETAIL = format('Job %s sweeps database "%s"; pg_cron keeps one job per name and role.', existing.jobid, existing.database),
            HINT = 'Schedule one of the two databases as another role.';
    END IF;
    IF existing.schedule = schedule.schedule AND existing.command = command AND existing.active THEN
        RETURN existing.jobid;
    END IF;

    -- cron.schedule keeps an existing job as inactive as it was, and only a superuser may call cron.alter_job.
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
schedule of the existing job, or activates it again. Takes effect when the transaction commits.

Argument:
  schedule  five fields as in crontab; with pg_cron 1.5 or later also '1 second' to '59 seconds'
Returns the id of the pg_cron job (cron.job.jobid).
Errors, after which nothing is changed: object_not_in_prerequisite_state (pg_cron is absent, or in another database; the
HINT has the statement to run there), insufficient_privilege (no USAGE on schema cron), invalid_parameter_value (unknown
schedule), invalid_authorization_specification (the role cannot log in), duplicate_object (the role's job of that name sweeps another
database).$$;


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
    FOR existing IN
        SELECT jobid FROM cron.job WHERE jobname = 'procrastinate_stalled' AND database = current_database()
    LOOP
        removed := cron.unschedule(existing);
    END LOOP;
    RETURN removed;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.unschedule() IS
$$Removes the pg_cron job that sweeps this database: the current role's; called by a superuser, everybody's.

Returns whether there was one. Without pg_cron on the server there is none.
Errors: object_not_in_prerequisite_state (pg_cron is in another database; the HINT has the statement to run there),
insufficient_privilege (no USAGE on schema cron).$$;
