"""Lets the tests of this folder import the helpers beside them and above, and shares reference models."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Any]:
    """`reference(folder)` is the transformers model of a folder in the HF layout, loaded once per session."""
    import tiny_models
    import torch

    torch.set_num_threads(1)
    loaded: dict[Path, Any] = {}

    def get(folder: Path) -> Any:
        if folder not in loaded:
            loaded[folder] = tiny_models.reference_model(folder)
        return loaded[folder]

    return get
