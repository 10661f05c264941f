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
    beats: Sequence[tuple[float, float]] = ()
    """From when to when it told the database that it lives, each time that this was confirmed."""

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
    outcome: str | None = None
    """What it told: a status, or retried."""
    deletes: bool = False
    """Whether it told the database to delete the job."""

    @property
    def over(self) -> float:
        """When nobody worked on it any more."""
        return self.life.ended_at if self.ended is None else self.ended


@dataclass(frozen=True)
class Rescue:
    """A row of `rescues`."""

    job: int
    at: float
    action: str
    reason: str
    attempts: int


@dataclass(frozen=True)
class Event:
    """A row of `procrastinate_events`, of jobs too that have been deleted since; or the loss of a worker."""

    job: int
    type: str
    at: float


@dataclass
class Evidence:
    """All that the oracle judges."""

    heartbeat_timeout: float
    """Seconds, as is:"""
    run_timeout: float
    deferred: Sequence[int]
    """The ids that the application got."""
    runs: Sequence[Run]
    statuses: dict[int, str]
    """Of the jobs that are in the database."""
    rescues: Sequence[Rescue] = ()
    events: Sequence[Event] = ()
    swept: Counter[str] = field(default_factory=Counter)
    """What the rows of `sweeps` count: retried, failed, aborted."""


@dataclass
class Verdict:
    """What is wrong, what was excused and why, and how the jobs ended."""

    violations: list[str] = field(default_factory=list)
    excused: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    figures: Counter[str] = field(default_factory=Counter)


def read_beats(path: Path) -> Iterator[tuple[float, float]]:
    """Read from the diary of a worker from when to when it told the database that it lives."""
    began = 0.0
    for line in _lines(path):
        if line["what"] == "beating":
            began = line["at"]
        elif line["what"] == "beat":
            yield began, line["at"]


def read_diary(path: Path, life: Life) -> Iterator[Run]:
    """Read the runs in the diary of a worker."""
    runs: dict[int, Run] = {}
    for line in _lines(path):
        if line["what"] == "started":
            run = runs[line["job"]] = Run(life, line["job"], line["attempts"], line["lock"], line["at"])
            yield run
        elif "job" in line:
            _note(runs[line["job"]], line)


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


def judge(evidence: Evidence) -> Verdict:
    """Judge a chaos run."""
    verdict = Verdict()
    runs: dict[int, list[Run]] = defaultdict(list)
    for run in sorted(evidence.runs, key=lambda run: run.started):
        runs[run.job].append(run)
    _judge_ends(evidence, runs, verdict)
    _judge_rescues(evidence, runs, verdict)
    _judge_patience(evidence, runs, verdict)
    _judge_ledger(evidence, runs, verdict)
    _judge_overlaps(evidence, runs, verdict)
    return verdict


def _judge_ends(evidence: Evidence, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """Every job has one end."""
    for job in sorted({*evidence.deferred, *evidence.statuses, *runs}):
        status = evidence.statuses.get(job)
        if status in ENDS:
            verdict.ends[status] += 1
        elif status is not None:
            verdict.violations.append(f"job {job} is in {status}: {_story(runs[job])}")
        elif any(run.deletes for run in runs[job]):
            verdict.ends["deleted"] += 1
        else:
            verdict.violations.append(f"job {job} is lost: {_story(runs[job])}")
        finished = [run for run in runs[job] if run.told is not None and run.outcome != "retried"]
        if len(finished) > 1:
            _blame(evidence, verdict, f"job {job} was finished twice: {_story(runs[job])}", "finished twice", runs[job])
        for attempts, times in Counter(run.attempts for run in runs[job]).items():
            if times > 1:
                verdict.violations.append(f"attempt {attempts} of job {job} was run {times} times: {_story(runs[job])}")


def _judge_rescues(evidence: Evidence, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """No job is taken from a worker that is alive, unless that was frozen."""
    for rescue in evidence.rescues:
        for run in runs[rescue.job]:
            if run.attempts != rescue.attempts or run.started > rescue.at:
                continue
            text = f"{rescue} robbed a living worker: {_story(runs[rescue.job])}"
            if run.over > rescue.at:
                _blame(evidence, verdict, text, "rescued while it ran", [run], rescue.at)
            elif run.told is not None and run.told > rescue.at:
                _blame(evidence, verdict, text, "rescued while its worker told of its end", [run], rescue.at)
            elif run.ended is not None:
                verdict.figures["rescues of runs that had ended, which the database was never told"] += 1


def _judge_patience(evidence: Evidence, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """No rescue comes before its time, be its worker dead or alive."""
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for event in evidence.events:
        times[event.job, event.type].append(event.at)
    for rescue in evidence.rescues:
        patience, earliest = evidence.heartbeat_timeout, inf
        match rescue.reason:
            case "heartbeat":
                lives = [run.life for run in runs[rescue.job] if run.attempts == rescue.attempts]
                earliest = -inf  # it may have died before its first one
                since = [began for life in lives for began, confirmed in life.beats if confirmed < rescue.at]
            case "orphaned":
                since = times[rescue.job, "lost its worker"]
            case _:
                since, patience = times[rescue.job, "started"], evidence.run_timeout
        if rescue.at < max((at for at in since if at < rescue.at), default=earliest) + patience:
            verdict.violations.append(f"{rescue} came too soon: {_story(runs[rescue.job])}")


def _judge_ledger(evidence: Evidence, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """Each rescue has its event, each change that no worker made has its rescue, and sweeps count what they did."""
    events = Counter((event.job, event.type, event.at) for event in evidence.events)
    rescued: Counter[tuple[int, str]] = Counter()
    for rescue in evidence.rescues:
        rescued[rescue.job, EVENT_OF[rescue.action]] += 1
        if events[rescue.job, EVENT_OF[rescue.action], rescue.at] != 1:
            verdict.violations.append(f"{rescue} has no event of its own")
    for (job, event_type), times in Counter((event.job, event.type) for event in evidence.events).items():
        # A worker's retry of a job that is to be aborted makes it fail.
        told = {"deferred_for_retry": ("retried",), "failed": ("failed", "retried"), "aborted": ("aborted",)}
        by_workers = sum(run.outcome in told.get(event_type, ()) for run in runs[job])
        if event_type in told and times > rescued[job, event_type] + by_workers:
            verdict.violations.append(
                f"job {job} has {times} events {event_type}, {rescued[job, event_type]} rescues: {_story(runs[job])}"
            )
    done = Counter(rescue.action for rescue in evidence.rescues)
    if +evidence.swept != +done:
        verdict.violations.append(f"the sweeps count {dict(evidence.swept)}, the rescues are {dict(done)}")


def _judge_overlaps(evidence: Evidence, runs: dict[int, list[Run]], verdict: Verdict) -> None:
    """No two runs of one job, or under one lock, at once, unless the first one's worker was frozen."""
    by_lock: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(evidence.runs, key=lambda run: run.started):
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
            _blame(evidence, verdict, text, excuse, [first, *zombies], second.started)


def _overlaps(runs: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """Pairs of runs, by their start, of which the second began before the first was over."""
    for number, first in enumerate(runs):
        for second in runs[number + 1 :]:
            if second.started < first.over:
                yield first, second


def _told_between(zombie: Run, first: Run, second: Run) -> bool:
    """Whether a former worker may have ended the first run in the database before the second one began."""
    if zombie.telling is None:
        return False
    return zombie.telling < second.started and (zombie.told or zombie.life.ended_at) > first.started


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
        if run.life.frozen_between(run.started, before) > evidence.heartbeat_timeout / 2:
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
        f"told {run.outcome} {_second(run.telling)} to {_second(run.told)}"
    )


def _second(at: float | None) -> str:
    return "never" if at is None else f"{at % 100000:.3f}"
