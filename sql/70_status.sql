-- The health of the whole, for people and monitors.

CREATE OR REPLACE FUNCTION procrastinate_stalled.version()
    RETURNS text
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN '0.1.0';
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.version() IS 'The version of procrastinate_stalled that is installed in this database.';


CREATE OR REPLACE FUNCTION procrastinate_stalled.status()
    RETURNS TABLE (
        name text,
        level text,
        detail text,
        hint text
    )
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
#variable_conflict use_column
DECLARE
    cron_job_id bigint;
    cron_job record;
    cron_run record;
    last_sweep record;
    counts record;
BEGIN
    name := 'procrastinate';
    BEGIN
        SELECT count(*) AS workers,
               count(*) FILTER (WHERE last_heartbeat > now() - interval '30 seconds') AS alive
            INTO counts
            FROM procrastinate_workers;
        level := CASE WHEN counts.alive > 0 THEN 'ok' ELSE 'warning' END;
        detail := format('schema %s; %s of %s workers heard of in the last 30 s',
            (SELECT relnamespace::regnamespace FROM pg_class WHERE oid = to_regclass('procrastinate_jobs')), counts.alive, counts.workers);
        hint := CASE WHEN counts.alive = 0 THEN 'Start a worker: without one nobody runs the jobs that are put back.' END;
    EXCEPTION WHEN OTHERS THEN
        level := 'error';
        detail := SQLERRM;
        hint := 'Apply Procrastinate''s schema, or grant this role SELECT on its tables.';
    END;
    RETURN NEXT;

    name := 'schedule';
    BEGIN
        PERFORM procrastinate_stalled._require_pg_cron();
        SELECT jobid, schedule, active, username
            INTO cron_job
            FROM cron.job
            WHERE jobname = 'procrastinate_stalled' AND database = current_database()
            ORDER BY active DESC, jobid
            LIMIT 1;
        cron_job_id := cron_job.jobid;
        IF cron_job_id IS NULL THEN
            level := 'warning';
            detail := 'pg_cron has no job "procrastinate_stalled" that this role can see';
            hint := 'SELECT procrastinate_stalled.schedule();';
        ELSIF NOT cron_job.active THEN
            level := 'error';
            detail := format('pg_cron job %s of role %s is not active', cron_job.jobid, cron_job.username);
            hint := 'SELECT procrastinate_stalled.schedule(); activates it again.';
        ELSE
            level := 'ok';
            detail := format('pg_cron job %s, "%s", as role %s', cron_job.jobid, cron_job.schedule, cron_job.username);
            hint := NULL;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        level := 'warning';
        detail := SQLERRM;
        GET STACKED DIAGNOSTICS hint = PG_EXCEPTION_HINT;
    END;
    BEGIN
        IF level = 'warning' AND (
            SELECT count(*) > 1 FROM procrastinate_stalled.sweeps WHERE started_at > now() - interval '1 hour'
        ) THEN
            level := 'ok';
            detail := detail || '; something else sweeps: see last_sweep';
            hint := NULL;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        NULL; -- last_sweep says why
    END;
    RETURN NEXT;

    IF cron_job_id IS NOT NULL THEN
        name := 'last_run';
        BEGIN
            SELECT status, return_message, coalesce(end_time, start_time) AS at
                INTO cron_run
                FROM cron.job_run_details
                WHERE jobid = cron_job_id AND status IN ('succeeded', 'failed')
                ORDER BY runid DESC
                LIMIT 1;
            IF cron_run.status IS NULL THEN
                level := 'warning';
                detail := 'pg_cron has not run the job yet';
                hint := 'Wait a minute. If nothing comes, look into the server log for pg_cron.';
            ELSIF cron_run.status <> 'succeeded' THEN
                level := 'error';
                detail := format('%s at %s: %s', cron_run.status, coalesce(cron_run.at::text, 'an unknown time'), btrim(cron_run.return_message, E' \n'));
                hint := CASE WHEN cron_run.return_message LIKE 'connection failed%'
                    THEN 'pg_cron must be able to log in as the job''s role: pg_hba.conf, .pgpass, cron.host, or cron.use_background_workers.'
                    ELSE 'CALL procrastinate_stalled.sweep(); shows the same error with its details.'
                END;
            ELSE
                level := 'ok';
                detail := format('succeeded at %s', cron_run.at);
                hint := NULL;
            END IF;
        EXCEPTION WHEN OTHERS THEN
            level := 'warning';
            detail := SQLERRM;
            hint := 'As a superuser: GRANT SELECT ON cron.job_run_details to this role.';
        END;
        RETURN NEXT;
    END IF;

    name := 'last_sweep';
    BEGIN
        SELECT sweep.started_at, sweep.duration, sweep.error, now() - sweep.started_at AS age
            INTO last_sweep
            FROM procrastinate_stalled.sweeps AS sweep
            ORDER BY sweep.started_at DESC
            LIMIT 1;
        IF last_sweep.started_at IS NULL THEN
            level := 'warning';
            detail := 'there is no record of a sweep';
            hint := 'SELECT procrastinate_stalled.schedule(); or: CALL procrastinate_stalled.sweep();';
        ELSIF last_sweep.age > interval '1 hour' THEN
            level := 'warning';
            detail := format('the last sweep was at %s, %s ago', last_sweep.started_at, date_trunc('minute', last_sweep.age));
            hint := 'See the rows schedule and last_run.';
        ELSIF last_sweep.duration IS NULL AND last_sweep.age > interval '10 minutes' THEN
            level := 'warning';
            detail := format('the sweep of %s has not ended in %s', last_sweep.started_at, date_trunc('minute', last_sweep.age));
            hint := 'It is still running (pg_stat_activity), or it was cancelled or lost its server: see last_run, or CALL procrastinate_stalled.sweep();';
        ELSIF last_sweep.error IS NOT NULL THEN
            level := 'warning';
            detail := last_sweep.error;
            hint := 'Every job that can be rescued was rescued all the same. Remove the cause; each sweep tries the others again.';
        ELSE
            level := 'ok';
            detail := format('%s', last_sweep.started_at);
            hint := NULL;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        level := 'warning';
        detail := SQLERRM;
        hint := 'Grant this role SELECT on procrastinate_stalled.sweeps.';
    END;
    RETURN NEXT;

    name := 'jobs';
    BEGIN
        SELECT (SELECT count(*) FROM procrastinate_stalled._doing_jobs(NULL)) AS doing,
               count(*) AS stalled,
               count(*) FILTER (WHERE action = 'wait') AS waiting,
               min(stalled_at) AS since
            INTO counts
            FROM procrastinate_stalled._judge();
        level := CASE WHEN counts.stalled = 0 THEN 'ok' ELSE 'warning' END;
        detail := format('%s in doing, %s stalled', counts.doing, counts.stalled)
            || CASE WHEN counts.stalled > 0 THEN format(' since %s, %s of them wait for a job with the same queueing lock', counts.since, counts.waiting) ELSE '' END;
        hint := CASE WHEN counts.stalled > 0 THEN 'The next sweep rescues them. Which, and why: SELECT * FROM procrastinate_stalled.get_stalled_jobs();' END;
    EXCEPTION WHEN OTHERS THEN
        level := 'error';
        detail := SQLERRM;
        hint := 'Apply Procrastinate''s schema, or grant this role SELECT on its tables and on procrastinate_stalled''s.';
    END;
    RETURN NEXT;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.status() IS
$$The health of the whole, one row per check. It never raises, whatever is missing and whatever the role may not see.

Returns:
  name    procrastinate, schedule, last_run (if scheduled), last_sweep, jobs
  level   ok, warning or error
  detail  the fact
  hint    the remedy; NULL where all is well$$;
