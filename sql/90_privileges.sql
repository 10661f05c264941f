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
