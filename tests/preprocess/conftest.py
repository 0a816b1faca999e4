"""What tests of preparation share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import jobs_here


@pytest.fixture
def here() -> Iterator[None]:
    """Workers' jobs are done by this process."""
    with jobs_here():
        yield
