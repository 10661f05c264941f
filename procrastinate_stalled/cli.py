"""The command line ``procrastinate-stalled``: one command per SQL function.

psycopg, yoyo and rich are imported where they are used, so that ``--help`` answers at once.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from procrastinate_stalled.rule_values import HOW_TO_WRITE_A_DURATION, REFUSED_COLUMNS, has_no_unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import psycopg
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

    from procrastinate_stalled.rows import ExplainedJob, Rescue, Status

OK, WARNING, ERROR, FAILED = 0, 1, 2, 3
INTERRUPTED = 130
TERMINATED = 143

SCHEMA = "procrastinate_stalled"

# invalid_schema_name, undefined_table, undefined_function, undefined_column
NOT_THERE = {"3F000", "42P01", "42883", "42703"}

# Where the server gives no hint of its own.
HINTS = {
    "22007": HOW_TO_WRITE_A_DURATION,
    "22015": HOW_TO_WRITE_A_DURATION,
    "42501": f"Ask the owner of schema {SCHEMA}: procrastinate-stalled grant-monitor ROLE to look, "
    "procrastinate-stalled grant-operator ROLE to retry too. Who may do the rest, and install: docs/privileges.md",
    "25006": "Connect to the primary.",
}

EXIT_CODES = (
    "Exit codes: 0 all is well; 1 a warning (status, or an error that a sweep recorded); 2 an error in status; "
    "3 the command could not do what it was asked for."
)


@dataclass(frozen=True)
class Program:
    """The program that runs the commands: what its user must type."""

    name: str = "procrastinate-stalled"
    install: str = "procrastinate-stalled install"
    uninstall: str = "procrastinate-stalled uninstall"
    choose_database: str = (
        "Name the database with --database-url, DATABASE_URL or the PG* variables: postgresql://user@host/database"
    )

    def named_in(self, text: str) -> str:
        """Return a text that says ``procrastinate-stalled COMMAND`` with what runs that command here."""
        others = {"install": self.install, "uninstall": self.uninstall}
        return re.sub(
            r"\bprocrastinate-stalled ([a-z][a-z-]*)",
            lambda found: others.get(found[1], f"{self.name} {found[1]}"),
            text,
        )


PROCRASTINATE_STALLED = Program()

_program = ContextVar("_program", default=PROCRASTINATE_STALLED)

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
TaskPattern = Annotated[
    str | None,
    typer.Option(metavar="PATTERN", help="Only jobs whose task is LIKE this pattern, such as billing.%."),
]
CronDatabase = Annotated[
    str | None,
    typer.Option(
        "--cron-database",
        metavar="ADDRESS",
        help="Where pg_cron lives, if that is another database of the server: its name, or an address as for "
        "--database-url, of which what is left out is the same as there.",
    ),
]
RuleName = Annotated[str, typer.Argument(metavar="NAME", help="The rule.")]
Role = Annotated[
    str, typer.Argument(metavar="ROLE", help="A role of the server, as it is there: upper and lower case count.")
]


COLORS = {
    "ok": "green",
    "warning": "yellow",
    "error": "red",
    "alive": "green",
    "silent": "red",
    "running": "green",
    "held": "yellow",
    "stalled": "red",
    "ignored": "dim",
}

# On the command line it stands for NULL.
NONE = "none"

# An option for each column of the table rules, with what its value is. What is not given is left to the table.
RULE_COLUMNS = {
    "position": ("INTEGER", "Order in which the rules are tried, lowest first."),
    "enabled": ("BOOLEAN", "Whether the rule matches anything."),
    "expires_at": (
        "TIME",
        "The rule is void from then on (ISO 8601; local time unless it has an offset). none: it never expires.",
    ),
    "queue_name": ("NAME", "Only jobs of exactly this queue. none: of any."),
    "task_name": ("PATTERN", "Only jobs whose task is LIKE this pattern, such as billing.%. none: any."),
    "args": ("JSON", "Only jobs whose arguments contain this object. none: any."),
    "heartbeat_timeout": (
        "DURATION",
        "Stalled when the worker has not been heard of for so long. none: silence never counts.",
    ),
    "run_timeout": ("DURATION", "Stalled when it started so long ago, whatever its worker says. none: no limit."),
    "action": ("ACTION", "retry, fail, or ignore: never touch it."),
    "max_rescues": ("INTEGER", "After so many retries of the same job it is failed, not retried. none: no limit."),
    "retry_delay": ("DURATION", "Wait before the first retry of a job."),
    "retry_backoff": ("NUMBER", "Each further rescue of the same job waits this many times longer."),
    "retry_queue_name": ("NAME", "Queue of the retry. none: unchanged."),
    "retry_priority": ("INTEGER", "Priority of the retry. none: unchanged."),
    "on_duplicate": (
        "ACTION",
        "When another job with the same queueing lock already waits: fail the stalled one, or wait for a later sweep.",
    ),
    "note": ("TEXT", "Free text. none: no note."),
}


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(
            f"{text!r} is not a time such as 2030-12-31T18:30 or 2030-12-31T18:30+01:00"
        ) from error


def _time_text(text: str) -> str:
    return text if text == NONE else _time(text).isoformat()


def _duration_text(text: str) -> str:
    if has_no_unit(text):
        raise typer.BadParameter(f"{text!r} has no unit. {HOW_TO_WRITE_A_DURATION}")
    return text


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
    """Remove the pg_cron job and the schema procrastinate_stalled, with the record of all rescues.

    Views of yours on what is in the schema are dropped too, without a word.
    """
    from procrastinate_stalled import installation

    with _spinner("Uninstalling"):
        removed = installation.uninstall(context.obj)
    _print("Uninstalled." if removed else "Not installed, nothing to do.")


@app.command(epilog="Example:\n\nprocrastinate-stalled sql | psql --quiet postgresql://app@db.example.com/app")
def sql(
    tle: Annotated[
        bool, typer.Option("--tle", help="Make CREATE EXTENSION possible in a database that has pg_tle.")
    ] = False,
) -> None:
    """Print a script for psql that installs, or brings up to date, where this package is not."""
    from procrastinate_stalled import installation

    sys.stdout.write(installation.tle_script() if tle else installation.psql_script())


@app.command(
    name="list",
    epilog="Examples:\n\nprocrastinate-stalled list --queue emails\n\n"
    "procrastinate-stalled list --seconds-since-heartbeat 60 --json\n\nprocrastinate-stalled list --watch",
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
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Instead: all running jobs, with the time left until each counts as stalled, until Ctrl-C.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the stalled jobs, and what a sweep would do with each."""
    from procrastinate_stalled.client import Stalled

    if watch:
        if as_json or seconds_since_heartbeat is not None or nb_seconds is not None:
            raise typer.BadParameter(
                "it goes together with --queue and --task-name only, not with --seconds-since-heartbeat, "
                "--nb-seconds or --json.",
                param_hint="--watch",
            )
        _watch(context, queue, task_name)

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


@app.command(epilog="Example:\n\nprocrastinate-stalled explain 42")
def explain(
    context: typer.Context,
    job_id: Annotated[int, typer.Argument(metavar="JOB_ID", help="The job, in any status.")],
    as_json: Json = False,
) -> None:
    """Say whether a job is stalled, by which rule, on what evidence, and when it will be."""
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        if not as_json:
            _use_local_time(connection)
        job = Stalled(connection).explain_job(job_id)
    if as_json:
        _print_json(asdict(job))
        return
    _print(f"Job {job_id}: {job.sentence}.")
    evidence = [
        ("Queue", job.queue_name),
        ("Task", job.task_name),
        ("Status", job.status),
        ("Attempts", job.attempts),
        ("Started", job.started_at),
        ("Worker", job.worker_id),
        ("Last heartbeat", job.last_heartbeat),
        ("Seen without a worker", job.seen_at),
        ("Server available since", job.available_since),
        ("Rule", job.rule_name),
        ("Verdict", _colored(job.verdict)),
        ("Stalled at", job.stalled_at),
        ("Reason", job.reason),
        ("A sweep would then", job.action and _with_detail(job.action, job.detail)),
    ]
    if job.status is not None:
        _print("")
        _print_table(["Evidence", ""], [(name, value) for name, value in evidence if value is not None])


@app.command()
def workers(context: typer.Context, as_json: Json = False) -> None:
    """List the workers, with their last heartbeats and the number of jobs that each runs."""
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        workers = Stalled(connection).workers()
    if as_json:
        _print_json([asdict(worker) for worker in workers])
    elif not workers:
        _print("No workers.")
    else:
        _print_table(
            ["Worker", "Last heartbeat", "Age", "Doing", "State"],
            [
                (worker.worker_id, worker.last_heartbeat, worker.age, worker.doing, _colored(worker.state))
                for worker in workers
            ],
        )


@app.command(epilog="Example:\n\nprocrastinate-stalled runtimes --since 2030-12-31T18:30")
def runtimes(
    context: typer.Context,
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=_time,
            metavar="TIME",
            help="Only runs that started since then (ISO 8601; local time unless it has an offset). "
            "Without it: in the last 7 days.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how long the runs of each task took: the basis for a run timeout."""
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        runtimes = Stalled(connection).task_runtimes(since)
    if as_json:
        _print_json([asdict(runtime) for runtime in runtimes])
    elif not runtimes:
        _print("No run has started and ended in that time.")
    else:
        _print_table(
            ["Task", "Runs", "p50", "p99", "Longest"],
            [(runtime.task_name, runtime.runs, runtime.p50, runtime.p99, runtime.longest) for runtime in runtimes],
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
        held = _with_detail(f"{row['held']} held", row["held_reason"])
        _print(
            f"{row['doing']} jobs in doing: {row['retried']} retried, {row['failed']} failed, "
            f"{row['aborted']} aborted, {held}, "
            f"{row['waiting']} left for a later sweep."
        )
    if row is not None and row["error"] is not None:
        _complain("Warning", f"not all jobs could be rescued: {row['error']}")
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
    epilog="Examples:\n\nprocrastinate-stalled pause\n\n"
    "procrastinate-stalled pause '2 hours' --task-name billing.% --reason 'the network is being moved'"
)
def pause(
    context: typer.Context,
    duration: Annotated[
        str | None,
        typer.Argument(
            parser=_duration_text,
            metavar="DURATION",
            help="For how long, as PostgreSQL writes it: '90 min', '2 days'. Without it: 1 hour.",
        ),
    ] = None,
    queue: Queue = None,
    task_name: TaskPattern = None,
    reason: Annotated[str | None, typer.Option(help="Free text for whoever meets the pause.")] = None,
) -> None:
    """Rescue no job for a while."""
    from psycopg import sql
    from psycopg.rows import dict_row

    arguments = {"duration": duration, "queue": queue, "task_name": task_name, "reason": reason}
    given = {name: value for name, value in arguments.items() if value is not None}
    call = sql.SQL("SELECT * FROM procrastinate_stalled.pause({})").format(
        sql.SQL(", ").join(sql.SQL("{} => {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in given)
    )
    with _connection(context) as connection:
        connection.add_notice_handler(_print_notice)
        (rule,) = connection.cursor(row_factory=dict_row).execute(call, given).fetchall()
    _print(f"Paused until {_cell(rule['expires_at'])}. Jobs: {_matches(rule)}.")


@app.command(epilog="Example:\n\nprocrastinate-stalled resume --task-name billing.%")
def resume(context: typer.Context, queue: Queue = None, task_name: TaskPattern = None) -> None:
    """Remove the pause that was made with the same options."""
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        connection.add_notice_handler(_print_notice)
        _use_local_time(connection)
        removed = Stalled(connection).resume(queue=queue, task_name=task_name)
    _print("Resumed." if removed else "Not paused, nothing to do.")


@app.command(
    epilog="Examples:\n\nprocrastinate-stalled schedule\n\nprocrastinate-stalled schedule '*/5 * * * *'\n\n"
    "procrastinate-stalled schedule '30 seconds' (with pg_cron 1.5 or later)\n\n"
    "procrastinate-stalled schedule --cron-database postgres"
)
def schedule(
    context: typer.Context,
    schedule: Annotated[str, typer.Argument(metavar="SCHEDULE", help="In the syntax of cron.")] = "* * * * *",
    cron_database: CronDatabase = None,
) -> None:
    """Let pg_cron run the sweep. Called again, it changes the schedule."""
    from procrastinate_stalled import cron_database as elsewhere
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        if cron_database is None:
            job_id = Stalled(connection).schedule(schedule=schedule)
        else:
            job_id = elsewhere.schedule(connection, elsewhere.address(cron_database, context.obj), schedule)
    _print(f"Scheduled: pg_cron job {job_id} runs at '{schedule}'.")


@app.command()
def unschedule(context: typer.Context, cron_database: CronDatabase = None) -> None:
    """Remove the pg_cron job."""
    import psycopg

    from procrastinate_stalled import cron_database as elsewhere
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        if cron_database is None:
            try:
                removed = Stalled(connection).unschedule()
            except psycopg.errors.InvalidSchemaName as error:
                message, detail, _hint = _explain(error)
                _complain("Error", message, detail, "To remove a job that is left: procrastinate-stalled uninstall")
                raise typer.Exit(FAILED) from error
        else:
            removed = elsewhere.unschedule(connection, elsewhere.address(cron_database, context.obj))
    _print("Unscheduled." if removed else "Not scheduled, nothing to do.")


@app.command(epilog="Example:\n\nprocrastinate-stalled grant-monitor grafana")
def grant_monitor(context: typer.Context, role: Role) -> None:
    """Let a role look at everything here, and change nothing. Again after an upgrade."""
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        Stalled(connection).grant_monitor(role)
    _print(f"Granted: role {role} may look.")


@app.command(epilog="Example:\n\nprocrastinate-stalled grant-operator on_call")
def grant_operator(context: typer.Context, role: Role) -> None:
    """Let a role look at everything here, and retry jobs. Again after an upgrade."""
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        Stalled(connection).grant_operator(role)
    _print(f"Granted: role {role} may look and retry.")


@app.command(epilog=EXIT_CODES)
def status(context: typer.Context, cron_database: CronDatabase = None, as_json: Json = False) -> int:
    """Check the health of the whole: Procrastinate, the schedule, the last sweep, the jobs."""
    from procrastinate_stalled import cron_database as elsewhere
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        stalled = Stalled(connection)
        if cron_database is None:
            checks = stalled.status()
        else:
            jobs = _jobs_of_pg_cron(connection, cron_database, context.obj)
            with elsewhere.told(connection, jobs):
                checks = stalled.status()
        checks.append(_package_status(stalled.version()))
    checks = [replace(check, hint=check.hint and _program.get().named_in(check.hint)) for check in checks]
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        _print_table(
            ["Check", "Level", "Detail"], [(check.name, _colored(check.level), check.detail) for check in checks]
        )
        # Not in the table, which would break the lines of a statement to paste.
        for check in checks:
            if check.hint:
                _print(f"\n{check.name}: {check.hint}")
    return max({"ok": OK, "warning": WARNING, "error": ERROR}[check.level] for check in checks)


def _jobs_of_pg_cron(connection: psycopg.Connection[Any], cron_database: str, conninfo: str) -> dict[str, Any]:
    """Return what `status` is to judge, also where it cannot be read."""
    import psycopg

    from procrastinate_stalled import cron_database as elsewhere

    try:
        return elsewhere.read_jobs(connection, elsewhere.address(cron_database, conninfo))
    except psycopg.Error as error:
        message, detail, hint = _explain(error)
        # It reads only, and the commands that do not have the same hints.
        hint = (hint or "").removeprefix("Nothing was changed. ")
        return {"problem": ": ".join(filter(None, (message, detail))), "hint": hint}


@app.command(epilog="Example:\n\nprocrastinate-stalled set-procrastinate-schema app")
def set_procrastinate_schema(
    context: typer.Context,
    schema: Annotated[str, typer.Argument(metavar="SCHEMA", help="Its name. Upper and lower case count.")],
) -> None:
    """Look for Procrastinate in another schema, because it was moved, or a dump was restored."""
    from procrastinate_stalled.client import Stalled

    with _connection(context) as connection:
        Stalled(connection).set_procrastinate_schema(schema)
    _print(f"Procrastinate is looked for in schema {schema}.")


rules_app = typer.Typer(
    invoke_without_command=True,
    subcommand_metavar="[COMMAND] [ARGS]...",
    epilog="Examples:\n\nprocrastinate-stalled rules\n\n"
    "procrastinate-stalled rules change default --heartbeat-timeout '10 min'",
)
app.add_typer(rules_app, name="rules")


@rules_app.callback()
def rules(context: typer.Context, as_json: Json = False) -> None:
    """Show the rules, in the order in which a job is compared with them; or add, change or remove one.

    The same is done by SQL in the table procrastinate_stalled.rules.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise typer.BadParameter("only the list of the rules is printed so.", param_hint="--json")
        return

    from psycopg.rows import dict_row

    with _connection(context) as connection:
        cursor = connection.cursor(row_factory=dict_row)
        rows = cursor.execute("SELECT * FROM procrastinate_stalled.rules ORDER BY position, name").fetchall()
    if as_json:
        _print_json(rows)
    elif not rows:
        _print("No rules: no job is ever called stalled.")
    else:
        _print_rules(rows)


RULE_PARSERS = {"TIME": _time_text, "DURATION": _duration_text}


def _with_rule_columns(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each of `RULE_COLUMNS`; it gets those that were given as its last argument."""

    @wraps(command)
    def with_columns(context: typer.Context, name: str, **options: str | None) -> None:
        given = {column: text for column, text in options.items() if text is not None}
        command(context, name, {column: None if text == NONE else text for column, text in given.items()})

    context, name, _columns = inspect.signature(command, eval_str=True).parameters.values()
    options = [
        inspect.Parameter(
            column,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(parser=RULE_PARSERS.get(metavar), metavar=metavar, help=explanation),
            ],
        )
        for column, (metavar, explanation) in RULE_COLUMNS.items()
    ]
    with_columns.__signature__ = inspect.Signature([context, name, *options])  # type: ignore[attr-defined]
    return with_columns


@rules_app.command(
    epilog="Examples:\n\nprocrastinate-stalled rules add reports --queue-name reports --heartbeat-timeout '1 hour'\n\n"
    "procrastinate-stalled rules add 'charge once' --task-name billing.% --action fail"
)
@_with_rule_columns
def add(context: typer.Context, name: RuleName, columns: dict[str, str | None]) -> None:
    """Add a rule. What is not given gets the default of the table."""
    from psycopg import sql
    from psycopg.rows import dict_row

    row = {"name": name, **columns}
    statement = sql.SQL("INSERT INTO procrastinate_stalled.rules ({}) VALUES ({}) RETURNING *").format(
        sql.SQL(", ").join(map(sql.Identifier, row)), sql.SQL(", ").join([sql.Placeholder()] * len(row))
    )
    with _connection(context) as connection, _refused_values(connection, row):
        rules = connection.cursor(row_factory=dict_row).execute(statement, list(row.values())).fetchall()
    _print(f"Added rule {name}.\n")
    _print_rules(rules)


@rules_app.command(
    epilog="Examples:\n\nprocrastinate-stalled rules change default --run-timeout '6 hours' --max-rescues none\n\n"
    "procrastinate-stalled rules change reports --enabled false"
)
@_with_rule_columns
def change(context: typer.Context, name: RuleName, columns: dict[str, str | None]) -> None:
    """Change a rule. What is not given stays as it is."""
    from psycopg import sql
    from psycopg.rows import dict_row

    if not columns:
        raise typer.BadParameter("there is nothing to change: give at least one option.")
    statement = sql.SQL(
        "UPDATE procrastinate_stalled.rules SET {} WHERE name OPERATOR(pg_catalog.=) {} RETURNING *"
    ).format(
        sql.SQL(", ").join(sql.SQL("{} = {}").format(sql.Identifier(column), sql.Placeholder()) for column in columns),
        sql.Placeholder(),
    )
    with _connection(context) as connection, _refused_values(connection, columns):
        rules = connection.cursor(row_factory=dict_row).execute(statement, [*columns.values(), name]).fetchall()
        if not rules:
            _refuse_unknown_rule(connection, name)
    _print(f"Changed rule {name}.\n")
    _print_rules(rules)


@rules_app.command(epilog="Example:\n\nprocrastinate-stalled rules remove reports")
def remove(context: typer.Context, name: RuleName) -> None:
    """Remove a rule. Its jobs obey the next rule that matches them."""
    with _connection(context) as connection:
        statement = "DELETE FROM procrastinate_stalled.rules WHERE name OPERATOR(pg_catalog.=) %s"
        if connection.execute(statement, [name]).rowcount == 0:
            _refuse_unknown_rule(connection, name)
    _print(f"Removed rule {name}.")


@contextmanager
def _refused_values(connection: psycopg.Connection[Any], values: Mapping[str, str | None]) -> Iterator[None]:
    """Explain which value the table rules refuses, and exit.

    Parameters
    ----------
    values :
        By column, in the order of the statement's parameters.
    """
    import psycopg

    try:
        yield
    except psycopg.errors.UniqueViolation as error:
        _complain(
            "Error",
            f"there is already a rule {values['name']}",
            error.diag.message_detail,
            "Choose another name, or change that rule: procrastinate-stalled rules change",
        )
    except (psycopg.errors.CheckViolation, psycopg.errors.NotNullViolation, psycopg.DataError) as error:
        parameter = re.search(r"\$(\d+)", error.diag.context or "")
        described = dict(
            connection.execute(
                REFUSED_COLUMNS,
                {
                    "constraint": error.diag.constraint_name,
                    "column": list(values)[int(parameter[1]) - 1] if parameter else error.diag.column_name,
                },
            ).fetchall()
        )
        if not described:
            raise
        refused = [
            f"{column} {NONE if values[column] is None else repr(values[column])}"
            for column in described
            if column in values
        ]
        _complain(
            "Error",
            f"the table of rules refuses {' with '.join(refused)}",
            error.diag.message_primary,
            "\n".join(
                [f"{column}: {comment}" for column, comment in described.items()]
                + ([HINTS[error.sqlstate]] if error.sqlstate in HINTS else [])
            ),
        )
    else:
        return
    raise typer.Exit(FAILED)


def _refuse_unknown_rule(connection: psycopg.Connection[Any], name: str) -> NoReturn:
    names = connection.execute("SELECT name FROM procrastinate_stalled.rules ORDER BY position, name").fetchall()
    _complain(
        "Error",
        f"there is no rule {name}",
        f"The rules are: {', '.join(name for (name,) in names)}." if names else "There are no rules.",
        "Add it: procrastinate-stalled rules add",
    )
    raise typer.Exit(FAILED)


def main() -> None:
    """Run the command line and exit."""
    logging.getLogger("procrastinate_stalled").addHandler(_StderrHandler())
    sys.exit(run(app))


def run(command: Callable[..., int | None], program: Program = PROCRASTINATE_STALLED, **options: Any) -> int:
    """Run the commands of `app`, or some of them, and return the exit code. All errors have been printed then."""
    token = _program.set(program)
    try:
        return _run(command, prog_name=program.name, **options)
    finally:
        _program.reset(token)


def _run(command: Callable[..., int | None], **options: Any) -> int:
    # It would warn of the offset of _use_local_time, and write across the table of list --watch.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    # typer exports only some of the usage errors.
    usage_error = typer.BadParameter.__base__
    try:
        code = command(standalone_mode=False, **options)
    except typer.Abort:
        return INTERRUPTED
    except UnicodeEncodeError as error:
        _complain("Error", "an argument is not valid UTF-8", str(error), "Write it in the encoding of the terminal.")
        return FAILED
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
        # Our own errors have a detail: of a Procrastinate that is not in the schema that was named.
        if (
            error.sqlstate in NOT_THERE
            and (SCHEMA in message or error.sqlstate == "42703")
            and error.diag.message_detail is None
        ):
            return (
                f"{SCHEMA} is not installed in this database, or in another version",
                message,
                "Install it, or bring it up to date: procrastinate-stalled install",
            )
        return message, error.diag.message_detail, hint or HINTS.get(error.sqlstate or "")

    import psycopg

    if isinstance(error, psycopg.DataError):
        return (
            "what the database answered cannot be shown",
            str(error),
            "The command was carried out. Python cannot read all times and all JSON: look at it with psql.",
        )

    from procrastinate_stalled.cron_database import NoConnectionToCronDatabase

    detail = "\n".join(line.strip() for line in _without_password(error).splitlines() if line.strip())
    hint = _program.get().choose_database
    message = "no connection to the database"
    if isinstance(error, NoConnectionToCronDatabase):
        hint = "Name it with --cron-database: postgres, or postgresql://user@host/postgres"
        message = "no connection to the database of pg_cron"
    if re.search(r"unsupported startup parameter|statement pooling", detail):
        hint = (
            "That is PgBouncer. Connect to the server itself (most often port 5432), "
            "or leave that parameter out of the address."
        )
    if re.search(r"percent-encoded|[*]{3}@", detail):
        hint = f"In a URL, encode % as %25, @ as %40, / as %2F, : as %3A and a space as %20. {hint}"
    return message, detail, hint


def _without_password(error: psycopg.Error) -> str:
    """Return why there is no connection, without what may be a password or a part of it."""
    import psycopg

    if isinstance(error, psycopg.ProgrammingError) or isinstance(error.__cause__, psycopg.ProgrammingError):
        # libpq does not understand the address, and quotes the piece: all of postgresql+psycopg://..., or just s3%cret.
        return re.sub(
            r'("[=:/\]]")|"(postgres[a-z+]*://)?.+"',
            lambda found: found[1] or f'"{found[2] or ""}***"',
            str(error),
            flags=re.DOTALL,
        )
    # It takes the rest of a password with an unencoded @ for a part of the host.
    return re.sub(r"""(\b(?:host|host name|database) ['"])[^'"]*@""", r"\1***@", str(error))


@contextmanager
def _connection(context: typer.Context, **options: Any) -> Iterator[psycopg.Connection[Any]]:
    import psycopg
    from psycopg.types.json import set_json_loads

    with psycopg.connect(
        context.obj,
        autocommit=True,
        client_encoding="utf8",
        fallback_application_name="procrastinate-stalled",
        **options,
    ) as connection:
        set_json_loads(_read_json, connection)
        yield connection


def _read_json(text: str | bytes) -> Any:
    """Return what psycopg would, or raise what it does for other values that Python cannot read."""
    import psycopg

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise psycopg.DataError(f"can't parse JSON: {error}") from error


def _use_local_time(connection: psycopg.Connection[Any]) -> None:
    """Let the server write times of day as the tables here do."""
    offset = datetime.now().astimezone().utcoffset() or timedelta()
    connection.execute("SELECT pg_catalog.set_config('TimeZone', %s, false)", [str(offset.total_seconds() / 3600)])


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
        console.print(f"Hint: {_program.get().named_in(hint)}", soft_wrap=True)


def _print_json(value: Any) -> None:
    def default(value: Any) -> Any:
        return value.total_seconds() if isinstance(value, timedelta) else value.isoformat()

    sys.stdout.write(json.dumps(value, default=default, indent=2) + "\n")


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(*headers, box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else _cell(cell) for cell in row))
    for column in table.columns:
        column.overflow = "fold"
    return table


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    console = _console()
    with console.capture() as printed:
        console.print(_table(headers, rows))
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in printed.get().splitlines())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{value.astimezone():%Y-%m-%d %H:%M:%S}"
    if isinstance(value, timedelta):
        return _duration(value)
    # Whoever may defer jobs chooses their names: none of them gets at the terminal.
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", str(value))


def _duration(value: timedelta) -> str:
    """Return the duration with its two largest units; below 10 seconds with a fraction."""
    # Negative where a clock was wrong.
    seconds = max(value.total_seconds(), 0)
    if seconds < 1:
        return f"{round(seconds * 1000, 1):g} ms" if seconds else "0 s"
    if seconds < 10:
        return f"{round(seconds, 1):g} s"
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    units = [(days, "d"), (hours, "h"), (rest // 60, "min"), (rest % 60, "s")]
    largest = next(index for index, (number, _unit) in enumerate(units) if number)
    return " ".join(f"{number} {unit}" for number, unit in units[largest : largest + 2] if number)


def _colored(word: str) -> Text:
    from rich.text import Text

    return Text(word, style=COLORS.get(word, ""))


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


def _print_rules(rules: Sequence[Mapping[str, Any]]) -> None:
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
            for rule in rules
        ],
    )


def _validity(rule: Mapping[str, Any]) -> str | None:
    if not rule["enabled"]:
        return "disabled"
    if rule["expires_at"] and rule["expires_at"] <= datetime.now().astimezone():
        return f"expired {_cell(rule['expires_at'])}"
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
        f"{_duration(rule[column])} of {what}"
        for column, what in (("heartbeat_timeout", "silence"), ("run_timeout", "running"))
        if rule[column] is not None
    ]
    return ", ".join(timeouts) or "never"


def _actions(rule: Mapping[str, Any]) -> str:
    if rule["action"] != "retry":
        return str(rule["action"])
    limits = {None: "retry", 1: "retry once"}
    parts = [limits.get(rule["max_rescues"], f"retry {rule['max_rescues']} times")]
    if rule["retry_delay"]:
        parts.append(f"after {_duration(rule['retry_delay'])} (then times {rule['retry_backoff']:g})")
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


# The live table of list --watch.


@dataclass(frozen=True)
class _RunningJobs:
    """The running jobs as the database described them last. Each time it is drawn, it has counted on."""

    jobs: list[ExplainedJob]
    described_at: datetime
    """By the clock of the server, to which the times of the jobs belong."""
    received: float
    """By the clock here that never goes back."""
    problem: str | None = None
    """Why the connection is lost."""

    def __rich_console__(self, console: Console, _options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        waited = timedelta(seconds=time.monotonic() - self.received)
        now = self.described_at + waited
        verdicts = Counter(job.verdict for job in self.jobs)
        counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        yield Text(f"{now.astimezone():%H:%M:%S}  {len(self.jobs)} in doing{f': {counts}' if counts else ''}")
        if self.problem is not None:
            yield Text(
                f"Connection lost {_whole_seconds(math.floor, waited)} ago, trying again: {self.problem}", style="red"
            )
        elif waited > timedelta(seconds=3):
            yield Text(f"No answer from the database for {_whole_seconds(math.floor, waited)}", style="yellow")
        else:
            yield Text("Ctrl-C ends this", style="dim")
        yield ""
        yield _table(
            ["Job", "Queue", "Task", "Running for", "Verdict", "Stalled", "A sweep would then"],
            [
                (
                    job.job_id,
                    job.queue_name,
                    job.task_name,
                    None if job.started_at is None else _whole_seconds(math.floor, now - job.started_at),
                    _colored(job.verdict),
                    _time_left(job.stalled_at, now),
                    job.action and _with_detail(job.action, job.detail),
                )
                for job in self.jobs[: console.height]
            ],
        )


def _time_left(stalled_at: datetime | None, now: datetime) -> str:
    if stalled_at is None:
        return "never"
    if stalled_at > now:
        return f"in {_whole_seconds(math.ceil, stalled_at - now)}"
    return f"{_whole_seconds(math.floor, now - stalled_at)} ago"


def _whole_seconds(to_integer: Callable[[float], int], duration: timedelta) -> str:
    return _duration(timedelta(seconds=to_integer(duration.total_seconds())))


def _watch(context: typer.Context, queue: str | None, task_name: str | None) -> NoReturn:
    import psycopg
    from rich.live import Live

    from procrastinate_stalled.client import Stalled

    console = _console()
    if not console.is_interactive:
        raise typer.BadParameter(
            "it needs a terminal. For a program: list --json, or explain --json for one job.", param_hint="--watch"
        )
    # Ended without a word, it would leave the terminal without a cursor.
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(TERMINATED))

    live = Live(console=console, screen=True, refresh_per_second=1)
    shown: _RunningJobs | None = None
    with ExitStack() as screen:
        while True:
            try:
                # Without these, a network that is cut goes unnoticed for a quarter of an hour.
                with _connection(context, connect_timeout=10, tcp_user_timeout=10_000) as connection:
                    while True:
                        jobs = Stalled(connection).explain_jobs(queue=queue, task_name=task_name)
                        ((now,),) = connection.execute("SELECT pg_catalog.clock_timestamp()").fetchall()
                        if shown is None:
                            # From here on a thread draws it, whatever the next query waits for.
                            screen.enter_context(live)
                        shown = _RunningJobs(jobs, now, time.monotonic())
                        live.update(shown, refresh=True)
                        time.sleep(1)
            except psycopg.OperationalError as error:
                if shown is None:
                    raise
                message, detail, _hint = _explain(error)
                shown = replace(shown, problem=(detail or message).splitlines()[0])
                live.update(shown, refresh=True)
            time.sleep(1)


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
                SELECT pg_catalog.count(*)
                    FROM procrastinate_stalled.get_stalled_jobs()
                    WHERE action OPERATOR(pg_catalog.=) ANY ('{retry,fail,abort}')
            ),
            (SELECT coalesce(pg_catalog.max(id), 0) FROM procrastinate_stalled.rescues)
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
                    "SELECT pg_catalog.count(*) FROM procrastinate_stalled.rescues WHERE id OPERATOR(pg_catalog.>) %s",
                    [last_id],
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
