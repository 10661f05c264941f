-- The pg_cron job goes first: it would fail every minute for ever. Where pg_cron lives in another database it can only
-- be removed there; the warning has the statement.
DO $$
BEGIN
    IF to_regprocedure('procrastinate_stalled.unschedule()') IS NOT NULL THEN
        PERFORM procrastinate_stalled.unschedule();
    END IF;
EXCEPTION WHEN object_not_in_prerequisite_state OR insufficient_privilege THEN
    RAISE WARNING 'the pg_cron job of procrastinate_stalled, if there is one, was not removed: %', SQLERRM
        USING HINT = format(
            'In the database where pg_cron lives: SELECT cron.unschedule(jobid) FROM cron.job WHERE database = %L AND command = %L;',
            current_database(), 'CALL procrastinate_stalled.sweep()'
        );
END;
$$;

DROP SCHEMA IF EXISTS procrastinate_stalled CASCADE;
