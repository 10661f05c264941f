-- The pg_cron job goes first: it would fail every minute for ever. Where pg_cron lives in another database it can only
-- be removed there, and another role's job only by that role or a superuser; a warning has the statement. Nothing of the
-- schema is called, and no name is looked up in the search_path: whoever may create schemas could have put code of his
-- own there.
DO $$
DECLARE
    is_installed CONSTANT bool := pg_catalog.to_regnamespace('procrastinate_stalled') IS NOT NULL;
    job pg_catalog.int8;
    sweepers pg_catalog.text;
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname OPERATOR(pg_catalog.=) 'pg_cron') THEN
        FOR job IN
            SELECT jobid
                FROM cron.job
                WHERE command OPERATOR(pg_catalog.=) 'CALL procrastinate_stalled.sweep()'
                    AND (
                        database OPERATOR(pg_catalog.=) pg_catalog.current_database()
                        -- The former name of a database that was renamed or restored from a dump.
                        OR NOT EXISTS (SELECT FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) database)
                    )
        LOOP
            PERFORM cron.unschedule(job);
            PERFORM pg_catalog.set_config('procrastinate_stalled.unscheduled', 'true', true);
        END LOOP;

        -- pg_cron shows the jobs of others to superusers only.
        SELECT pg_catalog.string_agg(pg_catalog.pg_get_userbyid(privilege.grantee)::pg_catalog.text, ', ')
            INTO sweepers
            FROM pg_catalog.pg_proc
            CROSS JOIN LATERAL pg_catalog.aclexplode(proacl) AS privilege
            WHERE pg_proc.oid OPERATOR(pg_catalog.=) pg_catalog.to_regprocedure('procrastinate_stalled.sweep(integer)')
                AND privilege.grantee OPERATOR(pg_catalog.<>) proowner
                AND NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) current_user);
        IF sweepers IS NOT NULL THEN
            RAISE WARNING 'the pg_cron job of another role that may sweep (%), if there is one, was not removed', sweepers
                USING HINT = 'As that role, or as a superuser: SELECT cron.unschedule(jobid) FROM cron.job WHERE command = ''CALL procrastinate_stalled.sweep()'';';
        END IF;
    ELSIF is_installed THEN
        BEGIN
            IF coalesce(pg_catalog.current_setting('cron.database_name', true), '') OPERATOR(pg_catalog.=) '' THEN
                RETURN;
            END IF;
        EXCEPTION WHEN insufficient_privilege THEN
            NULL; -- It is set, but only members of pg_read_all_settings may see it.
        END;
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = pg_catalog.format('pg_cron is not in database "%s"', pg_catalog.current_database());
    END IF;
EXCEPTION WHEN object_not_in_prerequisite_state OR insufficient_privilege THEN
    IF is_installed THEN
        RAISE WARNING 'the pg_cron job of procrastinate_stalled, if there is one, was not removed: %', SQLERRM
            USING HINT = pg_catalog.format(
                'In the database where pg_cron lives: SELECT cron.unschedule(jobid) FROM cron.job WHERE database = %L AND command = %L;   Or in the shell: procrastinate-stalled unschedule --cron-database ...',
                pg_catalog.current_database(), 'CALL procrastinate_stalled.sweep()'
            );
    END IF;
END;
$$;

DROP EXTENSION IF EXISTS procrastinate_stalled CASCADE;
DROP SCHEMA IF EXISTS procrastinate_stalled CASCADE;
