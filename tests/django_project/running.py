"""Runs `manage.py` of the project against databases of a test server."""

import json
import os
import subprocess
import sys
from typing import Any

from psycopg.conninfo import conninfo_to_dict

from tests.server import PROJECT


def django_database(conninfo: str, **settings: Any) -> dict[str, Any]:
    """Return an entry of the setting DATABASES."""
    address = conninfo_to_dict(conninfo)
    return {
        "HOST": address["host"],
        "PORT": str(address["port"]),
        "USER": address["user"],
        "NAME": address["dbname"],
        **settings,
    }


def environment(databases: dict[str, dict[str, Any]], **settings: Any) -> dict[str, str]:
    """Return the variables that `tests.django_project.settings` reads."""
    return {"PROJECT_DATABASES": json.dumps(databases), "PROJECT_SETTINGS": json.dumps(settings)}


def manage(
    databases: dict[str, dict[str, Any]], *arguments: str, exit_code: int = 0, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command of `manage.py`; it must end with the exit code.

    Parameters
    ----------
    databases :
        The setting DATABASES, by alias: see `django_database`.
    settings :
        Other settings of Django.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.django_project.manage", *arguments],
        cwd=PROJECT,
        # Of the addresses that others use, it must use none.
        env=os.environ | {"DATABASE_URL": "dbname=of_others", "COLUMNS": "100"} | environment(databases, **settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == exit_code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
