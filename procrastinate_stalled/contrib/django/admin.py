"""The admin: rules to edit, rescues and sweeps to look at."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.admin.widgets import AdminTextareaWidget, AdminTextInputWidget
from django.core.exceptions import ValidationError
from django.db import DataError, connections, models, transaction
from django.utils.html import escape

from procrastinate_stalled.contrib.django.database import database_alias
from procrastinate_stalled.contrib.django.models import Rescue, Rule, Sweep, help_for_rules
from procrastinate_stalled.rule_values import HOW_TO_WRITE_A_DURATION, has_no_unit


def in_words(duration: timedelta | None) -> str | None:
    """Return a duration as PostgreSQL understands it: 1 h 30 min."""
    if duration is None:
        return None
    hours, rest = divmod(duration.seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    exact_seconds = f"{seconds}.{duration.microseconds:06}".rstrip("0").rstrip(".")
    units = [(f"{duration.days}", "d"), (f"{hours}", "h"), (f"{minutes}", "min"), (exact_seconds, "s")]
    return " ".join(f"{number} {unit}" for number, unit in units if number != "0") or "0 s"


class DurationInWords(forms.Field):
    """A duration, which PostgreSQL reads."""

    widget = AdminTextInputWidget
    default_error_messages = {"invalid": HOW_TO_WRITE_A_DURATION}  # noqa: RUF012

    def prepare_value(self, value: Any) -> Any:
        """Return what stands in the field."""
        return in_words(value) if isinstance(value, timedelta) else value

    def to_python(self, value: Any) -> timedelta | None:
        """Return the duration. A number without a unit is refused: it could mean seconds or minutes."""
        if isinstance(value, timedelta) or value is None:
            return value
        text = value.strip()
        if not text:
            return None
        if has_no_unit(text):
            raise ValidationError(self.error_messages["invalid"], code="invalid")
        alias = database_alias()
        try:
            with transaction.atomic(using=alias), connections[alias].cursor() as cursor:
                cursor.execute("SELECT %s::interval", [text])
                ((duration,),) = cursor.fetchall()
        except (DataError, OverflowError, ValueError) as error:
            raise ValidationError(self.error_messages["invalid"], code="invalid") from error
        found: timedelta = duration
        return found


@admin.register(Rule)
class RuleAdmin(admin.ModelAdmin):
    """Shows and edits the rules. What a value must be, the database decides and the form shows."""

    list_display = (
        "name",
        "position",
        "enabled",
        "expires_at",
        "queue_name",
        "task_name",
        "stalled_after_silence_of",
        "stalled_after_running_for",
        "action",
        "max_rescues",
    )
    list_filter = ("enabled", "action", ("expires_at", admin.EmptyFieldListFilter))
    search_fields = ("name", "queue_name", "task_name", "note")
    fieldsets = (
        (None, {"fields": ("name", "position", "enabled", "expires_at", "note")}),
        ("Which jobs", {"fields": ("queue_name", "task_name", "args")}),
        ("When they count as stalled", {"fields": ("heartbeat_timeout", "run_timeout")}),
        (
            "What to do then",
            {
                "fields": (
                    "action",
                    "max_rescues",
                    "retry_delay",
                    "retry_backoff",
                    "retry_queue_name",
                    "retry_priority",
                    "on_duplicate",
                )
            },
        ),
    )

    @admin.display(description="Stalled after silence of", ordering="heartbeat_timeout", empty_value="never")
    def stalled_after_silence_of(self, rule: Rule) -> str | None:
        """The column of `heartbeat_timeout`."""
        return in_words(rule.heartbeat_timeout)

    @admin.display(description="Stalled after running for", ordering="run_timeout", empty_value="never")
    def stalled_after_running_for(self, rule: Rule) -> str | None:
        """The column of `run_timeout`."""
        return in_words(rule.run_timeout)

    def get_readonly_fields(self, request: Any, obj: Rule | None = None) -> tuple[str, ...]:  # noqa: ARG002
        """Return the name of a rule that exists: Django would make a second one under a new name."""
        return ("name",) if obj else ()

    def get_form(self, request: Any, obj: Rule | None = None, change: bool = False, **kwargs: Any) -> Any:  # noqa: FBT001, FBT002, RUF100
        """Return the form, with the comments of the database as its help."""
        form = super().get_form(request, obj, change, **kwargs)
        help_texts = help_for_rules()
        for name, field in form.base_fields.items():
            # Django takes the help for HTML.
            field.help_text = escape(help_texts.get(name, ""))
        return form

    def formfield_for_dbfield(self, db_field: Any, request: Any, **kwargs: Any) -> Any:
        """Return the field of a form for a column."""
        if isinstance(db_field, models.DurationField):
            kwargs["form_class"] = DurationInWords
        elif isinstance(db_field, models.TextField) and not db_field.choices:
            kwargs["widget"] = AdminTextareaWidget if db_field.name == "note" else AdminTextInputWidget
            if db_field.null:
                kwargs["empty_value"] = None
        return super().formfield_for_dbfield(db_field, request, **kwargs)

    def save_model(self, request: Any, obj: Rule, form: Any, change: bool) -> None:  # noqa: ARG002, FBT001, RUF100
        """Insert a new rule; of an old one, write only what was changed."""
        if change:
            obj.save(update_fields=form.changed_data)
        else:
            obj.save(force_insert=True)


class ReadOnlyAdmin(admin.ModelAdmin):
    """Shows what sweeps have written, newest first, without counting it all."""

    show_full_result_count = False

    def has_add_permission(self, *_args: Any) -> bool:
        """Nobody may."""
        return False

    def has_change_permission(self, *_args: Any) -> bool:
        """Nobody may."""
        return False

    def has_delete_permission(self, *_args: Any) -> bool:
        """Nobody may."""
        return False


@admin.register(Rescue)
class RescueAdmin(ReadOnlyAdmin):
    """Shows what was done to which job, and why."""

    list_display = (
        "rescued_at",
        "job_id",
        "queue_name",
        "task_name",
        "action",
        "reason",
        "detail",
        "rule_name",
        "rescued_by",
    )
    list_filter = ("rescued_at", "action", "reason", "rule_name", "queue_name")
    search_fields = ("=job_id", "task_name", "detail")


@admin.register(Sweep)
class SweepAdmin(ReadOnlyAdmin):
    """Shows when something looked for stalled jobs, and what came of it."""

    list_display = (
        "started_at",
        "took",
        "doing",
        "retried",
        "failed",
        "aborted",
        "waiting",
        "held",
        "held_reason",
        "error",
    )
    list_filter = ("started_at", ("held_reason", admin.EmptyFieldListFilter), ("error", admin.EmptyFieldListFilter))
    search_fields = ("held_reason", "error")
    exclude = ("duration",)
    readonly_fields = ("took",)

    @admin.display(ordering="duration")
    def took(self, sweep: Sweep) -> str | None:
        """The column of `duration`."""
        return in_words(sweep.duration)
