"""What a migration of Django does to install procrastinate_stalled."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.db import router
from django.db.migrations.operations.base import Operation

from procrastinate_stalled.contrib.django.database import is_procrastinates

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

logger = logging.getLogger(__name__)

# The script changes the search_path until the end of the transaction, in which Django records the migration.
_WITH_SEARCH_PATH_RESTORED = """\
SELECT pg_catalog.set_config(
    'procrastinate_stalled.search_path_of_django', pg_catalog.current_setting('search_path'), true
);

{script}
SELECT pg_catalog.set_config(
    'search_path', pg_catalog.current_setting('procrastinate_stalled.search_path_of_django'), true
);
"""


class Install(Operation):
    """Create the schema ``procrastinate_stalled``, or bring it up to date; backwards, remove it.

    It does so in the database of Procrastinate only, unless a router forbids it there.
    """

    reversible = True
    reduces_to_sql = True

    def state_forwards(self, app_label: str, state: Any) -> None:
        """Change nothing: models have operations of their own."""

    def database_forwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:  # noqa: ARG002
        """Run the newest migration, which brings nothing, or any older version, to its own version."""
        from procrastinate_stalled.installation import migration_sql

        _run(app_label, schema_editor, migration_sql())

    def database_backwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:  # noqa: ARG002
        """Remove the schema with all that is in it, and the pg_cron job if pg_cron is in this database."""
        from procrastinate_stalled.installation import rollback_sql

        _run(app_label, schema_editor, rollback_sql())

    def describe(self) -> str:
        """Return what `migrate --plan` prints."""
        return "Install the schema procrastinate_stalled into the database of Procrastinate"


class Upgrade(Install):
    """Bring the schema ``procrastinate_stalled`` up to date; backwards, leave it as it is.

    It belongs into every migration after the first one: to take that one back must remove no rules and no records.
    """

    def database_backwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        """Change nothing."""

    def describe(self) -> str:
        """Return what `migrate --plan` prints."""
        return "Bring the schema procrastinate_stalled in the database of Procrastinate up to date"


def _run(app_label: str, schema_editor: Any, script: str) -> None:
    alias = schema_editor.connection.alias
    if not is_procrastinates(alias) or not router.allow_migrate(alias, app_label):
        return
    with _logged_warnings(schema_editor):
        # In one query, so that it is one transaction also where Django has begun none.
        schema_editor.execute(_WITH_SEARCH_PATH_RESTORED.format(script=script), params=None)


@contextmanager
def _logged_warnings(schema_editor: Any) -> Iterator[None]:
    """Log the warnings of the server. psycopg 2 and Django pass over them."""
    connection = schema_editor.connection.connection
    if schema_editor.collect_sql or not hasattr(connection, "add_notice_handler"):
        yield
        return
    connection.add_notice_handler(_log_warning)
    try:
        yield
    finally:
        connection.remove_notice_handler(_log_warning)


def _log_warning(diagnostic: psycopg.errors.Diagnostic) -> None:
    if diagnostic.severity_nonlocalized == "WARNING":
        logger.warning("%s\n%s", diagnostic.message_primary, diagnostic.message_hint or "")
