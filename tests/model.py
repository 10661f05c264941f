"""What this product promises, in plain Python.

It follows docs/rules.md, docs/operations.md and the comments on tables and columns, not the SQL: one job after the
other, for clarity. Times are in microseconds.
"""

import re
from dataclasses import dataclass, field, replace

SECOND = 1_000_000
DAY = 86_400 * SECOND
LONG_AGO = -(10**15)
PAUSE = -2147483648


@dataclass(frozen=True)
class Rule:
    """A row of `rules`."""

    name: str
    position: int = 100
    enabled: bool = True
    expires_at: int | None = None
    queue_name: str | None = None
    task_name: str | None = None
    args: dict[str, int] | None = None
    heartbeat_timeout: int | None = 300 * SECOND
    run_timeout: int | None = None
    action: str = "retry"
    max_rescues: int | None = 3
    retry_delay: int = 0
    retry_backoff: float = 2
    retry_queue_name: str | None = None
    retry_priority: int | None = None
    on_duplicate: str = "fail"

    @property
    def is_pause(self) -> bool:
        """Whether it ignores jobs until it expires."""
        return self.action == "ignore" and self.expires_at is not None

    def matches(self, job: "Job") -> bool:
        """Whether the job is one of those it is for."""
        return (
            self.queue_name in {None, job.queue_name}
            and (self.task_name is None or is_like(job.task_name, self.task_name))
            and (self.args is None or self.args.items() <= job.args.items())
        )


@dataclass
class Job:
    """A row of `procrastinate_jobs`, and what its events tell."""

    id: int
    queue_name: str
    task_name: str
    priority: int
    lock: str | None
    queueing_lock: str | None
    args: dict[str, int]
    scheduled_at: int | None
    status: str = "todo"
    attempts: int = 0
    abort_requested: bool = False
    worker_id: int | None = None
    started_at: int = LONG_AGO


@dataclass(frozen=True)
class Judgement:
    """What is to be said of a job in `doing`."""

    job_id: int
    rule_name: str | None
    verdict: str
    reason: str | None
    stalled_at: int | None
    action: str
    detail: str | None
    retry_at: int | None = None
    retry_queue_name: str | None = None
    retry_priority: int | None = None
    is_paused: bool = False


@dataclass(frozen=True)
class Rescue:
    """A row of `rescues`."""

    rescued_at: int
    job_id: int
    queue_name: str
    action: str
    reason: str
    detail: str | None
    rule_name: str | None
    worker_id: int | None
    last_heartbeat: int | None
    started_at: int
    attempts: int
    scheduled_at: int | None


@dataclass(frozen=True)
class Sweep:
    """A row of `sweeps`."""

    started_at: int
    latest_heartbeat: int | None
    newest_worker_id: int
    doing: int
    retried: int = 0
    failed: int = 0
    aborted: int = 0
    waiting: int = 0
    held: int = 0
    held_reason: str | None = None


@dataclass
class Model:
    """A database, and what sweeps do with it."""

    now: int = 0
    available_since: int = LONG_AGO
    outage_grace: int = 600 * SECOND
    require_live_worker: bool = True
    keep_rescues: int = 90 * DAY
    workers: dict[int, int] = field(default_factory=dict)
    """The last heartbeat of each."""
    jobs: dict[int, Job] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)
    orphans: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By job: its attempts, and when a sweep first saw it."""
    rescues: list[Rescue] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)

    def doing(self, queue: str | None = None, task_name: str | None = None) -> list[Job]:
        """The jobs in `doing`, of that queue and task, by id."""
        return [
            job
            for _, job in sorted(self.jobs.items())
            if job.status == "doing" and queue in {None, job.queue_name} and task_name in {None, job.task_name}
        ]

    def seen_at(self, job: Job) -> int | None:
        """When a sweep first saw that the job has lost its worker in this run."""
        attempts, seen_at = self.orphans.get(job.id, (None, None))
        return seen_at if job.worker_id is None and attempts == job.attempts else None

    def waiting_job(self, queueing_lock: str | None) -> Job | None:
        """The job in `todo` that has the queueing lock."""
        for job in self.jobs.values():
            if job.status == "todo" and job.queueing_lock == queueing_lock and queueing_lock is not None:
                return job
        return None

    def judge(self, queue: str | None = None, task_name: str | None = None) -> dict[int, Judgement]:
        """Judge the jobs in `doing`, of that queue and task, by id."""
        jobs = self.doing(queue, task_name)
        judgements = [self._judge(job) for job in jobs]
        return {
            judgement.job_id: self._heed_duplicates(job, judgement, judgements)
            for job, judgement in zip(jobs, judgements, strict=True)
        }

    def sweep(
        self, queue: str | None = None, task_name: str | None = None, max_jobs: int | None = None
    ) -> list[Rescue]:
        """Note orphans, rescue the stalled jobs one by one, purge, and write down what was done."""
        self._note_orphans()
        latest = max(self.workers.values(), default=None)
        sweep = Sweep(self.now, latest, max(self.workers, default=0), len(self.doing(queue, task_name)))
        done: list[Rescue] = []
        for job in self.doing(queue, task_name):
            judgement = self.judge(queue, task_name)[job.id]
            if judgement.verdict == "stalled" and judgement.action != "wait" and len(done) != max_jobs:
                done.append(self._rescue(job, judgement))
        self.rescues += done
        self._purge()
        left = self.judge(queue, task_name).values()
        held = [judgement for judgement in left if judgement.verdict == "held"]
        reasons = {str(judgement.rule_name) if judgement.is_paused else "no living worker" for judgement in held}
        self.sweeps.append(
            replace(
                sweep,
                retried=sum(rescue.action == "retried" for rescue in done),
                failed=sum(rescue.action == "failed" for rescue in done),
                aborted=sum(rescue.action == "aborted" for rescue in done),
                waiting=sum(judgement.verdict == "stalled" for judgement in left),
                held=len(held),
                held_reason=", ".join(sorted(reasons)) or None,
            )
        )
        return done

    def retry_job(
        self, job: Job, retry_at: int | None, priority: int | None, queue: str | None, lock: str | None
    ) -> None:
        """Retry a job in `doing` because an operator says so."""
        if job.abort_requested:
            self.rescues.append(self._record(job, "failed", "manual", "abort requested", None, None))
            job.status = "failed"
        else:
            self.rescues.append(self._record(job, "retried", "manual", None, None, retry_at))
            job.status = "todo"
            job.attempts += 1
            job.scheduled_at = retry_at
            job.priority = job.priority if priority is None else priority
            job.queue_name = queue or job.queue_name
            job.lock = lock or job.lock
        job.worker_id = None

    def prune(self, seconds: int) -> set[int]:
        """Remove the workers that have been silent for longer, and return them."""
        silent = {worker for worker, heard in self.workers.items() if heard < self.now - seconds * SECOND}
        for worker in silent:
            self.remove_worker(worker)
        return silent

    def remove_worker(self, worker: int) -> None:
        """Remove a worker; its jobs lose it."""
        del self.workers[worker]
        for job in self.jobs.values():
            if job.worker_id == worker:
                job.worker_id = None

    def _rules_for(self, job: Job) -> tuple[Rule | None, Rule | None]:
        """The pause that holds a job, if its first rule is one, and the first rule that is none."""
        valid = [
            rule
            for rule in sorted(self.rules.values(), key=lambda rule: (rule.position, rule.name))
            if rule.enabled and (rule.expires_at is None or rule.expires_at > self.now) and rule.matches(job)
        ]
        others = [rule for rule in valid if not rule.is_pause]
        return (valid[0] if valid and valid[0].is_pause else None), (others[0] if others else None)

    def _judge(self, job: Job) -> Judgement:
        """Judge a job as if no other job had its queueing lock."""
        pause, rule = self._rules_for(job)
        named = pause or rule
        name = named.name if named else None
        if rule is None or rule.action == "ignore":
            return Judgement(job.id, name, "ignored", None, None, "ignore", "rule" if named else "no rule")

        reason, stalled_at = self._evidence(job, rule)
        if stalled_at is None or stalled_at > self.now:
            verdict = "running"
        elif pause or (reason != "run_timeout" and not self._somebody_is_alive(rule)):
            verdict = "held"
        else:
            verdict = "stalled"
        judgement = Judgement(job.id, name, verdict, reason, stalled_at, "retry", None, is_paused=pause is not None)

        if job.abort_requested:
            return replace(judgement, action="abort", detail="abort requested")
        if rule.action == "fail":
            return replace(judgement, action="fail", detail="rule")
        rescues = self._rescues_of(job)
        if rule.max_rescues is not None and rescues >= rule.max_rescues:
            return replace(judgement, action="fail", detail="max_rescues")
        delay = 0 if job.lock is not None else min(round(rule.retry_delay * rule.retry_backoff**rescues), DAY)
        return replace(
            judgement,
            retry_at=self.now + delay if delay else None,
            retry_queue_name=rule.retry_queue_name,
            retry_priority=rule.retry_priority,
        )

    def _heed_duplicates(self, job: Job, judgement: Judgement, judgements: list[Judgement]) -> Judgement:
        """What becomes of a job that would be retried when another one has its queueing lock."""
        if judgement.action != "retry" or job.queueing_lock is None:
            return judgement
        waiting = self.waiting_job(job.queueing_lock)
        if waiting is not None:
            duplicate_of = waiting.id
        else:
            # The first of the stalled ones takes the place in todo; if there are none, of those that are held.
            rivals = [
                (other.verdict, other.job_id)
                for other in judgements
                if other.action == "retry"
                and other.verdict in {"stalled", "held"}
                and self.jobs[other.job_id].queueing_lock == job.queueing_lock
            ]
            first = min(rivals, key=lambda rival: (rival[0] == "held", rival[1]), default=("", job.id))
            duplicate_of = first[1]
            if duplicate_of == job.id:
                return judgement
        _, rule = self._rules_for(job)
        assert rule is not None
        waits = rule.on_duplicate == "wait" and not (waiting and job.lock is not None and waiting.lock == job.lock)
        return replace(
            judgement,
            action="wait" if waits else "fail",
            detail=f"duplicate of job {duplicate_of}",
            retry_at=None,
            retry_queue_name=None,
            retry_priority=None,
        )

    def _evidence(self, job: Job, rule: Rule) -> tuple[str | None, int | None]:
        """Why the job counts as stalled, and from when on."""
        silence = None if rule.heartbeat_timeout is None else self._end_of_patience(job, rule, rule.heartbeat_timeout)
        run = None if rule.run_timeout is None else job.started_at + rule.run_timeout
        if run is not None:
            counts_alone = run <= self.now and not self._somebody_is_alive(rule)
            if silence is None or run <= silence or counts_alone:
                return "run_timeout", run
        if silence is not None:
            return ("orphaned" if job.worker_id is None else "heartbeat"), silence
        return None, None

    def _end_of_patience(self, job: Job, rule: Rule, timeout: int) -> int:
        """When the silence of the job's worker, or the want of one, has lasted long enough."""
        if job.worker_id is not None:
            since = self.workers[job.worker_id]
            unheard_since_outage = since < self.available_since
        else:
            seen_at = self.seen_at(job)
            since = self.now if seen_at is None else seen_at  # the next sweep will see it
            unheard_since_outage = job.started_at < self.available_since
        moments = [since + timeout]
        if unheard_since_outage:
            moments.append(self.available_since + max(timeout, self.outage_grace))
        # All were silent, and one is heard again: the others get the time to follow, unless they were overdue before.
        silence, until = self._last_silence(timeout)
        if (
            silence is not None
            and self._somebody_is_alive(rule)
            and since < silence.started_at
            and (silence.latest_heartbeat is None or since + timeout > silence.latest_heartbeat)
        ):
            moments.append(until + timeout)
        return max(moments)

    def _last_silence(self, timeout: int) -> tuple[Sweep | None, int]:
        """The last sweep that saw nobody alive, and when the next one saw somebody.

        While that matters: that was not long ago, and no new worker has come since.
        """
        until = self.now
        for sweep in reversed(self.sweeps) if self.require_live_worker else ():
            if sweep.latest_heartbeat is None or sweep.latest_heartbeat < sweep.started_at - timeout / 2:
                return (sweep if max(self.workers, default=0) <= sweep.newest_worker_id else None), until
            if sweep.started_at < self.now - timeout:
                break
            until = sweep.started_at
        return None, until

    def _somebody_is_alive(self, rule: Rule) -> bool:
        """Whether any worker was heard within half of the timeout, or that is not asked for."""
        if not self.require_live_worker:
            return True
        if rule.heartbeat_timeout is None:
            return False
        return any(heard >= self.now - rule.heartbeat_timeout / 2 for heard in self.workers.values())

    def _rescues_of(self, job: Job) -> int:
        """How often sweeps have retried it."""
        return sum(
            rescue.job_id == job.id and rescue.action == "retried" and rescue.reason != "manual"
            for rescue in self.rescues
        )

    def _note_orphans(self) -> None:
        seen = [(job, self.seen_at(job)) for job in self.doing() if job.worker_id is None]
        self.orphans = {job.id: (job.attempts, self.now if at is None else at) for job, at in seen}

    def _rescue(self, job: Job, judgement: Judgement) -> Rescue:
        action = {"retry": "retried", "fail": "failed", "abort": "aborted"}[judgement.action]
        assert judgement.reason is not None
        rescue = self._record(job, action, judgement.reason, judgement.detail, judgement.rule_name, judgement.retry_at)
        job.status = {"retried": "todo"}.get(action, action)
        job.worker_id = None
        job.abort_requested = False
        if action == "retried":
            job.attempts += 1
            job.scheduled_at = judgement.retry_at
            job.queue_name = judgement.retry_queue_name or job.queue_name
            job.priority = job.priority if judgement.retry_priority is None else judgement.retry_priority
        return rescue

    def _record(
        self,
        job: Job,
        action: str,
        reason: str,
        detail: str | None,
        rule_name: str | None,
        scheduled_at: int | None,
    ) -> Rescue:
        return Rescue(
            rescued_at=self.now,
            job_id=job.id,
            queue_name=job.queue_name,
            action=action,
            reason=reason,
            detail=detail,
            rule_name=rule_name,
            worker_id=job.worker_id,
            last_heartbeat=None if job.worker_id is None else self.workers[job.worker_id],
            started_at=job.started_at,
            attempts=job.attempts,
            scheduled_at=scheduled_at,
        )

    def _purge(self) -> None:
        """Forget old rescues, but for those that count towards `max_rescues` of a job that can run again."""
        self.rescues = [
            rescue
            for rescue in self.rescues
            if rescue.rescued_at >= self.now - self.keep_rescues
            or (
                rescue.action == "retried"
                and rescue.reason != "manual"
                and rescue.job_id in self.jobs
                and self.jobs[rescue.job_id].status in {"todo", "doing", "failed"}
            )
        ]


def is_like(text: str, pattern: str) -> bool:
    """Whether the text is LIKE the pattern."""
    tokens = re.findall(r"\\.|.", pattern, re.DOTALL)
    wildcards = {"%": ".*", "_": "."}
    expression = "".join(wildcards.get(token) or re.escape(token[-1]) for token in tokens)
    return re.fullmatch(expression, text, re.DOTALL) is not None
