"""The demo: python -m demo, or make demo. Exits 1 if the job was not rescued."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tests.server import PROJECT, throwaway_server
from tests.wait import wait_until
from tests.worker import Worker, start_worker

JOBS = "SELECT id, task_name, status, attempts, worker_id FROM procrastinate_jobs"

console = Console(highlight=False, markup=False, emoji=False)


def main() -> int:
    """Tell the story, clean up, and return the exit code."""
    # Whatever ends this process ends it as Ctrl-C does, so that nothing is left behind.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    began = time.monotonic()
    try:
        with ExitStack() as stage:
            rescued = _play(stage)
    except KeyboardInterrupt:
        console.print("\nInterrupted. The server and the workers are stopped, and their files removed.")
        return 130
    if not rescued:
        console.print("\nThe job was not rescued.", style="bold red")
        return 1
    console.print("\nRescued, and nobody touched it.", style="bold green")
    console.print(f"{time.monotonic() - began:.0f} s. The server and the workers are stopped, and their files removed.")
    return 0


def _play(stage: ExitStack) -> bool:
    _title("A PostgreSQL with pg_cron, for this demo only")
    server = stage.enter_context(throwaway_server(cron_database="demo"))
    os.environ["DATABASE_URL"] = f"postgresql://{server.user}@{server.host}:{server.port}/demo"
    _show(f"export DATABASE_URL={os.environ['DATABASE_URL']}")
    connection = stage.enter_context(psycopg.connect(os.environ["DATABASE_URL"], autocommit=True))
    _psql("SELECT version()")

    _title("Procrastinate, procrastinate-stalled, and a sweep by pg_cron every minute")
    _run("procrastinate --app=demo.tasks.app schema --apply")
    _run("procrastinate-stalled install")
    _run("procrastinate-stalled schedule")
    _tell(
        "A job is stalled when the heart of its worker has not beaten for 5 minutes. That is long for a demo: "
        "here it is 10 seconds, and the workers' hearts beat every second."
    )
    _psql("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '10 seconds' WHERE name = 'default'")

    _title("A worker takes a job that lasts 5 seconds")
    victim = _start_worker(stage, server.folder / "worker-1.log")
    _run("procrastinate --app=demo.tasks.app defer demo.tasks.send_newsletter '{\"edition\": 7}'")
    wait_until(lambda: _value(connection, "SELECT status = 'doing' FROM procrastinate_jobs"), "the job is running")
    _psql(JOBS)

    _title("The worker is killed: out of memory, a lost machine, a hasty deployment")
    _show(f"kill -9 {victim.pid}")
    victim.kill()
    _psql(JOBS)
    _tell("The job is stuck. Its row still says doing, and nobody does it.")

    _title("Another worker starts, and leaves the job alone")
    _start_worker(stage, server.folder / "worker-2.log")
    time.sleep(2)
    _psql(JOBS)
    _tell("Procrastinate by itself leaves it so for ever. procrastinate-stalled waits, and says for what:")
    _run("procrastinate-stalled explain 1")

    _title("PostgreSQL finds the stalled job by itself")
    if _see_it_rescued(connection, victim):
        return True
    for log in sorted(server.folder.glob("*log")):
        _title(log.name)
        console.print(log.read_text())
    return False


def _see_it_rescued(connection: psycopg.Connection[Any], victim: Worker) -> bool:
    last_heartbeat: datetime = _value(
        connection, "SELECT last_heartbeat FROM procrastinate_workers WHERE id = %s", victim.id
    )
    stalled_at = last_heartbeat + timedelta(seconds=10)
    next_minute = stalled_at.replace(second=0, microsecond=0) + timedelta(minutes=1)
    if not _wait(
        "The heart of the dead worker must be silent for 10 seconds",
        stalled_at,
        lambda: _value(connection, "SELECT count(*) = 1 FROM procrastinate_stalled.get_stalled_jobs()"),
    ):
        return False
    _run("procrastinate-stalled list")
    if not _wait(
        f"pg_cron sweeps at the full minute, at {next_minute:%H:%M} {next_minute.tzname()}",
        next_minute,
        lambda: _value(connection, "SELECT count(*) = 1 FROM procrastinate_stalled.rescues"),
    ) or not _wait(
        "The job is rescued. The other worker runs it now, for 5 seconds",
        datetime.now(next_minute.tzinfo) + timedelta(seconds=5),
        lambda: _value(connection, "SELECT status = 'succeeded' FROM procrastinate_jobs"),
    ):
        return False

    _title("The finished job, its events, and what was done to it")
    _psql(JOBS)
    _psql("SELECT at, type FROM procrastinate_events ORDER BY id")
    _psql(
        "SELECT rescued_at, job_id, action, reason, rule_name, worker_id, last_heartbeat, rescued_by "
        "FROM procrastinate_stalled.rescues",
        expanded=True,
    )
    return True


def _wait(what: str, expected_at: datetime, happened: Callable[[], object]) -> bool:
    """Wait with a progress bar, and for 70 seconds more than expected; return whether it happened."""
    began = datetime.now(expected_at.tzinfo)
    seconds = max((expected_at - began).total_seconds(), 0.1)
    console.print("" if console.is_terminal else f"\nWaiting up to {seconds:.0f} s: {what}.")
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=seconds, left="")
        while not (done := happened()):
            waited = (datetime.now(expected_at.tzinfo) - began).total_seconds()
            if waited > seconds + 70:
                return False
            left = f"{seconds - waited:.0f} s" if waited < seconds else "any moment"
            progress.update(bar, completed=min(waited, seconds), left=left)
            time.sleep(0.1)
        progress.update(bar, completed=seconds, left="")
    return bool(done)


def _start_worker(stage: ExitStack, log: Path) -> Worker:
    _show("procrastinate --app=demo.tasks.app worker &")
    worker = start_worker(os.environ["DATABASE_URL"], log, app="demo.tasks.app")
    stage.callback(worker.kill)
    _tell(f"It is process {worker.pid}, and worker {worker.id} in procrastinate_workers.")
    return worker


def _psql(query: str, *, expanded: bool = False) -> None:
    _run(f'psql "$DATABASE_URL" {"-x " if expanded else ""}-c "{query}"')


def _run(command: str) -> None:
    _show(command)
    bindir = subprocess.run([PROJECT / "scripts/postgresql-bindir"], check=True, capture_output=True, text=True).stdout
    path = os.pathsep.join([str(Path(sys.executable).parent), bindir.strip(), os.environ["PATH"]])
    quiet = {"PSQLRC": os.devnull, "PSQL_PAGER": "", "PGOPTIONS": "", "COLUMNS": str(console.width)}
    subprocess.run(command, shell=True, check=True, cwd=PROJECT, env=os.environ | quiet | {"PATH": path})


def _value(connection: psycopg.Connection[Any], query: LiteralString, *parameters: object) -> Any:
    row = connection.execute(query, parameters).fetchone()
    return row and row[0]


def _title(text: str) -> None:
    console.print()
    console.rule(text, align="left", style="dim")


def _show(command: str) -> None:
    console.print(f"\n$ {command}", style="bold cyan", soft_wrap=True)


def _tell(text: str) -> None:
    console.print(f"\n{text}")


if __name__ == "__main__":
    sys.exit(main())
