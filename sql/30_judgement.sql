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


CREATE OR REPLACE FUNCTION procrastinate_stalled._available_since()
    RETURNS timestamp with time zone
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN coalesce(
        -- The walwriter is new after a start, after a crash recovery and after a promotion.
        (SELECT backend_start FROM pg_stat_activity WHERE backend_type = 'walwriter'),
        pg_postmaster_start_time()
    );
EXCEPTION WHEN insufficient_privilege THEN
    -- Some take the whole view away from PUBLIC.
    RETURN pg_postmaster_start_time();
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._available_since() IS
    'When the server last began to accept writes: its start, the end of a crash recovery, or its promotion. The latter two can be seen by members of pg_read_all_stats only; for others it is the start.';


DO $$
BEGIN
    IF to_regtype('procrastinate_stalled._judged_job') IS NULL THEN
        CREATE TYPE procrastinate_stalled._judged_job AS (
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
            worker_id bigint,
            last_heartbeat timestamp with time zone,
            started_at timestamp with time zone,
            rule_name text,
            reason text,
            stalled_at timestamp with time zone,
            action text,
            detail text,
            duplicate_of bigint,
            retry_at timestamp with time zone,
            retry_queue_name text,
            retry_priority integer,
            -- The rest is for those who explain or count.
            verdict text,
            seen_at timestamp with time zone,
            available_since timestamp with time zone,
            forgiven_until timestamp with time zone,
            run_ends_at timestamp with time zone,
            heartbeat_timeout interval,
            run_timeout interval,
            nobody_is_alive boolean,
            nobody_until timestamp with time zone,
            waiting_id bigint,
            rescues bigint,
            pause_name text,
            pause_ends_at timestamp with time zone,
            pause_note text,
            next_rule_name text
        );
    END IF;
END;
$$;

COMMENT ON TYPE procrastinate_stalled._judged_job IS
    'The columns of stalled_job, the verdict as in explained_job, and all the evidence for it.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._judge(
    queue text DEFAULT NULL,
    task_name text DEFAULT NULL,
    seconds_since_heartbeat interval DEFAULT NULL,
    nb_seconds interval DEFAULT NULL,
    job_ids bigint[] DEFAULT NULL,
    also_running boolean DEFAULT false
)
    RETURNS SETOF procrastinate_stalled._judged_job
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
    SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    by_rules CONSTANT boolean := _judge.seconds_since_heartbeat IS NULL AND _judge.nb_seconds IS NULL;
    -- A time in the future, of a clock that was wrong, tells nothing.
    available_since CONSTANT timestamp with time zone := (
        SELECT at FROM procrastinate_stalled._available_since() AS at WHERE at <= clock_timestamp()
    );
    latest_heartbeat CONSTANT timestamp with time zone := (
        SELECT max(last_heartbeat) FROM procrastinate_workers WHERE last_heartbeat <= clock_timestamp()
    );
    -- Between the migrations 3.1 pre and post there are workers of Procrastinate 3.0: they have no row, and their jobs
    -- look like orphans.
    has_nameless_workers CONSTANT boolean := to_regproc('procrastinate_fetch_job_v1') IS NOT NULL;
    grace interval;
    demands_live_worker boolean;
BEGIN
    SELECT outage_grace, require_live_worker
        INTO grace, demands_live_worker
        FROM procrastinate_stalled.settings;

    RETURN QUERY
    WITH silence AS MATERIALIZED (
        -- Workers that were all silent, as of a frozen host or a cut network, come back one after another. So it counts
        -- when a sweep last saw nobody alive. A worker that is new since tells nothing of the others; and when it
        -- starts, it prunes them.
        SELECT rule.name AS rule_name, sweep.started_at AS nobody_until, sweep.latest_heartbeat AS nobody_since
            FROM procrastinate_stalled.rules AS rule
            CROSS JOIN LATERAL (
                SELECT *
                    FROM procrastinate_stalled.sweeps AS sweep
                    WHERE sweep.started_at >= now() - rule.heartbeat_timeout
                        AND coalesce(sweep.latest_heartbeat < sweep.started_at - rule.heartbeat_timeout / 2, true)
                    ORDER BY sweep.started_at DESC
                    LIMIT 1
            ) AS sweep
            WHERE by_rules
                AND demands_live_worker IS NOT FALSE
                AND sweep.newest_worker_id >= (SELECT max(id) FROM procrastinate_workers)
    ), running AS (
        SELECT job.*,
               worker.last_heartbeat,
               orphan.seen_at,
               event.started_at,
               event.deferred_at,
               rule.name AS next_rule_name,
               rule.action AS rule_action,
               CASE WHEN rule.action <> 'ignore' THEN rule.heartbeat_timeout END AS heartbeat_timeout,
               CASE WHEN rule.action <> 'ignore' THEN rule.run_timeout END AS run_timeout,
               rule.max_rescues,
               rule.retry_delay,
               rule.retry_backoff,
               rule.retry_queue_name,
               rule.retry_priority,
               rule.on_duplicate,
               pause.name AS pause_name,
               pause.expires_at AS pause_ends_at,
               pause.note AS pause_note,
               silence.nobody_until,
               silence.nobody_since
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
            -- The first rule that is no pause, and the first pause before it.
            LEFT JOIN LATERAL (
                SELECT *
                    FROM procrastinate_stalled.rules AS rule
                    WHERE rule.enabled
                        AND (rule.expires_at IS NULL OR (rule.expires_at > now() AND rule.action <> 'ignore'))
                        AND (rule.queue_name IS NULL OR job.queue_name = rule.queue_name)
                        AND (rule.task_name IS NULL OR job.task_name LIKE rule.task_name)
                        AND (rule.args IS NULL OR job.args @> rule.args)
                    ORDER BY rule.position, rule.name
                    LIMIT 1
            ) AS rule ON true
            LEFT JOIN LATERAL (
                SELECT *
                    FROM procrastinate_stalled.rules AS pause
                    WHERE pause.enabled
                        AND pause.expires_at > now()
                        AND pause.action = 'ignore'
                        AND (pause.queue_name IS NULL OR job.queue_name = pause.queue_name)
                        AND (pause.task_name IS NULL OR job.task_name LIKE pause.task_name)
                        AND (pause.args IS NULL OR job.args @> pause.args)
                        AND (rule.name IS NULL OR (pause.position, pause.name) < (rule.position, rule.name))
                    ORDER BY pause.position, pause.name
                    LIMIT 1
            ) AS pause ON true
            LEFT JOIN silence ON silence.rule_name = rule.name
            WHERE (_judge.queue IS NULL OR job.queue_name = _judge.queue)
                AND (_judge.task_name IS NULL OR job.task_name = _judge.task_name)
    ), heard AS (
        SELECT running.*,
               -- A sum with a time in the far future may be out of range; and an infinite time has no words.
               CASE WHEN started_at < now() + interval '1 year' THEN greatest(started_at, 'epoch') END AS ran_since,
               CASE
                   WHEN worker_id IS NULL THEN coalesce(seen_at, now())
                   WHEN last_heartbeat < now() + interval '1 year' THEN greatest(last_heartbeat, 'epoch')
               END AS silent_since,
               -- Not heard of since an outage: the fetch of the job tells it of a worker whose row is gone.
               CASE
                   WHEN worker_id IS NOT NULL THEN last_heartbeat < available_since
                   ELSE coalesce(started_at < available_since, true)
               END AS lost_in_outage
            FROM running
    ), dated AS (
        SELECT heard.*,
               CASE WHEN lost_in_outage THEN available_since + greatest(heartbeat_timeout, grace) END AS forgiven_until,
               CASE
                   WHEN by_rules THEN ran_since + run_timeout
                   ELSE ran_since + _judge.nb_seconds
               END AS run_ends_at,
               demands_live_worker IS NOT FALSE
                   AND coalesce(latest_heartbeat < now() - heartbeat_timeout / 2, true) AS nobody_is_alive
            FROM heard
    ), silent AS (
        SELECT dated.*,
               CASE
                   WHEN by_rules THEN
                       CASE WHEN heartbeat_timeout IS NOT NULL AND (worker_id IS NOT NULL OR NOT has_nameless_workers) THEN greatest(
                           silent_since + heartbeat_timeout,
                           forgiven_until,
                           -- Not for who was overdue before all fell silent.
                           CASE
                               WHEN NOT nobody_is_alive
                                   AND silent_since < nobody_until
                                   AND silent_since + heartbeat_timeout > coalesce(nobody_since, '-infinity')
                                   THEN nobody_until + heartbeat_timeout
                           END
                       ) END
                   WHEN _judge.nb_seconds IS NULL THEN
                       CASE WHEN worker_id IS NULL THEN '-infinity' ELSE silent_since END + _judge.seconds_since_heartbeat
               END AS silent_at
            FROM dated
    ), reasoned AS (
        SELECT silent.*,
               CASE
                   -- A run timeout is acted upon all the same when nobody is alive.
                   WHEN run_ends_at <= silent_at OR silent_at IS NULL OR (nobody_is_alive AND run_ends_at <= now())
                       THEN 'run_timeout'
                   WHEN worker_id IS NULL THEN 'orphaned'
                   ELSE 'heartbeat'
               END AS reason
            FROM silent
    ), found AS (
        SELECT reasoned.*,
               CASE reason WHEN 'run_timeout' THEN run_ends_at ELSE silent_at END AS stalled_at
            FROM reasoned
    ), judged AS (
        SELECT found.*,
               CASE
                   WHEN coalesce(rule_action, 'ignore') = 'ignore' OR (pause_name IS NOT NULL AND NOT by_rules) THEN 'ignored'
                   WHEN (stalled_at <= now()) IS NOT TRUE THEN 'running'
                   WHEN pause_name IS NOT NULL THEN 'held'
                   WHEN by_rules AND nobody_is_alive AND reason <> 'run_timeout' THEN 'held'
                   ELSE 'stalled'
               END AS verdict
            FROM found
            -- JobManager.get_stalled_jobs compares with "<".
            WHERE by_rules OR stalled_at < now()
    ), chosen AS (
        SELECT *
            FROM judged
            WHERE NOT by_rules OR verdict IN ('stalled', 'held') OR _judge.also_running
            -- A fence: what is above is not computed again for each mention below.
            OFFSET 0
    ), numbered AS (
        SELECT chosen.*,
               earlier.rescues,
               waiting.id AS waiting_id,
               waiting.lock = chosen.lock AS waits_for_this_one,
               NOT chosen.abort_requested
                   AND verdict <> 'ignored'
                   AND rule_action = 'retry'
                   AND (max_rescues IS NULL OR earlier.rescues < max_rescues) AS may_be_retried
            FROM chosen
            CROSS JOIN LATERAL (
                -- An older row is of another job, which had this id before Procrastinate's tables were made anew.
                SELECT count(*) AS rescues
                    FROM procrastinate_stalled.rescues AS rescue
                    WHERE rescue.job_id = chosen.id
                        AND (deferred_at IS NULL OR rescue.rescued_at >= deferred_at)
                        AND rescue.action = 'retried'
                        AND rescue.reason <> 'manual'
            ) AS earlier
            LEFT JOIN LATERAL procrastinate_stalled._waiting_job(chosen.queueing_lock) AS waiting ON true
    ), planned AS (
        SELECT numbered.*,
               CASE WHEN may_be_retried AND queueing_lock IS NOT NULL THEN coalesce(
                   waiting_id,
                   -- Of several stalled jobs with one queueing lock the first takes the place in todo.
                   nullif(
                       first_value(CASE WHEN verdict <> 'running' THEN id END) OVER (
                           PARTITION BY queueing_lock, may_be_retried
                           ORDER BY array_position(ARRAY['stalled', 'held', 'running'], verdict), id
                       ),
                       id
                   )
               ) END AS duplicate_of
            FROM numbered
    ), decided AS (
        SELECT planned.*,
               CASE
                   WHEN verdict = 'ignored' THEN 'ignore'
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
           coalesce(pause_name, next_rule_name),
           CASE WHEN stalled_at IS NOT NULL THEN reason END,
           nullif(stalled_at, '-infinity'),
           action,
           CASE
               WHEN coalesce(pause_name, next_rule_name) IS NULL THEN 'no rule'
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
           CASE WHEN action = 'retry' THEN retry_priority END,
           verdict,
           seen_at,
           available_since,
           forgiven_until,
           run_ends_at,
           heartbeat_timeout,
           run_timeout,
           nobody_is_alive,
           nobody_until,
           waiting_id,
           rescues,
           pause_name,
           pause_ends_at,
           pause_note,
           next_rule_name
        FROM decided
        ORDER BY id;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._judge(text, text, interval, interval, bigint[], boolean) IS
    'The judgement of the jobs in doing: those that are stalled or held, why, and what a sweep would do with each once it is not held. Without intervals by the rules and the evidence; with one, the rows of JobManager.get_stalled_jobs, of which the rules still choose the action. With job_ids only those of them, without their args. also_running: the other jobs in doing too.';


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
    PERFORM procrastinate_stalled._require_procrastinate();
    RETURN QUERY
        SELECT judged.id,
               judged.queue_name,
               judged.task_name,
               judged.priority,
               judged.lock,
               judged.queueing_lock,
               judged.args,
               judged.status,
               judged.scheduled_at,
               judged.attempts,
               judged.abort_requested,
               judged.worker_id,
               judged.last_heartbeat,
               judged.started_at,
               judged.rule_name,
               judged.reason,
               judged.stalled_at,
               CASE judged.verdict WHEN 'held' THEN 'hold' ELSE judged.action END,
               CASE judged.verdict WHEN 'held' THEN 'no living worker' ELSE judged.detail END,
               judged.duplicate_of,
               judged.retry_at,
               judged.retry_queue_name,
               judged.retry_priority
            FROM procrastinate_stalled._judge(
                queue,
                task_name,
                procrastinate_stalled._seconds('seconds_since_heartbeat', seconds_since_heartbeat),
                procrastinate_stalled._seconds('nb_seconds', nb_seconds)
            ) AS judged
            -- The rule of a paused job says that it is ignored.
            WHERE judged.verdict <> 'held' OR judged.pause_name IS NULL;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.get_stalled_jobs(text, text, double precision, double precision) IS
$$The stalled jobs, with the evidence and what a sweep would do. Writes nothing.

Arguments, all optional:
  queue                    only jobs of this queue: others are not looked at, not as duplicates either
  task_name                only jobs of this task (equal, not a pattern)
  seconds_since_heartbeat  instead of the rules' timeouts: jobs whose worker has been silent for longer, and orphans
  nb_seconds               instead of all that: jobs that started longer ago, whatever their worker says
Returns one row of stalled_job per job, by id. Without seconds, what the rules call stalled now; with seconds, exactly
the jobs of Procrastinate's JobManager.get_stalled_jobs with the same argument (nb_seconds wins over
seconds_since_heartbeat there too), without regard to outages and to whether any worker is alive.
Errors: invalid_parameter_value, when seconds are zero, negative, NaN or above 100 years.$$;
