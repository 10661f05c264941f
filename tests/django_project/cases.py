"""What a project may test with Django's own classes: manage.py test tests.django_project.cases.

Django makes the databases of these tests with the migrations. (The name of this module is none that pytest looks for.)
"""

from datetime import timedelta

import pytest
from django.core.exceptions import ValidationError
from django.db import connections
from django.test import TestCase, TransactionTestCase

from procrastinate_stalled.contrib.django.models import Rescue, Rule, Sweep


def sweep(alias: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT FROM procrastinate_stalled.retry_stalled_jobs()")


class InATransaction(TestCase):
    """What a test does is rolled back after it."""

    databases = frozenset(("default", "jobs"))

    def test_a_sweep_runs_in_the_transaction_of_the_test(self) -> None:
        sweep("jobs")

        assert Sweep.objects.get().doing == 0
        assert not Rescue.objects.exists()

    def test_each_test_begins_with_the_rule_of_the_install(self) -> None:
        assert [rule.name for rule in Rule.objects.all()] == ["default"]
        Rule.objects.all().delete()
        Rule.objects.create(name="mine")

    def test_a_rule_that_the_database_refuses_does_not_end_the_transaction(self) -> None:
        with pytest.raises(ValidationError):
            Rule(name="mine", run_timeout=timedelta(0)).full_clean()

        assert Rule.objects.count() == 1


class WithCommits(TransactionTestCase):
    """Django empties its tables after each test."""

    databases = frozenset(("default", "jobs"))

    def test_the_rule_of_the_install_outlives_the_flush_of_djangos_tables(self) -> None:
        assert Rule.objects.get().name == "default"

    def test_the_rule_of_the_install_outlives_the_flush_of_djangos_tables_again(self) -> None:
        assert Rule.objects.get().name == "default"
