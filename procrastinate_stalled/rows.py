"""The rows that the SQL functions return: one field per column, named as the column."""

from dataclasses import dataclass
from datetime import datetime, timedelta
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
    action: Literal["retry", "fail", "abort", "wait", "ignore", "hold"]
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
class ExplainedJob:
    """Whether a job is stalled, by which rule, on what evidence, and when it will be.

    Source: type ``procrastinate_stalled.explained_job``.
    """

    job_id: int
    queue_name: str | None
    """None, as all of the job's columns: there is no such job."""
    task_name: str | None
    status: str | None
    attempts: int | None
    worker_id: int | None
    """None: an orphan, whose worker row is gone, or not in ``doing``."""
    last_heartbeat: datetime | None
    """The last heartbeat of its worker."""
    seen_at: datetime | None
    """When a sweep first saw it as an orphan."""
    started_at: datetime | None
    """Its last ``started`` event."""
    available_since: datetime | None
    """Since when the server accepts writes: what was missed before is not held against a worker."""
    rule_name: str | None
    """The rule that it obeys. None: no rule matches."""
    verdict: Literal["stalled", "running", "held", "ignored", "not doing", "no such job"]
    reason: Literal["heartbeat", "orphaned", "run_timeout"] | None
    """By which evidence it counts as stalled at ``stalled_at``. None without that."""
    stalled_at: datetime | None
    """When it counts as stalled, if nothing changes. None: never."""
    action: Literal["retry", "fail", "abort", "wait", "ignore"] | None
    """What a sweep would do then. None: it is not in ``doing``."""
    detail: str | None
    """Why it would not be retried."""
    sentence: str
    """All that in plain words."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that has registered itself, and whether it beats.

    Source: function ``procrastinate_stalled.workers``.
    """

    worker_id: int
    last_heartbeat: datetime
    age: timedelta | None
    """How long ago that was. None: the time is infinite."""
    doing: int
    """How many jobs in ``doing`` are its own."""
    state: Literal["alive", "silent"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Which jobs, when they count as stalled, and what to do then.

    Source: table ``procrastinate_stalled.rules``.
    """

    name: str
    position: int
    """The order in which the rules are tried, lowest first; equal positions by name."""
    enabled: bool
    expires_at: datetime | None
    """The rule matches nothing from then on. None: it never expires."""
    queue_name: str | None
    """Matches jobs of exactly this queue. None: of any."""
    task_name: str | None
    """Matches jobs whose task name is LIKE this pattern. None: any."""
    args: dict[str, Any] | None
    """Matches jobs whose args contain this object. None: any."""
    heartbeat_timeout: timedelta | None
    """A job is stalled when its worker has been silent for so long. None: silence never counts."""
    run_timeout: timedelta | None
    """A job is stalled when it started so long ago, whatever its worker says. None: no limit."""
    action: Literal["retry", "fail", "ignore"]
    max_rescues: int | None
    """After so many retries of the same job by sweeps it is failed. None: no limit."""
    retry_delay: timedelta
    """The wait before the first retry of a job."""
    retry_backoff: float
    """Each further rescue of the same job waits this many times longer."""
    retry_queue_name: str | None
    """The queue of the retry. None: unchanged."""
    retry_priority: int | None
    """The priority of the retry. None: unchanged."""
    on_duplicate: Literal["fail", "wait"]
    """What becomes of the job when another one with its queueing lock already waits."""
    note: str | None


@dataclass(frozen=True, slots=True)
class TaskRuntime:
    """How long the runs of a task took: the basis for a ``run_timeout``.

    Source: function ``procrastinate_stalled.task_runtimes``.
    """

    task_name: str
    runs: int
    p50: timedelta
    """Half of the runs were not longer."""
    p99: timedelta
    """99 of 100 runs were not longer."""
    longest: timedelta


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
