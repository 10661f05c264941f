"""All linters, each with its verdict: python -m scripts.lint. Exits 1 if one of them has something to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from scripts import generate_sync_client
from tests.server import PROJECT, install_procrastinate, throwaway_server

MIGRATION = max(file for file in PROJECT.glob("sql/migrations/*.sql") if not file.name.endswith(".rollback.sql"))
SHELL_SCRIPTS = [PROJECT / ".ci/run", *(file for file in sorted(PROJECT.glob("scripts/*")) if file.suffix == "")]

COMMANDS = {
    "Python: ruff": ["ruff", "check", "--quiet"],
    "Python: ruff format": ["ruff", "format", "--check", "--quiet"],
    "Python: mypy": ["mypy", "--no-error-summary"],
    "Shell: shellcheck": ["shellcheck", *(str(script) for script in SHELL_SCRIPTS if script.is_file())],
    "SQL: squawk": ["squawk", "--no-error-on-unmatched-pattern", "--reporter", "gcc", str(MIGRATION)],
    "SQL: the migration is made from sql/, and no released one was changed": [
        str(PROJECT / "scripts/assemble-migration"),
        "--check",
    ],
}

# Each returns what is wrong: no row is good news.
QUERIES = {
    "SQL: plpgsql_check": """
        SELECT routine.oid::regprocedure AS routine, problem.lineno, problem.level, problem.message, problem.detail,
                problem.hint, problem.query
            FROM pg_proc AS routine
            JOIN pg_language AS language ON language.oid = routine.prolang
            CROSS JOIN LATERAL plpgsql_check_function_tb(
                routine.oid,
                fatal_errors => false,
                all_warnings => true
            ) AS problem
            WHERE language.lanname = 'plpgsql'
                AND routine.pronamespace = 'procrastinate_stalled'::regnamespace
                -- What it executes comes from _privileges(): key words, and names that are quoted there.
                AND NOT (routine.proname = '_grant' AND problem.level = 'security')
    """,
    "SQL: everything has a comment": """
        SELECT pg_describe_object(object.classid, object.objid, object.objsubid) AS without_comment
            FROM (
                SELECT 'pg_namespace'::regclass, 'procrastinate_stalled'::regnamespace::oid, 0
                UNION ALL
                SELECT 'pg_proc'::regclass, oid, 0
                    FROM pg_proc
                    WHERE pronamespace = 'procrastinate_stalled'::regnamespace
                UNION ALL
                SELECT 'pg_class'::regclass, oid, 0
                    FROM pg_class
                    WHERE relnamespace = 'procrastinate_stalled'::regnamespace AND relkind IN ('r', 'p', 'v', 'm')
                UNION ALL
                -- A composite type is a type and a class: the type has the comment, the class has the columns.
                SELECT 'pg_type'::regclass, type.oid, 0
                    FROM pg_type AS type
                    LEFT JOIN pg_class AS class ON class.oid = type.typrelid
                    WHERE type.typnamespace = 'procrastinate_stalled'::regnamespace
                        AND type.typcategory <> 'A'
                        AND (class.relkind IS NULL OR class.relkind = 'c')
                UNION ALL
                SELECT 'pg_class'::regclass, class.oid, attribute.attnum
                    FROM pg_attribute AS attribute
                    JOIN pg_class AS class ON class.oid = attribute.attrelid
                    WHERE class.relnamespace = 'procrastinate_stalled'::regnamespace
                        -- Those of an internal type are explained where they are used.
                        AND (class.relkind IN ('r', 'p', 'v', 'm') OR (class.relkind = 'c' AND class.relname !~ '^_'))
                        AND attribute.attnum > 0
                        AND NOT attribute.attisdropped
            ) AS object (classid, objid, objsubid)
            LEFT JOIN pg_description AS description
                ON (description.classoid, description.objoid, description.objsubid)
                    = (object.classid, object.objid, object.objsubid)
            WHERE description.description IS NULL
    """,
    "SQL: every function pins search_path": """
        SELECT oid::regprocedure AS without_search_path
            FROM pg_proc
            WHERE pronamespace = 'procrastinate_stalled'::regnamespace
                AND prokind <> 'p' -- a procedure that commits cannot have a SET clause
                AND NOT EXISTS (SELECT FROM unnest(proconfig) AS setting WHERE setting LIKE 'search\\_path=%')
    """,
    "SQL: every function runs with the rights of its caller": """
        SELECT oid::regprocedure AS security_definer
            FROM pg_proc
            WHERE pronamespace = 'procrastinate_stalled'::regnamespace AND prosecdef
    """,
    "SQL: no function is for PUBLIC": """
        SELECT routine.oid::regprocedure AS for_public
            FROM pg_proc AS routine
            CROSS JOIN LATERAL aclexplode(coalesce(routine.proacl, acldefault('f', routine.proowner))) AS privilege
            WHERE routine.pronamespace = 'procrastinate_stalled'::regnamespace AND privilege.grantee = 0
    """,
}


def main() -> int:
    """Run all of them and return the exit code."""
    verdicts = [_report(name, _run(command)) for name, command in COMMANDS.items()]
    verdicts.append(
        _report(
            "Python: client.py is made from client_async.py",
            _compare(
                generate_sync_client.PACKAGE / "client.py",
                generate_sync_client.generate(),
                "python -m scripts.generate_sync_client",
            ),
        )
    )
    with throwaway_server(cron_database="lint") as server:
        install_procrastinate(server.conninfo("lint"))
        with psycopg.connect(server.conninfo("lint"), row_factory=dict_row) as connection:
            connection.execute(MIGRATION.read_bytes())
            connection.execute("RESET ALL")
            connection.execute("CREATE EXTENSION plpgsql_check")
            verdicts += [_report(name, _query(connection, query)) for name, query in QUERIES.items()]
    return 0 if all(verdicts) else 1


def _report(name: str, problems: str) -> bool:
    print(f"{'failed' if problems else 'ok':7} {name}", flush=True)
    if problems:
        print(problems, flush=True)
    return not problems


def _run(command: list[str]) -> str:
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run([program, *command[1:]], cwd=PROJECT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def _compare(file: Path, content: str, remedy: str) -> str:
    return "" if file.read_text() == content else f"{file.relative_to(PROJECT)} is out of date. Run: {remedy}"


def _query(connection: psycopg.Connection[dict[str, Any]], query: str) -> str:
    rows = connection.execute(query.encode()).fetchall()
    return "\n".join(", ".join(f"{name}: {value}" for name, value in row.items() if value is not None) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
