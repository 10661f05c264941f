"""`make demo` tells the truth by its exit code, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server import PROJECT
from tests.wait import wait_until


@contextmanager
def demo(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the demo, which makes its temporary files in this folder."""
    with subprocess.Popen(
        [sys.executable, "-m", "demo"],
        cwd=PROJECT,
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that the user postgres may enter too, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_the_demo_shows_the_job_rescued() -> None:
    with temporary_folder() as folder, demo(folder) as process:
        shown, _ = process.communicate(timeout=180)
        assert process.returncode == 0, shown
        assert "Rescued, and nobody touched it." in shown
        assert "succeeded" in shown
        assert list(folder.iterdir()) == []


def test_an_interrupted_demo_leaves_nothing_behind() -> None:
    with temporary_folder() as folder, demo(folder) as process:

        def a_worker_runs() -> bool:
            return any(folder.glob("*/worker-1.log"))

        wait_until(a_worker_runs, "the first worker has started", seconds=60)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
        assert process.returncode == 130, shown
        assert list(folder.iterdir()) == []
