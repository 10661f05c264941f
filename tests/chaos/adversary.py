"""The faults of the chaos run. When which of them comes, and the number it picks with, follow from the seed alone.

Whom it picks among is what there is then, in real time. Each returns what it picked, for those who have to find out.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, LiteralString

import psycopg

from tests.chaos.oracle import Outage, Pause
from tests.chaos.workload import QUEUES
from tests.chaos.world import HEARTBEAT_TIMEOUT, SWEEP, World
from tests.wait import wait_until

FIRST_FAULT = 5  # seconds, until the first workers run
LONG_OUTAGE = HEARTBEAT_TIMEOUT + 1  # after which every worker has been silent for too long
TABLES: tuple[LiteralString, ...] = (
    "procrastinate_jobs",
    "procrastinate_workers",
    "procrastinate_events",
    "procrastinate_stalled.sweeps",
    "procrastinate_stalled.orphans",
    "procrastinate_stalled.rescues",
)


@dataclass(frozen=True)
class Fault:
    """Something bad that happens at a time."""

    at: float
    """Seconds since the start."""
    kind: str
    choice: int
    """What it picks with."""


def kill(world: World, random: Random) -> str:
    return _send(world, random, signal.SIGKILL)


def terminate(world: World, random: Random) -> str:
    return _send(world, random, signal.SIGTERM)


def _send(world: World, random: Random, number: signal.Signals) -> str:
    life = random.choice(world.living())
    life.send(number)
    return f"worker {life.number}"


def terminate_twice(world: World, random: Random) -> str:
    life = random.choice(world.living())
    life.send(signal.SIGTERM)
    time.sleep(random.uniform(0, 0.5))
    life.send(signal.SIGTERM)
    return f"worker {life.number}"


def freeze(world: World, random: Random) -> str:
    """Stop a worker: for a moment, for long enough to be pruned, or for so long that its jobs are taken."""
    life = random.choice([life for life in world.living() if not life.is_frozen])
    seconds = random.choice([0.5, 1, 5, 20, 20])
    began = time.time()
    if life.send(signal.SIGSTOP):
        life.is_frozen = True
        world.draining.wait(seconds)
        life.send(signal.SIGCONT)
        life.is_frozen = False
        life.frozen.append((began, time.time()))
    return f"worker {life.number} for {seconds} s"


def crash(world: World, random: Random) -> str:
    """End a random backend as the kernel does, after which the server ends all others and recovers."""
    with world.server_lock:
        backends = world.query(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        pid = random.choice(backends)[0]
        since = time.time()
        os.kill(pid, signal.SIGKILL)
        wait_until(partial(_has_recovered, world, since), "the server has recovered")
        world.outages.append(Outage(since, time.time()))
    return f"backend {pid}"


def _has_recovered(world: World, since: float) -> bool:
    """Whether the server takes writes again; for a moment after the crash it still goes on."""
    walwriter = "SELECT backend_start > to_timestamp(%s) FROM pg_stat_activity WHERE backend_type = 'walwriter'"
    try:
        return world.query(walwriter, since) == [(True,)]
    except psycopg.OperationalError:
        return False


def restart_fast(world: World, random: Random) -> str:
    return _restart(world, random, "fast")


def restart_immediate(world: World, random: Random) -> str:
    return _restart(world, random, "immediate")


def _restart(world: World, random: Random, mode: str) -> str:
    seconds = random.choice([random.uniform(0, 2), LONG_OUTAGE])
    with world.server_lock:
        world.primary.stop(mode)
        time.sleep(seconds)
        since = time.time()
        world.primary.start()
        wait_until(world.answers, "the server answers again")
        world.outages.append(Outage(since, since))
    return f"down for {seconds:.1f} s"


def promote(world: World, _random: Random) -> None:
    """Stop the primary, which first sends all that it has, for good; and let the standby take its place."""
    standby = world.servers[1]
    with world.server_lock, world.rules_lock:
        rules = world.query("SELECT * FROM procrastinate_stalled.rules ORDER BY name")
        orphans = world.query("SELECT job_id, attempts, seen_at FROM procrastinate_stalled.orphans")
        wait_until(partial(_standby_follows, world), "the standby receives what the primary writes")
        world.primary.stop("fast")
        since = time.time()
        standby.promote()
        world.primary = standby
        wait_until(world.answers, "the standby takes writes")
        world.promoted_at = time.time()
        world.outages.append(Outage(since, since))
        world.count("orphans at the promotion", len(orphans))
        if world.query("SELECT * FROM procrastinate_stalled.rules ORDER BY name") != rules:
            world.errors.append("the rules are not those of before the promotion")
        for orphan in world.query("SELECT job_id, attempts, seen_at FROM procrastinate_stalled.orphans"):
            if orphan not in orphans and orphan[:2] in {before[:2] for before in orphans}:
                world.errors.append(f"the promotion changed when orphan {orphan} was seen")


def _standby_follows(world: World) -> bool:
    return bool(world.value("SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"))


def sweep_on_standby(world: World, _random: Random) -> None:
    """Sweep where nothing can be written."""
    standby = world.servers[1]
    if world.primary is standby:
        return
    messages: list[str | None] = []
    try:
        with psycopg.connect(standby.conninfo("chaos"), autocommit=True) as connection:
            connection.add_notice_handler(lambda notice: messages.append(notice.message_primary))
            connection.execute(SWEEP)
    except psycopg.Error as error:
        if world.primary is not standby:
            world.errors.append(f"a sweep on the standby failed: {error}")
        return
    if "procrastinate_stalled: nothing was swept, because this server is a standby" in messages:
        world.count("sweeps that said that they are on a standby")
    elif world.primary is not standby and not world.server_lock.locked():
        world.errors.append(f"a sweep on the standby said only: {messages}")


def cut_connections(world: World, random: Random) -> str:
    with world.connect("adversary") as connection:
        backends = connection.execute(
            """
            SELECT pid, application_name
            FROM pg_stat_activity
            WHERE backend_type = 'client backend' AND application_name ~ '^(worker|sweep|application)'
            ORDER BY pid
            """
        ).fetchall()
        picked = random.sample(backends, min(len(backends), random.randint(1, 4)))
        for pid, _ in picked:
            connection.execute("SELECT pg_terminate_backend(%s)", [pid])
    return ", ".join(name for _, name in picked)


def cancel_sweeps(world: World, _random: Random) -> None:
    world.query("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE state = 'active' AND query = %s", SWEEP)


def lock_tables(world: World, random: Random) -> str:
    mode = random.choice(["ACCESS EXCLUSIVE", "SHARE ROW EXCLUSIVE", "SHARE"])
    return _hold(world, random, f"LOCK TABLE {random.choice(TABLES)} IN {mode} MODE")


def lock_rows(world: World, random: Random) -> str:
    rows = random.choice(["procrastinate_workers", "procrastinate_jobs WHERE status = 'doing'"])
    return _hold(world, random, f"SELECT FROM {rows} ORDER BY random() LIMIT 3 FOR UPDATE")


def _hold(world: World, random: Random, statement: str) -> str:
    with world.table_lock, world.connect("adversary") as connection:
        connection.execute("SET lock_timeout = '1s'")
        with connection.transaction(force_rollback=True):
            connection.execute(statement.encode())
            time.sleep(random.uniform(0.2, 2))
    return statement


def hold_snapshot(world: World, random: Random) -> None:
    """Keep a snapshot, and no lock, for longer than the product thinks usual."""
    with world.connect("adversary") as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with connection.transaction():
            connection.execute("SELECT count(*) FROM pg_settings")
            world.draining.wait(random.uniform(5, 20))


def maintain(world: World, random: Random) -> str:
    command = random.choice(["VACUUM FULL", "VACUUM FULL", "REINDEX TABLE", "VACUUM ANALYZE"])
    statement = f"{command} {random.choice(TABLES)}"
    with world.table_lock, world.connect("adversary") as connection:
        connection.execute("SET lock_timeout = '1s'")
        connection.execute(statement.encode())
    return statement


def pause(world: World, random: Random) -> str:
    queue, task_name = random.choice([(None, None), (QUEUES[0], None), (None, "tests.chaos.workload.function")])
    with world.rules_lock:
        world.query("SELECT procrastinate_stalled.pause('1 minute', %s, %s, 'chaos')", queue, task_name)
        since = time.time()
        world.draining.wait(random.uniform(1, 6))
        wait_until(world.answers, "there is a server to end the pause")
        world.pauses.append(Pause(since, time.time(), queue, task_name))
        world.query("SELECT procrastinate_stalled.resume(%s, %s)", queue, task_name)
    return f"queue {queue}, task {task_name}"


RULES: list[dict[str, Any]] = [
    {"action": "fail", "queue_name": QUEUES[1]},
    {"action": "ignore", "task_name": "%.function"},
    {"on_duplicate": "wait"},
    {"max_rescues": 0, "queue_name": QUEUES[0]},
    {"max_rescues": None, "retry_delay": "2 seconds", "retry_priority": 9},
    {"retry_queue_name": QUEUES[0], "task_name": "%.coroutine"},
    {"heartbeat_timeout": f"{HEARTBEAT_TIMEOUT * 2} seconds", "args": '{"failures": 0}'},
]


def change_rules(world: World, random: Random) -> str:
    """Put another rule first, for a while or until the next one comes."""
    rule = {"heartbeat_timeout": f"{HEARTBEAT_TIMEOUT} seconds"} | random.choice(RULES)
    seconds = random.uniform(5, 20)
    columns = ", ".join(rule)
    with world.rules_lock, world.connect("adversary") as connection, connection.transaction():
        connection.execute("DELETE FROM procrastinate_stalled.rules WHERE name = 'chaos'")
        connection.execute(
            f"""
            INSERT INTO procrastinate_stalled.rules (name, position, expires_at, {columns})
            VALUES ('chaos', 1, now() + make_interval(secs => %s){", %s" * len(rule)})
            """.encode(),
            [seconds, *rule.values()],
        )
    return f"{rule} for {seconds:.1f} s"


FAULTS: dict[str, Callable[[World, Random], str | None]] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        kill,
        terminate,
        terminate_twice,
        freeze,
        crash,
        restart_fast,
        restart_immediate,
        promote,
        sweep_on_standby,
        cut_connections,
        cancel_sweeps,
        lock_tables,
        lock_rows,
        hold_snapshot,
        maintain,
        pause,
        change_rules,
    )
}
# In each group one of them comes, on average once in so many seconds; as often as it is named.
GROUPS: list[tuple[float, tuple[str, ...]]] = [
    (3.5, ("kill",) * 5 + ("terminate", "terminate twice")),
    (50, ("crash", "restart fast", "restart immediate")),
    (10, ("freeze",)),
    (10, ("cut connections",)),
    (5, ("cancel sweeps",)),
    (10, ("lock tables", "lock rows")),
    (30, ("hold snapshot",)),
    (12, ("maintain",)),
    (30, ("pause",)),
    (12, ("change rules",)),
    (15, ("sweep on standby",)),
]


def schedule(seed: int, seconds: float) -> list[Fault]:
    """Say which faults come when, in their order. In the middle the standby is promoted."""
    random = Random(seed)
    faults = [Fault(seconds / 2, "promote", 0)]
    for every, kinds in GROUPS:
        at = FIRST_FAULT + every * random.uniform(0, 0.5)
        while at < (seconds / 2 if "sweep on standby" in kinds else seconds):
            faults.append(Fault(at, random.choice(kinds), random.randrange(1 << 30)))
            at += every * random.uniform(0.5, 1.5)
    return sorted(faults, key=lambda fault: fault.at)


def inflict(world: World, fault: Fault) -> None:
    """Do it, count it, and write it down. While the server is down, some faults find nothing to harm."""
    began, picked, end = time.time(), None, "done"
    try:
        picked = FAULTS[fault.kind](world, Random(fault.choice))
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        end = repr(error)
        world.count(f"faults that failed by another one: {fault.kind} ({type(error).__name__})")
    except BaseException as error:
        end = repr(error)
        world.errors.append(f"fault {fault} ended with {error!r}")
        raise
    else:
        world.count(f"fault: {fault.kind}")
    finally:
        line = {"began": began, "ended": time.time(), "kind": fault.kind, "picked": picked, "end": end}
        with (world.folder / "faults.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
