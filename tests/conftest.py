"""What many tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 training and 7 validation samples of 16^3, as npy pairs."""
    return write_tiny(tmp_path_factory.mktemp("tiny"), train=26, validation=7)
