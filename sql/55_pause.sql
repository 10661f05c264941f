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
