"""Faults that make living workers look dead, and whose jobs then run twice: `python -m tests.living_workers`.

Each case is run with two products: Procrastinate's documented recipe and procrastinate-stalled. Each has a server of
its own, and real workers that run jobs longer than the recipe's threshold and shorter than the default rule's. One more
worker is killed and really dead. Durations that decide are those of real life, divided by 20.
"""

import asyncio
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from procrastinate.exceptions import ConnectorException
from procrastinate.manager import JobManager
from psycopg.conninfo import make_conninfo
from rich.progress import track

from procrastinate_stalled import install
from tests.job_manager import job_manager
from tests.server import FAST, Server, install_procrastinate, streaming_standby, throwaway_server
from tests.tasks import open_app
from tests.wait import wait_until
from tests.worker import Worker, start_worker

SCALE = 1 / 20

# Seconds. Procrastinate's defaults:
HEARTBEAT_INTERVAL = 10 * SCALE
STALLED_WORKER_TIMEOUT = 30 * SCALE  # a worker that starts prunes those that were silent for longer
SECONDS_SINCE_HEARTBEAT = 30 * SCALE  # the threshold of the recipe
POLLING_INTERVAL = 5 * SCALE
POOL_TIMEOUT = 30 * SCALE  # only where it is the case; elsewhere psycopg's 30 s, which stand for 10 minutes
# Ours:
HEARTBEAT_TIMEOUT = 300 * SCALE
OUTAGE_GRACE = 600 * SCALE
# The cases':
SWEEP_INTERVAL = 20 * SCALE  # of both products
DOWN_TIME = 40 * SCALE
CUT_OFF_TIME = 360 * SCALE
JOB_TIME = 240 * SCALE  # shorter than HEARTBEAT_TIMEOUT
JOB_TIME_IN_OUTAGE = 480 * SCALE  # longer than that, shorter than OUTAGE_GRACE
DEAD_JOB_TIME = 60 * SCALE

# What a crash of a server, though not of its machine, must not lose.
SETTINGS = FAST | {"synchronous_commit": "on"}


class Product(Enum):
    """Who rescues stalled jobs."""

    STOCK = "stock"  # Procrastinate's documented recipe
    OURS = "ours"


@dataclass(frozen=True)
class Job:
    """A job of `tests.tasks.record`."""

    id: int
    runs: Path
    """The file that it writes."""

    def lines(self) -> list[str]:
        """What it has written so far."""
        return self.runs.read_text().splitlines() if self.runs.exists() else []

    def starts(self) -> int:
        """How many times it was started."""
        return sum(line.startswith("started") for line in self.lines())


@dataclass
class Scene:
    """What a fault finds: workers, each with a running job, and one of them already dead."""

    product: Product
    servers: list[Server]
    """The primary, and its standby if the case has one."""
    folder: Path
    options: dict[str, Any]
    """The workers'."""
    stack: ExitStack
    workers: list[Worker] = field(default_factory=list)
    """The living ones."""

    def conninfo(self, user: str = "worker") -> str:
        """The address of the database, for the workers or another role, on whichever server is the primary."""
        return make_conninfo(
            host=",".join(server.host for server in self.servers),
            port=",".join(str(server.port) for server in self.servers),
            dbname="cases",
            user=user,
            target_session_attrs="read-write" if len(self.servers) > 1 else "any",
        )

    def query(self, query: LiteralString, *parameters: object) -> list[tuple[Any, ...]]:
        """Run a query as superuser, on a connection of its own."""
        with psycopg.connect(self.conninfo("postgres"), autocommit=True) as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def value(self, query: LiteralString, *parameters: object) -> Any:
        """Run a query as superuser that returns one value."""
        ((value,),) = self.query(query, *parameters)
        return value

    def start_worker(self, **options: Any) -> Worker:
        """Start a worker; it stays until the end."""
        log = self.folder / f"worker-{len(list(self.folder.glob('worker-*')))}.log"
        worker = start_worker(self.conninfo(), log, **self.options, **options)
        self.stack.callback(worker.kill)
        return worker

    def start_relief(self) -> None:
        """Start a worker that has room for each job."""
        self.start_worker(concurrency=10)

    def defer(self, seconds: float) -> Job:
        """Defer a job and wait until a worker has started it."""
        runs = self.folder / f"runs-{len(list(self.folder.glob('runs-*')))}"
        with open_app(self.conninfo("postgres")) as app:
            job_id = app.configure_task("tests.tasks.record").defer(path=str(runs), seconds=seconds)
        job = Job(job_id, runs)
        wait_until(job.starts, f"job {job_id} has started")
        return job


def fast_restart(scene: Scene) -> None:
    (server,) = scene.servers
    server.stop("fast")
    time.sleep(DOWN_TIME)
    server.start()
    scene.start_relief()


def crash_recovery(scene: Scene) -> None:
    with psycopg.connect(scene.conninfo("postgres")) as killed, psycopg.connect(scene.conninfo("postgres")) as hung:
        # The server ends all of its processes before it recovers, and waits for the one that hangs.
        os.kill(hung.info.backend_pid, signal.SIGSTOP)
        os.kill(killed.info.backend_pid, signal.SIGKILL)
        time.sleep(DOWN_TIME)
        os.kill(hung.info.backend_pid, signal.SIGCONT)
    _wait_for_server(scene)
    scene.start_relief()


def pool_timeout(scene: Scene) -> None:
    (server,) = scene.servers
    server.stop("fast")
    time.sleep(POOL_TIMEOUT + 3 * HEARTBEAT_INTERVAL)
    server.start()
    scene.start_relief()


def promotion(scene: Scene) -> None:
    primary, standby = scene.servers
    written = scene.value("SELECT pg_current_wal_lsn()")
    with psycopg.connect(standby.conninfo(), autocommit=True) as connection:

        def replayed() -> bool:
            row = connection.execute("SELECT pg_last_wal_replay_lsn() >= %s", [written]).fetchone()
            return row == (True,)

        wait_until(replayed, "the standby has replayed the start of the jobs")
    primary.stop("immediate")
    time.sleep(DOWN_TIME)
    standby.promote()
    _wait_for_server(scene)
    scene.start_relief()


def prune(scene: Scene) -> None:
    paused = scene.workers[0]
    paused.pause()
    _wait_until_silent(scene, paused, STALLED_WORKER_TIMEOUT)
    scene.start_relief()
    assert scene.query("SELECT FROM procrastinate_workers WHERE id = %s", paused.id) == []
    time.sleep(SWEEP_INTERVAL)
    paused.resume()


def drain(scene: Scene) -> None:
    scene.start_relief()
    for worker in scene.workers:
        worker.terminate()


def cut_off(scene: Scene) -> None:
    scene.query("ALTER ROLE worker NOLOGIN")
    scene.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'worker'")
    _wait_until_all_are_silent(scene)
    scene.query("ALTER ROLE worker LOGIN")
    # The others come back by themselves: their pools try again after a wait as long as all their waits before.
    scene.start_relief()


def freeze(scene: Scene) -> None:
    for worker in scene.workers:
        worker.pause()
    _wait_until_all_are_silent(scene)
    for worker in scene.workers:
        worker.resume()
        time.sleep(DOWN_TIME)


def _wait_for_server(scene: Scene) -> None:
    def answers() -> bool:
        try:
            scene.query("SELECT")
        except psycopg.OperationalError:
            return False
        return True

    wait_until(answers, "the server answers again")


def _wait_until_all_are_silent(scene: Scene) -> None:
    for worker in scene.workers:
        _wait_until_silent(scene, worker, CUT_OFF_TIME)
    if scene.product is Product.OURS:
        verdicts = scene.query("SELECT verdict FROM procrastinate_stalled.explain_jobs()")
        assert verdicts == [("held",)] * 3
        held = "SELECT max(held) FROM procrastinate_stalled.sweeps"
        wait_until(lambda: scene.value(held) == 3, "a sweep has held each job")


def _wait_until_silent(scene: Scene, worker: Worker, seconds: float) -> None:
    silence = "SELECT now() - last_heartbeat > make_interval(secs => %s) FROM procrastinate_workers WHERE id = %s"
    wait_until(lambda: scene.value(silence, seconds, worker.id), f"worker {worker.id} was silent for {seconds} s")


@dataclass(frozen=True)
class Case:
    """A fault, and what it needs."""

    description: str
    fault: Callable[[Scene], None]
    options: dict[str, Any] = field(default_factory=dict)
    """Of the workers."""
    job_time: float = JOB_TIME
    """Seconds that a job of a living worker takes."""
    standby: bool = False

    @property
    def name(self) -> str:
        """A word for it."""
        return self.fault.__name__


CASES = [
    Case("The database restarts (fast stop, 40 s down)", fast_restart, job_time=JOB_TIME_IN_OUTAGE),
    Case(
        "The database recovers from a crash (`kill -9` of a backend, 40 s down)",
        crash_recovery,
        job_time=JOB_TIME_IN_OUTAGE,
    ),
    Case(
        "The database is down for 60 s, longer than the workers' pool timeout",
        pool_timeout,
        options={"pool": {"timeout": POOL_TIMEOUT}},
        job_time=JOB_TIME_IN_OUTAGE,
    ),
    Case(
        "A standby is promoted (the primary lost, 40 s down)",
        promotion,
        job_time=JOB_TIME_IN_OUTAGE,
        standby=True,
    ),
    Case("A worker is stopped (`SIGSTOP`) for longer than 30 s, pruned by a new one, and continued", prune),
    Case("Workers drain (`SIGTERM`)", drain),
    Case("All workers are cut off from the database for 6 minutes", cut_off),
    Case("All workers are frozen for 6 minutes (`SIGSTOP`), and wake up one after another", freeze),
]


@dataclass(frozen=True)
class Outcome:
    """What became of the jobs."""

    living_jobs: int
    """Jobs of workers that never died."""
    run_twice: int
    """How many of them were started more than once."""
    statuses: set[str]
    """Of all jobs, in the end."""
    dead_job: list[str]
    """What the dead worker's job has written."""
    delay: timedelta | None
    """How long after the time that explain_job had announced the dead worker's job was rescued; of ours only."""
    server_version: str


def run(case: Case, product: Product) -> Outcome:
    """Run a case."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(throwaway_server(settings=SETTINGS))
        servers = [server]
        conninfo = server.create_database("cases")
        install_procrastinate(conninfo)
        if product is Product.OURS:
            install(conninfo)
            _scale_rule(conninfo)
        with psycopg.connect(conninfo) as connection:
            connection.execute("CREATE ROLE worker LOGIN IN ROLE postgres")
        if case.standby:
            servers.append(stack.enter_context(streaming_standby(server, SETTINGS)))
        options = case.options | {
            "update_heartbeat_interval": HEARTBEAT_INTERVAL,
            "stalled_worker_timeout": STALLED_WORKER_TIMEOUT,
            "fetch_job_polling_interval": POLLING_INTERVAL,
            "abort_job_polling_interval": POLLING_INTERVAL,
        }
        scene = Scene(product, servers, folder, options, stack)
        try:
            return _play(scene, case)
        except Exception as error:
            for file in sorted([*folder.iterdir(), *(server.folder / "log" for server in servers)]):
                error.add_note(f"{file.name}:\n{file.read_text()}")
            raise


def _play(scene: Scene, case: Case) -> Outcome:
    scene.workers = [scene.start_worker() for _ in range(3)]
    living_jobs = [scene.defer(case.job_time) for _ in range(2)]
    dead_job = scene.defer(DEAD_JOB_TIME)
    [dead] = [worker for worker in scene.workers if dead_job.lines() == [f"started {worker.pid}"]]
    dead.kill()
    scene.workers.remove(dead)
    sweep = _retry_stalled_jobs if scene.product is Product.STOCK else _sweep
    with sweeping(lambda: sweep(scene.conninfo("postgres"))) as wait_for_sweep:
        case.fault(scene)
        wait_for_sweep()
        announced = None
        if scene.product is Product.OURS:
            announced = scene.value("SELECT stalled_at FROM procrastinate_stalled.explain_job(%s)", dead_job.id)
        wait_until(lambda: _statuses(scene) == {"succeeded"}, "all jobs have succeeded", seconds=90)
    delay = None
    if announced is not None:
        rescue = "SELECT rescued_at FROM procrastinate_stalled.rescues WHERE job_id = %s"
        delay = scene.value(rescue, dead_job.id) - announced
    return Outcome(
        living_jobs=len(living_jobs),
        run_twice=sum(job.starts() > 1 for job in living_jobs),
        statuses=_statuses(scene),
        dead_job=dead_job.lines(),
        delay=delay,
        server_version=scene.value("SHOW server_version"),
    )


def _statuses(scene: Scene) -> set[str]:
    return {status for (status,) in scene.query("SELECT DISTINCT status::text FROM procrastinate_jobs")}


def _scale_rule(conninfo: str) -> None:
    with psycopg.connect(conninfo) as connection:
        connection.execute(
            "UPDATE procrastinate_stalled.rules SET heartbeat_timeout = make_interval(secs => %s)", [HEARTBEAT_TIMEOUT]
        )
        connection.execute(
            "UPDATE procrastinate_stalled.settings SET outage_grace = make_interval(secs => %s)", [OUTAGE_GRACE]
        )


def _retry_stalled_jobs(conninfo: str) -> None:
    """Do what the task does that Procrastinate's guide recommends."""

    async def retry_stalled_jobs(manager: JobManager) -> None:
        stalled_jobs = await manager.get_stalled_jobs(seconds_since_heartbeat=SECONDS_SINCE_HEARTBEAT)
        for job in stalled_jobs:
            await manager.retry_job(job)

    with psycopg.connect(conninfo, autocommit=True) as connection:
        asyncio.run(retry_stalled_jobs(job_manager(connection)))


def _sweep(conninfo: str) -> None:
    """Do what pg_cron does."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("CALL procrastinate_stalled.sweep()")


@contextmanager
def sweeping(sweep: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Call `sweep` again and again, whether or not there is a database; yields a function that waits for a success."""
    ended = threading.Event()
    begins: list[float] = []  # of the successful calls

    def sweep_again_and_again() -> None:
        while not ended.is_set():
            began = time.monotonic()
            try:
                sweep()
            except (psycopg.OperationalError, ConnectorException):
                ended.wait(0.05)  # so that both products see the database as it is right after an outage
            else:
                begins.append(began)
                ended.wait(began + SWEEP_INTERVAL - time.monotonic())

    def wait_for_sweep() -> None:
        now = time.monotonic()
        wait_until(lambda: any(began > now for began in begins), "a sweep has begun and ended")

    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(sweep_again_and_again)
        try:
            yield wait_for_sweep
        finally:
            ended.set()
            future.result()


def main() -> None:
    """Run all cases, four runs at a time, and print a table in Markdown."""
    # Whatever ends this process ends it as Ctrl-C does, so that nothing is left behind.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    runs = [(case, product) for case in CASES for product in Product]
    with ProcessPoolExecutor(4) as executor:
        futures = [executor.submit(run, *arguments) for arguments in runs]
        try:
            outcomes = [future.result() for future in track(futures, "Living workers", transient=True)]
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    print(
        "| Case | Living workers' jobs | Run twice: stock recipe | Run twice: procrastinate-stalled "
        "| Dead worker's job rescued after its announced time (s) |\n"
        "|---|--:|--:|--:|--:|"
    )
    for number, case in enumerate(CASES):
        stock, ours = outcomes[2 * number : 2 * number + 2]
        assert ours.delay is not None
        delay = ours.delay.total_seconds()
        print(f"| {case.description} | {ours.living_jobs} | {stock.run_twice} | {ours.run_twice} | {delay:.1f} |")
    print(
        f"\nOn {datetime.now(UTC):%Y-%m-%d}, all times divided by {1 / SCALE:.0f}; both products look once in "
        f"{SWEEP_INTERVAL / SCALE:.0f} s, and as soon as the database is back; "
        f"a worker's pool waits {30 / SCALE / 60:.0f} minutes for a connection, except "
        f"where its timeout is the case.\nPostgreSQL {ours.server_version}, "
        + ", ".join(f"{name} {version(name)}" for name in ("procrastinate", "psycopg-pool", "procrastinate-stalled"))
    )


if __name__ == "__main__":
    main()
