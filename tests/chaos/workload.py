"""The application of the chaos run: its tasks, and the diary that each worker process keeps outside the database.

A worker process is told by its environment what to connect to (`DATABASE_URL`), how to run (`WORKER_OPTIONS`, a JSON
object of `App.run_worker` arguments), where its diary is (`DIARY`), and whether it defers periodic tasks (`PERIODIC`).
"""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from random import Random
from typing import Any

from procrastinate import App, BaseRetryStrategy, JobContext, PsycopgConnector, RetryDecision, RetryStrategy
from procrastinate.exceptions import JobAborted
from procrastinate.jobs import Job, Status
from procrastinate.manager import JobManager
from procrastinate.worker import Worker

LONGEST_JOB = 2.5  # seconds
QUEUES = ("default", "mail")

_path = os.environ.get("DIARY")
_diary = None if _path is None else os.open(_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def note(what: str, job: Job | None = None, **facts: object) -> None:
    """Write a line into the diary. It survives the end of this process, however that comes."""
    assert _diary is not None
    line = {"at": time.time(), "what": what} | facts
    if job is not None:
        line |= {"job": job.id, "attempts": job.attempts, "lock": job.lock}
    os.write(_diary, (json.dumps(line) + "\n").encode())


@contextmanager
def note_failure(what: str, job: Job | None = None) -> Iterator[None]:
    """Note that a worker got an error, or was interrupted, where it told the database something."""
    try:
        yield
    except BaseException:
        note(what, job)
        raise


async def note_run(call_next: Callable[[], Awaitable[Any]], context: JobContext, _worker: Worker) -> Any:
    """Note the start and the end of each run of a job."""
    note("started", context.job)
    try:
        return await call_next()
    finally:
        note("ended", context.job)


class DiaryKeeper(JobManager):
    """Notes what a worker tells the database: before it does, and after the database has said that it is done."""

    async def register_worker(self) -> int:
        note("beating")
        worker_id = await super().register_worker()
        note("beat")
        note("registered", id=worker_id)
        return worker_id

    async def update_heartbeat(self, worker_id: int) -> None:
        note("beating")
        with note_failure("not beaten"):
            await super().update_heartbeat(worker_id)
        note("beat")

    async def finish_job(self, job: Job, status: Status, delete_job: bool) -> None:
        note("finishing", job, status=status.value, deletes=delete_job)
        with note_failure("not told", job):
            await super().finish_job(job, status, delete_job)
        note("finished", job)

    async def retry_job(
        self,
        job: Job,
        retry_at: datetime | None = None,
        priority: int | None = None,
        queue: str | None = None,
        lock: str | None = None,
    ) -> None:
        note("retrying", job)
        with note_failure("not told", job):
            await super().retry_job(job, retry_at, priority, queue, lock)
        note("retried", job)


app = App(
    connector=PsycopgConnector(conninfo=os.environ.get("DATABASE_URL", ""), min_size=1),
    worker_defaults=json.loads(os.environ.get("WORKER_OPTIONS", "{}")) | {"worker_middleware": [note_run]},
)
if _diary is not None:
    app.job_manager = DiaryKeeper(app.connector)


class BadLuckError(Exception):
    """A task fails, as tasks do."""


class OtherQueue(BaseRetryStrategy):
    """Tries twice more, later, in another queue, and before all others."""

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> RetryDecision | None:
        if job.attempts >= 2 or not isinstance(exception, BadLuckError):
            return None
        return RetryDecision(retry_in={"seconds": 1}, queue=QUEUES[1 - QUEUES.index(job.queue)], priority=5)


@app.task(pass_context=True, retry=RetryStrategy(max_attempts=3, wait=1))
async def coroutine(context: JobContext, seconds: float, failures: int = 0) -> None:
    """Run for a while, and fail as often as asked for."""
    await asyncio.sleep(seconds)
    if context.job.attempts < failures:
        raise BadLuckError


@app.task(pass_context=True, retry=OtherQueue())
def function(context: JobContext, seconds: float, failures: int = 0) -> None:
    """Do the same in a thread, and look now and then whether it should abort."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if context.should_abort():
            raise JobAborted
        time.sleep(min(0.05, left))
    if context.job.attempts < failures:
        raise BadLuckError


async def every_two_seconds(timestamp: int) -> None:  # noqa: ARG001
    """Do a little, often."""
    await asyncio.sleep(0.1)


_task = app.task(queueing_lock="every two seconds")(every_two_seconds)
if os.environ.get("PERIODIC") == "1":
    app.periodic(cron="* * * * * */2")(_task)


def defer_something(app: App, random: Random) -> int:
    """Defer a job of any kind; return its id.

    Raises
    ------
    procrastinate.exceptions.AlreadyEnqueued
        Another job waits with its queueing lock.
    """
    seconds = random.choice([0.05, 0.1, 0.2, 0.3, 0.5, 1, LONGEST_JOB])
    failures = random.choice([0, 0, 0, 0, 0, 1, 1, 9])
    lock = f"lock {random.randrange(8)}" if random.random() < 0.25 else None
    queueing_lock = f"queueing lock {random.randrange(6)}" if random.random() < 0.2 else None
    job = app.configure_task(
        f"tests.chaos.workload.{random.choice(['coroutine', 'coroutine', 'function'])}",
        queue=random.choice(QUEUES),
        lock=lock,
        queueing_lock=queueing_lock,
        priority=random.randrange(3),
        schedule_in={"seconds": 2} if random.random() < 0.05 else None,
    )
    return job.defer(seconds=seconds, failures=failures)
