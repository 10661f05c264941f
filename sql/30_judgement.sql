-- Which jobs are stalled, by which rule, on what evidence, and what to do with them: one query, _judge(), which
-- every function that finds or rescues stalled jobs uses. Nothing in this file writes or locks.

CREATE OR REPLACE FUNCTION procrastinate_stalled._seconds(
    argument_name text,
    seconds double precision
)
    RETURNS interval
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    -- NaN is greater than every number.
    IF seconds <= 0 OR seconds > 3155760000 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('%s must be a positive number of seconds', argument_name),
            DETAIL = format('It is %s.', seconds),
            HINT = 'Pass a number above 0 and up to 3155760000 (100 years), or leave the argument out.';
    END IF;
    RETURN make_interval(secs => seconds);
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._seconds(text, double precision) IS
    'The argument as an interval; NULL for NULL. Raises invalid_parameter_value unless it is above 0 and at most 100 years.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._doing_jobs(
    job_ids bigint[]
)
    RETURNS TABLE (
        id bigint,
        queue_name text,
        task_name text,
        priority integer,
        lock text,
        queueing_lock text,
        args jsonb,
        status text,
        scheduled_at timestamp with time zone,
        attempts integer,
        abort_requested boolean,
        worker_id bigint
    )
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
    -- A plain scan of the partial index procrastinate_jobs_lock_idx_v1 marks its dead entries as it passes them; a
    -- bitmap scan reads them all again each time, until the next vacuum. The planner counts a scan that is off but
    -- has no alternative as immensely dear, which would start the JIT compiler: 0.3 s a query.
    SET enable_bitmapscan = off
    SET enable_seqscan = off
    SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    IF job_ids IS NULL THEN
        RETURN QUERY
            SELECT id, queue_name::text, task_name::text, priority, lock, queueing_lock, args, status::text,
                   scheduled_at, attempts, abort_requested, worker_id
                FROM procrastinate_jobs
                WHERE status = 'doing';
    ELSE
        RETURN QUERY
            SELECT id, queue_name::text, task_name::text, priority, lock, queueing_lock, args, status::text,
                   scheduled_at, attempts, abort_requested, worker_id
                FROM procrastinate_jobs
                -- As text, so that no partial index fits and the primary key is taken.
                WHERE id = ANY (job_ids) AND status::text = 'doing';
    END IF;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._doing_jobs(bigint[]) IS
    'The jobs in doing, all of them or those of the given ids.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._waiting_job(
    queueing_lock text
)
    RETURNS TABLE (id bigint, lock text)
    LANGUAGE plpgsql
    STABLE
    STRICT
    ROWS 1
    SET search_path FROM CURRENT
    -- Left to itself, a planner that believes that few jobs are in todo reads all of them through another partial index.
    -- Without a sort, only procrastinate_jobs_queueing_lock_idx_v1 gives this order.
    SET enable_sort = off
    SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT job.id, job.lock
            FROM procrastinate_jobs AS job
            WHERE job.queueing_lock BETWEEN _waiting_job.queueing_lock AND _waiting_job.queueing_lock
                AND job.status = 'todo'
            ORDER BY job.queueing_lock;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._waiting_job(text) IS
    'The job in todo that has the queueing lock, if there is one: there is never more than one.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._judge(
    queue text DEFAULT NULL,
    task_name text DEFAULT NULL,
    seconds_since_heartbeat interval DEFAULT NULL,
    nb_seconds interval DEFAULT NULL,
    job_ids bigint[] DEFAULT NULL
)
    RETURNS SETOF procrastinate_stalled.stalled_job
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
    SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH running AS (
        SELECT job.*,
               worker.last_heartbeat,
               orphan.seen_at,
               event.started_at,
               event.deferred_at,
               rule.name AS rule_name,
               rule.action AS rule_action,
               rule.heartbeat_timeout,
               rule.run_timeout,
               rule.max_rescues,
               rule.retry_delay,
               rule.retry_backoff,
               rule.retry_queue_name,
               rule.retry_priority,
               rule.on_duplicate
            FROM procrastinate_stalled._doing_jobs(job_ids) AS job
            LEFT JOIN procrastinate_workers AS worker ON worker.id = job.worker_id
            LEFT JOIN procrastinate_stalled.orphans AS orphan
                ON job.worker_id IS NULL AND orphan.job_id = job.id AND orphan.attempts = job.attempts
            CROSS JOIN LATERAL (
                SELECT max(event.at) FILTER (WHERE event.type = 'started') AS started_at,
                       min(event.at) FILTER (WHERE event.type = 'deferred') AS deferred_at
                    FROM procrastinate_events AS event
                    WHERE event.job_id = job.id
            ) AS event
            LEFT JOIN LATERAL (
                SELECT *
                    FROM procrastinate_stalled.rules AS rule
                    WHERE rule.enabled
                        AND (rule.expires_at IS NULL OR rule.expires_at > now())
                        AND (rule.queue_name IS NULL OR job.queue_name = rule.queue_name)
                        AND (rule.task_name IS NULL OR job.task_name LIKE rule.task_name)
                        AND (rule.args IS NULL OR job.args @> rule.args)
                    ORDER BY rule.position, rule.name
                    LIMIT 1
            ) AS rule ON true
            WHERE (_judge.queue IS NULL OR job.queue_name = _judge.queue)
                AND (_judge.task_name IS NULL OR job.task_name = _judge.task_name)
    ), dated AS (
        SELECT running.*,
               CASE
                   WHEN _judge.nb_seconds IS NOT NULL THEN ran_since + _judge.nb_seconds
                   WHEN _judge.seconds_since_heartbeat IS NULL THEN ran_since + run_timeout
               END AS run_ends_at,
               CASE
                   WHEN _judge.nb_seconds IS NOT NULL THEN NULL
                   WHEN _judge.seconds_since_heartbeat IS NOT NULL THEN
                       CASE WHEN worker_id IS NULL THEN '-infinity' ELSE silent_since END + _judge.seconds_since_heartbeat
                   ELSE
                       CASE WHEN worker_id IS NULL THEN seen_at ELSE silent_since END + heartbeat_timeout
               END AS silent_at
            FROM running
            CROSS JOIN LATERAL (
                -- A time in the future, of a clock that was wrong, tells nothing, and a sum with it may be out of range.
                SELECT CASE WHEN started_at <= now() THEN started_at END AS ran_since,
                       CASE WHEN last_heartbeat <= now() THEN last_heartbeat END AS silent_since
            ) AS past
    ), stalled AS (
        SELECT dated.*,
               least(run_ends_at, silent_at) AS stalled_at,
               CASE
                   WHEN silent_at IS NULL OR run_ends_at <= silent_at THEN 'run_timeout'
                   WHEN worker_id IS NULL THEN 'orphaned'
                   ELSE 'heartbeat'
               END AS reason
            FROM dated
            WHERE CASE
                WHEN _judge.nb_seconds IS NULL AND _judge.seconds_since_heartbeat IS NULL
                    THEN rule_action <> 'ignore' AND least(run_ends_at, silent_at) <= now()
                -- JobManager.get_stalled_jobs compares with "<".
                ELSE least(run_ends_at, silent_at) < now()
            END
    ), numbered AS (
        SELECT stalled.*,
               earlier.rescues,
               waiting.id AS waiting_id,
               waiting.lock = stalled.lock AS waits_for_this_one,
               NOT stalled.abort_requested
                   AND rule_action IS NOT DISTINCT FROM 'retry'
                   AND (max_rescues IS NULL OR earlier.rescues < max_rescues) AS may_be_retried
            FROM stalled
            CROSS JOIN LATERAL (
                -- An older row is of another job, which had this id before Procrastinate's tables were made anew.
                SELECT count(*) AS rescues
                    FROM procrastinate_stalled.rescues AS rescue
                    WHERE rescue.job_id = stalled.id
                        AND (deferred_at IS NULL OR rescue.rescued_at >= deferred_at)
                        AND rescue.action = 'retried'
                        AND rescue.reason <> 'manual'
            ) AS earlier
            LEFT JOIN LATERAL procrastinate_stalled._waiting_job(stalled.queueing_lock) AS waiting ON true
    ), planned AS (
        SELECT numbered.*,
               CASE WHEN may_be_retried AND queueing_lock IS NOT NULL THEN coalesce(
                   waiting_id,
                   -- Of several stalled jobs with one queueing lock the first takes the place in todo.
                   nullif(first_value(id) OVER (PARTITION BY queueing_lock, may_be_retried ORDER BY id), id)
               ) END AS duplicate_of
            FROM numbered
    ), decided AS (
        SELECT planned.*,
               CASE
                   WHEN coalesce(rule_action, 'ignore') = 'ignore' THEN 'ignore'
                   WHEN abort_requested THEN 'abort'
                   WHEN NOT may_be_retried THEN 'fail'
                   WHEN duplicate_of IS NULL THEN 'retry'
                   WHEN on_duplicate = 'wait' AND waits_for_this_one IS NOT TRUE THEN 'wait'
                   ELSE 'fail'
               END AS action
            FROM planned
    )
    SELECT id,
           queue_name,
           task_name,
           priority,
           lock,
           queueing_lock,
           -- Who names the jobs keeps the rows in memory, does not need the args, and each may have megabytes of them.
           CASE WHEN _judge.job_ids IS NULL THEN args END,
           status,
           scheduled_at,
           attempts,
           abort_requested,
           worker_id,
           last_heartbeat,
           started_at,
           rule_name,
           reason,
           nullif(stalled_at, '-infinity'),
           action,
           CASE
               WHEN rule_name IS NULL THEN 'no rule'
               WHEN action = 'ignore' THEN 'rule'
               WHEN action = 'abort' THEN 'abort requested'
               WHEN duplicate_of IS NOT NULL THEN 'duplicate of job ' || duplicate_of
               WHEN action = 'fail' AND rule_action = 'fail' THEN 'rule'
               WHEN action = 'fail' THEN 'max_rescues'
           END,
           duplicate_of,
           CASE
               -- The exponent is bounded, because the power could overflow.
               WHEN action = 'retry' AND lock IS NULL AND retry_delay > '0' THEN now() + make_interval(secs => least(
                   86400,
                   extract(epoch FROM retry_delay)::double precision * exp(least(40, ln(retry_backoff) * rescues))
               ))
           END,
           CASE WHEN action = 'retry' THEN retry_queue_name END,
           CASE WHEN action = 'retry' THEN retry_priority END
        FROM decided
        ORDER BY id;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._judge(text, text, interval, interval, bigint[]) IS
    'The judgement of the jobs in doing: those that are stalled, why, and what a sweep would do with each. Without intervals by the rules; with one, the rows of JobManager.get_stalled_jobs, of which the rules still choose the action. With job_ids only those of them, without their args.';


CREATE OR REPLACE FUNCTION procrastinate_stalled.get_stalled_jobs(
    queue text DEFAULT NULL,
    task_name text DEFAULT NULL,
    seconds_since_heartbeat double precision DEFAULT NULL,
    nb_seconds double precision DEFAULT NULL
)
    RETURNS SETOF procrastinate_stalled.stalled_job
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN QUERY
        SELECT *
            FROM procrastinate_stalled._judge(
                queue,
                task_name,
                procrastinate_stalled._seconds('seconds_since_heartbeat', seconds_since_heartbeat),
                procrastinate_stalled._seconds('nb_seconds', nb_seconds)
            );
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.get_stalled_jobs(text, text, double precision, double precision) IS
$$The stalled jobs, with the evidence and what a sweep would do. Writes nothing.

Arguments, all optional:
  queue                    only jobs of this queue
  task_name                only jobs of this task (equal, not a pattern)
  seconds_since_heartbeat  instead of the rules' timeouts: jobs whose worker has been silent for longer, and orphans
  nb_seconds               instead of all that: jobs that started longer ago, whatever their worker says
Returns one row of stalled_job per job, by id. Without seconds, what the rules call stalled now; with seconds, exactly
the jobs of Procrastinate's JobManager.get_stalled_jobs with the same argument (nb_seconds wins over
seconds_since_heartbeat there too).
Errors: invalid_parameter_value, when seconds are zero, negative, NaN or above 100 years.$$;
