-- make installcheck: the extension as it is installed, on a server that is running.
\set ECHO none
SET client_min_messages = warning;
\set procrastinate_schema `"$PYTHON" -c "import procrastinate.sql; print(procrastinate.sql.__path__[0])"`/schema.sql
\set VERBOSITY sqlstate
\set ECHO all
-- Procrastinate has to be there first.
CREATE EXTENSION procrastinate_stalled;
\set ECHO none
\i :procrastinate_schema
\set ECHO all
CREATE EXTENSION procrastinate_stalled;
SELECT extversion = procrastinate_stalled.version() AS same_version
FROM pg_extension
WHERE extname = 'procrastinate_stalled';
SELECT name, position, action, heartbeat_timeout, max_rescues FROM procrastinate_stalled.rules;
-- A job that has run for too long is put back.
INSERT INTO procrastinate_stalled.rules (name, task_name, run_timeout) VALUES ('slow', 'slow', '1 hour');
INSERT INTO procrastinate_jobs (queue_name, task_name) VALUES ('default', 'slow'), ('default', 'quick');
UPDATE procrastinate_jobs SET status = 'doing';
UPDATE procrastinate_events SET at = at - interval '2 hours' WHERE type = 'started';
SELECT id, task_name, rule_name, reason, action FROM procrastinate_stalled.get_stalled_jobs() ORDER BY id;
CALL procrastinate_stalled.sweep();
SELECT id, task_name, status, attempts FROM procrastinate_jobs ORDER BY id;
SELECT job_id, action, reason, rule_name FROM procrastinate_stalled.rescues;
SELECT retried, failed, aborted, waiting, held, error FROM procrastinate_stalled.sweeps;
DROP EXTENSION procrastinate_stalled;
SELECT to_regnamespace('procrastinate_stalled') IS NULL AS gone;
