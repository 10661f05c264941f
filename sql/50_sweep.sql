-- The sweep: judge once, rescue in batches, commit each batch with its counts, then purge. sweep() is what pg_cron
-- runs; retry_stalled_jobs() does the same in the caller's transaction.

CREATE OR REPLACE FUNCTION procrastinate_stalled._can_sweep(
    batch_size integer
)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    IF batch_size IS NULL OR batch_size <= 0 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'batch_size must be a positive number of jobs',
            DETAIL = format('It is %s.', coalesce(batch_size::text, 'NULL')),
            HINT = 'Nothing was changed. CALL procrastinate_stalled.sweep(); takes 1000 at a time.';
    END IF;
    IF pg_is_in_recovery() THEN
        RAISE NOTICE USING
            MESSAGE = 'procrastinate_stalled: nothing was swept, because this server is a standby',
            HINT = 'Sweep on the primary. After a promotion the sweeps of pg_cron begin here by themselves.';
        RETURN false;
    END IF;
    RETURN true;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._can_sweep(integer) IS
    'Whether sweep() can start: false, with a notice, on a standby. Raises invalid_parameter_value unless batch_size is above 0.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._lock_tables()
    RETURNS void
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
DECLARE
    relation regclass;
BEGIN
    -- LOCK TABLE would need the right to write every column.
    relation := 'procrastinate_jobs';
    UPDATE procrastinate_jobs SET worker_id = NULL WHERE false;
    relation := 'procrastinate_workers';
    PERFORM FROM procrastinate_workers WHERE false FOR NO KEY UPDATE;
    relation := 'procrastinate_events';
    INSERT INTO procrastinate_events (job_id) SELECT NULL WHERE false;
    relation := 'procrastinate_stalled.rescues';
    INSERT INTO procrastinate_stalled.rescues (job_id) SELECT NULL WHERE false;
    relation := 'procrastinate_stalled.sweeps';
    UPDATE procrastinate_stalled.sweeps SET error = NULL WHERE false;
    relation := 'procrastinate_stalled.orphans';
    INSERT INTO procrastinate_stalled.orphans (job_id) SELECT NULL WHERE false;
    relation := 'procrastinate_stalled.rules';
    PERFORM FROM procrastinate_stalled.rules WHERE false;
    relation := 'procrastinate_stalled.settings';
    PERFORM FROM procrastinate_stalled.settings WHERE false;
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION USING
        ERRCODE = 'lock_not_available',
        MESSAGE = format('the table %s is locked by another session', relation),
        DETAIL = 'No sweep can use it meanwhile: a migration, VACUUM FULL or CREATE INDEX without CONCURRENTLY does that.',
        HINT = format('The next sweep goes on. Who it is: SELECT * FROM pg_stat_activity WHERE pid IN (SELECT pid FROM pg_locks WHERE relation = %s AND granted);', relation::oid);
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._lock_tables() IS
    'Tells a lock on a whole table from one on a job: takes the locks of a sweep on all tables that it uses, until the transaction ends. Raises lock_not_available when another session holds a lock on one of them that forbids it.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._begin_sweep(
    queue text,
    task_name text,
    seconds_since_heartbeat interval,
    nb_seconds interval,
    OUT sweep_id bigint,
    OUT suspect_ids bigint[]
)
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
DECLARE
    doing record;
BEGIN
    PERFORM procrastinate_stalled._require_procrastinate();
    PERFORM procrastinate_stalled._require_writable();
    -- A database that was restored from a dump of its schema alone has no rows yet.
    IF NOT EXISTS (SELECT FROM procrastinate_stalled.settings) THEN
        BEGIN
            PERFORM procrastinate_stalled._first_rows();
        EXCEPTION WHEN insufficient_privilege OR lock_not_available THEN
            NULL; -- another sweep does it
        END;
    END IF;
    doing := procrastinate_stalled._doing_jobs(queue, task_name, seconds_since_heartbeat, nb_seconds);
    PERFORM procrastinate_stalled._note_orphans(doing.orphan_ids);
    INSERT INTO procrastinate_stalled.sweeps (doing, latest_heartbeat, newest_worker_id)
        VALUES (
            cardinality(doing.ids),
            (SELECT max(last_heartbeat) FROM procrastinate_workers WHERE last_heartbeat <= clock_timestamp()),
            (SELECT coalesce(max(worker.id), 0) FROM procrastinate_workers AS worker)
        )
        RETURNING id
        INTO sweep_id;
    suspect_ids := doing.suspect_ids;
EXCEPTION WHEN lock_not_available THEN
    PERFORM procrastinate_stalled._lock_tables();
    RAISE;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._begin_sweep(text, text, interval, interval) IS
    'Looks at the jobs in doing once, notes orphans and opens the row of a sweep. Returns its id, and the ids of the jobs that may be stalled.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._batches(
    job_ids bigint[],
    batch_size integer
)
    RETURNS TABLE (batch bigint[])
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path FROM CURRENT
AS $$
DECLARE
    jobs CONSTANT integer := cardinality(job_ids);
    size CONSTANT integer := least(batch_size, jobs);
BEGIN
    IF jobs > 0 THEN
        FOR number IN 1..jobs BY size LOOP
            batch := job_ids[number:number + size - 1];
            RETURN NEXT;
        END LOOP;
    END IF;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._batches(bigint[], integer) IS
    'The ids in batches of that many.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._rescue_batch(
    sweep_id bigint,
    queue text,
    task_name text,
    seconds_since_heartbeat interval,
    nb_seconds interval,
    job_ids bigint[],
    INOUT found_no_room integer,
    OUT rescue_ids bigint[],
    OUT one_by_one boolean,
    OUT disk_is_full boolean
)
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
#variable_conflict use_column
DECLARE
    rescue record;
    violated_constraint text;
BEGIN
    one_by_one := false;
    disk_is_full := false;
    BEGIN
        rescue := procrastinate_stalled._rescue(queue, task_name, seconds_since_heartbeat, nb_seconds, job_ids);
    EXCEPTION WHEN OTHERS THEN
        IF SQLSTATE = '55P03' THEN
            PERFORM procrastinate_stalled._lock_tables();
        END IF;
        IF cardinality(job_ids) > 1 THEN
            one_by_one := true;
            RETURN;
        END IF;
        -- What a deferred job with the same queueing lock causes is no error: the job has lost its turn.
        GET STACKED DIAGNOSTICS violated_constraint = CONSTRAINT_NAME;
        -- Not each of a million jobs, at 2 ms each. Some may have met another disk, by a trigger of the user's.
        found_no_room := CASE SQLSTATE WHEN '53100' THEN found_no_room + 1 ELSE 0 END;
        disk_is_full := found_no_room >= 100;
        IF SQLSTATE <> '55P03' AND violated_constraint <> 'procrastinate_jobs_queueing_lock_idx_v1' THEN
            UPDATE procrastinate_stalled.sweeps
                -- The first one, or the one that ends the sweep.
                SET error = CASE
                        WHEN error IS NULL OR _rescue_batch.disk_is_full
                        THEN format('job %s: %s (%s)', job_ids[1], SQLERRM, SQLSTATE)
                        ELSE error
                    END
                WHERE id = sweep_id;
        END IF;
        RETURN;
    END;

    found_no_room := 0;
    rescue_ids := rescue.rescue_ids;
    IF rescue_ids <> '{}' THEN
        UPDATE procrastinate_stalled.sweeps
            SET retried = retried + rescue.retried,
                failed = failed + rescue.failed,
                aborted = aborted + rescue.aborted
            WHERE id = sweep_id;
    END IF;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._rescue_batch(bigint, text, text, interval, interval, bigint[], integer) IS
    'Rescues the given jobs and counts them in the row of the sweep. Never raises for the sake of one job (for that of the table, it does): one_by_one asks the caller to come again with each job alone, because the batch as a whole failed; a job that fails alone stays as it is. found_no_room counts the jobs in a row that failed alone because a disk was full; after a hundred of them disk_is_full asks to end the sweep.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._end_sweep(
    sweep_id bigint,
    queue text,
    task_name text,
    seconds_since_heartbeat interval,
    nb_seconds interval,
    suspect_ids bigint[],
    OUT has_rescued boolean
)
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
#variable_conflict use_column
BEGIN
    -- Who may not delete records, as an operator, leaves that to the sweeps of others.
    IF has_table_privilege('procrastinate_stalled.rescues', 'DELETE')
        AND has_table_privilege('procrastinate_stalled.sweeps', 'DELETE')
    THEN
        DELETE FROM procrastinate_stalled.rescues
            WHERE id IN (
                SELECT rescue.id
                    FROM procrastinate_stalled.rescues AS rescue
                    WHERE rescue.rescued_at < now() - (SELECT keep_rescues FROM procrastinate_stalled.settings)
                        AND NOT EXISTS (
                            -- It counts towards max_rescues of a job that can run again, and so can stall again.
                            SELECT
                                FROM procrastinate_jobs AS job
                                WHERE rescue.action = 'retried'
                                    AND rescue.reason <> 'manual'
                                    AND job.id = rescue.job_id
                                    AND job.status IN ('todo', 'doing', 'failed')
                        )
                    ORDER BY rescue.rescued_at
                    LIMIT 1000
                    FOR UPDATE OF rescue SKIP LOCKED
            );
        DELETE FROM procrastinate_stalled.sweeps
            WHERE id IN (
                SELECT sweep.id
                    FROM procrastinate_stalled.sweeps AS sweep
                    WHERE sweep.started_at < now() - greatest(
                            (SELECT keep_sweeps FROM procrastinate_stalled.settings),
                            -- _judge() reads those that saw nobody alive.
                            (SELECT max(heartbeat_timeout) FROM procrastinate_stalled.rules)
                        )
                        AND sweep.id <> sweep_id
                    ORDER BY sweep.started_at
                    LIMIT 1000
                    FOR UPDATE OF sweep SKIP LOCKED
            );
    END IF;
    UPDATE procrastinate_stalled.sweeps
        SET (waiting, held, held_reason) = (
                SELECT count(*) FILTER (WHERE verdict = 'stalled'),
                       count(*) FILTER (WHERE verdict = 'held'),
                       string_agg(DISTINCT coalesce(pause_name, 'no living worker'), ', ') FILTER (WHERE verdict = 'held')
                    FROM procrastinate_stalled._judge(queue, task_name, seconds_since_heartbeat, nb_seconds, suspect_ids)
                    -- The usual case: there were none, or all of them were rescued.
                    WHERE retried + failed + aborted < cardinality(suspect_ids)
            ),
            duration = clock_timestamp() - started_at
        WHERE id = sweep_id
        RETURNING retried + failed + aborted > 0
        INTO has_rescued;
EXCEPTION WHEN lock_not_available THEN
    PERFORM procrastinate_stalled._lock_tables();
    RAISE;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._end_sweep(bigint, text, text, interval, interval, bigint[]) IS
    'Purges up to 1000 outdated rows each of rescues and sweeps, if the role may delete them, and closes the row of the sweep. Tells whether that has rescued any job.';


CREATE OR REPLACE PROCEDURE procrastinate_stalled.sweep(
    batch_size integer DEFAULT 1000
)
    LANGUAGE plpgsql
AS $$
-- No SET clause, because a procedure that has one cannot commit; so names are looked up in the caller's search_path.
-- Therefore everything here is a call with a qualified name, a type that is a keyword, or what plpgsql does without
-- names (assignments, conditions, loops): no operator, no cast, no function of PostgreSQL.
DECLARE
    sweep_id bigint;
    suspect_ids bigint[];
    batch bigint[];
    one_by_one boolean;
    found_no_room integer := 0;
    disk_is_full boolean;
    job_id bigint;
BEGIN
    IF NOT procrastinate_stalled._can_sweep(batch_size) THEN
        RETURN;
    END IF;

    -- No commit waits for the disk but the last one, and that only if something was rescued. What a crash may take away
    -- is seen again by the next sweep: a job and its row in rescues go together, and a worker that has fetched the job
    -- since has waited for the disk itself, and with that for all that was committed before.
    PERFORM pg_catalog.set_config('synchronous_commit', 'off', true);
    SELECT begun.sweep_id, begun.suspect_ids
        INTO sweep_id, suspect_ids
        FROM procrastinate_stalled._begin_sweep(NULL, NULL, NULL, NULL) AS begun;
    -- Whatever ends the sweep from here on, its row and the orphans that it saw first remain.
    COMMIT;
    <<batches>>
    FOR batch IN
        SELECT batches.batch FROM procrastinate_stalled._batches(suspect_ids, batch_size) AS batches
    LOOP
        PERFORM pg_catalog.set_config('synchronous_commit', 'off', true);
        SELECT rescued.one_by_one, rescued.found_no_room, rescued.disk_is_full
            INTO one_by_one, found_no_room, disk_is_full
            FROM procrastinate_stalled._rescue_batch(sweep_id, NULL, NULL, NULL, NULL, batch, found_no_room) AS rescued;
        COMMIT;
        EXIT batches WHEN disk_is_full;
        IF one_by_one THEN
            FOREACH job_id IN ARRAY batch LOOP
                PERFORM pg_catalog.set_config('synchronous_commit', 'off', true);
                SELECT rescued.found_no_room, rescued.disk_is_full
                    INTO found_no_room, disk_is_full
                    FROM procrastinate_stalled._rescue_batch(
                        sweep_id, NULL, NULL, NULL, NULL, ARRAY[job_id], found_no_room
                    ) AS rescued;
                COMMIT;
                EXIT batches WHEN disk_is_full;
            END LOOP;
        END IF;
    END LOOP;
    IF NOT procrastinate_stalled._end_sweep(sweep_id, NULL, NULL, NULL, NULL, suspect_ids) THEN
        PERFORM pg_catalog.set_config('synchronous_commit', 'off', true);
    END IF;
    COMMIT;
END;
$$;

COMMENT ON PROCEDURE procrastinate_stalled.sweep(integer) IS
$$One sweep by the rules: finds the stalled jobs, rescues them in batches, commits each batch, then purges outdated rows
and closes its row in sweeps. It is what pg_cron runs. Two sweeps at once are harmless.

Argument:
  batch_size  jobs per transaction, above 0; while a batch is written its jobs are locked
It commits, so it must be a statement of its own: CALL procrastinate_stalled.sweep(); outside a transaction block.
On a standby it does nothing and says so. Errors: invalid_parameter_value, invalid_transaction_termination (called inside
a transaction block), lock_not_available (one of the tables is locked as a whole), read_only_sql_transaction.
A job that cannot be rescued does not stop it: see sweeps.waiting and sweeps.error. A full disk does, after a hundred
jobs in a row.$$;


CREATE OR REPLACE FUNCTION procrastinate_stalled.retry_stalled_jobs(
    queue text DEFAULT NULL,
    task_name text DEFAULT NULL,
    seconds_since_heartbeat double precision DEFAULT NULL,
    nb_seconds double precision DEFAULT NULL,
    max_jobs integer DEFAULT NULL,
    dry_run boolean DEFAULT false
)
    RETURNS SETOF procrastinate_stalled.rescues
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
#variable_conflict use_column
DECLARE
    silence CONSTANT interval := procrastinate_stalled._seconds('seconds_since_heartbeat', seconds_since_heartbeat);
    run_time CONSTANT interval := procrastinate_stalled._seconds('nb_seconds', nb_seconds);
    sweep record;
    batch bigint[];
    result record;
    found_no_room integer := 0;
    single bigint;
    done integer := 0;
BEGIN
    IF max_jobs <= 0 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'max_jobs must be a positive number of jobs',
            DETAIL = format('It is %s.', max_jobs),
            HINT = 'Nothing was changed. Leave it out to take all.';
    END IF;

    IF coalesce(dry_run, true) THEN
        PERFORM procrastinate_stalled._require_procrastinate();
        RETURN QUERY
            SELECT NULL::bigint,
                   now(),
                   id,
                   queue_name,
                   task_name,
                   CASE action WHEN 'retry' THEN 'retried' WHEN 'abort' THEN 'aborted' ELSE 'failed' END,
                   reason,
                   detail,
                   rule_name,
                   worker_id,
                   last_heartbeat,
                   started_at,
                   attempts,
                   retry_at,
                   current_user || coalesce(' (' || nullif(current_setting('application_name'), '') || ')', '')
                FROM procrastinate_stalled._judge(retry_stalled_jobs.queue, retry_stalled_jobs.task_name, silence, run_time)
                WHERE verdict = 'stalled' AND action IN ('retry', 'fail', 'abort')
                ORDER BY id
                LIMIT max_jobs;
        RETURN;
    END IF;

    sweep := procrastinate_stalled._begin_sweep(retry_stalled_jobs.queue, retry_stalled_jobs.task_name, silence, run_time);
    PERFORM procrastinate_stalled._lock_tables();
    <<batches>>
    FOR batch IN
        SELECT batches.batch
            FROM procrastinate_stalled._batches(
                ARRAY(
                    SELECT id
                        FROM procrastinate_stalled._judge(
                            retry_stalled_jobs.queue, retry_stalled_jobs.task_name, silence, run_time, sweep.suspect_ids
                        )
                        WHERE verdict = 'stalled' AND action IN ('retry', 'fail', 'abort')
                        ORDER BY id
                ),
                least(max_jobs, 1000)
            ) AS batches
    LOOP
        EXIT WHEN done >= max_jobs;
        batch := batch[1:coalesce(max_jobs - done, cardinality(batch))];
        result := procrastinate_stalled._rescue_batch(
            sweep.sweep_id, retry_stalled_jobs.queue, retry_stalled_jobs.task_name, silence, run_time, batch,
            found_no_room
        );
        found_no_room := result.found_no_room;
        RETURN QUERY SELECT * FROM procrastinate_stalled.rescues WHERE id = ANY (result.rescue_ids) ORDER BY id;
        done := done + coalesce(cardinality(result.rescue_ids), 0);
        EXIT batches WHEN result.disk_is_full;
        IF result.one_by_one THEN
            FOREACH single IN ARRAY batch LOOP
                result := procrastinate_stalled._rescue_batch(
                    sweep.sweep_id, retry_stalled_jobs.queue, retry_stalled_jobs.task_name, silence, run_time, ARRAY[single],
                    found_no_room
                );
                found_no_room := result.found_no_room;
                RETURN QUERY SELECT * FROM procrastinate_stalled.rescues WHERE id = ANY (result.rescue_ids);
                done := done + coalesce(cardinality(result.rescue_ids), 0);
                EXIT batches WHEN result.disk_is_full;
            END LOOP;
        END IF;
    END LOOP;
    PERFORM procrastinate_stalled._end_sweep(
        sweep.sweep_id, retry_stalled_jobs.queue, retry_stalled_jobs.task_name, silence, run_time, sweep.suspect_ids
    );
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.retry_stalled_jobs(text, text, double precision, double precision, integer, boolean) IS
$$One sweep over the jobs that get_stalled_jobs() returns for the same arguments, in the caller's transaction: until that
ends, the rescued jobs stay locked and their workers are not woken, so commit soon.

Arguments, all optional:
  queue                    only jobs of this queue
  task_name                only jobs of this task (equal, not a pattern)
  seconds_since_heartbeat  instead of the rules' timeouts: jobs whose worker has been silent for longer, and orphans
  nb_seconds               instead of all that: jobs that started longer ago, whatever their worker says
  max_jobs                 at most so many, lowest id first
  dry_run                  write nothing, return what would be done (id NULL)
Returns the rows of rescues that it wrote. Seconds are without regard to outages (settings.outage_grace), to whether any
worker is alive, and to the rules' timeouts: right after a restart of the server they rob living workers that have not
beaten yet. So give seconds only when you know that those workers are dead. With seconds too, the rules choose the
action: a job whose rule is ignore, or that no rule matches, is not touched. A job that cannot be rescued does not stop
it; a full disk does, after a hundred jobs in a row: see sweeps.waiting and sweeps.error.
Errors, after which nothing is changed: invalid_parameter_value, when seconds are zero, negative, NaN or above 100 years,
or max_jobs is not positive; lock_not_available, when one of the tables is locked as a whole;
read_only_sql_transaction.$$;
