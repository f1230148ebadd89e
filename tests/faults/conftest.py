"""The model that servers under test run, and where the faults to inject lie."""

from collections.abc import Callable
from pathlib import Path

import pytest

MAX_LEN = 4096


@pytest.fixture(scope="session")
def model(tiny_model: Callable[..., Path]) -> Path:
    """Eight layers; an answer of its whole length takes much longer than any test looks at it."""
    return tiny_model("ernie4_5_moe", tokenizer=True, max_position_embeddings=MAX_LEN, num_hidden_layers=8)


@pytest.fixture(scope="session")
def saboteur() -> dict[str, str]:
    """Environment of a server whose requests can make it fail; see `injected/sitecustomize.py`."""
    return {"PYTHONPATH": str(Path(__file__).with_name("injected"))}
