"""The commands of ``procrastinate-stalled`` for the database of the Django project."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from django.core.management.base import BaseCommand
from typer.main import get_command

from procrastinate_stalled import cli
from procrastinate_stalled.contrib.django.database import conninfo, database_alias

# manage.py migrate and sqlmigrate do this.
NOT_IN_DJANGO = ("install", "uninstall", "sql")


class Command(BaseCommand):
    """Runs a command of ``procrastinate-stalled`` through a connection of its own, outside of Django's transactions."""

    help = "Find the stalled jobs of Procrastinate and put them back, inside PostgreSQL."
    requires_system_checks: tuple[str, ...] = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Leave all that follows the name of the command to that command."""
        parser.add_argument(
            "arguments",
            nargs=argparse.REMAINDER,
            metavar="COMMAND ...",
            help="status, list, explain, sweep, schedule, ...: without a command they are listed with what they do.",
        )

    def handle(self, *_args: Any, **options: Any) -> None:
        """Run it. An exit code other than 0 means what it means there."""
        alias = database_alias()
        migrate = f"manage.py migrate --database={alias} procrastinate_stalled"
        program = cli.Program(
            name="manage.py procrastinate_stalled",
            install=migrate,
            uninstall=f"{migrate} zero",
            choose_database=f'Correct the setting DATABASES["{alias}"], or PROCRASTINATE_DATABASE_ALIAS, its name.',
        )
        commands: Any = get_command(cli.app)
        for name in NOT_IN_DJANGO:
            del commands.commands[name]
        _name_in_examples(commands, program)
        commands.epilog = (
            f"To install: {program.install}\n\nTo uninstall: {program.uninstall}\n\n"
            f"pg_cron in another database: see --cron-database of schedule, unschedule and status\n\n{cli.EXIT_CODES}"
        )
        for parameter in commands.params:
            parameter.hidden = parameter.name == "database_url"
        # Passed to a function, so no other process sees the password.
        arguments = ["--database-url", conninfo(), *(options["arguments"] or ["--help"])]
        with redirect_stdout(options.get("stdout") or sys.stdout), redirect_stderr(options.get("stderr") or sys.stderr):
            code = cli.run(commands, program, args=arguments)
        if code:
            sys.exit(code)


def _name_in_examples(command: Any, program: cli.Program) -> None:
    command.epilog = command.epilog and program.named_in(command.epilog)
    for subcommand in getattr(command, "commands", {}).values():
        _name_in_examples(subcommand, program)
