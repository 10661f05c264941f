"""Upgrades from each released version to the newest, by every way, with data; and how a migration comes about.

The next release is rehearsed in a copy of the tree: the present version is frozen there, and one with changes of every
kind follows. So the way to it is tested before there is one.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from procrastinate_stalled import Stalled, tle_script
from tests.extension_server import server_with_extension
from tests.jobs import add_job, add_orphan_note, add_rule, get_job, rows
from tests.server import PROJECT, Server, install_procrastinate
from tests.test_extension import PG_TLE, release_members
from tests.test_installation import dump_ours, psql, yoyo

Connection = psycopg.Connection[Any]

NEXT = "99.10.0"  # sorts after every release by numbers, and before 99.9 as text


def copy_of_the_project(folder: Path) -> Path:
    """Copy what a release is made of."""
    for name in ("Makefile", "pyproject.toml", "procrastinate_stalled.control"):
        shutil.copy(PROJECT / name, folder)
    for name in ("sql", "scripts", "procrastinate_stalled"):
        shutil.copytree(PROJECT / name, folder / name, symlinks=True)
    return folder


def migrations(tree: Path) -> dict[str, Path]:
    """The migrations in a tree by version, oldest first."""
    files = sorted(tree.glob("sql/migrations/*.sql"))
    return {file.stem.rpartition("_")[2]: file for file in files if not file.name.endswith(".rollback.sql")}


def release(tree: Path) -> None:
    """Freeze the newest migration, as CONTRIBUTING tells."""
    subprocess.run(["make", "--no-print-directory", "release"], cwd=tree, check=True)


def set_version(tree: Path, version: str) -> None:
    for name, pattern in {
        "pyproject.toml": r'(?m)^version = "(.*)"$',
        "procrastinate_stalled.control": r"default_version = '(.*)'",
        "sql/10_prerequisites.sql": r"RETURN '([0-9.]+)'",
    }.items():
        text = (tree / name).read_text()
        (match,) = re.finditer(pattern, text)
        (tree / name).write_text(text[: match.start(1)] + version + text[match.end(1) :])


def replace(file: Path, old: str, new: str) -> None:
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


def change_everything(tree: Path) -> None:
    """Change the SQL in each way in which a release may: columns, types, functions, tables, comments."""
    tables = tree / "sql/20_tables.sql"
    replace(
        tables,
        "CREATE TABLE IF NOT EXISTS procrastinate_stalled.settings (",
        """
        ALTER TABLE procrastinate_stalled.rules ADD COLUMN IF NOT EXISTS owner text DEFAULT 'nobody';
        COMMENT ON COLUMN procrastinate_stalled.rules.owner IS 'Whom to ask.';
        CREATE TABLE IF NOT EXISTS procrastinate_stalled.more (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
        CREATE TABLE IF NOT EXISTS procrastinate_stalled.settings (""",
    )
    (tree / "sql/15_older_versions.sql").write_text(
        """
        -- Another result needs another function.
        DROP FUNCTION IF EXISTS procrastinate_stalled.workers();
        """
    )
    explain = (tree / "sql/35_explain.sql").read_text()
    workers = explain.index("FUNCTION procrastinate_stalled.workers()")
    changed = explain[workers:].replace("last_heartbeat timestamp", "beat_at timestamp", 1)
    assert changed != explain[workers:]
    (tree / "sql/35_explain.sql").write_text(explain[:workers] + changed)
    replace(tables, "IS 'Free text.';", "IS 'Free text, for people.';")


@pytest.fixture(scope="module")
def next_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, one release later."""
    tree = copy_of_the_project(tmp_path_factory.mktemp("next-release"))
    release(tree)
    set_version(tree, NEXT)
    change_everything(tree)
    subprocess.run(["make", "migration"], cwd=tree, check=True)
    return tree


@pytest.fixture(scope="module")
def server(next_release: Path) -> Iterator[Server]:
    """A server that has the files of the next release, with the database `procrastinate` to copy from."""
    with server_with_extension(next_release) as server:
        install_procrastinate(server.create_database("procrastinate"))
        yield server


@pytest.fixture
def database(server: Server) -> Iterator[str]:
    with server.database("procrastinate") as conninfo:
        yield conninfo


def install_by_psql(conninfo: str, tree: Path, version: str) -> None:
    psql(conninfo, f"\\set ON_ERROR_STOP on\nBEGIN;\n{migrations(tree)[version].read_text()}\nCOMMIT;\n")


def install_by_package(conninfo: str, tree: Path, version: str) -> None:
    """Call `install` of a tree that ends with a version."""
    hidden = {path: path.read_text() for name, path in migrations(tree).items() if name > version}
    for path in hidden:
        path.unlink()
    try:
        subprocess.run(
            [sys.executable, "-c", "import sys, procrastinate_stalled as p; p.install(sys.argv[1])", conninfo],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
            check=True,
        )
    finally:
        for path, text in hidden.items():
            path.write_text(text)


def install_by_yoyo(conninfo: str, tree: Path, version: str) -> None:
    folder = tree / f"until-{version}"
    folder.mkdir(exist_ok=True)
    for name, path in migrations(tree).items():
        if name <= version:
            shutil.copy(path, folder)
    yoyo("apply", conninfo, str(folder))


def install_as_extension(conninfo: str, tree: Path, version: str) -> None:
    del tree
    with psycopg.connect(conninfo) as connection:
        if rows(connection, "SELECT FROM pg_extension WHERE extname = 'procrastinate_stalled'"):
            connection.execute(f"ALTER EXTENSION procrastinate_stalled UPDATE TO '{version}'".encode())
        else:
            connection.execute(f"CREATE EXTENSION procrastinate_stalled VERSION '{version}'".encode())


WAYS: list[Callable[[str, Path, str], None]] = [
    install_by_psql,
    install_by_package,
    install_by_yoyo,
    install_as_extension,
]


def add_data(connection: Connection) -> int:
    """Put rows into each table; returns the id of a stalled job."""
    connection.execute("UPDATE procrastinate_stalled.rules SET heartbeat_timeout = '6 minutes', position = 7")
    add_rule(connection, "mine", position=1, task_name="slow", run_timeout="1 minute", note="keep me")
    connection.execute("UPDATE procrastinate_stalled.settings SET outage_grace = '0'")
    add_job(connection, task_name="slow", started_ago=3600)
    assert len(Stalled(connection).retry_stalled_jobs()) == 1
    add_orphan_note(connection, 4711, 0, 60)
    return add_job(connection, task_name="slow", started_ago=3600)


def data(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    return {
        table: rows(connection, f"SELECT * FROM procrastinate_stalled.{table} ORDER BY 1")
        for table in ("rules", "settings", "rescues", "sweeps", "orphans")
    }


PRESENT = list(migrations(PROJECT))[-1]
UPGRADES = [(old, new) for new in (PRESENT, NEXT) for old in migrations(PROJECT) if old != new]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("old", "new"), UPGRADES)
def test_an_upgrade_ends_in_the_schema_of_a_fresh_install_and_keeps_the_data(
    server: Server, database: str, next_release: Path, way: Callable[[str, Path, str], None], old: str, new: str
) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        way(database, next_release, old)
        assert rows(connection, "SELECT procrastinate_stalled.version()") == [{"version": old}]
        job = add_data(connection)
        # Somebody may keep something of his own there; it is no hindrance.
        connection.execute("CREATE TABLE procrastinate_stalled.notes (id serial)")
        before = data(connection)

        for _ in range(2):  # once more changes nothing
            way(database, next_release, new)

            assert rows(connection, "SELECT procrastinate_stalled.version()") == [{"version": new}]
            after = data(connection)
            for table, table_rows in before.items():
                assert [row | old_row for row, old_row in zip(after[table], table_rows, strict=True)] == after[table]
        Stalled(connection).sweep()
        assert get_job(connection, job)["status"] == "todo"

        connection.execute("DROP TABLE procrastinate_stalled.notes")

    if way is install_as_extension:
        release_members(database)
    with server.database("procrastinate") as fresh:
        install_by_psql(fresh, next_release, new)
        assert dump_ours(database) == dump_ours(fresh)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_newest_version_comes_into_an_empty_database_by_all_its_migrations(
    server: Server, database: str, next_release: Path, way: Callable[[str, Path, str], None]
) -> None:
    way(database, next_release, NEXT)

    if way is install_as_extension:
        release_members(database)
    with server.database("procrastinate") as other:
        install_by_psql(other, next_release, NEXT)
        assert dump_ours(database) == dump_ours(other)


@pytest.mark.parametrize("way", [install_by_psql, install_by_package, install_by_yoyo], ids=lambda way: way.__name__)
def test_an_older_version_over_a_newer_one_is_refused(
    database: str, next_release: Path, way: Callable[[str, Path, str], None]
) -> None:
    *_, present, _next = migrations(next_release)
    install_by_psql(database, next_release, NEXT)
    before = dump_ours(database)

    with pytest.raises(subprocess.CalledProcessError):
        way(database, next_release, present)

    assert dump_ours(database) == before


def test_the_refusal_of_an_older_version_says_what_to_do(database: str, next_release: Path) -> None:
    *_, present, _next = migrations(next_release)
    install_by_psql(database, next_release, NEXT)

    with (
        psycopg.connect(database) as connection,
        pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as refusal,
    ):
        connection.execute(migrations(next_release)[present].read_bytes())

    assert refusal.value.diag.message_primary is not None
    assert refusal.value.diag.message_primary.startswith(f"procrastinate_stalled {NEXT} is installed")
    assert refusal.value.diag.message_detail == f"This is the older version {present}."
    assert refusal.value.diag.message_hint is not None
    assert "pip install --upgrade procrastinate-stalled" in refusal.value.diag.message_hint


def test_the_package_takes_over_what_psql_brought_up_to_date(database: str, next_release: Path) -> None:
    install_by_psql(database, next_release, NEXT)
    before = dump_ours(database)

    install_by_package(database, next_release, NEXT)

    assert dump_ours(database) == before
    with psycopg.connect(database) as connection:
        recorded = rows(connection, "SELECT migration_id FROM procrastinate_stalled._yoyo_migration ORDER BY 1")
    assert [row["migration_id"] for row in recorded] == [path.stem for path in migrations(next_release).values()]


def make_migration(tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tree / "scripts/assemble-migration", *options], cwd=tree, capture_output=True, text=True, check=False
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the tree in which the present version is released."""
    tree = copy_of_the_project(tmp_path)
    release(tree)
    return tree


def test_make_migration_changes_nothing_when_nothing_has_changed(tree: Path) -> None:
    before = {path: path.read_bytes() for path in tree.glob("sql/migrations/*")}

    assert make_migration(tree).returncode == 0
    assert make_migration(tree, "--check").returncode == 0

    assert {path: path.read_bytes() for path in tree.glob("sql/migrations/*")} == before


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_make_migration_refuses_to_change_a_released_one(tree: Path, options: list[str]) -> None:
    before = {path: path.read_bytes() for path in tree.glob("sql/migrations/*")}
    replace(tree / "sql/20_tables.sql", "IS 'Free text.';", "IS 'Free text, for people.';")

    done = make_migration(tree, *options)

    assert done.returncode == 1
    assert "is released and its migration is frozen. Raise the version" in done.stderr
    assert {path: path.read_bytes() for path in tree.glob("sql/migrations/*")} == before


def test_make_migration_notices_that_a_released_one_was_changed(tree: Path) -> None:
    set_version(tree, NEXT)
    first, *_ = migrations(tree).values()
    first.write_text(first.read_text() + "-- changed\n")

    done = make_migration(tree)

    assert done.returncode == 1
    assert first.name in done.stderr
    assert "a released migration was changed" in done.stderr
    assert NEXT not in migrations(tree)


def test_make_migration_begins_the_next_one_and_goes_on_with_it(tree: Path) -> None:
    released = migrations(tree)
    set_version(tree, NEXT)
    assert make_migration(tree, "--check").returncode == 1
    assert make_migration(tree).returncode == 0
    name = f"procrastinate_stalled_{len(released) + 1:04}_{NEXT}.sql"
    assert [path.name for path in migrations(tree).values()] == [*(path.name for path in released.values()), name]

    replace(tree / "sql/20_tables.sql", "IS 'Free text.';", "IS 'Free text, for people.';")
    assert make_migration(tree, "--check").returncode == 1
    assert make_migration(tree).returncode == 0
    assert make_migration(tree, "--check").returncode == 0

    sources = b"".join(path.read_bytes() for path in sorted(tree.glob("sql/[0-9]*.sql")))
    assert migrations(tree)[NEXT].read_bytes() == sources


@pytest.mark.parametrize("name", ["procrastinate_stalled.control", "sql/10_prerequisites.sql"])
def test_make_migration_wants_the_same_version_everywhere(tree: Path, name: str) -> None:
    *_, present = migrations(tree)
    set_version(tree, NEXT)
    replace(tree / name, f"'{NEXT}'", f"'{present}'")

    done = make_migration(tree)

    assert done.returncode == 1
    assert f"{name} does not name version {NEXT}" in done.stderr
    assert NEXT not in migrations(tree)


def test_make_migration_does_not_leave_one_of_a_version_that_was_given_up(tree: Path) -> None:
    set_version(tree, "99.0.0")
    make_migration(tree)
    set_version(tree, NEXT)

    done = make_migration(tree)

    assert done.returncode == 1
    assert "is not released, and not of version" in done.stderr


def test_the_extension_has_a_script_from_each_older_version(next_release: Path) -> None:
    *older, newest = migrations(next_release)
    made = subprocess.run(["scripts/extension-scripts"], cwd=next_release, check=True, capture_output=True, text=True)
    names = {Path(script).name for script in made.stdout.split()}
    assert {f"procrastinate_stalled--{version}--{newest}.sql" for version in older} < names
    assert {f"procrastinate_stalled--{version}.sql" for version in (*older, newest)} < names


def test_pg_tle_is_told_the_way_from_each_older_version(database: str, next_release: Path) -> None:
    *older, newest = migrations(next_release)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(PG_TLE)
        psql(database, tle_script())  # of this version

        for _ in range(2):
            script = "import procrastinate_stalled as p; print(p.tle_script())"
            environment = os.environ | {"PYTHONPATH": str(next_release)}
            printed = subprocess.run(
                [sys.executable, "-c", script],
                cwd=next_release,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            psql(database, printed.stdout)

            assert rows(connection, "SELECT default_version FROM pgtle.control") == [{"default_version": newest}]
            scripts = rows(connection, "SELECT source, version FROM pgtle.script WHERE version = %s ORDER BY 1", newest)
            assert scripts == [{"source": source, "version": newest} for source in (*older, None)]
