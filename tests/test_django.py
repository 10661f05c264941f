"""The Django app in a real project: its migration, its command and its check. For the admin: test_django_admin.py."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from procrastinate_stalled import install
from tests.django_project.running import django_database, manage
from tests.jobs import add_stalled_job, get_job
from tests.server import PROJECT, Server, install_procrastinate
from tests.test_installation import dump, dump_ours, is_installed, psql

UP_TO_PROCRASTINATE = ("migrate", "--verbosity=0", "procrastinate")
OURS = ("migrate", "--verbosity=0", "procrastinate_stalled")

ROUTED: dict[str, Any] = {
    "DATABASE_ROUTERS": ["tests.django_project.routers.NothingButProcrastinate"],
    "PROCRASTINATE_DATABASE_ALIAS": "jobs",
}


@pytest.fixture(scope="session")
def templates(server: Server) -> None:
    """Make the databases `django_procrastinate`, without this product, and `django`, with it, to copy from."""
    for name, template, command in (
        ("django_procrastinate", "template1", UP_TO_PROCRASTINATE),
        ("django", "django_procrastinate", ("migrate", "--verbosity=0")),
    ):
        manage({"default": django_database(server.create_database(name, template))}, *command)


@pytest.fixture
def without_ours(server: Server, templates: None) -> Iterator[str]:  # noqa: ARG001
    """The address of a database to which Django has applied Procrastinate's migrations."""
    with server.database("django_procrastinate") as conninfo:
        yield conninfo


@pytest.fixture
def migrated(server: Server, templates: None) -> Iterator[str]:  # noqa: ARG001
    """The address of a database to which Django has applied all migrations."""
    with server.database("django") as conninfo:
        yield conninfo


def default(conninfo: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """The setting DATABASES of a project with one database."""
    return {"default": django_database(conninfo, **settings)}


def applied(conninfo: str) -> bool:
    """Whether Django has recorded our migration as applied."""
    with psycopg.connect(conninfo) as connection:
        return bool(connection.execute("SELECT FROM django_migrations WHERE app = 'procrastinate_stalled'").fetchall())


# The migration.


def test_the_migration_makes_the_same_schema_as_the_command(migrated: str, procrastinate_database: str) -> None:
    install(procrastinate_database)

    assert dump_ours(migrated) == dump_ours(procrastinate_database)


def test_the_migration_can_be_taken_back_and_applied_again(without_ours: str) -> None:
    before = dump(without_ours)

    manage(default(without_ours), *OURS)
    installed = dump(without_ours)
    assert is_installed(without_ours)
    assert applied(without_ours)

    manage(default(without_ours), *OURS, "zero")
    assert dump(without_ours) == before
    assert not applied(without_ours)

    manage(default(without_ours), *OURS)
    assert dump(without_ours) == installed


def test_the_migration_takes_over_what_was_installed_without_django_and_keeps_its_rows(without_ours: str) -> None:
    install(without_ours)
    with psycopg.connect(without_ours) as connection:
        connection.execute("UPDATE procrastinate_stalled.rules SET name = 'mine'")
    before = dump_ours(without_ours)

    manage(default(without_ours), *OURS)

    assert dump_ours(without_ours) == before
    with psycopg.connect(without_ours) as connection:
        assert connection.execute("SELECT name FROM procrastinate_stalled.rules").fetchall() == [("mine",)]


def test_django_sees_no_difference_between_the_models_and_the_migrations(migrated: str) -> None:
    assert manage(default(migrated), "makemigrations", "--check", "--dry-run").stdout == "No changes detected\n"


def test_there_is_a_migration_of_django_for_each_of_sql() -> None:
    of_sql = [file for file in PROJECT.glob("sql/migrations/*.sql") if not file.name.endswith(".rollback.sql")]
    of_django = [*PROJECT.glob("procrastinate_stalled/contrib/django/migrations/[0-9]*.py")]

    assert len(of_django) == len(of_sql)


A_SECOND_MIGRATION = """
from django.db import migrations

from procrastinate_stalled.contrib.django.operations import Upgrade


class Migration(migrations.Migration):
    dependencies = [("procrastinate_stalled", "0001_initial")]
    operations = [Upgrade()]
"""


def test_to_take_back_a_second_migration_leaves_the_schema_and_its_rows(
    without_ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(PROJECT / "procrastinate_stalled" / "contrib" / "django" / "migrations", tmp_path / "of_later")
    (tmp_path / "of_later" / "0002_later.py").write_text(A_SECOND_MIGRATION)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def migrate(*target: str) -> None:
        manage(default(without_ours), *OURS, *target, MIGRATION_MODULES={"procrastinate_stalled": "of_later"})

    migrate("0001")
    with psycopg.connect(without_ours) as connection:
        connection.execute("UPDATE procrastinate_stalled.rules SET name = 'mine'")
        # What the second migration has to bring.
        connection.execute("DROP FUNCTION procrastinate_stalled.version()")

    migrate()
    with psycopg.connect(without_ours) as connection:
        connection.execute("SELECT procrastinate_stalled.version()")
    before = dump_ours(without_ours)

    migrate("0001")
    assert dump_ours(without_ours) == before
    with psycopg.connect(without_ours) as connection:
        assert connection.execute("SELECT name FROM procrastinate_stalled.rules").fetchall() == [("mine",)]

    migrate("zero")
    assert not is_installed(without_ours)


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_the_printed_sql_does_the_same_as_the_migration(
    without_ours: str, migrated: str, procrastinate_database: str, *, backwards: bool
) -> None:
    before = dump(procrastinate_database)
    forwards = manage(default(without_ours), "sqlmigrate", "procrastinate_stalled", "0001").stdout
    psql(procrastinate_database, f"\\set ON_ERROR_STOP on\n{forwards}")
    assert dump_ours(procrastinate_database) == dump_ours(migrated)
    if backwards:
        printed = manage(default(migrated), "sqlmigrate", "procrastinate_stalled", "0001", "--backwards").stdout
        psql(procrastinate_database, f"\\set ON_ERROR_STOP on\n{printed}")
        assert dump(procrastinate_database) == before


def test_a_migration_that_fails_leaves_nothing_and_says_why(empty_database: str) -> None:
    manage(default(empty_database), "migrate", "--fake", "procrastinate", "--verbosity=0")
    before = dump(empty_database)

    refusal = manage(default(empty_database), *OURS, exit_code=1).stderr

    assert "Procrastinate is not installed in database" in refusal
    assert "HINT:" in refusal
    assert dump(empty_database) == before
    assert not applied(empty_database)


def test_a_schema_of_its_own_for_procrastinate_does_not_hide_djangos_record_of_the_migration(
    empty_database: str,
) -> None:
    # The search_path of the script finds Procrastinate's tables only. Django records the migration after it in the same
    # transaction, in a table that is elsewhere.
    with psycopg.connect(empty_database) as connection:
        connection.execute("CREATE SCHEMA of_django; CREATE SCHEMA of_procrastinate")
    install_procrastinate(make_conninfo(empty_database, options="-c search_path=of_procrastinate"))
    databases = default(empty_database, OPTIONS={"options": "-c search_path=of_django"})
    manage(databases, "migrate", "--fake", "procrastinate", "--verbosity=0")

    manage(databases, *OURS)
    assert is_installed(empty_database)
    assert "[X] 0001_initial" in manage(databases, "showmigrations", "procrastinate_stalled").stdout

    manage(databases, *OURS, "zero")
    assert not is_installed(empty_database)
    assert "[ ] 0001_initial" in manage(databases, "showmigrations", "procrastinate_stalled").stdout


def test_only_the_database_of_procrastinate_gets_the_schema(server: Server, without_ours: str, templates: None) -> None:  # noqa: ARG001
    with server.database("django_procrastinate") as jobs:
        databases = {"default": django_database(without_ours), "jobs": django_database(jobs)}
        before = dump(without_ours)
        for alias in databases:
            manage(databases, *OURS, f"--database={alias}", PROCRASTINATE_DATABASE_ALIAS="jobs")

        assert dump(without_ours) == before
        assert is_installed(jobs)

        for alias in databases:
            manage(databases, *OURS, "zero", f"--database={alias}", PROCRASTINATE_DATABASE_ALIAS="jobs")
        assert not is_installed(jobs)


def test_a_migration_by_another_alias_of_the_same_database_counts(without_ours: str) -> None:
    # The other alias finds the migration applied, so it would never be done.
    databases = {"default": django_database(without_ours), "jobs": django_database(without_ours)}

    manage(databases, *OURS, PROCRASTINATE_DATABASE_ALIAS="jobs")

    assert is_installed(without_ours)


def test_a_project_tests_with_djangos_own_classes(server: Server) -> None:
    databases = {
        alias: django_database(server.conninfo(), TEST={"NAME": f"test_of_django_{alias}"})
        for alias in ("default", "jobs")
    }
    # Two databases, which these names make of one.
    databases["jobs"]["NAME"] = "template1"

    done = manage(databases, "test", "tests.django_project.cases", PROCRASTINATE_DATABASE_ALIAS="jobs")

    assert "Ran 5 tests" in done.stderr
    assert "W001" not in done.stderr


def test_the_package_itself_loads_no_django() -> None:
    modules = "procrastinate_stalled.cli, procrastinate_stalled.client, procrastinate_stalled.installation"
    script = f"import sys, {modules}; sys.exit('django' in sys.modules)"

    subprocess.run([sys.executable, "-c", script], cwd=PROJECT, check=True)


# The command.


def run_command(
    conninfo: str, *arguments: str, exit_code: int = 0, **settings: Any
) -> subprocess.CompletedProcess[str]:
    databases = {
        "default": django_database(conninfo, NAME="there_is_none"),
        "jobs": django_database(conninfo, **settings),
    }
    return manage(
        databases, "procrastinate_stalled", *arguments, exit_code=exit_code, PROCRASTINATE_DATABASE_ALIAS="jobs"
    )


def unframed(text: str) -> str:
    """A help text without the spaces around its lines."""
    return "\n".join(line.strip() for line in text.splitlines())


def test_the_command_sweeps_the_database_of_procrastinate(database: str) -> None:
    with psycopg.connect(database) as connection:
        job = add_stalled_job(connection)

    assert json.loads(run_command(database, "list", "--json").stdout)[0]["id"] == job
    assert run_command(database, "sweep").stdout.startswith("1 jobs in doing: 1 retried")

    with psycopg.connect(database) as connection:
        assert get_job(connection, job)["status"] == "todo"


def test_the_exit_code_of_the_command_is_that_of_the_command_line(database: str) -> None:
    checks = json.loads(run_command(database, "status", "--json", exit_code=1).stdout)

    assert {"name": "schedule", "level": "warning"}.items() <= checks[1].items()


def test_the_command_says_what_is_wrong_in_three_parts(database: str) -> None:
    refusal = run_command(database, "retry", "4711", exit_code=3)

    assert refusal.stdout == ""
    assert refusal.stderr.startswith("Error: ")
    assert "\nHint: " in refusal.stderr


def test_without_a_command_the_commands_are_listed_except_those_that_migrate_stands_for(database: str) -> None:
    listed = run_command(database).stdout

    assert "manage.py procrastinate_stalled" in listed
    assert "To install: manage.py migrate --database=jobs procrastinate_stalled\n" in unframed(listed)
    assert "To uninstall: manage.py migrate --database=jobs procrastinate_stalled zero\n" in unframed(listed)
    assert "sweep" in listed
    assert "--database-url" not in listed
    for name in ("install", "uninstall", "sql"):
        assert f"│ {name} " not in listed
        assert f"No such command '{name}'" in run_command(database, name, exit_code=3).stderr


def test_the_help_of_a_command_is_that_of_the_command_line(database: str) -> None:
    assert "--seconds-since-heartbeat" in run_command(database, "list", "--help").stdout


@pytest.mark.parametrize("command", [("list",), ("schedule",), ("rules",), ("rules", "add")], ids=" ".join)
def test_the_examples_of_a_command_are_what_one_types_here(database: str, command: tuple[str, ...]) -> None:
    examples = run_command(database, *command, "--help").stdout.partition("Example")[2]

    assert f"manage.py procrastinate_stalled {' '.join(command)}" in examples
    assert "procrastinate-stalled" not in examples


def test_the_hints_are_what_one_types_here(server: Server, procrastinate_database: str) -> None:
    not_installed = run_command(procrastinate_database, "list", exit_code=3).stderr
    assert "bring it up to date: manage.py migrate --database=jobs procrastinate_stalled\n" in not_installed

    no_database = run_command(server.conninfo(), "list", exit_code=3, NAME="there_is_none").stderr
    assert 'Hint: Correct the setting DATABASES["jobs"]' in no_database

    install(procrastinate_database)
    no_rule = run_command(procrastinate_database, "rules", "remove", "mine", exit_code=3).stderr
    assert "Hint: Add it: manage.py procrastinate_stalled rules add\n" in no_rule

    with psycopg.connect(procrastinate_database) as connection:
        connection.execute(
            "CREATE OR REPLACE FUNCTION procrastinate_stalled.version() RETURNS text LANGUAGE sql RETURN '0.0.9'"
        )
    as_text = run_command(procrastinate_database, "status", exit_code=1).stdout
    as_json = json.loads(run_command(procrastinate_database, "status", "--json", exit_code=1).stdout)
    hint = "bring the database up to date: manage.py migrate --database=jobs procrastinate_stalled"
    assert f"{hint}\n" in as_text
    assert as_json[-1]["hint"].endswith(hint)
    # Those of the server too.
    (schedule,) = (check["hint"] for check in as_json if check["name"] == "schedule")
    assert "manage.py procrastinate_stalled sweep" in schedule
    assert "procrastinate-stalled" not in as_text


def test_the_command_takes_the_role_that_django_assumes(server: Server, database: str) -> None:
    role = "of the\\ project"
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute(f'CREATE ROLE "{role}"')
    try:
        refusal = run_command(database, "list", exit_code=3, OPTIONS={"assume_role": role})
        assert "permission denied for schema procrastinate_stalled" in refusal.stderr
    finally:
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            connection.execute(f'DROP ROLE "{role}"')


# The check.


def check(conninfo: str, *arguments: str, **settings: Any) -> str:
    """What `manage.py check --database` has to say."""
    done = manage(default(conninfo, **settings), "check", *(arguments or ("--database=default",)))
    return done.stderr


def test_the_check_warns_when_nothing_is_scheduled_and_nothing_sweeps(migrated: str) -> None:
    warning = check(migrated)

    assert "(procrastinate_stalled.W001) Nothing puts the stalled jobs of Procrastinate back: pg_cron is not" in warning
    assert "there is no record of a sweep." in warning
    assert "HINT: manage.py procrastinate_stalled schedule" in warning
    assert "--cron-database" in warning


def test_the_check_is_content_when_something_has_swept(migrated: str) -> None:
    manage(default(migrated), "procrastinate_stalled", "sweep")

    assert check(migrated) == ""


def test_the_check_is_content_when_pg_cron_will_sweep(cron_database: str) -> None:
    assert "W001" in check(cron_database)

    manage(default(cron_database), "procrastinate_stalled", "schedule")

    assert check(cron_database) == ""


def test_the_check_asks_no_database_that_it_is_not_told_to_ask(migrated: str) -> None:
    assert check(migrated, "--tag=database") == ""
    assert check(migrated, "auth", "--database=default") == ""
    assert "W001" in check(migrated, "procrastinate_stalled", "--database=default")


def test_the_check_never_fails(server: Server, empty_database: str, without_ours: str, database: str) -> None:
    assert check(empty_database) == ""
    assert check(without_ours) == ""
    # It is not the one that complains.
    unreachable = manage(default(database, NAME="there_is_none"), "check", "--database=default", exit_code=0)
    assert unreachable.stderr == ""
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute("CREATE ROLE stranger LOGIN")
    try:
        assert check(database, USER="stranger") == ""
    finally:
        with psycopg.connect(server.conninfo(), autocommit=True) as connection:
            connection.execute("DROP ROLE stranger")


def test_the_check_warns_of_a_migration_that_is_recorded_and_was_not_done(without_ours: str) -> None:
    manage(default(without_ours), *OURS, "--fake")

    warning = check(without_ours)

    assert '(procrastinate_stalled.W002) The schema procrastinate_stalled is not in database "default"' in warning
    # As the hint says:
    manage(default(without_ours), *OURS, "zero", "--fake")
    manage(default(without_ours), *OURS)
    assert is_installed(without_ours)
    assert "W002" not in check(without_ours)


def test_the_check_warns_when_a_router_forbids_the_migration(server: Server, migrated: str, templates: None) -> None:  # noqa: ARG001
    with server.database("django_procrastinate") as jobs:
        databases = {"default": django_database(migrated), "jobs": django_database(jobs)}
        manage(databases, *OURS, "--database=jobs", **ROUTED)

        warning = manage(databases, "check", "--database=jobs", **ROUTED).stderr

        assert not is_installed(jobs)
        assert '(procrastinate_stalled.W002) The schema procrastinate_stalled is not in database "jobs"' in warning
        assert "a router forbids it" in warning


def test_without_the_app_of_procrastinate_the_check_says_what_is_missing(without_ours: str) -> None:
    apps = [f"django.contrib.{name}" for name in ("admin", "auth", "contenttypes", "messages", "sessions")]
    apps.append("procrastinate_stalled.contrib.django")

    for command in (("check",), ("check", "procrastinate_stalled"), ("migrate",)):
        refusal = manage(default(without_ours), *command, exit_code=1, INSTALLED_APPS=apps).stderr
        assert "(procrastinate_stalled.E001) procrastinate_stalled.contrib.django is in INSTALLED_APPS" in refusal
        assert 'HINT: Add "procrastinate.contrib.django" to INSTALLED_APPS' in refusal
    assert not is_installed(without_ours)
    assert manage(default(without_ours), "check", "auth", INSTALLED_APPS=apps).stderr == ""
