"""Fixtures for tests of conversion."""

from __future__ import annotations

from collections.abc import Iterator

import helpers
import pytest


@pytest.fixture
def inline_workers() -> Iterator[None]:
    """Run tasks in this process."""
    with helpers.inline_workers():
        yield
