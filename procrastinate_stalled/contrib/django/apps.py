"""The app, as Django knows it."""

from django.apps import AppConfig


class ProcrastinateStalledConfig(AppConfig):
    """Belongs into ``INSTALLED_APPS`` as ``procrastinate_stalled.contrib.django``."""

    name = "procrastinate_stalled.contrib.django"
    label = "procrastinate_stalled"
    verbose_name = "Stalled jobs of Procrastinate"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the system checks."""
        from procrastinate_stalled.contrib.django import checks  # noqa: F401
