"""The models and the admin of the Django app, through Django's test client.

Django is set up once in a process, for these tests alone; they lend it their databases.
"""

import html
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import django
import psycopg
import pytest
from django.core.management import call_command
from django.db import connections, transaction
from django.test import Client, override_settings
from psycopg.conninfo import conninfo_to_dict

from tests.django_project.running import django_database, environment
from tests.jobs import Connection, add_stalled_job, add_worker, insert, pretend_old_server, rows
from tests.server import Server, database_name


@dataclass(frozen=True)
class Project:
    """A project whose Procrastinate lives in the database `alias`; who uses `client` is its superuser."""

    alias: str
    database: str
    """The address of the database of Procrastinate."""
    connection: Connection
    """Such a connection, with autocommit."""
    client: Client

    def get(self, path: str) -> str:
        """The text of a page of our part of the admin."""
        response = self.client.get(f"/procrastinate_stalled/{path}", follow=True)
        assert response.status_code == 200
        return html.unescape(re.sub(r"<[^>]*>", "", response.content.decode()))

    def post(self, path: str, form: Mapping[str, object], status: int = 302) -> str:
        """Post a form to a page; 302: it was accepted. Returns the errors of the form."""
        response = self.client.post(f"/procrastinate_stalled/{path}", form)
        assert response.status_code == status, response.content.decode()
        errors = re.findall(r'<ul class="errorlist[^>]*>(.*?)</ul>', response.content.decode(), re.DOTALL)
        return html.unescape(re.sub(r"<[^>]*>", "\n", "".join(errors)))

    def rules(self) -> dict[str, dict[str, Any]]:
        """The rules by name."""
        return {rule["name"]: rule for rule in rows(self.connection, "SELECT * FROM procrastinate_stalled.rules")}


@pytest.fixture(scope="session")
def databases_of_django(server: Server) -> None:
    """Set Django up, and make the databases to copy from: `admin_default`, and `admin_elsewhere` without our schema."""
    template = server.create_database("admin_default")
    database = django_database(template)
    time_zone = os.environ.get("TZ")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "tests.django_project.settings")
        for name, value in environment({"default": database, "jobs": database}).items():
            monkeypatch.setenv(name, value)
        django.setup()
        assert connections["default"].settings_dict["NAME"] == "admin_default"
    # Django has set the time zone of the whole process.
    os.environ.pop("TZ", None)
    if time_zone is not None:
        os.environ["TZ"] = time_zone
    time.tzset()

    from django.contrib.auth.models import User

    call_command("migrate", verbosity=0)
    User.objects.create_superuser("superuser")
    connections.close_all()
    with psycopg.connect(template) as connection:
        pretend_old_server(connection)
    with psycopg.connect(server.create_database("admin_elsewhere", "admin_default"), autocommit=True) as connection:
        connection.execute("DROP SCHEMA procrastinate_stalled CASCADE")


@pytest.fixture(params=["default", "jobs"])
def project(request: pytest.FixtureRequest, server: Server, databases_of_django: None) -> Iterator[Project]:  # noqa: ARG001
    """A project with one database, or with one of its own for Procrastinate and routers that do not know of that."""
    from django.contrib.auth.models import User

    alias = request.param
    with ExitStack() as stack:
        database = stack.enter_context(server.database("admin_default"))
        addresses = {"default": database, "jobs": database}
        settings: dict[str, Any] = {"PROCRASTINATE_DATABASE_ALIAS": alias}
        if alias == "jobs":
            addresses["default"] = stack.enter_context(server.database("admin_elsewhere"))
            settings["DATABASE_ROUTERS"] = ["tests.django_project.routers.AllModelsInDefault"]
        for name, conninfo in addresses.items():
            connections[name].settings_dict["NAME"] = database_name(conninfo)
        stack.callback(connections.close_all)
        stack.enter_context(override_settings(**settings))
        client = Client()
        client.force_login(User.objects.get())
        yield Project(alias, database, stack.enter_context(psycopg.connect(database, autocommit=True)), client)


NEW_RULE = {
    "position": 100,
    "enabled": "on",
    "heartbeat_timeout": "5 min",
    "action": "retry",
    "max_rescues": 3,
    "retry_delay": "0",
    "retry_backoff": 2,
    "on_duplicate": "fail",
}


# The models.


@pytest.mark.parametrize("table", ["rules", "rescues", "sweeps"])
def test_a_model_has_the_columns_of_its_table(project: Project, table: str) -> None:
    from procrastinate_stalled.contrib.django import models

    model: Any = {"rules": models.Rule, "rescues": models.Rescue, "sweeps": models.Sweep}[table]
    types = {
        "bigint": "BigIntegerField",
        "boolean": "BooleanField",
        "double precision": "FloatField",
        "integer": "IntegerField",
        "interval": "DurationField",
        "jsonb": "JSONField",
        "text": "TextField",
        "timestamp with time zone": "DateTimeField",
    }

    columns = rows(
        project.connection,
        """
        SELECT attname AS name, format_type(atttypid, NULL) AS type, NOT attnotnull AS nullable
            FROM pg_attribute
            WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
            ORDER BY attnum
        """,
        f"procrastinate_stalled.{table}",
    )

    assert [
        (field.column, field.get_internal_type().replace("BigAuto", "BigInteger"), field.null)
        for field in model._meta.concrete_fields
    ] == [(column["name"], types[column["type"]], column["nullable"]) for column in columns]


def test_the_defaults_of_a_rule_are_those_of_the_table(project: Project) -> None:
    from procrastinate_stalled.contrib.django.models import Rule

    Rule.objects.create(name="of Django")
    insert(project.connection, "rules", name="of PostgreSQL")

    rules = project.rules()
    assert rules["of Django"] | {"name": "of PostgreSQL"} == rules["of PostgreSQL"]


def test_models_are_read_and_written_where_procrastinate_lives_whatever_routers_say(project: Project) -> None:
    from procrastinate_stalled.contrib.django.models import Rescue, Rule, Sweep

    assert list(Rescue.objects.all()) == list(Sweep.objects.all()) == []
    rule = Rule(name="mine", args={"a": [1, None]}, expires_at=datetime(2100, 1, 1, tzinfo=UTC))
    rule.save()
    rule.note = "new"
    rule.save(update_fields=["note"])
    rule.refresh_from_db()
    assert project.rules()["mine"]["args"] == rule.args == {"a": [1, None]}
    assert project.rules()["mine"]["note"] == rule.note == "new"
    assert project.rules()["mine"]["expires_at"] == rule.expires_at
    assert str(rule) == "mine"

    rule.delete()
    Rule.objects.filter(name="default").update(max_rescues=None)

    assert project.rules().keys() == {"default"}
    assert project.rules()["default"]["max_rescues"] is None


def test_asking_whether_a_rule_is_accepted_changes_nothing(project: Project) -> None:
    from procrastinate_stalled.contrib.django.models import Rule

    before = project.rules()
    rule = Rule.objects.get(name="default")
    rule.max_rescues = 7
    rule.full_clean()
    Rule(name="new").full_clean()

    with transaction.atomic(using=project.alias):
        rule.full_clean()
    assert project.rules() == before


# The migration, within a transaction of somebody else.


def test_no_migration_but_the_first_removes_the_schema_when_it_is_taken_back(project: Project) -> None:
    from django.db.migrations.loader import MigrationLoader

    from procrastinate_stalled.contrib.django.operations import Install, Upgrade

    operations = {
        name: [type(operation) for operation in migration.operations if isinstance(operation, Install)]
        for (app, name), migration in MigrationLoader(connections[project.alias]).disk_migrations.items()
        if app == "procrastinate_stalled"
    }

    assert operations == {name: [Install if name == "0001_initial" else Upgrade] for name in operations}
    assert "0001_initial" in operations


@pytest.mark.parametrize("direction", ["database_forwards", "database_backwards"])
def test_the_search_path_is_as_before_after_the_script(project: Project, direction: str) -> None:
    from procrastinate_stalled.contrib.django.operations import Install

    connection = connections[project.alias]
    with connection.cursor() as cursor:
        cursor.execute("SET search_path = public, other")
        with connection.schema_editor() as schema_editor:
            getattr(Install(), direction)("procrastinate_stalled", schema_editor, None, None)
            cursor.execute("SHOW search_path")
            within = cursor.fetchone()
        cursor.execute("SHOW search_path")
        assert (within, cursor.fetchone()) == (("public, other",), ("public, other",))


def test_the_script_is_one_transaction_also_where_django_has_begun_none(project: Project) -> None:
    from procrastinate_stalled.contrib.django.operations import Install

    project.connection.execute("DROP SCHEMA procrastinate_stalled CASCADE")

    with connections[project.alias].schema_editor(atomic=False) as schema_editor:
        Install().database_forwards("procrastinate_stalled", schema_editor, None, None)

    assert project.rules().keys() == {"default"}


def test_a_warning_of_the_server_is_logged(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    from procrastinate_stalled.contrib.django.operations import Install

    with connections[project.alias].schema_editor() as schema_editor:
        schema_editor.execute("SET LOCAL cron.database_name = 'elsewhere'")
        Install().database_backwards("procrastinate_stalled", schema_editor, None, None)

    assert "was not removed: pg_cron is not in database" in caplog.text
    assert "\nIn the database where pg_cron lives: " in caplog.text


def test_the_command_gets_the_whole_address_of_django(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from procrastinate_stalled.contrib.django.database import conninfo

    database = connections[project.alias].settings_dict
    monkeypatch.setitem(database, "PASSWORD", "it's a \\ secret")
    monkeypatch.setitem(
        database,
        "OPTIONS",
        {"sslmode": "prefer", "options": "-c search_path=a", "isolation_level": 2, "pool": False, "assume_role": "r"},
    )

    address = conninfo_to_dict(conninfo())

    assert {name: address.get(name) for name in ("dbname", "password", "sslmode", "options")} == {
        "dbname": database_name(project.database),
        "password": "it's a \\ secret",
        "sslmode": "prefer",
        "options": "-c search_path=a -c role=r",
    }


# Rules in the admin.


def test_the_list_of_rules_shows_which_jobs_and_when_they_count_as_stalled(project: Project) -> None:
    insert(
        project.connection,
        "rules",
        name="reports",
        queue_name="of reports",
        task_name="shop.%",
        heartbeat_timeout=None,
        run_timeout="1 day 2 hours 30 minutes 1.5 seconds",
        action="fail",
    )

    page = project.get("rule/")

    for text in ("default", "5 min", "reports", "of reports", "shop.%", "never", "1 d 2 h 30 min 1.5 s", "fail"):
        assert text in page
    assert "default" not in project.get("rule/?action__exact=fail")
    assert "1 d 2 h" in project.get("rule/?q=shop")
    assert "1 d 2 h" not in project.get("rule/?q=elsewhere")


def test_a_rule_is_added(project: Project) -> None:
    project.post(
        "rule/add/",
        NEW_RULE
        | {
            "name": "mine",
            "queue_name": "emails",
            "args": '{"customer": 7}',
            "heartbeat_timeout": "1 hour 30 min",
            "run_timeout": "2 days",
            "retry_delay": "90 seconds",
            "max_rescues": "",
            "expires_at_0": "2100-01-01",
            "expires_at_1": "12:00",
            "note": "a note",
        },
    )

    assert project.rules()["mine"] == project.rules()["default"] | {
        "name": "mine",
        "position": 100,
        "queue_name": "emails",
        "args": {"customer": 7},
        "heartbeat_timeout": timedelta(hours=1, minutes=30),
        "run_timeout": timedelta(days=2),
        "retry_delay": timedelta(seconds=90),
        "max_rescues": None,
        "expires_at": datetime(2100, 1, 1, 12, tzinfo=UTC),
        "note": "a note",
    }


def test_empty_fields_are_null(project: Project) -> None:
    empty = ("queue_name", "task_name", "args", "heartbeat_timeout", "retry_queue_name", "retry_priority", "note")

    project.post("rule/add/", NEW_RULE | {"name": "mine"} | dict.fromkeys(empty, ""))

    assert {project.rules()["mine"][column] for column in empty} == {None}


def test_a_change_writes_what_was_changed_and_nothing_else(project: Project) -> None:
    # Django knows no months: written back, this would be 30 days.
    insert(project.connection, "rules", name="a/b _5F", run_timeout="1 month", max_rescues=3)
    page = project.client.get("/procrastinate_stalled/rule/").content.decode()
    (path,) = re.findall(r'href="/procrastinate_stalled/(rule/a_2F[^"]*)"', page)
    assert "30 d" in project.client.get(f"/procrastinate_stalled/{path}").content.decode()

    project.post(path, NEW_RULE | {"run_timeout": "30 d", "max_rescues": 5})

    run_timeout, max_rescues = project.connection.execute(
        "SELECT run_timeout::text, max_rescues FROM procrastinate_stalled.rules WHERE name = 'a/b _5F'"
    ).fetchone() or (None, None)
    assert (run_timeout, max_rescues) == ("1 mon", 5)


def test_a_change_does_not_make_a_second_rule_under_another_name(project: Project) -> None:
    project.post("rule/default/change/", NEW_RULE | {"name": "other", "note": "new"})

    assert project.rules().keys() == {"default"}
    assert project.rules()["default"]["note"] == "new"


def test_a_rule_is_deleted(project: Project) -> None:
    insert(project.connection, "rules", name="one")
    insert(project.connection, "rules", name="two")

    project.post("rule/one/delete/", {"post": "yes"})
    assert project.rules().keys() == {"default", "two"}

    response = project.client.post(
        "/procrastinate_stalled/rule/",
        {"action": "delete_selected", "_selected_action": ["two", "default"], "post": "yes"},
    )
    assert response.status_code == 302
    assert project.rules() == {}


def in_a_form(comment: str) -> str:
    """What a form makes of the comment of a column: who sees an empty field knows of no NULL."""
    return comment.replace("NULL", "Empty")


REFUSED = {
    "rules_action_known": None,  # the form has a list
    "rules_args_is_an_object": ("args", {"args": "[1]"}),
    "rules_args_length": ("args", {"args": json.dumps({"a": "a" * 3992})}),
    "rules_expires_at_in_range": ("expires_at", {"expires_at_0": "1960-01-01", "expires_at_1": "12:00"}),
    "rules_first_position_is_for_pauses": ("position", {"position": -2147483648}),
    "rules_heartbeat_timeout_in_range": ("heartbeat_timeout", {"heartbeat_timeout": "0 s"}),
    "rules_max_rescues_not_negative": ("max_rescues", {"max_rescues": -1}),
    "rules_name_not_empty": None,  # the form asks for one
    "rules_on_duplicate_known": None,  # the form has a list
    "rules_pkey": None,  # the form says it first
    "rules_retry_backoff_in_range": ("retry_backoff", {"retry_backoff": "0.5"}),
    "rules_retry_delay_in_range": ("retry_delay", {"retry_delay": "25 hours"}),
    "rules_retry_queue_name_length": ("retry_queue_name", {"retry_queue_name": "q" * 129}),
    "rules_run_timeout_in_range": ("run_timeout", {"run_timeout": "11 years"}),
    "rules_task_name_is_a_like_pattern": ("task_name", {"task_name": "a\\"}),
}


def test_each_constraint_of_the_table_is_refused_by_the_form(project: Project) -> None:
    constraints = rows(
        project.connection,
        "SELECT conname FROM pg_constraint WHERE conrelid = 'procrastinate_stalled.rules'::regclass AND contype <> 'n'",
    )
    assert sorted(constraint["conname"] for constraint in constraints) == sorted(REFUSED)
    before = project.rules()

    for constraint, refused in REFUSED.items():
        if refused is None:
            continue
        column, values = refused
        for path in ("rule/add/", "rule/default/change/"):
            errors = project.post(path, NEW_RULE | {"name": "mine"} | values, 200)
            assert f'violates check constraint "{constraint}"' in errors
            (comment,) = project.connection.execute(
                "SELECT col_description(attrelid, attnum) FROM pg_attribute WHERE (attrelid, attname) = "
                "('procrastinate_stalled.rules'::regclass, %s)",
                [column],
            ).fetchone() or ("",)
            assert in_a_form(comment) in errors
    assert project.rules() == before


def test_what_the_form_knows_to_be_wrong_it_says_itself(project: Project) -> None:
    before = project.rules()

    for values, error in (
        ({"name": ""}, "This field is required."),
        ({"name": "default"}, "Rule with this Name already exists."),
        ({"action": "explode"}, "Select a valid choice. explode is not one of the available choices."),
        ({"heartbeat_timeout": "90"}, "Write a duration as PostgreSQL does: 90 seconds"),
        ({"run_timeout": "soon"}, "Write a duration as PostgreSQL does: 90 seconds"),
        ({"run_timeout": "999999999999 years"}, "Write a duration as PostgreSQL does: 90 seconds"),
        ({"run_timeout": "1 day\0"}, "Write a duration as PostgreSQL does: 90 seconds"),
        ({"retry_delay": ""}, "This field is required."),
        ({"args": "{"}, "Enter a valid JSON."),
    ):
        assert error in project.post("rule/add/", NEW_RULE | {"name": "mine"} | values, 200), values
    assert project.rules() == before


def test_an_error_that_no_column_has_is_shown_above_the_form(project: Project) -> None:
    project.connection.execute(
        "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''not today''; END'"
    )
    project.connection.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON procrastinate_stalled.rules EXECUTE FUNCTION public.refuse()"
    )

    assert "The database refuses this: not today" in project.post("rule/add/", NEW_RULE | {"name": "mine"}, 200)


def test_the_form_explains_each_column_with_its_comment_and_shows_durations_in_words(project: Project) -> None:
    page = project.client.get("/procrastinate_stalled/rule/default/change/").content.decode()

    assert 'value="5 min"' in page
    assert 'value="0 s"' in page
    for (comment,) in project.connection.execute(
        """
        SELECT col_description(attrelid, attnum) FROM pg_attribute
            WHERE attrelid = 'procrastinate_stalled.rules'::regclass AND attnum > 0 AND attname <> 'name'
        """
    ):
        assert in_a_form(comment) in html.unescape(page)
    assert "Empty: silence never counts." in page
    assert "NULL" not in page
    assert "-2147483648 &lt;" not in page


# Rescues and sweeps in the admin.


@pytest.fixture
def swept(project: Project) -> Project:
    """The project after a sweep that rescued one job."""
    add_worker(project.connection)
    add_stalled_job(project.connection, queue_name="of emails", task_name="shop.send")
    project.connection.execute("CALL procrastinate_stalled.sweep()")
    return project


def test_the_rescues_are_shown_and_found(swept: Project) -> None:
    page = swept.get("rescue/")
    for text in ("of emails", "shop.send", "retried", "heartbeat", "default", "postgres"):
        assert text in page
    assert "shop.send" in swept.get("rescue/1/change/")
    assert "of emails" in swept.get("rescue/?q=1")
    assert "shop.send" not in swept.get("rescue/?q=2")
    assert "shop.send" in swept.get("rescue/?q=shop")
    assert "shop.send" not in swept.get("rescue/?reason=orphaned")


def test_the_sweeps_are_shown(swept: Project) -> None:
    assert re.search(r"\d ms|\d s", swept.get("sweep/"))
    assert "Took" in swept.get("sweep/1/change/")
    assert "1 sweep" in swept.get("sweep/?error__isempty=1")
    assert "0 sweeps" in swept.get("sweep/?error__isempty=0")


@pytest.mark.parametrize("model", ["rescue", "sweep"])
def test_what_sweeps_have_written_nobody_changes_here(swept: Project, model: str) -> None:
    table = {"rescue": "rescues", "sweep": "sweeps"}[model]
    before = rows(swept.connection, f"SELECT * FROM procrastinate_stalled.{table}")

    swept.post(f"{model}/add/", {}, 403)
    swept.post(f"{model}/1/change/", {"queue_name": "mine", "doing": 7}, 403)
    swept.post(f"{model}/1/delete/", {"post": "yes"}, 403)
    swept.client.post(
        f"/procrastinate_stalled/{model}/", {"action": "delete_selected", "_selected_action": "1", "post": "yes"}
    )

    assert len(before) == 1
    assert rows(swept.connection, f"SELECT * FROM procrastinate_stalled.{table}") == before


def test_the_whole_admin_shows_nothing_to_a_stranger(project: Project) -> None:
    project.client.logout()

    assert "Log in" in project.get("rule/")
