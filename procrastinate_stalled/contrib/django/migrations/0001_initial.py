"""Install the schema procrastinate_stalled, and tell Django of the tables that it shows."""

from datetime import timedelta

from django.db import migrations, models

from procrastinate_stalled.contrib.django.operations import Install


class Migration(migrations.Migration):
    """Needs the migration of Procrastinate 3.1 that gave its workers heartbeats."""

    initial = True
    dependencies = (("procrastinate", "0035_post_add_heartbeat"),)
    operations = (
        Install(),
        migrations.CreateModel(
            name="Rule",
            fields=[
                ("name", models.TextField(primary_key=True, serialize=False)),
                ("position", models.IntegerField(default=100)),
                ("enabled", models.BooleanField(default=True)),
                ("expires_at", models.DateTimeField(blank=True, null=True)),
                ("queue_name", models.TextField(blank=True, null=True)),
                ("task_name", models.TextField(blank=True, null=True)),
                ("args", models.JSONField(blank=True, null=True)),
                ("heartbeat_timeout", models.DurationField(blank=True, default=timedelta(minutes=5), null=True)),
                ("run_timeout", models.DurationField(blank=True, null=True)),
                (
                    "action",
                    models.TextField(
                        choices=[("retry", "retry"), ("fail", "fail"), ("ignore", "ignore")], default="retry"
                    ),
                ),
                ("max_rescues", models.IntegerField(blank=True, default=3, null=True)),
                ("retry_delay", models.DurationField(default=timedelta(0))),
                ("retry_backoff", models.FloatField(default=2)),
                ("retry_queue_name", models.TextField(blank=True, null=True)),
                ("retry_priority", models.IntegerField(blank=True, null=True)),
                ("on_duplicate", models.TextField(choices=[("fail", "fail"), ("wait", "wait")], default="fail")),
                ("note", models.TextField(blank=True, null=True)),
            ],
            options={
                "managed": False,
                "db_table": '"procrastinate_stalled"."rules"',
                "ordering": ("position", "name"),
                "base_manager_name": "objects",
            },
        ),
        migrations.CreateModel(
            name="Rescue",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("rescued_at", models.DateTimeField()),
                ("job_id", models.BigIntegerField()),
                ("queue_name", models.TextField()),
                ("task_name", models.TextField()),
                ("action", models.TextField()),
                ("reason", models.TextField()),
                ("detail", models.TextField(blank=True, null=True)),
                ("rule_name", models.TextField(blank=True, null=True)),
                ("worker_id", models.BigIntegerField(blank=True, null=True)),
                ("last_heartbeat", models.DateTimeField(blank=True, null=True)),
                ("started_at", models.DateTimeField(blank=True, null=True)),
                ("attempts", models.IntegerField()),
                ("scheduled_at", models.DateTimeField(blank=True, null=True)),
                ("rescued_by", models.TextField()),
            ],
            options={
                "managed": False,
                "db_table": '"procrastinate_stalled"."rescues"',
                "ordering": ("-id",),
                "base_manager_name": "objects",
                "default_permissions": ("view",),
            },
        ),
        migrations.CreateModel(
            name="Sweep",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("started_at", models.DateTimeField()),
                ("duration", models.DurationField(blank=True, null=True)),
                ("doing", models.IntegerField()),
                ("retried", models.IntegerField()),
                ("failed", models.IntegerField()),
                ("aborted", models.IntegerField()),
                ("waiting", models.IntegerField()),
                ("held", models.IntegerField()),
                ("held_reason", models.TextField(blank=True, null=True)),
                ("latest_heartbeat", models.DateTimeField(blank=True, null=True)),
                ("newest_worker_id", models.BigIntegerField(blank=True, null=True)),
                ("error", models.TextField(blank=True, null=True)),
            ],
            options={
                "managed": False,
                "db_table": '"procrastinate_stalled"."sweeps"',
                "ordering": ("-id",),
                "base_manager_name": "objects",
                "default_permissions": ("view",),
            },
        ),
    )
