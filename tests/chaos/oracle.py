"""What must be true after a chaos run, whatever the adversary did: by the diaries of the workers and the database."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

ENDS = ("succeeded", "failed", "aborted", "cancelled")  # statuses of a job that has ended
EVENT_OF = {"retried": "deferred_for_retry", "failed": "failed", "aborted": "aborted"}  # by the action of a rescue


@dataclass(frozen=True)
class Life:
    """When a worker process lived, and when it was frozen."""

    number: int
    ended_at: float
    frozen: Sequence[tuple[float, float]] = ()
    worker_id: int | None = None
    """None: it has not lived to know it."""
    beats: Sequence[tuple[float, float]] = ()
    """From when to when it told the database that it lives, each time that this was confirmed."""
    unconfirmed: Sequence[tuple[float, float]] = ()
    """The same of the other times: it may have been heard."""

    def frozen_between(self, begin: float, end: float) -> float:
        """For how many seconds of that time it was frozen."""
        return sum(max(0.0, min(until, end) - max(since, begin)) for since, until in self.frozen)


@dataclass
class Run:
    """A run of a job, as its worker wrote it down."""

    life: Life
    job: int
    attempts: int
    lock: str | None
    started: float
    ended: float | None = None
    """When the task was done; None: its worker did not live to see it."""
    telling: float | None = None
    """When the worker began to tell the database."""
    told: float | None = None
    """When the database had confirmed that."""
    gave_up: float | None = None
    """When it got an error instead."""
    outcome: str | None = None
    """What it told: a status, or retried."""
    deletes: bool = False
    """Whether it told the database to delete the job."""
    fetched: float | None = None
    """When the database gave it the job, which is before it knew; None: as it started."""

    @property
    def began(self) -> float:
        """When it was its worker's, by the database or by the worker itself."""
        return self.started if self.fetched is None else min(self.fetched, self.started)

    @property
    def over(self) -> float:
        """When nobody worked on it any more."""
        return self.life.ended_at if self.ended is None else self.ended

    def told_at(self, at: float) -> bool:
        """Whether its worker was telling the database then."""
        return self.telling is not None and self.telling <= at <= self.told_until

    @property
    def told_until(self) -> float:
        """When the worker ceased to tell the database."""
        return self.told or self.gave_up or self.life.ended_at


@dataclass(frozen=True)
class Rescue:
    """A row of `rescues`."""

    job: int
    at: float
    action: str
    reason: str
    attempts: int
    worker_id: int | None
    queue_name: str
    task_name: str


@dataclass(frozen=True)
class Pause:
    """From when a pause was sure to be there until it may have been ended; None stands for all queues, or tasks."""

    since: float
    until: float
    queue_name: str | None
    task_name: str | None

    def covers(self, rescue: Rescue) -> bool:
        """Whether the pause forbids the rescue."""
        return (
            self.since < rescue.at < self.until
            and self.queue_name in {None, rescue.queue_name}
            and self.task_name in {None, rescue.task_name}
        )


@dataclass(frozen=True)
class Outage:
    """A time before a server took writes again, and one after which no other did before it."""

    since: float
    until: float


@dataclass(frozen=True)
class Event:
    """A row of `procrastinate_events`, of jobs too that have been deleted since; or the loss of a worker."""

    job: int
    type: str
    at: float


Before = dict[Event, dict[str, list[float]]]
"""Of each event the times of the earlier ones of its job, by type."""


@dataclass
class Evidence:
    """All that the oracle judges."""

    heartbeat_timeout: float
    """Seconds, as is:"""
    run_timeout: float
    outage_grace: float
    deferred: Sequence[int]
    """The ids that the application got."""
    lives: Sequence[Life]
    runs: Sequence[Run]
    statuses: dict[int, str]
    """Of the jobs that are in the database."""
    rescues: Sequence[Rescue] = ()
    events: Sequence[Event] = ()
    """Those of a job in their true order; the time is when the transaction began, which may have waited then."""
    pauses: Sequence[Pause] = ()
    outages: Sequence[Outage] = ()
    swept: Counter[str] = field(default_factory=Counter)
    """What the rows of `sweeps` count: retried, failed, aborted."""


@dataclass
class Verdict:
    """What is wrong, what was excused and why, and how the jobs ended."""

    violations: list[str] = field(default_factory=list)
    excused: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    figures: Counter[str] = field(default_factory=Counter)
    delays: list[float] = field(default_factory=list)
    """Seconds from the death of a worker to the rescue of a job that it ran."""


def read_life(path: Path, number: int, ended_at: float, frozen: Sequence[tuple[float, float]]) -> Life:
    """Read from the diary of a worker what it was called, and when it told the database that it lives."""
    worker_id, began = None, 0.0  # 0: it is not telling
    beats, unconfirmed = [], []
    for line in _lines(path):
        match line["what"]:
            case "registered":
                worker_id = line["id"]
            case "beating":
                began = line["at"]
            case "beat":
                beats.append((began, line["at"]))
                began = 0.0
            case "not beaten":
                unconfirmed.append((began, line["at"]))
                began = 0.0
    if began:
        unconfirmed.append((began, ended_at))
    return Life(number, ended_at, frozen, worker_id, beats, unconfirmed)


def read_diary(path: Path, life: Life) -> Iterator[Run]:
    """Read the runs in the diary of a worker."""
    runs: dict[tuple[int, int], Run] = {}
    for line in _lines(path):
        if line["what"] == "started":
            run = Run(life, line["job"], line["attempts"], line["lock"], line["at"])
            runs[run.job, run.attempts] = run
            yield run
        elif "job" in line:
            _note(runs[line["job"], line["attempts"]], line)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a diary. Its last line may have been cut off by the death of who wrote it."""
    for text in path.read_text().splitlines():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue


def _note(run: Run, line: dict[str, Any]) -> None:
    match line["what"]:
        case "ended":
            run.ended = line["at"]
        case "finishing":
            run.telling, run.outcome, run.deletes = line["at"], line["status"], line["deletes"]
        case "retrying":
            run.telling, run.outcome = line["at"], "retried"
        case "finished" | "retried":
            run.told = line["at"]
        case "not told":
            run.gave_up = line["at"]


def judge(evidence: Evidence) -> Verdict:
    """Judge a chaos run."""
    verdict = Verdict()
    fetches: dict[int, list[float]] = defaultdict(list)
    for event in evidence.events:
        if event.type == "started":
            fetches[event.job].append(event.at)
    runs: dict[int, list[Run]] = defaultdict(list)
    for run in evidence.runs:
        run.fetched = next(iter(fetches[run.job][run.attempts :]), None)  # each attempt is fetched once
    for run in sorted(evidence.runs, key=lambda run: run.began):
        runs[run.job].append(run)
    _judge_ends(evidence, runs, verdict)
    _judge_rescues(evidence, runs, verdict)
    before = _before(evidence.events)
    _judge_patience(evidence, before, runs, verdict)
    _judge_grace(evidence, before, runs, verdict)
    _judge_attempts(evidence, before, runs, verdict)
    _judge_ledger(evidence, runs, verdict)
    _judge_overlaps(evidence, runs, verdict)
    return verdict


def _before(events: Iterable[Event]) -> Before:
    """The times of the earlier events of the job, for each event, by type. The order says which these are."""
    before: Before = {}
    times: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        before[event] = {event_type: [*at] for event_type, at in times[event.job].items()}
        times[event.job][event.type].append(event.at)
    return before


def _judge_ends(evidence: Evidence, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """Every job has one end."""
    for job in sorted({*evidence.deferred, *evidence.statuses, *runs}):
        status = evidence.statuses.get(job)
        if status in ENDS:
            verdict.ends[status] += 1
        elif status is not None:
            verdict.violations.append(f"job {job} is in {status}: {_story(runs[job])}")
        elif _may_be_deleted(job, runs[job], evidence.rescues):
            verdict.ends["deleted"] += 1
        else:
            verdict.violations.append(f"job {job} is lost: {_story(runs[job])}")
        finished = [run for run in runs[job] if run.told is not None and run.outcome != "retried"]
        if len(finished) > 1:
            first = min(run.told for run in finished if run.told is not None)
            # Procrastinate lets a worker retry a job that has failed since.
            zombies = [run for run in runs[job] if run.outcome == "retried" and run.told_until > first]
            _blame(evidence, verdict, f"job {job} was finished twice: {_story(runs[job])}", "finished twice", zombies)
        for attempts, times in Counter(run.attempts for run in runs[job]).items():
            if times > 1:
                verdict.violations.append(f"attempt {attempts} of job {job} was run {times} times: {_story(runs[job])}")


def _may_be_deleted(job: int, runs: Sequence[Run], rescues: Sequence[Rescue]) -> bool:
    """Whether a worker deleted the job, or wanted to and did not learn what became of that."""
    for run in runs:
        if run.deletes and run.told is not None:
            return True
        if run.deletes and run.telling is not None and run is runs[-1]:
            return not any(rescue.job == job and rescue.at > run.telling for rescue in rescues)
    return False


def _judge_rescues(evidence: Evidence, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """No job is taken from a worker that is alive, unless that was frozen."""
    for rescue in evidence.rescues:
        for run in runs[rescue.job]:
            if run.attempts != rescue.attempts or run.began > rescue.at:
                continue
            text = f"{rescue} robbed a living worker: {_story(runs[rescue.job])}"
            if run.over > rescue.at:
                _blame(evidence, verdict, text, "rescued while it ran", [run], rescue.at)
            elif run.told_at(rescue.at):
                _blame(evidence, verdict, text, "rescued while its worker told of its end", [run], rescue.at)
            elif run.ended is not None:
                verdict.figures["rescues of runs that had ended, which the database was never told"] += 1
            if run.life.ended_at < rescue.at:
                verdict.delays.append(rescue.at - run.life.ended_at)


def _judge_patience(evidence: Evidence, before: Before, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """No rescue comes before its time, be its worker dead or alive."""
    beats = {life.worker_id: life.beats for life in evidence.lives}
    for rescue in evidence.rescues:
        times = before.get(_event(rescue), {})
        patience = evidence.heartbeat_timeout
        match rescue.reason:
            case "heartbeat":
                since = [began for began, confirmed in beats.get(rescue.worker_id, ()) if confirmed < rescue.at]
            case "orphaned":
                since = times.get("lost its worker", [])[-1:]
            case _:
                since, patience = times.get("started", [])[-1:], evidence.run_timeout
        if rescue.at < max(since, default=inf) + patience:
            verdict.violations.append(f"{rescue} came too soon: {_story(runs[rescue.job])}")
        if any(pause.covers(rescue) for pause in evidence.pauses):
            verdict.violations.append(f"{rescue} came in a pause: {_story(runs[rescue.job])}")


def _judge_grace(evidence: Evidence, before: Before, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """Who was not heard of since an outage has time to come back. An orphan was heard of when its job was fetched."""
    lives = {life.worker_id: life for life in evidence.lives}
    grace = max(evidence.heartbeat_timeout, evidence.outage_grace)
    for rescue in evidence.rescues:
        heard: list[float] = []  # at the latest
        if rescue.reason == "heartbeat" and rescue.worker_id in lives:
            life = lives[rescue.worker_id]
            heard = [until for began, until in (*life.beats, *life.unconfirmed) if began < rescue.at]
        elif rescue.reason == "orphaned":
            heard = before.get(_event(rescue), {}).get("started", [])[-1:]
        for outage in evidence.outages:
            if heard and max(heard) < outage.since and outage.until < rescue.at < outage.since + grace:
                verdict.violations.append(f"{rescue} came too soon after {outage}: {_story(runs[rescue.job])}")


def _judge_attempts(evidence: Evidence, before: Before, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """Each rescue is of the last fetch before it. Whatever ends an attempt adds one to attempts."""
    for rescue in evidence.rescues:
        times = before.get(_event(rescue), {})
        # A former worker that retries a job that has failed since adds an attempt that was never fetched.
        if "retried" not in times and len(times.get("started", ())) != rescue.attempts + 1:
            verdict.violations.append(f"{rescue} is not of the last fetch before it: {_story(runs[rescue.job])}")


def _judge_ledger(evidence: Evidence, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """Each rescue has its event, each change that no worker made has its rescue, and sweeps count what they did."""
    events = Counter(evidence.events)
    ours = Counter(map(_event, evidence.rescues))
    for event, times in ours.items():
        if (times, events[event]) != (1, 1):
            verdict.violations.append(
                f"{event} has {times} rescues and {events[event]} events: {_story(runs[event.job])}"
            )
    for (job, attempts), times in Counter((rescue.job, rescue.attempts) for rescue in evidence.rescues).items():
        if times > 1:
            verdict.violations.append(f"attempt {attempts} of job {job} was rescued {times} times: {_story(runs[job])}")
    # A worker's retry of a job that is to be aborted makes it fail.
    outcomes = {"deferred_for_retry": {"retried"}, "failed": {"failed", "retried"}, "aborted": {"aborted"}}
    for event in events.keys() - ours.keys():
        told = [run for run in runs[event.job] if run.outcome in outcomes.get(event.type, ())]
        if event.type in outcomes and not any(run.told_at(event.at) for run in told):
            verdict.violations.append(f"{event} was made by no rescue and no worker: {_story(runs[event.job])}")
    done = Counter(rescue.action for rescue in evidence.rescues)
    if +evidence.swept != +done:
        verdict.violations.append(f"the sweeps count {dict(evidence.swept)}, the rescues are {dict(done)}")


def _event(rescue: Rescue) -> Event:
    """The event that the rescue must have."""
    return Event(rescue.job, EVENT_OF[rescue.action], rescue.at)


def _judge_overlaps(evidence: Evidence, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """No two runs of one job, or under one lock, at once, unless the first one's worker was frozen."""
    by_lock: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(evidence.runs, key=lambda run: run.began):
        if run.lock is not None:
            by_lock[run.lock].append(run)
    for lock, group in [*((None, group) for group in runs.values()), *by_lock.items()]:
        for first, second in _overlaps(group):
            if lock is not None and first.job == second.job:
                continue  # seen as runs of one job
            text = (
                f"runs overlapped (lock {lock}): {_story([first, second])}; "
                f"all of job {first.job}: {_story(runs[first.job])}"
            )
            excuse = "ran twice at once" if lock is None else "ran under one lock at once"
            zombies = [run for run in runs[first.job] if run is not first and _told_between(run, first, second)]
            _blame(evidence, verdict, text, excuse, [first, *zombies], second.began)


def _overlaps(runs: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """Pairs of runs that ran at once, that of the first fetch first. A fetch may have waited before it got a job."""
    for number, first in enumerate(runs):
        for second in runs[number + 1 :]:
            if second.started < first.over and first.started < second.over:
                yield first, second


def _told_between(zombie: Run, first: Run, second: Run) -> bool:
    """Whether a former worker may have ended the first run in the database before the second one began."""
    if zombie.telling is None:
        return False
    return zombie.telling < second.began and zombie.told_until > first.began


def _blame(
    evidence: Evidence,
    verdict: Verdict,
    text: str,
    excuse: str,
    runs: Iterable[Run],
    before: float = float("inf"),
) -> None:
    """A violation, unless one of the workers was frozen during its run for a good part of the timeout.

    That is what no query can see (docs/operations.md): it is excused and counted.
    """
    for run in runs:
        if run.life.frozen_between(run.began, min(before, run.told_until)) > evidence.heartbeat_timeout / 2:
            verdict.excused[excuse] += 1
            return
    verdict.violations.append(text)


def _story(runs: Iterable[Run]) -> str:
    """The runs in words, for somebody who has to find out."""
    return "; ".join(map(_sentence, runs)) or "it never ran"


def _sentence(run: Run) -> str:
    frozen = ", ".join(f"{_second(since)} to {_second(until)}" for since, until in run.life.frozen)
    return (
        f"worker {run.life.number} (ended {_second(run.life.ended_at)}, frozen {frozen or 'never'}) ran job {run.job} "
        f"attempt {run.attempts} from {_second(run.started)} to {_second(run.ended)}, "
        f"told {run.outcome} {_second(run.telling)} to {_second(run.told)} (gave up {_second(run.gave_up)})"
    )


def _second(at: float | None) -> str:
    return "never" if at is None else f"{at % 100000:.3f}"
