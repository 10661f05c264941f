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

_FOREIGN_YOYO_TABLES = """
SELECT namespace.nspname, class.relname
    FROM pg_catalog.pg_class AS class
    JOIN pg_catalog.pg_namespace AS namespace ON namespace.oid = class.relnamespace
    WHERE class.relname = '_yoyo_migration'
        AND class.relkind = 'r'
        AND pg_catalog.has_schema_privilege(namespace.oid, 'USAGE')
        AND pg_catalog.has_table_privilege(class.oid, 'SELECT')
        AND pg_catalog.has_table_privilege(class.oid, 'DELETE')
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
        pending = backend.to_apply(yoyo.read_migrations(f"package:{SCHEMA}:migrations"))
        for migration in pending:
            backend.apply_one(migration)
    return [migration.id for migration in pending]


def uninstall(conninfo: str = "") -> bool:
    """Remove the pg_cron job, the schema and yoyo's record of our migrations, in one transaction.

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
        installed = connection.execute("SELECT pg_catalog.to_regnamespace(%s) IS NOT NULL", [SCHEMA]).fetchone()
        # The first migration creates the schema, so its rollback takes all later ones away as well.
        first = _migration_files()[0]
        connection.execute(first.with_suffix(".rollback.sql").read_bytes())
        removed = installed == (True,)
        for table in connection.execute(_FOREIGN_YOYO_TABLES).fetchall():
            deleted = connection.execute(
                sql.SQL("DELETE FROM {} WHERE migration_id = ANY (%s)").format(sql.Identifier(*table)),
                [[file.stem for file in _migration_files()]],
            )
            removed = removed or deleted.rowcount > 0
    return removed


def migrations_sql() -> str:
    """Return all migrations as one script for psql, which runs them in one transaction."""
    migrations = "\n".join(file.read_text(encoding="utf-8") for file in _migration_files())
    return f"\\set ON_ERROR_STOP on\nBEGIN;\n\n{migrations}\nCOMMIT;\n"


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
        tables = self.connection.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = %s", [SCHEMA]
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

    def apply_one(self, migration: Any, force: bool = False, mark: bool = True) -> None:  # noqa: ARG002
        migration.process_steps(self, "apply")
        self.mark_one(migration, log=False)
