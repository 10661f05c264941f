"""The chaos run: arguments, course and report."""

import argparse
import hashlib
import logging
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from statistics import quantiles
from typing import LiteralString

import psycopg

from procrastinate_stalled import install
from tests.chaos.adversary import FAULTS, inflict, schedule
from tests.chaos.oracle import Event, Evidence, Rescue, Verdict, judge, read_diary, read_life
from tests.chaos.world import DATABASE, HEARTBEAT_TIMEOUT, OUTAGE_GRACE, RUN_TIMEOUT, SETTINGS, World, run_in_threads
from tests.server import PROJECT, install_procrastinate, streaming_standby, throwaway_server

SEQUENCES = {
    "procrastinate_jobs": "procrastinate_jobs_id_seq",
    "procrastinate_events": "procrastinate_events_id_seq",
    "procrastinate_workers": "procrastinate_workers_id_seq",
    "procrastinate_stalled.rescues": "procrastinate_stalled.rescues_id_seq",
    "procrastinate_stalled.sweeps": "procrastinate_stalled.sweeps_id_seq",
}

# Who deletes a job deletes its events too, but not these. And the loss of a worker has no event.
KEEP_EVENTS: LiteralString = """
    -- Who changes a job holds its row until the end, so the ids of its events are in their order.
    CREATE TABLE kept_events (
        id bigint GENERATED ALWAYS AS IDENTITY, job_id bigint, type text, at timestamp with time zone
    );
    CREATE FUNCTION keep_event() RETURNS trigger LANGUAGE plpgsql SET search_path = public AS $$
    BEGIN
        INSERT INTO kept_events (job_id, type, at) VALUES (new.job_id, new.type, new.at);
        RETURN NULL;
    END;
    $$;
    CREATE TRIGGER keep AFTER INSERT ON procrastinate_events FOR EACH ROW EXECUTE FUNCTION keep_event();
    CREATE FUNCTION keep_loss() RETURNS trigger LANGUAGE plpgsql SET search_path = public AS $$
    BEGIN
        INSERT INTO kept_events (job_id, type, at) VALUES (new.id, 'lost its worker', now());
        RETURN NULL;
    END;
    $$;
    CREATE TRIGGER keep AFTER UPDATE ON procrastinate_jobs
        FOR EACH ROW WHEN (new.status = 'doing' AND old.worker_id IS NOT NULL AND new.worker_id IS NULL)
        EXECUTE FUNCTION keep_loss();
    """


def main() -> int:
    """Run, print the report, and return the exit code: 0 if there was no violation."""
    # Whatever ends this process ends it as Ctrl-C does, so that nothing is left behind.
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(ending, signal.default_int_handler)
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # each part here meets outages
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="how long faults are made (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="what chooses the faults and the jobs (default: 1)")
    arguments = parser.parse_args()

    with ExitStack() as stack:
        world = stack.enter_context(_world(arguments.seed))
        is_good = False
        try:
            run(world, arguments.minutes * 60)
            verdict = _judge(world)
            print(_report(world, arguments.minutes, verdict))
            is_good = not verdict.violations
        finally:
            if not is_good:
                _keep(world)
    return 0 if is_good else 1


def _keep(world: World) -> None:
    """Keep what tells of the run, for somebody who has to find out."""
    kept = PROJECT / "build" / "chaos" / f"seed-{world.seed}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(world.folder, kept)
    for server in world.servers:
        shutil.copy(server.folder / "log", kept / f"server-{server.port}.log")
    print(f"The faults, the diaries and the logs are in {kept}.")


@contextmanager
def _world(seed: int) -> Iterator[World]:
    with ExitStack() as stack:
        preload = {"shared_preload_libraries": "pg_cron", "cron.database_name": DATABASE}
        server = stack.enter_context(throwaway_server(cron_database=DATABASE, settings=SETTINGS))
        conninfo = server.conninfo(DATABASE)
        install_procrastinate(conninfo)
        install(conninfo)
        with psycopg.connect(conninfo) as connection:
            connection.execute(
                "UPDATE procrastinate_stalled.rules SET heartbeat_timeout = make_interval(secs => %s)",
                [HEARTBEAT_TIMEOUT],
            )
            connection.execute(
                """
                INSERT INTO procrastinate_stalled.rules (name, position, queue_name, heartbeat_timeout, run_timeout)
                VALUES ('mail', 50, 'mail', make_interval(secs => %s), make_interval(secs => %s))
                """,
                [HEARTBEAT_TIMEOUT, RUN_TIMEOUT],
            )
            connection.execute(
                "UPDATE procrastinate_stalled.settings SET outage_grace = make_interval(secs => %s)", [OUTAGE_GRACE]
            )
            connection.execute("SELECT procrastinate_stalled.schedule()")
            connection.execute(KEEP_EVENTS)
        standby = stack.enter_context(streaming_standby(server, SETTINGS | preload))
        folder = server.folder / "chaos"
        folder.mkdir()
        world = World(seed, folder, [server, standby], server)
        stack.callback(world.close)
        yield world


def run(world: World, seconds: float) -> None:
    """Let everything run against the adversary, then drain."""
    faults = schedule(world.seed, seconds)
    threads = run_in_threads(
        world,
        world.keep_workers_running,
        world.defer_again_and_again,
        partial(world.sweep_again_and_again, "sweep 1"),
        partial(world.sweep_again_and_again, "sweep 2"),
    )
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(20) as adversary:
            try:
                for fault in faults:
                    time.sleep(max(0, began + fault.at - time.monotonic()))
                    adversary.submit(inflict, world, fault)
                time.sleep(max(0, began + seconds - time.monotonic()))
            finally:
                world.draining.set()
        world.query("DELETE FROM procrastinate_stalled.rules WHERE expires_at IS NOT NULL")
        world.drain()
    finally:
        world.close()
        threads.shutdown()


def _judge(world: World) -> Verdict:
    now = time.time()
    lives = [read_life(life.diary, life.number, life.ended_at or now, life.frozen) for life in world.lives]
    swept = world.query(
        "SELECT sum(retried)::integer, sum(failed)::integer, sum(aborted)::integer FROM procrastinate_stalled.sweeps"
    )
    evidence = Evidence(
        heartbeat_timeout=HEARTBEAT_TIMEOUT,
        run_timeout=RUN_TIMEOUT,
        outage_grace=OUTAGE_GRACE,
        deferred=world.deferred,
        lives=lives,
        runs=[run for life, own in zip(world.lives, lives, strict=True) for run in read_diary(life.diary, own)],
        statuses=dict(world.query("SELECT id, status::text FROM procrastinate_jobs")),
        rescues=[
            Rescue(*row)
            for row in world.query(
                """
                SELECT job_id, extract(epoch FROM rescued_at)::double precision, action, reason, attempts, worker_id,
                       queue_name, task_name
                FROM procrastinate_stalled.rescues
                ORDER BY id
                """
            )
        ],
        events=[
            Event(*row)
            for row in world.query(
                "SELECT job_id, type, extract(epoch FROM at)::double precision FROM kept_events ORDER BY id"
            )
        ],
        pauses=world.pauses,
        outages=world.outages,
        swept=Counter(dict(zip(("retried", "failed", "aborted"), *swept, strict=True))),
    )
    verdict = judge(evidence)
    verdict.violations += world.errors
    for (error,) in world.query("SELECT DISTINCT error FROM procrastinate_stalled.sweeps WHERE error IS NOT NULL"):
        verdict.violations.append(f"a sweep met an error: {error}")
    for job, sentence in world.query("SELECT job_id, sentence FROM procrastinate_stalled.explain_jobs()"):
        verdict.violations.append(f"job {job} is still in doing: {sentence}")
    for table, sequence in SEQUENCES.items():
        if world.value(f"SELECT coalesce(max(id), 0) > (SELECT last_value FROM {sequence}) FROM {table}"):
            verdict.violations.append(f"sequence {sequence} is behind its table")
    _judge_promotion(world, verdict)
    _judge_pg_cron(world, verdict)
    _judge_deadlocks(world, verdict)
    verdict.figures.update(f"rescues: {rescue.action}, {rescue.reason}" for rescue in evidence.rescues)
    return verdict


def _judge_promotion(world: World, verdict: Verdict) -> None:
    """The standby has become the primary, and pg_cron sweeps there by itself."""
    if world.promoted_at is None:
        verdict.violations.append("the standby was not promoted")
        return
    runs = world.value(
        "SELECT count(*) FROM cron.job_run_details WHERE status = 'succeeded' AND start_time > to_timestamp(%s)",
        world.promoted_at,
    )
    verdict.figures["sweeps by pg_cron after the promotion"] += runs
    if runs == 0 and time.time() - world.promoted_at > 150:  # one full minute may have met another fault
        verdict.violations.append("pg_cron has not swept since the promotion")


def _judge_pg_cron(world: World, verdict: Verdict) -> None:
    """What pg_cron started was ended by the adversary, or not at all."""
    for (message,) in world.query(
        r"""
        SELECT split_part(return_message, E'\n', 1)
        FROM cron.job_run_details
        WHERE status = 'failed' AND return_message LIKE 'ERROR:%%'
            AND return_message !~ '^ERROR:\s+canceling statement due to (user request|lock timeout)'
            AND return_message !~ '^ERROR:\s+the table \S+ is locked'
        """
    ):
        verdict.violations.append(f"a sweep by pg_cron failed: {message}")


def _judge_deadlocks(world: World, verdict: Verdict) -> None:
    """A sweep takes its locks in Procrastinate's order, and does not wait for long, so it is in no deadlock."""
    verdict.figures["deadlocks"] = 0
    for server in world.servers:
        for deadlock in (server.folder / "log").read_text(errors="replace").split("ERROR:  deadlock detected")[1:]:
            verdict.figures["deadlocks"] += 1
            detail = deadlock[:2000].split("ERROR: ")[0]
            if re.search(r"procrastinate_stalled\.(_|sweep\()", detail):
                verdict.violations.append(f"a sweep was in a deadlock: {detail}")


def _report(world: World, minutes: float, verdict: Verdict) -> str:
    plan = repr(schedule(world.seed, minutes * 60)).encode()
    runs = world.query(
        """
        SELECT concat_ws(
                   ', ',
                   'runs of pg_cron: ' || status,
                   CASE status WHEN 'failed' THEN split_part(return_message, E'\n', 1) END
               ),
               count(*)
        FROM cron.job_run_details
        GROUP BY 1
        ORDER BY 1
        """
    )
    detail = world.value("SELECT detail FROM procrastinate_stalled.status() WHERE name = 'false_rescues'")
    lines = [
        f"# Chaos, {minutes:g} minutes, seed {world.seed}",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}. PostgreSQL {world.value('SHOW server_version')}, "
        + ", ".join(f"{name} {version(name)}" for name in ("procrastinate", "psycopg-pool", "procrastinate-stalled"))
        + f". Schedule of faults: {hashlib.sha256(plan).hexdigest()[:12]}.",
    ]

    def table(title: str, rows: dict[str, int]) -> None:
        lines.extend(["", f"| {title} | |", "|---|--:|"])
        lines.extend(f"| {name} | {number} |" for name, number in rows.items())

    table("Faults", {kind: world.counts.pop(f"fault: {kind}", 0) for kind in FAULTS})
    table("Jobs by their end", dict(sorted(verdict.ends.items())) | {"all": verdict.ends.total()})
    table("Rescues and more", dict(sorted(verdict.figures.items())))
    table("Also", dict(sorted(world.counts.items())) | dict(runs))
    table("Excused, because a worker was frozen for half of heartbeat_timeout or longer", verdict.excused)
    lines += ["", f"Workers: {len(world.lives)}. status() says: {detail}.", ""]
    if len(verdict.delays) > 1:
        cuts = quantiles(verdict.delays, n=100, method="inclusive")
        delays = f"median {cuts[49]:.1f}, 99th percentile {cuts[98]:.1f}, longest {max(verdict.delays):.1f}"
        lines += [f"Seconds from the death of a worker to the rescue of its job: {delays}.", ""]
    lines += [f"Violations: {len(verdict.violations)}", *(f"- {violation}" for violation in verdict.violations)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
