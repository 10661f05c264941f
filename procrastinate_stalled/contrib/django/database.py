"""In which of Django's databases Procrastinate lives."""

from __future__ import annotations

from typing import Any

import psycopg
from django.conf import settings
from django.db import connections
from psycopg.conninfo import make_conninfo


def database_alias() -> str:
    """Return the alias of Procrastinate's database: the setting ``PROCRASTINATE_DATABASE_ALIAS``."""
    alias: str = getattr(settings, "PROCRASTINATE_DATABASE_ALIAS", "default")
    return alias


def is_procrastinates(alias: str) -> bool:
    """Return whether an alias is that of Procrastinate's database, or another one for the same database.

    Both share one record of applied migrations, so what is recorded by one of them must have been done.
    """
    return alias == database_alias() or _address(alias) == _address(database_alias())


def _address(alias: str) -> tuple[Any, ...]:
    database = connections[alias].settings_dict
    return (database["HOST"], str(database["PORT"]), database["NAME"], database["OPTIONS"].get("service"))


def conninfo() -> str:
    """Return the address of Procrastinate's database as libpq understands it, with the password if Django has one."""
    connection = connections[database_alias()]
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    given = {name: value for name, value in connection.get_connection_params().items() if name in known}
    role = connection.settings_dict["OPTIONS"].get("assume_role")
    if role:
        # What stands in "options" is split at spaces.
        escaped = role.replace("\\", "\\\\").replace(" ", "\\ ")
        given["options"] = f"{given.get('options', '')} -c role={escaped}".strip()
    return make_conninfo(**given)
