"""Database routers, as users write them."""

from typing import Any


class NothingButProcrastinate:
    """Keeps the database `jobs` for Procrastinate, without a thought of other apps."""

    def allow_migrate(self, db: str, app_label: str, **_hints: Any) -> bool:
        return app_label == "procrastinate" if db == "jobs" else app_label != "procrastinate"


class AllModelsInDefault:
    """Sends all models to the database `default`."""

    def db_for_read(self, _model: Any, **_hints: Any) -> str:
        return "default"

    def db_for_write(self, _model: Any, **_hints: Any) -> str:
        return "default"
