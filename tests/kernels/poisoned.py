"""Fresh memory full of NaN (integers: their largest value), so that what a kernel forgets to write shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

# Triton's interpreter computes with numpy, which warns of NaN and infinity where a GPU does not, and of the way in
# which the interpreter takes loop bounds.
NUMPY_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*encountered in:RuntimeWarning", "ignore:Conversion of an array with ndim:DeprecationWarning"
)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty of the test is poisoned."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
