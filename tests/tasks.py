"""The Procrastinate app of the tests.

A worker process is told by its environment what to connect to (`DATABASE_URL`, an address that may
set a search_path) and how to run (`WORKER_OPTIONS`, a JSON object of `App.run_worker` arguments, and
of `pool`, an object of those of the connection pool).
"""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from procrastinate import App, PsycopgConnector, SyncPsycopgConnector

_options = json.loads(os.environ.get("WORKER_OPTIONS", "{}"))
_pool = _options.pop("pool", {})

app = App(
    connector=PsycopgConnector(conninfo=os.environ.get("DATABASE_URL", ""), **_pool),
    worker_defaults=_options,
)


@app.task
def succeed() -> None:
    """End well at once."""


@app.task
def fail() -> None:
    """End with an error at once."""
    raise RuntimeError("this task always fails")


@app.task
async def sleep(seconds: float) -> None:
    """Run for a while, leaving the worker free to beat and to abort this job."""
    await asyncio.sleep(seconds)


@app.task
def poison() -> None:
    """Take the whole worker down, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
async def record(path: str, seconds: float = 0) -> None:
    """Write to a file `started PID`, and `ended PID` after some seconds."""
    with Path(path).open("a", buffering=1) as file:
        file.write(f"started {os.getpid()}\n")
        await asyncio.sleep(seconds)
        file.write(f"ended {os.getpid()}\n")


@contextmanager
def open_app(conninfo: str) -> Iterator[App]:
    """Lend the app, connected to a database, to defer jobs and to call its `job_manager`.

    There is one app: inside of another `open_app` it goes to the inner database.
    """
    with app.replace_connector(SyncPsycopgConnector(conninfo=conninfo)) as connected, connected.open():
        yield connected
