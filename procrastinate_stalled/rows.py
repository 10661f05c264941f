"""The rows that the SQL functions return: one field per column, named as the column."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class StalledJob:
    """A stalled job: the columns of ``procrastinate_jobs``, the evidence, and what a sweep would do now.

    Source: type ``procrastinate_stalled.stalled_job``.
    """

    id: int
    queue_name: str
    task_name: str
    priority: int
    lock: str | None
    queueing_lock: str | None
    args: dict[str, Any]
    status: str
    scheduled_at: datetime | None
    attempts: int
    abort_requested: bool
    worker_id: int | None
    """None: an orphan, whose worker row is gone."""
    last_heartbeat: datetime | None
    """The last heartbeat of its worker."""
    started_at: datetime | None
    """Its last ``started`` event."""
    rule_name: str | None
    """The rule that it obeys. None: no rule matches."""
    reason: Literal["heartbeat", "orphaned", "run_timeout"]
    stalled_at: datetime | None
    """Since when it counts as stalled. None: an orphan that was asked for by ``seconds_since_heartbeat``."""
    action: Literal["retry", "fail", "abort", "wait", "ignore"]
    """What a sweep would do."""
    detail: str | None
    """Why it would not be retried."""
    duplicate_of: int | None
    """A job with the same queueing lock that is in ``todo``, or that would be retried first."""
    retry_at: datetime | None
    """When the retry would start. None: at once."""
    retry_queue_name: str | None
    """The queue of the retry. None: unchanged."""
    retry_priority: int | None
    """The priority of the retry. None: unchanged."""


@dataclass(frozen=True, slots=True)
class Rescue:
    """What was done to one stalled job.

    Source: table ``procrastinate_stalled.rescues``.
    """

    id: int | None
    """None in the rows of a dry run."""
    rescued_at: datetime
    job_id: int
    queue_name: str
    task_name: str
    action: Literal["retried", "failed", "aborted"]
    reason: Literal["heartbeat", "orphaned", "run_timeout", "manual"]
    detail: str | None
    """Why it was not retried."""
    rule_name: str | None
    """The rule that chose the action. None: `retry_job`."""
    worker_id: int | None
    """The worker that ran the job. None: its row was gone."""
    last_heartbeat: datetime | None
    started_at: datetime | None
    attempts: int
    """The attempts of the run that was lost."""
    scheduled_at: datetime | None
    """When the retry starts. None: at once."""
    rescued_by: str
    """The role, and the ``application_name`` in parentheses."""


@dataclass(frozen=True, slots=True)
class Status:
    """One check of the health of the whole.

    Source: function ``procrastinate_stalled.status``.
    """

    name: str
    level: Literal["ok", "warning", "error"]
    detail: str
    """The fact."""
    hint: str | None
    """The remedy."""
