"""A database that was restored from a dump, copied or renamed has pg_cron jobs that are for another one."""

import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from procrastinate_stalled import Stalled
from tests.conftest import CRON
from tests.jobs import rows

Connection = psycopg.Connection[Any]

COMMAND = "CALL procrastinate_stalled.sweep()"
EVERY_YEAR = "0 0 31 12 *"  # so that pg_cron does not run it meanwhile


def jobs(connection: Connection) -> list[tuple[object, ...]]:
    query = """
        SELECT jobid, jobname, username, schedule, command, database, active,
                nodeport = current_setting('port')::integer AS on_this_server
            FROM cron.job
            ORDER BY jobid
    """
    return [tuple(row.values()) for row in rows(connection, query)]


@pytest.fixture
def local(cron_database: str) -> Iterator[Connection]:
    """A connection to a database that has both pg_cron and this product."""
    with psycopg.connect(cron_database, autocommit=True) as connection:
        Stalled(connection).schedule(schedule=EVERY_YEAR)
        yield connection


def local_check(connection: Connection) -> tuple[str, str, str]:
    (row,) = (row for row in Stalled(connection).status() if row.name == "schedule")
    return row.level, row.detail, row.hint or ""


def test_a_job_for_the_former_name_of_the_database_is_a_warning_whose_remedy_works(local: Connection) -> None:
    local.execute("UPDATE cron.job SET database = 'former', schedule = '* * * * *'")
    # Those of the original, in the dump.
    local.execute("INSERT INTO procrastinate_stalled.sweeps (duration) VALUES ('1 ms'), ('1 ms')")
    job_id = jobs(local)[0][0]

    level, detail, hint = local_check(local)

    assert level == "warning"
    assert detail == (
        f'this database, "{CRON}", is not swept by pg_cron; pg_cron job {job_id} of role postgres sweeps database '
        '"former", which does not exist'
    )
    remedy = re.search(r"SELECT procrastinate_stalled\.schedule\(\);", hint)
    assert remedy is not None
    local.execute(remedy[0].encode())
    assert [(job[5], job[7]) for job in jobs(local)] == [(CRON, True)]
    assert local_check(local)[0] == "ok"


def test_the_job_for_the_former_name_is_ended_by_unschedule_and_by_the_hint(local: Connection) -> None:
    for end in ("unschedule", "hint"):
        Stalled(local).schedule(schedule=EVERY_YEAR)
        local.execute("UPDATE cron.job SET database = 'former'")
        _level, _detail, hint = local_check(local)
        if end == "unschedule":
            assert Stalled(local).unschedule()
        else:
            local.execute(hint.rpartition("To end it: ")[2].encode())
        assert jobs(local) == []


def test_a_job_of_our_name_for_a_living_database_is_a_warning_whose_remedy_works(local: Connection) -> None:
    local.execute("UPDATE cron.job SET database = 'template1'")

    level, detail, hint = local_check(local)
    with pytest.raises(psycopg.errors.DuplicateObject) as caught:
        Stalled(local).schedule(schedule=EVERY_YEAR)
    error_hint = caught.value.diag.message_hint or ""
    assert not Stalled(local).unschedule()

    assert level == "warning"
    assert detail.endswith('of role postgres sweeps database "template1"')
    remedies = [re.findall(r"SELECT cron\.unschedule\(\d+\);", text) for text in (hint, error_hint)]
    assert remedies[0] == remedies[1]
    local.execute(remedies[0][0].encode())
    Stalled(local).schedule(schedule=EVERY_YEAR)
    assert [job[5] for job in jobs(local)] == [CRON]


def test_a_job_of_a_database_that_was_dropped_is_told_beside_a_good_one(local: Connection) -> None:
    local.execute(
        """
        SELECT cron.schedule_in_database('procrastinate_stalled shop', '0 0 31 12 *', %s, 'template1');
        """,
        [COMMAND],
    )
    assert local_check(local)[0] == "ok"
    local.execute("UPDATE cron.job SET database = 'shop' WHERE database = 'template1'")

    level, detail, hint = local_check(local)

    assert level == "warning"
    assert detail.startswith("pg_cron job ")
    assert detail.endswith('of role postgres sweeps database "shop", which does not exist')
    local.execute(hint.removeprefix("To end it: ").encode())
    assert local_check(local)[0] == "ok"
    assert [job[5] for job in jobs(local)] == [CRON]


def test_a_job_for_another_port_is_a_warning_whose_remedy_works(local: Connection) -> None:
    local.execute("UPDATE cron.job SET nodeport = 1")

    level, detail, hint = local_check(local)

    assert level == "warning"
    assert "is for the server on port 1, and this one has port" in detail
    assert "SELECT procrastinate_stalled.schedule();" in hint
    Stalled(local).schedule(schedule=EVERY_YEAR)
    assert [(job[5], job[7]) for job in jobs(local)] == [(CRON, True)]
    assert local_check(local)[0] == "ok"
