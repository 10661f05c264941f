-- procrastinate_stalled: finds the stalled jobs of Procrastinate and retries them inside the database.
--
-- These files are read in their order and run in one transaction. What follows checks that they can succeed and
-- pins search_path for the rest of the transaction; each function below keeps that value (SET search_path FROM
-- CURRENT), because Procrastinate's triggers and functions call each other by unqualified names.

-- The one thing that depends on the caller's search_path: of several Procrastinates, which one is meant. From here on
-- nobody's objects but PostgreSQL's are found.
DO $$
BEGIN
    PERFORM pg_catalog.set_config('procrastinate_stalled.found_by_path', coalesce(pg_catalog.to_regclass('procrastinate_jobs')::pg_catalog.oid::pg_catalog.text, ''), true);
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    -- An upgrade that waits for a lock makes others wait behind it.
    PERFORM pg_catalog.set_config('lock_timeout', '10s', true);
    -- Where each statement is a transaction of its own, all that follow fail now, and not just the next one; within one
    -- transaction this changes nothing. The last statement of all takes it back.
    PERFORM pg_catalog.set_config('procrastinate_stalled.read_only', pg_catalog.current_setting('default_transaction_read_only'), false);
    PERFORM pg_catalog.set_config('default_transaction_read_only', 'on', false);
END;
$$;

DO $$
BEGIN
    IF pg_catalog.current_setting('search_path') OPERATOR(pg_catalog.<>) 'pg_catalog, pg_temp' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'no_active_sql_transaction',
            MESSAGE = 'this script must run in one transaction',
            DETAIL = 'The settings of one transaction, which the functions keep, are gone; so everything that follows fails too.',
            HINT = 'psql --single-transaction --set ON_ERROR_STOP=1 --file ...; or: procrastinate-stalled install';
    END IF;
END;
$$;

DO $$
DECLARE
    wanted_schema CONSTANT text := nullif(current_setting('procrastinate_stalled.procrastinate_schema', true), '');
    found_by_path CONSTANT oid := nullif(current_setting('procrastinate_stalled.found_by_path', true), '')::oid;
    extension CONSTANT pg_extension := (SELECT extension FROM pg_extension AS extension WHERE extname = 'procrastinate_stalled');
    present_owner CONSTANT name := (SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'procrastinate_stalled');
    -- Where the functions that are there already look for Procrastinate.
    present_schema CONSTANT text := (
        SELECT namespace.nspname
            FROM pg_proc
            CROSS JOIN unnest(proconfig) AS setting
            JOIN pg_namespace AS namespace ON setting = format('search_path=pg_catalog, %I, pg_temp', namespace.nspname)
            WHERE pg_proc.oid = to_regprocedure('procrastinate_stalled.version()')
    );
    as_extension boolean;
    restoring boolean;
    procrastinate_schema text;
    procrastinate_schemas text[];
    procrastinate_owners text[];
BEGIN
    -- Is this CREATE EXTENSION or ALTER EXTENSION? Outside of them this function is refused; inside, it finds no table 0.
    BEGIN
        PERFORM pg_extension_config_dump(0, '');
    EXCEPTION
        WHEN feature_not_supported THEN
            as_extension := false;
        WHEN undefined_table THEN
            as_extension := true;
    END;
    PERFORM set_config('procrastinate_stalled.as_extension', as_extension::text, true);

    IF extension.oid IS NOT NULL AND NOT as_extension THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('procrastinate_stalled is installed as an extension in database "%s"', current_database()),
            DETAIL = format('It has version %s. Only CREATE, ALTER and DROP EXTENSION change what belongs to an extension.', extension.extversion),
            HINT = 'Nothing was changed. To bring it up to date: ALTER EXTENSION procrastinate_stalled UPDATE; To install it another way, without its rules and records: DROP EXTENSION procrastinate_stalled; first.';
    ELSIF as_extension AND present_owner IS NOT NULL AND NOT EXISTS (
        SELECT
            FROM pg_depend
            WHERE classid = 'pg_namespace'::regclass
                AND objid = to_regnamespace('procrastinate_stalled')
                AND refclassid = 'pg_extension'::regclass
                AND refobjid = extension.oid
                AND deptype = 'e'
    ) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('procrastinate_stalled is already installed in database "%s", and not as an extension', current_database()),
            DETAIL = format('There is a schema "procrastinate_stalled" of role "%s", made by its migrations or its script.', present_owner),
            HINT = 'Nothing was changed. To bring it up to date the way it was installed: procrastinate-stalled install. To have it as an extension, without its rules and records: procrastinate-stalled uninstall; first.';
    END IF;

    -- The catalog is asked and not the search_path: CREATE EXTENSION replaces the path.
    SELECT array_agg(namespace.nspname ORDER BY namespace.nspname),
           array_agg(DISTINCT pg_get_userbyid(class.relowner))
        INTO procrastinate_schemas, procrastinate_owners
        FROM pg_class AS class
        JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
        WHERE class.relname = 'procrastinate_jobs' AND class.relkind IN ('r', 'p') AND class.relpersistence <> 't';

    -- What is in a schema of that name is about to be called, and who may create schemas could have made it first, with
    -- code of his own in it. And objects of two owners could be upgraded by neither.
    IF present_owner <> current_user THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('schema "procrastinate_stalled" belongs to role "%s"', present_owner),
            DETAIL = format('You are role "%s". Only its owner brings it up to date.', current_user),
            HINT = 'Nothing was changed. Connect as that role. If you do not know why it made the schema, look at what is in it, and drop it.';
    END IF;

    -- A dump creates extensions before tables: Procrastinate, and our own rows, come later. pg_dump and pg_restore begin
    -- with SET row_security = off, and nothing else tells a restore.
    restoring := as_extension
        AND present_owner IS NULL
        AND procrastinate_schemas IS NULL
        AND current_setting('row_security') = 'off';
    PERFORM set_config('procrastinate_stalled.restoring', restoring::text, true);
    IF restoring THEN
        PERFORM set_config('search_path', format('pg_catalog, %I, pg_temp', coalesce(wanted_schema, 'public')), true);
        RETURN;
    END IF;

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
    ELSIF present_schema = ANY (procrastinate_schemas) THEN
        procrastinate_schema := present_schema;
    ELSE
        SELECT namespace.nspname
            INTO procrastinate_schema
            FROM pg_class AS class
            JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
            WHERE class.oid = found_by_path
                AND namespace.nspname = ANY (procrastinate_schemas)
                -- Not a table that somebody else put into the path: his triggers would run with the rights of our callers.
                AND (cardinality(procrastinate_owners) = 1 OR pg_get_userbyid(class.relowner) = current_user);
        IF procrastinate_schema IS NULL THEN
            RAISE EXCEPTION USING
                ERRCODE = 'invalid_schema_name',
                MESSAGE = format('several schemas of database "%s" hold a Procrastinate', current_database()),
                DETAIL = format('The table "procrastinate_jobs" is in: %s. None of them is in the search_path', array_to_string(procrastinate_schemas, ', '))
                    || CASE cardinality(procrastinate_owners) WHEN 1 THEN '.' ELSE format(
                        ' and yours; the owners are: %s.', array_to_string(procrastinate_owners, ', ')
                    ) END,
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
        SELECT FROM pg_attribute
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

    IF present_owner IS NULL AND NOT has_database_privilege(current_database(), 'CREATE') THEN
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
    PERFORM set_config('procrastinate_stalled.present_version', '', true);
    IF to_regprocedure('procrastinate_stalled.version()') IS NOT NULL THEN
        PERFORM set_config('procrastinate_stalled.present_version', procrastinate_stalled.version(), true);
    END IF;
END;
$$;

CREATE SCHEMA IF NOT EXISTS procrastinate_stalled;

COMMENT ON SCHEMA procrastinate_stalled IS
    'Finds the stalled jobs of Procrastinate (status doing, worker dead) and retries them. Start with: SELECT * FROM procrastinate_stalled.status();';


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

DO $$
DECLARE
    present_version CONSTANT text := nullif(current_setting('procrastinate_stalled.present_version'), '');
BEGIN
    IF string_to_array(present_version, '.')::integer[] > string_to_array(procrastinate_stalled.version(), '.')::integer[] THEN
        RAISE EXCEPTION USING
            ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('procrastinate_stalled %s is installed in database "%s"', present_version, current_database()),
            DETAIL = format('This is the older version %s.', procrastinate_stalled.version()),
            HINT = 'Nothing was changed. Upgrade the package: pip install --upgrade procrastinate-stalled. If you use the command yoyo and the newer version came another way: yoyo mark, instead of yoyo apply.';
    END IF;
END;
$$;


CREATE OR REPLACE FUNCTION procrastinate_stalled._require_procrastinate()
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
DECLARE
    schema CONSTANT text := substring(current_setting('search_path') FROM '^pg_catalog, (.*), pg_temp$');
    missing text;
    elsewhere text;
BEGIN
    IF to_regclass('procrastinate_jobs') IS NOT NULL
        AND to_regclass('procrastinate_workers') IS NOT NULL
        AND to_regclass('procrastinate_events') IS NOT NULL
        AND EXISTS (
            SELECT
                FROM pg_attribute
                WHERE attrelid = to_regclass('procrastinate_jobs') AND attname = 'worker_id' AND NOT attisdropped
        )
    THEN
        RETURN;
    END IF;

    IF NOT has_schema_privilege(to_regnamespace(schema), 'USAGE') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role "%s" may not use schema %s, in which Procrastinate is looked for', current_user, schema),
            DETAIL = 'It has no USAGE on it.',
            HINT = format('As the owner: SELECT procrastinate_stalled.grant_monitor(%L); or grant_operator.', current_user);
    END IF;

    SELECT string_agg(name, ', ')
        INTO missing
        FROM unnest(ARRAY['procrastinate_jobs', 'procrastinate_workers', 'procrastinate_events']) AS name
        WHERE to_regclass(name) IS NULL;
    SELECT min(namespace.nspname::text)
        INTO elsewhere
        FROM pg_class AS class
        JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
        WHERE class.relname = 'procrastinate_jobs'
            AND class.relkind IN ('r', 'p')
            AND class.relpersistence <> 't'
            AND class.oid IS DISTINCT FROM to_regclass('procrastinate_jobs')
            -- Not one that anybody has put there.
            AND class.relowner = (SELECT nspowner FROM pg_namespace WHERE nspname = 'procrastinate_stalled');
    RAISE EXCEPTION USING
        ERRCODE = 'object_not_in_prerequisite_state',
        MESSAGE = format('there is no Procrastinate 3.1 or later in schema %s', schema),
        DETAIL = coalesce('Missing there: ' || missing || '.', 'Its procrastinate_jobs has no column worker_id.'),
        HINT = CASE WHEN elsewhere IS NOT NULL THEN format(
                'There is one in schema "%s". If it was moved there: SELECT procrastinate_stalled.set_procrastinate_schema(%L); Else: ', elsewhere, elsewhere
            ) ELSE '' END
            || 'Apply its schema if that was dropped (procrastinate --app=... schema --apply), or the migrations that it lacks. Everything here works again then, with its rules and records.';
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._require_procrastinate() IS
    'Raises object_not_in_prerequisite_state, with what is missing and the way out, unless Procrastinate is in the schema that these functions look in.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._require_writable()
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
DECLARE
    source text;
BEGIN
    IF NOT current_setting('transaction_read_only')::boolean THEN
        RETURN;
    END IF;
    SELECT settings.source
        INTO source
        FROM pg_settings AS settings
        WHERE settings.name = 'default_transaction_read_only' AND settings.setting = 'on';
    RAISE EXCEPTION USING
        ERRCODE = 'read_only_sql_transaction',
        MESSAGE = format('nothing can be changed in database "%s": the transaction is read-only', current_database()),
        DETAIL = CASE
            WHEN pg_is_in_recovery() THEN 'This server is a standby.'
            WHEN source IS NULL THEN 'The transaction was made so by a statement.'
            ELSE format('default_transaction_read_only is on. Where that was set: %s.', source)
        END,
        HINT = 'Nothing was changed. ' || CASE
            WHEN pg_is_in_recovery() THEN 'Connect to the primary.'
            WHEN source IS NULL THEN 'Call it in a transaction that is READ WRITE.'
            ELSE 'For this session: SET default_transaction_read_only = off;' || CASE source
                WHEN 'database' THEN format(
                    ' For all: ALTER DATABASE %I RESET default_transaction_read_only;', current_database()
                )
                WHEN 'user' THEN format(' For all: ALTER ROLE %I RESET default_transaction_read_only;', session_user)
                WHEN 'database user' THEN format(
                    ' For all: ALTER ROLE %I IN DATABASE %I RESET default_transaction_read_only;', session_user, current_database()
                )
                ELSE ''
            END
        END;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._require_writable() IS
    'Raises read_only_sql_transaction, with what made it so and the way out, if the transaction is read-only.';


CREATE OR REPLACE FUNCTION procrastinate_stalled.set_procrastinate_schema(
    schema text
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '5s'
AS $$
DECLARE
    missing CONSTANT text := (
        SELECT string_agg(name, ', ')
            FROM unnest(ARRAY['procrastinate_jobs', 'procrastinate_workers', 'procrastinate_events']) AS name
            WHERE NOT EXISTS (
                SELECT
                    FROM pg_class AS class
                    JOIN pg_namespace AS namespace ON namespace.oid = class.relnamespace
                    WHERE namespace.nspname = schema AND class.relname = name AND class.relkind IN ('r', 'p')
            )
    );
    owners CONSTANT text := (
        SELECT string_agg(DISTINCT format('"%s"', pg_get_userbyid(proowner)), ', ')
            FROM pg_proc
            WHERE pronamespace = 'procrastinate_stalled'::regnamespace AND NOT pg_has_role(proowner, 'USAGE')
    );
    routine regprocedure;
BEGIN
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_schema_name',
            MESSAGE = format('schema %s has no Procrastinate', coalesce('"' || schema || '"', 'NULL')),
            DETAIL = format('Missing there: %s.', missing),
            HINT = 'Nothing was changed. Where it is: SELECT schemaname FROM pg_tables WHERE tablename = ''procrastinate_jobs'';';
    END IF;
    IF owners IS NOT NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role "%s" may not change the functions of procrastinate_stalled', current_user),
            DETAIL = format('Their owner is %s.', owners),
            HINT = 'Nothing was changed. Call it as the owner, or as a superuser.';
    END IF;
    PERFORM procrastinate_stalled._require_writable();

    FOR routine IN
        SELECT oid::regprocedure
            FROM pg_proc
            WHERE pronamespace = 'procrastinate_stalled'::regnamespace
                AND EXISTS (SELECT FROM unnest(proconfig) AS setting WHERE setting LIKE 'search\_path=%')
            ORDER BY oid
    LOOP
        EXECUTE format('ALTER ROUTINE %s SET search_path = pg_catalog, %I, pg_temp', routine, schema);
    END LOOP;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.set_procrastinate_schema(text) IS
$$Lets all functions here look for Procrastinate in another schema: after it was moved, or after a dump of a database was
restored in which this product is an extension. The install finds the schema by itself.

Argument:
  schema  the name of the schema, as pg_namespace has it (upper and lower case count)
Errors, after which nothing is changed: invalid_schema_name (it has not all of procrastinate_jobs, procrastinate_workers and
procrastinate_events), insufficient_privilege (only the owner may call it), read_only_sql_transaction.$$;
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
-- Pauses: rules in front of all others that ignore jobs until they expire. A sweep judges each batch anew, so a pause
-- counts from the next batch on.

CREATE OR REPLACE FUNCTION procrastinate_stalled.pause(
    duration interval DEFAULT '1 hour',
    queue text DEFAULT NULL,
    task_name text DEFAULT NULL,
    reason text DEFAULT NULL
)
    RETURNS procrastinate_stalled.rules
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '5s'
AS $$
#variable_conflict use_column
DECLARE
    new_name CONSTANT text := 'pause'
        || coalesce(' queue ' || quote_literal(pause.queue), '')
        || coalesce(' task ' || quote_literal(pause.task_name), '');
    new_rule procrastinate_stalled.rules;
    former record;
BEGIN
    -- A comparison takes a year for 360 days and the epoch for 365.25.
    IF (pause.duration > '0' AND pause.duration <= '10 years'
        AND extract(epoch FROM pause.duration) BETWEEN 0 AND extract(epoch FROM interval '10 years')) IS NOT TRUE
    THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'duration must be longer than 0 and at most 10 years',
            DETAIL = format('It is %s.', coalesce(pause.duration::text, 'NULL')),
            HINT = 'Nothing was changed. Example: SELECT procrastinate_stalled.pause(''2 hours'', reason => ''deployment'');';
    END IF;
    IF pause.task_name ~ '(^|[^\\])(\\\\)*\\$' THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'task_name must be a LIKE pattern',
            DETAIL = format('"%s" ends in an escape character.', pause.task_name),
            HINT = 'Nothing was changed. Examples: billing.% for all tasks of a module, billing\_send for an underscore as it stands.';
    END IF;

    PERFORM procrastinate_stalled._require_writable();
    DELETE FROM procrastinate_stalled.rules
        WHERE position = -2147483648 AND expires_at <= now();
    SELECT expires_at, note
        INTO former
        FROM procrastinate_stalled.rules
        WHERE name = new_name AND enabled;
    INSERT INTO procrastinate_stalled.rules (name, position, expires_at, queue_name, task_name, action, note)
        VALUES (new_name, -2147483648, now() + pause.duration, pause.queue, pause.task_name, 'ignore', pause.reason)
        ON CONFLICT (name) DO UPDATE
            SET enabled = true, expires_at = excluded.expires_at, note = excluded.note,
                queue_name = excluded.queue_name, task_name = excluded.task_name, args = NULL
            WHERE rules.position = -2147483648
        RETURNING *
        INTO new_rule;
    IF new_rule.name IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('there is a rule "%s" already', new_name),
            DETAIL = 'It was not made by pause(), which would give its own rule this name.',
            HINT = 'Nothing was changed. Give that rule another name.';
    END IF;
    IF former.expires_at > new_rule.expires_at THEN
        RAISE NOTICE USING
            MESSAGE = format('procrastinate_stalled: "%s" ends sooner now', new_name),
            DETAIL = format('It was to last until %s%s.', former.expires_at, ' (' || former.note || ')'),
            HINT = 'Ask who made it, or pause for longer.';
    END IF;
    RETURN new_rule;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.pause(interval, text, text, text) IS
$$Lets sweeps leave jobs alone for a while, whatever other rules say, a run_timeout too. It adds a rule in front of all
others that ignores the matching jobs until it expires. Called again for the same jobs, it sets the end and the reason
anew; a notice says so if it ends sooner now. A batch that a sweep is writing at this moment is still written; the next
one obeys. retry_job() does not.

Arguments, all optional:
  duration   from now on, longer than 0 and at most 10 years
  queue      only jobs of exactly this queue
  task_name  only jobs whose task name is LIKE this pattern
  reason     for those who read status(), or the sentences of explain_job()
Returns the new row of rules.
Errors, after which nothing is changed: invalid_parameter_value (duration, task_name), duplicate_object (another rule has
the name), read_only_sql_transaction.$$;


CREATE OR REPLACE FUNCTION procrastinate_stalled._end_of_pause(
    pause procrastinate_stalled.rules
)
    RETURNS text
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    IF pause.position > -2147483648 OR pause.args IS NOT NULL THEN
        RETURN format('DELETE FROM procrastinate_stalled.rules WHERE name = %L;', pause.name);
    END IF;
    RETURN format('SELECT procrastinate_stalled.resume(%s);', concat_ws(', ',
        'queue => ' || quote_literal(pause.queue_name), 'task_name => ' || quote_literal(pause.task_name)
    ));
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._end_of_pause(procrastinate_stalled.rules) IS
    'The statement that ends a pause: one that pause() made, or a rule of the user''s.';


CREATE OR REPLACE FUNCTION procrastinate_stalled.resume(
    queue text DEFAULT NULL,
    task_name text DEFAULT NULL
)
    RETURNS boolean
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '5s'
AS $$
#variable_conflict use_column
DECLARE
    removed boolean;
    others record;
BEGIN
    PERFORM procrastinate_stalled._require_writable();
    WITH pause AS (
        DELETE FROM procrastinate_stalled.rules
            WHERE position = -2147483648
                AND queue_name IS NOT DISTINCT FROM resume.queue
                AND task_name IS NOT DISTINCT FROM resume.task_name
                AND args IS NULL
            RETURNING enabled AND expires_at > now() AS in_force
    )
    SELECT coalesce(bool_or(in_force), false)
        INTO removed
        FROM pause;

    SELECT string_agg(format('"%s", until %s', name, expires_at), '; ' ORDER BY position, name) AS pauses,
           string_agg(procrastinate_stalled._end_of_pause(rules), ' ' ORDER BY position, name) AS remedy
        INTO others
        FROM procrastinate_stalled.rules
        WHERE enabled AND expires_at > now() AND action = 'ignore';
    IF others.pauses IS NOT NULL THEN
        RAISE NOTICE USING
            MESSAGE = 'procrastinate_stalled: other pauses are still in force',
            DETAIL = others.pauses,
            HINT = others.remedy;
    END IF;
    RETURN removed;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.resume(text, text) IS
$$Ends the pause that was made with the same arguments. A notice names the pauses that are still in force.

Arguments, all optional:
  queue      as given to pause()
  task_name  as given to pause()
Returns whether that pause was in force.
Errors: read_only_sql_transaction.$$;
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


CREATE OR REPLACE FUNCTION procrastinate_stalled._job_name_elsewhere(
    database text DEFAULT current_database()
)
    RETURNS text
    LANGUAGE plpgsql
    IMMUTABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    -- pg_cron keeps one job per name and role, so the name says which database it is for. Before pg_cron 1.5 the column
    -- takes 63 bytes, and cuts off what is longer.
    RETURN 'procrastinate_stalled ' || CASE
        WHEN octet_length(database) > 41 THEN hashtextextended(database, 0)::text
        ELSE database
    END;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._job_name_elsewhere(text) IS
    'The name of the job that sweeps a database, where pg_cron lives in another one.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._require_login()
    RETURNS void
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    IF NOT (SELECT rolcanlogin FROM pg_roles WHERE rolname = current_user) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'invalid_authorization_specification',
            MESSAGE = format('role "%s" cannot log in, so every run of its job would fail', current_user),
            DETAIL = 'pg_cron runs a job as the role that scheduled it.',
            HINT = 'Schedule as a role that can log in (RESET ROLE), or ALTER ROLE ... LOGIN.';
    END IF;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._require_login() IS
    'Raises invalid_authorization_specification unless the current role can log in, as pg_cron must for it.';


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
    cron_database := procrastinate_stalled._cron_database();
    -- CREATE DATABASE ... TEMPLATE copies the extension too, but pg_cron does not read what is in the copy.
    IF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_cron')
        OR nullif(cron_database, '') <> current_database()
    THEN
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
                HINT = format(
                    'In the shell: procrastinate-stalled schedule%s --cron-database %s   Or there, as role "%s" with USAGE on schema cron and EXECUTE on this function: SELECT cron.schedule_in_database(%L, %L, %L, %L);   To end it, there: SELECT cron.unschedule(jobid) FROM cron.job WHERE database = %L AND command = %L;',
                    CASE WHEN schedule <> '* * * * *' THEN format(' %L', schedule) ELSE '' END,
                    CASE WHEN cron_database = '' THEN '...' WHEN cron_database ~ '^\w+$' THEN cron_database ELSE quote_literal(cron_database) END,
                    -- Not with the role as fifth argument: pg_cron refuses that to all but superusers, even where it is their own.
                    current_user, procrastinate_stalled._job_name_elsewhere(), schedule, 'CALL procrastinate_stalled.sweep()', current_database(),
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


CREATE OR REPLACE FUNCTION procrastinate_stalled._cron_jobs()
    RETURNS jsonb
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN (
        SELECT coalesce(jsonb_agg(jsonb_build_object(
                   'jobid', jobid,
                   'jobname', jobname,
                   'schedule', schedule,
                   'command', command,
                   'database', database,
                   'username', username,
                   'active', active,
                   'nodeport', nodeport
               )), '[]')
            FROM cron.job
            WHERE jobname LIKE 'procrastinate\_stalled%' OR command = 'CALL procrastinate_stalled.sweep()'
    );
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._cron_jobs() IS
    'The rows of cron.job that may have to do with procrastinate_stalled, of any database: an array of objects.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._classify_cron_jobs(
    jobs jsonb,
    cron_database text
)
    RETURNS TABLE (
        jobid bigint,
        schedule text,
        command text,
        database text,
        username text,
        active boolean,
        nodeport integer,
        last_run jsonb,
        can_log_in boolean,
        sweeps text
    )
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
#variable_conflict use_column
DECLARE
    own_name CONSTANT text := CASE
        WHEN cron_database = current_database() THEN 'procrastinate_stalled'
        ELSE procrastinate_stalled._job_name_elsewhere()
    END;
BEGIN
    RETURN QUERY
        SELECT job.jobid,
               job.schedule,
               job.command,
               job.database,
               job.username,
               job.active,
               job.nodeport,
               job.last_run,
               (SELECT rolcanlogin FROM pg_roles WHERE rolname = job.username),
               CASE
                   WHEN job.database <> current_database() THEN CASE
                       WHEN EXISTS (SELECT FROM pg_database WHERE datname = job.database) THEN
                           CASE WHEN job.jobname = own_name THEN 'another' ELSE 'not ours' END
                       WHEN job.jobname = own_name THEN 'lost'
                       ELSE 'nothing'
                   END
                   WHEN job.jobname IN ('procrastinate_stalled', procrastinate_stalled._job_name_elsewhere())
                       OR job.command = 'CALL procrastinate_stalled.sweep()'
                   THEN 'this'
                   ELSE 'not ours'
               END
            FROM jsonb_to_recordset(jobs) AS job (
                jobid bigint,
                jobname text,
                schedule text,
                command text,
                database text,
                username text,
                active boolean,
                nodeport integer,
                last_run jsonb
            )
            ORDER BY job.active DESC, job.jobid;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._classify_cron_jobs(jsonb, text) IS
$$Says which database each of some pg_cron jobs sweeps; active ones first.

Arguments:
  jobs           as _cron_jobs() returns them
  cron_database  the database in which they were read
Returns sweeps, besides columns of cron.job and whether the role can log in:
  this      this database
  another   it has the name of the job for this database, but sweeps another one
  lost      the same, and that other database does not exist: this one was renamed, or restored from a dump
  nothing   it has another name, and sweeps a database that does not exist
  not ours  none of these$$;


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
    PERFORM procrastinate_stalled._require_login();
    PERFORM procrastinate_stalled._require_writable();

    SELECT jobid, job.schedule, job.command, database, active, nodeport
        INTO existing
        FROM cron.job AS job
        WHERE jobname = 'procrastinate_stalled' AND username = current_user;
    -- Where that database does not exist, this one was renamed or restored from a dump, which has pg_cron's jobs in it.
    IF existing.database <> current_database()
        AND EXISTS (SELECT FROM pg_database WHERE datname = existing.database)
    THEN
        RAISE EXCEPTION USING
            ERRCODE = 'duplicate_object',
            MESSAGE = format('role "%s" has a pg_cron job "procrastinate_stalled" for another database', current_user),
            DETAIL = format('Job %s sweeps database "%s"; pg_cron keeps one job per name and role.', existing.jobid, existing.database),
            HINT = format('If it shall not do that: SELECT cron.unschedule(%s); and then schedule again. Otherwise schedule one of the two databases as another role.', existing.jobid);
    END IF;
    IF existing.schedule = schedule.schedule
        AND existing.command = command
        AND existing.database = current_database()
        AND existing.nodeport = current_setting('port')::integer
        AND existing.active
    THEN
        RETURN existing.jobid;
    END IF;

    -- cron.schedule leaves an existing job inactive, and in the database and on the port that it had. Only a superuser may
    -- call cron.alter_job.
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
schedule of the existing job, or activates it again. A job that has come here with a dump, or is for the former name of
this database, is set right. Takes effect when the transaction commits.

Argument:
  schedule  five fields as in crontab; with pg_cron 1.5 or later also '1 second' to '59 seconds'
Returns the id of the pg_cron job (cron.job.jobid).
Errors, after which nothing is changed: object_not_in_prerequisite_state (pg_cron is absent, or in another database; the
HINT has the statement to run there), insufficient_privilege (no USAGE on schema cron), invalid_parameter_value (unknown
schedule), invalid_authorization_specification (the role cannot log in), duplicate_object (the role's job of that name sweeps another
database), read_only_sql_transaction.$$;


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
    PERFORM procrastinate_stalled._require_writable();
    FOR existing IN
        SELECT jobid
            FROM procrastinate_stalled._classify_cron_jobs(procrastinate_stalled._cron_jobs(), current_database())
            WHERE sweeps IN ('this', 'lost')
    LOOP
        removed := cron.unschedule(existing);
    END LOOP;
    RETURN removed;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.unschedule() IS
$$Removes the pg_cron job that sweeps this database, or did so under its former name: the current role's; called by a
superuser, everybody's.

Returns whether there was one. Without pg_cron on the server there is none.
Errors: object_not_in_prerequisite_state (pg_cron is in another database; the HINT has the statement to run there),
insufficient_privilege (no USAGE on schema cron), read_only_sql_transaction.$$;
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
-- Who may do what. Everything runs with the rights of its caller, and nobody has any here but the owner until he grants
-- them. docs/privileges.md has the whole table.

CREATE OR REPLACE FUNCTION procrastinate_stalled._privileges(
    for_operator boolean
)
    RETURNS TABLE (
        kind text,
        object oid,
        object_name text,
        owner oid,
        column_name name,
        privilege text
    )
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH our_schema AS (
        SELECT oid
            FROM pg_namespace
            WHERE nspname = 'procrastinate_stalled'
    ), table_privilege (table_name, column_name, privilege, only_operator) AS (
        SELECT table_name, NULL::name, 'SELECT', false
            FROM unnest(ARRAY[
                'procrastinate_jobs', 'procrastinate_workers', 'procrastinate_events',
                'procrastinate_stalled.rules', 'procrastinate_stalled.settings', 'procrastinate_stalled.rescues',
                'procrastinate_stalled.sweeps', 'procrastinate_stalled.orphans'
            ]) AS table_name
        UNION ALL
        -- What a rescue changes in a job.
        SELECT 'procrastinate_jobs', column_name, 'UPDATE', true
            FROM unnest(ARRAY[
                'status', 'attempts', 'scheduled_at', 'queue_name', 'priority', 'lock', 'abort_requested', 'worker_id'
            ]::name[]) AS column_name
        UNION ALL
        -- To lock the row of a worker takes the right to update some column. This one is GENERATED ALWAYS, so nobody can
        -- choose its value. But SET id = DEFAULT gives a worker that has no jobs the next one, and its heartbeats get lost.
        SELECT 'procrastinate_workers', 'id', 'UPDATE', true
        UNION ALL
        -- Procrastinate's triggers write its events with the rights of who updates the job.
        SELECT 'procrastinate_events', column_name, 'INSERT', true
            FROM unnest(ARRAY['job_id', 'type', 'at']::name[]) AS column_name
        UNION ALL
        -- Not rescued_at and rescued_by: their defaults tell the truth.
        SELECT 'procrastinate_stalled.rescues', column_name, 'INSERT', true
            FROM unnest(ARRAY[
                'job_id', 'queue_name', 'task_name', 'action', 'reason', 'detail', 'rule_name', 'worker_id',
                'last_heartbeat', 'started_at', 'attempts', 'scheduled_at'
            ]::name[]) AS column_name
        UNION ALL
        SELECT 'procrastinate_stalled.sweeps', column_name, 'INSERT', true
            FROM unnest(ARRAY['doing', 'latest_heartbeat', 'newest_worker_id']::name[]) AS column_name
        UNION ALL
        SELECT 'procrastinate_stalled.sweeps', column_name, 'UPDATE', true
            FROM unnest(ARRAY[
                'retried', 'failed', 'aborted', 'waiting', 'held', 'held_reason', 'duration', 'error'
            ]::name[]) AS column_name
        UNION ALL
        SELECT 'procrastinate_stalled.orphans', column_name, 'INSERT', true
            FROM unnest(ARRAY['job_id', 'attempts']::name[]) AS column_name
        UNION ALL
        SELECT 'procrastinate_stalled.orphans', NULL, 'DELETE', true
    )
    SELECT 'SCHEMA', namespace.oid, namespace.oid::regnamespace::text, namespace.nspowner, NULL::name, 'USAGE'
        FROM pg_namespace AS namespace
        WHERE namespace.oid IN (
            SELECT oid FROM our_schema
            UNION
            SELECT relnamespace FROM pg_class WHERE oid = to_regclass('procrastinate_jobs')
        )
    UNION ALL
    SELECT 'TABLE',
           class.oid,
           format('%s.%I', class.relnamespace::regnamespace, class.relname),
           class.relowner,
           table_privilege.column_name,
           table_privilege.privilege
        FROM table_privilege
        JOIN pg_class AS class ON class.oid = to_regclass(table_privilege.table_name)
        WHERE for_operator OR NOT table_privilege.only_operator
    UNION ALL
    SELECT 'SEQUENCE',
           class.oid,
           format('%s.%I', class.relnamespace::regnamespace, class.relname),
           class.relowner,
           NULL,
           'USAGE'
        FROM pg_class AS class
        -- The events' ids are no identity column, so who writes an event takes the number himself.
        WHERE for_operator AND class.oid = pg_get_serial_sequence('procrastinate_events', 'id')::regclass
    UNION ALL
    SELECT 'FUNCTION', routine.oid, routine.oid::regprocedure::text, routine.proowner, NULL, 'EXECUTE'
        FROM pg_proc AS routine
        JOIN our_schema ON our_schema.oid = routine.pronamespace
        WHERE routine.prokind = 'f'
            AND (
                -- Only what reads can be other than VOLATILE: PostgreSQL refuses commands that write or lock in such a
                -- function. The functions that it calls need the caller's own right.
                routine.provolatile <> 'v'
                OR (for_operator AND routine.proname IN (
                    'retry_job', 'retry_stalled_jobs', '_begin_sweep', '_end_sweep', '_lock_tables', '_note_orphans',
                    '_notify', '_rescue', '_rescue_batch'
                ))
            );
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._privileges(boolean) IS
    'What a monitor must be granted, or an operator: each privilege with its object, the owner of that, and the column, if it is for one column only.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._has_privilege(
    role_name name,
    kind text,
    object oid,
    column_name name,
    privilege text
)
    RETURNS boolean
    LANGUAGE plpgsql
    STABLE
    SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN CASE
        WHEN kind = 'SCHEMA' THEN has_schema_privilege(role_name, object, privilege)
        WHEN kind = 'SEQUENCE' THEN has_sequence_privilege(role_name, object, privilege)
        WHEN kind = 'FUNCTION' THEN has_function_privilege(role_name, object, privilege)
        WHEN column_name IS NULL THEN has_table_privilege(role_name, object, privilege)
        ELSE has_column_privilege(role_name, object, column_name::text, privilege)
    END;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._has_privilege(name, text, oid, name, text) IS
    'Whether the role has the privilege, by whatever way; of the privilege of _privileges(), or that WITH GRANT OPTION.';


CREATE OR REPLACE FUNCTION procrastinate_stalled._grant(
    role text,
    for_operator boolean
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
    SET lock_timeout = '5s'
AS $$
DECLARE
    lacking record;
    missing record;
BEGIN
    -- GRANT takes the name public for everybody, quoted too; no role can have it.
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
        RAISE EXCEPTION USING
            ERRCODE = 'undefined_object',
            MESSAGE = format('there is no role %s', coalesce(quote_ident(role), 'NULL')),
            DETAIL = CASE role
                WHEN 'public' THEN 'PUBLIC stands for every role that there is or will be.'
                ELSE 'pg_roles does not have it. Upper and lower case count.'
            END,
            HINT = 'Nothing was granted. Name one role, or CREATE ROLE it first; a group of people is a role that others are members of.';
    END IF;

    PERFORM procrastinate_stalled._require_procrastinate();
    -- A GRANT of what one may not grant is only a warning.
    SELECT count(*) AS number,
           (array_agg(format('%s on %s', needed.privilege, needed.object_name) ORDER BY needed.kind <> 'SCHEMA', needed.kind <> 'TABLE', needed.object_name))[1] AS example,
           string_agg(DISTINCT pg_get_userbyid(needed.owner)::text, ', ') AS owners
        INTO lacking
        FROM procrastinate_stalled._privileges(for_operator) AS needed
        WHERE NOT procrastinate_stalled._has_privilege(current_user, needed.kind, needed.object, needed.column_name, needed.privilege || ' WITH GRANT OPTION')
            AND NOT procrastinate_stalled._has_privilege(role::name, needed.kind, needed.object, needed.column_name, needed.privilege);
    IF lacking.number > 0 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('role "%s" may not grant all that role "%s" needs', current_user, role),
            DETAIL = format('It lacks the right to grant %s privileges, such as %s.', lacking.number, lacking.example),
            HINT = format('Nothing was granted. Call it as the owner of these objects (%s); if there are several, as a role that is a member of each; or as a superuser.', lacking.owners);
    END IF;
    PERFORM procrastinate_stalled._require_writable();

    FOR missing IN
        SELECT *
            FROM procrastinate_stalled._privileges(for_operator) AS needed
            WHERE procrastinate_stalled._has_privilege(current_user, needed.kind, needed.object, needed.column_name, needed.privilege || ' WITH GRANT OPTION')
    LOOP
        EXECUTE format(
            'GRANT %s%s ON %s %s TO %I',
            missing.privilege, ' (' || quote_ident(missing.column_name) || ')', missing.kind, missing.object_name, role
        );
    END LOOP;
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled._grant(text, boolean) IS
    'Grants a role the privileges of _privileges(), all or none. Raises undefined_object, insufficient_privilege or read_only_sql_transaction.';


CREATE OR REPLACE FUNCTION procrastinate_stalled.grant_monitor(
    role text
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
AS $$
BEGIN
    PERFORM procrastinate_stalled._grant(role, for_operator => false);
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.grant_monitor(text) IS
$$Lets a role look: at status(), get_stalled_jobs(), explain_job(), explain_jobs(), workers(), task_runtimes(), version(), at
the tables of procrastinate_stalled, and at Procrastinate's jobs, workers and events. It can change nothing. Call it again
after an upgrade, for functions that are new. It takes nothing away.

Argument:
  role  the name of an existing role, as pg_roles has it (upper and lower case count)
Call it as the owner of procrastinate_stalled and of Procrastinate's tables.
Errors, after which nothing is granted: undefined_object (no such role), insufficient_privilege (the caller may not grant
it; the HINT says who may), read_only_sql_transaction.$$;


CREATE OR REPLACE FUNCTION procrastinate_stalled.grant_operator(
    role text
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
AS $$
BEGIN
    PERFORM procrastinate_stalled._grant(role, for_operator => true);
END;
$$;

COMMENT ON FUNCTION procrastinate_stalled.grant_operator(text) IS
$$Lets a role do what grant_monitor() allows, and call retry_job() and retry_stalled_jobs(). These run with the role's own
rights, so it may then also UPDATE those columns of procrastinate_jobs that a rescue changes, INSERT into
procrastinate_events, and write the records of rescues and sweeps, but not delete them, nor say that another role did it.
Not: rules, settings, pause(), resume(), schedule(), sweep(). Call it again after an upgrade, for functions that are new.

Argument:
  role  the name of an existing role, as pg_roles has it (upper and lower case count)
Call it as the owner of procrastinate_stalled and of Procrastinate's tables.
Errors, after which nothing is granted: undefined_object (no such role), insufficient_privilege (the caller may not grant
it; the HINT says who may), read_only_sql_transaction.$$;


-- Default privileges may have given PUBLIC more than PostgreSQL does.
REVOKE ALL ON SCHEMA procrastinate_stalled FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA procrastinate_stalled FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA procrastinate_stalled FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA procrastinate_stalled FROM PUBLIC;
-- As an extension: what the user set and what was done belongs into a dump, and so do the counters of the ids.

DO $$
DECLARE
    relation regclass;
BEGIN
    IF NOT current_setting('procrastinate_stalled.as_extension')::boolean THEN
        RETURN;
    END IF;
    FOR relation IN
        SELECT oid
            FROM pg_class
            WHERE relnamespace = 'procrastinate_stalled'::regnamespace
                AND relkind IN ('r', 'S')
                AND EXISTS (
                    SELECT
                        FROM pg_depend
                        WHERE classid = 'pg_class'::regclass AND objid = pg_class.oid AND deptype = 'e'
                )
            ORDER BY oid
    LOOP
        PERFORM pg_extension_config_dump(relation, '');
    END LOOP;
END;
$$;
-- The end of the transaction that 10_prerequisites.sql wants.

DO $$
BEGIN
    PERFORM set_config('default_transaction_read_only', current_setting('procrastinate_stalled.read_only'), false);
END;
$$;
