"""Flags: one field is one flag, the same on the command line and as a keyword."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fastdeploy.config.args import EngineArgs, ServerArgs
from fastdeploy.config.flags import UnknownOption, build_parser, flags_of
from fastdeploy.config.support import ALSO_FINE, NO_EFFECT, NOT_YET
from fastdeploy.errors import ConfigError

pytestmark = pytest.mark.timeout(60)

# Every flag of the original's api_server, as users write them.
PUBLIC_FLAGS = """
host port workers metrics-port controller-port max-waiting-time max-concurrency enable-mm-output
timeout-graceful-shutdown timeout api-key
model served-model-name revision model-config-name tokenizer tokenizer-base-url max-model-len block-size task runner
convert model-impl override-pooler-config use-warmup limit-mm-per-prompt mm-processor-kwargs max-encoder-cache
max-processor-cache enable-mm reasoning-parser chat-template tool-call-parser tool-parser-plugin speculative-config
dynamic-load-weight load-strategy rsync-config load-choices quantization graph-optimization-config
plas-attention-config guided-decoding-backend guided-decoding-disable-any-whitespace enable-logprob max-logprobs
logprobs-mode enable-keep-sampling-mask enable-entropy seed enable-early-stop early-stop-config lm_head-fp32
logits-processors engine-worker-queue-port
tensor-parallel-size data-parallel-size local-data-parallel-id enable-expert-parallel ips max-num-seqs
num-gpu-blocks-override max-num-batched-tokens gpu-memory-utilization disable-custom-all-reduce
enable-flashinfer-allreduce-fusion use-internode-ll-two-stage disable-sequence-parallel-moe enable-chunked-moe
chunked-moe-size enable-eplb eplb-config routing-replay-config shutdown-comm-group-if-worker-idle
cache-queue-port kv-cache-ratio swap-space prealloc-dec-block-slot-num-threshold static-decode-blocks
kvcache-storage-backend write-policy enable-prefix-caching enable-output-caching enable-chunked-prefill
max-num-partial-prefills max-long-partial-prefills long-prefill-token-threshold disable-chunked-mm-input
splitwise-role cache-transfer-protocol pd-comm-port rdma-comm-ports router innode-prefill-ports
scheduler-name scheduler-max-size scheduler-ttl scheduler-host scheduler-port scheduler-db scheduler-password
scheduler-topic scheduler-min-load-score scheduler-load-shards-num scheduler-sync-period scheduler-expire-period
scheduler-release-load-expire-period scheduler-reader-parallel scheduler-writer-parallel scheduler-reader-batch-size
scheduler-writer-batch-size enable-overlap-schedule
"""

FLAGS = (*flags_of(ServerArgs), *flags_of(EngineArgs))


def parse(*argv: str) -> tuple[ServerArgs, EngineArgs]:
    namespace = build_parser("test", ServerArgs, EngineArgs).parse_flags(argv)
    return ServerArgs.from_namespace(namespace), EngineArgs.from_namespace(namespace)


def test_every_public_flag_exists() -> None:
    missing = {name.replace("_", "-") for name in PUBLIC_FLAGS.split()} - {flag.option[2:] for flag in FLAGS}
    assert not missing


def test_no_flags_is_the_defaults() -> None:
    assert parse() == (ServerArgs(), EngineArgs())
    assert EngineArgs.from_kwargs() == EngineArgs()


def test_tables_of_support_name_existing_flags_once() -> None:
    names = {flag.name for flag in FLAGS}
    assert NOT_YET.keys() <= names
    assert NO_EFFECT.keys() <= names
    assert not NOT_YET.keys() & NO_EFFECT.keys()
    assert ALSO_FINE.keys() <= NOT_YET.keys() | NO_EFFECT.keys()


def test_spellings() -> None:
    _, engine = parse("--load_choices", "dummy", "-tp", "2", "--max_model_len=128", "--lm_head-fp32")
    assert (engine.load_choices, engine.tensor_parallel_size, engine.max_model_len) == ("dummy", 2, 128)
    assert engine.lm_head_fp32


def test_underscores_of_values_stay() -> None:
    server, engine = parse("--served-model-name=my_model", "--chat_template", "a_b", "--api-key=x_y")
    assert (engine.served_model_name, engine.chat_template, server.api_key) == ("my_model", "a_b", ("x_y",))


@pytest.mark.parametrize(
    ("argv", "value"),
    [([], None), (["--enable-chunked-prefill"], True), (["--no-enable-chunked-prefill"], False)],
)
def test_boolean_with_automatic_default(argv: list[str], value: bool | None) -> None:
    assert parse(*argv)[1].enable_chunked_prefill is value


def test_booleans_that_are_on_can_be_switched_off() -> None:
    engine = parse("--no-enable-prefix-caching", "--no_enable_output_caching")[1]
    assert (engine.enable_prefix_caching, engine.enable_output_caching) == (False, False)


@pytest.mark.parametrize("argv", [["1,2,3"], ["1, 2,3"], ["1", "2", "3"], ["1,2", "3"]])
def test_port_lists(argv: list[str]) -> None:
    assert parse("--cache-queue-port", *argv)[1].cache_queue_port == (1, 2, 3)


def test_a_list_flag_may_be_repeated() -> None:
    assert parse("--api-key", "a", "--api-key", "b,c")[0].api_key == ("a", "b", "c")


def test_json_flags() -> None:
    engine = parse("--eplb-config", '{"a": [1]}', "--quantization", "wint4")[1]
    assert (engine.eplb_config, engine.quantization) == ({"a": [1]}, "wint4")
    assert parse("--quantization", '{"kind": "wint4"}')[1].quantization == {"kind": "wint4"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prt", "1"], "--prt: no such flag; did you mean --port?"),
        (["--prt=1"], "--prt: no such flag; did you mean --port?"),
        (["--max-num"], "--max-num: no such flag"),  # no abbreviations: they change meaning when a flag is added
        (["--port", "x"], "--port: expected an integer, got 'x'"),
        (["--port"], "--port: expected one argument"),
        (["--gpu-memory-utilization", "x"], "--gpu-memory-utilization: expected a number, got 'x'"),
        (["--dtype", "int8"], "--dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"),
        (["--cache-queue-port", "1,x"], "--cache-queue-port: expected an integer, got '1,x'"),
        (["--eplb-config", "{"], "--eplb-config: expected a JSON object"),
        (["--eplb-config", "[]"], "--eplb-config: expected a JSON object, got '[]'"),
        (["model"], "'model' belongs to no flag"),
    ],
)
def test_command_line_errors(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(*argv)


def test_kwargs_take_python_values_and_strings() -> None:
    args = EngineArgs.from_kwargs(
        model=Path("/m"),
        engine_worker_queue_port="6077,6078",
        cache_queue_port=8003,
        pd_comm_port=[1, "2"],
        ips=["a", "b"],
        max_num_seqs="4",
        gpu_memory_utilization=1,
        quantization=None,
        eplb_config={"a": 1},
    )
    assert args.model == "/m"
    assert (args.engine_worker_queue_port, args.cache_queue_port, args.pd_comm_port) == ((6077, 6078), (8003,), (1, 2))
    assert (args.ips, args.max_num_seqs, args.gpu_memory_utilization) == (("a", "b"), 4, 1.0)
    assert args.eplb_config == {"a": 1}


def test_unknown_keyword_names_the_closest() -> None:
    with pytest.raises(UnknownOption) as caught:
        EngineArgs.from_kwargs(model="m", max_num_seq=3, port=8000, zzzz=1)
    assert isinstance(caught.value, TypeError)
    assert str(caught.value).splitlines() == [
        "max_num_seq: no such argument; did you mean max_num_seqs?",
        "port: only a server takes it",
        "zzzz: no such argument",
    ]


def test_wrong_keyword_types_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineArgs.from_kwargs(model=3, max_num_seqs=True, enable_prefix_caching="yes", gpu_memory_utilization=None)
    assert str(caught.value).splitlines() == [
        "model: expected a string, got 3",
        "max_num_seqs: expected an integer, got True",
        "enable_prefix_caching: expected True or False, got 'yes'",
        "gpu_memory_utilization: expected a number, got None",
    ]


def test_args_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineArgs().model = "x"  # type: ignore[misc]


def test_help_shows_honoured_flags_with_defaults_and_lists_the_others() -> None:
    text = build_parser("test", ServerArgs, EngineArgs, epilog="Example:\n  serve --port 1").format_help()
    words = text.split()
    for flag in FLAGS:
        assert any(word.strip(",") in (flag.option, f"--[no-]{flag.option[2:]}") for word in words), flag.option
    assert "(default: 8000)" in text
    assert "--[no-]enable-prefix-caching" in text
    assert text.rstrip().endswith("Example:\n  serve --port 1")
    assert max(map(len, text.splitlines())) <= 120
