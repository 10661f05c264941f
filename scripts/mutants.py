"""Breaks the guards of the rescue one at a time, and sees that a test fails for each: `python -m scripts.mutants`.

A mutant is one change of a file in sql/. It is made in a copy of the project, and the tests that should notice it are
run there until the first one fails, or hangs. Prints a table in Markdown, which docs/guards.md quotes. Exits with 1
when a mutant survives, or when the tests fail without one; and before any test, when a mutant is broken SQL: tests fail
for it, but not for the guard.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psycopg
from psycopg.rows import dict_row
from rich.progress import track

from scripts.lint import QUERIES
from tests.server import PROJECT, install_procrastinate, throwaway_server

PATIENCE = 1800
"""After so many seconds the tests hang. Without a mutant all of them take four minutes on an idle machine."""

PREREQUISITES = "sql/10_prerequisites.sql"
JUDGEMENT = "sql/30_judgement.sql"
RESCUE = "sql/40_rescue.sql"
SWEEP = "sql/50_sweep.sql"


@dataclass(frozen=True)
class Mutant:
    """A guard, and the change that takes it away."""

    guard: str
    file: str
    old: str
    """Must stand in the file exactly once."""
    new: str
    tests: str
    """The files of tests/ that should notice, without `test_` and `.py`."""

    def source(self) -> str:
        """The file with the change."""
        source = (PROJECT / self.file).read_text()
        if source.count(self.old) != 1:
            raise ValueError(f"{self.guard}: not once in {self.file}, but {source.count(self.old)} times: {self.old}")
        return source.replace(self.old, self.new)


MUTANTS = [
    # The same run of the job.
    Mutant(
        "Status: a job that has ended is left",
        RESCUE,
        "                WHERE job.status BETWEEN 'doing' AND 'doing'\n                    AND job.worker_id IS NOT",
        "                WHERE job.worker_id IS NOT",
        "races",
    ),
    Mutant(
        "Worker: a job that changed hands is left",
        RESCUE,
        "                    AND job.worker_id IS NOT DISTINCT FROM candidate.worker_id\n",
        "",
        "races",
    ),
    Mutant(
        "Attempts: a later run of the job is left",
        RESCUE,
        "                    AND job.attempts = candidate.attempts\n",
        "",
        "races",
    ),
    Mutant(
        "Abort request: one that comes meanwhile is not lost",
        RESCUE,
        "                    AND job.abort_requested = candidate.abort_requested\n",
        "",
        "races",
    ),
    # Locks.
    Mutant(
        "Worker lock: a job of a worker that beats at this moment is left",
        RESCUE,
        "                    AND (reason <> 'heartbeat' OR worker_id IN (SELECT unnest(silent_workers)))\n",
        "",
        "races",
    ),
    Mutant(
        "Lock order: workers before jobs",
        RESCUE,
        "        silent_workers := ARRAY(",
        "        PERFORM FROM procrastinate_jobs AS job WHERE job.id = ANY (rest) ORDER BY job.id FOR NO KEY UPDATE;\n"
        "        silent_workers := ARRAY(",
        "races",
    ),
    Mutant(
        "SKIP LOCKED: a locked worker is not waited for",
        RESCUE,
        "FOR NO KEY UPDATE OF worker SKIP LOCKED",
        "FOR NO KEY UPDATE OF worker",
        "races",
    ),
    Mutant(
        "SKIP LOCKED: a locked job is not waited for",
        RESCUE,
        "FOR NO KEY UPDATE OF job SKIP LOCKED",
        "FOR NO KEY UPDATE OF job",
        "races",
    ),
    Mutant(
        "SKIP LOCKED: a locked duplicate is not waited for",
        RESCUE,
        "FOR SHARE OF job SKIP LOCKED",
        "FOR SHARE OF job",
        "queueing_locks",
    ),
    Mutant(
        "lock_timeout: a queueing lock that somebody is taking is not waited for",
        RESCUE,
        "    SET lock_timeout = '100ms'\n    -- As for _judge().",
        "    SET lock_timeout = '10s'\n    -- As for _judge().",
        "queueing_locks",
    ),
    Mutant(
        "lock_timeout: retry_job() waits for a locked job for half a second, not for ever",
        RESCUE,
        "    SET lock_timeout = '500ms'",
        "    SET lock_timeout = '10s'",
        "retry_job",
    ),
    Mutant(
        "lock_timeout: a lock on the whole table ends the sweep, with a reason",
        SWEEP,
        "            PERFORM procrastinate_stalled._lock_tables();",
        "            NULL;",
        "sweep adversity",
    ),
    # Queueing locks.
    Mutant(
        "Duplicates: a job whose queueing lock waits in todo is not retried",
        JUDGEMENT,
        "procrastinate_stalled._waiting_job(queueing_lock) END AS waiting_id",
        "NULL::bigint END AS waiting_id",
        "queueing_locks",
    ),
    Mutant(
        "Duplicates: of several stalled jobs the first is retried",
        JUDGEMENT,
        "coalesce(waiting_id, nullif(successor_id, id))",
        "waiting_id",
        "get_stalled_jobs explain retry_stalled_jobs",
    ),
    Mutant(
        "Duplicates: the waiting one stays in todo until the stalled one is ended",
        RESCUE,
        " OR candidate.duplicate_of IN (SELECT id FROM waiting))",
        " OR true)",
        "queueing_locks",
    ),
    Mutant(
        "Duplicates: judged once more when the first one could not be retried",
        RESCUE,
        "        EXIT WHEN duplicates = '{}' OR cardinality(duplicates) = cardinality(rest);",
        "        EXIT;",
        "queueing_locks",
    ),
    Mutant(
        "One by one: a job that cannot be retried costs the others nothing",
        SWEEP,
        "            one_by_one := true;",
        "            one_by_one := false;",
        "queueing_locks sweep",
    ),
    # What is written.
    Mutant(
        "worker_id is NULL afterwards",
        RESCUE,
        "                    worker_id = NULL\n                FROM run",
        "                    worker_id = job.worker_id\n                FROM run",
        "sweep races",
    ),
    Mutant(
        "attempts counts the lost run",
        RESCUE,
        "WHEN 'retry' THEN job.attempts + 1 ELSE",
        "WHEN 'retry' THEN job.attempts ELSE",
        "sweep races",
    ),
    Mutant(
        "abort_requested is cleared", RESCUE, "                    abort_requested = false,\n", "", "rules sweep races"
    ),
    Mutant(
        "Ledger: in the statement that changes the job",
        RESCUE,
        "                    FROM changed\n                RETURNING id, job_id, action",
        "                    FROM candidate\n                RETURNING id, job_id, action",
        "races",
    ),
    Mutant(
        "A job with a lock is retried at once",
        JUDGEMENT,
        "WHEN action = 'retry' AND lock IS NULL AND retry_delay > '0'",
        "WHEN action = 'retry' AND retry_delay > '0'",
        "rules",
    ),
    # Notifications.
    Mutant(
        "Notification: idle workers are woken",
        RESCUE,
        "    PERFORM procrastinate_stalled._notify(to_wake);",
        "    NULL;",
        "notifications",
    ),
    Mutant(
        "Notification: of those who wait behind a duplicate",
        RESCUE,
        "                   SELECT DISTINCT duplicate_of FROM candidate WHERE duplicate_of IS NOT NULL\n",
        "                   SELECT duplicate_of FROM candidate WHERE false\n",
        "notifications queueing_locks",
    ),
    Mutant(
        "Notification: not for jobs that are not due",
        RESCUE,
        "                AND (job.scheduled_at IS NULL OR job.scheduled_at <= now())\n            GROUP BY",
        "            GROUP BY",
        "notifications",
    ),
    Mutant(
        "Notification: a queue's name may be too long for a channel",
        RESCUE,
        "IF octet_length('procrastinate_queue_v1#' || queue_name) <= 63 THEN",
        "IF true THEN",
        "notifications",
    ),
    # Evidence.
    Mutant(
        "Hold: nobody is robbed while nobody is alive",
        JUDGEMENT,
        "                   WHEN by_rules AND nobody_is_alive AND reason <> 'run_timeout' THEN 'held'\n",
        "",
        "evidence explain",
    ),
    Mutant(
        "Hold: a run timeout is acted upon all the same",
        JUDGEMENT,
        "AND nobody_is_alive AND reason <> 'run_timeout' THEN 'held'",
        "AND nobody_is_alive THEN 'held'",
        "evidence explain",
    ),
    Mutant(
        "Hold: the others have time when one is heard again",
        JUDGEMENT,
        "                                   THEN nobody_until + heartbeat_timeout\n",
        "                                   THEN NULL::timestamp with time zone\n",
        "evidence explain",
    ),
    Mutant(
        "Hold: that time is theirs, however rare the sweeps are",
        JUDGEMENT,
        "coalesce((\n                            SELECT max(earlier.started_at)",
        "coalesce(now() - rule.heartbeat_timeout, (\n                            SELECT max(earlier.started_at)",
        "evidence explain",
    ),
    Mutant(
        "Hold: the sweeps that tell of it are kept",
        SWEEP,
        "(SELECT max(heartbeat_timeout) FROM procrastinate_stalled.rules)",
        "interval '0'",
        "sweep history",
    ),
    Mutant(
        "Clock: a sweep of the future holds nothing",
        JUDGEMENT,
        "                        AND sweep.started_at <= clock_timestamp() -- of a clock that was wrong\n",
        "",
        "evidence explain",
    ),
    Mutant(
        "Outage: the down time of the server is forgiven",
        JUDGEMENT,
        "                   END THEN survivors_forgiven_until\n",
        "                   END THEN NULL::timestamp with time zone\n",
        "evidence explain",
    ),
    Mutant(
        "Outage: a crash recovery counts, not only a start",
        JUDGEMENT,
        "        (SELECT backend_start FROM pg_stat_activity WHERE backend_type = 'walwriter'),\n",
        "",
        "evidence",
    ),
    Mutant(
        "Orphans: dated by the first sweep that saw them",
        JUDGEMENT,
        "WHEN worker_id IS NULL THEN coalesce(seen_at, now())",
        "WHEN worker_id IS NULL THEN coalesce(seen_at, 'epoch')",
        "orphans evidence",
    ),
    Mutant(
        "Orphans: dated by the clock, not by the start of a long transaction",
        "sql/20_tables.sql",
        "seen_at timestamp with time zone NOT NULL DEFAULT clock_timestamp()",
        "seen_at timestamp with time zone NOT NULL DEFAULT now()",
        "orphans",
    ),
    Mutant(
        "Orphans: one that was seen in the future is dated anew",
        RESCUE,
        "            OR orphan.seen_at > clock_timestamp();",
        "            ;",
        "orphans",
    ),
    Mutant(
        "Orphans: a later run is dated anew",
        JUDGEMENT,
        "WHERE orphan.job_id = job.id AND orphan.attempts = job.attempts",
        "WHERE orphan.job_id = job.id",
        "orphans evidence",
    ),
    Mutant(
        "Rules: ignore protects, also when seconds are asked for",
        JUDGEMENT,
        "WHEN coalesce(rule_action, 'ignore') = 'ignore' OR (pause_name IS NOT NULL AND NOT by_rules) THEN 'ignored'",
        "WHEN by_rules AND coalesce(rule_action, 'ignore') = 'ignore' THEN 'ignored'",
        "retry_stalled_jobs rules pause",
    ),
    Mutant(
        "Rules: max_rescues ends a job that kills its workers",
        JUDGEMENT,
        "                   AND (max_rescues IS NULL OR rescues < max_rescues) AS may_be_retried",
        "                   AS may_be_retried",
        "rules",
    ),
    Mutant(
        "Rules: a rescue of an earlier job with this id does not count",
        JUDGEMENT,
        "                           WHERE rescue.rescued_at >= coalesce((",
        "                           WHERE rescue.rescued_at IS NOT NULL OR rescue.rescued_at >= coalesce((",
        "rules procrastinate_upgrade",
    ),
    Mutant(
        "Purge: a rescue that still counts is kept",
        SWEEP,
        "                                WHERE rescue.action = 'retried'\n",
        "                                WHERE false AND rescue.action = 'retried'\n",
        "sweep",
    ),
    Mutant(
        "Standby: a sweep does nothing there",
        SWEEP,
        "    IF pg_is_in_recovery() THEN",
        "    IF false THEN",
        "live adversity sweep",
    ),
    # Limits of the server.
    Mutant(
        "Full disk: it ends a sweep, which would try each job in vain",
        SWEEP,
        "        disk_is_full := found_no_room >= 100;\n",
        "",
        "resource_limits",
    ),
    Mutant(
        "Full disk: it ends retry_stalled_jobs() too",
        SWEEP,
        "                EXIT batches WHEN result.disk_is_full;\n",
        "",
        "resource_limits",
    ),
    Mutant(
        "Full disk: no other error ends a sweep",
        SWEEP,
        "CASE SQLSTATE WHEN '53100' THEN found_no_room + 1 ELSE 0 END",
        "found_no_room + 1",
        "resource_limits",
    ),
    Mutant(
        "Full disk: that of some jobs alone does not end a sweep",
        SWEEP,
        "found_no_room >= 100",
        "found_no_room >= 1",
        "resource_limits",
    ),
    Mutant(
        "Full disk: it is the error of the sweep, whatever was before",
        SWEEP,
        "WHEN error IS NULL OR _rescue_batch.disk_is_full\n",
        "WHEN error IS NULL\n",
        "resource_limits",
    ),
    Mutant(
        "Batches: each is committed, whatever ends the sweep",
        SWEEP,
        "        COMMIT;\n        EXIT batches WHEN disk_is_full;\n        IF one_by_one",
        "        EXIT batches WHEN disk_is_full;\n        IF one_by_one",
        "resource_limits",
    ),
    Mutant(
        "Read-only: it is said why, and what to do",
        PREREQUISITES,
        "    IF NOT current_setting('transaction_read_only')::boolean THEN\n",
        "    IF true THEN\n",
        "resource_limits",
    ),
    # Names.
    *(
        Mutant(
            f"search_path: {name}() finds what it means",
            file,
            f"    LANGUAGE plpgsql\n    SET search_path FROM CURRENT\n{after}",
            f"    LANGUAGE plpgsql\n{after}",
            "hostile",
        )
        for name, file, after in [
            ("_rescue", RESCUE, "    SET lock_timeout = '100ms'\n    -- As for _judge()."),
            ("_notify", RESCUE, "AS $$\nDECLARE\n    queue_name text;"),
            ("retry_job", RESCUE, "    SET lock_timeout = '500ms'"),
        ]
    ),
]


def main() -> None:
    """Try all mutants, or those whose guard has a word in it."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="python -m scripts.mutants", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only guards with this in their description")
    words = parser.parse_args().words
    mutants = [mutant for mutant in MUTANTS if not words or any(word in mutant.guard for word in words)]
    if errors := [*errors_of_sql(mutants)]:
        sys.exit("\n".join(["These mutants are broken SQL:", *errors]))

    files = sorted({file for mutant in mutants for file in mutant.tests.split()})
    with ThreadPoolExecutor(2) as executor:
        runs = executor.map(attempt, [None, *mutants], [" ".join(files), *(mutant.tests for mutant in mutants)])
        unchanged, *caught = track(runs, "Mutants", total=len(mutants) + 1, transient=True)
    if unchanged is not None:
        sys.exit(f"Without any mutant this test fails already: {unchanged}")
    print("| guard | in | the first test that fails without it |\n|---|---|---|")
    for mutant, test in zip(mutants, caught, strict=True):
        print(f"| {mutant.guard} | `{mutant.file}` | {test or '**none**'} |")
    survivors = caught.count(None)
    print(f"\nOn {datetime.now(UTC):%Y-%m-%d}: {len(mutants)} mutants, {survivors} survived.")
    sys.exit(survivors > 0)


def errors_of_sql(mutants: list[Mutant]) -> Iterator[str]:
    """Those that PostgreSQL finds in a mutant when it is installed, or plpgsql_check in its functions."""
    with throwaway_server(cron_database="mutants") as server:
        install_procrastinate(server.conninfo("mutants"))
        with psycopg.connect(server.conninfo("mutants"), row_factory=dict_row) as connection:
            connection.execute("CREATE EXTENSION plpgsql_check")
            connection.commit()
            for mutant in mutants:
                with copied(mutant) as copy:
                    migration = max(copy.glob("sql/migrations/*[0-9].sql")).read_bytes()
                try:
                    connection.execute(migration)
                    connection.execute("RESET ALL")
                    problems = connection.execute(QUERIES["SQL: plpgsql_check"].encode()).fetchall()
                    for problem in problems:
                        if problem["level"] == "error":
                            yield f"{mutant.guard}: {problem['message']}"
                except psycopg.Error as error:
                    yield f"{mutant.guard}: {error}"
                connection.rollback()


@contextmanager
def copied(mutant: Mutant | None) -> Iterator[Path]:
    """Lend a copy of the project, with the mutant."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, check=True, capture_output=True, text=True)
        for name in tracked.stdout.split("\0")[:-1]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, copy / name, follow_symlinks=False)
        # The user `postgres`, as whom servers run for root, may enter it.
        Path(folder).chmod(0o755)
        if mutant is not None:
            (copy / mutant.file).write_text(mutant.source())
            subprocess.run(["scripts/assemble-migration"], cwd=copy, check=True)
        yield copy


def attempt(mutant: Mutant | None, tests: str) -> str | None:
    """Run the tests with the mutant; return the first that fails, and whether it hangs."""
    with copied(mutant) as copy:
        command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
        files = [f"tests/test_{name}.py" for name in tests.split()]
        log = copy / "log"
        with (
            log.open("w") as stdout,
            subprocess.Popen([*command, *files], cwd=copy, stdout=stdout, stderr=subprocess.STDOUT) as run,
        ):
            try:
                run.wait(PATIENCE)
                hangs = False
            except subprocess.TimeoutExpired:
                hangs = True
                run.send_signal(signal.SIGINT)  # as Ctrl-C: it stops its servers
                try:
                    run.wait(60)
                except subprocess.TimeoutExpired:
                    run.kill()
        output = log.read_text()
    if run.returncode == 0:
        return None
    # The test that hangs is the last one that began.
    began = r"^tests/(\S+\.py::\w+)"
    failed = re.findall(began if hangs else r"^(?:FAILED|ERROR) tests/(\S+\.py::\w+)", output, re.MULTILINE)
    if not failed:
        raise RuntimeError(f"pytest failed without a failing test, for {mutant}:\n{output}")
    return f"`{failed[-1]}`, which hangs" if hangs else f"`{failed[0]}`"


if __name__ == "__main__":
    main()
