-- What Procrastinate's events tell of the past: how long runs take, and which rescues were mistakes. Nothing in this file
-- writes or locks.

CREATE OR REPLACE FUNCTION procrastinate_stalled._first_event_since(
    since timestamp with time zone
)
    RETURNS bigint
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
DECLARE
    low bigint;
    high bigint;
    middle bigint;
    probe record;
BEGIN
    -- There is no index on the times. The ids grow with them, so their index is searched by halves.
    SELECT min(id), max(id) + 1
        INTO low, high
        FROM procrastinate_events;
    WHILE low < high LOOP
        middle := low + (high - low) / 2;
        SELECT event.id, event.at
            INTO probe
            FROM procrastinate_events AS event
            -- The time of such an event is that for which the job is scheduled.
            WHERE event.id >= middle AND event.type <> 'scheduled' AND event.at IS NOT NULL
            ORDER BY event.id
            LIMIT 1;
        IF probe.at < since THEN
            low := probe.id + 1;
        ELSE
            high := middle;
        END IF;
    END LOOP;
    RETURN low;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._first_event_since(timestamp with time zone) IS
    'The id of the first event that is not older. Ids grow with time but for transactions that last: events that were written within the duration of such a one after that time may come before it.';


CREATE OR REPLACE FUNCTION procrastinate_stalled.task_runtimes(
    since timestamp with time zone DEFAULT NULL
)
    RETURNS TABLE (
        task_name text,
        runs bigint,
        p50 interval,
        p99 interval,
        longest interval
    )
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
    SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    begin_at CONSTANT timestamp with time zone := coalesce(since, now() - interval '7 days');
    first_id bigint;
BEGIN
    PERFORM procrastinate_stalled._require_procrastinate();
    first_id := procrastinate_stalled._first_event_since(begin_at);
    RETURN QUERY
    WITH event AS (
        SELECT event.job_id,
               event.type,
               event.at,
               lead(event.type) OVER (PARTITION BY event.job_id ORDER BY event.id) AS end_type,
               lead(event.at) OVER (PARTITION BY event.job_id ORDER BY event.id) AS ended_at
            FROM procrastinate_events AS event
            WHERE event.id >= first_id
                AND event.at >= begin_at
                AND event.type IN ('started', 'succeeded', 'failed', 'deferred_for_retry', 'aborted')
    )
    SELECT job.task_name::text,
           count(*),
           percentile_cont(0.5) WITHIN GROUP (ORDER BY event.ended_at - event.at),
           percentile_cont(0.99) WITHIN GROUP (ORDER BY event.ended_at - event.at),
           max(event.ended_at - event.at)
        FROM event
        JOIN procrastinate_jobs AS job ON job.id = event.job_id
        WHERE event.type = 'started'
            AND event.end_type <> 'started'
            -- A clock that is set leaves such runs.
            AND event.ended_at >= event.at
            AND isfinite(event.ended_at)
            AND NOT EXISTS (
                SELECT
                    FROM procrastinate_stalled.rescues AS rescue
                    WHERE rescue.job_id = event.job_id AND rescue.rescued_at = event.ended_at
            )
        GROUP BY job.task_name
        ORDER BY job.task_name;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.task_runtimes(timestamp with time zone) IS
$$How long runs of each task took, from Procrastinate's events: a basis for a run_timeout. Writes nothing.

Argument:
  since  only runs that started since then; NULL: the last 7 days; '-infinity': all. It reads the events since then only
Returns, by task_name:
  task_name  of the jobs
  runs       runs that ended: succeeded, failed, aborted, or to be retried by their worker. Not those that a rescue ended,
             for nobody knows how long they ran (if its row was not purged yet, see settings.keep_rescues), nor those of
             deleted jobs
  p50        half of them took at most so long
  p99        99 of 100 took at most so long
  longest    the longest one$$;


CREATE OR REPLACE FUNCTION procrastinate_stalled._false_rescues(
    since timestamp with time zone
)
    RETURNS SETOF procrastinate_stalled.rescues
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
    SET jit = off
AS $$
BEGIN
    RETURN QUERY
        SELECT rescue.*
            FROM procrastinate_stalled.rescues AS rescue
            JOIN procrastinate_jobs AS job ON job.id = rescue.job_id
            LEFT JOIN LATERAL (
                SELECT event.type
                    FROM procrastinate_events AS event
                    WHERE event.job_id = rescue.job_id
                        AND event.type IN ('started', 'cancelled')
                        AND event.id > (
                            SELECT max(own.id + 0)
                                FROM procrastinate_events AS own
                                WHERE own.job_id = rescue.job_id
                                    AND own.type = 'deferred_for_retry'
                                    AND own.at = rescue.rescued_at
                        )
                    -- Without the sum, a planner without statistics reads the primary key to the end, once per rescue.
                    ORDER BY event.id + 0
                    LIMIT 1
            ) AS next ON true
            WHERE rescue.rescued_at >= since
                AND rescue.action = 'retried'
                -- Procrastinate's trigger writes "cancelled" when a job in todo is cancelled, succeeds or fails, and nothing
                -- when it is aborted.
                AND CASE next.type
                    WHEN 'started' THEN false
                    WHEN 'cancelled' THEN job.status <> 'cancelled'
                    ELSE job.status = 'aborted'
                END;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._false_rescues(timestamp with time zone) IS
    'The retries since then whose former run finished after all: the job reached its end before its retry was started. A former run that finishes while the retry runs, or after it, leaves no trace (finish_job_v1 takes no worker).';
