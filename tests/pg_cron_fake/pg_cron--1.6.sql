-- Stands in for pg_cron 1.6 on test servers that have none: the same tables, rights, functions and errors, but in
-- PL/pgSQL, and nothing runs the jobs. Taken from its SQL scripts and from src/job_metadata.c and src/entry.c.
-- tests/test_pg_cron.py is run against this and against the real one.
--
-- Not as there: every role may see cron.database_name, and cron._schedule and its like believe the name that they get.

\echo Use "CREATE EXTENSION pg_cron" to load this file. \quit

DO $$
BEGIN
    IF current_database() <> current_setting('cron.database_name') THEN
        RAISE EXCEPTION USING
            MESSAGE = format('can only create extension in database %s', current_setting('cron.database_name')),
            DETAIL = 'Jobs must be scheduled from the database configured in cron.database_name, since the pg_cron background worker reads job descriptions from this database.',
            HINT = format('Add cron.database_name = ''%s'' in postgresql.conf to use the current database.', current_database());
    END IF;
END;
$$;

CREATE SCHEMA cron;

CREATE SEQUENCE cron.jobid_seq;
CREATE TABLE cron.job (
    jobid bigint PRIMARY KEY DEFAULT nextval('cron.jobid_seq'),
    schedule text NOT NULL,
    command text NOT NULL,
    nodename text NOT NULL DEFAULT 'localhost',
    nodeport integer NOT NULL DEFAULT inet_server_port(),
    database text NOT NULL DEFAULT current_database(),
    username text NOT NULL DEFAULT current_user,
    active boolean NOT NULL DEFAULT true,
    jobname text,
    CONSTRAINT jobname_username_uniq UNIQUE (jobname, username)
);
GRANT SELECT ON cron.job TO PUBLIC;
ALTER TABLE cron.job ENABLE ROW LEVEL SECURITY;
CREATE POLICY cron_job_policy ON cron.job USING (username = current_user);

CREATE SEQUENCE cron.runid_seq;
CREATE TABLE cron.job_run_details (
    jobid bigint,
    runid bigint PRIMARY KEY DEFAULT nextval('cron.runid_seq'),
    job_pid integer,
    database text,
    username text,
    command text,
    status text,
    return_message text,
    start_time timestamp with time zone,
    end_time timestamp with time zone
);
GRANT SELECT, DELETE ON cron.job_run_details TO PUBLIC;
ALTER TABLE cron.job_run_details ENABLE ROW LEVEL SECURITY;
CREATE POLICY cron_job_run_details_policy ON cron.job_run_details USING (username = current_user);

GRANT SELECT ON SEQUENCE cron.jobid_seq, cron.runid_seq TO PUBLIC;
SELECT pg_extension_config_dump('cron.job', '');
SELECT pg_extension_config_dump('cron.jobid_seq', '');
SELECT pg_extension_config_dump('cron.job_run_details', '');
SELECT pg_extension_config_dump('cron.runid_seq', '');


-- What pg_cron's parser accepts, a descendant of Vixie's cron: it ignores what follows a number or an asterisk in its
-- field, and what follows the last field.
CREATE FUNCTION cron._is_schedule(schedule text)
    RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    months CONSTANT text[] := '{jan,feb,mar,apr,may,jun,jul,aug,sep,oct,nov,dec}';
    days CONSTANT text[] := '{sun,mon,tue,wed,thu,fri,sat}';
    lowest CONSTANT integer[] := '{0,0,1,1,0}';
    highest CONSTANT integer[] := '{59,23,31,12,7}';
    names text[];
    rest text;
    range text[];
    first integer;
    last integer;
    step integer;
BEGIN
    IF lower(schedule) ~ '^\s*\+?0*([1-9]|[1-5][0-9])\s*second(s\s*)?$' THEN
        RETURN true;
    END IF;
    IF octet_length(schedule) >= 1000 THEN
        RETURN false;
    END IF;

    rest := regexp_replace(schedule, '^([ \t]*(#[^\n]*)?\n)*[ \t]*', '');
    IF rest LIKE '@%' THEN
        RETURN substring(rest FROM '^@([^ \t\n]*)') IN (
            'reboot', 'restart', 'yearly', 'annually', 'monthly', 'weekly', 'daily', 'midnight', 'hourly'
        );
    END IF;

    FOR field IN 1..5 LOOP
        names := CASE field WHEN 4 THEN months WHEN 5 THEN days END;
        IF field = 3 AND rest ~ '^\$[ \t]' THEN
            rest := regexp_replace(rest, '^\$[ \t]+', '');
            CONTINUE;
        END IF;
        LOOP
            range := regexp_match(rest, '^(?:(\*)|([A-Za-z0-9]+)(-[A-Za-z0-9]*)?)(/[A-Za-z0-9]*)?');
            IF range IS NULL THEN
                RETURN false;
            END IF;
            rest := substr(rest, 1 + length(concat(range[1], range[2], range[3], range[4])));

            IF range[1] = '*' THEN
                first := lowest[field];
                last := highest[field];
            ELSE
                first := cron._number(range[2], names, lowest[field]);
                last := CASE WHEN range[3] IS NULL THEN first ELSE cron._number(substr(range[3], 2), names, lowest[field]) END;
                IF range[3] IS NULL AND range[4] IS NOT NULL THEN
                    RETURN false;
                END IF;
            END IF;
            step := CASE WHEN range[4] IS NULL THEN 1 ELSE cron._number(substr(range[4], 2), NULL, 0) END;
            IF (first BETWEEN lowest[field] AND highest[field]
                AND last BETWEEN lowest[field] AND highest[field]
                AND step BETWEEN 1 AND highest[field]) IS NOT TRUE
            THEN
                RETURN false;
            END IF;

            EXIT WHEN rest NOT LIKE ',%';
            rest := substr(rest, 2);
        END LOOP;
        rest := regexp_replace(rest, '^[^ \t\n]*[ \t]*', '');
    END LOOP;
    RETURN true;
END;
$$;

CREATE FUNCTION cron._number(word text, names text[], lowest integer)
    RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN coalesce(
        array_position(names, lower(word)) - 1 + lowest,
        CASE WHEN word ~ '^[0-9]{1,9}$' THEN word::integer END
    );
END;
$$;

CREATE FUNCTION cron._check_schedule(schedule text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT cron._is_schedule(schedule) THEN
        RAISE EXCEPTION USING
            ERRCODE = '22023',
            MESSAGE = format('invalid schedule: %s', schedule),
            HINT = 'Use cron format (e.g. 5 4 * * *), or interval format ''[1-59] seconds''';
    END IF;
END;
$$;

-- The one whose right to connect counts: the given role, which only a superuser may name, else the caller.
CREATE FUNCTION cron._runner(username text, refusal text)
    RETURNS text
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF username IS NOT NULL THEN
        IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
            RAISE EXCEPTION USING ERRCODE = 'XX000', MESSAGE = refusal;
        END IF;
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = username) THEN
            RAISE EXCEPTION USING ERRCODE = 'XX000', MESSAGE = format('role "%s" does not exist', username);
        END IF;
        IF NOT (SELECT rolcanlogin FROM pg_roles WHERE rolname = username) THEN
            RAISE EXCEPTION USING
                ERRCODE = 'XX000',
                MESSAGE = format('role "%s" can not log in', username),
                DETAIL = 'Jobs may only be run by roles that have the LOGIN attribute.';
        END IF;
    END IF;
    IF NOT coalesce(current_setting('cron.enable_superuser_jobs', true), 'on')::boolean
        AND (SELECT rolsuper FROM pg_roles WHERE rolname = coalesce(username, current_user))
    THEN
        RAISE EXCEPTION USING
            ERRCODE = '42501',
            MESSAGE = 'cannot schedule jobs as superuser',
            DETAIL = 'Scheduling jobs as superuser is disallowed when cron.enable_superuser_jobs is set to off.';
    END IF;
    RETURN coalesce(username, current_user);
END;
$$;

CREATE FUNCTION cron._check_connect(username text, database text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT has_database_privilege(username, database, 'CONNECT') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'XX000',
            MESSAGE = format('User %s does not have CONNECT privilege on %s', username, database);
    END IF;
END;
$$;


-- The functions of pg_cron write as the owner of the extension, on behalf of their caller.
CREATE FUNCTION cron._schedule(username text, job_name text, schedule text, command text, database text, active boolean)
    RETURNS bigint
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    id bigint;
BEGIN
    INSERT INTO cron.job (schedule, command, nodename, nodeport, database, username, active, jobname)
        VALUES (
            _schedule.schedule, _schedule.command,
            coalesce(current_setting('cron.host', true), 'localhost'), current_setting('port')::integer,
            _schedule.database, _schedule.username, _schedule.active, _schedule.job_name
        )
        ON CONFLICT ON CONSTRAINT jobname_username_uniq
            DO UPDATE SET schedule = excluded.schedule, command = excluded.command, database = excluded.database
        RETURNING jobid
        INTO id;
    RETURN id;
END;
$$;

CREATE FUNCTION cron._unschedule(caller text, id bigint)
    RETURNS void
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    owner text;
BEGIN
    SELECT username INTO owner FROM cron.job WHERE jobid = id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'XX000', MESSAGE = format('could not find valid entry for job %s', id);
    END IF;
    IF owner <> caller AND NOT has_table_privilege(caller, 'cron.job', 'DELETE') THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'permission denied for table job';
    END IF;
    DELETE FROM cron.job WHERE jobid = id;
END;
$$;

CREATE FUNCTION cron._alter_job(
    owner text, id bigint, schedule text, command text, database text, username text, active boolean
)
    RETURNS boolean
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE cron.job
        SET schedule = coalesce(_alter_job.schedule, schedule),
            command = coalesce(_alter_job.command, command),
            database = coalesce(_alter_job.database, database),
            username = coalesce(_alter_job.username, username),
            active = coalesce(_alter_job.active, active)
        WHERE jobid = id AND username = coalesce(owner, username);
    RETURN FOUND;
END;
$$;


CREATE FUNCTION cron.schedule(schedule text, command text)
    RETURNS bigint
    LANGUAGE plpgsql
    STRICT
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM cron._check_schedule(schedule);
    PERFORM cron._check_connect(cron._runner(NULL, NULL), current_setting('cron.database_name'));
    RETURN cron._schedule(current_user, NULL, schedule, command, current_setting('cron.database_name'), true);
END;
$$;
COMMENT ON FUNCTION cron.schedule(text, text) IS 'schedule a pg_cron job';

-- The first of them that is NULL is an error, though not one with a SQLSTATE of its own.
CREATE FUNCTION cron._check_not_null(job_name text, schedule text, command text)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF job_name IS NULL OR schedule IS NULL OR command IS NULL THEN
        RAISE EXCEPTION USING
            ERRCODE = 'XX000',
            MESSAGE = CASE WHEN job_name IS NULL THEN 'job_name' WHEN schedule IS NULL THEN 'schedule' ELSE 'command' END
                || ' can not be NULL';
    END IF;
END;
$$;

CREATE FUNCTION cron.schedule(job_name text, schedule text, command text)
    RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM cron._check_not_null(job_name, schedule, command);
    PERFORM cron._check_schedule(schedule);
    PERFORM cron._check_connect(cron._runner(NULL, NULL), current_setting('cron.database_name'));
    RETURN cron._schedule(current_user, job_name, schedule, command, current_setting('cron.database_name'), true);
END;
$$;
COMMENT ON FUNCTION cron.schedule(text, text, text) IS 'schedule a pg_cron job';

CREATE FUNCTION cron.schedule_in_database(
    job_name text, schedule text, command text, database text, username text DEFAULT NULL, active boolean DEFAULT true
)
    RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    runner text;
    target CONSTANT text := coalesce(database, current_setting('cron.database_name'));
BEGIN
    PERFORM cron._check_not_null(job_name, schedule, command);
    PERFORM cron._check_schedule(schedule);
    runner := cron._runner(username, 'must be superuser to create a job for another role');
    PERFORM cron._check_connect(runner, target);
    RETURN cron._schedule(runner, job_name, schedule, command, target, coalesce(active, true));
END;
$$;
COMMENT ON FUNCTION cron.schedule_in_database(text, text, text, text, text, boolean) IS 'schedule a pg_cron job';
REVOKE ALL ON FUNCTION cron.schedule_in_database(text, text, text, text, text, boolean) FROM PUBLIC;

CREATE FUNCTION cron.unschedule(job_id bigint)
    RETURNS boolean
    LANGUAGE plpgsql
    STRICT
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM cron._unschedule(current_user, job_id);
    RETURN true;
END;
$$;
COMMENT ON FUNCTION cron.unschedule(bigint) IS 'unschedule a pg_cron job';

CREATE FUNCTION cron._job_of(caller text, job_name text)
    RETURNS bigint
    LANGUAGE plpgsql
    SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT jobid FROM cron.job WHERE jobname = job_name AND username = caller);
END;
$$;

CREATE FUNCTION cron.unschedule(job_name text)
    RETURNS boolean
    LANGUAGE plpgsql
    STRICT
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    id CONSTANT bigint := cron._job_of(current_user, job_name);
BEGIN
    IF id IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'XX000', MESSAGE = format('could not find valid entry for job ''%s''', job_name);
    END IF;
    PERFORM cron._unschedule(current_user, id);
    RETURN true;
END;
$$;
COMMENT ON FUNCTION cron.unschedule(text) IS 'unschedule a pg_cron job';

CREATE FUNCTION cron.alter_job(
    job_id bigint,
    schedule text DEFAULT NULL,
    command text DEFAULT NULL,
    database text DEFAULT NULL,
    username text DEFAULT NULL,
    active boolean DEFAULT NULL
)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    runner text;
    caller_is_superuser CONSTANT boolean := (SELECT rolsuper FROM pg_roles WHERE rolname = current_user);
BEGIN
    IF job_id IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'XX000', MESSAGE = 'job_id can not be NULL';
    END IF;
    runner := cron._runner(username, 'must be superuser to alter username');
    IF database IS NOT NULL THEN
        PERFORM cron._check_connect(runner, database);
    END IF;
    IF schedule IS NOT NULL THEN
        PERFORM cron._check_schedule(schedule);
    END IF;
    IF num_nonnulls(schedule, command, database, username, active) = 0 THEN
        RAISE EXCEPTION USING
            ERRCODE = 'XX000',
            MESSAGE = 'no updates specified',
            HINT = 'You must specify at least one job attribute to change when calling alter_job';
    END IF;
    IF NOT cron._alter_job(
        CASE WHEN NOT caller_is_superuser THEN current_user END, job_id, schedule, command, database, username, active
    ) THEN
        RAISE EXCEPTION USING ERRCODE = 'XX000', MESSAGE = format('Job %s does not exist or you don''t own it', job_id);
    END IF;
END;
$$;
COMMENT ON FUNCTION cron.alter_job(bigint, text, text, text, text, boolean) IS
    'Alter the job identified by job_id. Any option left as NULL will not be modified.';
REVOKE ALL ON FUNCTION cron.alter_job(bigint, text, text, text, text, boolean) FROM PUBLIC;

CREATE FUNCTION cron.job_cache_invalidate()
    RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION cron.job_cache_invalidate() IS 'invalidate job cache';

CREATE TRIGGER cron_job_cache_invalidate
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON cron.job
    FOR EACH STATEMENT
    EXECUTE FUNCTION cron.job_cache_invalidate();
