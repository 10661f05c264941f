"""A living worker is not robbed, whatever makes it look dead, and a dead one's job is rescued on time."""

from datetime import timedelta

import pytest

from tests.living_workers import CASES, SWEEP_INTERVAL, Case, Product, run

SLACK = 2  # seconds that a busy machine may take for a sweep


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{Product.OURS.value}")
def test_no_living_worker_is_robbed_and_the_job_of_a_dead_one_is_rescued_when_announced(case: Case) -> None:
    outcome = run(case, Product.OURS)

    assert outcome.run_twice == 0
    assert outcome.delay is not None
    assert timedelta() <= outcome.delay <= timedelta(seconds=SWEEP_INTERVAL + SLACK)
    assert [line.split()[0] for line in outcome.dead_job] == ["started", "started", "ended"]
    assert outcome.statuses == {"succeeded"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{Product.STOCK.value}")
def test_the_documented_recipe_robs_living_workers(case: Case) -> None:
    outcome = run(case, Product.STOCK)

    assert outcome.run_twice > 0
    assert [line.split()[0] for line in outcome.dead_job] == ["started", "started", "ended"]
