"""Procrastinate's own `JobManager`, to compare with."""

from typing import Any

from procrastinate import SyncPsycopgConnector
from procrastinate.manager import JobManager
from procrastinate.sync_psycopg_connector import wrap_exceptions
from psycopg import Cursor
from psycopg.rows import DictRow, dict_row

from tests.jobs import Connection


class _OneConnection(SyncPsycopgConnector):
    """Runs the queries on one connection, in its transaction, so that `now()` and the rows are the same for both."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    @wrap_exceptions()
    def _execute(self, query: Any, arguments: dict[str, Any]) -> Cursor[DictRow]:
        cursor = self.connection.cursor(row_factory=dict_row)
        return cursor.execute(query, self._wrap_json(arguments))

    async def execute_query_async(self, query: Any, **arguments: Any) -> None:
        self._execute(query, arguments)

    async def execute_query_all_async(self, query: Any, **arguments: Any) -> list[dict[str, Any]]:
        return self._execute(query, arguments).fetchall()


def job_manager(connection: Connection) -> JobManager:
    """Return a JobManager that runs its queries in the transaction of the connection."""
    return JobManager(_OneConnection(connection))
