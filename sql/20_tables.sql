-- What the user sets, and what was done.

CREATE TABLE IF NOT EXISTS procrastinate_stalled.rules (
    name text PRIMARY KEY,
    position integer NOT NULL DEFAULT 100,
    enabled boolean NOT NULL DEFAULT true,
    expires_at timestamp with time zone,
    queue_name text,
    task_name text,
    args jsonb,
    heartbeat_timeout interval DEFAULT '5 minutes',
    run_timeout interval,
    action text NOT NULL DEFAULT 'retry',
    max_rescues integer DEFAULT 3,
    retry_delay interval NOT NULL DEFAULT '0',
    retry_backoff double precision NOT NULL DEFAULT 2,
    retry_queue_name text,
    retry_priority integer,
    on_duplicate text NOT NULL DEFAULT 'fail',
    note text,
    CONSTRAINT rules_name_not_empty CHECK (name <> ''),
    -- What a program can read: Python, for example, knows no infinity.
    CONSTRAINT rules_expires_at_in_range CHECK (expires_at >= '1970-01-01 00:00+00' AND expires_at < '9999-12-31 00:00+00'),
    CONSTRAINT rules_first_position_is_for_pauses CHECK (position > -2147483648 OR (action = 'ignore' AND expires_at IS NOT NULL)),
    -- A pattern that ends in an escape character fails at the first job that it is compared with.
    CONSTRAINT rules_task_name_is_a_like_pattern CHECK (task_name !~ '(^|[^\\])(\\\\)*\\$'),
    CONSTRAINT rules_args_is_an_object CHECK (jsonb_typeof(args) = 'object'),
    -- To compare two objects takes more stack than to read them: deep ones would fail at the first job that has such args.
    CONSTRAINT rules_args_length CHECK (length(args::text) <= 4000),
    -- timestamp + interval must stay within range, or a rule could make every sweep fail. A comparison takes a year for
    -- 360 days and the epoch for 365.25, so both together also refuse '5000000 years -1799999999 days'.
    CONSTRAINT rules_heartbeat_timeout_in_range CHECK (
        heartbeat_timeout > '0' AND heartbeat_timeout <= '10 years'
        AND extract(epoch FROM heartbeat_timeout) BETWEEN 0 AND extract(epoch FROM interval '10 years')
    ),
    CONSTRAINT rules_run_timeout_in_range CHECK (
        run_timeout > '0' AND run_timeout <= '10 years'
        AND extract(epoch FROM run_timeout) BETWEEN 0 AND extract(epoch FROM interval '10 years')
    ),
    CONSTRAINT rules_action_known CHECK (action IN ('retry', 'fail', 'ignore')),
    CONSTRAINT rules_max_rescues_not_negative CHECK (max_rescues >= 0),
    CONSTRAINT rules_retry_delay_in_range CHECK (extract(epoch FROM retry_delay) BETWEEN 0 AND 86400),
    CONSTRAINT rules_retry_backoff_in_range CHECK (retry_backoff >= 1 AND retry_backoff <= 1000),
    -- Procrastinate's column is varchar(128).
    CONSTRAINT rules_retry_queue_name_length CHECK (length(retry_queue_name) BETWEEN 1 AND 128),
    CONSTRAINT rules_on_duplicate_known CHECK (on_duplicate IN ('fail', 'wait'))
);

COMMENT ON TABLE procrastinate_stalled.rules IS
    'Which jobs, when they count as stalled, and what to do then. Edit it with INSERT, UPDATE and DELETE. A job obeys the first enabled, unexpired rule that matches it, by position, then name; a job that no rule matches is never touched.';
COMMENT ON COLUMN procrastinate_stalled.rules.name IS 'Unique name; rescues.rule_name refers to it.';
COMMENT ON COLUMN procrastinate_stalled.rules.position IS 'Order in which the rules are tried, lowest first; equal positions by name. The lowest integer, -2147483648, is for pauses.';
COMMENT ON COLUMN procrastinate_stalled.rules.enabled IS 'A rule that is not enabled matches nothing.';
COMMENT ON COLUMN procrastinate_stalled.rules.expires_at IS 'The rule matches nothing from then on. NULL: it never expires. A rule that ignores jobs until it expires is a pause: pause() makes such rules.';
COMMENT ON COLUMN procrastinate_stalled.rules.queue_name IS 'Matches jobs of exactly this queue. NULL: of any.';
COMMENT ON COLUMN procrastinate_stalled.rules.task_name IS 'Matches jobs whose task name is LIKE this pattern, such as billing.% (an underscore stands for any one character, \_ for itself). NULL: any.';
COMMENT ON COLUMN procrastinate_stalled.rules.args IS 'Matches jobs whose args contain this JSON object (job.args @> rule.args), of at most 4000 characters. NULL: any.';
COMMENT ON COLUMN procrastinate_stalled.rules.heartbeat_timeout IS 'A job is stalled when its worker has not been heard of for so long; an orphan, when a sweep first saw it so long ago. The time in which the server was down does not count, see settings.outage_grace. NULL: silence never counts. Longer than 0, at most 10 years.';
COMMENT ON COLUMN procrastinate_stalled.rules.run_timeout IS 'A job is stalled when its last started event is so long ago, whatever its worker says, also while no worker is alive. NULL: no limit. Longer than 0, at most 10 years.';
COMMENT ON COLUMN procrastinate_stalled.rules.action IS 'retry: back to todo. fail: end it as failed. ignore: never touch it.';
COMMENT ON COLUMN procrastinate_stalled.rules.max_rescues IS 'After so many retries of the same job by sweeps it is failed, not retried: it probably kills its workers. Retries by retry_job() do not count. NULL: no limit.';
COMMENT ON COLUMN procrastinate_stalled.rules.retry_delay IS 'Wait before the first retry of a job, from 0 to 1 day. A job that has a lock is retried at once whatever stands here: while it waits, it would block every job with its lock.';
COMMENT ON COLUMN procrastinate_stalled.rules.retry_backoff IS 'Each further rescue of the same job waits this many times longer, at most 1 day. From 1 to 1000.';
COMMENT ON COLUMN procrastinate_stalled.rules.retry_queue_name IS 'Queue of the retry, 1 to 128 characters. NULL: unchanged.';
COMMENT ON COLUMN procrastinate_stalled.rules.retry_priority IS 'Priority of the retry. NULL: unchanged.';
COMMENT ON COLUMN procrastinate_stalled.rules.on_duplicate IS 'When another job with the same queueing lock already waits in todo: fail ends the stalled one (the waiting one does the same work), wait leaves it for a later sweep. If both have the same lock too, wait does as fail: the waiting one cannot start before the stalled one has ended.';
COMMENT ON COLUMN procrastinate_stalled.rules.note IS 'Free text.';


CREATE TABLE IF NOT EXISTS procrastinate_stalled.settings (
    only_row boolean PRIMARY KEY DEFAULT true,
    outage_grace interval NOT NULL DEFAULT '10 minutes',
    require_live_worker boolean NOT NULL DEFAULT true,
    keep_rescues interval NOT NULL DEFAULT '90 days',
    keep_sweeps interval NOT NULL DEFAULT '7 days',
    CONSTRAINT settings_has_one_row CHECK (only_row),
    CONSTRAINT settings_outage_grace_in_range CHECK (
        outage_grace >= '0' AND outage_grace <= '10 years'
        AND extract(epoch FROM outage_grace) BETWEEN 0 AND extract(epoch FROM interval '10 years')
    ),
    CONSTRAINT settings_keep_rescues_in_range CHECK (
        keep_rescues >= '0' AND keep_rescues <= '100 years'
        AND extract(epoch FROM keep_rescues) BETWEEN 0 AND extract(epoch FROM interval '100 years')
    ),
    CONSTRAINT settings_keep_sweeps_in_range CHECK (
        keep_sweeps >= '0' AND keep_sweeps <= '100 years'
        AND extract(epoch FROM keep_sweeps) BETWEEN 0 AND extract(epoch FROM interval '100 years')
    )
);

COMMENT ON TABLE procrastinate_stalled.settings IS 'One row of settings. Edit it with UPDATE.';
COMMENT ON COLUMN procrastinate_stalled.settings.only_row IS 'Always true: there is one row.';
COMMENT ON COLUMN procrastinate_stalled.settings.outage_grace IS 'A worker can lose its heartbeat for good while the server is down, and still finish its jobs. So the silence of workers that were not heard of since the server last became available counts from that moment, and for at least so long. From 0 to 10 years.';
COMMENT ON COLUMN procrastinate_stalled.settings.require_live_worker IS 'Act on silence and on orphans only while some worker is alive: one was heard of within half of the rule''s heartbeat_timeout. Without one nobody could run the retried job, and a cut network looks just like that. A run_timeout is acted upon all the same.';
COMMENT ON COLUMN procrastinate_stalled.settings.keep_rescues IS 'Sweeps delete older rows of rescues, except those that still count towards max_rescues of a job. From 0 to 100 years.';
COMMENT ON COLUMN procrastinate_stalled.settings.keep_sweeps IS 'Sweeps delete older rows of sweeps, but none that is younger than the longest heartbeat_timeout. From 0 to 100 years.';

CREATE OR REPLACE FUNCTION procrastinate_stalled._first_rows()
    RETURNS void
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
BEGIN
    -- The row of settings tells a first install: a rule "default" that the user deleted stays deleted.
    IF EXISTS (SELECT FROM procrastinate_stalled.settings) THEN
        RETURN;
    END IF;
    INSERT INTO procrastinate_stalled.rules (name, position, note)
        VALUES ('default', 2147483647, 'Made by the install. Change it, or put your own rules before it.')
        ON CONFLICT DO NOTHING;
    INSERT INTO procrastinate_stalled.settings DEFAULT VALUES ON CONFLICT DO NOTHING;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._first_rows() IS
    'Inserts the rule "default" and the row of settings, unless there are settings. Called by the install, and by sweeps for a database that was restored without its rows.';

DO $$
BEGIN
    IF NOT current_setting('procrastinate_stalled.restoring')::boolean THEN
        PERFORM procrastinate_stalled._first_rows();
    END IF;
END;
$$;


CREATE TABLE IF NOT EXISTS procrastinate_stalled.rescues (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    rescued_at timestamp with time zone NOT NULL DEFAULT now(),
    job_id bigint NOT NULL,
    queue_name text NOT NULL,
    task_name text NOT NULL,
    action text NOT NULL CHECK (action IN ('retried', 'failed', 'aborted')),
    reason text NOT NULL CHECK (reason IN ('heartbeat', 'orphaned', 'run_timeout', 'manual')),
    detail text,
    rule_name text,
    worker_id bigint,
    last_heartbeat timestamp with time zone,
    started_at timestamp with time zone,
    attempts integer NOT NULL,
    scheduled_at timestamp with time zone,
    rescued_by text NOT NULL DEFAULT (current_user || coalesce(' (' || nullif(current_setting('application_name'), '') || ')', ''))
);

DO $$
BEGIN
    -- CREATE INDEX IF NOT EXISTS locks the table before it looks.
    IF to_regclass('procrastinate_stalled.rescues_rescued_at_idx') IS NULL THEN
        CREATE INDEX rescues_job_id_idx ON procrastinate_stalled.rescues (job_id);
        CREATE INDEX rescues_rescued_at_idx ON procrastinate_stalled.rescues (rescued_at);
    END IF;
END;
$$;

COMMENT ON TABLE procrastinate_stalled.rescues IS
    'One row per rescued job, written in the same statement as the job''s change. No foreign keys: the rows outlive their jobs.';
COMMENT ON COLUMN procrastinate_stalled.rescues.id IS 'In the order of rescue. NULL in the rows of a dry run.';
COMMENT ON COLUMN procrastinate_stalled.rescues.rescued_at IS 'Start of the transaction that rescued the job.';
COMMENT ON COLUMN procrastinate_stalled.rescues.job_id IS 'procrastinate_jobs.id.';
COMMENT ON COLUMN procrastinate_stalled.rescues.queue_name IS 'The job''s queue when it was found stalled; a rule''s retry_queue_name may have moved it since.';
COMMENT ON COLUMN procrastinate_stalled.rescues.task_name IS 'The job''s task.';
COMMENT ON COLUMN procrastinate_stalled.rescues.action IS 'What was done: retried, failed or aborted.';
COMMENT ON COLUMN procrastinate_stalled.rescues.reason IS 'Why it counted as stalled: heartbeat (its worker was silent), orphaned (its worker row is gone), run_timeout, or manual (retry_job).';
COMMENT ON COLUMN procrastinate_stalled.rescues.detail IS 'Why it was not retried: max_rescues, duplicate of job N, abort requested, rule. NULL for a retry.';
COMMENT ON COLUMN procrastinate_stalled.rescues.rule_name IS 'The rule that chose the action. NULL for manual.';
COMMENT ON COLUMN procrastinate_stalled.rescues.worker_id IS 'The worker that ran the job. NULL: its row was gone.';
COMMENT ON COLUMN procrastinate_stalled.rescues.last_heartbeat IS 'The last heartbeat of that worker.';
COMMENT ON COLUMN procrastinate_stalled.rescues.started_at IS 'The last started event of the job.';
COMMENT ON COLUMN procrastinate_stalled.rescues.attempts IS 'procrastinate_jobs.attempts of the run that was lost: before the retry added one.';
COMMENT ON COLUMN procrastinate_stalled.rescues.scheduled_at IS 'When the retry may start. NULL: at once, or not retried.';
COMMENT ON COLUMN procrastinate_stalled.rescues.rescued_by IS 'Role, and application_name in parentheses.';


CREATE TABLE IF NOT EXISTS procrastinate_stalled.sweeps (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    started_at timestamp with time zone NOT NULL DEFAULT clock_timestamp(),
    duration interval,
    doing integer NOT NULL DEFAULT 0,
    retried integer NOT NULL DEFAULT 0,
    failed integer NOT NULL DEFAULT 0,
    aborted integer NOT NULL DEFAULT 0,
    waiting integer NOT NULL DEFAULT 0,
    held integer NOT NULL DEFAULT 0,
    held_reason text,
    latest_heartbeat timestamp with time zone,
    newest_worker_id bigint,
    error text
);

DO $$
BEGIN
    IF to_regclass('procrastinate_stalled.sweeps_started_at_idx') IS NULL THEN
        CREATE INDEX sweeps_started_at_idx ON procrastinate_stalled.sweeps (started_at);
    END IF;
END;
$$;

COMMENT ON TABLE procrastinate_stalled.sweeps IS
    'One row per sweep, by sweep() or retry_stalled_jobs(). The counts are committed together with the rescues that they count.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.id IS 'In the order of start.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.started_at IS 'When the sweep started.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.duration IS 'How long it took. NULL: it is running, or it was ended from outside (cancelled, server stopped).';
COMMENT ON COLUMN procrastinate_stalled.sweeps.doing IS 'Jobs in doing when it started, of the queue and task asked for.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.retried IS 'Stalled jobs put back to todo.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.failed IS 'Stalled jobs ended as failed.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.aborted IS 'Stalled jobs ended as aborted.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.waiting IS 'Jobs that were stalled when it ended: locked by another session, behind a job with the same queueing lock, beyond max_jobs, or in error.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.held IS 'Jobs that were stalled when it ended and deliberately not touched.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.held_reason IS 'Why they were held: no living worker, or the names of the pauses.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.latest_heartbeat IS 'The latest heartbeat of any worker when it started. If that was older than half of heartbeat_timeout, nobody was alive; and when one of the silent workers is heard again, the others have heartbeat_timeout from the next sweep on to be heard too.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.newest_worker_id IS 'The highest id of a worker when it started; 0: there was none. A worker that is newer tells nothing of the silent ones.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.error IS 'The first error that kept a job from being rescued, with the job''s id; every other job was rescued all the same. Or that of the full disk (53100) which ended the sweep.';


CREATE TABLE IF NOT EXISTS procrastinate_stalled.orphans (
    job_id bigint PRIMARY KEY,
    attempts integer NOT NULL,
    seen_at timestamp with time zone NOT NULL DEFAULT clock_timestamp()
);

COMMENT ON TABLE procrastinate_stalled.orphans IS
    'Jobs in doing whose worker row is gone, and when a sweep first saw them so: the loss of the row has no date of its own. Written and cleaned by sweeps.';
COMMENT ON COLUMN procrastinate_stalled.orphans.job_id IS 'procrastinate_jobs.id.';
COMMENT ON COLUMN procrastinate_stalled.orphans.attempts IS 'procrastinate_jobs.attempts of the run that was orphaned.';
COMMENT ON COLUMN procrastinate_stalled.orphans.seen_at IS 'When a sweep first saw it.';


-- Procrastinate's own types are not used here: its migrations replace them, and a column of ours would forbid it.
DO $$
BEGIN
    IF to_regtype('procrastinate_stalled.stalled_job') IS NULL THEN
        CREATE TYPE procrastinate_stalled.stalled_job AS (
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
            retry_priority integer
        );
    END IF;
END;
$$;

COMMENT ON TYPE procrastinate_stalled.stalled_job IS
    'A stalled job: the columns of procrastinate_jobs, then the evidence and what a sweep would do now.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.id IS 'procrastinate_jobs.id.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.queue_name IS 'procrastinate_jobs.queue_name.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.task_name IS 'procrastinate_jobs.task_name.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.priority IS 'procrastinate_jobs.priority.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.lock IS 'procrastinate_jobs.lock.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.queueing_lock IS 'procrastinate_jobs.queueing_lock.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.args IS 'procrastinate_jobs.args.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.status IS 'procrastinate_jobs.status: doing.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.scheduled_at IS 'procrastinate_jobs.scheduled_at.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.attempts IS 'procrastinate_jobs.attempts: the runs before this one.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.abort_requested IS 'procrastinate_jobs.abort_requested.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.worker_id IS 'The worker that fetched it. NULL: an orphan, whose worker row is gone.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.last_heartbeat IS 'The last heartbeat of its worker. NULL: the worker row is gone.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.started_at IS 'Its last started event.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.rule_name IS 'The rule that it obeys. NULL: no rule matches.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.reason IS 'heartbeat, orphaned or run_timeout.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.stalled_at IS 'Since when it counts as stalled. NULL: an orphan that was asked for by seconds_since_heartbeat, which gives it no date.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.action IS 'What a sweep would do now: retry, fail, abort, wait (for the job named in duplicate_of), hold (no worker is alive) or ignore.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.detail IS 'Why it would not be retried: max_rescues, duplicate of job N, abort requested, no living worker, rule, no rule.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.duplicate_of IS 'A job with the same queueing lock that is in todo, or that is stalled too and would be retried first.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.retry_at IS 'When the retry would start. NULL: at once.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.retry_queue_name IS 'The queue of the retry. NULL: unchanged.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.retry_priority IS 'The priority of the retry. NULL: unchanged.';


DO $$
BEGIN
    IF to_regtype('procrastinate_stalled.explained_job') IS NULL THEN
        CREATE TYPE procrastinate_stalled.explained_job AS (
            job_id bigint,
            queue_name text,
            task_name text,
            status text,
            attempts integer,
            worker_id bigint,
            last_heartbeat timestamp with time zone,
            seen_at timestamp with time zone,
            started_at timestamp with time zone,
            available_since timestamp with time zone,
            rule_name text,
            verdict text,
            reason text,
            stalled_at timestamp with time zone,
            action text,
            detail text,
            sentence text
        );
    END IF;
END;
$$;

COMMENT ON TYPE procrastinate_stalled.explained_job IS
    'The judgement of one job, stalled or not, with the evidence, and a sentence that says it.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.job_id IS 'procrastinate_jobs.id.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.queue_name IS 'procrastinate_jobs.queue_name.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.task_name IS 'procrastinate_jobs.task_name.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.status IS 'procrastinate_jobs.status. NULL: no such job.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.attempts IS 'procrastinate_jobs.attempts: the runs before this one.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.worker_id IS 'The worker that fetched it. NULL: an orphan, whose worker row is gone, or not in doing.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.last_heartbeat IS 'The last heartbeat of its worker.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.seen_at IS 'When a sweep first saw that its worker row is gone. NULL: it is not gone, or no sweep has seen it yet.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.started_at IS 'Its last started event.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.available_since IS 'When the server last became available for writes: its start, the end of a crash recovery, or its promotion.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.rule_name IS 'The rule that it obeys: the first one that matches, which may be a pause. NULL: no rule matches.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.verdict IS 'stalled, running, held (it would be stalled, but no worker is alive or a pause is in force), ignored (by its rule, or no rule matches), not doing, no such job.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.reason IS 'The evidence by which stalled_at is reached: heartbeat, orphaned or run_timeout.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.stalled_at IS 'When it counts as stalled unless something happens before: a heartbeat, its end. NULL: never by its rule.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.action IS 'What a sweep would do then, as things stand now: retry, fail, abort, wait (for a job with the same queueing lock) or ignore.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.detail IS 'Why it would not be retried: max_rescues, duplicate of job N, abort requested, rule, no rule.';
COMMENT ON COLUMN procrastinate_stalled.explained_job.sentence IS 'All of that in words. Times of day are in the TimeZone of the session.';
