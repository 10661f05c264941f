"""A server into which `make install` puts the extension, in a copy of PostgreSQL's files."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server import PROJECT, Server, postgresql_program, throwaway_server


@contextmanager
def server_with_extension(project: Path = PROJECT, cron_database: str | None = None) -> Iterator[Server]:
    """Run a server for which `make install` was called in a tree of this project, with pg_cron in a database."""
    with _copy_of_postgresql() as pg_config:
        make_install(project, pg_config)
        former = os.environ.get("PG_CONFIG")
        os.environ["PG_CONFIG"] = str(pg_config)
        try:
            with throwaway_server(cron_database) as server:
                yield server
        finally:
            del os.environ["PG_CONFIG"]
            if former is not None:
                os.environ["PG_CONFIG"] = former


def make_install(project: Path, pg_config: str | Path) -> None:
    """Call `make install` in a tree of this project."""
    command: list[str | Path] = [
        "make",
        "--no-print-directory",
        "--directory",
        project,
        "install",
        f"PG_CONFIG={pg_config}",
    ]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)


@contextmanager
def _copy_of_postgresql() -> Iterator[Path]:
    """Copy the programs and link the rest, for they find their files from where they are; yields pg_config."""
    pg_config = postgresql_program("pg_config")
    asked = subprocess.run(
        [pg_config, "--bindir", "--pkglibdir", "--sharedir"], check=True, stdout=subprocess.PIPE, text=True
    )
    bindir, pkglibdir, sharedir = map(Path, asked.stdout.splitlines())
    prefix = Path(os.path.commonpath([bindir, pkglibdir, sharedir]))
    copy = Path(tempfile.mkdtemp(prefix="procrastinate-stalled-postgresql-"))
    try:
        copy.chmod(0o755)
        shutil.copytree(bindir, copy / bindir.relative_to(prefix))
        shutil.copytree(sharedir, copy / sharedir.relative_to(prefix), copy_function=os.symlink)
        (copy / pkglibdir.relative_to(prefix)).symlink_to(pkglibdir)
        yield copy / bindir.relative_to(prefix) / "pg_config"
    finally:
        shutil.rmtree(copy)
