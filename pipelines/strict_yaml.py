"""Strict reading of YAML.

In YAML 1.1 the second of two equal keys replaces the first, 1:30 is the number 90, 010 is 8, and a date is
not text. Here a duplicate key is an error, and such values remain the text that was written, which no numeric
setting accepts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import DataError
from pipelines.filesystem import read_text

_MAX_VALUES = 10_000
"""Values in a document with its aliases written out, at most: nine aliases of aliases make billions."""

_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|.*:.*")
"""Octal and sexagesimal numbers of YAML 1.1; YAML 1.2 reads decimal numbers or text."""

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, stricter where it composes the document."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = 0
        self._sizes: dict[yaml.Node, int] = {}

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Return the tag of a value."""
        tag = super().resolve(kind, value, implicit)
        ambiguous = tag in (_TAG + "int", _TAG + "float") and _AMBIGUOUS.fullmatch(value)
        return _TAG + "str" if ambiguous or tag == _TAG + "timestamp" else tag

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the node of the next value, which an alias shares with its anchor; count values."""
        event, before = self.peek_event(), self._values
        node: Any = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            self._values += 1
            self._sizes[node] = self._values - before
        elif node in self._sizes:
            self._values += self._sizes[node]
        else:
            raise _error(f"*{event.anchor} contains itself", event)
        if self._values > _MAX_VALUES:
            raise _error(f"more than {_MAX_VALUES} values, with aliases written out", event)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Return the node of a mapping. Its keys may replace those that `<<` merges into it later."""
        mapping = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode):
                written, line = (key.tag, key.value), key.start_mark.line + 1
                if written in lines:
                    raise _error(f"the key {key.value} is on line {lines[written]} already", key)
                lines[written] = line
        return mapping


def parse_yaml(text: str) -> Any:
    """Return the only document in `text`; raise ValueError, with one line as message, if it is not valid."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(where + " ".join(str(error.problem).split())) from error
    except Exception as error:  # the constructors of tags such as !!int raise many errors
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def read_yaml(path: Path) -> Any:
    """Return the content of the YAML file at `path`.

    Raises:
        DataError: The file is not valid YAML (the error names line and key), or is not a regular file.
        OSError: The file cannot be read.
    """
    try:
        return parse_yaml(read_text(path))
    except ValueError as error:
        raise DataError(path, f"is not valid YAML ({error})", "fix the file") from error


def _error(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)
