"""The system checks. Those that ask the database run only with ``check --database``, ``migrate`` and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.core import mail
from django.core.checks import Error as CheckError
from django.core.checks import Tags, Warning, register  # noqa: A004
from django.db import Error, connections, transaction
from django.db.migrations.recorder import MigrationRecorder

from procrastinate_stalled.contrib.django.database import database_alias

if TYPE_CHECKING:
    from collections.abc import Sequence


@register
def check_that_procrastinate_is_an_app(app_configs: Sequence[Any] | None, **_options: Any) -> list[Any]:
    """Say what is missing, before the migrations say which one of theirs is."""
    if not _is_asked_for(app_configs) or apps.is_installed("procrastinate.contrib.django"):
        return []
    return [
        CheckError(
            "procrastinate_stalled.contrib.django is in INSTALLED_APPS, and procrastinate.contrib.django is not.",
            hint='Add "procrastinate.contrib.django" to INSTALLED_APPS: the migration needs the tables that it makes.',
            id="procrastinate_stalled.E001",
        )
    ]


@register(Tags.database)
def check_that_something_sweeps(
    app_configs: Sequence[Any] | None, databases: Sequence[str] | None, **_options: Any
) -> list[Any]:
    """Warn when no stalled job would be rescued.

    It says nothing about a database that cannot be asked, or that has not been migrated yet, nor
    within a test, for which nothing is ever scheduled.
    """
    alias = database_alias()
    # Django's setup_test_environment(), which pytest-django calls too, makes the outbox; nothing else does.
    in_a_test = hasattr(mail, "outbox")
    if (
        not _is_asked_for(app_configs)
        or alias not in (databases or ())
        or in_a_test
        or connections[alias].vendor != "postgresql"
    ):
        return []
    try:
        with transaction.atomic(using=alias):
            return _warnings(alias)
    except Error:
        return []


def _is_asked_for(app_configs: Sequence[Any] | None) -> bool:
    return app_configs is None or any(config.label == "procrastinate_stalled" for config in app_configs)


def _warnings(alias: str) -> list[Any]:
    connection = connections[alias]
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_catalog.to_regnamespace('procrastinate_stalled') IS NOT NULL")
        if cursor.fetchone() == (False,):
            applied = MigrationRecorder(connection).applied_migrations()
            if not any(app_label == "procrastinate_stalled" for app_label, _name in applied):
                return []
            return [
                Warning(
                    f'The schema procrastinate_stalled is not in database "{alias}", though its migration is recorded '
                    "there as applied.",
                    hint=f"manage.py migrate --database={alias} --fake procrastinate_stalled zero, "
                    f"then manage.py migrate --database={alias} procrastinate_stalled. If that changes nothing, a "
                    "router forbids it: allow_migrate must allow the app procrastinate_stalled there.",
                    id="procrastinate_stalled.W002",
                )
            ]
        cursor.execute("SELECT name, level, detail FROM procrastinate_stalled.status()")
        status = {name: (level, detail) for name, level, detail in cursor.fetchall()}
    schedule, last_sweep = status["schedule"], status["last_sweep"]
    if "ok" in (schedule[0], last_sweep[0]):
        return []
    return [
        Warning(
            f"Nothing puts the stalled jobs of Procrastinate back: {schedule[1]}; {last_sweep[1]}.",
            hint="manage.py procrastinate_stalled schedule lets pg_cron do it; if pg_cron is in another database of "
            "the server, with --cron-database. Where there is no pg_cron, run manage.py procrastinate_stalled sweep "
            "every few minutes, or add the periodic task.",
            id="procrastinate_stalled.W001",
        )
    ]
