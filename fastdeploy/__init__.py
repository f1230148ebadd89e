"""fastdeploy: a server for large language models, centred on data and expert parallelism.

Nothing heavy is imported here: `LLM` and `SamplingParams` are looked up when first used, so that `import fastdeploy`
and `--help` answer at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdeploy.llm import LLM
    from fastdeploy.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_HOME = {"LLM": "fastdeploy.llm", "SamplingParams": "fastdeploy.sampling_params"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdeploy' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
