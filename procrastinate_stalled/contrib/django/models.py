"""The tables of the schema ``procrastinate_stalled`` that people look at. Django does not manage them.

They are read and written in the database that ``PROCRASTINATE_DATABASE_ALIAS`` names, whatever
routers say, unless another one is given with ``using``. What each column means, its comment in the
database says.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

from django.core.exceptions import NON_FIELD_ERRORS, ValidationError
from django.db import DatabaseError, connections, models, transaction

from procrastinate_stalled.contrib.django.database import database_alias
from procrastinate_stalled.rule_values import REFUSED_COLUMNS

RULES = '"procrastinate_stalled"."rules"'


class ProcrastinateManager(models.Manager):
    """Finds rows in the database of Procrastinate."""

    def get_queryset(self) -> Any:
        """Return all rows."""
        return super().get_queryset().using(self._db or database_alias())


class Rule(models.Model):
    """Which jobs, when they count as stalled, and what to do then."""

    name = models.TextField(primary_key=True)
    position = models.IntegerField(default=100)
    enabled = models.BooleanField(default=True)
    expires_at = models.DateTimeField(blank=True, null=True)
    queue_name = models.TextField(blank=True, null=True)
    task_name = models.TextField(blank=True, null=True)
    args = models.JSONField(blank=True, null=True)
    heartbeat_timeout = models.DurationField(blank=True, null=True, default=timedelta(minutes=5))
    run_timeout = models.DurationField(blank=True, null=True)
    action = models.TextField(default="retry", choices=[(action, action) for action in ("retry", "fail", "ignore")])
    max_rescues = models.IntegerField(blank=True, null=True, default=3)
    retry_delay = models.DurationField(default=timedelta(0))
    retry_backoff = models.FloatField(default=2)
    retry_queue_name = models.TextField(blank=True, null=True)
    retry_priority = models.IntegerField(blank=True, null=True)
    on_duplicate = models.TextField(default="fail", choices=[(action, action) for action in ("fail", "wait")])
    note = models.TextField(blank=True, null=True)

    objects = ProcrastinateManager()

    class Meta:
        managed = False
        db_table = RULES
        ordering = ("position", "name")
        base_manager_name = "objects"

    def __str__(self) -> str:
        return str(self.name)

    def clean(self) -> None:
        """Ask the database whether it takes this rule, and change nothing.

        Raises
        ------
        django.core.exceptions.ValidationError
            It refuses a value. The error belongs to the fields that the refusing constraint has.
        """
        alias = self._state.db or database_alias()
        rules = Rule.objects.using(alias)
        try:
            with transaction.atomic(using=alias):
                if self._state.adding:
                    # Of a name that is taken Django itself tells.
                    rules.bulk_create([copy.copy(self)], ignore_conflicts=True)
                else:
                    columns = {field.attname: getattr(self, field.attname) for field in self._meta.concrete_fields}
                    rules.filter(pk=self.pk).update(**columns)
                transaction.set_rollback(True, using=alias)
        except DatabaseError as error:
            raise ValidationError(_refusal(error, alias)) from error

    def save(self, **options: Any) -> None:
        """Insert or update the row. The options are those of Django."""
        options["using"] = options.get("using") or self._state.db or database_alias()
        super().save(**options)

    def delete(self, using: str | None = None, **options: Any) -> tuple[int, dict[str, int]]:
        """Delete the row. The options are those of Django."""
        deleted: tuple[int, dict[str, int]] = super().delete(
            using=using or self._state.db or database_alias(), **options
        )
        return deleted


class Rescue(models.Model):
    """What was done to one stalled job."""

    id = models.BigAutoField(primary_key=True)
    rescued_at = models.DateTimeField()
    job_id = models.BigIntegerField()
    queue_name = models.TextField()
    task_name = models.TextField()
    action = models.TextField()
    reason = models.TextField()
    detail = models.TextField(blank=True, null=True)
    rule_name = models.TextField(blank=True, null=True)
    worker_id = models.BigIntegerField(blank=True, null=True)
    last_heartbeat = models.DateTimeField(blank=True, null=True)
    started_at = models.DateTimeField(blank=True, null=True)
    attempts = models.IntegerField()
    scheduled_at = models.DateTimeField(blank=True, null=True)
    rescued_by = models.TextField()

    objects = ProcrastinateManager()

    class Meta:
        managed = False
        db_table = '"procrastinate_stalled"."rescues"'
        ordering = ("-id",)
        base_manager_name = "objects"
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"Job {self.job_id}: {self.action}"


class Sweep(models.Model):
    """One pass that looked for stalled jobs and rescued them."""

    id = models.BigAutoField(primary_key=True)
    started_at = models.DateTimeField()
    duration = models.DurationField(blank=True, null=True)
    doing = models.IntegerField()
    retried = models.IntegerField()
    failed = models.IntegerField()
    aborted = models.IntegerField()
    waiting = models.IntegerField()
    held = models.IntegerField()
    held_reason = models.TextField(blank=True, null=True)
    latest_heartbeat = models.DateTimeField(blank=True, null=True)
    newest_worker_id = models.BigIntegerField(blank=True, null=True)
    error = models.TextField(blank=True, null=True)

    objects = ProcrastinateManager()

    class Meta:
        managed = False
        db_table = '"procrastinate_stalled"."sweeps"'
        ordering = ("-id",)
        base_manager_name = "objects"
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"Sweep {self.id}"


def help_for_rules() -> dict[str, str]:
    """Return what the comment of each column of the table of rules tells who fills in a form."""
    with connections[database_alias()].cursor() as cursor:
        cursor.execute(
            """
            SELECT attname, pg_catalog.col_description(attrelid, attnum)
                FROM pg_catalog.pg_attribute
                WHERE attrelid = pg_catalog.to_regclass(%s) AND attnum > 0 AND NOT attisdropped
            """,
            [RULES],
        )
        return {column: _in_a_form(comment) for column, comment in cursor.fetchall()}


def _in_a_form(comment: str | None) -> str:
    """Return the comment of a column for people to whom NULL is a field that they leave empty."""
    return (comment or "").replace("NULL:", "Empty:")


def _refusal(error: DatabaseError, alias: str) -> dict[str, str]:
    """Return what to tell about an error of the database, by field."""
    diagnostic = getattr(error.__cause__, "diag", None)
    message = getattr(diagnostic, "message_primary", None) or str(error)
    refusing = {
        "constraint": getattr(diagnostic, "constraint_name", None),
        "column": getattr(diagnostic, "column_name", None),
    }
    with connections[alias].cursor() as cursor:
        cursor.execute(REFUSED_COLUMNS, refusing)
        refused = cursor.fetchall()
    return {column: f"The database refuses this: {message}. {_in_a_form(comment)}" for column, comment in refused} or {
        NON_FIELD_ERRORS: f"The database refuses this: {message}"
    }
