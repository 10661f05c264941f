-- What the judgement is, for people: a sentence about each job in doing, and the workers. Nothing in this file writes
-- or locks.

CREATE OR REPLACE FUNCTION procrastinate_stalled._in_words(
    duration interval
)
    RETURNS text
    LANGUAGE plpgsql
    IMMUTABLE
    STRICT
    SET search_path FROM CURRENT
AS $$
DECLARE
    seconds CONSTANT bigint := greatest(trunc(extract(epoch FROM duration)), 0)::bigint;
    units CONSTANT text[] := ARRAY['d', 'h', 'min', 's'];
    numbers CONSTANT bigint[] := ARRAY[seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60];
BEGIN
    IF seconds < 10 THEN
        RETURN round(greatest(extract(epoch FROM duration), 0), CASE WHEN duration < '0.1 s' THEN 3 ELSE 1 END)::real || ' s';
    END IF;
    FOR i IN 1..3 LOOP
        IF numbers[i] > 0 THEN
            RETURN concat_ws(' ', numbers[i], units[i], nullif(numbers[i + 1], 0), CASE WHEN numbers[i + 1] > 0 THEN units[i + 1] END);
        END IF;
    END LOOP;
    RETURN seconds || ' s';
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._in_words(interval) IS
    'A duration with its two largest units, such as 3 min 12 s.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._in_words(
    at timestamp with time zone
)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    STRICT
    SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN coalesce(to_char(at, CASE WHEN at::date = now()::date THEN 'HH24:MI:SS' ELSE 'YYYY-MM-DD HH24:MI:SS' END), at::text);
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._in_words(timestamp with time zone) IS
    'A time of day in the TimeZone of the session, with the date if that is not today.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._sentence(
    judged procrastinate_stalled._judged_job
)
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
DECLARE
    rule_name CONSTANT text := 'rule ' || CASE
        WHEN judged.next_rule_name ~ '^[[:alnum:]_-]+$' THEN judged.next_rule_name
        ELSE format('"%s"', judged.next_rule_name)
    END;
    pause CONSTANT text := CASE WHEN judged.pause_name IS NOT NULL THEN format(
        '"%s"%s holds it back until %s',
        judged.pause_name, ' (' || judged.pause_note || ')', procrastinate_stalled._in_words(judged.pause_ends_at)
    ) END;
    evidence text;
    patience text;
    prospect text;
    consequence text;
BEGIN
    evidence := CASE
        WHEN judged.reason IS NULL AND judged.worker_id IS NULL AND to_regproc('procrastinate_fetch_job_v1') IS NOT NULL THEN
            'it names no worker, and those of Procrastinate 3.0, which never do, may still run (procrastinate_fetch_job_v1 is there until the migration 3.1 post)'
        WHEN judged.reason = 'run_timeout' THEN
            format('it has run for %s', procrastinate_stalled._in_words(now() - greatest(judged.started_at, 'epoch')))
        WHEN judged.worker_id IS NULL AND judged.seen_at IS NULL THEN
            'the row of its worker is gone, which the next sweep will note'
        WHEN judged.worker_id IS NULL THEN
            format('the row of its worker is gone, as a sweep saw first at %s', procrastinate_stalled._in_words(judged.seen_at))
        WHEN judged.last_heartbeat = '-infinity' THEN
            format('worker %s was never heard', judged.worker_id)
        WHEN judged.last_heartbeat > clock_timestamp() THEN
            format(
                'the last heartbeat of worker %s lies in the future (%s), because a clock was wrong',
                judged.worker_id, procrastinate_stalled._in_words(judged.last_heartbeat)
            )
        ELSE
            format('worker %s was last heard %s ago', judged.worker_id, procrastinate_stalled._in_words(now() - judged.last_heartbeat))
    END;

    IF judged.verdict = 'ignored' THEN
        RETURN concat_ws('; ', evidence, CASE
            WHEN judged.pause_name IS NOT NULL AND judged.next_rule_name IS NULL
                THEN format('"%s" ignores it, and no other rule matches it: nothing is ever done to it', judged.pause_name)
            WHEN judged.next_rule_name IS NULL THEN 'no rule matches it: nothing is ever done to it'
            ELSE format('%s ignores it: nothing is ever done to it', rule_name)
        END);
    END IF;

    patience := CASE
        WHEN judged.reason = 'run_timeout' THEN
            format('%s allows %s', rule_name, procrastinate_stalled._in_words(judged.run_timeout))
        WHEN judged.reason IS NULL THEN
            format('%s sets no %slimit', rule_name, CASE WHEN judged.heartbeat_timeout IS NOT NULL THEN 'other ' ELSE '' END)
        WHEN judged.stalled_at = judged.forgiven_until THEN
            format(
                '%sthe server became available at %s; %s waits %s from then%s',
                CASE WHEN judged.worker_id IS NULL THEN 'it was started before ' WHEN isfinite(judged.last_heartbeat) THEN 'that was before ' END,
                procrastinate_stalled._in_words(judged.available_since),
                rule_name,
                procrastinate_stalled._in_words(judged.forgiven_until - judged.available_since),
                CASE WHEN judged.forgiven_until > judged.available_since + judged.heartbeat_timeout THEN ' (settings.outage_grace)' END
            )
        WHEN judged.stalled_at = judged.nobody_until + judged.heartbeat_timeout THEN
            format(
                'no worker at all was heard until %s; %s waits %s from then',
                procrastinate_stalled._in_words(judged.nobody_until), rule_name,
                procrastinate_stalled._in_words(judged.heartbeat_timeout)
            )
        ELSE
            format('%s waits %s', rule_name, procrastinate_stalled._in_words(judged.heartbeat_timeout))
    END;

    consequence := CASE judged.action
        WHEN 'abort' THEN 'aborts it, as requested'
        WHEN 'wait' THEN format('lets it wait for job %s, which has the same queueing lock', judged.duplicate_of)
        WHEN 'retry' THEN 'puts it back to todo'
            || coalesce(', to start ' || procrastinate_stalled._in_words(judged.retry_at - now()) || ' later', '')
        ELSE 'fails it, because ' || CASE
            WHEN judged.duplicate_of IS NOT NULL
                THEN format('job %s has the same queueing lock and does the same work', judged.duplicate_of)
            WHEN judged.detail = 'max_rescues' AND judged.rescues = 0 THEN 'its rule allows no retry (max_rescues)'
            WHEN judged.detail = 'max_rescues'
                THEN format('it was retried %s already (max_rescues)', CASE judged.rescues WHEN 1 THEN 'once' ELSE judged.rescues || ' times' END)
            ELSE 'the rule says so'
        END
    END;

    prospect := CASE judged.verdict
        WHEN 'running' THEN concat_ws('; ',
            CASE
                WHEN judged.stalled_at IS NULL THEN 'it counts as running until it ends'
                WHEN judged.reason = 'heartbeat' THEN format('stalled at %s unless it beats again', procrastinate_stalled._in_words(judged.stalled_at))
                ELSE format('stalled at %s unless it ends before', procrastinate_stalled._in_words(judged.stalled_at))
            END,
            CASE WHEN judged.nobody_is_alive AND judged.stalled_at IS NOT NULL AND judged.reason <> 'run_timeout' THEN
                'held then while no worker at all is heard'
            END,
            CASE WHEN judged.stalled_at IS NOT NULL AND judged.action <> 'retry' THEN format('a sweep then %s', consequence) END,
            pause
        )
        WHEN 'held' THEN concat_ws('; ',
            format('stalled since %s', procrastinate_stalled._in_words(judged.stalled_at)),
            coalesce(
                pause,
                format(
                    'held, because no worker at all was heard in the last %s, and none could run it (settings.require_live_worker)',
                    procrastinate_stalled._in_words(judged.heartbeat_timeout / 2)
                )
            ),
            CASE
                WHEN pause IS NULL THEN format(
                    'once a new worker has started, the next sweep %s; if an old one is heard again, %s later',
                    consequence, procrastinate_stalled._in_words(judged.heartbeat_timeout)
                )
                ELSE format('the first sweep after that %s', consequence)
            END,
            CASE WHEN judged.pause_name IS NULL AND judged.run_ends_at IS NOT NULL THEN
                format('its run timeout counts in any case, at %s', procrastinate_stalled._in_words(judged.run_ends_at))
            END
        )
        ELSE
            format('stalled since %s; the next sweep %s', procrastinate_stalled._in_words(judged.stalled_at), consequence)
    END;

    RETURN concat_ws('; ', evidence, patience, prospect);
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._sentence(procrastinate_stalled._judged_job) IS
    'The judgement of a job in words: the evidence, the patience of its rule, what will be done.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._explained(
    judged procrastinate_stalled._judged_job
)
    RETURNS procrastinate_stalled.explained_job
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN ROW(
        judged.id,
        judged.queue_name,
        judged.task_name,
        judged.status,
        judged.attempts,
        judged.worker_id,
        judged.last_heartbeat,
        judged.seen_at,
        judged.started_at,
        judged.available_since,
        judged.rule_name,
        judged.verdict,
        judged.reason,
        judged.stalled_at,
        judged.action,
        judged.detail,
        procrastinate_stalled._sentence(judged)
    );
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._explained(procrastinate_stalled._judged_job) IS
    'The judgement of a job as explain_job() returns it.';


CREATE OR REPLACE FUNCTION procrastinate_stalled.explain_jobs(
    queue text DEFAULT NULL,
    task_name text DEFAULT NULL
)
    RETURNS SETOF procrastinate_stalled.explained_job
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    PERFORM procrastinate_stalled._require_procrastinate();
    RETURN QUERY
        SELECT explained.*
            -- The others are judged too, because one of them may have the same queueing lock.
            FROM procrastinate_stalled._judge(also_running => true) AS judged
            CROSS JOIN LATERAL procrastinate_stalled._explained(judged) AS explained
            WHERE (explain_jobs.queue IS NULL OR judged.queue_name = explain_jobs.queue)
                AND (explain_jobs.task_name IS NULL OR judged.task_name = explain_jobs.task_name)
            ORDER BY judged.stalled_at, judged.id;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.explain_jobs(text, text) IS
$$The jobs in doing, stalled or not: when each counts as stalled, by which rule and evidence, and what a sweep does then.
Writes nothing.

Arguments, all optional:
  queue      only jobs of this queue
  task_name  only jobs of this task (equal, not a pattern)
Returns one row of explained_job per job, the earliest stalled_at first.$$;


CREATE OR REPLACE FUNCTION procrastinate_stalled.explain_job(
    job_id bigint
)
    RETURNS procrastinate_stalled.explained_job
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
#variable_conflict use_column
DECLARE
    explained procrastinate_stalled.explained_job;
    explained_queueing_lock text;
    waiting record;
    doing_ids bigint[];
BEGIN
    IF explain_job.job_id IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'job_id must not be NULL',
            DETAIL = 'It says which job to explain.',
            HINT = 'All jobs in doing: SELECT * FROM procrastinate_stalled.explain_jobs();';
    END IF;

    PERFORM procrastinate_stalled._require_procrastinate();
    SELECT job.id, job.queue_name::text, job.task_name::text, job.status::text, job.attempts, job.queueing_lock
        INTO explained.job_id, explained.queue_name, explained.task_name, explained.status, explained.attempts, explained_queueing_lock
        FROM procrastinate_jobs AS job
        WHERE job.id = explain_job.job_id;

    IF explained.status = 'doing' THEN
        doing_ids := CASE
            WHEN explained_queueing_lock IS NULL THEN ARRAY[explain_job.job_id]
            ELSE (procrastinate_stalled._doing_jobs()).ids
        END;
        SELECT (procrastinate_stalled._explained(judged)).*
            INTO explained
            FROM procrastinate_stalled._judge(
                job_ids => ARRAY(
                    SELECT doing.id
                        FROM procrastinate_jobs AS doing
                        WHERE doing.id = ANY (doing_ids)
                            AND (
                                doing.id = explain_job.job_id
                                -- They are judged with it, because one of them may take its place.
                                OR doing.queueing_lock = explained_queueing_lock
                            )
                ),
                also_running => true
            ) AS judged
            WHERE judged.id = explain_job.job_id;
        RETURN explained;
    END IF;

    -- As procrastinate_fetch_job_v2 does it: a job in doing keeps back all that have its lock, and one in todo, due or not,
    -- those that come after it: by priority since 3.3, before only by id. procrastinate_retry_job_v2 came with 3.4.
    SELECT CASE WHEN job.scheduled_at > now() THEN job.scheduled_at END AS scheduled_at,
           (
               SELECT other.id
                   FROM procrastinate_jobs AS other
                   WHERE other.lock = job.lock AND other.status = 'doing'
           ) AS running_id,
           (
               SELECT other.id
                   FROM procrastinate_jobs AS other
                   WHERE other.lock = job.lock
                       AND other.status = 'todo'
                       AND other.priority >= job.priority
                       AND (
                           other.id < job.id
                           OR (other.priority > job.priority AND to_regproc('procrastinate_retry_job_v2') IS NOT NULL)
                       )
                   ORDER BY other.priority DESC, other.id
                   LIMIT 1
           ) AS first_id
        INTO waiting
        FROM procrastinate_jobs AS job
        WHERE job.id = explain_job.job_id AND job.status = 'todo';

    explained.verdict := CASE WHEN explained.job_id IS NULL THEN 'no such job' ELSE 'not doing' END;
    explained.sentence := CASE
        WHEN explained.job_id IS NULL THEN format('there is no job %s: it was deleted, or never existed in this database', job_id)
        WHEN waiting.running_id IS NOT NULL OR waiting.first_id IS NOT NULL OR waiting.scheduled_at IS NOT NULL THEN concat_ws('; ',
            'it waits in todo',
            'it is scheduled for ' || procrastinate_stalled._in_words(waiting.scheduled_at),
            CASE
                WHEN waiting.running_id IS NOT NULL
                    THEN format('job %1$s in doing has its lock: see explain_job(%1$s)', waiting.running_id)
                WHEN waiting.first_id IS NOT NULL
                    THEN format('job %1$s in todo has its lock and comes first: see explain_job(%1$s)', waiting.first_id)
            END
        )
        WHEN explained.status = 'todo' THEN 'it waits in todo for a worker to fetch it: there is nothing to rescue'
        WHEN explained.status IN ('succeeded', 'failed', 'cancelled', 'aborted')
            THEN format('it has ended, its status is %s: there is nothing to rescue', explained.status)
        ELSE format('its status is %s and not doing: there is nothing to rescue', explained.status)
    END;
    explained.job_id := explain_job.job_id;
    RETURN explained;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.explain_job(bigint) IS
$$Whether one job is stalled, by which rule and on what evidence; if it is not yet, when it will be; what a sweep does then;
and all of it in one sentence. Writes nothing.

Argument:
  job_id  procrastinate_jobs.id
Returns one row of explained_job, also for a job that is not in doing or does not exist: see its verdict.
Errors: invalid_parameter_value, when job_id is NULL.$$;


CREATE OR REPLACE FUNCTION procrastinate_stalled.workers()
    RETURNS TABLE (
        worker_id bigint,
        last_heartbeat timestamp with time zone,
        age interval,
        doing bigint,
        state text
    )
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
#variable_conflict use_column
DECLARE
    doing_ids bigint[];
BEGIN
    PERFORM procrastinate_stalled._require_procrastinate();
    doing_ids := (procrastinate_stalled._doing_jobs()).ids;
    RETURN QUERY
        SELECT worker.id,
               worker.last_heartbeat,
               CASE WHEN isfinite(worker.last_heartbeat) THEN now() - worker.last_heartbeat END,
               count(job.id),
               CASE
                   -- In a transaction that has lasted, now() is older than the latest heartbeats.
                   WHEN worker.last_heartbeat BETWEEN now() - interval '30 seconds' AND clock_timestamp() THEN 'alive'
                   ELSE 'silent'
               END
            FROM procrastinate_workers AS worker
            LEFT JOIN (
                SELECT id, worker_id
                    FROM procrastinate_jobs
                    WHERE id = ANY (doing_ids)
            ) AS job ON job.worker_id = worker.id
            GROUP BY worker.id
            ORDER BY worker.id;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.workers() IS
$$The workers that Procrastinate knows. A worker whose row is gone may still live: any worker that starts deletes the rows
of those that have been silent for 30 seconds (prune_stalled_workers). Writes nothing.

Returns, by worker_id:
  worker_id       procrastinate_workers.id
  last_heartbeat  by default a worker beats every 10 seconds
  age             how long ago that was; NULL, if the time is infinite
  doing           its jobs in doing
  state           alive, or silent: not heard of for 30 seconds, Procrastinate's default stalled_worker_timeout$$;
