"""The application of the demo: a Procrastinate app with one task."""

import asyncio
import os

from procrastinate import App, PsycopgConnector

app = App(
    connector=PsycopgConnector(conninfo=os.environ["DATABASE_URL"]),
    worker_defaults={"update_heartbeat_interval": 1},  # seconds
)


@app.task
async def send_newsletter(edition: int) -> None:
    """Work for five seconds."""
    print(f"Sending edition {edition} ...")
    await asyncio.sleep(5)
    print(f"Edition {edition} is sent.")
