"""What a hostile user can create: objects that have the names of others, and tell when they are taken for those.

Wherever a name is looked up in a search_path that begins with their schema, they are found.
"""

import re
from typing import Any

import psycopg
from psycopg import sql

from tests.jobs import rows
from tests.server import PROJECT

Connection = psycopg.Connection[Any]

CAPTURED = "HV000"
"""The SQLSTATE of the error that they raise."""

# A type of its own for each call: it can be no argument or result of a function in plpgsql.
UNUSABLE = "typtype = 'p' AND typname !~ '^any.' AND typname NOT IN ('record', 'void')"

# PostgreSQL has most operators for like types only. Of unlike ones, these are those that fit a call to the letter.
OPERATORS = ["=", "<>", "<", "<=", ">", ">=", "||", "~~", "~"]
TYPES = ["text", "varchar", "name", "integer", "bigint", "numeric", "double precision"]


def create_shadows(connection: Connection, schema: str, procrastinate: str, *, fitting: bool = True) -> None:
    """Fill a schema with shadows of all that the sources in `sql/` name, and of much more.

    Parameters
    ----------
    procrastinate :
        The schema that Procrastinate is in. Its objects and ours are shadowed too, if it is another one.
    fitting :
        Also functions and operators whose arguments fit a call better than those of PostgreSQL's.
    """
    words = sorted(set(re.findall(r"\w+", "".join(file.read_text() for file in PROJECT.glob("sql/[0-9]*.sql")))))
    catalogs = ["pg_catalog"] if schema == procrastinate else ["pg_catalog", "procrastinate_stalled", procrastinate]
    connection.execute("SELECT set_config('search_path', 'pg_catalog', true)")
    # A sequence remembers, whoever catches the error and whatever is rolled back.
    statements = [
        """
        CREATE SEQUENCE {schema}.captures;
        CREATE FUNCTION {schema}.captured(what text) RETURNS boolean LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_catalog.nextval('{schema}.captures'::pg_catalog.regclass);
            RAISE EXCEPTION 'captured: %%', what USING ERRCODE = 'HV000';
        END
        $$
        """.replace("{schema}", schema).replace("%%", "%"),
        *_functions(connection, schema, words, catalogs, fitting=fitting),
        *_operators(connection, schema, procrastinate, fitting=fitting),
        *_types(connection, schema, words),
        *([] if schema == procrastinate else _enums(schema)),
        *_views(connection, schema, words, catalogs),
    ]
    connection.execute(";\n".join(statements).encode())
    connection.execute("SELECT set_config('search_path', 'pg_catalog', true)")


def captures(connection: Connection, schema: str) -> int:
    """How often one of them was taken for another object so far."""
    query = sql.SQL("SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS number FROM {}")
    (row,) = connection.execute(query.format(sql.Identifier(schema, "captures"))).fetchone() or (0,)
    return int(row)


def _function(schema: str, name: str, arguments: str, result: str, original: str) -> str:
    return (
        f"CREATE FUNCTION {schema}.{_quoted(name)}({arguments}) RETURNS {result} LANGUAGE plpgsql AS $$ "
        f"BEGIN PERFORM {schema}.captured({_literal(original)}); END $$"
    )


def _functions(
    connection: Connection, schema: str, words: list[str], catalogs: list[str], *, fitting: bool
) -> list[str]:
    """Functions with the same arguments; those of aggregates make a call fail before it begins."""
    found = rows(
        connection,
        f"""
        SELECT DISTINCT ON (proname, arguments)
               proname AS name,
               arguments,
               CASE WHEN proretset THEN 'SETOF ' ELSE '' END || format_type(prorettype, NULL) AS result
            FROM pg_proc
            CROSS JOIN LATERAL (
                SELECT coalesce(string_agg(
                           CASE WHEN provariadic <> 0 AND number = pronargs THEN 'VARIADIC ' ELSE '' END
                               || format_type(type, NULL),
                           ', ' ORDER BY number
                       ), '') AS arguments
                    FROM unnest(proargtypes) WITH ORDINALITY AS argument (type, number)
            ) AS argument
            JOIN pg_namespace ON pg_namespace.oid = pronamespace
            WHERE nspname = ANY (%s)
                AND proname = ANY (%s)
                AND NOT EXISTS (
                    SELECT FROM pg_type WHERE oid = ANY (prorettype || proargtypes::oid[]) AND {UNUSABLE}
                )
            ORDER BY proname, arguments
        """,
        catalogs,
        words,
    )
    # Those that take anything, such as format(), for which plpgsql has other words.
    found += [
        {**function, "arguments": arguments}
        for function in rows(
            connection,
            """
            SELECT DISTINCT proname AS name, format_type(prorettype, NULL) AS result
                FROM pg_proc
                WHERE pronamespace = 'pg_catalog'::regnamespace
                    AND proname = ANY (%s)
                    AND provariadic = '"any"'::regtype
            """,
            words,
        )
        for arguments in ("text, text", "text, bigint", "text, text, text", "VARIADIC anycompatiblearray")
        if fitting
    ]
    return [
        _function(schema, row["name"], row["arguments"], row["result"], f"{row['name']}({row['arguments']})")
        for row in found
    ]


def _operators(connection: Connection, schema: str, procrastinate: str, *, fitting: bool) -> list[str]:
    enums = (f"{_quoted(procrastinate)}.procrastinate_job_{kind}" for kind in ("status", "event_type"))
    types = [*TYPES, *enums]
    found = rows(
        connection,
        f"""
        SELECT oprname AS name,
               format_type(nullif(oprleft, 0), NULL) AS leftarg,
               format_type(oprright, NULL) AS rightarg,
               format_type(oprresult, NULL) AS result
            FROM pg_operator
            WHERE oprnamespace = 'pg_catalog'::regnamespace
                AND NOT EXISTS (SELECT FROM pg_type WHERE oid IN (oprleft, oprright, oprresult) AND {UNUSABLE})
        UNION
        SELECT operator,
               format_type(leftarg, NULL),
               format_type(rightarg, NULL),
               CASE operator WHEN '||' THEN 'text' ELSE 'boolean' END
            FROM unnest(%s::text[]) AS operator
            CROSS JOIN unnest(%s::regtype[]) AS leftarg
            CROSS JOIN unnest(%s::regtype[]) AS rightarg
        """,
        OPERATORS if fitting else [],
        types,
        types,
    )
    statements = []
    for number, row in enumerate(found):
        left = [] if row["leftarg"] is None else [row["leftarg"]]
        name, operands = f"operator_{number}", [*left, row["rightarg"]]
        statements += [
            _function(schema, name, ", ".join(operands), row["result"], f"{row['name']} ({', '.join(operands)})"),
            f"CREATE OPERATOR {schema}.{row['name']} (FUNCTION = {schema}.{name}, RIGHTARG = {row['rightarg']}"
            + "".join(f", LEFTARG = {operand}" for operand in left)
            + ")",
        ]
    return statements


def _types(connection: Connection, schema: str, words: list[str]) -> list[str]:
    """Domains of the same names that refuse every value."""
    found = rows(
        connection,
        """
        SELECT typname AS name
            FROM pg_type
            WHERE typnamespace = 'pg_catalog'::regnamespace
                AND typname = ANY (%s)
                AND typtype = 'b'
                AND typcategory <> 'A'
        """,
        words,
    )
    return [
        f"CREATE DOMAIN {schema}.{_quoted(row['name'])} AS pg_catalog.{_quoted(row['name'])} "
        f"CHECK ({schema}.captured({_literal('type ' + row['name'])}))"
        for row in found
    ]


def _enums(schema: str) -> list[str]:
    return [
        f"CREATE TYPE {schema}.{name} AS ENUM ('captured')"
        for name in ("procrastinate_job_status", "procrastinate_job_event_type")
    ]


def _views(connection: Connection, schema: str, words: list[str], catalogs: list[str]) -> list[str]:
    """Views that have the names and columns of tables, and can be neither read nor written."""
    found = rows(
        connection,
        """
        SELECT relname AS name,
               string_agg(
                   format('NULL::%%s AS %%I', format_type(atttypid, atttypmod), attname), ', ' ORDER BY attnum
               ) AS columns
            FROM pg_class
            JOIN pg_namespace ON pg_namespace.oid = relnamespace
            JOIN pg_attribute ON attrelid = pg_class.oid AND attnum > 0 AND atttypid NOT IN (0, 'anyarray'::regtype)
            WHERE nspname = ANY (%s) AND relkind IN ('r', 'v') AND relname = ANY (%s)
            GROUP BY relname
        """,
        catalogs,
        words,
    )
    return [
        f"CREATE VIEW {schema}.{row['name']} AS SELECT {row['columns']} "
        f"WHERE {schema}.captured({_literal('table ' + row['name'])}) "
        "OFFSET 0"  # or the planner would find that there is no row, and not call it
        for row in found
    ]


def _quoted(name: str) -> str:
    return sql.Identifier(name).as_string()


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()
