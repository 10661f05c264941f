"""The app of the shop that the documents tell of. Its worker is started as one of `tests.tasks` is."""

import asyncio
import json
import os

from procrastinate import App, PsycopgConnector

app = App(
    connector=PsycopgConnector(conninfo=os.environ.get("DATABASE_URL", "")),
    worker_defaults=json.loads(os.environ.get("WORKER_OPTIONS", "{}")),
)


@app.task(name="shop.emails.newsletter")
async def newsletter() -> None:
    """Work for three seconds."""
    await asyncio.sleep(3)


@app.task(name="shop.reports.build")
async def build() -> None:
    """Work for longer than a test does."""
    await asyncio.sleep(3600)
