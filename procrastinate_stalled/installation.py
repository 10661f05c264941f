"""Apply the migrations with yoyo, and take them back.

An install is one transaction: all pending migrations, and yoyo's record of them. Whatever
interrupts it leaves nothing behind, and it passes through a connection pooler.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import psycopg
import yoyo  # type: ignore[import-untyped]
from psycopg import sql
from yoyo import internalmigrations
from yoyo.backends.core.postgresql import PostgresqlPsycopgBackend  # type: ignore[import-untyped]
from yoyo.migrations import default_migration_table  # type: ignore[import-untyped]

SCHEMA = "procrastinate_stalled"
APPLICATION_NAME = "procrastinate-stalled"

logger = logging.getLogger(__name__)

_WAIT_FOR_OTHERS = """
DO $$
BEGIN
    -- Ends with the transaction, however that ends: nothing can stay locked.
    PERFORM pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('procrastinate_stalled',
    0));
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION USING
        ERRCODE = 'lock_not_available',
        MESSAGE = 'another install or uninstall is running',
        DETAIL = 'It did not end within 10 seconds.',
        HINT = 'Nothing was changed. Try again when it has ended.';
END;
$$
"""

# Nobody's functions and operators but PostgreSQL's; returns the path until then.
_HIDE_SEARCH_PATH = """
WITH path AS MATERIALIZED (SELECT pg_catalog.current_setting('search_path') AS former)
SELECT former
    FROM path
    WHERE pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true) IS NOT NULL
"""

_FOREIGN_YOYO_TABLES = """
SELECT namespace.nspname, class.relname
    FROM pg_catalog.pg_class AS class
    JOIN pg_catalog.pg_namespace AS namespace ON namespace.oid = class.relnamespace
    WHERE class.relname = '_yoyo_migration'
        AND class.relkind = 'r'
        -- A trigger of somebody else's table would run with our rights.
        AND pg_catalog.pg_get_userbyid(class.relowner) = current_user
"""


_TLE_SCRIPT = """\
\\set ON_ERROR_STOP on
DO $pgtle$
DECLARE
    script CONSTANT text := $migration$
{script}$migration$;
    older text;
BEGIN
    IF NOT EXISTS (SELECT FROM pgtle.available_extensions() WHERE name = 'procrastinate_stalled') THEN
        PERFORM pgtle.install_extension(
            'procrastinate_stalled',
            '{newest}',
            'Finds the stalled jobs of Procrastinate and retries them inside the database',
            script
        );
    ELSIF NOT EXISTS (
        SELECT FROM pgtle.available_extension_versions()
        WHERE name = 'procrastinate_stalled' AND version = '{newest}'
    ) THEN
        PERFORM pgtle.install_extension_version_sql('procrastinate_stalled', '{newest}', script);
        FOREACH older IN ARRAY ARRAY[{older}]::text[] LOOP
            PERFORM pgtle.install_update_path('procrastinate_stalled', older, '{newest}', script);
        END LOOP;
        PERFORM pgtle.set_default_version('procrastinate_stalled', '{newest}');
    END IF;
END;
$pgtle$;
"""


def install(conninfo: str = "") -> list[str]:
    """Create the schema ``procrastinate_stalled``, or bring it up to date, in one transaction.

    Needs a role that owns Procrastinate's tables and may create a schema in the database. Of
    several schemas with a Procrastinate the first one in the connection's search_path is served.
    Called again, it changes nothing.

    Parameters
    ----------
    conninfo :
        Any address that libpq understands: a URL, keywords and values, or nothing for the ``PG*``
        variables.

    Returns
    -------
    :
        The names of the migrations that were applied. Empty: everything was there already.

    Raises
    ------
    psycopg.errors.ObjectNotInPrerequisiteState
        Procrastinate is absent, or older than 3.1.
    psycopg.errors.InvalidSchemaName
        Several schemas have a Procrastinate, and none of them is in the search_path.
    psycopg.errors.InsufficientPrivilege
        The role may not create the schema, or not use Procrastinate's tables.
    psycopg.errors.LockNotAvailable
        Another install has been running for 10 seconds.
    psycopg.OperationalError
        The database cannot be reached.
    """
    with _Backend(conninfo, default_migration_table) as backend, backend.transaction():
        _prepare(backend.connection)
        path = backend.connection.execute(_HIDE_SEARCH_PATH).fetchone()
        pending = list(backend.to_apply(yoyo.read_migrations(f"package:{SCHEMA}:migrations")))
        # Each migration brings nothing, or any older version, to its own version: the newest is enough.
        for migration in pending[-1:]:
            # Which Procrastinate is meant can depend on it.
            backend.connection.execute("SELECT pg_catalog.set_config('search_path', %s, true)", path)
            migration.process_steps(backend, "apply")
            backend.connection.execute(_HIDE_SEARCH_PATH)
        for migration in pending:
            backend.mark_one(migration, log=False)
    return [migration.id for migration in pending]


def uninstall(conninfo: str = "") -> bool:
    """Remove the pg_cron job, the schema and yoyo's record of our migrations, in one transaction.

    Views of yours on what is in the schema are dropped too.

    It does not matter how the schema was installed. The tables that the plain ``yoyo`` command made
    for itself stay, without our migrations: they may be your application's. Where pg_cron lives in
    another database, the job can only be removed there; a warning in the log of this module has the
    statement. Called again, it changes nothing.

    Parameters
    ----------
    conninfo :
        As for `install`.

    Returns
    -------
    :
        Whether there was anything to remove.

    Raises
    ------
    psycopg.errors.InsufficientPrivilege
        The schema belongs to another role.
    psycopg.errors.LockNotAvailable
        An install has been running for 10 seconds.
    psycopg.OperationalError
        The database cannot be reached.
    """
    with _connect(conninfo) as connection, connection.transaction():
        connection.add_notice_handler(_log_warning)
        _prepare(connection)
        connection.execute(_HIDE_SEARCH_PATH)
        installed = connection.execute("SELECT pg_catalog.to_regnamespace(%s) IS NOT NULL", [SCHEMA]).fetchone()
        connection.execute(rollback_sql().encode())
        unscheduled = connection.execute(
            "SELECT pg_catalog.current_setting('procrastinate_stalled.unscheduled', true)"
        ).fetchone()
        removed = installed == (True,) or unscheduled == ("true",)
        for table in connection.execute(_FOREIGN_YOYO_TABLES).fetchall():
            deleted = connection.execute(
                sql.SQL("DELETE FROM {} WHERE migration_id = ANY (%s)").format(sql.Identifier(*table)),
                [[file.stem for file in _migration_files()]],
            )
            removed = removed or deleted.rowcount > 0
    return removed


def migration_sql() -> str:
    """Return the newest migration, which brings nothing, or any older version, to its own version.

    It must run in one transaction, whose search_path it changes.
    """
    return _migration_files()[-1].read_text(encoding="utf-8")


def rollback_sql() -> str:
    """Return the script that removes everything, however it was installed."""
    # The first migration creates the schema, so its rollback takes all later ones away as well.
    return _migration_files()[0].with_suffix(".rollback.sql").read_text(encoding="utf-8")


def psql_script() -> str:
    """Return the newest migration as a script for psql, which runs it in one transaction."""
    return f"\\set ON_ERROR_STOP on\nBEGIN;\n\n{migration_sql()}\nCOMMIT;\n"


def tle_script() -> str:
    """Return a script for psql that makes the extension available in a database that has pg_tle.

    After it: ``CREATE EXTENSION procrastinate_stalled``, or, where an older version was made
    available before, ``ALTER EXTENSION procrastinate_stalled UPDATE``.
    """
    *older, newest = [file.stem.rpartition("_")[2] for file in _migration_files()]
    return _TLE_SCRIPT.format(
        script=migration_sql(),
        newest=newest,
        older=", ".join(f"'{version}'" for version in older),
    )


def _migration_files() -> list[Path]:
    files = Path(__file__).with_name("migrations").glob("*.sql")
    return sorted(file for file in files if not file.name.endswith(".rollback.sql"))


def _connect(conninfo: str) -> psycopg.Connection[Any]:
    # Prepared statements do not survive a pooler that changes servers between transactions.
    return psycopg.connect(
        conninfo, autocommit=True, prepare_threshold=None, fallback_application_name=APPLICATION_NAME
    )


def _prepare(connection: psycopg.Connection[Any]) -> None:
    """Begin the one transaction of an install or uninstall."""
    # Whoever waited for another one must see what it did, which a snapshot taken before the wait
    # does not show.
    connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED READ WRITE")
    connection.execute("SET LOCAL lock_timeout = '10s'")
    connection.execute(_WAIT_FOR_OTHERS)


def _log_warning(diagnostic: psycopg.errors.Diagnostic) -> None:
    if diagnostic.severity_nonlocalized == "WARNING":
        logger.warning("%s\n%s", diagnostic.message_primary, diagnostic.message_hint or "")


class _Backend(PostgresqlPsycopgBackend):  # type: ignore[misc]
    """yoyo's backend for psycopg, which works inside of one transaction and keeps its tables in our schema.

    yoyo itself takes a lock that a killed process leaves behind, and records a migration after its
    commit.
    """

    def connect(self, dburi: str) -> psycopg.Connection[Any]:
        return _connect(dburi)

    def list_tables(self, **_kwargs: Any) -> list[str]:
        # Only our own: a view of somebody who made a schema of this name first would run with our rights.
        tables = self.connection.execute(
            """
            SELECT relname
                FROM pg_catalog.pg_class
                WHERE relnamespace = pg_catalog.to_regnamespace(%s)
                    AND relkind = 'r'
                    AND pg_catalog.pg_get_userbyid(relowner) = current_user
            """,
            [SCHEMA],
        )
        return [table for (table,) in tables]

    def quote_identifier(self, s: str) -> str:
        quoted: str = super().quote_identifier(s)
        is_table = s in (self.migration_table, self.log_table, self.version_table)
        return f"{SCHEMA}.{quoted}" if is_table else quoted

    def ensure_internal_schema_updated(self) -> None:
        if internalmigrations.needs_upgrading(self):
            internalmigrations.upgrade(self)

    def get_applied_migration_hashes(self) -> list[str]:
        # Asked before the first migration has created the schema.
        if self.migration_table not in self.list_tables():
            return []
        hashes: list[str] = super().get_applied_migration_hashes()
        return hashes
