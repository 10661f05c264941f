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


CREATE OR REPLACE FUNCTION procrastinate_stalled._snapshot_is_held()
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN EXISTS (
        SELECT
            FROM pg_stat_activity
            WHERE backend_xmin IS NOT NULL AND xact_start < now() - interval '10 seconds'
    );
EXCEPTION WHEN insufficient_privilege THEN
    -- Some take the whole view away from PUBLIC.
    RETURN false;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._snapshot_is_held() IS
    'Whether a session has held a snapshot for 10 seconds. Of other roles'' sessions only members of pg_read_all_stats can see it.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._silent_since(
    seconds_since_heartbeat interval,
    nb_seconds interval
)
    RETURNS timestamp with time zone
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    IF nb_seconds IS NOT NULL THEN
        RETURN NULL;
    END IF;
    -- A tenth less: a month or a day may be shorter, added to a heartbeat, than subtracted from now.
    RETURN now() - 0.9 * coalesce(seconds_since_heartbeat, (
        SELECT min(heartbeat_timeout)
            FROM procrastinate_stalled.rules
            WHERE enabled AND action <> 'ignore' AND (expires_at IS NULL OR expires_at > now())
    ));
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._silent_since(interval, interval) IS
    'Only a worker that was last heard of then or earlier may count as silent, by the most impatient rule or by the seconds asked for. NULL: none may.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._doing_jobs(
    queue text DEFAULT NULL,
    task_name text DEFAULT NULL,
    seconds_since_heartbeat interval DEFAULT NULL,
    nb_seconds interval DEFAULT NULL,
    OUT ids bigint[],
    OUT orphan_ids bigint[],
    OUT suspect_ids bigint[]
)
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
    -- A plain scan of the partial index procrastinate_jobs_lock_idx_v1 marks its dead entries as it passes them; a
    -- bitmap scan reads them all again each time, until the next vacuum. The planner counts a scan that is off but
    -- has no alternative as immensely dear, which would start the JIT compiler: 0.3 s a query.
    SET enable_bitmapscan = off
    SET enable_indexscan = on
    SET enable_seqscan = off
    SET jit = off
    SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
DECLARE
    by_rules CONSTANT boolean := _doing_jobs.seconds_since_heartbeat IS NULL AND _doing_jobs.nb_seconds IS NULL;
    silent_since CONSTANT timestamp with time zone := procrastinate_stalled._silent_since(
        _doing_jobs.seconds_since_heartbeat, _doing_jobs.nb_seconds
    );
    runs_are_limited CONSTANT boolean := _doing_jobs.nb_seconds IS NOT NULL OR (by_rules AND EXISTS (
        SELECT
            FROM procrastinate_stalled.rules
            WHERE enabled AND action <> 'ignore' AND run_timeout IS NOT NULL AND (expires_at IS NULL OR expires_at > now())
    ));
BEGIN
    -- What died since cannot be marked then. A bitmap scan reads the table in its own order, a plain scan in that of the
    -- locks, which takes ten times as long.
    IF procrastinate_stalled._snapshot_is_held() THEN
        PERFORM set_config('enable_bitmapscan', 'on', true), set_config('enable_indexscan', 'off', true);
    END IF;

    SELECT coalesce(array_agg(id) FILTER (WHERE is_asked_for), '{}'),
           coalesce(array_agg(id) FILTER (WHERE is_orphan), '{}'),
           coalesce(array_agg(id) FILTER (WHERE is_asked_for AND is_suspect), '{}')
        INTO ids, orphan_ids, suspect_ids
        FROM (
            SELECT job.id,
                   job.worker_id IS NULL AS is_orphan,
                   (_doing_jobs.queue IS NULL OR job.queue_name = _doing_jobs.queue)
                       AND (_doing_jobs.task_name IS NULL OR job.task_name = _doing_jobs.task_name) AS is_asked_for,
                   job.worker_id IS NULL
                       OR job.worker_id IN (
                           SELECT worker.id
                               FROM procrastinate_workers AS worker
                               WHERE worker.last_heartbeat <= silent_since
                       )
                       OR (runs_are_limited AND (NOT by_rules OR EXISTS (
                           SELECT
                               FROM procrastinate_stalled.rules AS rule
                               WHERE rule.enabled
                                   AND rule.run_timeout IS NOT NULL
                                   AND (rule.queue_name IS NULL OR job.queue_name = rule.queue_name)
                                   AND (rule.task_name IS NULL OR job.task_name LIKE rule.task_name)
                                   AND (rule.args IS NULL OR job.args @> rule.args)
                       ))) AS is_suspect
                FROM procrastinate_jobs AS job
                WHERE job.status = 'doing'
                ORDER BY job.id
        ) AS job;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._doing_jobs(text, text, interval, interval) IS
    'The ids of the jobs in doing; of all those without a worker, whatever their queue and task; and of those that may be stalled: not if their worker was heard of lately and no rule limits their run. The one place that reads all jobs in doing.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._waiting_job(
    queueing_lock text
)
    RETURNS bigint
    LANGUAGE plpgsql
    STABLE
    STRICT
    SET search_path FROM CURRENT
    -- Left to itself, a planner that believes that few jobs are in todo reads all of them through another partial index.
    -- Without a sort, only procrastinate_jobs_queueing_lock_idx_v1 gives this order.
    SET enable_sort = off
    SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN (
        SELECT job.id
            FROM procrastinate_jobs AS job
            WHERE job.queueing_lock BETWEEN _waiting_job.queueing_lock AND _waiting_job.queueing_lock
                AND job.status = 'todo'
            ORDER BY job.queueing_lock
    );
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._waiting_job(text) IS
    'The id of the job in todo that has the queueing lock, or NULL: there is never more than one.';


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
    -- Planned once, for few jobs: by their ids, never by a scan of all jobs that there are.
    SET plan_cache_mode = force_generic_plan
    SET join_collapse_limit = 1
    SET enable_seqscan = off
    SET enable_bitmapscan = off
    SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    by_rules CONSTANT boolean := _judge.seconds_since_heartbeat IS NULL AND _judge.nb_seconds IS NULL;
    -- A time in the future, of a clock that was wrong, tells nothing.
    available_since CONSTANT timestamp with time zone := (
        SELECT at FROM procrastinate_stalled._available_since() AS at WHERE at <= clock_timestamp()
    );
    last_sign_of_life CONSTANT timestamp with time zone := (
        SELECT max(last_heartbeat) FROM procrastinate_workers WHERE last_heartbeat <= clock_timestamp()
    );
    -- Between the migrations 3.1 pre and post there are workers of Procrastinate 3.0: they have no row, and their jobs
    -- look like orphans.
    has_nameless_workers CONSTANT boolean := to_regproc('procrastinate_fetch_job_v1') IS NOT NULL;
    far_future CONSTANT timestamp with time zone := now() + interval '1 year';
    ids bigint[] := _judge.job_ids;
    grace CONSTANT interval := (SELECT outage_grace FROM procrastinate_stalled.settings);
    demands_live_worker CONSTANT boolean := coalesce((SELECT require_live_worker FROM procrastinate_stalled.settings), true);
BEGIN
    IF ids IS NULL THEN
        SELECT CASE WHEN _judge.also_running THEN doing.ids ELSE doing.suspect_ids END
            INTO ids
            FROM procrastinate_stalled._doing_jobs(_judge.queue, _judge.task_name, _judge.seconds_since_heartbeat, _judge.nb_seconds) AS doing;
    END IF;

    RETURN QUERY
    WITH rule AS MATERIALIZED (
        -- First what each job is compared with: the columns before it in a row are read too.
        SELECT rule.queue_name,
               rule.task_name,
               rule.args,
               rule.action = 'ignore' AND rule.expires_at IS NOT NULL AS is_pause,
               row_number() OVER (ORDER BY rule.position, rule.name) AS number,
               rule.name,
               rule.action,
               CASE WHEN rule.action <> 'ignore' THEN rule.heartbeat_timeout END AS heartbeat_timeout,
               CASE WHEN rule.action <> 'ignore' THEN rule.run_timeout END AS run_timeout,
               rule.max_rescues,
               rule.retry_delay,
               rule.retry_backoff,
               rule.retry_queue_name,
               rule.retry_priority,
               rule.on_duplicate,
               rule.expires_at,
               rule.note,
               available_since + greatest(rule.heartbeat_timeout, grace) AS forgiven_until,
               demands_live_worker AND coalesce(last_sign_of_life < now() - rule.heartbeat_timeout / 2, true) AS nobody_is_alive,
               silence.latest_heartbeat AS nobody_since,
               silence.started_at AS nobody_at,
               silence.next_started_at AS nobody_until
            FROM procrastinate_stalled.rules AS rule
            LEFT JOIN LATERAL (
                -- Workers that were all silent, as of a frozen host or a cut network, come back one after another. So it
                -- counts which sweep last saw nobody alive, and when the next one saw somebody.
                SELECT sweep.latest_heartbeat,
                       sweep.newest_worker_id,
                       sweep.started_at,
                       coalesce((
                           SELECT min(later.started_at)
                               FROM procrastinate_stalled.sweeps AS later
                               WHERE later.started_at > sweep.started_at AND later.started_at <= clock_timestamp()
                       ), now()) AS next_started_at
                    FROM procrastinate_stalled.sweeps AS sweep
                    WHERE by_rules
                        AND demands_live_worker
                        -- The last one before that too, for sweeps may be rare.
                        AND sweep.started_at >= coalesce((
                            SELECT max(earlier.started_at)
                                FROM procrastinate_stalled.sweeps AS earlier
                                WHERE earlier.started_at < now() - rule.heartbeat_timeout
                        ), '-infinity')
                        AND sweep.started_at <= clock_timestamp() -- of a clock that was wrong
                        AND coalesce(sweep.latest_heartbeat < sweep.started_at - rule.heartbeat_timeout / 2, true)
                    ORDER BY sweep.started_at DESC
                    LIMIT 1
            -- A worker that is new since tells nothing of the others; and when it starts, it prunes them.
            ) AS silence ON silence.newest_worker_id >= (SELECT max(id) FROM procrastinate_workers)
            WHERE rule.enabled AND (rule.expires_at IS NULL OR rule.expires_at > now())
            ORDER BY number -- in which they are read below
    ), pause AS MATERIALIZED (
        SELECT * FROM rule WHERE is_pause ORDER BY number
    ), running AS (
        SELECT job.id,
               job.queue_name::text AS queue_name,
               job.task_name::text AS task_name,
               job.priority,
               job.lock,
               job.queueing_lock,
               -- Who names the jobs keeps the rows in memory, does not need the args, and each may have megabytes of them.
               CASE WHEN _judge.job_ids IS NULL THEN job.args END AS args,
               job.scheduled_at,
               job.attempts,
               job.abort_requested,
               job.worker_id,
               worker.last_heartbeat,
               CASE WHEN job.worker_id IS NULL THEN (
                   SELECT orphan.seen_at
                       FROM procrastinate_stalled.orphans AS orphan
                       WHERE orphan.job_id = job.id AND orphan.attempts = job.attempts
               ) END AS seen_at,
               (
                   SELECT max(event.at)
                       FROM procrastinate_events AS event
                       WHERE event.job_id = job.id AND event.type = 'started'
               ) AS started_at,
               rule.name AS next_rule_name,
               rule.action AS rule_action,
               rule.heartbeat_timeout,
               rule.run_timeout,
               rule.max_rescues,
               rule.retry_delay,
               rule.retry_backoff,
               rule.retry_queue_name,
               rule.retry_priority,
               rule.on_duplicate,
               rule.forgiven_until AS survivors_forgiven_until,
               coalesce(rule.nobody_is_alive, demands_live_worker) AS nobody_is_alive,
               rule.nobody_since,
               rule.nobody_at,
               rule.nobody_until,
               pause.name AS pause_name,
               pause.expires_at AS pause_ends_at,
               pause.note AS pause_note
            FROM procrastinate_jobs AS job
            LEFT JOIN procrastinate_workers AS worker ON worker.id = job.worker_id
            -- The first rule that is no pause, and the first pause if it comes before.
            LEFT JOIN LATERAL (
                SELECT *
                    FROM rule
                    WHERE NOT rule.is_pause
                        AND (rule.queue_name IS NULL OR job.queue_name = rule.queue_name)
                        AND (rule.task_name IS NULL OR job.task_name LIKE rule.task_name)
                        AND (rule.args IS NULL OR job.args @> rule.args)
                    LIMIT 1
            ) AS rule ON true
            LEFT JOIN LATERAL (
                SELECT pause.name, pause.expires_at, pause.note
                    FROM pause
                    WHERE (rule.number IS NULL OR pause.number < rule.number)
                        AND (pause.queue_name IS NULL OR job.queue_name = pause.queue_name)
                        AND (pause.task_name IS NULL OR job.task_name LIKE pause.task_name)
                        AND (pause.args IS NULL OR job.args @> pause.args)
                    LIMIT 1
            ) AS pause ON true
            WHERE job.id = ANY (ids)
                -- In the form of a range, which fits no partial index, so that the primary key is taken.
                AND job.status BETWEEN 'doing' AND 'doing'
                AND (_judge.queue IS NULL OR job.queue_name = _judge.queue)
                AND (_judge.task_name IS NULL OR job.task_name = _judge.task_name)
            -- A fence, as those below: what is above it is not computed again for each mention below.
            OFFSET 0
    ), heard AS (
        SELECT running.*,
               -- A sum with a time in the far future may be out of range; and an infinite time has no words.
               CASE WHEN started_at < far_future THEN greatest(started_at, 'epoch') END AS ran_since,
               CASE
                   WHEN worker_id IS NULL THEN coalesce(seen_at, now())
                   WHEN last_heartbeat < far_future THEN greatest(last_heartbeat, 'epoch')
               END AS silent_since,
               CASE
                   -- Not heard of since an outage: the fetch of the job tells it of a worker whose row is gone.
                   WHEN CASE
                       WHEN worker_id IS NOT NULL THEN last_heartbeat < available_since
                       ELSE coalesce(started_at < available_since, true)
                   END THEN survivors_forgiven_until
               END AS forgiven_until
            FROM running
    ), dated AS (
        SELECT heard.*,
               CASE
                   WHEN by_rules THEN ran_since + run_timeout
                   ELSE ran_since + _judge.nb_seconds
               END AS run_ends_at
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
                                   AND silent_since < nobody_at
                                   AND silent_since + heartbeat_timeout > coalesce(nobody_since, '-infinity')
                                   THEN nobody_until + heartbeat_timeout
                           END
                       ) END
                   WHEN _judge.nb_seconds IS NULL THEN
                       CASE WHEN worker_id IS NULL THEN '-infinity' ELSE silent_since END + _judge.seconds_since_heartbeat
               END AS silent_at
            FROM dated
            OFFSET 0
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
            OFFSET 0
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
            OFFSET 0
    ), counted AS (
        SELECT chosen.*,
               CASE WHEN attempts > 0 -- each retry has added one
                   THEN (
                       SELECT count(*)
                           FROM (
                               SELECT rescue.rescued_at
                                   FROM procrastinate_stalled.rescues AS rescue
                                   WHERE rescue.job_id = chosen.id
                                       AND rescue.action = 'retried'
                                       AND rescue.reason <> 'manual'
                                   -- A fence: by job_id, never all that were rescued since.
                                   OFFSET 0
                           ) AS rescue
                           -- An older row is of another job, which had this id before Procrastinate's tables were made
                           -- anew.
                           WHERE rescue.rescued_at >= coalesce((
                               SELECT min(event.at)
                                   FROM procrastinate_events AS event
                                   WHERE event.job_id = chosen.id AND event.type = 'deferred'
                           ), '-infinity')
                   )
                   ELSE 0
               END AS rescues,
               CASE WHEN queueing_lock IS NOT NULL THEN procrastinate_stalled._waiting_job(queueing_lock) END AS waiting_id
            FROM chosen
            OFFSET 0
    ), limited AS (
        SELECT counted.*,
               NOT abort_requested
                   AND verdict <> 'ignored'
                   AND rule_action = 'retry'
                   AND (max_rescues IS NULL OR rescues < max_rescues) AS may_be_retried
            FROM counted
    ), ranked AS (
        SELECT limited.*,
               -- Of several stalled jobs with one queueing lock the first takes the place in todo.
               first_value(CASE WHEN may_be_retried AND verdict IN ('stalled', 'held') THEN id END) OVER (
                   PARTITION BY queueing_lock
                   ORDER BY may_be_retried AND verdict IN ('stalled', 'held') DESC, verdict = 'held', id
               ) AS successor_id
            FROM limited
    ), planned AS (
        SELECT ranked.*,
               CASE
                   WHEN may_be_retried AND queueing_lock IS NOT NULL THEN coalesce(waiting_id, nullif(successor_id, id))
               END AS duplicate_of
            FROM ranked
    ), decided AS (
        SELECT planned.*,
               CASE
                   WHEN verdict = 'ignored' THEN 'ignore'
                   WHEN abort_requested THEN 'abort'
                   WHEN NOT may_be_retried THEN 'fail'
                   WHEN duplicate_of IS NULL THEN 'retry'
                   WHEN on_duplicate = 'fail' THEN 'fail'
                   -- It waits for the lock of this one.
                   WHEN lock = (SELECT job.lock FROM procrastinate_jobs AS job WHERE job.id = planned.waiting_id) THEN 'fail'
                   ELSE 'wait'
               END AS action
            FROM planned
            OFFSET 0
    )
    SELECT id,
           queue_name,
           task_name,
           priority,
           lock,
           queueing_lock,
           args,
           'doing',
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
        FROM decided;
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
            WHERE judged.verdict <> 'held' OR judged.pause_name IS NULL
            ORDER BY judged.id;
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
