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
