-- Putting stalled jobs back, or ending them. Every statement here may meet Procrastinate's fetch, finish, retry, abort
-- and prune, an application that defers, and another sweep:
-- * worker rows are locked before job rows, each in id order, as Procrastinate's prune does; the other order deadlocks;
-- * what another session has locked is skipped; the next sweep sees it again;
-- * a job is changed only if it is still in the run that was judged: same status, worker, attempts and abort request;
-- * lock_timeout is below deadlock_timeout and below what a worker would notice, for the waits that cannot be skipped
--   (a queueing lock that another session has inserted and not committed).

CREATE OR REPLACE FUNCTION procrastinate_stalled._notify(
    job_ids bigint[]
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
AS $$
DECLARE
    queue_name text;
    payload text;
BEGIN
    FOR queue_name, payload IN
        SELECT job.queue_name::text, json_build_object('type', 'job_inserted', 'job_id', min(job.id))::text
            FROM procrastinate_jobs AS job
            WHERE job.id = ANY (job_ids)
                -- As a range: a partial index of the jobs in todo fits otherwise, and may be read from end to end.
                AND job.status BETWEEN 'todo' AND 'todo'
                AND (job.scheduled_at IS NULL OR job.scheduled_at <= now())
            GROUP BY job.queue_name
    LOOP
        -- The name of a channel holds 63 bytes; pg_notify raises above that.
        IF octet_length('procrastinate_queue_v1#' || queue_name) <= 63 THEN
            PERFORM pg_notify('procrastinate_queue_v1#' || queue_name, payload);
        END IF;
        PERFORM pg_notify('procrastinate_any_queue_v1', payload);
    END LOOP;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._notify(bigint[]) IS
    'Wakes the workers of the given jobs'' queues, as procrastinate_notify_queue_job_inserted_v1 does on INSERT; without it a retried job waits for the next poll. Only for jobs that are due, once per queue.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._rescue(
    queue text,
    task_name text,
    seconds_since_heartbeat interval,
    nb_seconds interval,
    job_ids bigint[],
    OUT rescue_ids bigint[],
    OUT retried bigint,
    OUT failed bigint,
    OUT aborted bigint
)
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
    -- As for _judge().
    SET plan_cache_mode = force_generic_plan
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    silent_since CONSTANT timestamp with time zone := procrastinate_stalled._silent_since(seconds_since_heartbeat, nb_seconds);
    silent_workers bigint[];
    rest bigint[] := job_ids;
    duplicates bigint[];
    rescued bigint[];
    to_wake bigint[];
BEGIN
    rescue_ids := '{}';
    retried := 0;
    failed := 0;
    aborted := 0;
    LOOP
        -- Before the jobs are judged, so that none of these workers beats between the judgement and the rescue. Without a
        -- queue or task all silent workers are concerned, sooner or later; to tell whose jobs these are takes longer.
        silent_workers := ARRAY(
            SELECT worker.id
                FROM procrastinate_workers AS worker
                WHERE worker.last_heartbeat <= silent_since
                    AND (
                        (queue IS NULL AND task_name IS NULL)
                        OR worker.id IN (SELECT job.worker_id FROM procrastinate_jobs AS job WHERE job.id = ANY (rest))
                    )
                ORDER BY worker.id
                FOR NO KEY UPDATE OF worker SKIP LOCKED
        );

        WITH candidate AS MATERIALIZED (
            SELECT id,
                   queue_name,
                   task_name,
                   queueing_lock,
                   attempts,
                   abort_requested,
                   worker_id,
                   last_heartbeat,
                   started_at,
                   rule_name,
                   reason,
                   action,
                   detail,
                   duplicate_of,
                   retry_at,
                   retry_queue_name,
                   retry_priority
                FROM procrastinate_stalled._judge(queue, task_name, seconds_since_heartbeat, nb_seconds, rest)
                WHERE verdict = 'stalled'
                    AND action IN ('retry', 'fail', 'abort')
                    AND (reason <> 'heartbeat' OR worker_id IN (SELECT unnest(silent_workers)))
        ), waiting AS (
            -- A job is ended as a duplicate only while the other one stays in todo, which this lock sees to.
            SELECT job.id
                FROM procrastinate_jobs AS job
                WHERE (job.id, job.queueing_lock) IN (SELECT duplicate_of, queueing_lock FROM candidate)
                    AND job.status BETWEEN 'todo' AND 'todo'
                FOR SHARE OF job SKIP LOCKED
        ), run AS (
            SELECT candidate.*
                FROM procrastinate_jobs AS job
                JOIN candidate ON candidate.id = job.id
                WHERE job.status BETWEEN 'doing' AND 'doing'
                    AND job.worker_id IS NOT DISTINCT FROM candidate.worker_id
                    AND job.attempts = candidate.attempts
                    AND job.abort_requested = candidate.abort_requested
                    AND (candidate.duplicate_of IS NULL OR candidate.duplicate_of IN (SELECT id FROM waiting))
                ORDER BY job.id
                FOR NO KEY UPDATE OF job SKIP LOCKED
        ), changed AS (
            UPDATE procrastinate_jobs AS job
                SET status = CASE run.action
                        WHEN 'retry' THEN 'todo'::procrastinate_job_status
                        WHEN 'abort' THEN 'aborted'::procrastinate_job_status
                        ELSE 'failed'::procrastinate_job_status
                    END,
                    attempts = CASE run.action WHEN 'retry' THEN job.attempts + 1 ELSE job.attempts END,
                    scheduled_at = CASE run.action WHEN 'retry' THEN run.retry_at ELSE job.scheduled_at END,
                    queue_name = coalesce(run.retry_queue_name, job.queue_name),
                    priority = coalesce(run.retry_priority, job.priority),
                    abort_requested = false,
                    worker_id = NULL
                FROM run
                WHERE job.id = run.id
                RETURNING run.*
        ), ledger AS (
            INSERT INTO procrastinate_stalled.rescues (
                job_id, queue_name, task_name, action, reason, detail, rule_name,
                worker_id, last_heartbeat, started_at, attempts, scheduled_at
            )
                SELECT id,
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
                       retry_at
                    FROM changed
                RETURNING id, job_id, action
        )
        SELECT array_agg(job_id),
               _rescue.rescue_ids || array_agg(id),
               _rescue.retried + count(*) FILTER (WHERE action = 'retried'),
               _rescue.failed + count(*) FILTER (WHERE action = 'failed'),
               _rescue.aborted + count(*) FILTER (WHERE action = 'aborted'),
               to_wake || ARRAY(
                   -- The first of each queue that is due.
                   SELECT min(id)
                       FROM changed
                       WHERE action = 'retry' AND retry_at IS NULL
                       GROUP BY coalesce(retry_queue_name, queue_name)
               ) || ARRAY(
                   -- The jobs that wait with the queueing lock of an ended one are woken too: a fetch may have skipped
                   -- them while they were locked here, or they wait for the ended one's lock.
                   SELECT DISTINCT duplicate_of FROM candidate WHERE duplicate_of IS NOT NULL
               ),
               ARRAY(SELECT id FROM candidate WHERE duplicate_of IS NOT NULL)
            INTO rescued, rescue_ids, retried, failed, aborted, to_wake, duplicates
            FROM ledger;

        -- Once more for the duplicates of a job that was stalled itself: it is in todo now, or another session has it
        -- locked and the next one with the queueing lock may take its place.
        duplicates := ARRAY(SELECT unnest(duplicates) EXCEPT SELECT unnest(rescued));
        EXIT WHEN duplicates = '{}' OR cardinality(duplicates) = cardinality(rest);
        rest := duplicates;
    END LOOP;

    PERFORM procrastinate_stalled._notify(to_wake);
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._rescue(text, text, interval, interval, bigint[]) IS
    'Judges the given jobs anew and rescues those that are stalled, all or none. Returns the ids of their rows in rescues, and how many were retried, failed and aborted. Raises unique_violation or lock_not_available when a session defers a job with the queueing lock of one of them at this very moment.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._note_orphans(
    orphan_ids bigint[]
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
    SET enable_seqscan = off
    SET jit = off
AS $$
BEGIN
    IF orphan_ids = '{}' AND NOT EXISTS (SELECT FROM procrastinate_stalled.orphans) THEN
        RETURN;
    END IF;
    -- One session at a time, and nobody waits: who comes second leaves it to the first.
    IF NOT pg_try_advisory_xact_lock(hashtextextended('procrastinate_stalled.orphans', 0)) THEN
        RETURN;
    END IF;

    DELETE FROM procrastinate_stalled.orphans AS orphan
        WHERE NOT EXISTS (
                SELECT
                    FROM procrastinate_jobs AS job
                    WHERE job.id = orphan.job_id
                        AND job.attempts = orphan.attempts
                        -- As in _judge(): the primary key is taken.
                        AND job.status BETWEEN 'doing' AND 'doing'
                        AND job.worker_id IS NULL
            )
            -- By a clock that was wrong: it is dated anew.
            OR orphan.seen_at > clock_timestamp();

    INSERT INTO procrastinate_stalled.orphans (job_id, attempts)
        SELECT job.id, job.attempts
            FROM procrastinate_jobs AS job
            WHERE job.id = ANY (orphan_ids)
                AND job.status BETWEEN 'doing' AND 'doing'
                AND job.worker_id IS NULL
                -- A job of a worker of Procrastinate 3.0 is none. See has_nameless_workers in _judge().
                AND to_regproc('procrastinate_fetch_job_v1') IS NULL
        ON CONFLICT DO NOTHING;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._note_orphans(bigint[]) IS
    'Notes the jobs in doing that have lost their worker row, which are those of the given ids, and forgets those that are in that run no more.';


CREATE OR REPLACE FUNCTION procrastinate_stalled.retry_job(
    job_id bigint,
    retry_at timestamp with time zone DEFAULT NULL,
    priority integer DEFAULT NULL,
    queue text DEFAULT NULL,
    lock text DEFAULT NULL
)
    RETURNS procrastinate_stalled.rescues
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '500ms'
AS $$
#variable_conflict use_column
DECLARE
    job record;
    rescue procrastinate_stalled.rescues;
    retry_at_is_in_range boolean;
    violated_constraint text;
BEGIN
    -- As rules.expires_at: in any time zone these are times that Python, and so a worker, can read.
    retry_at_is_in_range := retry_at >= '1970-01-01 00:00+00' AND retry_at < '9999-12-31 00:00+00';
    IF job_id IS NULL OR NOT retry_at_is_in_range OR length(queue) NOT BETWEEN 1 AND 128 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = CASE
                WHEN job_id IS NULL THEN 'job_id must not be NULL'
                WHEN NOT retry_at_is_in_range THEN 'retry_at must be a time from 1970 to 9999-12-30'
                ELSE 'queue must have 1 to 128 characters'
            END,
            DETAIL = format('job_id is %s, retry_at is %s, queue has %s characters.',
                coalesce(job_id::text, 'NULL'), coalesce(retry_at::text, 'NULL'), coalesce(length(queue)::text, 'no')),
            HINT = 'Nothing was changed. Example: SELECT * FROM procrastinate_stalled.retry_job(42);';
    END IF;

    PERFORM procrastinate_stalled._require_procrastinate();
    PERFORM procrastinate_stalled._require_writable();
    -- No type of Procrastinate's: expressions on it, which have no table, would be kept for this session when that is
    -- dropped and made anew.
    SELECT job.id, job.status::text AS status, job.queue_name::text AS queue_name, job.queueing_lock, job.worker_id, job.attempts
        INTO job
        FROM procrastinate_jobs AS job
        WHERE job.id = retry_job.job_id
        FOR NO KEY UPDATE;

    IF job.id IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'no_data_found',
            MESSAGE = format('there is no job %s', job_id),
            DETAIL = 'It was deleted, or never existed in this database.',
            HINT = 'The running jobs: SELECT id, queue_name, task_name FROM procrastinate_jobs WHERE status = ''doing'';';
    ELSIF job.status <> 'doing' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('job %s is not in doing', job_id),
            DETAIL = format('Its status is %s.', job.status),
            HINT = CASE job.status
                WHEN 'todo' THEN 'Nothing needs to be done: a worker will fetch it.'
                WHEN 'failed' THEN 'Retry a failed job with Procrastinate: procrastinate shell, then retry; or JobManager.retry_job_by_id_async.'
                ELSE 'It has ended. Defer a new job if the work must be done again.'
            END;
    END IF;

    WITH changed AS (
        -- As procrastinate_retry_job_v2 does it: an abort request makes the job fail.
        UPDATE procrastinate_jobs AS changing
            SET status = CASE WHEN changing.abort_requested THEN 'failed' ELSE 'todo' END::procrastinate_job_status,
                attempts = CASE WHEN changing.abort_requested THEN changing.attempts ELSE changing.attempts + 1 END,
                scheduled_at = CASE WHEN changing.abort_requested THEN changing.scheduled_at ELSE retry_job.retry_at END,
                priority = CASE WHEN changing.abort_requested THEN changing.priority ELSE coalesce(retry_job.priority, changing.priority) END,
                queue_name = CASE WHEN changing.abort_requested THEN changing.queue_name ELSE coalesce(retry_job.queue, changing.queue_name) END,
                lock = CASE WHEN changing.abort_requested THEN changing.lock ELSE coalesce(retry_job.lock, changing.lock) END,
                worker_id = NULL
            WHERE changing.id = job.id
            RETURNING changing.*
    )
    INSERT INTO procrastinate_stalled.rescues (
        job_id, queue_name, task_name, action, reason, detail,
        worker_id, last_heartbeat, started_at, attempts, scheduled_at
    )
        SELECT changed.id,
               job.queue_name,
               changed.task_name,
               CASE changed.status WHEN 'todo' THEN 'retried' ELSE 'failed' END,
               'manual',
               CASE WHEN changed.abort_requested THEN 'abort requested' END,
               job.worker_id,
               (SELECT worker.last_heartbeat FROM procrastinate_workers AS worker WHERE worker.id = job.worker_id),
               (SELECT max(event.at) FROM procrastinate_events AS event WHERE event.job_id = job.id AND event.type = 'started'),
               job.attempts,
               CASE changed.status WHEN 'todo' THEN changed.scheduled_at END
            FROM changed
        RETURNING *
        INTO rescue;

    PERFORM procrastinate_stalled._notify(ARRAY[job.id]);
    RETURN rescue;
EXCEPTION
    WHEN lock_not_available THEN
        RAISE EXCEPTION USING
            ERRCODE = 'lock_not_available',
            MESSAGE = format('job %s is locked by another session', job_id),
            DETAIL = 'Somebody is finishing, retrying or aborting it at this moment, or defers a job with its queueing lock.',
            HINT = 'Nothing was changed. Look at the job again, and retry it if it is still in doing.';
    WHEN unique_violation THEN
        GET STACKED DIAGNOSTICS violated_constraint = CONSTRAINT_NAME;
        IF violated_constraint <> 'procrastinate_jobs_queueing_lock_idx_v1' THEN
            RAISE;
        END IF;
        RAISE EXCEPTION USING
            ERRCODE = 'unique_violation',
            MESSAGE = format('job %s cannot be retried: another job waits with its queueing lock', job_id),
            DETAIL = format('The queueing lock is "%s"; job %s has it in todo.', job.queueing_lock, (
                SELECT waiting.id FROM procrastinate_jobs AS waiting
                WHERE waiting.queueing_lock = job.queueing_lock AND waiting.status = 'todo'
            )),
            HINT = format('Nothing was changed. The waiting job does the same work. A sweep ends this one once it is stalled: see explain_job(%1$s). If its worker lives and gave it up: SELECT procrastinate_finish_job_v1(%1$s, ''failed'', false);', job_id);
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.retry_job(bigint, timestamp with time zone, integer, text, text) IS
$$Retries one job in doing, whatever the rules and its worker say: an operator's decision. If its worker is alive after
all, the job will run twice.

Arguments:
  job_id    the job, which must be in doing
  retry_at  when the retry may start, from 1970 to 9999-12-30; NULL: at once
  priority  new priority; NULL: unchanged
  queue     new queue, 1 to 128 characters; NULL: unchanged
  lock      new lock; NULL: unchanged
Returns the new row of rescues. The job is left as Procrastinate's JobManager.retry_job leaves it (a job whose abort was
requested is failed, not retried, and keeps the request), except that worker_id is NULL.
Errors, after which nothing is changed: no_data_found (no such job), object_not_in_prerequisite_state (not in doing),
unique_violation (another job waits with its queueing lock), lock_not_available (locked by another session for 500 ms),
invalid_parameter_value, read_only_sql_transaction.$$;
