"""Real Procrastinate workers, each in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psycopg

from tests.server import PROJECT
from tests.wait import wait_until


@dataclass(frozen=True)
class Worker:
    """A worker process that has registered itself in `procrastinate_workers`."""

    process: subprocess.Popen[bytes]
    id: int
    """Its row in `procrastinate_workers`."""
    log: Path

    @property
    def pid(self) -> int:
        """The id of its process."""
        return self.process.pid

    def kill(self) -> None:
        """End it as `kill -9` does, and see it dead."""
        self.process.kill()
        self.wait()

    def terminate(self) -> None:
        """Ask it to stop, as a deployment does; it finishes its running jobs first."""
        self.process.terminate()

    def pause(self) -> None:
        """Freeze it."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen one go on."""
        self.process.send_signal(signal.SIGCONT)

    def wait(self, seconds: float = 30) -> int:
        """Wait until it has ended and return its exit code, negative for a signal."""
        return self.process.wait(timeout=seconds)


def start_worker(conninfo: str, log: Path, app: str = "tests.tasks.app", **options: object) -> Worker:
    """Run `procrastinate worker` until it has registered itself.

    Parameters
    ----------
    conninfo :
        The address of the database.
    log :
        The file that receives what the worker writes.
    app :
        The dotted path of an app that reads ``DATABASE_URL`` and ``WORKER_OPTIONS``.
    options :
        Arguments of ``procrastinate.App.run_worker``, such as update_heartbeat_interval, stalled_worker_timeout,
        fetch_job_polling_interval, concurrency, listen_notify, queues.

    Raises
    ------
    RuntimeError
        It ended before it registered itself.
    """
    with psycopg.connect(conninfo, autocommit=True) as connection, log.open("ab") as output:
        last_id = _newest_worker_id(connection)
        process = subprocess.Popen(
            [sys.executable, "-m", "procrastinate", "--app", app, "worker"],
            cwd=PROJECT,
            env=os.environ | {"DATABASE_URL": conninfo, "WORKER_OPTIONS": json.dumps(options)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

        def registered() -> bool:
            ended = process.poll() is not None
            if _newest_worker_id(connection) > last_id:
                return True
            if ended:
                raise RuntimeError(f"The worker ended before it registered itself.\n{log.read_text()}")
            return False

        try:
            wait_until(registered, "the worker has registered itself")
        except BaseException:
            process.kill()
            process.wait()
            raise
        return Worker(process, _newest_worker_id(connection), log)


def _newest_worker_id(connection: psycopg.Connection[tuple[int]]) -> int:
    row = connection.execute("SELECT coalesce(max(id), 0) FROM procrastinate_workers").fetchone()
    assert row is not None
    return row[0]
