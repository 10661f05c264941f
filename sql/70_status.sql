-- The health of the whole, for people and monitors.

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
    -- Who has locked a table is told instead of waited for.
    SET lock_timeout = '1s'
AS $$
#variable_conflict use_column
DECLARE
    rights CONSTANT text := format('As the owner: SELECT procrastinate_stalled.grant_monitor(%L);', current_user);
    damaged CONSTANT text := 'The installation is damaged. To make it anew, without its rules and records: procrastinate-stalled uninstall && procrastinate-stalled install';
    sweeping_role text := current_user::text;
    -- What the command line has read in the database of pg_cron, if that is another one: an object with the keys database,
    -- role, and jobs, as _cron_jobs() returns them, each with its last_run; or problem and hint.
    elsewhere jsonb;
    cron_jobs jsonb;
    cron_database text;
    there text := '';
    remedy text := 'SELECT procrastinate_stalled.schedule();';
    cron_job_id bigint;
    cron_job record;
    astray record;
    astray_job_id bigint;
    is_swept boolean := false;
    -- It is swept, and this role may not do that itself: a monitor, who need not see who does.
    only_looks boolean := false;
    cron_run record;
    last_sweep record;
    facts record;
BEGIN
    name := 'procrastinate';
    BEGIN
        PERFORM procrastinate_stalled._require_procrastinate();
        -- No row is read: it is only asked whether this role may.
        PERFORM FROM procrastinate_jobs, procrastinate_workers, procrastinate_events LIMIT 0;
        SELECT relnamespace::regnamespace AS schema,
               to_regclass('procrastinate_jobs_lock_idx_v1') IS NOT NULL AS has_index,
               to_regproc('procrastinate_fetch_job_v1') IS NOT NULL AS has_nameless_workers,
               to_regproc('procrastinate_retry_job_v2') IS NOT NULL AS can_retry_failed,
               to_regproc('procrastinate_defer_jobs_v1') IS NOT NULL AS can_defer_many
            INTO facts
            FROM pg_class
            WHERE oid = to_regclass('procrastinate_jobs');
        detail := format('schema %s, as of Procrastinate %s', facts.schema, CASE
            WHEN facts.can_retry_failed THEN '3.4 or later'
            WHEN facts.can_defer_many THEN '3.2 or 3.3'
            ELSE '3.1'
        END);
        IF facts.has_nameless_workers THEN
            level := 'warning';
            detail := detail || '; its function procrastinate_fetch_job_v1 is still there: workers of 3.0 may run, whose jobs look like orphans, so no orphan counts as stalled';
            hint := 'When no worker of Procrastinate 3.0 runs any more: apply its migration 3.1 post.';
        ELSIF facts.has_index THEN
            level := 'ok';
            hint := NULL;
        ELSE
            level := 'warning';
            detail := detail || '; its index procrastinate_jobs_lock_idx_v1 is missing, so each sweep reads all jobs that there ever were';
            hint := 'Apply all migrations of your version of Procrastinate, pre and post.';
        END IF;
    EXCEPTION WHEN OTHERS THEN
        level := 'error';
        GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
        detail := concat_ws('. ', SQLERRM, nullif(detail, ''));
        hint := CASE SQLSTATE WHEN '42501' THEN rights ELSE coalesce(nullif(hint, ''), 'Apply Procrastinate''s schema.') END;
    END;
    RETURN NEXT;

    name := 'schedule';
    BEGIN
        elsewhere := nullif(current_setting('procrastinate_stalled.cron_elsewhere', true), '')::jsonb;
        IF elsewhere IS NULL THEN
            PERFORM procrastinate_stalled._require_pg_cron();
            cron_jobs := procrastinate_stalled._cron_jobs();
        ELSIF elsewhere ? 'problem' THEN
            RAISE EXCEPTION USING MESSAGE = elsewhere ->> 'problem', HINT = coalesce(elsewhere ->> 'hint', '');
        ELSE
            cron_jobs := elsewhere -> 'jobs';
            there := format(' in database "%s"', elsewhere ->> 'database');
            remedy := 'procrastinate-stalled schedule --cron-database ...';
        END IF;
        cron_database := coalesce(elsewhere ->> 'database', current_database());
        SELECT *
            INTO cron_job
            FROM procrastinate_stalled._classify_cron_jobs(cron_jobs, cron_database)
            WHERE sweeps = 'this'
            LIMIT 1;
        SELECT *
            INTO astray
            FROM procrastinate_stalled._classify_cron_jobs(cron_jobs, cron_database)
            WHERE sweeps IN ('lost', 'nothing') AND active OR sweeps IN ('lost', 'another') AND cron_job.jobid IS NULL
            ORDER BY sweeps = 'nothing'
            LIMIT 1;
        cron_job_id := cron_job.jobid;
        astray_job_id := astray.jobid;
        sweeping_role := coalesce((SELECT rolname::text FROM pg_roles WHERE rolname = cron_job.username), sweeping_role);
        IF cron_job_id IS NULL AND coalesce(astray.sweeps, 'nothing') = 'nothing' THEN
            level := 'warning';
            detail := CASE
                WHEN elsewhere IS NULL THEN 'pg_cron has no job "procrastinate_stalled" that this role can see'
                ELSE format('pg_cron%s has no job for database "%s" that role %s can see', there, current_database(), elsewhere ->> 'role')
            END;
            hint := remedy;
        ELSIF cron_job_id IS NULL THEN
            level := 'warning';
            detail := format('this database, "%s", is not swept by pg_cron', current_database());
            hint := CASE astray.sweeps
                WHEN 'lost' THEN format('If it was renamed, or restored from a dump: %s lets the job sweep it, if called as role %s.', remedy, astray.username)
                ELSE format('If the job shall not do that: SELECT cron.unschedule(%s);%s and then %s Otherwise schedule one of the two databases as another role.', astray.jobid, there, remedy)
            END;
        ELSIF NOT cron_job.active THEN
            level := 'error';
            detail := format('pg_cron job %s%s of role %s is not active', cron_job.jobid, there, cron_job.username);
            hint := remedy || ' activates it again.';
        ELSIF cron_job.can_log_in IS NOT TRUE THEN
            level := 'error';
            detail := format('pg_cron job %s%s runs as role %s, which cannot log in, so every run fails', cron_job.jobid, there, cron_job.username);
            hint := format('ALTER ROLE %I LOGIN; or unschedule it, and schedule it as another role.', cron_job.username);
        ELSIF cron_job.command NOT LIKE '%procrastinate_stalled.sweep(%' THEN
            level := 'error';
            detail := format('pg_cron job %s%s of role %s does not sweep; it runs: %s', cron_job.jobid, there, cron_job.username, cron_job.command);
            hint := remedy || ' sets it right.';
        ELSIF cron_job.nodeport <> current_setting('port')::integer THEN
            level := 'warning';
            detail := format('pg_cron job %s%s is for the server on port %s, and this one has port %s: unless pg_cron uses background workers, it sweeps that one', cron_job.jobid, there, cron_job.nodeport, current_setting('port'));
            hint := format('If this is a copy of that server: %s lets the job sweep this one, if called as role %s.', remedy, cron_job.username);
        ELSE
            level := 'ok';
            detail := format('pg_cron job %s%s, "%s", as role %s', cron_job.jobid, there, cron_job.schedule, cron_job.username);
            hint := NULL;
        END IF;
        IF astray_job_id IS NOT NULL THEN
            level := CASE level WHEN 'error' THEN 'error' ELSE 'warning' END;
            detail := format('%s; pg_cron job %s%s of role %s sweeps database "%s"', detail, astray.jobid, there, astray.username, astray.database)
                || CASE WHEN astray.sweeps <> 'another' THEN ', which does not exist' ELSE '' END;
            IF astray.sweeps <> 'another' THEN
                hint := concat_ws(' ', hint, format('To end it: SELECT cron.unschedule(%s);%s', astray.jobid, there));
            END IF;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        level := 'warning';
        detail := SQLERRM;
        GET STACKED DIAGNOSTICS hint = PG_EXCEPTION_HINT;
        hint := coalesce(nullif(hint, ''), rights || format(' And as a superuser: GRANT USAGE ON SCHEMA cron TO %1$I; GRANT SELECT ON cron.job TO %1$I;', current_user));
    END;
    BEGIN
        is_swept := (
            SELECT count(*) > 1 FROM procrastinate_stalled.sweeps WHERE started_at BETWEEN now() - interval '1 hour' AND clock_timestamp()
        );
        only_looks := is_swept
            AND NOT coalesce(has_function_privilege(to_regprocedure('procrastinate_stalled.sweep(integer)'), 'EXECUTE'), true);
        IF level = 'warning' AND cron_job_id IS NULL AND astray_job_id IS NULL AND is_swept THEN
            level := 'ok';
            detail := detail || CASE
                WHEN only_looks THEN '; who sweeps is not visible to this role: see last_sweep'
                ELSE '; something else sweeps: see last_sweep'
            END;
            hint := NULL;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        NULL; -- last_sweep says why
    END;
    RETURN NEXT;

    IF cron_job_id IS NOT NULL THEN
        name := 'last_run';
        BEGIN
            IF elsewhere IS NULL THEN
                SELECT status, return_message, coalesce(end_time, start_time) AS at
                    INTO cron_run
                    FROM cron.job_run_details
                    WHERE jobid = cron_job_id AND status IN ('succeeded', 'failed')
                    ORDER BY runid DESC
                    LIMIT 1;
            ELSE
                SELECT *
                    INTO cron_run
                    FROM jsonb_to_record(cron_job.last_run) AS run (status text, return_message text, at timestamp with time zone);
            END IF;
            -- Other roles are refused this setting.
            IF pg_has_role('pg_read_all_settings', 'USAGE') AND current_setting('cron.log_run', true) = 'off' THEN
                level := 'ok';
                detail := 'pg_cron keeps no record of runs, because cron.log_run is off: see last_sweep';
                hint := NULL;
            ELSIF cron_run.status IS NULL THEN
                level := 'warning';
                detail := 'pg_cron has not run the job yet';
                hint := 'Wait a minute. If nothing comes, look into the server log for pg_cron.' || CASE
                    WHEN pg_has_role('pg_read_all_settings', 'USAGE') THEN ''
                    ELSE format(' If cron.log_run is off, pg_cron keeps no record of runs; for this role to see that, as a superuser: GRANT pg_read_all_settings TO %I;', current_user)
                END;
            ELSIF cron_run.status <> 'succeeded' THEN
                level := 'error';
                detail := format('%s at %s: %s', cron_run.status, coalesce(cron_run.at::text, 'an unknown time'), btrim(cron_run.return_message, E' \n'));
                hint := CASE WHEN cron_run.return_message LIKE 'connection failed%'
                    THEN 'pg_cron must be able to log in as the job''s role: pg_hba.conf, .pgpass, cron.host, or cron.use_background_workers.'
                    ELSE 'CALL procrastinate_stalled.sweep(); shows the same error with its details.'
                END;
            ELSIF cron_run.at < now() - interval '1 hour' THEN
                level := CASE WHEN cron_run.at < now() - interval '1 day' THEN 'error' ELSE 'warning' END;
                detail := format('the last run was at %s, %s ago', cron_run.at, procrastinate_stalled._in_words(now() - cron_run.at));
                hint := 'Is pg_cron''s launcher running? See pg_stat_activity and the server log. By hand: CALL procrastinate_stalled.sweep();';
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
            ORDER BY sweep.id DESC
            LIMIT 1;
        IF last_sweep.started_at IS NULL THEN
            level := 'warning';
            detail := 'there is no record of a sweep';
            hint := 'See the row schedule. By hand: CALL procrastinate_stalled.sweep();';
        ELSIF last_sweep.age < interval '-1 minute' THEN
            level := 'warning';
            detail := format('the last sweep was at %s, which lies in the future: a clock was wrong', last_sweep.started_at);
            hint := 'CALL procrastinate_stalled.sweep(); the next sweep by the right clock ends this.';
        ELSIF last_sweep.age > interval '1 hour' THEN
            level := CASE WHEN last_sweep.age > interval '1 day' THEN 'error' ELSE 'warning' END;
            detail := format('the last sweep was at %s, %s ago', last_sweep.started_at, procrastinate_stalled._in_words(last_sweep.age));
            hint := 'See the rows schedule and last_run.';
        ELSIF last_sweep.duration IS NULL AND last_sweep.age > interval '10 minutes' THEN
            level := 'warning';
            detail := format('the sweep of %s has not ended in %s', last_sweep.started_at, procrastinate_stalled._in_words(last_sweep.age));
            hint := 'It is still running (pg_stat_activity), or it was cancelled or lost its server: see last_run, or CALL procrastinate_stalled.sweep();';
        ELSIF last_sweep.error IS NOT NULL THEN
            level := 'warning';
            detail := last_sweep.error;
            hint := CASE
                WHEN last_sweep.error LIKE '%(53100)' THEN 'Make room on that disk. The sweep may have ended there; the next one goes on.'
                ELSE 'Every job that can be rescued was rescued all the same. Remove the cause; each sweep tries the others again.'
            END;
        ELSE
            level := 'ok';
            detail := format('%s, %s ago', last_sweep.started_at, procrastinate_stalled._in_words(last_sweep.age));
            hint := NULL;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        level := 'error';
        detail := SQLERRM;
        hint := CASE SQLSTATE WHEN '42501' THEN rights ELSE damaged END;
    END;
    RETURN NEXT;

    name := 'available_since';
    BEGIN
        SELECT at
            INTO facts
            FROM procrastinate_stalled._available_since() AS at;
        detail := format('the server has been available since %s', facts.at);
        IF facts.at > clock_timestamp() THEN
            level := 'warning';
            detail := detail || ', which lies in the future: a clock was wrong, and no outage is forgiven until then';
            hint := 'The next restart of the server ends this. Until then: SELECT procrastinate_stalled.pause(...); if workers may have lost their heartbeats.';
        ELSIF pg_is_in_recovery() THEN
            level := 'ok';
            detail := detail || ' as a standby, on which nothing is swept';
            hint := NULL;
        ELSIF pg_has_role(sweeping_role, 'pg_read_all_stats', 'USAGE') AND has_table_privilege(sweeping_role, 'pg_stat_activity', 'SELECT') THEN
            level := 'ok';
            hint := NULL;
        ELSIF only_looks AND cron_job_id IS NULL THEN
            level := 'ok';
            detail := detail || '; whether it has recovered from a crash or was promoted since is not visible to this role, nor whether the role that sweeps can see it';
            hint := NULL;
        ELSE
            level := 'warning';
            detail := detail || format('; role %s cannot see whether it has recovered from a crash or was promoted since', sweeping_role);
            hint := format('As a superuser: GRANT pg_read_all_stats TO %I;', sweeping_role);
        END IF;
    EXCEPTION WHEN OTHERS THEN
        level := 'error';
        detail := SQLERRM;
        hint := CASE SQLSTATE
            WHEN '42501' THEN rights || format(' And as a superuser: GRANT pg_read_all_stats TO %I;', current_user)
            ELSE damaged
        END;
    END;
    RETURN NEXT;

    name := 'workers';
    BEGIN
        SELECT count(*) FILTER (WHERE state = 'alive') AS alive,
               count(*) FILTER (WHERE state = 'silent') AS silent,
               count(*) FILTER (WHERE state = 'silent' AND doing > 0) AS missed
            INTO facts
            FROM procrastinate_stalled.workers();
        level := CASE WHEN facts.alive > 0 THEN 'ok' ELSE 'warning' END;
        detail := format('%s alive, %s silent for 30 s, %s of these with jobs in doing', facts.alive, facts.silent, facts.missed);
        hint := CASE WHEN facts.alive = 0 THEN 'Start a worker: without one nobody runs any job, and a sweep that finds none alive holds the jobs of the silent ones (settings.require_live_worker).' END;
    EXCEPTION WHEN OTHERS THEN
        level := 'error';
        detail := SQLERRM;
        hint := CASE SQLSTATE WHEN '42501' THEN rights WHEN '55000' THEN 'See the row procrastinate.' ELSE damaged END;
    END;
    RETURN NEXT;

    name := 'jobs';
    BEGIN
        PERFORM procrastinate_stalled._require_procrastinate();
        SELECT cardinality((procrastinate_stalled._doing_jobs()).ids) AS doing,
               count(*) FILTER (WHERE verdict = 'stalled') AS stalled,
               count(*) FILTER (WHERE verdict = 'stalled' AND action = 'wait') AS waiting,
               count(*) FILTER (WHERE verdict = 'held') AS held,
               string_agg(DISTINCT coalesce(pause_name, 'no living worker'), ', ') FILTER (WHERE verdict = 'held') AS held_by,
               count(*) FILTER (WHERE verdict = 'stalled' AND action <> 'wait') AS due,
               (
                   SELECT count(*)
                       FROM procrastinate_stalled._judge(seconds_since_heartbeat => '5 minutes')
                       -- A pause ends, and then the rules decide.
                       WHERE verdict = 'ignored' AND pause_name IS NULL
               ) AS ignored,
               EXISTS (
                   SELECT
                       FROM procrastinate_stalled.sweeps
                       WHERE started_at BETWEEN now() - interval '1 hour' AND clock_timestamp()
               ) AS swept
            INTO facts
            FROM procrastinate_stalled._judge();
        detail := format('%s in doing, %s stalled', facts.doing, facts.stalled)
            || CASE WHEN facts.waiting > 0 THEN format(' (%s of them wait for a job with the same queueing lock)', facts.waiting) ELSE '' END
            || format(', %s held', facts.held)
            || CASE WHEN facts.held > 0 THEN format(' (%s)', facts.held_by) ELSE '' END
            || CASE WHEN facts.ignored > 0 THEN format(', %s ignored by the rules though the worker is silent or gone', facts.ignored) ELSE '' END;
        IF facts.due > 0 AND NOT facts.swept THEN
            level := 'error';
            detail := detail || '; and there was no sweep in the last hour';
            hint := 'See the rows schedule, last_run and last_sweep. By hand: CALL procrastinate_stalled.sweep();';
        ELSIF facts.stalled + facts.held + facts.ignored > 0 THEN
            level := 'warning';
            hint := concat_ws(' ',
                CASE WHEN facts.stalled + facts.held > 0 THEN 'Which, why, and what becomes of them: SELECT * FROM procrastinate_stalled.explain_jobs() WHERE verdict IN (''stalled'', ''held'');' END,
                CASE WHEN facts.ignored > 0 THEN 'No sweep touches the ignored ones; decide yourself: SELECT * FROM procrastinate_stalled.get_stalled_jobs(seconds_since_heartbeat => 300) WHERE action = ''ignore'';' END
            );
        ELSE
            level := 'ok';
            hint := NULL;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        level := 'error';
        detail := SQLERRM;
        hint := CASE SQLSTATE WHEN '42501' THEN rights WHEN '55000' THEN 'See the row procrastinate.' ELSE damaged END;
    END;
    RETURN NEXT;

    name := 'given_up';
    BEGIN
        PERFORM procrastinate_stalled._require_procrastinate();
        SELECT count(*) AS jobs,
               min(id) FILTER (WHERE started_at < now() - coalesce(heartbeat_timeout, '5 minutes')) AS old_id,
               string_agg(
                   format('job %s (for %s, while job %s waits)', id, procrastinate_stalled._in_words(now() - greatest(started_at, 'epoch')), waiting_id),
                   ', ' ORDER BY started_at, id
               ) FILTER (WHERE number <= 5) AS examples
            INTO facts
            FROM (
                SELECT judged.*, row_number() OVER (ORDER BY judged.started_at, judged.id) AS number
                    FROM procrastinate_stalled._judge(also_running => true) AS judged
                    JOIN procrastinate_stalled.workers() AS worker ON worker.worker_id = judged.worker_id
                    WHERE judged.waiting_id IS NOT NULL AND worker.state = 'alive'
            ) AS suspect;
        level := CASE WHEN facts.old_id IS NULL THEN 'ok' ELSE 'warning' END;
        detail := format('%s running under a living worker while a job with the same queueing lock waits', facts.jobs)
            || coalesce(': ' || facts.examples || CASE WHEN facts.jobs > 5 THEN ', ...' ELSE '' END, '');
        hint := CASE WHEN facts.old_id IS NOT NULL THEN format('Their worker may have failed to put them back (Procrastinate issue 1446). They are never touched but by a run_timeout. Ask their worker''s log; a job that is given up can be ended, for the waiting one does the same work: SET search_path = %s; SELECT procrastinate_finish_job_v1(%s, ''failed'', false);',
            (SELECT relnamespace::regnamespace FROM pg_class WHERE oid = to_regclass('procrastinate_jobs')),
            facts.old_id
        ) END;
    EXCEPTION WHEN OTHERS THEN
        level := 'error';
        detail := SQLERRM;
        hint := CASE SQLSTATE WHEN '42501' THEN rights WHEN '55000' THEN 'See the row procrastinate.' ELSE damaged END;
    END;
    RETURN NEXT;

    name := 'rules';
    BEGIN
        SELECT count(*) AS rules,
               string_agg(DISTINCT format('"%s" waits only %s', rule.name, procrastinate_stalled._in_words(heartbeat_timeout)), '; ')
                   FILTER (WHERE heartbeat_timeout < '30 seconds') AS hasty,
               string_agg(DISTINCT format('"%s" retries without limit', rule.name), '; ')
                   FILTER (WHERE action = 'retry' AND max_rescues IS NULL) AS endless
            INTO facts
            FROM procrastinate_stalled.rules AS rule
            WHERE enabled
                AND (expires_at IS NULL OR expires_at > now())
                AND action <> 'ignore'
                AND coalesce(heartbeat_timeout, run_timeout) IS NOT NULL;
        IF facts.rules = 0 THEN
            level := 'error';
            detail := 'no rule is in force that calls any job stalled';
            hint := 'INSERT INTO procrastinate_stalled.rules (name, position) VALUES (''default'', 2147483647) ON CONFLICT (name) DO UPDATE SET enabled = true, expires_at = NULL, action = ''retry'', heartbeat_timeout = ''5 minutes'';';
        ELSE
            level := CASE WHEN facts.hasty IS NULL AND facts.endless IS NULL THEN 'ok' ELSE 'warning' END;
            detail := concat_ws('; ', format('%s in force', facts.rules), facts.hasty, facts.endless);
            hint := nullif(concat_ws(' ',
                CASE WHEN facts.hasty IS NOT NULL THEN 'A worker beats every 10 s: a heartbeat_timeout under 30 s robs a busy one.' END,
                CASE WHEN facts.endless IS NOT NULL THEN 'A job that kills its workers goes on killing them: set max_rescues.' END
            ), '');
        END IF;
    EXCEPTION WHEN OTHERS THEN
        level := 'error';
        detail := SQLERRM;
        hint := CASE SQLSTATE WHEN '42501' THEN rights ELSE damaged END;
    END;
    RETURN NEXT;

    name := 'pauses';
    BEGIN
        SELECT string_agg(
                   format('"%s"%s until %s', rule.name, ' (' || note || ')', expires_at), '; ' ORDER BY position, rule.name
               ) AS pauses,
               string_agg(procrastinate_stalled._end_of_pause(rule), ' ' ORDER BY position, rule.name) AS remedy
            INTO facts
            FROM procrastinate_stalled.rules AS rule
            WHERE enabled AND expires_at > now() AND action = 'ignore';
        level := CASE WHEN facts.pauses IS NULL THEN 'ok' ELSE 'warning' END;
        detail := coalesce(facts.pauses, 'none');
        hint := 'To end it: ' || facts.remedy;
    EXCEPTION WHEN OTHERS THEN
        level := 'error';
        detail := SQLERRM;
        hint := CASE SQLSTATE WHEN '42501' THEN rights ELSE damaged END;
    END;
    RETURN NEXT;

    name := 'false_rescues';
    BEGIN
        PERFORM procrastinate_stalled._require_procrastinate();
        WITH mistake AS (
            SELECT coalesce('rule "' || rescue.rule_name || '"', 'retry_job()') AS culprit, count(*) AS number
                FROM procrastinate_stalled._false_rescues(now() - interval '7 days') AS rescue
                GROUP BY culprit
        )
        SELECT (SELECT coalesce(sum(number), 0) FROM mistake) AS mistakes,
               EXISTS (SELECT FROM mistake WHERE culprit <> 'retry_job()') AS by_rule,
               EXISTS (SELECT FROM mistake WHERE culprit = 'retry_job()') AS by_hand,
               (SELECT string_agg(format('%s by %s', number, culprit), ', ' ORDER BY number DESC, culprit) FROM mistake) AS culprits,
               (
                   SELECT count(*)
                       FROM procrastinate_stalled.rescues
                       WHERE rescued_at >= now() - interval '7 days' AND action = 'retried'
               ) AS retries
            INTO facts;
        level := CASE WHEN facts.mistakes = 0 THEN 'ok' ELSE 'warning' END;
        detail := format('%s of %s retries of the last 7 days', facts.mistakes, facts.retries)
            || CASE WHEN facts.mistakes = 0 THEN ' are known to have been mistakes' ELSE format(
                ' (%s %%) were of jobs whose former run finished after all: %s',
                round(100 * facts.mistakes / greatest(facts.retries, 1), 1), facts.culprits
            ) END;
        hint := CASE WHEN facts.mistakes > 0 THEN concat_ws(' ',
            'Their workers were alive.',
            CASE WHEN facts.by_rule THEN 'Give that rule a longer heartbeat_timeout or run_timeout.' END,
            CASE WHEN facts.by_hand THEN 'Before retry_job(), see explain_job() and workers().' END,
            'Only those that finished before their retry was started can be seen.'
        ) END;
    EXCEPTION WHEN OTHERS THEN
        level := 'error';
        detail := SQLERRM;
        hint := CASE SQLSTATE WHEN '42501' THEN rights WHEN '55000' THEN 'See the row procrastinate.' ELSE damaged END;
    END;
    RETURN NEXT;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.status() IS
$$The health of the whole, one row per check. It never raises, whatever is missing and whatever the role may not see.

Returns:
  name    procrastinate (its schema and version), schedule (pg_cron's job), last_run (of that job, if there is one),
          last_sweep (by any means), available_since (of the server: precise or not), workers, jobs (stalled, held,
          or ignored though silent for 5 minutes), given_up (jobs that a living worker probably abandoned), rules (those
          that can bite), pauses, false_rescues (retries of the last 7 days whose former run finished after all)
  level   ok, warning or error
  detail  the fact
  hint    the remedy; NULL where all is well$$;
