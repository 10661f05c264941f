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
