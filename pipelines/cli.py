"""Command lines whose complaint is one line, as every other fault's is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from pipelines.errors import UserError
from pipelines.exits import launched, report_errors


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises a UserError where argparse would print its usage on every rank."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError."""
        raise UserError(f"{message}; see --help")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments in `argv`, or the process's own; it ends with one line where they make no sense."""
        with report_errors(launched()):
            return self.parse_args(argv)
