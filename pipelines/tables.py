"""Text tables for terminals."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.errors import printable


def format_table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return `rows` in aligned columns: those with an index in `left` flush left, the others flush right."""
    # Names of files and folders may contain any character.
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
