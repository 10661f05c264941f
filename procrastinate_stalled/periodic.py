"""The sweep as a periodic task of Procrastinate, for servers without pg_cron."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from procrastinate import App, JobContext


def add_periodic_sweep(app: App, cron: str = "*/10 * * * *") -> None:
    """Let the workers of an app run the sweep, one at a time.

    The task is called ``procrastinate_stalled.sweep`` and runs in the queue ``default``: a worker
    must serve that. It has a queueing lock, so that sweeps do not pile up while no worker runs, but
    no lock: a sweep that was lost with its worker would keep all later ones from starting, and so
    from rescuing it. Two sweeps at once are harmless.

    Parameters
    ----------
    app :
        The app, with an asynchronous connector, as workers need it. It may be open or not.
    cron :
        When to sweep, in the syntax of cron; with a sixth field for seconds.

    Raises
    ------
    procrastinate.exceptions.TaskAlreadyRegistered
        The app has the periodic sweep already.
    """

    @app.periodic(cron=cron)
    @app.task(
        name="procrastinate_stalled.sweep",
        queueing_lock="procrastinate_stalled.sweep",
        pass_context=True,
    )
    async def sweep(context: JobContext, timestamp: int) -> None:  # noqa: ARG001
        from procrastinate import PsycopgConnector

        statement = "CALL procrastinate_stalled.sweep()"
        connector = context.app.connector
        if not isinstance(connector, PsycopgConnector):
            await connector.execute_query_async(statement)
            return

        # The procedure commits, so psycopg must not open a transaction around it.
        async with connector.pool.connection() as connection:
            autocommit = connection.autocommit
            await connection.set_autocommit(True)
            try:
                await connection.execute(statement)
            finally:
                await connection.set_autocommit(autocommit)
