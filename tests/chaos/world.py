"""What the adversary meets: servers, workers, sweeps, and an application that defers jobs all the while.

Times between processes are those of this machine's clock, in seconds since 1970; the servers run on it too.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, LiteralString

import psycopg
from procrastinate import SyncPsycopgConnector
from procrastinate.exceptions import AlreadyEnqueued, ConnectorException
from psycopg.conninfo import make_conninfo

from tests.chaos import workload
from tests.chaos.oracle import Outage, Pause
from tests.server import FAST, PROJECT, Server
from tests.wait import wait_until

DATABASE = "chaos"
# What a crash of a server must not lose, and what lets a standby follow one that crashes. The rows of pg_cron name host
# and port of the server on which they were made, and this standby has others; background workers need neither.
# A client that is frozen while it connects keeps a server from its recovery for `authentication_timeout`.
SETTINGS = FAST | {
    "cron.use_background_workers": "on",
    "synchronous_commit": "on",
    "autovacuum": "on",
    "autovacuum_naptime": "5s",
    "wal_keep_size": "1GB",
    "wal_retrieve_retry_interval": "200ms",
    "authentication_timeout": "5s",
}

# Seconds. Procrastinate's:
HEARTBEAT_INTERVAL = 0.5
STALLED_WORKER_TIMEOUTS = (3, 6, 6)  # of one worker or another; below HEARTBEAT_TIMEOUT, as by default
POLLING_INTERVAL = 0.25
# Ours. A worker that drains is silent for as long as its longest job, and for as long as a lock keeps it from writing.
HEARTBEAT_TIMEOUT = 8
OUTAGE_GRACE = 16
RUN_TIMEOUT = 30  # of one queue: far longer than the longest job
# Those of the run:
SWEEP_PAUSE = 0.02  # between two sweeps of a session, or the machine would do nothing else
DEFER_PAUSE = 0.12
DRAIN_TIME = 120

WORKERS = 6
MOST_WAITING = 150  # jobs in todo, above which the application waits

SWEEP: LiteralString = "CALL procrastinate_stalled.sweep()"


@dataclass
class WorkerLife:
    """A worker process, from its start to its end."""

    number: int
    process: subprocess.Popen[bytes]
    diary: Path
    started_at: float
    ended_at: float | None = None
    is_frozen: bool = False
    frozen: list[tuple[float, float]] = field(default_factory=list)
    """From when to when it was stopped."""

    def send(self, number: signal.Signals) -> bool:
        """Send it a signal; return whether it was there to receive it."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            return True
        return False


@dataclass
class World:
    """Everything that runs."""

    seed: int
    folder: Path
    servers: list[Server]
    """The primary, and its standby."""
    primary: Server
    promoted_at: float | None = None
    lives: list[WorkerLife] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    deferred: list[int] = field(default_factory=list)
    """The ids of the jobs that the database has confirmed."""
    counts: Counter[str] = field(default_factory=Counter)
    """What happened, for the report."""
    counts_lock: threading.Lock = field(default_factory=threading.Lock)
    errors: list[str] = field(default_factory=list)
    """What must not happen."""
    server_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by who makes the server go down, or another one take over."""
    rules_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by who changes rules, pauses among them, or compares them."""
    table_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by who locks out the workers, so that such times do not add up."""
    draining: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def count(self, what: str, times: int = 1) -> None:
        """Count something for the report."""
        with self.counts_lock:
            self.counts[what] += times

    def conninfo(self, name: str) -> str:
        """The address of the database on whichever server is the primary, for somebody of that name."""
        return make_conninfo(
            host=",".join(server.host for server in self.servers),
            port=",".join(str(server.port) for server in self.servers),
            dbname=DATABASE,
            user=Server.user,
            application_name=name,
            target_session_attrs="read-write",
            connect_timeout=5,
        )

    def connect(self, name: str = "chaos") -> psycopg.Connection[Any]:
        """Open a connection in autocommit mode."""
        return psycopg.connect(self.conninfo(name), autocommit=True)

    def query(self, query: LiteralString, *parameters: object) -> list[tuple[Any, ...]]:
        """Run a query on a connection of its own."""
        with self.connect() as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def value(self, query: LiteralString, *parameters: object) -> Any:
        """Run a query that returns one value."""
        ((value,),) = self.query(query, *parameters)
        return value

    def answers(self) -> bool:
        """Whether there is a server that takes writes."""
        try:
            self.query("SELECT")
        except psycopg.OperationalError:
            return False
        return True

    def living(self) -> list[WorkerLife]:
        """The workers that are not known to have ended, oldest first."""
        return [life for life in self.lives if life.ended_at is None]

    def start_worker(self) -> None:
        """Start a worker with options of its own. It registers itself when it can."""
        number = len(self.lives) + 1
        random = Random(f"{self.seed}/{number}")
        options = {
            "concurrency": random.choice([1, 2, 4]),
            "delete_jobs": random.choice(["never", "successful", "always"]),
            "listen_notify": random.random() < 0.7,
            "shutdown_graceful_timeout": random.choice([None, 0.5]),
            "update_heartbeat_interval": HEARTBEAT_INTERVAL,
            "stalled_worker_timeout": random.choice(STALLED_WORKER_TIMEOUTS),
            "fetch_job_polling_interval": POLLING_INTERVAL,
            "abort_job_polling_interval": POLLING_INTERVAL,
        }
        diary = self.folder / f"worker-{number}.jsonl"
        diary.touch()
        with (self.folder / f"worker-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "procrastinate", "--app", "tests.chaos.workload.app", "worker"],
                cwd=PROJECT,
                env=os.environ
                | {
                    "DATABASE_URL": self.conninfo(f"worker {number}"),
                    "WORKER_OPTIONS": json.dumps(options),
                    "DIARY": str(diary),
                    "PERIODIC": str(int(not self.draining.is_set())),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.lives.append(WorkerLife(number, process, diary, time.time()))

    def keep_workers_running(self) -> None:
        """See when workers end, and start others in their place."""
        while not self.over.wait(0.05):
            for life in self.living():
                if life.process.poll() is not None:
                    life.ended_at = time.time()
            if len(self.living()) < WORKERS:
                self.start_worker()

    def sweep_again_and_again(self, name: str) -> None:
        """Sweep as fast as the machine bears. It may find the server gone, a table locked, or itself cancelled."""
        while not self.over.is_set():
            try:
                with self.connect(name) as connection:
                    while not self.over.wait(SWEEP_PAUSE):
                        try:
                            connection.execute(SWEEP)
                            self.count("sweeps of the two sessions")
                        except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable) as error:
                            self.count(f"sweeps ended by {type(error).__name__}")
            except psycopg.OperationalError as error:
                # No server; one that starts or stops; or who ended this session.
                if error.sqlstate is not None and not error.sqlstate.startswith(("08", "57P")):
                    self.errors.append(f"{name}: {error.sqlstate} {error}")
                self.count("sweeping sessions that lost the server")
                self.over.wait(0.1)

    def defer_again_and_again(self) -> None:
        """Defer jobs, and abort some, whether or not there is a database."""
        random = Random(f"{self.seed}/application")
        connector = SyncPsycopgConnector(conninfo=self.conninfo("application"), min_size=1, max_size=2, timeout=5)
        with workload.app.replace_connector(connector) as app, app.open():
            while not self.draining.wait(DEFER_PAUSE):
                try:
                    self.deferred.append(workload.defer_something(app, random))
                    if random.random() < 0.05:
                        job_id = random.choice(self.deferred[-20:])
                        self.count("jobs to abort", app.job_manager.cancel_job_by_id(job_id, abort=True))
                    if len(self.deferred) % 20 == 0:
                        wait_until(self._has_room, "the workers catch up", DRAIN_TIME)
                except AlreadyEnqueued:
                    self.count("jobs not deferred: queueing lock")
                except (ConnectorException, psycopg.OperationalError):
                    self.count("jobs not deferred: no database")

    def _has_room(self) -> bool:
        waiting = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'"
        return self.draining.is_set() or self.value(waiting) < MOST_WAITING

    def drain(self) -> None:
        """Let everything come to its end: fresh workers, and no fault any more."""
        self.draining.set()
        deadline = time.monotonic() + DRAIN_TIME
        while time.monotonic() < deadline:
            # Also the fresh ones in turn: a worker that has failed to write down the end of a job has no second try.
            for life in self.living():
                life.send(signal.SIGTERM)
            turn = time.monotonic() + 15
            while time.monotonic() < turn:
                if self.value("SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')") == 0:
                    return
                time.sleep(0.2)

    def close(self) -> None:
        """End everything that was started here."""
        self.draining.set()
        self.over.set()
        for life in self.lives:
            if life.process.poll() is None:
                life.process.kill()
                life.process.wait()


def run_in_threads(world: World, *parts: Callable[[], None]) -> ThreadPoolExecutor:
    """Start the parts of the world, each in a thread, which end with the world."""

    def run(part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:
            world.errors.append(f"{part} ended with {error!r}")
            raise

    executor = ThreadPoolExecutor(len(parts))
    for part in parts:
        executor.submit(run, part)
    return executor
