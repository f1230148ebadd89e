"""Chat messages to prompt text, by a Jinja template.

Owns which template is used, what a template may see and do, and what becomes of its errors. The template of the
checkpoint and that of `--chat-template` are compiled once and run here. A template that a request brings is a
stranger's program, and the sandbox bounds what it can reach, not what it costs; it runs in a process of its own.

Bounds. All templates: no attribute whose name starts with an underscore, no method that changes its object, `range` up
to 100,000, no other template or file, output up to `MAX_TEXT_CHARS`. Templates of requests besides: text up to
`MAX_TEMPLATE_CHARS`, `CPU_LIMIT_S` of processor time, `MEMORY_LIMIT_BYTES` of address space, no file written, no
environment variables, `WALL_LIMIT_S` until given up, `N_CHILDREN` at a time.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastdeploy.errors import CheckpointError, ConfigError, InvalidRequest, Overloaded

if TYPE_CHECKING:
    from fastdeploy.frontend.tokenizer import Tokenizer

MAX_TEXT_CHARS = 16_000_000
MAX_TEMPLATE_CHARS = 200_000
MAX_ERROR_CHARS = 1000
CPU_LIMIT_S = 2
WALL_LIMIT_S = 20.0
MEMORY_LIMIT_BYTES = 512 << 20
N_CHILDREN = 4
CHILD_COMMAND = "from fastdeploy.frontend.chat_template import render_child; render_child()"
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})


class RefusedByTemplateError(Exception):
    """The template called `raise_exception`: it does not take these messages."""


class ChatTemplate:
    """The chat templates of one server; safe to use from several threads.

    `server_template` (the value of `--chat-template`: a file, or the template itself) comes before the checkpoint's.
    Raises `ConfigError` or `CheckpointError` when the one or the other is no template.
    """

    def __init__(self, tokenizer: Tokenizer, server_template: str | None = None) -> None:
        self._special_tokens = tokenizer.special_tokens
        self._children = threading.BoundedSemaphore(N_CHILDREN)
        self.source = tokenizer.chat_template
        self._compiled: jinja2.Template | None = None
        if server_template is not None:
            self.source = _text_of_flag(server_template)
        if self.source is None:
            return
        try:
            self._compiled = _environment().from_string(self.source)
        except jinja2.TemplateError as exc:
            if server_template is not None:
                raise ConfigError(f"--chat-template is not a usable template: {exc}") from exc
            raise CheckpointError(
                f"the checkpoint's chat template is not usable: {exc}; pass another with --chat-template"
            ) from exc

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation. `chat_template` is the request's own; `kwargs` are seen by the template.

        The request's own template can take seconds: call this from a thread when there is one.
        Raises `InvalidRequest` for malformed messages and whatever goes wrong in the template.
        """
        reserved = RESERVED & kwargs.keys()
        if reserved:
            raise InvalidRequest(
                f"chat_template_kwargs: {', '.join(sorted(reserved))} cannot be set here", "chat_template_kwargs"
            )
        variables = {
            **self._special_tokens,
            **kwargs,
            "messages": _plain_messages(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        if chat_template is not None and chat_template != self.source:
            return self._render_apart(chat_template, variables)
        if self._compiled is None:
            raise InvalidRequest(
                "this model has no chat template: start the server with --chat-template, "
                "send chat_template, or use /v1/completions",
                "messages",
            )
        try:
            return self._compiled.render(variables)
        except Exception as exc:  # whatever a template does is the matter of this request alone
            raise InvalidRequest(_explain(exc), "messages") from exc

    def _render_apart(self, template: str, variables: Mapping[str, Any]) -> str:
        """Runs a template that a request brought in a process of its own, within limits."""
        if len(template) > MAX_TEMPLATE_CHARS:
            raise InvalidRequest(f"chat_template must have at most {MAX_TEMPLATE_CHARS} characters", "chat_template")
        try:
            order = json.dumps({"template": template, "variables": variables}).encode()
        except (TypeError, ValueError) as exc:
            raise InvalidRequest(f"messages, tools and chat_template_kwargs must be JSON: {exc}", "messages") from exc
        if not self._children.acquire(timeout=WALL_LIMIT_S):
            raise Overloaded(f"{N_CHILDREN} chat templates of requests are being rendered already", "chat_template")
        try:
            done = subprocess.run(
                [sys.executable, "-c", CHILD_COMMAND],
                input=order,
                capture_output=True,
                timeout=WALL_LIMIT_S,
                check=False,
                env=_child_environment(),
            )
        except subprocess.TimeoutExpired as exc:
            raise InvalidRequest(f"chat_template was not rendered in {WALL_LIMIT_S:.0f} s", "chat_template") from exc
        finally:
            self._children.release()
        if done.returncode > 0 and b"MemoryError" not in done.stderr:
            raise RuntimeError(f"the process for chat templates failed: {done.stderr[-MAX_ERROR_CHARS:].decode()}")
        if done.returncode != 0:
            raise InvalidRequest(
                f"chat_template took more than {CPU_LIMIT_S} s of processor time "
                f"or {MEMORY_LIMIT_BYTES >> 20} MiB of memory",
                "chat_template",
            )
        answer = json.loads(done.stdout)
        if "text" not in answer:
            raise InvalidRequest(answer["error"], answer["param"])
        return str(answer["text"])


def render_child() -> None:
    """Body of the process for a request's template: an order as JSON on standard input, the answer on output."""
    for limit, amount in (
        (resource.RLIMIT_CPU, CPU_LIMIT_S),
        (resource.RLIMIT_AS, MEMORY_LIMIT_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (amount, amount))
    answer: dict[str, str]
    try:
        order = json.load(sys.stdin.buffer)
        answer = {"text": _environment().from_string(order["template"]).render(order["variables"])}
    except Exception as exc:  # every fault of the template is the answer
        refused = isinstance(exc, RefusedByTemplateError)
        answer = {"error": _explain(exc), "param": "messages" if refused else "chat_template"}
    sys.stdout.write(json.dumps(answer))


class _GenerationTag(Extension):
    """`{% generation %}` marks what training learns; for a prompt only its content matters."""

    tags = {"generation"}  # noqa: RUF012  the attribute is declared by the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a bound on the text of a template, a block or a macro."""

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        kept: list[str] = []
        n_chars = 0
        for part in parts:
            n_chars += len(part)
            if n_chars > MAX_TEXT_CHARS:
                raise ValueError(f"the text is longer than {MAX_TEXT_CHARS} characters")
            kept.append(part)
        return "".join(kept)


def _environment() -> _Environment:
    """What chat templates on the Hugging Face hub expect to find: white-space rules, tags, filters and functions."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` writes <, > and & for HTML pages; a model must see the characters themselves."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise RefusedByTemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _explain(exc: Exception) -> str:
    text = str(exc)[:MAX_ERROR_CHARS]
    if isinstance(exc, RefusedByTemplateError):
        return f"the chat template refuses the messages: {text}"
    return f"the chat template failed: {type(exc).__name__}: {text}"


def _child_environment() -> dict[str, str]:
    """Where to find modules, and what the loader and the clock need; no keys, tokens or paths of the server."""
    passed = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}
    return {**passed, "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)}


def _text_of_flag(value: str) -> str:
    """The template that `--chat-template` means: what holds Jinja brackets is a template, all else a path."""
    if "{{" in value or "{%" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"--chat-template: {value!r} is neither a readable file nor a template: {exc}") from exc


def _plain_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", "messages")
    return [_plain_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain_message(message: object, at: str) -> dict[str, Any]:
    """The message as templates expect it: content a string, arguments of tool calls an object."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{at} must be an object with a string as role", at)
    plain = {**message, "content": _plain_content(message.get("content"), f"{at}.content")}
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, (list, tuple)):
            raise InvalidRequest(f"{at}.tool_calls must be a list", f"{at}.tool_calls")
        plain["tool_calls"] = [_plain_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return plain


def _plain_content(content: object, at: str) -> str:
    """The text of a message; text parts are joined by newlines."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise InvalidRequest(f"{at} must be a string or a list of text parts", at)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f'{at}[{i}] is of type {kind!r}; this model takes {{"type": "text", "text": "..."}} only', at
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _plain_call(call: object, at: str) -> dict[str, Any]:
    """OpenAI's clients send the arguments as a string of JSON, templates write them with `tojson`."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise InvalidRequest(f"{at} must be an object with a function", at)
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except ValueError as exc:
            raise InvalidRequest(f"{at}.function.arguments is not JSON: {exc}", f"{at}.function.arguments") from exc
    return {**call, "function": function}
