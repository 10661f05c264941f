"""Reads the Markdown documents, and runs what stands in them.

A block of language `sh`, `sql` or `python` is run. A block of language `text` directly after it is what it prints,
errors included; without such a block it prints nothing. A comment such as `<!-- test: installed -->` brings about what
the reader is told has happened: it calls the method `setup_installed` of `Scene`.
"""

import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from markdown_it import MarkdownIt
from markdown_it.token import Token
from psycopg import sql
from psycopg.conninfo import make_conninfo

from procrastinate_stalled import Stalled, install, uninstall
from tests.jobs import add_job, add_orphan_note, add_worker, insert, pretend_old_server, update_job
from tests.server import PROJECT, Server, install_procrastinate
from tests.test_extension import PG_TLE
from tests.wait import wait_until
from tests.worker import Worker, start_worker

DATABASE = "app"
ROLE = "app"

IN_WORDS = r"\d+(\.\d+)? (d|h|min|s)\b( \d+ (h|min|s)\b)?"

# What differs from one run to the next. Everything else is compared to the letter.
VARIABLE = [
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?([+-]\d\d(:?\d\d)?)?", "<time>"),
    (r"\b(at|since|until) \d\d:\d\d:\d\d\b", r"\1 <time>"),
    (r"\b\d\d:\d\d:\d\d\.\d+", "<duration>"),
    (rf"(last heard|has run for|\(for|<time>,?) +{IN_WORDS}", r"\1 <duration>"),
    (r"\bline \d+ at\b", "line <n> at"),
    # The widths of columns.
    (r"[-─]{3,}", "---"),
    (r"[ \t]+", " "),
]


def parse(document: Path) -> list[Token]:
    """Return the tokens of a document, which is CommonMark with GitHub's tables."""
    return MarkdownIt("commonmark").enable("table").parse(document.read_text())


@dataclass(frozen=True)
class Step:
    """Something in a document that is to be run."""

    language: str
    """That of the block; `comment` for a comment; empty for an indented block."""
    line: int
    text: str
    output: str = ""


def steps(document: Path) -> list[Step]:
    """Return all blocks and comments of a document, also those which `Scene.run` does not understand."""
    found: list[Step] = []
    takes_output = False
    for token in parse(document):
        if token.type == "fence" and token.info == "text" and takes_output:
            found[-1] = replace(found[-1], output=token.content)
            takes_output = False
        elif token.type in {"fence", "code_block", "html_block"} and token.map is not None:
            language = "comment" if token.type == "html_block" else token.info
            found.append(Step(language, token.map[0] + 1, token.content))
            takes_output = language in {"sh", "sql", "python"}
        else:
            takes_output = False
    return found


def normalize(output: str) -> str:
    """Return an output without what differs from one run to the next."""
    for pattern, replacement in VARIABLE:
        output = re.sub(pattern, replacement, output)
    return "".join(f"{line.strip()}\n" for line in output.splitlines() if line.strip())


def problem_of_unrunnable(line: str) -> str:
    """Return what is wrong with a command that cannot be run within a test: one of `make`, or of `pip`."""
    name, *arguments = shlex.split(line)
    if name == "make":
        known = subprocess.run(["make", "help"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
        if not re.search(rf"^make {re.escape(arguments[0])} ", known, re.MULTILINE):
            return f"make help does not list the target {arguments[0]}"
        return subprocess.run(
            ["make", "-n", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False
        ).stderr
    if name == "pip":
        project = metadata.metadata("procrastinate-stalled")
        extras = project.get_all("Provides-Extra", [])
        allowed = [["install", project["Name"]], *(["install", f"{project['Name']}[{extra}]"] for extra in extras)]
        return "" if arguments in allowed else f"not one of {allowed}"
    return f"{name} cannot stand in one block with make or pip"


class Scene:
    """A server of its own for one document.

    It has a database `app` with pg_cron and Procrastinate. The role `app` owns that database, and is no superuser.
    """

    def __init__(self, server: Server, folder: Path, workers: ExitStack) -> None:
        self.server = server
        self.folder = folder
        self.workers = workers
        self.superuser = server.conninfo(DATABASE)
        self.owner = make_conninfo(self.superuser, user=ROLE)
        self._execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(ROLE)))
        self._execute(sql.SQL("ALTER DATABASE {} OWNER TO {}").format(sql.Identifier(DATABASE), sql.Identifier(ROLE)))
        install_procrastinate(self.owner)

    def run(self, step: Step) -> str:
        """Run a step and return what it prints; an exit status other than 0 is the last line of that."""
        if step.language == "comment":
            setup = re.fullmatch(r"<!-- test: (\w+) -->\n", step.text)
            if setup is None:
                raise ValueError(f"not a comment of the form <!-- test: installed -->: {step.text}")
            getattr(self, f"setup_{setup[1]}")()
            return ""
        if step.language == "sh" and re.search(r"^(make|pip) ", step.text, re.MULTILINE):
            return "".join(map(problem_of_unrunnable, step.text.splitlines()))
        commands = {
            "sh": ["bash", "-o", "pipefail", "-c", step.text],
            "sql": ["psql", "--no-psqlrc"],
            # Imported, as the modules of a program are.
            "python": [sys.executable, "-c", "import snippet"],
        }
        if step.language not in commands:
            raise ValueError(
                f"nobody runs a block of language {step.language!r} here; one of language 'text' directly follows "
                "the block whose output it is"
            )
        (self.folder / "snippet.py").write_text(step.text)
        done = subprocess.run(
            commands[step.language],
            cwd=self.folder,
            env=self._environment(),
            input=step.text if step.language == "sql" else "",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout + (f"exit status {done.returncode}\n" if done.returncode else "")

    def _environment(self) -> dict[str, str]:
        bindir = subprocess.run([PROJECT / "scripts" / "postgresql-bindir"], capture_output=True, text=True, check=True)
        return {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), bindir.stdout.strip(), os.environ["PATH"]]),
            "HOME": str(self.folder),
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "COLUMNS": "100",
            "PGHOST": self.server.host,
            "PGPORT": str(self.server.port),
            "PGUSER": ROLE,
            "PGDATABASE": DATABASE,
        }

    def _execute(
        self, query: LiteralString | sql.SQL | sql.Composed, *parameters: object, conninfo: str | None = None
    ) -> None:
        with psycopg.connect(conninfo or self.superuser, autocommit=True) as connection:
            connection.execute(query, parameters)

    def _wait_until(self, query: LiteralString, what: str, seconds: float = 30) -> None:
        """Wait until a query returns a row."""
        with psycopg.connect(self.superuser, autocommit=True) as connection:
            wait_until(lambda: connection.execute(query).rowcount, what, seconds)

    def _pretend_old_server(self, available_for: str = "30 days") -> None:
        """Let the server look so old, so that workers which are said to be silent for long can be that."""
        with psycopg.connect(self.superuser) as connection:
            pretend_old_server(connection)
            (available_since,) = connection.execute("SELECT now() - %s::interval", [available_for]).fetchone() or ()
            connection.execute(
                sql.SQL("ALTER DATABASE {} SET tests.available_since = {}").format(
                    sql.Identifier(DATABASE), sql.Literal(str(available_since))
                )
            )

    def _begin_anew(self) -> None:
        """Leave no job, no worker, no trace of them and no rule but "default"; the ids begin with 1 again."""
        self.workers.close()
        self._execute(
            """
            TRUNCATE procrastinate_jobs, procrastinate_workers, procrastinate_stalled.rescues,
                procrastinate_stalled.sweeps, procrastinate_stalled.orphans
                RESTART IDENTITY CASCADE
            """
        )
        self._execute("DELETE FROM procrastinate_stalled.rules WHERE name <> 'default'")

    def _set_default_heartbeat_timeout(self, timeout: str) -> None:
        self._execute("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = %s WHERE name = 'default'", timeout)

    def _run_silently(self, command: str) -> None:
        output = self.run(Step("sh", 0, command))
        if output:
            raise RuntimeError(output)

    def _schedule(self) -> None:
        self._execute("GRANT USAGE ON SCHEMA cron TO app")
        with psycopg.connect(self.owner) as connection:
            Stalled(connection).schedule()

    def _create_database(self, dbname: str) -> str:
        statement = sql.SQL("CREATE DATABASE {} OWNER {}")
        self._execute(statement.format(sql.Identifier(dbname), sql.Identifier(ROLE)))
        return make_conninfo(self.owner, dbname=dbname)

    def _start_worker(self, queue: str) -> Worker:
        log = self.folder / f"worker-{queue}.log"
        worker = start_worker(self.owner, log, "tests.shop.app", queues=[queue])
        self.workers.callback(worker.kill)
        return worker

    # What the documents say has happened.

    def setup_installed(self) -> None:
        """The product is installed."""
        install(self.owner)

    def setup_not_installed(self) -> None:
        """The product is not installed."""
        uninstall(self.owner)

    def setup_not_installed_in_the_repository(self) -> None:
        """The product is not installed, and the reader is in a copy of this repository."""
        uninstall(self.owner)
        (self.folder / "sql").symlink_to(PROJECT / "sql")

    def setup_stand_ins_for_pg_tle(self) -> None:
        """There is something that takes what pg_tle would take. `CREATE EXTENSION` finds the files on the server."""
        self._execute(PG_TLE)
        self._execute("GRANT USAGE ON SCHEMA pgtle TO app; GRANT ALL ON ALL TABLES IN SCHEMA pgtle TO app")

    def setup_scheduled(self) -> None:
        """The product is installed, and pg_cron runs it."""
        install(self.owner)
        self._schedule()

    def setup_an_extension_is_scheduled(self) -> None:
        """The product is installed by `CREATE EXTENSION`, and pg_cron runs it."""
        uninstall(self.owner)
        self._execute("CREATE EXTENSION procrastinate_stalled", conninfo=self.owner)
        self._schedule()

    def setup_a_worker_was_killed(self) -> None:
        """The rule waits for 30 seconds, and a worker was killed in the middle of job 1."""
        self._set_default_heartbeat_timeout("30 seconds")
        self._execute(
            "INSERT INTO procrastinate_jobs (queue_name, task_name) VALUES ('emails', 'shop.emails.newsletter')",
            conninfo=self.owner,
        )
        victim = self._start_worker("emails")
        self._wait_until("SELECT FROM procrastinate_jobs WHERE status = 'doing'", "the job has started")
        victim.kill()
        self._start_worker("emails")

    def setup_pg_cron_has_swept(self) -> None:
        """Another worker has finished job 1, and the rule waits for 5 minutes again."""
        self._wait_until(
            "SELECT FROM procrastinate_jobs WHERE status = 'succeeded'",
            "another worker has finished the job",
            seconds=120,
        )
        self._wait_until("SELECT FROM cron.job_run_details WHERE status = 'succeeded'", "pg_cron has noted its run")
        self._set_default_heartbeat_timeout("5 minutes")

    def setup_a_database_without_pg_cron(self) -> None:
        """There is a database `shop` like `app`, but without pg_cron."""
        shop = self._create_database("shop")
        install_procrastinate(shop)
        install(shop)

    def setup_a_view_of_the_users(self) -> None:
        """The user has made the view `rescues_by_day` on one of our tables."""
        self._execute(
            """
            CREATE VIEW rescues_by_day AS
                SELECT rescued_at::date, count(*) FROM procrastinate_stalled.rescues GROUP BY 1
            """,
            conninfo=self.owner,
        )

    def setup_installed_anew_in_database_shop_new(self) -> None:
        """There is a database `shop_new` in which Procrastinate and the product were just installed."""
        shop_new = self._create_database("shop_new")
        install_procrastinate(shop_new)
        install(shop_new)

    def setup_jobs_of_dead_workers(self) -> None:
        """The worker of the jobs 2, 3 and 5 is silent, a living one runs job 6, and job 7 is an orphan."""
        self.workers.close()
        self._execute("DELETE FROM procrastinate_workers")
        self._pretend_old_server()
        # First: a worker that starts deletes the rows of silent ones.
        self._start_worker("reports")
        with psycopg.connect(self.owner) as connection:
            lost: dict[str, Any] = {"worker_id": add_worker(connection, silent_for=1200), "started_ago": 1300}
            remind: dict[str, Any] = {
                "queue_name": "emails",
                "task_name": "shop.emails.remind",
                "queueing_lock": "order 7",
            }
            add_job(connection, queue_name="emails", task_name="shop.emails.send", **lost)
            add_job(connection, **remind, **lost)
            add_job(connection, "todo", **remind)
            add_job(connection, queue_name="billing", task_name="shop.billing.charge", **lost)
            add_job(connection, "todo", queue_name="reports", task_name="shop.reports.build")
            add_job(connection, queue_name="emails", task_name="shop.emails.send")
        self._wait_until(
            "SELECT FROM procrastinate_jobs WHERE queue_name = 'reports' AND status = 'doing'", "job 6 has started"
        )

    def setup_all_workers_were_killed(self) -> None:
        """No worker is alive any more, though some were a moment ago."""
        self.workers.close()

    def setup_a_yoyo_was_killed(self) -> None:
        """There is a lock that nobody will remove."""
        self._execute("INSERT INTO yoyo_lock (locked, ctime, pid) VALUES (1, now(), 4711)")

    def setup_installed_by_yoyo(self) -> None:
        """The product was installed by the plain `yoyo` command."""
        self._run_silently(
            "yoyo apply --batch --database postgresql+psycopg:// package:procrastinate_stalled:migrations"
        )

    def setup_two_procrastinates_in_database_shop(self) -> None:
        """There is a database `shop` with a Procrastinate in each of two schemas."""
        shop = self._create_database("shop")
        for schema in ("sales", "stock"):
            self._execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)), conninfo=shop)
            install_procrastinate(make_conninfo(shop, options=f"-c search_path={schema}"))

    def setup_pg_cron_of_database_app_sweeps_database_shop(self) -> None:
        """The sweep is scheduled for a database without pg_cron."""
        self._execute(
            """
            SELECT cron.schedule_in_database(
                'procrastinate_stalled shop', '* * * * *', 'CALL procrastinate_stalled.sweep()', 'shop', 'app'
            )
            """
        )

    def setup_pg_cron_has_swept_database_shop(self) -> None:
        """A sweep has ended in database `shop`, which has no pg_cron of its own."""
        with psycopg.connect(self.superuser, dbname="shop", autocommit=True) as connection:
            ended = "SELECT FROM procrastinate_stalled.sweeps WHERE duration IS NOT NULL"
            wait_until(lambda: connection.execute(ended).rowcount, "pg_cron has swept the other database", 120)
        self._wait_until(
            "SELECT FROM cron.job_run_details WHERE database = 'shop' AND status = 'succeeded'",
            "pg_cron has noted its run",
        )

    def setup_a_django_project_with_these_settings(self) -> None:
        """There is a project of Django with Procrastinate, which may use pg_cron, and whose settings say this too."""
        said = (self.folder / "snippet.py").read_text()
        self._execute(sql.SQL("GRANT USAGE ON SCHEMA cron TO {}").format(sql.Identifier(ROLE)))
        self._run_silently("django-admin startproject shop .")
        with (self.folder / "shop" / "settings.py").open("a") as settings:
            settings.write(
                f"""
DATABASES = {{"default": {{"ENGINE": "django.db.backends.postgresql", "NAME": "{DATABASE}"}}}}
of_django = INSTALLED_APPS
{said}
INSTALLED_APPS = [*of_django, *(app for app in INSTALLED_APPS if app is not ...)]
"""
            )
        for command in ("--fake procrastinate", "auth", "admin", "sessions"):
            self._run_silently(f"python manage.py migrate --verbosity=0 {command}")

    def setup_nothing_is_scheduled(self) -> None:
        """There is no pg_cron job, and nothing has swept."""
        self._execute("SELECT procrastinate_stalled.unschedule()", conninfo=self.owner)
        self._execute("DELETE FROM procrastinate_stalled.sweeps")

    def setup_something_has_swept(self) -> None:
        """A sweep has ended just now."""
        self._execute("INSERT INTO procrastinate_stalled.sweeps (duration) VALUES ('10 ms')")

    def setup_the_migration_was_recorded_only(self) -> None:
        """Django believes the migration to be applied, and it is not."""
        for command in ("procrastinate_stalled zero", "--fake procrastinate_stalled"):
            self._run_silently(f"python manage.py migrate --skip-checks --verbosity=0 {command}")

    def setup_pg_cron_has_run_the_sweep(self) -> None:
        """pg_cron has run the sweep of database `app`, and has noted it."""
        self._wait_until(
            "SELECT FROM cron.job_run_details WHERE database = 'app' AND status = 'succeeded'",
            "pg_cron has noted its run",
            seconds=120,
        )

    def setup_an_extension_in_database_store(self) -> None:
        """There is a database `store` with the extension and a rule."""
        store = self._create_database("store")
        install_procrastinate(store)
        self._execute("CREATE EXTENSION procrastinate_stalled", conninfo=store)
        with psycopg.connect(store) as connection:
            insert(connection, "rules", name="charge once", task_name="shop.billing.%", action="fail")

    def setup_a_database_without_procrastinate(self) -> None:
        """There is an empty database `empty`."""
        self._create_database("empty")

    def setup_four_jobs(self) -> None:
        """There are the four jobs of docs/rules.md."""
        self._pretend_old_server()
        with psycopg.connect(self.owner) as connection:
            lost: dict[str, Any] = {"worker_id": add_worker(connection, silent_for=1200), "started_ago": 1300}
            add_job(connection, queue_name="emails", task_name="shop.emails.send", **lost)
            add_job(connection, queue_name="reports", task_name="shop.reports.build", **lost)
            billing: dict[str, Any] = {
                "queue_name": "billing",
                "task_name": "shop.billing.charge",
                "args": {"customer": 7},
            }
            add_job(connection, **billing, **lost)
            alive = add_worker(connection)
            add_job(
                connection, queue_name="imports", task_name="shop.imports.read", worker_id=alive, started_ago=3 * 3600
            )

    def setup_job_1_has_been_retried_three_times(self) -> None:
        """Job 1 has lost four workers."""
        with psycopg.connect(self.owner, autocommit=True) as connection:
            for _ in range(3):
                Stalled(connection).retry_stalled_jobs(task_name="shop.emails.send")
                update_job(connection, 1, status="doing", worker_id=add_worker(connection, silent_for=1200))

    def setup_a_job_of_each_evidence(self) -> None:
        """The server was down until 2 minutes ago. Worker 2 was heard since, worker 3 not, that of job 3 is gone."""
        self._begin_anew()
        self._pretend_old_server("2 minutes")
        with psycopg.connect(self.owner) as connection:
            insert(connection, "rules", name="imports", task_name="shop.imports.%", run_timeout="2 hours")
            alive, heard, not_heard = (add_worker(connection, silent_for) for silent_for in (2, 60, 180))
            reports: dict[str, Any] = {"queue_name": "reports", "task_name": "shop.reports.build"}
            add_job(connection, **reports, worker_id=heard, started_ago=90)
            add_job(connection, **reports, worker_id=not_heard, started_ago=3600)
            orphan = add_job(connection, **reports, started_ago=90)
            add_orphan_note(connection, orphan, attempts=0, seen_ago=30)
            add_job(connection, queue_name="imports", task_name="shop.imports.read", worker_id=alive, started_ago=7000)

    def setup_a_week_of_imports(self) -> None:
        """There were 100 imports, of 1 to 100 minutes."""
        self._begin_anew()
        with psycopg.connect(self.owner) as connection:
            for minutes in range(1, 101):
                job_id = add_job(
                    connection, "succeeded", queue_name="imports", task_name="shop.imports.read", started_ago=86400
                )
                connection.execute(
                    """
                    UPDATE procrastinate_events SET at = now() - interval '1 day' + make_interval(mins => %s)
                    WHERE job_id = %s AND type = 'succeeded'
                    """,
                    [minutes, job_id],
                )

    def setup_a_job_of_each_verdict(self) -> None:
        """Job 1 is running, job 2 stalled, job 3 ignored by a rule, and job 4 waits in `todo`."""
        self._begin_anew()
        self._pretend_old_server()
        with psycopg.connect(self.owner) as connection:
            insert(
                connection,
                "rules",
                name="payments",
                task_name="shop.billing.%",
                action="ignore",
                note="Anna checks each by hand.",
            )
            alive = add_worker(connection, silent_for=2)
            dead = add_worker(connection, silent_for=1200)
            reports: dict[str, Any] = {"queue_name": "reports", "task_name": "shop.reports.build"}
            add_job(connection, **reports, worker_id=alive, started_ago=600)
            add_job(connection, **reports, worker_id=dead, started_ago=1300)
            add_job(connection, queue_name="billing", task_name="shop.billing.charge", worker_id=dead, started_ago=1300)
            add_job(connection, "todo", **reports)

    def setup_a_job_of_each_verdict_while_something_sweeps(self) -> None:
        """There are the jobs of the previous scene, of which nothing is stalled for long."""
        self.setup_a_job_of_each_verdict()
        self._execute("INSERT INTO procrastinate_stalled.sweeps (duration) VALUES ('10 ms'), ('10 ms')")

    def setup_all_workers_are_silent(self) -> None:
        """The workers were last heard an hour earlier than before."""
        self._execute("UPDATE procrastinate_workers SET last_heartbeat = last_heartbeat - interval '1 hour'")

    def setup_a_living_worker_was_robbed(self) -> None:
        """A rule took job 1 from its living worker, which finished it all the same."""
        self._begin_anew()
        with psycopg.connect(self.owner, autocommit=True) as connection:
            insert(
                connection, "rules", name="newsletters take 1 second", task_name="%.newsletter", run_timeout="1 second"
            )
            connection.execute(
                "INSERT INTO procrastinate_jobs (queue_name, task_name) VALUES ('emails', 'shop.emails.newsletter')"
            )
            self._start_worker("emails")
            self._wait_until("SELECT FROM procrastinate_stalled.get_stalled_jobs()", "the rule calls it stalled")
            Stalled(connection).sweep()
            self._wait_until("SELECT FROM procrastinate_jobs WHERE status = 'succeeded'", "its worker has finished it")

    def setup_a_living_worker_gave_up_job_1(self) -> None:
        """Job 1 is in `doing` under a living worker, and job 2 waits with its queueing lock."""
        self._begin_anew()
        with psycopg.connect(self.owner) as connection:
            sync: dict[str, Any] = {"queue_name": "stock", "task_name": "shop.stock.sync", "queueing_lock": "stock"}
            add_job(connection, worker_id=add_worker(connection), started_ago=7200, **sync)
            add_job(connection, "todo", **sync)
