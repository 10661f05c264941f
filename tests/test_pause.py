"""`pause` and `resume`: jobs that sweeps leave alone for a while."""

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg.errors import CheckViolation, DuplicateObject, InvalidParameterValue

from procrastinate_stalled import Stalled
from tests.conftest import Connect
from tests.jobs import (
    Connection,
    Row,
    add_job,
    add_rule,
    add_stalled_job,
    contents,
    get_job,
    rows,
    update_job,
)
from tests.sessions import Point, add_points, paused, running

HOUR = timedelta(hours=1)


def rules(connection: Connection) -> list[Row]:
    """All rules but that of the install, and how long they are still in force."""
    return rows(
        connection,
        """
        SELECT name, position, enabled, expires_at - now() AS remaining, queue_name, task_name, args, action, note
        FROM procrastinate_stalled.rules
        WHERE name <> 'default'
        ORDER BY name
        """,
    )


def names(connection: Connection) -> list[str]:
    return [rule["name"] for rule in rules(connection)]


def verdicts(connection: Connection) -> list[str]:
    """The verdicts on all jobs in `doing`, by id."""
    query = "SELECT verdict FROM procrastinate_stalled.explain_jobs() ORDER BY job_id"
    return [row["verdict"] for row in rows(connection, query)]


def let_pauses_expire(connection: Connection) -> None:
    connection.execute("UPDATE procrastinate_stalled.rules SET expires_at = now() WHERE action = 'ignore'")


@pytest.fixture
def notices(transaction: Connection) -> list[tuple[str | None, str | None]]:
    """The messages and details of the notices that `transaction` gets."""
    notices: list[tuple[str | None, str | None]] = []
    transaction.add_notice_handler(lambda notice: notices.append((notice.message_primary, notice.message_detail)))
    return notices


# What is paused


@pytest.mark.parametrize(
    ("arguments", "name", "held"),
    [
        ({}, "pause", [True, True, True, True]),
        ({"queue": "mail"}, "pause queue 'mail'", [True, True, False, False]),
        ({"task_name": "billing.%"}, "pause task 'billing.%'", [True, False, True, False]),
        ({"queue": "mail", "task_name": "billing.%"}, "pause queue 'mail' task 'billing.%'", [True] + [False] * 3),
        ({"queue": "mail%"}, "pause queue 'mail%'", [False] * 4),
        ({"queue": "it's"}, "pause queue 'it''s'", [False] * 4),
        ({"queue": "", "task_name": ""}, "pause queue '' task ''", [False] * 4),
        ({"task_name": r"billing\_%"}, r"pause task E'billing\\_%'", [False] * 4),
        ({"task_name": "billing_%"}, "pause task 'billing_%'", [True, False, True, False]),
    ],
)
def test_a_pause_holds_what_it_names_and_nothing_else(
    transaction: Connection, arguments: dict[str, Any], name: str, held: list[bool]
) -> None:
    jobs = [
        add_stalled_job(transaction, queue_name=queue_name, task_name=task_name)
        for queue_name in ("mail", "default")
        for task_name in ("billing.send", "other")
    ]

    rule = Stalled(transaction).pause(**arguments)

    assert rules(transaction) == [
        {
            "name": name,
            "position": -(2**31),
            "enabled": True,
            "remaining": HOUR,
            "queue_name": arguments.get("queue"),
            "task_name": arguments.get("task_name"),
            "args": None,
            "action": "ignore",
            "note": None,
        }
    ]
    (row,) = rows(transaction, "SELECT * FROM procrastinate_stalled.rules WHERE name <> 'default'")
    assert {name: getattr(rule, name) for name in row} == row
    assert verdicts(transaction) == ["held" if is_held else "stalled" for is_held in held]
    free = [job for job, is_held in zip(jobs, held, strict=True) if not is_held]
    stalled = Stalled(transaction)
    assert [job.id for job in stalled.get_stalled_jobs()] == free
    assert [rescue.job_id for rescue in stalled.retry_stalled_jobs(dry_run=True)] == free
    assert [rescue.job_id for rescue in stalled.retry_stalled_jobs()] == free
    assert stalled.resume(**arguments) is True
    assert names(transaction) == []
    assert len(stalled.retry_stalled_jobs()) == sum(held)


def test_what_was_held_is_counted_with_the_names_of_the_pauses(transaction: Connection) -> None:
    for queue_name in ("a", "b", "c", "c"):
        add_stalled_job(transaction, queue_name=queue_name)
    stalled = Stalled(transaction)
    stalled.pause(queue="b")
    stalled.pause(queue="c")

    assert len(stalled.retry_stalled_jobs()) == 1

    assert rows(transaction, "SELECT doing, retried, waiting, held, held_reason FROM procrastinate_stalled.sweeps") == [
        {"doing": 4, "retried": 1, "waiting": 0, "held": 3, "held_reason": "pause queue 'b', pause queue 'c'"}
    ]


def test_a_pause_goes_before_all_other_rules(transaction: Connection) -> None:
    add_rule(transaction, "a", position=-(2**31) + 1, action="fail", run_timeout="1 second")
    add_stalled_job(transaction, started_ago=3600, abort_requested=True)
    Stalled(transaction).pause()
    assert verdicts(transaction) == ["held"]
    assert Stalled(transaction).retry_stalled_jobs() == []


def test_no_other_rule_may_stand_where_pauses_stand(transaction: Connection) -> None:
    with pytest.raises(CheckViolation) as error:
        add_rule(transaction, "first", position=-(2**31))
    assert error.value.diag.constraint_name == "rules_first_position_is_for_pauses"


def test_a_rule_that_ignores_until_it_expires_is_a_pause_from_its_position_on(transaction: Connection) -> None:
    add_rule(transaction, "early", position=1, queue_name="early")
    add_rule(transaction, "night", position=2, action="ignore", expires_at="tomorrow")
    add_stalled_job(transaction, queue_name="early")
    add_stalled_job(transaction)
    assert verdicts(transaction) == ["stalled", "held"]


def test_behind_several_pauses_the_first_one_is_named(transaction: Connection) -> None:
    job = add_stalled_job(transaction, queue_name="mail", task_name="billing.send")
    stalled = Stalled(transaction)
    stalled.pause(task_name="billing.%")
    stalled.pause(queue="mail")
    stalled.pause()

    def rule_name() -> object:
        query = "SELECT rule_name FROM procrastinate_stalled.explain_job(%s)"
        (row,) = rows(transaction, query, job)
        return row["rule_name"]

    assert rule_name() == "pause"
    stalled.resume()
    assert rule_name() == "pause queue 'mail'"
    stalled.resume(queue="mail")
    assert rule_name() == "pause task 'billing.%'"
    stalled.resume(task_name="billing.%")
    assert rule_name() == "default"


@pytest.mark.parametrize("rule", [{"action": "ignore"}, {"enabled": False}])
def test_behind_a_pause_an_ignored_job_stays_ignored(transaction: Connection, rule: dict[str, Any]) -> None:
    transaction.execute("DELETE FROM procrastinate_stalled.rules")
    add_rule(transaction, "never", **rule)
    add_stalled_job(transaction)
    Stalled(transaction).pause()
    assert verdicts(transaction) == ["ignored"]
    Stalled(transaction).retry_stalled_jobs()
    assert rows(transaction, "SELECT held FROM procrastinate_stalled.sweeps") == [{"held": 0}]


@pytest.mark.parametrize("arguments", [{"seconds_since_heartbeat": 30}, {"nb_seconds": 30}])
def test_with_seconds_a_pause_counts_too(transaction: Connection, arguments: dict[str, Any]) -> None:
    job = add_stalled_job(transaction, started_ago=3600, queue_name="paused")
    other = add_stalled_job(transaction, started_ago=3600)
    stalled = Stalled(transaction)
    stalled.pause(queue="paused")
    assert [(job.id, job.action, job.detail, job.rule_name) for job in stalled.get_stalled_jobs(**arguments)] == [
        (job, "ignore", "rule", "pause queue 'paused'"),
        (other, "retry", None, "default"),
    ]
    assert [rescue.job_id for rescue in stalled.retry_stalled_jobs(**arguments)] == [other]


def test_a_run_timeout_obeys_a_pause(transaction: Connection) -> None:
    transaction.execute("UPDATE procrastinate_stalled.rules SET run_timeout = '1 minute'")
    add_stalled_job(transaction, silent_for=0, started_ago=3600)
    Stalled(transaction).pause()
    assert verdicts(transaction) == ["held"]
    assert Stalled(transaction).retry_stalled_jobs() == []


def test_an_operator_retries_a_paused_job_all_the_same(transaction: Connection) -> None:
    job = add_stalled_job(transaction)
    Stalled(transaction).pause()
    assert Stalled(transaction).retry_job(job).action == "retried"


def test_a_job_that_does_not_stall_is_not_held(transaction: Connection) -> None:
    add_stalled_job(transaction, silent_for=10)
    Stalled(transaction).pause()
    assert verdicts(transaction) == ["running"]


def test_an_orphan_is_noted_during_a_pause(transaction: Connection) -> None:
    job = add_job(transaction)
    Stalled(transaction).pause()
    Stalled(transaction).retry_stalled_jobs()
    assert rows(transaction, "SELECT job_id FROM procrastinate_stalled.orphans") == [{"job_id": job}]


# Its end


def test_a_pause_lasts_for_an_hour_or_as_long_as_it_is_told(transaction: Connection) -> None:
    for duration in ("1 hour", "1 microsecond", "10 years", "90 minutes"):
        transaction.execute("SELECT procrastinate_stalled.pause(%s, reason => 'deployment')", [duration])
        assert rows(
            transaction,
            """
            SELECT expires_at = now() + %s::interval AS ends, note
            FROM procrastinate_stalled.rules
            WHERE name = 'pause'
            """,
            duration,
        ) == [{"ends": True, "note": "deployment"}]


@pytest.mark.parametrize(("remaining", "verdict"), [("1 microsecond", "held"), ("0", "stalled"), ("-1 s", "stalled")])
def test_a_pause_is_void_from_its_end_on(transaction: Connection, remaining: str, verdict: str) -> None:
    add_stalled_job(transaction)
    Stalled(transaction).pause()
    transaction.execute(
        "UPDATE procrastinate_stalled.rules SET expires_at = now() + %s::interval WHERE name = 'pause'", [remaining]
    )
    assert verdicts(transaction) == [verdict]


def test_called_again_it_sets_the_end_and_the_reason_anew(transaction: Connection) -> None:
    stalled = Stalled(transaction)
    stalled.pause(timedelta(hours=5), queue="mail", reason="deployment")
    transaction.execute("UPDATE procrastinate_stalled.rules SET enabled = false WHERE action = 'ignore'")

    rule = stalled.pause(timedelta(minutes=5), queue="mail")

    assert (rule.name, rule.enabled, rule.note) == ("pause queue 'mail'", True, None)
    assert [(rule["enabled"], rule["remaining"], rule["note"]) for rule in rules(transaction)] == [
        (True, timedelta(minutes=5), None)
    ]


def test_a_new_pause_removes_those_that_have_expired_and_no_other_rule(transaction: Connection) -> None:
    add_rule(transaction, "christmas", action="ignore", expires_at="yesterday")
    stalled = Stalled(transaction)
    stalled.pause(queue="a")
    let_pauses_expire(transaction)
    stalled.pause(queue="b")
    stalled.pause(queue="c")
    assert names(transaction) == ["christmas", "pause queue 'b'", "pause queue 'c'"]


def test_an_expired_pause_can_be_made_anew(transaction: Connection) -> None:
    stalled = Stalled(transaction)
    stalled.pause(reason="deployment")
    let_pauses_expire(transaction)
    assert stalled.pause().note is None
    assert [rule["remaining"] for rule in rules(transaction)] == [HOUR]


def test_a_rule_of_the_user_with_the_same_name_is_left_alone(transaction: Connection) -> None:
    add_rule(transaction, "pause", position=7, action="fail")
    before = contents(transaction)
    with pytest.raises(DuplicateObject) as error, transaction.transaction():
        Stalled(transaction).pause()
    assert error.value.diag.message_primary == 'there is a rule "pause" already'
    assert error.value.diag.message_detail == "It was not made by pause(), which would give its own rule this name."
    assert error.value.diag.message_hint == "Nothing was changed. Give that rule another name."
    assert contents(transaction) == before

    assert Stalled(transaction).resume() is False
    assert names(transaction) == ["pause"]


@pytest.mark.parametrize(
    ("duration", "detail"),
    [
        (None, "NULL"),
        ("0", "00:00:00"),
        ("-1 second", "-00:00:01"),
        ("10 years 1 microsecond", "10 years 00:00:00.000001"),
        ("3653 days 12:00:00", "3653 days 12:00:00"),
        ("5000000 years -1799999999 days", "5000000 years -1799999999 days"),
        ("-1 year 362 days", "-1 years +362 days"),
    ],
)
def test_a_duration_that_makes_no_sense_is_refused(transaction: Connection, duration: str | None, detail: str) -> None:
    add_rule(transaction, "expired", position=-(2**31), action="ignore", expires_at="yesterday")
    before = contents(transaction)
    with pytest.raises(InvalidParameterValue) as error, transaction.transaction():
        transaction.execute("SELECT procrastinate_stalled.pause(%s)", [duration])
    assert error.value.diag.message_primary == "duration must be longer than 0 and at most 10 years"
    assert error.value.diag.message_detail == f"It is {detail}."
    assert error.value.diag.message_hint == (
        "Nothing was changed. Example: SELECT procrastinate_stalled.pause('2 hours', reason => 'deployment');"
    )
    assert contents(transaction) == before


@pytest.mark.parametrize("task_name", ["\\", "billing.\\", "billing\\\\\\"])
def test_a_task_name_that_is_no_pattern_is_refused(transaction: Connection, task_name: str) -> None:
    before = contents(transaction)
    with pytest.raises(InvalidParameterValue) as error, transaction.transaction():
        Stalled(transaction).pause(task_name=task_name)
    assert error.value.diag.message_primary == "task_name must be a LIKE pattern"
    assert error.value.diag.message_detail == f'"{task_name}" ends in an escape character.'
    assert (error.value.diag.message_hint or "").startswith("Nothing was changed. Examples: ")
    assert contents(transaction) == before


# resume


def test_a_pause_that_ends_sooner_than_the_one_that_was_there_is_told(
    transaction: Connection, notices: list[tuple[str | None, str | None]]
) -> None:
    Stalled(transaction).pause(timedelta(hours=1))
    Stalled(transaction).pause(timedelta(hours=8), reason="cluster move")
    assert notices == []
    Stalled(transaction).pause(timedelta(minutes=30))
    [(message, detail)] = notices
    assert message == 'procrastinate_stalled: "pause" ends sooner now'
    assert re.fullmatch(r"It was to last until .* \(cluster move\)\.", detail or "")


def test_resume_ends_the_pause_with_the_same_arguments_only(
    transaction: Connection, notices: list[tuple[str | None, str | None]]
) -> None:
    stalled = Stalled(transaction)
    assert stalled.resume() is False
    made: list[dict[str, Any]] = [{}, {"queue": "q"}, {"task_name": "t"}, {"queue": "q", "task_name": "t"}]
    for arguments in made:
        stalled.pause(**arguments)
    assert stalled.resume(queue="other") is False
    assert len(rules(transaction)) == 4
    notices.clear()

    for number, arguments in enumerate(made):
        assert stalled.resume(**arguments) is True
        assert len(rules(transaction)) == 3 - number
        assert stalled.resume(**arguments) is False

    left = [""""pause queue 'q'", until """, """"pause queue 'q' task 't'", until """, """"pause task 't'", until """]
    assert {message for message, _ in notices} == {"procrastinate_stalled: other pauses are still in force"}
    details = [detail or "" for _, detail in notices]
    assert len(details) == 6  # none at the end
    assert all(name in details[0] for name in left)
    assert details[4].startswith(""""pause queue 'q' task 't'", until """)
    assert "; " not in details[4]


def test_resume_names_every_rule_that_still_ignores_until_it_expires(
    transaction: Connection, notices: list[tuple[str | None, str | None]]
) -> None:
    add_rule(transaction, "night", action="ignore", expires_at="2999-12-31 12:00+00")
    add_rule(transaction, "over", action="ignore", expires_at="yesterday")
    add_rule(transaction, "off", action="ignore", expires_at="tomorrow", enabled=False)
    add_rule(transaction, "never", action="ignore")
    add_rule(transaction, "temporary", expires_at="tomorrow")
    transaction.execute("SET LOCAL TimeZone = 'UTC'")
    Stalled(transaction).resume()
    assert [detail for _, detail in notices] == ['"night", until 2999-12-31 12:00:00+00']


@pytest.mark.parametrize("end", ["expires_at = now()", "enabled = false"])
def test_resume_of_a_pause_that_was_not_in_force_removes_it_and_says_no(transaction: Connection, end: str) -> None:
    Stalled(transaction).pause()
    transaction.execute(f"UPDATE procrastinate_stalled.rules SET {end} WHERE name = 'pause'")
    assert Stalled(transaction).resume() is False
    assert names(transaction) == []


def test_a_rule_of_the_user_that_ignores_is_not_resumed(transaction: Connection) -> None:
    add_rule(transaction, "night", position=-(2**31) + 1, action="ignore", expires_at="tomorrow")
    assert Stalled(transaction).resume() is False
    assert names(transaction) == ["night"]


# With others


def test_of_two_pauses_at_once_the_later_one_counts(connect: Connect) -> None:
    first, second, observer = connect(autocommit=False), connect(), connect()
    Stalled(first).pause(timedelta(hours=5), reason="first")
    with running(
        second, observer, "SELECT (procrastinate_stalled.pause('1 hour', reason => 'second')).note"
    ) as statement:
        statement.wait_until_it_waits()
        first.commit()
        assert statement.result() == [("second",)]
    assert [rule["note"] for rule in rules(observer)] == ["second"]


def test_many_pauses_at_once_disturb_each_other_in_no_way(connect: Connect) -> None:
    connections = [connect() for _ in range(6)]

    def pause_and_resume(connection: psycopg.Connection[Any]) -> None:
        for queue in ("a", "b", None):
            Stalled(connection).pause(queue=queue)
            Stalled(connection).resume(queue=queue)

    with ThreadPoolExecutor() as executor:
        list(executor.map(pause_and_resume, connections))
    assert names(connections[0]) == []


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_pause_counts_from_the_next_batch_of_a_sweep_on(
    connect: Connect, connection: Connection, *, one_by_one: bool
) -> None:
    jobs = [add_stalled_job(connection) for _ in range(4)]
    if one_by_one:
        # A trigger that refuses the last job makes the sweep take the batch apart.
        connection.execute(
            f"""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END; $$;
            CREATE TRIGGER refuse BEFORE UPDATE ON procrastinate_jobs
                FOR EACH ROW WHEN (OLD.id = {jobs[3]} AND OLD.status = 'doing') EXECUTE FUNCTION refuse();
            """
        )
    add_points(connection)
    update_job(connection, jobs[1], task_name="pause")
    call = "CALL procrastinate_stalled.sweep(4)" if one_by_one else "CALL procrastinate_stalled.sweep(1)"
    expected = ["todo", "todo", "doing", "doing"] if not one_by_one else ["doing"] * 4
    with paused(connect, Point.WITHIN_UPDATE, call) as sweep:
        Stalled(connection).pause()
        sweep.resume()
    assert [get_job(connection, job)["status"] for job in jobs] == expected
    held = expected.count("doing")
    assert rows(connection, "SELECT retried, held, held_reason, error FROM procrastinate_stalled.sweeps") == [
        {"retried": 4 - held, "held": held, "held_reason": "pause", "error": None}
    ]


def test_after_a_resume_the_next_sweep_rescues_what_was_held(connection: Connection) -> None:
    job = add_stalled_job(connection)
    stalled = Stalled(connection)
    stalled.pause()
    stalled.sweep()
    assert get_job(connection, job)["status"] == "doing"
    stalled.resume()
    stalled.sweep()
    assert get_job(connection, job)["status"] == "todo"


def test_after_the_end_of_a_pause_the_next_sweep_rescues_what_was_held(connection: Connection) -> None:
    job = add_stalled_job(connection)
    stalled = Stalled(connection)
    stalled.pause()
    let_pauses_expire(connection)
    stalled.sweep()
    assert get_job(connection, job)["status"] == "todo"
