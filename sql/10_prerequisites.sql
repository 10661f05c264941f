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
