"""Makes procrastinate_stalled/client.py from client_async.py: python -m scripts.generate_sync_client."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import unasync  # type: ignore[import-untyped]

PACKAGE = Path(__file__).parent.parent / "procrastinate_stalled"

SYNC_NAMES = {
    "AsyncConnection": "Connection",
    "AsyncCursor": "Cursor",
    "AsyncStalled": "Stalled",
}


def generate() -> str:
    """Return the source of the synchronous client."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "client_async.py")
        shutil.copy(PACKAGE / "client_async.py", copy)
        unasync.unasync_files([str(copy)], [unasync.Rule("/client_async.py", "/client.py", SYNC_NAMES)])
        _docstring, code = copy.with_name("client.py").read_text().split('"""\n\n', 1)
    return (
        '"""The SQL functions as methods, for synchronous connections.\n\n'
        "Generated from client_async.py by scripts/generate_sync_client.py: change that file and run the script.\n"
        '"""\n\n' + code
    )


if __name__ == "__main__":
    (PACKAGE / "client.py").write_text(generate())
