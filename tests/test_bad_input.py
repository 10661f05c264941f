"""Whatever functions, tables and the command line are given: an answer or a named error, and no job changed by mistake.

What is accepted must not make a later reader fail, nor a sweep.
"""

import json
from collections.abc import Iterable
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from typer.core import TyperGroup
from typer.main import get_command

from procrastinate_stalled import Stalled, cli
from procrastinate_stalled.cli import app, run
from tests.conftest import CRON
from tests.jobs import Connection, add_job, add_orphan_note, add_rule, add_stalled_job, add_worker, rows

EXAMPLES = 25
"""Of a test below, or some times as many."""


def the_same_examples(times: int = 1) -> settings:
    """Always the same examples, so that a change is to blame for a failure, and not luck."""
    return settings(
        max_examples=times * EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        # Without Phase.shrink, which takes many minutes where a value has a megabyte.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


INJECTIONS = [
    "'; DELETE FROM procrastinate_jobs; --",
    "' OR true --",
    "'); UPDATE procrastinate_jobs SET status = 'failed'; --",
    "$$; DROP TABLE procrastinate_jobs CASCADE; $$",
    '"; DROP SCHEMA procrastinate_stalled CASCADE; --',
    "\\'; DELETE FROM procrastinate_jobs; --",
    "%s %(name)s {0} {{}} %I %L",
    "* * * * *'); DELETE FROM procrastinate_jobs; --",
    "a'||(SELECT 1/0)||'",
]
# PostgreSQL has no character 0, and an argument of a program cannot have it.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
HUGE = 1_000_000
# What Linux takes as one argument of a program is 128 KB.
LONGEST_ARGUMENT = 120_000
DEEP_JSON = '{"a": ' * 9000 + "1" + "}" * 9000


def huge_texts(longest: int = HUGE) -> list[str]:
    return [character * (longest // len(character.encode())) for character in ("x", "'", "\\", "%a", "🦆")]


SPECIAL = {
    "boolean": ["true", "false", "2"],
    "integer": ["0", "1", "-1", "2147483647", "-2147483647", "-2147483648", "2147483648", "NaN"],
    "bigint": ["0", "-1", str(2**63 - 1), str(-(2**63)), str(2**63)],
    "double precision": [
        *("NaN", "Infinity", "-Infinity", "0", "-0", "-1", "1", "1000", "1000.1", "1e308", "1e-308", "1e999"),
        *("3155760000", "3155760001"),
    ],
    "interval": [
        *("0", "-1 hour", "178000000 years", "infinity", "-infinity", "NaN", "1 microsecond", "1 day", "10 years"),
        # A year has 360 days, 365.25, or as many as it has, depending on who asks.
        *("100 years", "1 year -365 days", "-1 month 31 days", "7200 months -215999 days", "-7200 months 219151 days"),
        "5000000 years -1826250000 days",
    ],
    "timestamp with time zone": [
        *("infinity", "-infinity", "4713-01-01 BC", "0001-01-01", "1970-01-01 00:00+00", "now", "tomorrow"),
        *("9999-12-30 00:00+00", "9999-12-31 00:00+00", "10000-01-01", "294276-12-31", "294277-01-01"),
    ],
    "jsonb": [
        *("", "{", "[", "null", '"text"', "[1]", '{"a": ', '{"a": "\\u0000"}', '{"a": NaN}', "[" * 50_000, "{}"),
        # PostgreSQL reads all of these; Python, and a comparison of two such objects, not.
        *('{"a": 1}', '{"a": 1e400}', '{"a": 1e5000}', DEEP_JSON),
    ],
    "text": [
        *(
            "",
            " ",
            "%",
            "_",
            "\\",
            "a\\",
            "\\\\",
            "[(",
            ".*",
            "public",
            "漢字 🦆",
            "\x1b[2J",
            "\r\n",
            "q" * 128,
            "q" * 129,
        ),
        *("retry", "fail", "wait", "ignore", "default", "rule", "task", "a%", "%a%a%a%a%b", "none"),
        *(*INJECTIONS, *huge_texts()),
    ],
}
TEXTS = st.sampled_from(SPECIAL["text"]) | st.text(CHARACTERS, max_size=200)
RANDOM: dict[str, st.SearchStrategy[str]] = {
    "boolean": st.booleans().map(str),
    "integer": st.integers(-(2**31), 2**31 - 1).map(str),
    "bigint": st.integers().map(str),
    "double precision": st.floats().map(str),
    "interval": st.timedeltas().map(lambda duration: f"{duration.total_seconds()} seconds"),
    "timestamp with time zone": st.datetimes().map(str),
    "jsonb": st.dictionaries(
        st.text(CHARACTERS), st.recursive(st.none() | st.floats() | TEXTS, st.lists, max_leaves=3)
    ).map(json.dumps),
    "text": TEXTS,
}
ADDRESSES = [
    *("postgresql://%zz", "postgresql://127.0.0.1:port/", "postgresql://127.0.0.1:1/a?b=c", "postgres://:::@[/"),
    *("postgresql+psycopg://127.0.0.1:1/?a=b", "http://127.0.0.1:1/?a=b", "=", "dbname='", "'=", "\\="),
    *("service=nowhere", "port=0 host=127.0.0.1", "port=99999 host=127.0.0.1", "port=1,2,3 host=127.0.0.1"),
    *("hostaddr=::gg", "connect_timeout=soon", "sslmode=perhaps", "target_session_attrs=a", "require_auth=a"),
    *("host=/nowhere options='-c a'", "host=/nowhere replication=a", "host=127.0.0.1 port=1 load_balance_hosts=a"),
    *(make_conninfo(dbname=text, user=text, password=text) for text in (*INJECTIONS, "x" * LONGEST_ARGUMENT)),
]

# What changes jobs, when it is not told to try only.
RESCUERS = {"retry_job", "retry_stalled_jobs"}
# What writes nothing, which PostgreSQL sees to: these functions are not VOLATILE.
READERS = {"explain_job", "explain_jobs", "get_stalled_jobs", "status", "task_runtimes", "version", "workers"}

# The arguments that have no default.
REQUIRED = {"job_id", "role", "schema"}

Given = dict[str, str | None]
"""Arguments or columns, by name. None is NULL."""
JobsAndRescues = dict[str, dict[int, str]]


def check_named(error: psycopg.Error) -> None:
    """See that it is an error of the value: none of ours, of the server's, or of the syntax, as an injection causes."""
    assert error.sqlstate is not None, error
    assert error.sqlstate[:2] not in {"XX", "58"}, error
    # syntax_error, undefined_function, undefined_column, undefined_table, undefined_parameter, division_by_zero,
    # query_canceled (it took too long)
    assert error.sqlstate not in {"42601", "42883", "42703", "42P01", "42P02", "22012", "57014"}, error


def add_jobs(connection: Connection) -> None:
    """Add a job of each kind: what nobody may touch, and what is stalled, of which each meets another fate."""
    for status in ("todo", "succeeded", "failed", "aborted"):
        add_job(connection, status)
    add_job(connection, worker_id=add_worker(connection))
    add_stalled_job(connection, lock="the lock", task_name="a" * 128, args={"a": 1})
    add_stalled_job(connection, abort_requested=True, started_ago=7200)
    add_stalled_job(connection, queueing_lock="a")
    add_job(connection, "todo", queueing_lock="a")
    add_orphan_note(connection, add_job(connection), attempts=0, seen_ago=7200)
    add_worker(connection)


def read_jobs(connection: Connection) -> JobsAndRescues:
    """All that a refused call may not change."""
    return {
        "jobs": {
            row["id"]: row["row"]
            for row in rows(connection, "SELECT id, job::text AS row FROM procrastinate_jobs AS job")
        },
        "events": {
            row["id"]: f"{row['job_id']} {row['type']}"
            for row in rows(connection, "SELECT id, job_id, type FROM procrastinate_events")
        },
        "rescues": {
            row["id"]: f"{row['job_id']} {row['action']}"
            for row in rows(connection, "SELECT id, job_id, action FROM procrastinate_stalled.rescues")
        },
    }


def check_rescues(connection: Connection, before: JobsAndRescues, rescue_ids: Iterable[int] | None = None) -> None:
    """See that each changed job has one new row in rescues which says so, and that these are the rows of the answer."""
    after = read_jobs(connection)
    new_ids = after["rescues"].keys() - before["rescues"].keys()
    assert rescue_ids is None or set(rescue_ids) == new_ids
    changed = {job_id for job_id, row in after["jobs"].items() if before["jobs"].get(job_id) != row}
    told = [int(after["rescues"][rescue_id].split()[0]) for rescue_id in new_ids]
    assert sorted(told) == sorted(changed)
    assert before["jobs"].keys() == after["jobs"].keys()
    new_events = after["events"].keys() - before["events"].keys()
    assert {int(after["events"][event_id].split()[0]) for event_id in new_events} <= changed
    statuses = rows(
        connection,
        """
        SELECT CASE job.status::text WHEN 'todo' THEN 'retried' ELSE job.status::text END AS is, rescue.action AS told
        FROM procrastinate_jobs AS job JOIN procrastinate_stalled.rescues AS rescue ON rescue.job_id = job.id
        WHERE rescue.id = ANY (%s)
        """,
        list(new_ids),
    )
    assert all(status["is"] == status["told"] for status in statuses), statuses


def check_readers(connection: Connection) -> None:
    """See that all that reads jobs, rules and settings still can, Python and a sweep too."""
    stalled = Stalled(connection)
    stalled.explain_jobs()
    stalled.task_runtimes()
    rows(connection, "SELECT id, scheduled_at, lock, queue_name FROM procrastinate_jobs")
    assert [check for check in stalled.status() if "damaged" in (check.hint or "")] == []
    with connection.transaction(force_rollback=True):
        before = read_jobs(connection)
        # Not with their args, which may be more than Python can read.
        jobs = rows(connection, "SELECT id, action FROM procrastinate_stalled.get_stalled_jobs()")
        found = {job["id"] for job in jobs if job["action"] in {"retry", "fail", "abort"}}
        rescues = stalled.retry_stalled_jobs()
        assert {rescue.job_id for rescue in rescues} == found
        check_rescues(connection, before, [rescue.id for rescue in rescues if rescue.id is not None])
        errors = rows(connection, "SELECT error FROM procrastinate_stalled.sweeps WHERE error IS NOT NULL")
        assert errors == []
        # A worker can fetch what was put back.
        connection.execute("UPDATE procrastinate_jobs SET status = 'doing' WHERE status = 'todo'")


def public_functions(connection: Connection, kind: str = "f") -> dict[str, dict[str, str]]:
    """The arguments of each public function, by name, with their types."""
    functions = rows(
        connection,
        """
        SELECT proname,
               (proargnames)[1:pronargs] AS names,
               ARRAY(
                   SELECT format_type(type, NULL)
                   FROM unnest(proargtypes) WITH ORDINALITY AS argument (type, number)
                   ORDER BY number
               ) AS types
        FROM pg_proc
        WHERE pronamespace = 'procrastinate_stalled'::regnamespace AND proname NOT LIKE '\\_%%' AND prokind = %s
        ORDER BY proname
        """,
        kind,
    )
    return {f["proname"]: dict(zip(f["names"] or [], f["types"], strict=True)) for f in functions}


def columns(connection: Connection, table: str) -> dict[str, str]:
    """The columns of a table of ours, with their types."""
    attributes = rows(
        connection,
        """
        SELECT attname, format_type(atttypid, NULL) AS type FROM pg_attribute
        WHERE attrelid = ('procrastinate_stalled.' || %s)::regclass AND attnum > 0 AND NOT attisdropped
        ORDER BY attnum
        """,
        table,
    )
    return {a["attname"]: a["type"] for a in attributes}


def call(connection: Connection, function: str, types: dict[str, str], values: Given) -> list[dict[str, Any]]:
    """Call a function with some of its arguments, each as a text that PostgreSQL makes its type from."""
    statement = sql.SQL("SELECT * FROM {}({})").format(
        sql.Identifier("procrastinate_stalled", function),
        sql.SQL(", ").join(sql.SQL("{} => {}").format(sql.Identifier(name), typed(types[name])) for name in values),
    )
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(statement, list(values.values())).fetchall()


def typed(kind: str) -> sql.Composed:
    """A parameter that is sent as text."""
    return sql.SQL("%s::text::{}").format(sql.SQL(kind))


def special_values(kind: str) -> list[str]:
    """Good and bad values of a type of PostgreSQL, as texts."""
    assert kind in SPECIAL, f"there are no values of type {kind} to try: add some to SPECIAL and RANDOM"
    return SPECIAL[kind]


def values_of(kind: str) -> st.SearchStrategy[str | None]:
    """The special values, others, NULL, and texts that are none."""
    return st.one_of(st.sampled_from(special_values(kind)), RANDOM[kind], st.none(), TEXTS)


def draw_arguments(data: st.DataObject, types: dict[str, str], ids: list[int]) -> Given:
    """Some of the arguments, and all that have no default. What means a job is most often one that there is."""
    names = set(data.draw(st.lists(st.sampled_from(sorted(types)), max_size=3, unique=True)) if types else [])
    drawn = {name: data.draw(values_of(types[name]), label=name) for name in types if name in names | REQUIRED}
    if "job_id" in types and data.draw(st.integers(0, 3)):
        drawn["job_id"] = str(data.draw(st.sampled_from(ids)))
    if "dry_run" in types:
        drawn["dry_run"] = data.draw(st.sampled_from(["true", "false", None]) | values_of("boolean"))
    return drawn


def test_there_are_values_of_every_type_to_try(transaction: Connection) -> None:
    routines = public_functions(transaction) | public_functions(transaction, "p")
    types = [*routines.values(), columns(transaction, "rules"), columns(transaction, "settings")]

    assert {kind for by_name in types for kind in by_name.values()} == SPECIAL.keys() == RANDOM.keys()


@the_same_examples()
@given(st.data())
def test_no_function_has_an_internal_error_or_changes_a_job_without_saying_so(
    transaction: Connection, data: st.DataObject
) -> None:
    with transaction.transaction(force_rollback=True):
        add_jobs(transaction)
        before = read_jobs(transaction)
        for function, types in public_functions(transaction).items():
            values = draw_arguments(data, types, list(before["jobs"]))
            with transaction.transaction(force_rollback=True):
                check_call(transaction, before, function, types, values)


def test_no_function_fails_at_a_special_value(transaction: Connection) -> None:
    add_jobs(transaction)
    before = read_jobs(transaction)
    [job] = rows(transaction, "SELECT min(id) AS id FROM procrastinate_jobs WHERE attempts = 0 AND lock = 'the lock'")
    for function, types in public_functions(transaction).items():
        required: Given = {"job_id": str(job["id"])} if "job_id" in types else {}
        for name, kind in types.items():
            for value in [None, *special_values(kind)]:
                with transaction.transaction(force_rollback=True):
                    check_call(transaction, before, function, types, required | {name: value})


def check_call(
    connection: Connection, before: JobsAndRescues, function: str, types: dict[str, str], values: Given
) -> None:
    """See that a call is refused by name and changes nothing, or is done and says what it changes."""
    try:
        with connection.transaction():
            answer = call(connection, function, types, values)
    except psycopg.Error as error:
        check_named(error)
        answer = []
    if function in RESCUERS and answer and not is_dry_run(connection, values):
        check_rescues(connection, before, [row["id"] for row in answer])
    else:
        assert read_jobs(connection) == before, (function, values)
    if answer and function not in READERS:
        check_readers(connection)


def is_dry_run(connection: Connection, values: Given) -> bool:
    """Whether it was accepted as such. NULL is."""
    try:
        with connection.transaction():
            [row] = rows(connection, "SELECT %s::text::boolean IS NOT FALSE AS is", values.get("dry_run", "false"))
            return bool(row["is"])
    except psycopg.DataError:
        return False


@the_same_examples()
@given(values_of("integer"))
def test_a_sweep_takes_or_refuses_any_batch_size(connection: Connection, batch_size: str | None) -> None:
    assert public_functions(connection, "p") == {"sweep": {"batch_size": "integer"}}
    connection.execute("DELETE FROM procrastinate_jobs")
    add_jobs(connection)
    before = read_jobs(connection)

    try:
        connection.execute(
            sql.SQL("CALL procrastinate_stalled.sweep({}::text::integer)").format(sql.Literal(batch_size))
        )
    except psycopg.Error as error:
        check_named(error)
        assert read_jobs(connection) == before
    else:
        check_rescues(connection, before)
        assert read_jobs(connection) != before
        check_readers(connection)


@the_same_examples(2)
@given(st.data())
def test_a_rule_is_refused_by_name_or_understood_by_every_reader(transaction: Connection, data: st.DataObject) -> None:
    types = columns(transaction, "rules")
    names = data.draw(st.lists(st.sampled_from(list(types)), min_size=1, max_size=3, unique=True))
    with transaction.transaction(force_rollback=True):
        add_jobs(transaction)
        if check_row(transaction, "rules", {name: data.draw(values_of(types[name]), label=name) for name in names}):
            event("accepted")  # pytest --hypothesis-show-statistics tells how many are


@the_same_examples()
@given(st.data())
def test_a_setting_is_refused_by_name_or_understood_by_every_reader(
    transaction: Connection, data: st.DataObject
) -> None:
    types = columns(transaction, "settings")
    names = data.draw(st.lists(st.sampled_from(list(types)), min_size=1, max_size=2, unique=True))
    with transaction.transaction(force_rollback=True):
        add_jobs(transaction)
        if check_row(transaction, "settings", {name: data.draw(values_of(types[name]), label=name) for name in names}):
            event("accepted")


@pytest.mark.parametrize("table", ["rules", "settings"])
def test_no_reader_fails_at_a_special_value_of_a_row(transaction: Connection, table: str) -> None:
    add_jobs(transaction)
    job = add_stalled_job(transaction, started_ago=10**9)
    transaction.execute("UPDATE procrastinate_jobs SET args = %s::text::jsonb WHERE id = %s", [DEEP_JSON, job])
    for name, kind in columns(transaction, table).items():
        for value in [None, *special_values(kind)]:
            check_row(transaction, table, {name: value})


def check_row(connection: Connection, table: str, values: Given) -> bool:
    """See that the row of a table refuses these values, or that all that reads it can; return whether it takes them."""
    types = columns(connection, table)
    with connection.transaction(force_rollback=True):
        try:
            with connection.transaction():
                connection.execute(
                    sql.SQL("UPDATE {} SET {}").format(
                        sql.Identifier("procrastinate_stalled", table),
                        sql.SQL(", ").join(
                            sql.SQL("{} = {}").format(sql.Identifier(name), typed(types[name])) for name in values
                        ),
                    ),
                    list(values.values()),
                )
        except psycopg.Error as error:
            check_named(error)
            return False
        check_readers(connection)
        return True


@pytest.mark.parametrize("injection", INJECTIONS)
def test_no_argument_of_a_function_is_ever_run_as_sql(transaction: Connection, injection: str) -> None:
    add_jobs(transaction)
    before = read_jobs(transaction)
    job_id = next(row["id"] for row in rows(transaction, "SELECT id FROM procrastinate_jobs WHERE status = 'doing'"))

    for function, types in public_functions(transaction).items():
        for name in types:
            with transaction.transaction(force_rollback=True):
                try:
                    with transaction.transaction():
                        required: Given = {"job_id": str(job_id)} if "job_id" in types else {}
                        call(transaction, function, types, required | {name: injection})
                except psycopg.Error as error:
                    check_named(error)
                if function in RESCUERS:
                    check_rescues(transaction, before)
                else:
                    assert read_jobs(transaction) == before
                check_readers(transaction)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_no_name_of_a_role_or_schema_is_ever_run_as_sql(transaction: Connection, injection: str) -> None:
    add_jobs(transaction)
    before = read_jobs(transaction)
    name = injection[:63]
    transaction.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
    transaction.execute(sql.SQL("ALTER SCHEMA public RENAME TO {}").format(sql.Identifier(name)))
    transaction.execute(sql.SQL("SET LOCAL search_path TO {}").format(sql.Identifier(name)))

    stalled = Stalled(transaction)
    stalled.set_procrastinate_schema(name)
    stalled.grant_monitor(name)
    stalled.grant_operator(name)

    assert read_jobs(transaction) == before
    transaction.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(name)))
    stalled.status()
    assert len(stalled.retry_stalled_jobs()) == 4


@pytest.mark.parametrize("injection", INJECTIONS)
def test_no_text_of_a_rule_or_a_job_is_ever_run_as_sql(transaction: Connection, injection: str) -> None:
    transaction.execute("DELETE FROM procrastinate_stalled.rules")
    for number, (name, kind) in enumerate(columns(transaction, "rules").items()):
        if kind == "text" and name not in {"action", "on_duplicate"}:
            add_rule(transaction, **{"name": f"rule {number}", name: injection})
    Stalled(transaction).pause(queue=injection, task_name=injection, reason=injection)
    add_jobs(transaction)
    add_stalled_job(transaction, queue_name=injection, task_name=injection, lock=injection, args={injection: injection})
    add_stalled_job(transaction, queueing_lock=injection)
    add_job(transaction, "todo", queueing_lock=injection)

    check_readers(transaction)
    Stalled(transaction).resume(queue=injection, task_name=injection)
    check_readers(transaction)


@the_same_examples()
@given(TEXTS | TEXTS.map("* * * * *".__add__))
def test_pg_cron_gets_our_command_alone_whatever_the_schedule(cron_database: str, schedule: str) -> None:
    check_schedule(cron_database, schedule)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_no_schedule_is_ever_run_as_sql(cron_database: str, other_database_on_cron_server: str, injection: str) -> None:
    for schedule in (injection, f"* * * * *{injection}", f"* * * * * {injection}"):
        check_schedule(cron_database, schedule)
        code = run(app, args=["-d", other_database_on_cron_server, "schedule", "--cron-database", CRON, "--", schedule])
        with psycopg.connect(cron_database) as connection:
            check_cron_jobs(connection, [schedule] if code == cli.OK else [])
            connection.execute("SELECT cron.unschedule(jobid) FROM cron.job")


def check_schedule(cron_database: str, schedule: str) -> None:
    """See that pg_cron gets one job with this very schedule, or that it is refused. Commit nothing."""
    with psycopg.connect(cron_database) as connection:
        add_jobs(connection)
        before = read_jobs(connection)
        try:
            with connection.transaction():
                Stalled(connection).schedule(schedule=schedule)
        except psycopg.Error as error:
            check_named(error)
            check_cron_jobs(connection, [])
        else:
            check_cron_jobs(connection, [schedule])
        assert read_jobs(connection) == before
        connection.rollback()


def check_cron_jobs(connection: Connection, schedules: list[str]) -> None:
    jobs = rows(connection, "SELECT schedule, command FROM cron.job")
    assert jobs == [{"schedule": schedule, "command": "CALL procrastinate_stalled.sweep()"} for schedule in schedules]


# The command line.

# But an address, see below.
WITHOUT_VALUES = {("install",), ("uninstall",), ("sql",)}


def commands(group: TyperGroup, *names: str) -> dict[tuple[str, ...], Any]:
    """All commands, those within a group too, and the groups that are commands themselves."""
    found: dict[tuple[str, ...], Any] = {}
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            found |= commands(command, *names, name)
        if not isinstance(command, TyperGroup) or command.invoke_without_command:
            found[*names, name] = command
    return found


def all_commands() -> dict[tuple[str, ...], Any]:
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    return commands(command)


def parameters(command: Any) -> tuple[list[Any], list[Any]]:
    """Its options, and its other arguments."""
    options = [p for p in command.params if p.param_type_name == "option" and "--help" not in p.opts]
    return options, [p for p in command.params if p.param_type_name == "argument"]


@pytest.fixture(autouse=True)
def time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a statement that hangs fail by name, which check_named() does not take."""
    monkeypatch.setenv("PGOPTIONS", "-c statement_timeout=60s")


@pytest.fixture(autouse=True)
def check_errors_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints no SQLSTATE, so they are looked at on the way."""
    explain = cli._explain  # noqa: SLF001

    def check_and_explain(error: psycopg.Error) -> Any:
        if error.diag.message_primary is not None:
            check_named(error)
        return explain(error)

    monkeypatch.setattr(cli, "_explain", check_and_explain)


def run_and_check(capsys: pytest.CaptureFixture[str], connection: Connection, *arguments: str) -> str:
    """See that it ends with a documented code, and that only a rescue, which it tells, changes a job; return stderr."""
    before = read_jobs(connection)

    code = run(app, args=arguments)

    printed = capsys.readouterr()
    assert code in {cli.OK, cli.WARNING, cli.ERROR, cli.FAILED}
    assert "Traceback" not in printed.err + printed.out
    assert "is not installed in this database" not in printed.err
    assert code != cli.FAILED or printed.err.strip()
    if code == cli.FAILED or not {"retry", "sweep"} & set(arguments) or "--dry-run" in arguments:
        assert read_jobs(connection) == before
    else:
        check_rescues(connection, before)
    return printed.err


def reset(connection: Connection) -> None:
    """Let no example meet what another one left."""
    connection.execute("DELETE FROM procrastinate_jobs")
    connection.execute("DELETE FROM procrastinate_stalled.rules")
    add_rule(connection, "default", position=2147483647)
    add_jobs(connection)


@the_same_examples()
@given(st.data())
def test_the_command_line_ends_with_a_documented_code_and_no_traceback(
    connection: Connection, database: str, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    reset(connection)
    ids = [row["id"] for row in rows(connection, "SELECT id FROM procrastinate_jobs")]
    commands = {names: command for names, command in all_commands().items() if names not in WITHOUT_VALUES}
    for names in data.draw(st.lists(st.sampled_from(sorted(commands)), min_size=4, max_size=4), label="commands"):
        options, arguments = parameters(commands[names])
        chosen = data.draw(st.lists(st.sampled_from(options), max_size=3)) if options else []
        value = st.one_of(
            st.sampled_from([text for texts in SPECIAL.values() for text in texts] + huge_texts(LONGEST_ARGUMENT)),
            *RANDOM.values(),
        ).filter(lambda text: len(text.encode()) <= LONGEST_ARGUMENT)
        given = [option.opts[0] if option.is_flag else f"{option.opts[0]}={data.draw(value)}" for option in chosen]
        known = st.sampled_from(["default", *map(str, ids)])
        positional = [data.draw(known | value, label=argument.name) for argument in arguments]

        run_and_check(capsys, connection, "--database-url", database, *names, *given, "--", *positional)
    check_readers(connection)


# Arguments that the commands above need.
USUAL = {"job_id": "0", "name": "default", "role": "nobody", "schema": "public"}
# What cannot carry a text to the database, because it must be a number or a time.
NO_TEXTS = {"--at", "--expires-at", "--nb-seconds", "--priority", "--seconds-since-heartbeat", "--since"}


@pytest.mark.parametrize("injection", INJECTIONS)
def test_no_argument_of_the_command_line_is_ever_run_as_sql(
    connection: Connection, database: str, capsys: pytest.CaptureFixture[str], injection: str
) -> None:
    reset(connection)
    for names, command in sorted(all_commands().items()):
        if names in WITHOUT_VALUES:
            continue
        options, arguments = parameters(command)
        texts = [
            f"{option.opts[0]}={injection}"
            for option in options
            if not option.is_flag and option.opts[0] not in NO_TEXTS
        ]
        # All at once, which the table of rules refuses; those that it takes; and the arguments without a name.
        free = [text for text in texts if text.split("=")[0] in {"--queue-name", "--task-name", "--note"}]
        for chosen in {tuple(texts), tuple(free)}:
            positional = [USUAL.get(argument.name, "1 hour") for argument in arguments]
            printed = run_and_check(capsys, connection, "--database-url", database, *names, *chosen, "--", *positional)
            assert "Usage:" not in printed
        if arguments:
            run_and_check(capsys, connection, "--database-url", database, *names, "--", *(injection for _ in arguments))
    check_readers(connection)


@pytest.mark.parametrize("address", ADDRESSES, ids=range(len(ADDRESSES)))
def test_an_address_that_leads_nowhere_is_refused_by_its_option(
    database: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("PGHOST", "/nowhere")
    for command in ("install", "uninstall", "list"):
        assert run(app, args=["--database-url", address, command]) == cli.FAILED
        assert "--database-url" in capsys.readouterr().err
    for command in ("schedule", "unschedule"):
        assert run(app, args=["--database-url", database, command, "--cron-database", address]) == cli.FAILED
        assert "--cron-database" in capsys.readouterr().err
    assert run(app, args=["--database-url", database, "status", "--cron-database", address]) == cli.WARNING
    assert "--cron-database" in capsys.readouterr().out
