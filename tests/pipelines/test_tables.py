"""Text tables."""

from __future__ import annotations

from pipelines.tables import format_table


def test_columns_are_aligned_and_trailing_blanks_removed() -> None:
    rows = [["name", "n", ""], ["a", "10", "note"], ["longer", "7", ""]]
    assert format_table(rows, left=(0, 2)).splitlines() == ["name     n", "a       10  note", "longer   7"]
