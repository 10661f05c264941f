"""The schedule of a chaos run is that of its seed, and its oracle sees what it looks for."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.adversary import FAULTS, schedule
from tests.chaos.oracle import Event, Evidence, Life, Outage, Pause, Rescue, Run, judge, read_diary, read_life

LIVING = Life(1, ended_at=1000)
KILLED = Life(2, ended_at=102, worker_id=22, beats=[(101, 101.1)])
FROZEN = Life(3, ended_at=1000, frozen=[(101, 115)])
OTHER = Life(4, ended_at=1000)

# Job 7 is lost with its worker, rescued, and run again.
LOST = Run(KILLED, job=7, attempts=0, lock="a", started=100)
RETRY = Run(OTHER, 7, 1, "a", started=111, ended=112, telling=112, told=112.1, outcome="succeeded")
RESCUE = Rescue(
    job=7,
    at=110,
    action="retried",
    reason="heartbeat",
    attempts=0,
    worker_id=22,
    queue_name="default",
    task_name="task",
)
STARTED = Event(7, "started", 99.9)
EVENT = Event(7, "deferred_for_retry", 110)
GOOD = Evidence(
    heartbeat_timeout=8,
    run_timeout=30,
    outage_grace=16,
    deferred=[7],
    lives=[KILLED],
    runs=[LOST, RETRY],
    statuses={7: "succeeded"},
    rescues=[RESCUE],
    events=[STARTED, EVENT],
    swept=Counter(retried=1),
)


def test_the_same_seed_makes_the_same_schedule_and_another_one_another() -> None:
    assert schedule(7, 600) == schedule(7, 600)
    assert schedule(7, 600) != schedule(8, 600)


@pytest.mark.parametrize("seed", range(5))
def test_half_an_hour_has_three_hundred_kills_twenty_outages_and_each_kind_of_fault(seed: int) -> None:
    kinds = Counter(fault.kind for fault in schedule(seed, 1800))

    assert kinds["kill"] >= 300
    assert kinds["crash"] + kinds["restart fast"] + kinds["restart immediate"] >= 20
    assert kinds["promote"] == 1
    assert set(kinds) == set(FAULTS)


def test_a_minute_has_an_outage_too() -> None:
    assert {"crash", "restart fast", "restart immediate"} & {fault.kind for fault in schedule(1, 60)}


def test_a_job_that_is_rescued_from_a_dead_worker_is_no_violation() -> None:
    verdict = judge(GOOD)

    assert (verdict.violations, verdict.excused, verdict.ends) == ([], {}, {"succeeded": 1})


@pytest.mark.parametrize(
    ("evidence", "violation"),
    [
        (replace(GOOD, deferred=[7, 8]), "job 8 is lost"),
        (replace(GOOD, statuses={}, events=[]), "job 7 is lost"),
        (replace(GOOD, statuses={7: "doing"}), "job 7 is in doing"),
        (replace(GOOD, runs=[replace(LOST, ended=101, told=101.5, outcome="failed"), RETRY]), "finished twice"),
        (replace(GOOD, runs=[LOST, RETRY, replace(RETRY, started=113, ended=114, told=None)]), "run 2 times"),
        (replace(GOOD, runs=[replace(LOST, life=LIVING, ended=110.5), RETRY]), "robbed a living worker"),
        (
            replace(GOOD, runs=[replace(LOST, life=LIVING, ended=109, telling=109, told=110.5), RETRY]),
            "robbed a living worker",
        ),
        (replace(GOOD, runs=[replace(LOST, life=LIVING, ended=101, telling=101), RETRY]), "robbed a living worker"),
        (replace(GOOD, runs=[replace(LOST, life=LIVING, ended=112), RETRY]), "runs overlapped (lock None)"),
        (
            replace(
                GOOD,
                deferred=[6, 7],
                statuses={6: "succeeded", 7: "succeeded"},
                runs=[replace(RETRY, job=6, attempts=0, life=LIVING), LOST, RETRY],
            ),
            "runs overlapped (lock a)",
        ),
        (replace(GOOD, lives=[replace(KILLED, beats=[(102.1, 102.2)])]), "came too soon"),
        (replace(GOOD, lives=[]), "came too soon"),
        (replace(GOOD, pauses=[Pause(109, 111, None, None)]), "came in a pause"),
        (replace(GOOD, pauses=[Pause(109, 111, "default", "task")]), "came in a pause"),
        (
            replace(
                GOOD,
                rescues=[replace(RESCUE, reason="orphaned")],
                events=[Event(7, "lost its worker", 102.1), EVENT],
            ),
            "came too soon",
        ),
        (replace(GOOD, outages=[Outage(101.5, 104)]), "came too soon after Outage"),
        (
            replace(
                GOOD,
                rescues=[replace(RESCUE, reason="orphaned")],
                events=[STARTED, Event(7, "lost its worker", 101), EVENT],
                outages=[Outage(103, 104)],
            ),
            "came too soon after Outage",
        ),
        (replace(GOOD, rescues=[replace(RESCUE, reason="run_timeout")]), "came too soon"),
        (replace(GOOD, events=[]), "1 rescues and 0 events"),
        (replace(GOOD, events=[STARTED, EVENT, EVENT]), "1 rescues and 2 events"),
        (replace(GOOD, rescues=[RESCUE, RESCUE], swept=Counter(retried=2)), "2 rescues and 1 events"),
        (
            replace(
                GOOD,
                rescues=[RESCUE, replace(RESCUE, at=111)],
                events=[*GOOD.events, Event(7, "deferred_for_retry", 111)],
                swept=Counter(retried=2),
            ),
            "attempt 0 of job 7 was rescued 2 times",
        ),
        (replace(GOOD, rescues=[replace(RESCUE, attempts=1)]), "not of the last fetch before it"),
        (replace(GOOD, events=[STARTED, STARTED, EVENT]), "not of the last fetch before it"),
        (replace(GOOD, events=[EVENT, STARTED]), "not of the last fetch before it"),
        (replace(GOOD, events=[EVENT, Event(7, "deferred_for_retry", 111)]), "by no rescue and no worker"),
        (replace(GOOD, events=[EVENT, Event(7, "failed", 111)]), "by no rescue and no worker"),
        (
            replace(
                GOOD,
                runs=[replace(LOST, life=LIVING, ended=101, telling=101, gave_up=102, outcome="failed"), RETRY],
                events=[*GOOD.events, Event(7, "failed", 111)],
            ),
            "by no rescue and no worker",
        ),
        (
            replace(GOOD, statuses={}, runs=[replace(LOST, deletes=True, telling=101.5), RETRY]),
            "job 7 is lost",  # what its worker tried was in vain: it was rescued later
        ),
        (replace(GOOD, rescues=[]), "the sweeps count"),
    ],
)
def test_the_oracle_sees(evidence: Evidence, violation: str) -> None:
    assert any(violation in text for text in judge(evidence).violations)


def test_the_oracle_measures_how_long_a_job_waits_for_its_rescue_after_the_death_of_its_worker() -> None:
    assert judge(GOOD).delays == [8]
    assert judge(replace(GOOD, runs=[replace(LOST, life=LIVING, ended=109), RETRY])).delays == []


def test_what_a_frozen_worker_suffers_is_excused_and_counted() -> None:
    verdict = judge(replace(GOOD, runs=[replace(LOST, life=FROZEN, ended=115.5), RETRY]))

    assert verdict.violations == []
    assert verdict.excused.total() == 2  # robbed, and run twice at once


def test_who_was_frozen_before_it_knew_that_it_had_got_the_job_is_excused_too() -> None:
    late = replace(LOST, life=FROZEN, started=115.1, ended=115.5)
    other = replace(RETRY, ended=116)

    verdict = judge(replace(GOOD, runs=[late, other]))

    assert verdict.violations == []
    assert verdict.excused == {"rescued while it ran": 1, "ran twice at once": 1}


def test_a_worker_that_has_given_up_telling_is_not_robbed() -> None:
    verdict = judge(replace(GOOD, runs=[replace(LOST, life=LIVING, ended=101, telling=101, gave_up=109), RETRY]))

    assert verdict.violations == []
    assert verdict.figures.total() == 1


def test_only_who_retried_a_job_after_its_end_and_was_frozen_excuses_that_it_was_finished_twice() -> None:
    zombie = replace(LOST, life=FROZEN, ended=115.5, telling=115.5, told=115.6, outcome="retried")
    again = replace(RETRY, attempts=3, started=117, ended=118, telling=118, told=118.1)

    assert judge(replace(GOOD, runs=[zombie, RETRY, again])).excused["finished twice"] == 1
    last = replace(again, life=Life(5, 1000, frozen=[(117, 125)]), ended=125, telling=125, told=125.1)
    for run in (
        replace(zombie, life=LIVING),
        replace(zombie, telling=None, told=None, outcome=None),
        replace(zombie, told=None, gave_up=112),
    ):
        violations = judge(replace(GOOD, runs=[run, RETRY, last])).violations
        assert any("finished twice" in text for text in violations)


def test_a_retry_after_the_end_of_a_job_adds_an_attempt_that_was_not_fetched() -> None:
    events = [STARTED, Event(7, "failed", 100), Event(7, "retried", 100.5), STARTED, EVENT]
    failed = replace(LOST, life=OTHER, ended=100, telling=99.95, told=100.1, outcome="failed")

    verdict = judge(
        replace(GOOD, runs=[failed, replace(LOST, attempts=2)], rescues=[replace(RESCUE, attempts=2)], events=events)
    )

    assert not any("last fetch" in text for text in verdict.violations)


def test_an_outage_long_ago_or_after_the_rescue_or_before_a_sign_of_life_demands_nothing() -> None:
    beaten = replace(KILLED, beats=[(101, 101.1)])
    died_beating = replace(KILLED, ended_at=104, beats=[(101, 101.1)], unconfirmed=[(102, 104)])

    for outage in (Outage(93, 95), Outage(100, 101), Outage(109.9, 111)):
        assert judge(replace(GOOD, lives=[beaten], outages=[outage])).violations == []
    assert judge(replace(GOOD, lives=[died_beating], outages=[Outage(103, 103.5)])).violations == []


def test_a_heartbeat_that_failed_or_that_its_worker_did_not_survive_may_have_been_heard(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    notes = [(1, "beating"), (2, "beat"), (2, "registered"), (3, "beating"), (4, "not beaten"), (5, "beating")]
    diary.write_text("".join(json.dumps({"at": at, "what": what, "id": 22}) + "\n" for at, what in notes))

    life = read_life(diary, 1, 6, [])

    assert (life.worker_id, life.beats, life.unconfirmed) == (22, [(1, 2)], [(3, 4), (5, 6)])


def test_a_fetch_that_waited_for_the_rescue_is_not_that_of_the_rescued_run() -> None:
    slow = replace(GOOD, rescues=[replace(RESCUE, reason="run_timeout")], run_timeout=10)

    assert judge(replace(slow, events=[*GOOD.events, Event(7, "started", 109.9)])).violations == []


def test_a_fetch_that_waited_while_the_run_before_it_ended_is_no_overlap() -> None:
    done = Run(LIVING, job=6, attempts=0, lock="a", started=103, ended=111, telling=111, told=113, outcome="succeeded")
    events = [*GOOD.events, Event(7, "started", 110.5)]
    runs = [done, LOST, replace(RETRY, started=113.1, ended=114, telling=114, told=114.1)]
    evidence = replace(GOOD, deferred=[6, 7], statuses={6: "succeeded", 7: "succeeded"}, runs=runs, events=events)

    assert judge(evidence).violations == []


def test_the_diary_says_when_a_worker_failed_to_tell_of_the_end_of_a_run(tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    notes = [(1, "started"), (2, "ended"), (3, "retrying"), (4, "not told")]
    line = {"job": 7, "attempts": 0, "lock": None}
    diary.write_text("".join(json.dumps({"at": at, "what": what} | line) + "\n" for at, what in notes))

    (run,) = read_diary(diary, LIVING)

    assert (run.ended, run.telling, run.told, run.gave_up, run.outcome) == (2, 3, None, 4, "retried")


def test_who_was_frozen_for_a_moment_is_not_excused() -> None:
    life = replace(FROZEN, frozen=[(101, 104)])

    assert len(judge(replace(GOOD, runs=[replace(LOST, life=life, ended=115.5), RETRY])).violations) == 2


def test_a_job_may_be_deleted_by_who_told_so_last() -> None:
    for told in (112.1, None):
        assert judge(replace(GOOD, statuses={}, runs=[LOST, replace(RETRY, deletes=True, told=told)])).violations == []


def test_a_pause_of_others_forbids_nothing() -> None:
    pauses = [Pause(100, 109, None, None), Pause(109, 111, "mail", None), Pause(109, 111, None, "other")]

    assert judge(replace(GOOD, pauses=pauses)).violations == []
