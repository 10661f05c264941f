"""What the command line and Django's admin tell those who write a rule. What a value must be, the database decides."""

from __future__ import annotations

import re

HOW_TO_WRITE_A_DURATION = "Write a duration as PostgreSQL does: 90 seconds, 5 min, 1 hour 30 min, 2 days."

# The columns that an error of the table is about, each with its comment. %(constraint)s or %(column)s may be NULL.
REFUSED_COLUMNS = """
SELECT attribute.attname, pg_catalog.col_description(attribute.attrelid, attribute.attnum)
    FROM pg_catalog.pg_attribute AS attribute
    LEFT JOIN pg_catalog.pg_constraint AS refusing
        ON refusing.conrelid OPERATOR(pg_catalog.=) attribute.attrelid
            AND refusing.conname OPERATOR(pg_catalog.=) %(constraint)s
    WHERE attribute.attrelid OPERATOR(pg_catalog.=) pg_catalog.to_regclass('procrastinate_stalled.rules')
        AND (
            attribute.attname OPERATOR(pg_catalog.=) %(column)s
            OR attribute.attnum OPERATOR(pg_catalog.=) ANY (refusing.conkey)
        )
    ORDER BY attribute.attnum
"""


def has_no_unit(duration: str) -> bool:
    """Return whether a duration is a bare number, which is not 0.

    PostgreSQL takes it for seconds. Who writes 90 means minutes as often as not.
    """
    return duration.strip() != "0" and re.fullmatch(r"\s*[+-]?[\d.]+\s*", duration) is not None
