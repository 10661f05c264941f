"""What the documents say is true: commands print what stands there, and the reference is what is in the catalog."""

import asyncio
import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import unified_diff
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer
from markdown_it.token import Token
from procrastinate.exceptions import UniqueViolation

import procrastinate_stalled
from benchmarks.rescue import documented_task
from procrastinate_stalled import AsyncStalled, Stalled, cli
from tests.documents import DATABASE, Scene, normalize, parse, problem_of_unrunnable, steps
from tests.extension_server import server_with_extension
from tests.jobs import Connection, add_job, add_stalled_job, get_job, rows
from tests.server import PROJECT

DOCUMENTS = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted(PROJECT.glob("docs/*.md"))]
PAGES = [*DOCUMENTS, PROJECT / "CHANGELOG.md"]


# Commands and snippets.


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A server of its own, because the ids of jobs and workers, and pg_cron's, are compared too.

    It has the files of the extension: `make install` is not run within a document.
    """
    with server_with_extension(cron_database=DATABASE) as server, ExitStack() as workers:
        yield Scene(server, tmp_path, workers)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_the_commands_of_a_document_print_what_stands_there(document: Path, scene: Scene) -> None:
    differences = []
    for step in steps(document):
        printed = scene.run(step)
        expected, actual = normalize(step.output), normalize(printed)
        if actual != expected:
            place = f"{document.name}, line {step.line}"
            difference = unified_diff(expected.splitlines(), actual.splitlines(), place, "printed", lineterm="")
            differences.append("\n".join([*difference, f"In full:\n{printed}"]))
    assert not differences, "\n\n".join(differences)


def test_no_block_of_a_document_is_left_out(scene: Scene, tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(
        "```yaml\na: 1\n```\n\n"
        "```\nls\n```\n\n"
        "An indented block:\n\n    ls\n\n"
        "```sh\ntrue\n```\n\nThis is no output:\n\n```text\ntrue\n```\n\n"
        "- ```sh\n  false\n  ```\n\n"
        "<!-- a secret -->\n\n"
        "<!-- test: something_unknown -->\n"
    )

    yaml, nameless, indented, command, text, failing, comment, unknown = steps(document)

    for step in (yaml, nameless, indented, text):
        with pytest.raises(ValueError, match="nobody runs a block of language"):
            scene.run(step)
    assert scene.run(command) == ""
    assert scene.run(failing) == "exit status 1\n"
    with pytest.raises(ValueError, match="not a comment of the form"):
        scene.run(comment)
    with pytest.raises(AttributeError):
        scene.run(unknown)


@pytest.mark.parametrize(
    "command",
    ["make nothing", "make test && ls", "pip install procrastinate", "pip install procrastinate-stalled[fast]", "ls"],
)
def test_a_command_that_cannot_run_in_a_test_is_checked_all_the_same(command: str) -> None:
    assert problem_of_unrunnable(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in _links(parse(page)):
        if re.match(r"https://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        if anchor:
            assert anchor in {_anchor(heading) for heading in chapters(target)}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_targets_of_make_that_a_page_mentions_exist(page: Path) -> None:
    for command in re.findall(r"`(make [^`]+)`", page.read_text()):
        assert problem_of_unrunnable(command) == ""


def _links(tokens: list[Token]) -> Iterator[str]:
    for token in tokens:
        if token.type == "link_open":
            yield str(token.attrs["href"])
        yield from _links(token.children or [])


def _anchor(heading: str) -> str:
    """Return what GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


# The reference.


@dataclass
class Chapter:
    """What stands between a heading and the next one."""

    prose: str = ""
    """The paragraphs, without marks and line breaks."""
    tables: list[list[list[str]]] = field(default_factory=list)
    """The rows of each table, without its header."""


def chapters(document: Path) -> dict[str, Chapter]:
    """Read a document by its headings."""
    found: dict[str, Chapter] = {}
    chapter = Chapter()
    tokens = parse(document)
    for token, container in zip(tokens[1:], tokens, strict=False):
        if token.type == "table_open":
            chapter.tables.append([])
        elif token.type == "tr_open" and container.type != "thead_open":
            chapter.tables[-1].append([])
        elif token.type == "inline" and container.type == "heading_open":
            chapter = found.setdefault(_plain(token), Chapter())
        elif token.type == "inline" and container.type == "td_open":
            chapter.tables[-1][-1].append(_plain(token))
        elif token.type == "inline" and container.type == "paragraph_open":
            chapter.prose += f"{_plain(token)} "
    return found


def _plain(token: Token) -> str:
    return "".join(" " if child.type == "softbreak" else child.content for child in token.children or [])


@pytest.fixture(scope="module")
def reference() -> dict[str, Chapter]:
    return chapters(PROJECT / "docs" / "reference.md")


def _between(reference: dict[str, Chapter], first: str, last: str) -> list[str]:
    """Return the names of the chapters between two of them, sorted."""
    names = [*reference]
    return sorted(names[names.index(first) + 1 : names.index(last)])


def _without_cast(default: str | None) -> str:
    """Return 'NULL' for 'NULL::text'. A cast within an expression stays."""
    return re.sub(r"^([^(]*)::[a-z ]+$", r"\1", default or "")


def test_the_reference_has_every_table_with_its_columns_defaults_comments_and_checks(
    reference: dict[str, Chapter], transaction: Connection
) -> None:
    tables = rows(
        transaction,
        """
        SELECT oid, relname AS name, obj_description(oid, 'pg_class') AS comment
            FROM pg_class
            WHERE relnamespace = 'procrastinate_stalled'::regnamespace AND relkind = 'r' AND relname !~ '^_yoyo'
        """,
    )
    assert _between(reference, "Tables", "Row types") == sorted(table["name"] for table in tables)
    for table in tables:
        columns = rows(
            transaction,
            """
            SELECT attname AS name,
                    format_type(atttypid, atttypmod) || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END AS type,
                    CASE attidentity
                        WHEN 'a' THEN 'GENERATED ALWAYS AS IDENTITY'
                        ELSE pg_get_expr(adbin, adrelid)
                    END AS "default",
                    col_description(attrelid, attnum) AS comment
                FROM pg_attribute
                LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
                WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped
                ORDER BY attnum
            """,
            table["oid"],
        )
        constraints = rows(
            transaction,
            """
            SELECT conname AS name, pg_get_constraintdef(oid, true) AS definition
                FROM pg_constraint
                -- PostgreSQL 18 has constraints for NOT NULL too.
                WHERE conrelid = %s AND contype <> 'n'
                ORDER BY contype DESC, conname
            """,
            table["oid"],
        )
        chapter = reference[table["name"]]
        assert table["comment"] in chapter.prose
        assert chapter.tables[0] == [
            [column["name"], column["type"], _without_cast(column["default"]), column["comment"]] for column in columns
        ]
        assert chapter.tables[1] == [[constraint["name"], constraint["definition"]] for constraint in constraints]


def test_the_reference_has_every_row_type_with_its_columns_and_comments(
    reference: dict[str, Chapter], transaction: Connection
) -> None:
    types = rows(
        transaction,
        """
        SELECT typname AS name, obj_description(type.oid, 'pg_type') AS comment, typrelid
            FROM pg_type AS type
            JOIN pg_class AS class ON class.oid = typrelid
            WHERE typnamespace = 'procrastinate_stalled'::regnamespace AND relkind = 'c' AND typname !~ '^_'
        """,
    )
    assert _between(reference, "Row types", "Functions") == sorted(row_type["name"] for row_type in types)
    for row_type in types:
        columns = rows(
            transaction,
            """
            SELECT attname AS name,
                    format_type(atttypid, atttypmod) AS type,
                    col_description(attrelid, attnum) AS comment
                FROM pg_attribute
                WHERE attrelid = %s
                ORDER BY attnum
            """,
            row_type["typrelid"],
        )
        chapter = reference[row_type["name"]]
        assert row_type["comment"] in chapter.prose
        assert chapter.tables == [[[column["name"], column["type"], column["comment"]] for column in columns]]


def _public_functions(connection: Connection) -> list[dict[str, Any]]:
    return rows(
        connection,
        """
        SELECT proname AS name,
                pg_get_function_result(oid) AS result,
                obj_description(oid, 'pg_proc') AS comment,
                ARRAY(
                    SELECT ARRAY[
                            argument.name,
                            format_type(argument.type, NULL),
                            coalesce(pg_get_function_arg_default(pg_proc.oid, argument.number::integer), '')
                        ]
                        FROM unnest(proargnames[1:pronargs], proargtypes::oid[])
                            WITH ORDINALITY AS argument (name, type, number)
                        ORDER BY argument.number
                ) AS arguments
            FROM pg_proc
            WHERE pronamespace = 'procrastinate_stalled'::regnamespace AND proname !~ '^_'
        """,
    )


def test_the_reference_has_every_function_with_its_arguments_result_and_comment(
    reference: dict[str, Chapter], transaction: Connection
) -> None:
    for function in _public_functions(transaction):
        chapter = reference[function["name"]]
        # The indented lines of a comment explain the arguments, then the columns of the result.
        comment = re.sub(r"\n {3,}", " ", function["comment"])
        meanings = dict(re.findall(r"^  (\S+) *(.*)$", comment, re.MULTILINE))
        prose = re.sub(r"^  .*$", "", comment, flags=re.MULTILINE)
        assert " ".join(prose.split()) in " ".join(chapter.prose.split())
        if function["result"] is not None:
            assert f"Result: {function['result']} " in chapter.prose
        arguments = [
            [name, kind, _without_cast(default), meanings.pop(name)] for name, kind, default in function["arguments"]
        ]
        columns = [[*row] for row in meanings.items()]
        assert chapter.tables == [table for table in (arguments, columns) if table]


def test_the_reference_has_no_function_that_does_not_exist(
    reference: dict[str, Chapter], transaction: Connection
) -> None:
    functions = sorted(function["name"] for function in _public_functions(transaction))
    assert _between(reference, "Functions", "Errors") == functions


def test_the_reference_has_every_error_that_is_raised_or_announced(
    reference: dict[str, Chapter], transaction: Connection
) -> None:
    errors = reference["Errors"].tables[0]
    for sqlstate, condition, name in errors:
        assert psycopg.errors.lookup(sqlstate).__name__ == name
        with pytest.raises(psycopg.errors.lookup(sqlstate)), transaction.transaction():
            transaction.execute(f"DO $$ BEGIN RAISE {condition}; END $$".encode())

    sources = "".join(file.read_text() for file in PROJECT.glob("sql/[0-9]*.sql"))
    raised = set(re.findall(r"ERRCODE = '(\w+)'", sources))
    known = {condition for _, condition, _ in errors}
    announced = {
        word
        for function in _public_functions(transaction)
        for word in re.findall(r"\w+", function["comment"].partition("Errors")[2])
        if word in known
    }
    raised_by_an_install_only = {"no_active_sql_transaction"}
    assert known - raised_by_an_install_only == announced
    assert raised <= known


def test_the_reference_has_every_command_with_its_options(reference: dict[str, Chapter]) -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    assert reference["Command line"].tables[0] == list(_commands(group))


def _commands(group: typer.core.TyperGroup, prefix: str = "") -> Iterator[list[str]]:
    for name, command in group.commands.items():
        options = " ".join(
            str(option.metavar) if option.param_type_name == "argument" else option.opts[0] for option in command.params
        )
        yield [f"{prefix}{name}", options, (command.help or "").splitlines()[0]]
        if isinstance(command, typer.core.TyperGroup):
            yield from _commands(command, f"{prefix}{name} ")


def test_the_reference_has_every_exit_code(reference: dict[str, Chapter]) -> None:
    codes = [cli.OK, cli.WARNING, cli.ERROR, cli.FAILED, cli.INTERRUPTED]
    assert [code for code, _meaning in reference["Command line"].tables[1]] == [str(code) for code in codes]


def test_the_reference_has_every_name_of_the_package(reference: dict[str, Chapter]) -> None:
    names = {re.sub(r"\(.*", "", name): name for name, _meaning in reference["Python"].tables[0]}

    assert sorted(names) == procrastinate_stalled.__all__
    for name, call in names.items():
        if "(" in call:
            arguments = inspect.signature(getattr(procrastinate_stalled, name)).parameters
            assert call == f"{name}({', '.join(arguments)})"


@pytest.mark.parametrize("client", [Stalled, AsyncStalled])
def test_a_client_has_a_method_for_every_function_as_the_reference_says(
    client: type[Stalled | AsyncStalled], transaction: Connection
) -> None:
    functions = {
        function["name"]: [name for name, _type, _default in function["arguments"]]
        for function in _public_functions(transaction)
    }
    methods = {
        name: [*inspect.signature(method).parameters][1:]
        for name, method in inspect.getmembers(client, inspect.isfunction)
        if not name.startswith("_")
    }
    assert methods == functions


# What is said of others.


def test_the_documented_task_stops_at_a_taken_queueing_lock_and_a_sweep_does_not(
    database: str, connection: Connection
) -> None:
    colliding = add_stalled_job(connection, queueing_lock="order 7")
    add_job(connection, "todo", queueing_lock="order 7")
    other = add_stalled_job(connection)

    with pytest.raises(UniqueViolation):
        asyncio.run(documented_task(database))
    assert get_job(connection, other)["status"] == "doing"

    Stalled(connection).sweep()
    assert get_job(connection, colliding)["status"] == "failed"
    assert get_job(connection, other)["status"] == "todo"
