"""`--load-choices synthetic`: a server without a model, whose answers are made up at a set pace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastdeploy.config import model_shape
from fastdeploy.config.args import EngineArgs
from fastdeploy.config.model_folder import model_folder
from fastdeploy.config.schema import ModelConfig, ModelShape, RopeShape, SyntheticConfig
from fastdeploy.errors import FastDeployError

NAME = "synthetic"  # served unless --served-model-name says otherwise
DEFAULT_PAGES = 4096
LONGEST_MS = 60_000.0
# A tokenizer of bytes: ids 0..255 are bytes, the next one ends an answer.
BYTE_EOS = 256
BYTE_VOCABULARY = 257
MAX_POSITIONS = 1 << 20  # without a config.json that says another number


def read_pace(settings: Mapping[str, Any] | None, problems: list[str]) -> SyntheticConfig:
    """The cost model that `--synthetic-config` describes; adds a line to `problems` for each thing wrong with it."""
    known = {field.name for field in fields(SyntheticConfig)}
    costs = {}
    for name, value in (settings or {}).items():
        if name not in known:
            problems.append(f"--synthetic-config: {name!r} is none of {', '.join(sorted(known))}")
        elif not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= LONGEST_MS:
            problems.append(f"--synthetic-config: {name} = {value!r}: must be milliseconds in 0..{LONGEST_MS:g}")
        else:
            costs[name] = float(value)
    if not problems and costs.get("step_ms") == 0:
        problems.append("--synthetic-config: step_ms = 0: must be above 0, or idle loops would keep a core busy")
    return SyntheticConfig(**costs)


def check_flags(args: EngineArgs, problems: list[str]) -> None:
    """Add a line for each flag that contradicts `--load-choices`."""
    if args.load_choices != "synthetic":
        if args.synthetic_config is not None:
            problems.append("--synthetic-config: only --load-choices synthetic takes it")
        return
    for flag, given in (
        ("--enable-expert-parallel", args.enable_expert_parallel),
        ("--tensor-parallel-size above 1", args.tensor_parallel_size > 1),
        ("--quantization", args.quantization is not None),
        ("--device cuda", args.device == "cuda"),
        (f"--splitwise-role {args.splitwise_role}", args.splitwise_role != "mixed"),
    ):
        if given:
            problems.append(f"{flag}: a synthetic server computes nothing; leave it out")


def synthetic_model(
    args: EngineArgs, max_model_len: Callable[[ModelShape], int], problems: list[str]
) -> ModelConfig | None:
    """What stands in a model's place: `--model` is optional and gives the tokenizer and the lengths.

    None when something is wrong with it, which `problems` then tells.
    """
    try:
        folder = model_folder(args.model) if args.model else None
        shape = synthetic_shape(folder)
        eos_token_ids = (BYTE_EOS,) if folder is None else model_shape.read_eos_token_ids(folder)
    except (FastDeployError, OSError) as exc:
        problems.append(str(exc))
        return None
    if args.tokenizer is not None and folder is None:
        problems.append("--tokenizer: without --model, whose config.json tells the vocabulary's size; give --model too")
    return ModelConfig(
        path="" if folder is None else str(folder),
        served_name=args.served_model_name or NAME,
        shape=shape,
        dtype="float32",
        device="cpu",
        max_model_len=max_model_len(shape),
        eos_token_ids=eos_token_ids,
        sampling_defaults={},
        tokenizer_path=None if args.tokenizer is None else str(Path(args.tokenizer).expanduser().absolute()),
        synthetic=read_pace(args.synthetic_config, problems),
    )


def synthetic_shape(folder: Path | None) -> ModelShape:
    """Vocabulary and length of the model in `folder`, which needs no weights; without one those of bytes.

    The other sizes stand for nothing. Raises ConfigError for a bad config.json.
    """
    n_vocabulary, n_positions = BYTE_VOCABULARY, MAX_POSITIONS
    if folder is not None:
        keys = model_shape.Keys(model_shape.read_config(folder), folder / model_shape.CONFIG_FILE)
        n_vocabulary = keys.whole("vocab_size")
        n_positions = keys.whole("max_position_embeddings", default=MAX_POSITIONS)
    return ModelShape(
        architecture="Synthetic",
        family="synthetic",
        hidden_size=1,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=1,
        ffn_width=1,
        vocab_size=n_vocabulary,
        max_positions=n_positions,
        norm_eps=1.0,
        tied_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        qk_norm=False,
        rope=RopeShape(theta=1.0, style="half_split"),
    )
