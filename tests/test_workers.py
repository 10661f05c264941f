"""`workers`: which workers Procrastinate knows, and which of them are alive."""

from datetime import timedelta

import pytest

from procrastinate_stalled import Stalled, Worker
from tests.jobs import Connection, add_job, add_worker, contents, rows, update_job


@pytest.fixture
def nobody(transaction: Connection) -> Connection:
    """A transaction in which no worker is registered."""
    transaction.execute("DELETE FROM procrastinate_workers")
    return transaction


def states(connection: Connection) -> dict[int, str]:
    return {worker.worker_id: worker.state for worker in Stalled(connection).workers()}


def test_without_workers_there_are_no_rows(nobody: Connection) -> None:
    add_job(nobody)
    assert Stalled(nobody).workers() == []


@pytest.mark.parametrize(
    ("silent_for", "state"),
    [
        (0, "alive"),
        (29.999999, "alive"),
        (30, "alive"),
        (30.000001, "silent"),
        (86400 * 400, "silent"),
        (-60, "silent"),
    ],
)
def test_a_worker_is_silent_after_more_than_30_seconds_as_procrastinate_prunes_it(
    nobody: Connection, silent_for: float, state: str
) -> None:
    worker = add_worker(nobody, silent_for)

    assert states(nobody) == {worker: state}

    pruned = rows(nobody, "SELECT worker_id FROM procrastinate_prune_stalled_workers_v1(30)")
    assert pruned == ([{"worker_id": worker}] if state == "silent" and silent_for > 0 else [])


def test_a_worker_that_beats_while_the_transaction_lasts_is_alive(nobody: Connection) -> None:
    nobody.execute("INSERT INTO procrastinate_workers (last_heartbeat) VALUES (clock_timestamp())")
    (worker,) = Stalled(nobody).workers()
    assert worker.state == "alive"
    assert worker.age is not None
    assert worker.age < timedelta(0)


@pytest.mark.parametrize("heartbeat", ["-infinity", "infinity"])
def test_an_infinite_heartbeat_has_no_age(nobody: Connection, heartbeat: str) -> None:
    nobody.execute("INSERT INTO procrastinate_workers (last_heartbeat) VALUES (%s)", [heartbeat])
    assert rows(nobody, "SELECT age, state FROM procrastinate_stalled.workers()") == [{"age": None, "state": "silent"}]


def test_each_worker_comes_with_its_jobs_in_doing(nobody: Connection) -> None:
    silent, busy, idle = add_worker(nobody, 90), add_worker(nobody, 10), add_worker(nobody)
    for worker_id in (silent, busy, busy, None):
        add_job(nobody, worker_id=worker_id)
    for status in ("todo", "succeeded", "failed", "cancelled", "aborting", "aborted"):
        job = add_job(nobody, status)
        update_job(nobody, job, worker_id=idle)
    (row,) = rows(nobody, "SELECT now()")
    now = row["now"]

    assert Stalled(nobody).workers() == [
        Worker(silent, now - timedelta(seconds=90), timedelta(seconds=90), doing=1, state="silent"),
        Worker(busy, now - timedelta(seconds=10), timedelta(seconds=10), doing=2, state="alive"),
        Worker(idle, now, timedelta(0), doing=0, state="alive"),
    ]


def test_they_come_by_id_whatever_their_order_in_the_table(nobody: Connection) -> None:
    workers = [add_worker(nobody, silent_for) for silent_for in (5, 100, 1, 50, 2)]
    for worker_id in (workers[3], workers[0]):
        nobody.execute("SELECT procrastinate_update_heartbeat_v1(%s)", [worker_id])
    assert [worker.worker_id for worker in Stalled(nobody).workers()] == workers


def test_it_works_where_nothing_can_be_written(nobody: Connection) -> None:
    worker = add_worker(nobody)
    before = contents(nobody)
    nobody.execute("SET LOCAL transaction_read_only = on")
    assert states(nobody) == {worker: "alive"}
    assert contents(nobody) == before
