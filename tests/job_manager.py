"""Procrastinate's own `JobManager`, to compare with."""

from typing import Any

from procrastinate import SyncPsycopgConnector
from procrastinate.manager import JobManager

from tests.jobs import Connection


class _OneConnection(SyncPsycopgConnector):
    """Runs the queries on one connection, in its transaction, so that `now()` and the rows are the same for both."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    async def execute_query_async(self, query: Any, **arguments: Any) -> None:
        self.execute_query_one_with_connection(self.connection, query, **arguments)

    async def execute_query_all_async(self, query: Any, **arguments: Any) -> list[dict[str, Any]]:
        return self.execute_query_all_with_connection(self.connection, query, **arguments)


def job_manager(connection: Connection) -> JobManager:
    """Return a JobManager that runs its queries in the transaction of the connection."""
    return JobManager(_OneConnection(connection))
