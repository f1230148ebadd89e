"""Rank processes that all tests of this folder share, and the path to the helpers beside them and above."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from rank_processes import RankProcesses  # noqa: E402


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankProcesses]:
    """Up to eight processes, started when first needed; each test makes groups of its own among them."""
    processes = RankProcesses()
    yield processes
    processes.stop()
