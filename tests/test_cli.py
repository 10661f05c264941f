"""The command line, run as its users run it."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from procrastinate_stalled import __version__, psql_script
from tests.conftest import Connect
from tests.jobs import add_job, add_rule, add_stalled_job, add_worker, contents, get_job, insert, rows
from tests.server import PROJECT, Server
from tests.test_installation import is_installed
from tests.wait import wait_until

OK, WARNING, ERROR, FAILED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

COMMANDS = [
    *("install", "uninstall", "sql", "list", "explain", "workers", "runtimes", "sweep", "retry", "pause", "resume"),
    "set-procrastinate-schema",
    *("grant-monitor", "grant-operator"),
    *("schedule", "unschedule", "status", "rules", "rules add", "rules change", "rules remove"),
]

# The servers of tests seem to be available since -infinity, which no datetime can hold.
AVAILABLE_SINCE = "2020-01-02T03:04:05Z"

Run = subprocess.CompletedProcess[str]


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "DATABASE_URL"))}
    options = f"-c tests.available_since={AVAILABLE_SINCE}"
    return {**inherited, "PYTHONPATH": str(PROJECT), "PGOPTIONS": options, "TZ": "UTC", **variables}


def run(*arguments: str, database: str = "", **variables: str) -> Run:
    """Run a command; without a terminal, as in a pipe."""
    if database:
        variables["DATABASE_URL"] = database
    return subprocess.run(
        [sys.executable, "-m", "procrastinate_stalled", *arguments],
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def succeed(*arguments: str, database: str) -> str:
    """Run a command that must end well and say nothing on stderr; return what it prints."""
    done = run(*arguments, database=database)
    assert (done.returncode, done.stderr) == (OK, "")
    return done.stdout


def rows_of(*arguments: str, database: str) -> Any:
    return json.loads(succeed(*arguments, "--json", database=database))


def explain(connection: psycopg.Connection[Any], job: int) -> dict[str, Any]:
    connection.execute("SELECT set_config('tests.available_since', %s, false)", [AVAILABLE_SINCE])
    (row,) = rows(connection, "SELECT * FROM procrastinate_stalled.explain_job(%s)", job)
    return row


def expect_error(done: Run, message: str, *, hint: str) -> None:
    """See a user's mistake explained on stderr in three parts, without a traceback."""
    assert done.returncode == FAILED
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert message in lines[0]
    assert lines[0].startswith("Error: ")
    assert len(lines) >= 3
    assert lines[-1].startswith("Hint: ")
    assert hint in lines[-1]


def test_install_says_what_it_did_and_what_comes_next(procrastinate_database: str) -> None:
    first = succeed("install", database=procrastinate_database)
    again = succeed("install", database=procrastinate_database)

    assert "procrastinate_stalled_0001_0.1.0" in first
    assert "procrastinate-stalled schedule" in first
    assert again == "Already installed, nothing to do.\n"
    assert is_installed(procrastinate_database)


def test_uninstall_says_what_it_did(database: str) -> None:
    first = succeed("uninstall", database=database)
    again = succeed("uninstall", database=database)

    assert (first, again) == ("Uninstalled.\n", "Not installed, nothing to do.\n")
    assert not is_installed(database)


def test_uninstall_warns_of_the_job_that_it_cannot_remove(other_database_on_cron_server: str) -> None:
    done = run("uninstall", database=other_database_on_cron_server)

    assert (done.returncode, done.stdout) == (OK, "Uninstalled.\n")
    assert done.stderr.startswith("Warning: ")
    assert "SELECT cron.unschedule(jobid) FROM cron.job WHERE database = " in done.stderr


def test_sql_prints_the_script_for_psql_and_needs_no_database() -> None:
    assert succeed("sql", database="host=nowhere.invalid") == psql_script()


def test_list_shows_the_stalled_jobs_to_people(database: str, connection: psycopg.Connection[Any]) -> None:
    add_rule(connection, "end", position=1, task_name="task.that.fails", action="fail")
    jobs = [add_stalled_job(connection, queue_name="[bold]emails", task_name="task.that.fails") for _ in range(2)]

    text = succeed("list", database=database)

    for job in jobs:
        assert re.search(rf"^ *{job} .*\[bold\]emails .*heartbeat .*fail", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 80


def test_list_breaks_a_long_task_name_instead_of_cutting_it(database: str, connection: psycopg.Connection[Any]) -> None:
    name = "a.module.with.a.very.long.dotted.path.and.then.some.more.of.it.the_task_with_its_long_name"
    add_stalled_job(connection, task_name=name)

    text = succeed("list", database=database)

    headers, _line, *lines = text.splitlines()
    task = slice(headers.index("Task"), headers.index("Reason"))
    assert "".join(line[task].strip() for line in lines) == name
    assert max(map(len, text.splitlines())) <= 80


def test_list_says_that_there_are_none(database: str) -> None:
    assert succeed("list", database=database) == "No stalled jobs.\n"
    assert rows_of("list", database=database) == []


def test_list_selects_by_each_option(database: str, connection: psycopg.Connection[Any]) -> None:
    old = add_stalled_job(connection, queue_name="old", task_name="send", started_ago=500)
    new = add_stalled_job(connection, silent_for=100, queue_name="new", task_name="read", started_ago=50)

    def ids(*options: str) -> list[int]:
        return [job["id"] for job in rows_of("list", *options, database=database)]

    assert ids() == [old]
    assert ids("--seconds-since-heartbeat", "60") == [old, new]
    assert ids("--seconds-since-heartbeat", "60", "--queue", "new") == [new]
    assert ids("--seconds-since-heartbeat", "60", "--task-name", "send") == [old]
    assert ids("--nb-seconds", "100.5") == [old]


def test_json_has_the_columns_as_keys_and_times_in_iso_format(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    job = add_stalled_job(connection, args={"name": "Zoë"})

    (row,) = rows_of("list", database=database)

    with connection.cursor() as cursor:
        columns = cursor.execute("SELECT * FROM procrastinate_stalled.get_stalled_jobs()").description
    assert columns is not None
    assert list(row) == [column.name for column in columns]
    assert (row["id"], row["args"], row["lock"]) == (job, {"name": "Zoë"}, None)
    assert datetime.fromisoformat(row["last_heartbeat"]).tzinfo is not None


def test_explain_shows_the_sentence_then_the_evidence(database: str, connection: psycopg.Connection[Any]) -> None:
    job = add_stalled_job(connection, 100, queue_name="[bold]emails", started_ago=7200)

    text = succeed("explain", str(job), database=database)

    sentence, _empty, _headers, _line, *lines = text.splitlines()
    assert sentence.startswith(f"Job {job}: worker ")
    assert "was last heard 1 min 4" in sentence
    assert "rule default waits 5 min" in sentence
    evidence = explain(connection, job)
    assert [re.split("  +", line) for line in lines] == [
        ["Queue", "[bold]emails"],
        ["Task", "task"],
        ["Status", "doing"],
        ["Attempts", "0"],
        ["Started", f"{evidence['started_at']:%Y-%m-%d %H:%M:%S}"],
        ["Worker", str(evidence["worker_id"])],
        ["Last heartbeat", f"{evidence['last_heartbeat']:%Y-%m-%d %H:%M:%S}"],
        ["Server available since", "2020-01-02 03:04:05"],
        ["Rule", "default"],
        ["Verdict", "running"],
        ["Stalled at", f"{evidence['stalled_at']:%Y-%m-%d %H:%M:%S}"],
        ["Reason", "heartbeat"],
        ["A sweep would then", "retry"],
    ]


def test_the_sentence_has_the_times_of_day_of_the_table(database: str, connection: psycopg.Connection[Any]) -> None:
    job = add_stalled_job(connection, 100)

    done = run("explain", str(job), database=database, TZ="Asia/Kathmandu")

    (stalled_at,) = re.findall(r"^Stalled at +.*?(\d\d:\d\d:\d\d)$", done.stdout, re.MULTILINE)
    evidence = explain(connection, job)
    assert stalled_at == f"{evidence['stalled_at'].astimezone(ZoneInfo('Asia/Kathmandu')):%H:%M:%S}"
    assert f"{stalled_at} unless it beats again." in done.stdout.splitlines()[0]
    assert (done.returncode, done.stderr) == (OK, "")


def test_explain_explains_a_job_that_is_not_running(database: str, connection: psycopg.Connection[Any]) -> None:
    ended = add_job(connection, "failed")

    text = succeed("explain", str(ended), database=database)

    assert text.startswith(f"Job {ended}: it has ended")
    assert re.search(r"^Verdict +not doing$", text, re.MULTILINE)
    (line,) = succeed("explain", "4242", database=database).splitlines()
    assert line.startswith("Job 4242: there is no job 4242")


def test_explain_prints_the_row(database: str, connection: psycopg.Connection[Any]) -> None:
    job = add_stalled_job(connection)

    row = rows_of("explain", str(job), database=database)

    evidence = explain(connection, job)
    assert list(row) == list(evidence)
    assert (row["job_id"], row["verdict"], row["seen_at"]) == (job, "stalled", None)
    assert datetime.fromisoformat(row["stalled_at"]) == evidence["stalled_at"]
    assert rows_of("explain", "4242", database=database)["verdict"] == "no such job"


def test_workers_are_shown_with_their_age_and_state(database: str, connection: psycopg.Connection[Any]) -> None:
    connection.execute("DELETE FROM procrastinate_workers")
    assert succeed("workers", database=database) == "No workers.\n"
    assert rows_of("workers", database=database) == []
    alive, silent = add_worker(connection), add_worker(connection, 3720)
    add_job(connection, worker_id=silent)

    text = succeed("workers", database=database)
    first, second = rows_of("workers", database=database)

    assert re.search(rf"^{alive} +\S+ \S+ +\S+ m?s +0 +alive$", text, re.MULTILINE)
    assert re.search(rf"^{silent} +\S+ \S+ +1 h 2 min +1 +silent$", text, re.MULTILINE)
    future = add_worker(connection, -60)
    assert re.search(rf"^{future} +\S+ \S+ +0 s +0 +silent$", succeed("workers", database=database), re.MULTILINE)
    assert list(first) == ["worker_id", "last_heartbeat", "age", "doing", "state"]
    assert (second["worker_id"], second["doing"], second["state"]) == (silent, 1, "silent")
    assert 3720 <= second["age"] < 3750


def test_runtimes_are_shown_for_each_task(database: str, connection: psycopg.Connection[Any]) -> None:
    assert succeed("runtimes", database=database) == "No run has started and ended in that time.\n"
    assert rows_of("runtimes", database=database) == []
    for ended_ago, seconds in ((3600, 192), (86400 * 30, 0.25)):
        job = add_job(connection, "succeeded", task_name="send", started_ago=ended_ago + seconds)
        connection.execute(
            """
            UPDATE procrastinate_events SET at = now() - make_interval(secs => %s)
                WHERE job_id = %s AND type = 'succeeded'
            """,
            [ended_ago, job],
        )
    long_ago = f"{datetime.now(UTC) - timedelta(days=60):%Y-%m-%dT%H:%M}"

    text = succeed("runtimes", database=database)
    (week,) = rows_of("runtimes", database=database)
    (all_time,) = rows_of("runtimes", "--since", long_ago, database=database)

    assert re.search(r"^send +1 +3 min 12 s +3 min 12 s +3 min 12 s$", text, re.MULTILINE)
    assert list(week) == ["task_name", "runs", "p50", "p99", "longest"]
    assert (week["runs"], round(week["longest"])) == (1, 192)
    assert (all_time["runs"], round(all_time["longest"])) == (2, 192)


def test_sweep_rescues_and_says_how_many(database: str, connection: psycopg.Connection[Any]) -> None:
    add_rule(connection, "end", position=1, task_name="end", action="fail")
    retried = [add_stalled_job(connection) for _ in range(2)]
    ended = add_stalled_job(connection, task_name="end")

    text = succeed("sweep", database=database)

    assert text == "3 jobs in doing: 2 retried, 1 failed, 0 aborted, 0 held, 0 left for a later sweep.\n"
    assert {get_job(connection, job)["status"] for job in retried} == {"todo"}
    assert get_job(connection, ended)["status"] == "failed"


def test_sweep_says_how_many_it_held_and_why(database: str, connection: psycopg.Connection[Any]) -> None:
    connection.execute("DELETE FROM procrastinate_workers")
    job = add_stalled_job(connection)

    text = succeed("sweep", database=database)

    assert text == (
        "1 jobs in doing: 0 retried, 0 failed, 0 aborted, 1 held (no living worker), 0 left for a later sweep.\n"
    )
    assert get_job(connection, job)["status"] == "doing"


def test_sweep_prints_the_row_that_it_wrote(database: str, connection: psycopg.Connection[Any]) -> None:
    add_stalled_job(connection)
    succeed("sweep", database=database)
    add_stalled_job(connection)
    add_stalled_job(connection)

    row = rows_of("sweep", database=database)

    (last,) = rows(connection, "SELECT * FROM procrastinate_stalled.sweeps ORDER BY id DESC LIMIT 1")
    assert list(row) == list(last)
    assert (row["id"], row["doing"], row["retried"]) == (last["id"], 2, 2)
    assert row["duration"] == last["duration"].total_seconds()


def test_a_sweep_that_recorded_an_error_exits_1(database: str, connection: psycopg.Connection[Any]) -> None:
    good = add_stalled_job(connection)
    bad = add_stalled_job(connection, task_name="bad")
    connection.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'this job cannot be changed';
        END;
        $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON procrastinate_jobs
            FOR EACH ROW WHEN (OLD.task_name = 'bad') EXECUTE FUNCTION refuse();
        """
    )

    done = run("sweep", database=database)

    assert done.returncode == WARNING
    assert "1 retried" in done.stdout
    assert f"job {bad}: this job cannot be changed" in done.stderr
    assert get_job(connection, good)["status"] == "todo"


def test_a_dry_run_of_sweep_lists_what_would_be_done_and_changes_nothing(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    assert succeed("sweep", "--dry-run", database=database) == "No stalled jobs to rescue.\n"
    job = add_stalled_job(connection)

    text = succeed("sweep", "--dry-run", database=database)
    (row,) = rows_of("sweep", "--dry-run", database=database)

    assert re.search(rf"^ *{job} .*retried", text, re.MULTILINE)
    assert (row["id"], row["job_id"], row["action"]) == (None, job, "retried")
    assert get_job(connection, job)["status"] == "doing"
    assert rows(connection, "SELECT * FROM procrastinate_stalled.sweeps") == []


def test_sweep_shows_a_progress_bar_on_a_terminal_and_keeps_stdout_clean(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    jobs = [add_stalled_job(connection) for _ in range(3)]
    # The second job makes the sweep wait for long enough to see the bar.
    connection.execute(
        f"""
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_sleep(1);
            RETURN NEW;
        END;
        $$;
        CREATE TRIGGER wait BEFORE UPDATE ON procrastinate_jobs
            FOR EACH ROW WHEN (OLD.id = {jobs[1]}) EXECUTE FUNCTION wait();
        """
    )
    ours, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "procrastinate_stalled", "sweep", "--json"],
        env=environment(DATABASE_URL=database, TERM="xterm"),
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the other end was closed
        pass
    os.close(ours)
    stdout, _stderr = process.communicate()

    assert process.returncode == OK
    assert json.loads(stdout)["retried"] == 3
    assert "Rescuing stalled jobs" in shown.decode()
    assert "0/3" in shown.decode()


def test_ctrl_c_ends_a_sweep_that_waits(database: str, connection: psycopg.Connection[Any], connect: Connect) -> None:
    locking = connect(autocommit=False)
    locking.execute("LOCK TABLE procrastinate_stalled.rules IN ACCESS EXCLUSIVE MODE")
    process = subprocess.Popen(
        [sys.executable, "-m", "procrastinate_stalled", "list"],
        env=environment(DATABASE_URL=database),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(
        lambda: rows(connection, "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"), "the command waits"
    )
    process.send_signal(signal.SIGINT)
    _stdout, stderr = process.communicate(timeout=10)

    assert process.returncode == INTERRUPTED
    assert "Traceback" not in stderr


def test_retry_puts_a_job_back_as_it_is_told(database: str, connection: psycopg.Connection[Any]) -> None:
    job = add_job(connection, worker_id=add_worker(connection))

    text = succeed(
        *("retry", str(job), "--at", "2100-01-02T03:04+01:00"),
        *("--priority", "-3", "--queue", "slow", "--lock", "new lock"),
        database=database,
    )

    assert text == f"Job {job} (task): retried.\n"
    row = get_job(connection, job)
    assert row["scheduled_at"] == datetime.fromisoformat("2100-01-02T03:04+01:00")
    assert (row["status"], row["priority"], row["queue_name"], row["lock"]) == ("todo", -3, "slow", "new lock")


def test_retry_takes_a_time_without_an_offset_as_local_time(database: str, connection: psycopg.Connection[Any]) -> None:
    job = add_job(connection)

    done = run("retry", str(job), "--at", "2100-01-02T03:04", "--json", database=database, TZ="Asia/Tokyo")

    assert done.returncode == OK
    scheduled_at = get_job(connection, job)["scheduled_at"]
    assert scheduled_at == datetime.fromisoformat("2100-01-02T03:04+09:00")
    rescue = json.loads(done.stdout)
    assert (rescue["job_id"], rescue["reason"]) == (job, "manual")
    assert datetime.fromisoformat(rescue["scheduled_at"]) == scheduled_at


def test_the_ledger_names_the_command_line(database: str, connection: psycopg.Connection[Any]) -> None:
    job = add_job(connection)

    assert rows_of("retry", str(job), database=database)["rescued_by"] == "postgres (procrastinate-stalled)"


def test_retry_explains_why_it_cannot(database: str, connection: psycopg.Connection[Any]) -> None:
    waiting = add_job(connection, "todo")

    expect_error(run("retry", "4242", database=database), "there is no job 4242", hint="running jobs")
    expect_error(
        run("retry", str(waiting), database=database), f"job {waiting} is not in doing", hint="a worker will fetch it"
    )


@pytest.mark.parametrize(("command", "may"), [("grant-monitor", "look"), ("grant-operator", "look and retry")])
def test_a_grant_says_what_the_role_may(command: str, may: str, server: Server, database: str) -> None:
    with psycopg.connect(server.conninfo(), autocommit=True) as superuser:
        superuser.execute('CREATE ROLE "On call" LOGIN')
    try:
        assert succeed(command, "On call", database=database) == f"Granted: role On call may {may}.\n"

        assert succeed("list", database=make_conninfo(database, user="On call")) == "No stalled jobs.\n"
        expect_error(run(command, "on call", database=database), "there is no role", hint="Name one role")
    finally:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute('DROP OWNED BY "On call"; DROP ROLE "On call"')


def test_pause_and_resume_say_what_they_did(database: str, connection: psycopg.Connection[Any]) -> None:
    job = add_stalled_job(connection, queue_name="emails", task_name="billing.send")
    options = ("--queue", "emails", "--task-name", "billing.%")

    paused = succeed("pause", "2 days 3 hours", *options, "--reason", "the network", database=database)

    (rule,) = rows(connection, "SELECT * FROM procrastinate_stalled.rules WHERE action = 'ignore'")
    assert paused == f"Paused until {rule['expires_at']:%Y-%m-%d %H:%M:%S}. Jobs: queue emails, task billing.%.\n"
    left = rule["expires_at"] - datetime.now(UTC)
    assert timedelta(days=2, hours=2, minutes=59) < left < timedelta(days=2, hours=3)
    assert rule["note"] == "the network"
    assert succeed("list", database=database) == "No stalled jobs.\n"
    assert rows_of("explain", str(job), database=database)["verdict"] == "held"

    assert succeed("resume", *options, database=database) == "Resumed.\n"
    assert succeed("resume", *options, database=database) == "Not paused, nothing to do.\n"
    assert [row["id"] for row in rows_of("list", database=database)] == [job]


def test_pause_without_arguments_holds_everything_for_an_hour(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    text = succeed("pause", database=database)

    (rule,) = rows(connection, "SELECT * FROM procrastinate_stalled.rules WHERE action = 'ignore'")
    assert (rule["queue_name"], rule["task_name"], rule["note"]) == (None, None, None)
    assert timedelta(minutes=59) < rule["expires_at"] - datetime.now(UTC) < timedelta(hours=1)
    assert text.endswith("Jobs: all.\n")


def test_resume_says_which_other_pauses_remain(database: str) -> None:
    succeed("pause", database=database)
    succeed("pause", "--queue", "emails", database=database)

    done = run("resume", database=database, TZ="Asia/Kathmandu")

    assert (done.returncode, done.stdout) == (OK, "Resumed.\n")
    assert re.search(r"^Warning: .*other pauses", done.stderr)
    assert re.search(r"'emails'.*\+05:45$", done.stderr, re.MULTILINE)


def test_pause_explains_a_duration_that_it_does_not_understand(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    expect_error(
        run("pause", "--", "-1 hour", database=database), "duration must be longer than 0", hint="Nothing was changed"
    )
    for duration in ("soon", "1000000000000 years"):
        done = run("pause", duration, database=database)
        assert done.returncode == FAILED
        first, last = done.stderr.splitlines()
        assert re.fullmatch(f'Error: .*"{duration}"', first)
        assert last.startswith("Hint: Write a duration as PostgreSQL does")
    assert [rule["name"] for rule in rows(connection, "SELECT * FROM procrastinate_stalled.rules")] == ["default"]


def test_schedule_and_unschedule_say_what_they_did(cron_database: str) -> None:
    scheduled = succeed("schedule", database=cron_database)
    changed = succeed("schedule", "*/5 * * * *", database=cron_database)
    unscheduled = succeed("unschedule", database=cron_database)
    again = succeed("unschedule", database=cron_database)

    assert re.fullmatch(r"Scheduled: pg_cron job \d+ runs at '\* \* \* \* \*'\.\n", scheduled)
    assert re.fullmatch(r"Scheduled: pg_cron job \d+ runs at '\*/5 \* \* \* \*'\.\n", changed)
    assert (unscheduled, again) == ("Unscheduled.\n", "Not scheduled, nothing to do.\n")


def test_schedule_explains_a_schedule_that_pg_cron_does_not_understand(cron_database: str) -> None:
    expect_error(
        run("schedule", "now and then", database=cron_database),
        "pg_cron does not understand the schedule",
        hint="Five fields",
    )


def test_schedule_explains_that_there_is_no_pg_cron(database: str) -> None:
    expect_error(
        run("schedule", database=database), "pg_cron is not installed in database", hint="procrastinate-stalled sweep"
    )


def test_schedule_prints_the_statement_for_the_other_database_where_pg_cron_lives(
    cron_server: Server, other_database_on_cron_server: str
) -> None:
    done = run("schedule", database=other_database_on_cron_server)

    expect_error(done, "pg_cron is not in database", hint="EXECUTE on this function: SELECT cron.schedule_in_database(")
    statement = re.search(r"SELECT cron\.schedule_in_database\(.*?\);", done.stderr)
    assert statement is not None
    with psycopg.connect(cron_server.conninfo("cron")) as connection:
        connection.execute(statement.group().encode())
        scheduled = rows(connection, "SELECT database, command, active FROM cron.job")
        connection.rollback()
    assert scheduled == [
        {
            "database": conninfo_to_dict(other_database_on_cron_server)["dbname"],
            "command": "CALL procrastinate_stalled.sweep()",
            "active": True,
        }
    ]


def test_status_exits_with_the_worst_level(cron_database: str) -> None:
    def levels(done: Run) -> dict[str, str]:
        return {check["name"]: check["level"] for check in json.loads(done.stdout)}

    with psycopg.connect(cron_database, autocommit=True) as connection:
        unscheduled = run("status", "--json", database=cron_database)
        assert unscheduled.returncode == WARNING
        assert levels(unscheduled)["schedule"] == "warning"

        add_worker(connection)
        succeed("schedule", database=cron_database)
        succeed("sweep", database=cron_database)
        # As if pg_cron had run it already.
        connection.execute(
            """
            INSERT INTO cron.job_run_details (jobid, runid, status, start_time, end_time)
                SELECT jobid, 1, 'succeeded', now(), now() FROM cron.job
            """
        )
        healthy = run("status", "--json", database=cron_database)
        assert set(levels(healthy).values()) == {"ok"}
        assert healthy.returncode == OK

        connection.execute("UPDATE cron.job SET active = false")
        inactive = run("status", "--json", database=cron_database)
        assert inactive.returncode == ERROR
        assert levels(inactive)["schedule"] == "error"


def test_a_monitor_is_told_that_all_is_well_while_somebody_sweeps(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("CREATE ROLE monitor LOGIN")
    try:
        succeed("grant-monitor", "monitor", database=database)
        for expected in (WARNING, OK):
            succeed("sweep", database=database)
            assert run("status", database=make_conninfo(database, user="monitor")).returncode == expected
    finally:
        connection.execute("DROP OWNED BY monitor; DROP ROLE monitor")


def test_status_shows_each_check_with_its_remedy_to_people(database: str, connection: psycopg.Connection[Any]) -> None:
    connection.execute("DELETE FROM procrastinate_workers")

    done = run("status", database=database)

    assert (done.returncode, done.stderr) == (WARNING, "")
    assert re.search(r"^procrastinate +ok +schema public", done.stdout, re.MULTILINE)
    assert re.search(r"^workers +warning +0 alive", done.stdout, re.MULTILINE)
    assert "Start a worker" in done.stdout
    assert re.search(rf"^package +ok +version {re.escape(__version__)}", done.stdout, re.MULTILINE)
    table, *hints = done.stdout.split("\n\n")
    assert max(map(len, table.splitlines())) <= 80
    # A statement to paste is not broken into lines.
    assert [hint.partition(": ")[0] for hint in hints] == ["schedule", "last_sweep", "workers"]
    assert "\n" not in hints[0]


def test_set_procrastinate_schema_follows_a_schema_that_was_renamed(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    connection.execute('ALTER SCHEMA public RENAME TO "of the App"')
    expect_error(
        run("list", database=database),
        "there is no Procrastinate 3.1 or later in schema public",
        hint="set_procrastinate_schema('of the App')",
    )
    expect_error(
        run("set-procrastinate-schema", "of the app", database=database),
        'schema "of the app" has no Procrastinate',
        hint="Nothing was changed",
    )

    expect_error(
        run("set-procrastinate-schema", "procrastinate_stalled", database=database),
        'schema "procrastinate_stalled" has no Procrastinate',
        hint="Nothing was changed",
    )

    said = succeed("set-procrastinate-schema", "of the App", database=database)

    assert said == "Procrastinate is looked for in schema of the App.\n"
    assert succeed("list", database=database) == "No stalled jobs.\n"


@pytest.mark.parametrize("duration", ["90", "5.5", "-1"])
def test_a_duration_without_a_unit_is_refused(
    database: str, connection: psycopg.Connection[Any], duration: str
) -> None:
    for command in (("pause", "--", duration), ("rules", "change", "default", f"--heartbeat-timeout={duration}")):
        done = run(*command, database=database)
        assert done.returncode == FAILED
        # In a box of rich's
        assert "has no unit" in done.stderr
    assert connection.execute("SELECT name FROM procrastinate_stalled.rules").fetchall() == [("default",)]


def test_an_expired_rule_is_shown_as_such(database: str, connection: psycopg.Connection[Any]) -> None:
    add_rule(connection, "old", expires_at="yesterday")
    assert "old (expired 2" in run("rules", database=database).stdout


def test_an_argument_that_is_no_text_is_refused(database: str) -> None:
    done = run("pause", "--reason", "\udcff", database=database)
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr.startswith("Error: an argument is not valid UTF-8")


def test_a_time_that_python_cannot_show_is_told_as_what_it_is(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("UPDATE procrastinate_workers SET last_heartbeat = '-infinity'")
    done = run("workers", database=database)
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr.startswith("Error: what the database answered cannot be shown")


@pytest.mark.parametrize("json_text", ['{"a": 1e5000}', '{"a": ' * 3000 + "1" + "}" * 3000], ids=["long", "deep"])
def test_args_that_python_cannot_read_are_told_as_what_they_are(
    database: str, connection: psycopg.Connection[Any], json_text: str
) -> None:
    job = add_stalled_job(connection)
    connection.execute("UPDATE procrastinate_jobs SET args = %s::jsonb WHERE id = %s", [json_text, job])
    done = run("list", database=database)
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr.startswith("Error: what the database answered cannot be shown")


def test_the_name_of_a_task_cannot_write_to_the_terminal(database: str, connection: psycopg.Connection[Any]) -> None:
    add_stalled_job(connection, task_name="a\x1b[31m\u202eb")
    assert "a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}b" in run("list", database=database).stdout


def test_status_warns_when_package_and_database_have_different_versions(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    connection.execute(
        """
        CREATE OR REPLACE FUNCTION procrastinate_stalled.version() RETURNS text
            LANGUAGE sql AS 'SELECT ''99.0''::text'
        """
    )

    checks = json.loads(run("status", "--json", database=database).stdout)

    (package,) = [check for check in checks if check["name"] == "package"]
    assert package["level"] == "warning"
    assert "99.0" in package["detail"]
    assert "procrastinate-stalled install" in package["hint"]


def test_rules_are_shown_in_the_order_in_which_they_are_tried(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    add_rule(
        connection,
        "big",
        position=5,
        queue_name="emails",
        task_name="send%",
        args={"a": 1},
        run_timeout="1 hour",
        max_rescues=None,
        retry_delay="30 seconds",
        retry_queue_name="slow",
        retry_priority=-1,
    )
    add_rule(connection, "off", position=6, enabled=False, action="ignore", heartbeat_timeout=None)

    shown = rows_of("rules", database=database)
    text = " ".join(succeed("rules", database=database).split())

    assert [rule["name"] for rule in shown] == ["big", "off", "default"]
    assert list(shown[0]) == list(rows(connection, "SELECT * FROM procrastinate_stalled.rules")[0])
    assert (shown[0]["heartbeat_timeout"], shown[0]["run_timeout"], shown[0]["args"]) == (300, 3600, {"a": 1})
    assert text.index("big") < text.index("off") < text.index("default")
    assert max(map(len, succeed("rules", database=database).splitlines())) <= 80
    wide = run("rules", database=database, COLUMNS="300").stdout
    assert re.search(
        r'5 +big +queue emails, task send%, args \{"a": 1\} +5 min of silence, 1 h of running '
        r"+retry, after 30 s \(then times 2\), in queue slow, with priority -1",
        wide,
    )
    assert re.search(r"6 +off \(disabled\) +all +never +ignore", wide)
    assert re.search(r"2147483647 +default +all +5 min of silence +retry 3 times", wide)


def test_a_rule_is_added_changed_and_removed(database: str, connection: psycopg.Connection[Any]) -> None:
    def rule() -> dict[str, Any]:
        (row,) = rows(connection, "SELECT * FROM procrastinate_stalled.rules WHERE name = 'charge once'")
        return row

    added = succeed("rules", "add", "charge once", "--task-name", "billing.%", "--action", "fail", database=database)

    (defaults,) = rows(connection, "INSERT INTO procrastinate_stalled.rules (name) VALUES ('defaults') RETURNING *")
    assert rule() == defaults | {"name": "charge once", "task_name": "billing.%", "action": "fail"}
    assert added.startswith("Added rule charge once.\n\n")
    assert re.search(r"^100 +charge once +task billing\.% +5 min of silence +fail$", added, re.MULTILINE)

    changed = succeed(
        *("rules", "change", "charge once", "--heartbeat-timeout", "1 h 30 min", "--action", "retry"), database=database
    )

    assert rule() == defaults | {
        "name": "charge once",
        "task_name": "billing.%",
        "heartbeat_timeout": timedelta(minutes=90),
    }
    assert changed.startswith("Changed rule charge once.\n\n")
    assert re.search(
        r"^100 +charge once +task billing\.% +1 h 30 min of silence +retry 3 times$", changed, re.MULTILINE
    )

    assert succeed("rules", "remove", "charge once", database=database) == "Removed rule charge once.\n"
    assert [row["name"] for row in rows_of("rules", database=database)] == ["defaults", "default"]


def test_every_column_of_a_rule_can_be_set_and_changed_and_made_null_where_the_table_allows_it(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    values = {
        "position": "7",
        "enabled": "false",
        "expires_at": "2100-01-02T03:04:05+01:00",
        "queue_name": "emails",
        "task_name": "billing.%",
        "args": '{"to": ["a", 1, null]}',
        "heartbeat_timeout": "1 day 2 hours",
        "run_timeout": "3 days",
        "action": "fail",
        "max_rescues": "9",
        "retry_delay": "30 seconds",
        "retry_backoff": "1.5",
        "retry_queue_name": "slow",
        "retry_priority": "-3",
        "on_duplicate": "wait",
        "note": "a note",
    }
    nullable = {
        row["column_name"]: row["is_nullable"] == "YES"
        for row in rows(
            connection,
            """
            SELECT column_name, is_nullable FROM information_schema.columns
                WHERE table_schema = 'procrastinate_stalled' AND table_name = 'rules'
            """,
        )
    }
    assert {"name", *values} == set(nullable)

    def rule(name: str) -> dict[str, Any]:
        (row,) = rows(connection, "SELECT * FROM procrastinate_stalled.rules WHERE name = %s", name)
        return {column: value for column, value in row.items() if column != "name"}

    def options(values: dict[str, str]) -> list[str]:
        return [f"--{column.replace('_', '-')}={value}" for column, value in values.items()]

    insert(connection, "rules", name="by SQL", **values)
    succeed("rules", "add", "added", *options(values), database=database)
    succeed("rules", "change", "default", *options(values), database=database)
    assert rule("added") == rule("default") == rule("by SQL")

    nulls = {column: "none" for column in values if nullable[column]}
    succeed("rules", "change", "default", *options(nulls), database=database)
    assert {column for column, value in rule("default").items() if value is None} == set(nulls)

    for column in set(values) - set(nulls):
        expect_error(
            run("rules", "change", "default", *options({column: "none"}), database=database),
            f"refuses {column} none",
            hint=f"{column}: ",
        )


def test_the_time_at_which_a_rule_expires_is_local_time(database: str, connection: psycopg.Connection[Any]) -> None:
    done = run("rules", "add", "new", "--expires-at", "2100-01-02T03:04", database=database, TZ="Asia/Tokyo")

    assert done.returncode == OK
    (rule,) = rows(connection, "SELECT * FROM procrastinate_stalled.rules WHERE name = 'new'")
    assert rule["expires_at"] == datetime.fromisoformat("2100-01-02T03:04+09:00")


@pytest.mark.parametrize(
    ("option", "value", "reason", "allowed"),
    [
        ("--heartbeat-timeout", "11 years", "rules_heartbeat_timeout_in_range", "Longer than 0, at most 10 years."),
        ("--retry-backoff", "0.5", "rules_retry_backoff_in_range", "From 1 to 1000."),
        ("--action", "explode", "rules_action_known", "retry: back to todo."),
        ("--task-name", "x\\", "rules_task_name_is_a_like_pattern", "LIKE this pattern"),
        ("--args", "[1]", "rules_args_is_an_object", "this JSON object"),
        ("--args", "{", "type json", "this JSON object"),
        ("--max-rescues", "many", "type integer", "After so many retries"),
        ("--position", "3000000000", "out of range for type integer", "lowest first"),
        ("--enabled", "perhaps", "type boolean", "A rule that is not enabled"),
    ],
)
@pytest.mark.parametrize("command", [["add", "new"], ["change", "default"]], ids=lambda command: command[0])
def test_a_value_that_the_table_refuses_is_explained_by_its_comment(
    command: list[str],
    option: str,
    value: str,
    reason: str,
    allowed: str,
    database: str,
    connection: psycopg.Connection[Any],
) -> None:
    column = option.removeprefix("--").replace("-", "_")
    before = contents(connection)

    done = run("rules", *command, "--note", "a note", f"{option}={value}", database=database)

    expect_error(done, f"refuses {column} {value!r}", hint=f"{column}: ")
    assert reason in done.stderr.splitlines()[1]
    assert allowed in done.stderr.splitlines()[-1]
    assert contents(connection) == before


def test_a_duration_that_cannot_be_read_is_explained_with_an_example(database: str) -> None:
    done = run("rules", "change", "default", "--run-timeout", "soon", database=database)

    assert (done.returncode, done.stdout) == (FAILED, "")
    error, reason, hint, example = done.stderr.splitlines()
    assert error == "Error: the table of rules refuses run_timeout 'soon'"
    assert 'type interval: "soon"' in reason
    assert hint.startswith("Hint: run_timeout: ")
    assert "90 seconds" in example


def test_a_check_of_several_columns_is_explained_by_all_of_them(database: str) -> None:
    done = run("rules", "add", "new", "--position", "-2147483648", "--action", "fail", database=database)

    assert (done.returncode, done.stdout) == (FAILED, "")
    error, _reason, *hint = done.stderr.splitlines()
    assert error == "Error: the table of rules refuses position '-2147483648' with action 'fail'"
    assert [re.sub(r"^Hint: ", "", line).split(":")[0] for line in hint] == ["position", "expires_at", "action"]


def test_a_rule_needs_a_name_of_its_own(database: str) -> None:
    expect_error(run("rules", "add", "", database=database), "refuses name ''", hint="Unique name")
    expect_error(
        run("rules", "add", "default", database=database), "there is already a rule default", hint="rules change"
    )


@pytest.mark.parametrize("command", [["change", "nonsense", "--note", "x"], ["remove", "nonsense"]], ids=" ".join)
def test_a_rule_that_is_not_there_is_an_error_that_names_those_that_are(
    command: list[str], database: str, connection: psycopg.Connection[Any]
) -> None:
    add_rule(connection, "billing")

    done = run("rules", *command, database=database)

    expect_error(done, "there is no rule nonsense", hint="procrastinate-stalled rules add")
    assert done.stderr.splitlines()[1] == "The rules are: billing, default."
    connection.execute("DELETE FROM procrastinate_stalled.rules")
    assert "There are no rules." in run("rules", *command, database=database).stderr


def test_changing_nothing_is_wrong_usage(database: str) -> None:
    done = run("rules", "change", "default", database=database)

    assert (done.returncode, done.stdout) == (FAILED, "")
    assert "nothing to change" in done.stderr


def test_rules_says_that_there_are_none(database: str, connection: psycopg.Connection[Any]) -> None:
    connection.execute("DELETE FROM procrastinate_stalled.rules")

    assert "No rules" in succeed("rules", database=database)


NEEDING_THE_SCHEMA = [
    *(["list"], ["explain", "1"], ["workers"], ["runtimes"], ["sweep"], ["sweep", "--dry-run"], ["retry", "1"]),
    *(["pause"], ["resume"], ["schedule"], ["status"], ["rules"], ["rules", "add", "new"]),
    *(["rules", "change", "default", "--note", "new"], ["rules", "remove", "default"]),
    ["set-procrastinate-schema", "public"],
]


@pytest.mark.parametrize("command", NEEDING_THE_SCHEMA, ids=" ".join)
def test_where_it_is_not_installed_each_command_says_how_to(command: list[str], procrastinate_database: str) -> None:
    expect_error(
        run(*command, database=procrastinate_database),
        "procrastinate_stalled is not installed in this database",
        hint="procrastinate-stalled install",
    )


def test_unschedule_names_the_command_that_works_without_the_schema(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("DROP SCHEMA procrastinate_stalled CASCADE")

    expect_error(
        run("unschedule", database=database),
        "procrastinate_stalled is not installed in this database",
        hint="To remove a job that is left: procrastinate-stalled uninstall",
    )


def test_an_older_schema_is_an_error_that_says_how_to_upgrade(
    database: str, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("DROP FUNCTION procrastinate_stalled.unschedule()")

    expect_error(run("unschedule", database=database), "or in another version", hint="procrastinate-stalled install")


@pytest.mark.parametrize("command", [["install"], ["uninstall"], *NEEDING_THE_SCHEMA], ids=" ".join)
def test_a_wrong_address_is_explained(command: list[str], server: Server) -> None:
    expect_error(
        run(*command, database=server.conninfo("nowhere")), "no connection to the database", hint="--database-url"
    )


def test_an_address_that_libpq_does_not_understand_is_explained_without_its_password() -> None:
    done = run("status", database="postgresql+psycopg://app:sec@ret@db.example.com/app")

    expect_error(done, "no connection to the database", hint="postgresql://user@host/database")
    assert "sec" not in done.stderr
    assert "ret" not in done.stderr


@pytest.mark.parametrize(
    ("address", "detail"),
    [
        ("postgresql://app:sec%zzret@127.0.0.1:1/app", 'invalid percent-encoded token: "***"'),
        ('postgresql://app:sec%"ret@127.0.0.1:1/app', 'invalid percent-encoded token: "***"'),
        ("postgresql://app:sec%00ret@127.0.0.1:1/app", 'forbidden value %00 in percent-encoded value: "***"'),
        ("postgresql://127.0.0.1:1/app?password=sec%zzret", 'invalid percent-encoded token: "***"'),
        ("postgresql://app:sec ret@127.0.0.1:1/app", 'unexpected spaces found in "***"'),
        ("postgresql://app:sec@ret@127.0.0.1:1/app", "'***@127.0.0.1'"),
    ],
)
def test_a_password_that_is_not_encoded_is_not_printed_and_the_hint_says_how_to_write_it(
    address: str, detail: str
) -> None:
    done = run("-d", address, "status")

    expect_error(done, "no connection to the database", hint="encode % as %25")
    assert detail in done.stderr
    assert "sec" not in done.stderr
    assert "ret" not in done.stderr


@pytest.mark.parametrize(
    "address",
    [
        "postgresql+psycopg://app:sec ret@127.0.0.1:1/app",
        "dbname=postgresql+psycopg://app:sec@ret@127.0.0.1:1/app host=127.0.0.1 port=1",
        "postgresql://app:secret@[::1/app",
        "postgresql://app:secret@[::1]x/app",
        "postgresql://127.0.0.1:1/app?password=sec&ret",
        "host=127.0.0.1 port=1 password=sec ret",
        "host=127.0.0.1 port=1 password=sec ret=1",
    ],
)
def test_nothing_is_printed_of_an_address_that_may_be_of_the_password(address: str, database: str) -> None:
    for done in (
        run("-d", address, "status"),
        run("-d", address, "install"),
        run("unschedule", "--cron-database", address, database=database),
    ):
        expect_error(done, "no connection to the database", hint="postgresql://")
        assert "sec" not in done.stderr
        assert "ret" not in done.stderr


def test_the_address_comes_from_the_option_before_the_variable(database: str) -> None:
    assert (
        succeed("--database-url", database, "list", database="host=nowhere.invalid")
        == succeed("-d", database, "list", database="host=nowhere.invalid")
        == "No stalled jobs.\n"
    )


def test_without_an_address_the_variables_of_libpq_apply(database: str) -> None:
    address = conninfo_to_dict(database)
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}

    done = run("list", **{names[key]: str(value) for key, value in address.items()})

    assert (done.returncode, done.stdout) == (OK, "No stalled jobs.\n")


def test_an_install_that_is_refused_shows_the_three_parts_of_the_error(empty_database: str) -> None:
    expect_error(
        run("install", database=empty_database),
        "Procrastinate is not installed in database",
        hint="Connect to the database of your Procrastinate app",
    )


def test_a_role_without_rights_is_told_whom_to_ask_for_what(server: Server, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE ROLE stranger LOGIN")
    try:
        done = run("list", database=make_conninfo(database, user="stranger"))
    finally:
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            connection.execute("DROP ROLE stranger")

    assert done.returncode == FAILED
    error, hint = done.stderr.splitlines()
    assert error == "Error: permission denied for schema procrastinate_stalled"
    assert hint == (
        "Hint: Ask the owner of schema procrastinate_stalled: procrastinate-stalled grant-monitor ROLE to look, "
        "procrastinate-stalled grant-operator ROLE to retry too. Who may do the rest, and install: docs/privileges.md"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        *(["list", "--nonsense"], ["nonsense"], ["retry"], ["retry", "x"], ["retry", "1", "--at", "soon"]),
        *(["explain"], ["explain", "x"], ["workers", "x"], ["runtimes", "--since", "soon"]),
        *(["rules", "nonsense"], ["rules", "--json", "remove", "default"]),
        *(["rules", "add"], ["rules", "add", "new", "--expires-at", "soon"], ["rules", "add", "new", "--name", "x"]),
        *(["rules", "change"], ["rules", "change", "default"], ["rules", "remove"]),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_3_and_points_to_the_help(arguments: list[str]) -> None:
    done = run(*arguments)

    assert (done.returncode, done.stdout) == (FAILED, "")
    assert "Usage: procrastinate-stalled" in done.stderr
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_values_are_explained_by_the_database(database: str) -> None:
    expect_error(run("list", "--nb-seconds", "-1", database=database), "nb_seconds must be a positive", hint="above 0")


def test_the_help_lists_every_command() -> None:
    done, rules = run("--help"), run("rules", "--help")

    assert (done.returncode, done.stderr) == (OK, "")
    for command in COMMANDS:
        name = command.split()[-1]
        assert re.search(rf"^│ {name} ", done.stdout if name == command else rules.stdout, re.MULTILINE)
    assert "DATABASE_URL" in done.stdout
    assert "Exit codes" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_help(command: str) -> None:
    done = run(*command.split(), "--help")

    assert (done.returncode, done.stderr) == (OK, "")
    assert f"Usage: procrastinate-stalled {command}" in done.stdout


def test_the_help_loads_no_driver() -> None:
    script = (
        "import sys; sys.argv = ['procrastinate-stalled', '--help']\n"
        "from procrastinate_stalled.cli import main\n"
        "try: main()\nfinally: print('psycopg' in sys.modules, 'yoyo' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)

    assert done.stderr == "False False\n"


def test_the_installed_command_is_the_same_program() -> None:
    command = Path(sys.executable).with_name("procrastinate-stalled")

    done = subprocess.run([command, "--help"], env=environment(), capture_output=True, text=True, check=True)

    assert done.stdout == run("--help").stdout
