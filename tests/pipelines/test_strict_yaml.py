"""YAML files: duplicate keys, numbers of YAML 1.1, endless aliases and damaged documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import DataError
from pipelines.strict_yaml import parse_yaml, read_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))


def test_values_are_what_was_written() -> None:
    text = "[1e3, 1_000, 0x10, 0b11, 1.5, -2, yes, off, ~, 1:30, 010, 00, 1:30.5, 2026-01-01, 007.5]"
    assert parse_yaml(text) == [
        "1e3", 1000, 16, 3, 1.5, -2, True, False, None, "1:30", "010", "00", "1:30.5", "2026-01-01", 7.5,
    ]  # fmt: skip
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a is on line 1 already"),
        ("a:\n  b: {c: 1,\n      c: 1}\n", 3, "c"),
        ("- {a: 1}\n- a: 1\n  'a': 1\n", 3, "a"),
        ("base: &b {x: 1}\nuse:\n  <<: *b\n  <<: *b\n", 4, "<<"),
        ("base: &b {x: 1, x: 2}\nuse: {<<: *b}\n", 1, "x"),
        ("a: 1\n---\na: 1\n", 2, "document"),
        ("a:\n\tb: 1\n", 2, "t'"),
        ("a: 1\nb: !!python/object/apply:os.getcwd []\n", 2, "tag"),
        ("a: 1\nb: &b {c: [*b]}\n", 2, "*b contains itself"),
        (BOMB, 12, "values"),
    ],
)
def test_documents_that_do_not_mean_one_thing_are_refused_by_line(text: str, line: int, word: str) -> None:
    with pytest.raises(ValueError, match=f"line {line}: ") as refusal:
        parse_yaml(text)
    message = str(refusal.value)
    assert word in message and "\n" not in message


@pytest.mark.parametrize("text", ["!!int x", "!!timestamp x", "!!bool x", "0x_", "[" * 3000, "9" * 5000])
def test_values_that_cannot_be_built_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_yaml(text)


def test_merged_keys_may_be_replaced() -> None:
    text = "base: &b {x: 1, y: 1}\nmore: &m {<<: *b, y: 2}\nuse: {<<: *m, x: 3}\nagain: {<<: [*m, *b]}\n"
    tree = parse_yaml(text)
    assert tree["use"] == {"x": 3, "y": 2} and tree["again"] == {"x": 1, "y": 2}


def test_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for content in (b"a: 1\na: 2\n", b"# caf\xe9\na: 1\n"):
        path.write_bytes(content)
        with pytest.raises(DataError) as refusal:
            read_yaml(path)
        assert refusal.value.path == str(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert read_yaml(path) == {"a": 1}
