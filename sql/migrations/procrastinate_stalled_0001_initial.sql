-- procrastinate_stalled: finds the stalled jobs of Procrastinate and retries them inside the database.
--
-- These files are read in their order and run in one transaction. What follows checks that they can succeed and
-- pins search_path for the rest of the transaction; each function below keeps that value (SET search_path FROM
-- CURRENT), because Procrastinate's triggers and functions call each other by unqualified names.

DO $$
DECLARE
    wanted_schema CONSTANT text := nullif(current_setting('procrastinate_stalled.procrastinate_schema', true), '');
    procrastinate_schema text;
    procrastinate_schemas text[];
BEGIN
    -- The catalog is asked and not the search_path: CREATE EXTENSION replaces the path.
    SELECT array_agg(namespace.nspname ORDER BY namespace.nspname)
        INTO procrastinate_schemas
        FROM pg_catalog.pg_class AS class
        JOIN pg_catalog.pg_namespace AS namespace ON namespace.oid = class.relnamespace
        WHERE class.relname = 'procrastinate_jobs' AND class.relkind IN ('r', 'p');

    IF procrastinate_schemas IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('Procrastinate is not installed in database "%s"', current_database()),
            DETAIL = 'No schema has a table "procrastinate_jobs" that this role can see.',
            HINT = 'Connect to the database of your Procrastinate app, or apply its schema first: procrastinate --app=... schema --apply';
    END IF;

    IF wanted_schema IS NOT NULL THEN
        IF wanted_schema <> ALL (procrastinate_schemas) THEN
            RAISE EXCEPTION USING
                ERRCODE = 'invalid_schema_name',
                MESSAGE = format('schema "%s" has no table "procrastinate_jobs"', wanted_schema),
                DETAIL = format('The setting procrastinate_stalled.procrastinate_schema names it. Schemas that have the table: %s.',
                    array_to_string(procrastinate_schemas, ', ')),
                HINT = 'Correct the setting, or RESET procrastinate_stalled.procrastinate_schema.';
        END IF;
        procrastinate_schema := wanted_schema;
    ELSIF cardinality(procrastinate_schemas) = 1 THEN
        procrastinate_schema := procrastinate_schemas[1];
    ELSE
        SELECT namespace.nspname
            INTO procrastinate_schema
            FROM pg_catalog.pg_class AS class
            JOIN pg_catalog.pg_namespace AS namespace ON namespace.oid = class.relnamespace
            WHERE class.oid = to_regclass('procrastinate_jobs');
        IF procrastinate_schema IS NULL THEN
            RAISE EXCEPTION USING
                ERRCODE = 'invalid_schema_name',
                MESSAGE = format('several schemas of database "%s" hold a Procrastinate', current_database()),
                DETAIL = format('The table "procrastinate_jobs" is in: %s. None of them is in the search_path.',
                    array_to_string(procrastinate_schemas, ', ')),
                HINT = 'Name one and install again. In the shell: export PGOPTIONS="-c procrastinate_stalled.procrastinate_schema=..."; in psql: SET procrastinate_stalled.procrastinate_schema = ''...'';';
        END IF;
    END IF;

    IF NOT has_schema_privilege(procrastinate_schema, 'USAGE')
        OR NOT has_table_privilege(format('%I.procrastinate_jobs', procrastinate_schema), 'SELECT')
        OR NOT has_table_privilege(format('%I.procrastinate_jobs', procrastinate_schema), 'UPDATE')
    THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role "%s" may not read and update "%s.procrastinate_jobs"', current_user, procrastinate_schema),
            DETAIL = 'To retry a stalled job is to update its row.',
            HINT = 'Install as the role that owns Procrastinate''s tables.';
    END IF;

    IF NOT EXISTS (
        SELECT FROM pg_catalog.pg_attribute
        WHERE attrelid = to_regclass(format('%I.procrastinate_jobs', procrastinate_schema))
            AND attname = 'worker_id'
            AND NOT attisdropped
    ) OR to_regclass(format('%I.procrastinate_workers', procrastinate_schema)) IS NULL
    THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('the Procrastinate in schema "%s" is too old', procrastinate_schema),
            DETAIL = 'It has no table "procrastinate_workers", or its jobs have no "worker_id": without heartbeats nobody can tell a dead worker.',
            HINT = 'Upgrade to Procrastinate 3.1 or later and apply its migrations (pre and post) first.';
    END IF;

    IF to_regnamespace('procrastinate_stalled') IS NULL
        AND NOT has_database_privilege(current_database(), 'CREATE')
    THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role "%s" may not create a schema in database "%s"', current_user, current_database()),
            DETAIL = 'Everything of procrastinate_stalled lives in one schema of that name.',
            HINT = format('As the owner of the database: GRANT CREATE ON DATABASE %I TO %I;', current_database(), current_user);
    END IF;

    PERFORM set_config('search_path', format('pg_catalog, %I, pg_temp', procrastinate_schema), true);
END;
$$;

DO $$
BEGIN
    IF current_setting('search_path') NOT LIKE 'pg_catalog, %, pg_temp' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'no_active_sql_transaction',
            MESSAGE = 'this script must run in one transaction',
            DETAIL = 'The search_path that its functions keep was set for one transaction, and that has ended.',
            HINT = 'psql --single-transaction --set ON_ERROR_STOP=1 --file ...; or: procrastinate-stalled install';
    END IF;
END;
$$;

CREATE SCHEMA IF NOT EXISTS procrastinate_stalled;

COMMENT ON SCHEMA procrastinate_stalled IS
    'Finds the stalled jobs of Procrastinate (status doing, worker dead) and retries them. Start with: SELECT * FROM procrastinate_stalled.status();';
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
    -- A pattern that ends in an escape character fails at the first job that it is compared with.
    CONSTRAINT rules_task_name_is_a_like_pattern CHECK (task_name !~ '(^|[^\\])(\\\\)*\\$'),
    CONSTRAINT rules_args_is_an_object CHECK (jsonb_typeof(args) = 'object'),
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
COMMENT ON COLUMN procrastinate_stalled.rules.position IS 'Order in which the rules are tried, lowest first; equal positions by name.';
COMMENT ON COLUMN procrastinate_stalled.rules.enabled IS 'A rule that is not enabled matches nothing.';
COMMENT ON COLUMN procrastinate_stalled.rules.expires_at IS 'The rule matches nothing from then on. NULL: it never expires.';
COMMENT ON COLUMN procrastinate_stalled.rules.queue_name IS 'Matches jobs of exactly this queue. NULL: of any.';
COMMENT ON COLUMN procrastinate_stalled.rules.task_name IS 'Matches jobs whose task name is LIKE this pattern, such as billing.% (an underscore stands for any one character, \_ for itself). NULL: any.';
COMMENT ON COLUMN procrastinate_stalled.rules.args IS 'Matches jobs whose args contain this JSON object (job.args @> rule.args). NULL: any.';
COMMENT ON COLUMN procrastinate_stalled.rules.heartbeat_timeout IS 'A job is stalled when its worker has not been heard of for so long; an orphan, when a sweep first saw it so long ago. NULL: silence never counts. Longer than 0, at most 10 years.';
COMMENT ON COLUMN procrastinate_stalled.rules.run_timeout IS 'A job is stalled when its last started event is so long ago, whatever its worker says. NULL: no limit. Longer than 0, at most 10 years.';
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
COMMENT ON COLUMN procrastinate_stalled.settings.outage_grace IS 'Replaces a shorter heartbeat_timeout for workers not heard of since the server was last unavailable. From 0 to 10 years. Version 0.1.0 stores it and does not act on it yet.';
COMMENT ON COLUMN procrastinate_stalled.settings.require_live_worker IS 'Act on silence only while some worker is alive. Version 0.1.0 stores it and does not act on it yet.';
COMMENT ON COLUMN procrastinate_stalled.settings.keep_rescues IS 'Sweeps delete older rows of rescues, except those that still count towards max_rescues of a job. From 0 to 100 years.';
COMMENT ON COLUMN procrastinate_stalled.settings.keep_sweeps IS 'Sweeps delete older rows of sweeps. From 0 to 100 years.';

-- The row of settings tells a first install: a rule "default" that the user deleted stays deleted.
INSERT INTO procrastinate_stalled.rules (name, position, note)
    SELECT 'default', 2147483647, 'Made by the install. Change it, or put your own rules before it.'
    WHERE NOT EXISTS (SELECT FROM procrastinate_stalled.settings);
INSERT INTO procrastinate_stalled.settings DEFAULT VALUES ON CONFLICT DO NOTHING;


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

CREATE INDEX IF NOT EXISTS rescues_job_id_idx ON procrastinate_stalled.rescues (job_id);
CREATE INDEX IF NOT EXISTS rescues_rescued_at_idx ON procrastinate_stalled.rescues (rescued_at);

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
    error text
);

CREATE INDEX IF NOT EXISTS sweeps_started_at_idx ON procrastinate_stalled.sweeps (started_at);

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
COMMENT ON COLUMN procrastinate_stalled.sweeps.held IS 'Stalled jobs deliberately not acted upon; 0 in version 0.1.0.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.held_reason IS 'Why they were held.';
COMMENT ON COLUMN procrastinate_stalled.sweeps.error IS 'The first error that kept a job from being rescued, with the job''s id; every job that can be rescued was rescued all the same.';


CREATE TABLE IF NOT EXISTS procrastinate_stalled.orphans (
    job_id bigint PRIMARY KEY,
    attempts integer NOT NULL,
    seen_at timestamp with time zone NOT NULL DEFAULT now()
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
COMMENT ON COLUMN procrastinate_stalled.stalled_job.action IS 'What a sweep would do: retry, fail, abort, wait (for the job named in duplicate_of) or ignore.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.detail IS 'Why it would not be retried: max_rescues, duplicate of job N, abort requested, rule, no rule.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.duplicate_of IS 'A job with the same queueing lock that is in todo, or that is stalled too and would be retried first.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.retry_at IS 'When the retry would start. NULL: at once.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.retry_queue_name IS 'The queue of the retry. NULL: unchanged.';
COMMENT ON COLUMN procrastinate_stalled.stalled_job.retry_priority IS 'The priority of the retry. NULL: unchanged.';
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
                -- As text: a partial index of the jobs in todo fits otherwise, and may be read from end to end.
                AND job.status::text = 'todo'
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
    job_ids bigint[]
)
    RETURNS SETOF procrastinate_stalled.rescues
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
#variable_conflict use_column
DECLARE
    candidates procrastinate_stalled.stalled_job[];
    silent_workers bigint[];
    rescued procrastinate_stalled.rescues[];
    to_wake bigint[] := ARRAY[]::bigint[];
    rest bigint[] := job_ids;
    duplicates bigint[];
BEGIN
    LOOP
        candidates := ARRAY(
            SELECT judged
                FROM procrastinate_stalled._judge(queue, task_name, seconds_since_heartbeat, nb_seconds, rest) AS judged
                WHERE judged.action IN ('retry', 'fail', 'abort')
        );

        -- A worker that beat since it was judged is dropped from the silent ones, and with it its jobs.
        silent_workers := ARRAY(
            SELECT worker.id
                FROM procrastinate_workers AS worker
                WHERE (worker.id, worker.last_heartbeat) IN (
                    SELECT candidate.worker_id, candidate.last_heartbeat
                        FROM unnest(candidates) AS candidate
                        WHERE candidate.reason = 'heartbeat'
                )
                ORDER BY worker.id
                FOR NO KEY UPDATE OF worker SKIP LOCKED
        );

        WITH candidate AS (
            SELECT *
                FROM unnest(candidates)
        ), waiting AS (
            -- A job is ended as a duplicate only while the other one stays in todo, which this lock sees to.
            SELECT job.id
                FROM procrastinate_jobs AS job
                WHERE (job.id, job.queueing_lock) IN (SELECT duplicate_of, queueing_lock FROM candidate)
                    AND job.status::text = 'todo'
                FOR SHARE OF job SKIP LOCKED
        ), run AS (
            SELECT candidate.*
                FROM procrastinate_jobs AS job
                JOIN candidate ON candidate.id = job.id
                WHERE job.status::text = 'doing'
                    AND job.worker_id IS NOT DISTINCT FROM candidate.worker_id
                    AND job.attempts = candidate.attempts
                    AND job.abort_requested = candidate.abort_requested
                    AND (candidate.reason <> 'heartbeat' OR candidate.worker_id = ANY (silent_workers))
                    AND (candidate.duplicate_of IS NULL OR candidate.duplicate_of IN (SELECT id FROM waiting))
                ORDER BY job.id
                FOR NO KEY UPDATE OF job SKIP LOCKED
        ), changed AS (
            UPDATE procrastinate_jobs AS job
                SET status = CASE run.action
                        WHEN 'retry' THEN 'todo'
                        WHEN 'abort' THEN 'aborted'
                        ELSE 'failed'
                    END::procrastinate_job_status,
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
                    ORDER BY id
                RETURNING *
        )
        SELECT array_agg(ROW(ledger.*)::procrastinate_stalled.rescues ORDER BY id)
            INTO rescued
            FROM ledger;

        RETURN QUERY
            SELECT *
                FROM unnest(rescued);

        -- The jobs that wait with the queueing lock of an ended one are woken too: a fetch may have skipped them
        -- while they were locked here, or they wait for the ended one's lock.
        to_wake := to_wake || ARRAY(
            SELECT job_id FROM unnest(rescued) WHERE action = 'retried'
            UNION
            SELECT duplicate_of FROM unnest(candidates) WHERE duplicate_of IS NOT NULL
        );

        -- Once more for the duplicates of a job that was stalled itself: it is in todo now, or another session has it
        -- locked and the next one with the queueing lock may take its place.
        duplicates := ARRAY(
            SELECT id FROM unnest(candidates) WHERE duplicate_of IS NOT NULL
            EXCEPT
            SELECT job_id FROM unnest(rescued)
        );
        EXIT WHEN duplicates = '{}' OR cardinality(duplicates) = cardinality(rest);
        rest := duplicates;
    END LOOP;

    PERFORM procrastinate_stalled._notify(to_wake);
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._rescue(text, text, interval, interval, bigint[]) IS
    'Judges the given jobs anew and rescues those that are stalled, all or none. Returns their ledger rows. Raises unique_violation or lock_not_available when a session defers a job with the queueing lock of one of them at this very moment.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._note_orphans()
    RETURNS void
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
    SET enable_bitmapscan = off
    SET enable_seqscan = off
    SET jit = off
AS $$
BEGIN
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
                    AND job.status = 'doing'
                    AND job.worker_id IS NULL
        );

    INSERT INTO procrastinate_stalled.orphans (job_id, attempts)
        SELECT job.id, job.attempts
            FROM procrastinate_jobs AS job
            WHERE job.status = 'doing' AND job.worker_id IS NULL
        ON CONFLICT DO NOTHING;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._note_orphans() IS
    'Notes the jobs in doing that have lost their worker row, and forgets those that are in that run no more.';


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
    job procrastinate_jobs;
    rescue procrastinate_stalled.rescues;
    violated_constraint text;
BEGIN
    IF job_id IS NULL OR NOT isfinite(retry_at) OR length(queue) NOT BETWEEN 1 AND 128 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = CASE
                WHEN job_id IS NULL THEN 'job_id must not be NULL'
                WHEN NOT isfinite(retry_at) THEN 'retry_at must be a finite time'
                ELSE 'queue must have 1 to 128 characters'
            END,
            DETAIL = format('job_id is %s, retry_at is %s, queue has %s characters.',
                coalesce(job_id::text, 'NULL'), coalesce(retry_at::text, 'NULL'), coalesce(length(queue)::text, 'no')),
            HINT = 'Nothing was changed. Example: SELECT * FROM procrastinate_stalled.retry_job(42);';
    END IF;

    SELECT *
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
            HINT = 'Nothing was changed. The waiting job does the same work. Let a sweep end this one (rules.on_duplicate), or cancel the waiting one first.';
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.retry_job(bigint, timestamp with time zone, integer, text, text) IS
$$Retries one job in doing, whatever the rules and its worker say: an operator's decision. If its worker is alive after
all, the job will run twice.

Arguments:
  job_id    the job, which must be in doing
  retry_at  when the retry may start; NULL: at once
  priority  new priority; NULL: unchanged
  queue     new queue, 1 to 128 characters; NULL: unchanged
  lock      new lock; NULL: unchanged
Returns the new row of rescues. The job is left as Procrastinate's JobManager.retry_job leaves it (a job whose abort was
requested is failed, not retried, and keeps the request), except that worker_id is NULL.
Errors, after which nothing is changed: no_data_found (no such job), object_not_in_prerequisite_state (not in doing),
unique_violation (another job waits with its queueing lock), lock_not_available (locked by another session for 500 ms),
invalid_parameter_value.$$;
-- The sweep: judge once, rescue in batches, commit each batch with its counts, then purge. sweep() is what pg_cron
-- runs; retry_stalled_jobs() does the same in the caller's transaction.

CREATE OR REPLACE FUNCTION procrastinate_stalled._can_sweep(
    batch_size integer
)
    RETURNS boolean
    LANGUAGE plpgsql
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


CREATE OR REPLACE FUNCTION procrastinate_stalled._lock_jobs_table()
    RETURNS void
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
BEGIN
    -- What an UPDATE takes anyway. Taken first, a lock on the whole table is told from a lock on one job.
    LOCK TABLE procrastinate_jobs IN ROW EXCLUSIVE MODE;
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION USING
        ERRCODE = 'lock_not_available',
        MESSAGE = 'the table procrastinate_jobs is locked by another session',
        DETAIL = 'No job can be changed meanwhile, by workers neither: a migration, VACUUM FULL or CREATE INDEX without CONCURRENTLY does that.',
        HINT = 'The next sweep goes on. Who it is: SELECT * FROM pg_stat_activity WHERE pid IN (SELECT pid FROM pg_locks WHERE relation = ''procrastinate_jobs''::regclass AND granted);';
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._lock_jobs_table() IS
    'Takes the table lock of an UPDATE of jobs until the transaction ends. Raises lock_not_available when another session holds a lock on the table that forbids it.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._begin_sweep(
    queue text,
    task_name text
)
    RETURNS bigint
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
#variable_conflict use_column
DECLARE
    sweep_id bigint;
BEGIN
    PERFORM procrastinate_stalled._lock_jobs_table();
    PERFORM procrastinate_stalled._note_orphans();
    INSERT INTO procrastinate_stalled.sweeps (doing)
        SELECT count(*)
            FROM procrastinate_stalled._doing_jobs(NULL)
            WHERE (_begin_sweep.queue IS NULL OR queue_name = _begin_sweep.queue)
                AND (_begin_sweep.task_name IS NULL OR task_name = _begin_sweep.task_name)
        RETURNING id
        INTO sweep_id;
    RETURN sweep_id;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._begin_sweep(text, text) IS
    'Notes orphans and opens the row of a sweep. Returns its id.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._batches(
    queue text DEFAULT NULL,
    task_name text DEFAULT NULL,
    seconds_since_heartbeat interval DEFAULT NULL,
    nb_seconds interval DEFAULT NULL,
    batch_size integer DEFAULT 1000
)
    RETURNS TABLE (job_ids bigint[])
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
BEGIN
    RETURN QUERY
    WITH to_rescue AS (
        SELECT judged.id, row_number() OVER (ORDER BY judged.id) AS number
            FROM procrastinate_stalled._judge(queue, task_name, seconds_since_heartbeat, nb_seconds) AS judged
            WHERE judged.action IN ('retry', 'fail', 'abort')
    )
    SELECT array_agg(id ORDER BY id)
        FROM to_rescue
        GROUP BY (number - 1) / batch_size
        ORDER BY min(id);
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._batches(text, text, interval, interval, integer) IS
    'The ids of the stalled jobs that a sweep can rescue now, in batches, in id order.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._rescue_batch(
    sweep_id bigint,
    queue text,
    task_name text,
    seconds_since_heartbeat interval,
    nb_seconds interval,
    job_ids bigint[],
    OUT rescued procrastinate_stalled.rescues[],
    OUT one_by_one boolean
)
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
#variable_conflict use_column
DECLARE
    violated_constraint text;
BEGIN
    one_by_one := false;
    PERFORM procrastinate_stalled._lock_jobs_table();
    BEGIN
        rescued := ARRAY(
            SELECT rescue
                FROM procrastinate_stalled._rescue(queue, task_name, seconds_since_heartbeat, nb_seconds, job_ids) AS rescue
        );
    EXCEPTION WHEN OTHERS THEN
        IF cardinality(job_ids) > 1 THEN
            one_by_one := true;
            RETURN;
        END IF;
        -- What a deferred job with the same queueing lock causes is no error: the job has lost its turn.
        GET STACKED DIAGNOSTICS violated_constraint = CONSTRAINT_NAME;
        IF SQLSTATE <> '55P03' AND violated_constraint <> 'procrastinate_jobs_queueing_lock_idx_v1' THEN
            UPDATE procrastinate_stalled.sweeps
                SET error = coalesce(error, format('job %s: %s (%s)', job_ids[1], SQLERRM, SQLSTATE))
                WHERE id = sweep_id;
        END IF;
        RETURN;
    END;

    UPDATE procrastinate_stalled.sweeps
        SET retried = retried + (SELECT count(*) FROM unnest(rescued) WHERE action = 'retried'),
            failed = failed + (SELECT count(*) FROM unnest(rescued) WHERE action = 'failed'),
            aborted = aborted + (SELECT count(*) FROM unnest(rescued) WHERE action = 'aborted')
        WHERE id = sweep_id;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._rescue_batch(bigint, text, text, interval, interval, bigint[]) IS
    'Rescues the given jobs and counts them in the row of the sweep. Never raises for the sake of one job (for that of the table, it does): one_by_one asks the caller to come again with each job alone, because the batch as a whole failed; a job that fails alone stays as it is.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._end_sweep(
    sweep_id bigint,
    queue text,
    task_name text,
    seconds_since_heartbeat interval,
    nb_seconds interval
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '100ms'
AS $$
#variable_conflict use_column
BEGIN
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
                WHERE sweep.started_at < now() - (SELECT keep_sweeps FROM procrastinate_stalled.settings)
                ORDER BY sweep.started_at
                LIMIT 1000
                FOR UPDATE OF sweep SKIP LOCKED
        );
    UPDATE procrastinate_stalled.sweeps
        SET waiting = (
                SELECT count(*)
                    FROM procrastinate_stalled._judge(queue, task_name, seconds_since_heartbeat, nb_seconds)
                    WHERE action <> 'ignore'
            ),
            duration = clock_timestamp() - started_at
        WHERE id = sweep_id;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._end_sweep(bigint, text, text, interval, interval) IS
    'Purges up to 1000 outdated rows each of rescues and sweeps, and closes the row of the sweep.';


CREATE OR REPLACE PROCEDURE procrastinate_stalled.sweep(
    batch_size integer DEFAULT 1000
)
    LANGUAGE plpgsql
AS $$
-- No SET clause, because a procedure that has one cannot commit; so everything here is a call with a qualified
-- name, and a type that is a keyword.
DECLARE
    sweep_id bigint;
    batch bigint[];
    one_by_one boolean;
    job_id bigint;
BEGIN
    IF NOT procrastinate_stalled._can_sweep(batch_size) THEN
        RETURN;
    END IF;

    sweep_id := procrastinate_stalled._begin_sweep(NULL, NULL);
    -- Whatever ends the sweep from here on, its row and the orphans that it saw first remain.
    COMMIT;
    FOR batch IN
        SELECT job_ids FROM procrastinate_stalled._batches(batch_size => sweep.batch_size)
    LOOP
        one_by_one := (procrastinate_stalled._rescue_batch(sweep_id, NULL, NULL, NULL, NULL, batch)).one_by_one;
        COMMIT;
        IF one_by_one THEN
            FOREACH job_id IN ARRAY batch LOOP
                PERFORM procrastinate_stalled._rescue_batch(sweep_id, NULL, NULL, NULL, NULL, ARRAY[job_id]);
                COMMIT;
            END LOOP;
        END IF;
    END LOOP;
    PERFORM procrastinate_stalled._end_sweep(sweep_id, NULL, NULL, NULL, NULL);
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
a transaction block), lock_not_available (the whole table procrastinate_jobs is locked). A job that cannot be rescued does not stop it: see sweeps.waiting and sweeps.error.$$;


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
    sweep_id bigint;
    batch bigint[];
    result record;
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
                WHERE action IN ('retry', 'fail', 'abort')
                ORDER BY id
                LIMIT max_jobs;
        RETURN;
    END IF;

    sweep_id := procrastinate_stalled._begin_sweep(retry_stalled_jobs.queue, retry_stalled_jobs.task_name);
    FOR batch IN
        SELECT job_ids
            FROM procrastinate_stalled._batches(
                retry_stalled_jobs.queue, retry_stalled_jobs.task_name, silence, run_time, least(max_jobs, 1000)
            )
    LOOP
        EXIT WHEN done >= max_jobs;
        batch := batch[1:coalesce(max_jobs - done, cardinality(batch))];
        result := procrastinate_stalled._rescue_batch(
            sweep_id, retry_stalled_jobs.queue, retry_stalled_jobs.task_name, silence, run_time, batch
        );
        RETURN QUERY SELECT * FROM unnest(result.rescued);
        done := done + coalesce(cardinality(result.rescued), 0);
        IF result.one_by_one THEN
            FOREACH single IN ARRAY batch LOOP
                result := procrastinate_stalled._rescue_batch(
                    sweep_id, retry_stalled_jobs.queue, retry_stalled_jobs.task_name, silence, run_time, ARRAY[single]
                );
                RETURN QUERY SELECT * FROM unnest(result.rescued);
                done := done + coalesce(cardinality(result.rescued), 0);
            END LOOP;
        END IF;
    END LOOP;
    PERFORM procrastinate_stalled._end_sweep(sweep_id, retry_stalled_jobs.queue, retry_stalled_jobs.task_name, silence, run_time);
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
Returns the rows of rescues that it wrote. With seconds too, the rules choose the action: a job whose rule is ignore, or
that no rule matches, is not touched.
Errors, after which nothing is changed: invalid_parameter_value, when seconds are zero, negative, NaN or above 100 years,
or max_jobs is not positive; lock_not_available, when the whole table procrastinate_jobs is locked.$$;
-- pg_cron. It may be absent, in another database, or closed to this role: each is said, with the way out.
-- cron.job shows a role its own jobs only; a superuser sees all.

CREATE OR REPLACE FUNCTION procrastinate_stalled._cron_database()
    RETURNS text
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN current_setting('cron.database_name', true);
EXCEPTION WHEN insufficient_privilege THEN
    -- The setting exists, but only members of pg_read_all_settings may see it.
    RETURN '';
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._cron_database() IS
    'The database that pg_cron lives in, as the server is configured. NULL: the server has not loaded it. Empty: this role may not see it.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._require_pg_cron(
    schedule text DEFAULT '* * * * *'
)
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
DECLARE
    cron_database text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_cron') THEN
        cron_database := procrastinate_stalled._cron_database();
        IF cron_database IS NULL THEN
            RAISE EXCEPTION USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('pg_cron is not installed in database "%s"', current_database()),
                DETAIL = 'The server has not loaded it (shared_preload_libraries).',
                HINT = 'Add pg_cron to shared_preload_libraries, restart, CREATE EXTENSION pg_cron; or sweep from outside: procrastinate-stalled sweep, or procrastinate_stalled.add_periodic_sweep(app).';
        ELSIF cron_database = current_database() THEN
            RAISE EXCEPTION USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('pg_cron is not installed in database "%s"', current_database()),
                DETAIL = 'The server has loaded it for this database, but the extension is not created.',
                HINT = format('As a superuser: CREATE EXTENSION pg_cron; GRANT USAGE ON SCHEMA cron TO %I;', current_user);
        ELSE
            RAISE EXCEPTION USING
                ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('pg_cron is not in database "%s"', current_database()),
                DETAIL = CASE cron_database
                    WHEN '' THEN 'It lives in the database that cron.database_name says, which this role may not see.'
                    ELSE format('On this server it lives in database "%s" (cron.database_name).', cron_database)
                END,
                -- pg_cron keeps one job per name and role, so the name says which database it is for.
                HINT = format(
                    'There, as a role that may: SELECT cron.schedule_in_database(%L, %L, %L, %L, %L);   To end it, there: SELECT cron.unschedule(jobid) FROM cron.job WHERE database = %L AND command = %L;',
                    'procrastinate_stalled ' || current_database(), schedule, 'CALL procrastinate_stalled.sweep()', current_database(), current_user,
                    current_database(), 'CALL procrastinate_stalled.sweep()'
                );
        END IF;
    END IF;

    IF NOT has_schema_privilege('cron', 'USAGE') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role "%s" may not use pg_cron', current_user),
            DETAIL = 'It has no USAGE on schema "cron".',
            HINT = format('As a superuser: GRANT USAGE ON SCHEMA cron TO %I;', current_user);
    END IF;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._require_pg_cron(text) IS
    'Raises object_not_in_prerequisite_state or insufficient_privilege, with the way out, unless this role can use pg_cron in this database.';


CREATE OR REPLACE FUNCTION procrastinate_stalled.schedule(
    schedule text DEFAULT '* * * * *'
)
    RETURNS bigint
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '5s'
AS $$
#variable_conflict use_column
DECLARE
    command CONSTANT text := 'CALL procrastinate_stalled.sweep()';
    existing record;
BEGIN
    PERFORM procrastinate_stalled._require_pg_cron(schedule.schedule);

    IF NOT (SELECT rolcanlogin FROM pg_roles WHERE rolname = current_user) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_authorization_specification',
            MESSAGE = format('role "%s" cannot log in, so every run of its job would fail', current_user),
            DETAIL = 'pg_cron runs a job as the role that scheduled it.',
            HINT = 'Schedule as a role that can log in (RESET ROLE), or ALTER ROLE ... LOGIN.';
    END IF;

    SELECT jobid, job.schedule, job.command, database, active
        INTO existing
        FROM cron.job AS job
        WHERE jobname = 'procrastinate_stalled' AND username = current_user;
    IF existing.database <> current_database() THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('role "%s" has a pg_cron job "procrastinate_stalled" for another database', current_user),
            DETAIL = format('Job %s sweeps database "%s"; pg_cron keeps one job per name and role.', existing.jobid, existing.database),
            HINT = 'Schedule one of the two databases as another role.';
    END IF;
    IF existing.schedule = schedule.schedule AND existing.command = command AND existing.active THEN
        RETURN existing.jobid;
    END IF;

    -- cron.schedule keeps an existing job as inactive as it was, and only a superuser may call cron.alter_job.
    IF existing.jobid IS NOT NULL THEN
        PERFORM cron.unschedule(existing.jobid);
    END IF;
    BEGIN
        RETURN cron.schedule('procrastinate_stalled', coalesce(schedule.schedule, ''), command);
    EXCEPTION WHEN invalid_parameter_value THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('pg_cron does not understand the schedule %s', coalesce(quote_literal(schedule.schedule), 'NULL')),
            DETAIL = format('pg_cron says: %s.', SQLERRM),
            HINT = 'Nothing was changed. Five fields as in crontab: ''* * * * *'' is each minute. ''30 seconds'' needs pg_cron 1.5.';
    END;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.schedule(text) IS
$$Lets pg_cron run CALL procrastinate_stalled.sweep() as the current role in this database. Idempotent: it changes the
schedule of the existing job, or activates it again. Takes effect when the transaction commits.

Argument:
  schedule  five fields as in crontab; with pg_cron 1.5 or later also '1 second' to '59 seconds'
Returns the id of the pg_cron job (cron.job.jobid).
Errors, after which nothing is changed: object_not_in_prerequisite_state (pg_cron is absent, or in another database; the
HINT has the statement to run there), insufficient_privilege (no USAGE on schema cron), invalid_parameter_value (unknown
schedule), invalid_authorization_specification (the role cannot log in), duplicate_object (the role's job of that name sweeps another
database).$$;


CREATE OR REPLACE FUNCTION procrastinate_stalled.unschedule()
    RETURNS boolean
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '5s'
AS $$
DECLARE
    removed boolean := false;
    existing bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_cron')
        AND procrastinate_stalled._cron_database() IS NULL
    THEN
        RETURN false;
    END IF;

    PERFORM procrastinate_stalled._require_pg_cron();
    FOR existing IN
        SELECT jobid FROM cron.job WHERE jobname = 'procrastinate_stalled' AND database = current_database()
    LOOP
        removed := cron.unschedule(existing);
    END LOOP;
    RETURN removed;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.unschedule() IS
$$Removes the pg_cron job that sweeps this database: the current role's; called by a superuser, everybody's.

Returns whether there was one. Without pg_cron on the server there is none.
Errors: object_not_in_prerequisite_state (pg_cron is in another database; the HINT has the statement to run there),
insufficient_privilege (no USAGE on schema cron).$$;
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
-- Everything runs with the rights of its caller, and nobody has any here but the owner until he grants them.

REVOKE ALL ON SCHEMA procrastinate_stalled FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA procrastinate_stalled FROM PUBLIC;
