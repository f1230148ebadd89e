"""Fixtures about tiny models, and one thread per process for everything that computes."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch: several threads on busy cores only wait
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A shell lets background jobs ignore Ctrl-C, and what they start too; the processes under test are to hear it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """`tiny_model(family, layout="hf", **options)` is the folder of a tiny checkpoint, made once per session.

    Options are those of `tiny_models.build`: dtype, tokenizer, seed and keys of the family's config class. Tests that
    change files must copy the folder.
    """
    import tiny_models

    built: dict[str, Path] = {}

    def get(family: tiny_models.Family, layout: tiny_models.Layout = "hf", **options: Any) -> Path:
        key = json.dumps([family, layout, options], sort_keys=True)
        if key not in built:
            folder = tmp_path_factory.mktemp(f"{family}-{layout}-") / "model"
            built[key] = tiny_models.build(folder, family, layout, **options)
        return built[key]

    return get
