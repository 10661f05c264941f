"""The command line ``procrastinate-stalled``: one command per SQL function.

psycopg, yoyo and rich are imported where they are used, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import psycopg
    from rich.console import Console

    from procrastinate_stalled.rows import Rescue, Status

OK, WARNING, ERROR, FAILED = 0, 1, 2, 3
INTERRUPTED = 130

SCHEMA = "procrastinate_stalled"

# invalid_schema_name, undefined_table, undefined_function, undefined_column
NOT_THERE = {"3F000", "42P01", "42883", "42703"}

# Where the server gives no hint of its own.
HINTS = {
    "42501": "Connect as the role that installed it, or as the owner of Procrastinate's tables.",
    "25006": "Connect to the primary.",
}

EXIT_CODES = (
    "Exit codes: 0 all is well; 1 a warning (status, or an error that a sweep recorded); 2 an error in status; "
    "3 the command could not do what it was asked for."
)

app = typer.Typer(
    name="procrastinate-stalled",
    help="Find the stalled jobs of Procrastinate and put them back, inside PostgreSQL.",
    epilog=f"First: procrastinate-stalled install, then: procrastinate-stalled schedule\n\n{EXIT_CODES}",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON: an object per row, keys are the SQL columns.")]
Queue = Annotated[str | None, typer.Option(help="Only jobs of this queue.")]
TaskName = Annotated[str | None, typer.Option(help="Only jobs of this task.")]


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a time such as 2030-12-31T18:30 or 2030-12-31T18:30+01:00"
        ) from error


@app.callback()
def _options(
    context: typer.Context,
    database_url: Annotated[
        str,
        typer.Option(
            "--database-url",
            "-d",
            envvar="DATABASE_URL",
            metavar="ADDRESS",
            show_default=False,
            help="The database of Procrastinate: a URL (postgresql://...) or keywords (host=... dbname=...). "
            "Without it the PG* variables of libpq apply (PGHOST, PGDATABASE, ...).",
        ),
    ] = "",
) -> None:
    context.obj = database_url


@app.command(epilog="Example:\n\nprocrastinate-stalled --database-url postgresql://app@db.example.com/app install")
def install(context: typer.Context) -> None:
    """Create the schema procrastinate_stalled, or bring it up to date.

    One transaction: it is done completely or not at all. Installing again changes nothing.
    """
    from procrastinate_stalled import installation

    with _spinner("Installing"):
        applied = installation.install(context.obj)
    if applied:
        _print(f"Installed: {', '.join(applied)}. To let pg_cron sweep: procrastinate-stalled schedule")
    else:
        _print("Already installed, nothing to do.")


@app.command()
def uninstall(context: typer.Context) -> None:
    """Remove the pg_cron job and the schema procrastinate_stalled, with the record of all rescues."""
    from procrastinate_stalled import installation

    with _spinner("Uninstalling"):
        removed = installation.uninstall(context.obj)
    _print("Uninstalled." if removed else "Not installed, nothing to do.")


@app.command(epilog="Example:\n\nprocrastinate-stalled sql | psql --quiet postgresql://app@db.example.com/app")
def sql() -> None:
    """Print the migrations as one script for psql, to install from where this package is not."""
    from procrastinate_stalled import installation

    sys.stdout.write(installation.migrations_sql())


@app.command(
    name="list",
    epilog="Examples:\n\nprocrastinate-stalled list --queue emails\n\n"
    "procrastinate-stalled list --seconds-since-heartbeat 60 --json",
)
def list_(
    context: typer.Context,
    queue: Queue = None,
    task_name: TaskName = None,
    seconds_since_heartbeat: Annotated[
        float | None,
        typer.Option(help="Instead of the rules' timeouts: the worker has been silent for more seconds, or is gone."),
    ] = None,
    nb_seconds: Annotated[
        float | None,
        typer.Option(help="Instead of all that: the job started more seconds ago, whatever its worker says."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the stalled jobs, and what a sweep would do with each."""
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        jobs = Stalled(connection).get_stalled_jobs(
            queue=queue,
            task_name=task_name,
            seconds_since_heartbeat=seconds_since_heartbeat,
            nb_seconds=nb_seconds,
        )
    if as_json:
        _print_json([asdict(job) for job in jobs])
    elif not jobs:
        _print("No stalled jobs.")
    else:
        _print_table(
            ["Job", "Queue", "Task", "Reason", "Stalled since", "A sweep would"],
            [
                (
                    job.id,
                    job.queue_name,
                    job.task_name,
                    job.reason,
                    job.stalled_at,
                    _with_detail(job.action, job.detail),
                )
                for job in jobs
            ],
        )


@app.command(epilog=f"{EXIT_CODES}\n\nExample:\n\nprocrastinate-stalled sweep --dry-run")
def sweep(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing, list what would be done.")] = False,
    as_json: Json = False,
) -> int:
    """Find the stalled jobs and rescue them by the rules, now.

    It is what pg_cron runs. Where there is no pg_cron, call it from a systemd timer or a Kubernetes CronJob.
    """
    from psycopg.rows import dict_row

    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        if dry_run:
            rescues = Stalled(connection).retry_stalled_jobs(dry_run=True)
            _print_rescues(rescues, as_json=as_json)
            return OK

        connection.add_notice_handler(_print_notice)
        cursor = connection.cursor(row_factory=dict_row)
        newest = "SELECT * FROM procrastinate_stalled.sweeps ORDER BY id DESC LIMIT 1"
        earlier = cursor.execute(newest).fetchone()
        with _sweep_progress(connection, context.obj):
            Stalled(connection).sweep()
        newest_row = cursor.execute(newest).fetchone()
    # A standby does not sweep, and leaves no row.
    row = None if newest_row == earlier else newest_row
    if as_json:
        _print_json(row)
    elif row is not None:
        _print(
            f"{row['doing']} jobs in doing: {row['retried']} retried, {row['failed']} failed, "
            f"{row['aborted']} aborted, {row['waiting']} left for a later sweep."
        )
    if row is not None and row["error"] is not None:
        _complain("Warning", f"a job could not be rescued: {row['error']}")
        return WARNING
    return OK


@app.command(
    epilog="Examples:\n\nprocrastinate-stalled retry 42\n\n"
    "procrastinate-stalled retry 42 --at 2030-12-31T18:30+01:00 --queue slow"
)
def retry(
    context: typer.Context,
    job_id: Annotated[int, typer.Argument(metavar="JOB_ID", help="The job, in status doing.")],
    at: Annotated[
        datetime | None,
        typer.Option(
            parser=_time, metavar="TIME", help="Not before this time (ISO 8601; local time unless it has an offset)."
        ),
    ] = None,
    priority: Annotated[int | None, typer.Option(help="New priority.")] = None,
    queue: Annotated[str | None, typer.Option(help="New queue.")] = None,
    lock: Annotated[str | None, typer.Option(help="New lock.")] = None,
    as_json: Json = False,
) -> None:
    """Retry one job, whatever the rules and its worker say.

    If its worker is alive after all, the job will run twice.
    """
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        rescue = Stalled(connection).retry_job(job_id, retry_at=at, priority=priority, queue=queue, lock=lock)
    if as_json:
        _print_json(asdict(rescue))
    else:
        _print(f"Job {rescue.job_id} ({rescue.task_name}): {_with_detail(rescue.action, rescue.detail)}.")


@app.command(
    epilog="Examples:\n\nprocrastinate-stalled schedule\n\nprocrastinate-stalled schedule '*/5 * * * *'\n\n"
    "procrastinate-stalled schedule '30 seconds' (with pg_cron 1.5 or later)"
)
def schedule(
    context: typer.Context,
    schedule: Annotated[str, typer.Argument(metavar="SCHEDULE", help="In the syntax of cron.")] = "* * * * *",
) -> None:
    """Let pg_cron run the sweep. Called again, it changes the schedule."""
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        job_id = Stalled(connection).schedule(schedule=schedule)
    _print(f"Scheduled: pg_cron job {job_id} runs at '{schedule}'.")


@app.command()
def unschedule(context: typer.Context) -> None:
    """Remove the pg_cron job."""
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        removed = Stalled(connection).unschedule()
    _print("Unscheduled." if removed else "Not scheduled, nothing to do.")


@app.command(epilog=EXIT_CODES)
def status(context: typer.Context, as_json: Json = False) -> int:
    """Check the health of the whole: Procrastinate, the schedule, the last sweep, the jobs."""
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        stalled = Stalled(connection)
        checks = [*stalled.status(), _package_status(stalled.version())]
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        from rich.text import Text

        colors = {"ok": "green", "warning": "yellow", "error": "red"}
        _print_table(
            ["Check", "Level", "Detail"],
            [
                (
                    check.name,
                    Text(check.level, style=colors[check.level]),
                    Text.assemble(check.detail, (f"\n{check.hint}" if check.hint else "", "dim")),
                )
                for check in checks
            ],
        )
    return max({"ok": OK, "warning": WARNING, "error": ERROR}[check.level] for check in checks)


@app.command()
def rules(context: typer.Context, as_json: Json = False) -> None:
    """Show the rules, in the order in which a job is compared with them.

    They are edited with SQL, in the table procrastinate_stalled.rules.
    """
    from psycopg.rows import dict_row

    with _connection(context) as connection:
        cursor = connection.cursor(row_factory=dict_row)
        rows = cursor.execute("SELECT * FROM procrastinate_stalled.rules ORDER BY position, name").fetchall()
    if as_json:
        _print_json(rows)
    elif not rows:
        _print("No rules: no job is ever called stalled.")
    else:
        _print_table(
            ["Position", "Rule", "Jobs", "Stalled after", "A sweep would"],
            [
                (
                    rule["position"],
                    _with_detail(rule["name"], _validity(rule)),
                    _matches(rule),
                    _timeouts(rule),
                    _actions(rule),
                )
                for rule in rows
            ],
        )


def main() -> None:
    """Run the command line and exit."""
    logging.getLogger("procrastinate_stalled").addHandler(_StderrHandler())
    sys.exit(_run())


def _run() -> int:
    # typer exports only some of the usage errors.
    usage_error = typer.BadParameter.__base__
    try:
        code = app(prog_name="procrastinate-stalled", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        if usage_error is not None and isinstance(error, usage_error):
            error.show()  # type: ignore[attr-defined]
            return FAILED

        import psycopg

        if not isinstance(error, psycopg.Error):
            raise
        _complain("Error", *_explain(error))
        return FAILED
    return code or OK


def _explain(error: psycopg.Error) -> tuple[str, str | None, str | None]:
    """Return what is wrong, the fact behind it and what to do."""
    message, hint = error.diag.message_primary, error.diag.message_hint
    if message is not None:
        if error.sqlstate in NOT_THERE and (SCHEMA in message or error.sqlstate == "42703"):
            return (
                f"{SCHEMA} is not installed in this database, or in another version",
                message,
                "Install it, or bring it up to date: procrastinate-stalled install",
            )
        return message, error.diag.message_detail, hint or HINTS.get(error.sqlstate or "")

    # An address that libpq does not understand, such as postgresql+psycopg://..., is quoted with its password.
    text = re.sub(r"(://[^:@/\s]*):\S*@", r"\1:***@", str(error))
    detail = "\n".join(line.strip() for line in text.splitlines() if line.strip())
    hint = "Name the database with --database-url, DATABASE_URL or the PG* variables: postgresql://user@host/database"
    if re.search(r"unsupported startup parameter|statement pooling", detail):
        hint = (
            "That is PgBouncer. Connect to the server itself (most often port 5432), "
            "or leave that parameter out of the address."
        )
    return "no connection to the database", detail, hint


@contextmanager
def _connection(context: typer.Context) -> Iterator[psycopg.Connection[Any]]:
    import psycopg

    with psycopg.connect(
        context.obj,
        autocommit=True,
        client_encoding="utf8",
        fallback_application_name="procrastinate-stalled",
    ) as connection:
        yield connection


def _package_status(sql_version: str) -> Status:
    from procrastinate_stalled import __version__
    from procrastinate_stalled.rows import Status

    if sql_version == __version__:
        return Status("package", "ok", f"version {__version__}, as in the database", None)
    return Status(
        "package",
        "warning",
        f"this package has version {__version__}, the database {sql_version}",
        "Use the same version of the package here, or bring the database up to date: procrastinate-stalled install",
    )


# What is printed. Tables and JSON go to stdout, everything else to stderr.


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def _print(text: str) -> None:
    _console().print(text, soft_wrap=True)


def _complain(title: str, message: str, detail: str | None = None, hint: str | None = None) -> None:
    console = _console(stderr=True)
    console.print(f"{title}:", message, style="red" if title == "Error" else "yellow", soft_wrap=True)
    # A hint may be a statement to paste, so its lines are not broken.
    if detail:
        console.print(detail, soft_wrap=True)
    if hint:
        console.print(f"Hint: {hint}", soft_wrap=True)


def _print_json(value: Any) -> None:
    def default(value: Any) -> Any:
        return value.total_seconds() if isinstance(value, timedelta) else value.isoformat()

    sys.stdout.write(json.dumps(value, default=default, indent=2) + "\n")


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(*headers, box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else _cell(cell) for cell in row))
    for column in table.columns:
        column.overflow = "fold"
    console = _console()
    with console.capture() as printed:
        console.print(table)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in printed.get().splitlines())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{value.astimezone():%Y-%m-%d %H:%M:%S}"
    return str(value)


def _with_detail(text: str, detail: str | None) -> str:
    return f"{text} ({detail})" if detail else text


def _print_rescues(rescues: Sequence[Rescue], *, as_json: bool) -> None:
    if as_json:
        _print_json([asdict(rescue) for rescue in rescues])
    elif not rescues:
        _print("No stalled jobs to rescue.")
    else:
        _print_table(
            ["Job", "Queue", "Task", "Reason", "Rule", "Would be"],
            [
                (
                    rescue.job_id,
                    rescue.queue_name,
                    rescue.task_name,
                    rescue.reason,
                    rescue.rule_name,
                    _with_detail(rescue.action, rescue.detail),
                )
                for rescue in rescues
            ],
        )


def _validity(rule: Mapping[str, Any]) -> str | None:
    if not rule["enabled"]:
        return "disabled"
    return f"until {_cell(rule['expires_at'])}" if rule["expires_at"] else None


def _matches(rule: Mapping[str, Any]) -> str:
    conditions = [
        f"{title} {value}"
        for title, value in (
            ("queue", rule["queue_name"]),
            ("task", rule["task_name"]),
            ("args", None if rule["args"] is None else json.dumps(rule["args"])),
        )
        if value is not None
    ]
    return ", ".join(conditions) or "all"


def _timeouts(rule: Mapping[str, Any]) -> str:
    if rule["action"] == "ignore":
        return "never"
    timeouts = [
        f"{rule[column]} of {what}"
        for column, what in (("heartbeat_timeout", "silence"), ("run_timeout", "running"))
        if rule[column] is not None
    ]
    return ", ".join(timeouts) or "never"


def _actions(rule: Mapping[str, Any]) -> str:
    if rule["action"] != "retry":
        return str(rule["action"])
    parts = ["retry" if rule["max_rescues"] is None else f"retry {rule['max_rescues']} times"]
    if rule["retry_delay"]:
        parts.append(f"after {rule['retry_delay']} (then times {rule['retry_backoff']:g})")
    if rule["retry_queue_name"] is not None:
        parts.append(f"in queue {rule['retry_queue_name']}")
    if rule["retry_priority"] is not None:
        parts.append(f"with priority {rule['retry_priority']}")
    return ", ".join(parts)


class _StderrHandler(logging.Handler):
    """Shows what the package logs, such as the warning of an uninstall."""

    def emit(self, record: logging.LogRecord) -> None:
        message, _, hint = record.getMessage().partition("\n")
        _complain("Warning", message, hint=hint)


def _print_notice(diagnostic: psycopg.errors.Diagnostic) -> None:
    if diagnostic.severity_nonlocalized in ("NOTICE", "WARNING"):
        _complain("Warning", diagnostic.message_primary or "", diagnostic.message_detail, diagnostic.message_hint)


# What is shown while one waits, on a terminal only.


@contextmanager
def _spinner(text: str) -> Iterator[None]:
    with _console(stderr=True).status(f"{text} ..."):
        yield


@contextmanager
def _sweep_progress(connection: psycopg.Connection[Any], database_url: str) -> Iterator[None]:
    """Count the rescued jobs, of those found, through a connection of its own."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield
        return

    import psycopg
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    found, last_id = connection.execute(
        """
        SELECT (
                SELECT count(*)
                    FROM procrastinate_stalled.get_stalled_jobs()
                    WHERE action IN ('retry', 'fail', 'abort')
            ),
            (SELECT coalesce(max(id), 0) FROM procrastinate_stalled.rescues)
        """
    ).fetchone() or (0, 0)
    ended = threading.Event()
    progress = Progress(
        TextColumn("Rescuing stalled jobs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    bar = progress.add_task("", total=found)

    def count() -> None:
        # Without a second connection the sweep goes on, and the bar stands still.
        with suppress(psycopg.Error), psycopg.connect(database_url, autocommit=True) as counting:
            while not ended.wait(0.2):
                rescued = counting.execute(
                    "SELECT count(*) FROM procrastinate_stalled.rescues WHERE id > %s", [last_id]
                ).fetchone()
                progress.update(bar, completed=rescued[0] if rescued else 0)

    counter = threading.Thread(target=count)
    with progress:
        counter.start()
        try:
            yield
        finally:
            ended.set()
            counter.join()
