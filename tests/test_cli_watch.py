"""The live table of ``list --watch``, on a real terminal."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from threading import Thread
from typing import Any

import psycopg
import pytest
from psycopg import sql

from procrastinate_stalled import Stalled, install, uninstall
from tests.conftest import Connect, RunWorker
from tests.jobs import add_job, add_rule, add_stalled_job, add_worker, rows
from tests.server import Server, database_name
from tests.tasks import open_app, sleep
from tests.test_cli import FAILED, INTERRUPTED, TERMINATED, environment, run
from tests.wait import wait_until

ALTERNATE_SCREEN, NORMAL_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
CURSOR = "\x1b[?25h"
RED, GREEN, YELLOW = 31, 32, 33


class Terminal:
    """A terminal in which ``list --watch`` runs."""

    def __init__(self, database: str, *options: str, lines: int = 20) -> None:
        self._bytes = b""
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "procrastinate_stalled", "list", "--watch", *options],
            env=environment(DATABASE_URL=database, TERM="xterm", COLUMNS="160", LINES=str(lines)),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        self._reader = Thread(target=self._read, args=[ours])
        self._reader.start()

    def _read(self, ours: int) -> None:
        with os.fdopen(ours, "rb", buffering=0) as terminal:
            try:
                while chunk := terminal.read(65536):
                    self._bytes += chunk
            except OSError:  # the other end was closed
                pass

    @property
    def written(self) -> str:
        """All that it was sent."""
        return self._bytes.decode(errors="ignore")  # the last character may be half written

    @property
    def picture(self) -> str:
        """What it showed last, with its colours."""
        # Each picture starts at the upper left corner; the last one may be half written.
        pictures = self.written.split("\x1b[H")
        return pictures[-2] if len(pictures) > 2 else ""

    @property
    def text(self) -> str:
        """What it showed last, without colours."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.picture)

    def line(self, job: int) -> str:
        """The line of a job, or nothing."""
        return next((line for line in self.text.splitlines() if re.match(rf"{job}\b", line)), "")

    def seconds_left(self, job: int) -> int | None:
        """The seconds until the job counts as stalled, as the terminal shows them."""
        left = re.search(r" in (?:(\d+) min ?)?(?:(\d+) s)?", self.line(job))
        return int(left[1] or 0) * 60 + int(left[2] or 0) if left else None

    def end(self, signal_number: int) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(signal_number)
        return self.wait()

    def wait(self) -> int:
        """Wait until it has ended and return its exit code."""
        code = self.process.wait(timeout=10)
        self._reader.join()
        return code


Watch = Callable[..., Terminal]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Starts the live table: `watch(database, "--queue", "emails", lines=10)`; returns once it shows something."""
    terminals = []

    def watch(database: str, *options: str, **size: int) -> Terminal:
        terminal = Terminal(database, *options, **size)
        terminals.append(terminal)
        wait_until(lambda: terminal.text or terminal.process.poll() is not None, "the table is shown")
        return terminal

    yield watch
    for terminal in terminals:
        if terminal.process.poll() is None:
            terminal.end(signal.SIGKILL)
        print(terminal.text or terminal.written)


@pytest.fixture
def young_database(procrastinate_database: str) -> str:
    """The address of a database whose server is as young as it is, for tests with real time."""
    install(procrastinate_database)
    with psycopg.connect(procrastinate_database) as connection:
        connection.execute("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '6 seconds'")
    return procrastinate_database


def test_it_counts_down_from_the_last_heartbeat_of_a_killed_worker_until_its_job_is_stalled(
    young_database: str, run_worker: RunWorker, watch: Watch
) -> None:
    run_worker(young_database, queues=["none"], update_heartbeat_interval=0.5)
    killed = run_worker(young_database, update_heartbeat_interval=0.5)
    with open_app(young_database), psycopg.connect(young_database, autocommit=True) as connection:
        job = sleep.defer(seconds=60)
        terminal = watch(young_database)
        wait_until(lambda: (terminal.seconds_left(job) or 0) >= 5, "the job is shown with the whole timeout left")
        assert f"\x1b[{GREEN}mrunning" in terminal.picture

        killed.kill()
        left: list[int] = []
        while "ago" not in terminal.line(job):
            seconds = terminal.seconds_left(job)
            if seconds is not None and left[-1:] != [seconds]:
                left.append(seconds)
            time.sleep(0.02)
        shown_at = datetime.now(UTC)
        explained = Stalled(connection).explain_job(job)

    *_, fourth, third, second, first = left
    assert 6 >= fourth > third > second > first
    assert first <= 2
    assert explained.stalled_at is not None
    assert timedelta() <= shown_at - explained.stalled_at < timedelta(seconds=3)
    wait_until(lambda: f"\x1b[{RED}mstalled" in terminal.picture, "the verdict is shown in red", seconds=5)
    assert "1 stalled" in terminal.text


def test_it_shows_every_running_job_the_next_to_be_stalled_first(
    database: str, connection: psycopg.Connection[Any], watch: Watch
) -> None:
    add_rule(connection, "left alone", position=1, task_name="ignored", action="ignore")
    add_rule(connection, "patient", position=2, task_name="slow", heartbeat_timeout="1 hour")
    ignored = add_job(connection, task_name="ignored", worker_id=add_worker(connection))
    slow = add_stalled_job(connection, 70, task_name="slow", started_ago=95)
    stalled = add_stalled_job(connection, 400, task_name="[bold]send")
    add_job(connection, "todo")

    terminal = watch(database)

    ids = re.findall(r"^(\d+) +default", terminal.text, re.MULTILINE)
    assert ids == [str(stalled), str(slow), str(ignored)]
    assert re.search(r"3 in doing: 1 ignored, 1 running, 1 stalled", terminal.text)
    assert re.search(r"\[bold\]send +\S+ s +stalled +1 min 4\d s ago +retry", terminal.line(stalled))
    assert re.search(r"slow +1 min \d+ s +running +in 58 min \d+ s +retry", terminal.line(slow))
    assert re.search(r"ignored +\S+ s +ignored +never +ignore", terminal.line(ignored))


def test_a_held_job_is_shown_in_yellow(database: str, connection: psycopg.Connection[Any], watch: Watch) -> None:
    connection.execute("DELETE FROM procrastinate_workers")
    job = add_stalled_job(connection)

    terminal = watch(database)

    assert " held " in terminal.line(job)
    assert f"\x1b[{YELLOW}mheld" in terminal.picture


def test_it_follows_jobs_that_start_and_end(database: str, connection: psycopg.Connection[Any], watch: Watch) -> None:
    first = add_stalled_job(connection)
    terminal = watch(database)
    assert terminal.line(first)

    connection.execute("UPDATE procrastinate_jobs SET status = 'failed' WHERE id = %s", [first])
    second = add_stalled_job(connection)

    wait_until(lambda: terminal.line(second) and not terminal.line(first), "the table is up to date", seconds=5)


@pytest.mark.parametrize("options", [["--queue", "emails"], ["--task-name", "send"]], ids=" ".join)
def test_it_shows_only_the_jobs_asked_for(
    options: list[str], database: str, connection: psycopg.Connection[Any], watch: Watch
) -> None:
    other = add_stalled_job(connection)
    job = add_stalled_job(connection, queue_name="emails", task_name="send")

    terminal = watch(database, *options)

    assert terminal.line(job)
    assert not terminal.line(other)
    assert "1 in doing" in terminal.text


def test_of_more_jobs_than_lines_the_most_urgent_are_shown(
    database: str, connection: psycopg.Connection[Any], watch: Watch
) -> None:
    worker = add_worker(connection)
    for _ in range(40):
        add_job(connection, worker_id=worker)
    urgent = add_stalled_job(connection, 100)

    terminal = watch(database, lines=12)

    assert "41 in doing" in terminal.text
    assert terminal.line(urgent)
    assert len(terminal.text.rstrip().splitlines()) == 12


def test_it_says_that_the_connection_is_lost_counts_on_and_connects_again(
    server: Server, database: str, watch: Watch
) -> None:
    allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    name = sql.Identifier(database_name(database))
    with psycopg.connect(database, autocommit=True) as connection:
        job = add_stalled_job(connection, 100)
    terminal = watch(database)
    before = terminal.seconds_left(job)
    assert before is not None

    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(allow.format(name, sql.SQL("false")))
        try:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database_name(database)]
            )
            wait_until(lambda: "FATAL: " in terminal.text, "the reason is shown")
            assert re.search(
                r"^Connection lost \d.* ago, trying again: connection failed: ", terminal.text, re.MULTILINE
            )
            wait_until(lambda: (terminal.seconds_left(job) or before) <= before - 3, "it counts on", seconds=6)
            assert "Connection lost" in terminal.text
        finally:
            connection.execute(allow.format(name, sql.SQL("true")))

    with psycopg.connect(database, autocommit=True) as connection:
        new = add_stalled_job(connection)
    wait_until(lambda: terminal.line(new), "it is connected again")
    assert "Connection lost" not in terminal.text


def test_it_says_that_the_database_does_not_answer_and_counts_on(
    database: str, connection: psycopg.Connection[Any], connect: Connect, watch: Watch
) -> None:
    job = add_stalled_job(connection, 100)
    terminal = watch(database)

    with connect(autocommit=False) as locking:
        locking.execute("LOCK TABLE procrastinate_stalled.rules IN ACCESS EXCLUSIVE MODE")
        wait_until(
            lambda: re.search(r"^No answer from the database for \d", terminal.text, re.MULTILINE),
            "the silence is shown",
        )
        before = terminal.seconds_left(job)
        assert before is not None
        wait_until(lambda: (terminal.seconds_left(job) or before) <= before - 2, "it counts on")
        assert "No answer" in terminal.text

    wait_until(lambda: "No answer" not in terminal.text, "it is answered again")


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_a_signal_ends_it_and_leaves_the_terminal_as_it_was(
    signal_number: int, code: int, database: str, watch: Watch
) -> None:
    terminal = watch(database)
    assert "0 in doing" in terminal.text
    assert terminal.written.count(ALTERNATE_SCREEN) == 1

    assert terminal.end(signal_number) == code

    _pictures, after = terminal.written.split(NORMAL_SCREEN)
    assert after == ""
    assert CURSOR in terminal.written
    assert "Traceback" not in terminal.written


def test_ctrl_c_ends_it_while_the_database_does_not_answer(database: str, connect: Connect, watch: Watch) -> None:
    terminal = watch(database)
    connection = connect(autocommit=False)
    connection.execute("LOCK TABLE procrastinate_stalled.rules IN ACCESS EXCLUSIVE MODE")
    wait_until(
        lambda: rows(connection, "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"), "the query waits"
    )

    assert terminal.end(signal.SIGINT) == INTERRUPTED


def test_an_error_that_does_not_pass_ends_it_with_the_usual_message(database: str, watch: Watch) -> None:
    terminal = watch(database)

    uninstall(database)

    assert terminal.wait() == FAILED
    _pictures, after = terminal.written.split(NORMAL_SCREEN)
    assert "Error: procrastinate_stalled is not installed in this database" in after
    assert "Hint: Install it" in after


def test_without_a_connection_it_does_not_start(server: Server, watch: Watch) -> None:
    terminal = watch(server.conninfo("nowhere"))

    assert terminal.wait() == FAILED
    assert ALTERNATE_SCREEN not in terminal.written
    assert "Error: no connection to the database" in terminal.written


def test_it_refuses_a_pipe_and_says_what_to_do_instead(database: str) -> None:
    done = run("list", "--watch", database=database)

    assert (done.returncode, done.stdout) == (FAILED, "")
    assert "--watch: it needs a terminal" in done.stderr
    assert "explain --json" in done.stderr


@pytest.mark.parametrize(
    "options", [["--json"], ["--seconds-since-heartbeat", "60"], ["--nb-seconds", "60"]], ids=" ".join
)
def test_options_of_the_list_that_make_no_sense_with_it_are_refused(options: list[str], database: str) -> None:
    done = run("list", "--watch", *options, database=database)

    assert (done.returncode, done.stdout) == (FAILED, "")
    assert "--watch: it goes together with --queue and --task-name only" in done.stderr
