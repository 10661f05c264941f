"""Find the stalled jobs of Procrastinate and put them back, inside PostgreSQL.

The work is done by SQL functions in the schema ``procrastinate_stalled``. This package installs
them (`install`, `uninstall`), calls them (`Stalled`, `AsyncStalled`) and runs them from a
Procrastinate worker where there is no pg_cron (`add_periodic_sweep`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from procrastinate_stalled.client import Stalled
    from procrastinate_stalled.client_async import AsyncStalled
    from procrastinate_stalled.installation import install, psql_script, tle_script, uninstall
    from procrastinate_stalled.periodic import add_periodic_sweep
    from procrastinate_stalled.rows import ExplainedJob, Rescue, Rule, StalledJob, Status, TaskRuntime, Worker

    __version__: str

__all__ = [
    "AsyncStalled",
    "ExplainedJob",
    "Rescue",
    "Rule",
    "Stalled",
    "StalledJob",
    "Status",
    "TaskRuntime",
    "Worker",
    "add_periodic_sweep",
    "install",
    "psql_script",
    "tle_script",
    "uninstall",
]

_MODULES = {
    "AsyncStalled": "client_async",
    "ExplainedJob": "rows",
    "Rescue": "rows",
    "Rule": "rows",
    "Stalled": "client",
    "StalledJob": "rows",
    "Status": "rows",
    "TaskRuntime": "rows",
    "Worker": "rows",
    "add_periodic_sweep": "periodic",
    "install": "installation",
    "psql_script": "installation",
    "tle_script": "installation",
    "uninstall": "installation",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: a worker that only adds the periodic sweep loads no yoyo, and --help
    # no psycopg.
    if name == "__version__":
        return import_module("importlib.metadata").version("procrastinate-stalled")
    if name in _MODULES:
        return getattr(import_module(f"procrastinate_stalled.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
