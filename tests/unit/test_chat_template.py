"""Chat templates: what they see, what becomes of their faults, and that one from a request can do no harm."""

import json
import os
from datetime import datetime

import pytest

from fastdeploy.errors import CheckpointError, ConfigError, InvalidRequest, Overloaded
from fastdeploy.frontend import chat_template as module
from fastdeploy.frontend.chat_template import ChatTemplate
from fastdeploy.frontend.tokenizer import TextRule, Tokenizer

pytestmark = pytest.mark.timeout(240)

CHATML = """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
ERNIE = """
{%- if add_generation_prompt is not defined -%}{%- set add_generation_prompt = true -%}{%- endif -%}
{%- if cls_token is not defined -%}{%- set cls_token = "<|begin_of_sentence|>" -%}{%- endif -%}
{%- if sep_token is not defined -%}{%- set sep_token = "<|end_of_sentence|>" -%}{%- endif -%}
{{- cls_token -}}
{%- for message in messages -%}
    {%- if message["role"] == "user" -%}
        {{- "User: " + message["content"] + "\\n" -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "Assistant: " + message["content"] + sep_token -}}
    {%- elif message["role"] == "system" -%}
        {{- message["content"] + "\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "Assistant: " -}}{%- endif -%}
"""
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "你好 😀"},
]
HI = [{"role": "user", "content": "hi"}]


class NoTokens:
    """A backend for templates only: nothing here encodes."""

    rule = TextRule()
    vocab_size = 0
    special_ids: frozenset[int] = frozenset()
    encode_batch = id_of = token_bytes = None


def make(template=None, flag=None, **special_tokens):
    return ChatTemplate(Tokenizer(NoTokens(), special_tokens, (), template), flag)


def refusal(call):
    with pytest.raises(InvalidRequest) as caught:
        call()
    return caught.value


# ---- what a template says ----------------------------------------------------------------------------------------


def test_chatml():
    assert make(CHATML).render(HI) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert make(CHATML).render(TALK, add_generation_prompt=False).endswith("你好 😀<|im_end|>\n")


@pytest.mark.parametrize("tokens", [{}, {"cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>"}])
def test_ernie(tokens):
    assert make(ERNIE, **tokens).render(TALK) == (
        "<|begin_of_sentence|>Be brief.\nUser: 1 < 2?\nAssistant: Yes.<|end_of_sentence|>User: 你好 😀\nAssistant: "
    )


@pytest.mark.parametrize("template", [CHATML, ERNIE])
@pytest.mark.parametrize("generate", [True, False])
def test_as_transformers_renders_it(template, generate):
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template([TALK], chat_template=template, add_generation_prompt=generate)
    assert make(template).render(TALK, generate) == expected


TOOLS = [{"type": "function", "function": {"name": "f", "description": "a < b & 'c' — é"}}]


@pytest.mark.parametrize(
    "template",
    [
        "{{ tools | tojson }}",
        "{{ tools | tojson(indent=2) }}",
        "{% for x in range(9) %}{% if x == 2 %}{% continue %}{% elif x > 5 %}{% break %}{% endif %}{{x}}{% endfor %}",
        "{% for m in messages %}\n  {% generation %}\n{{ m.content }}\n  {% endgeneration %}\n{% endfor %}\n",
        "  {% if true %}\n  a\n  {% endif %}\nb\n",
        "{{ undefined_thing }}|{{ messages[0].nothing is defined }}|{{ messages[-1]['content'].split()[0] }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% macro row(m) %}[{{ m.role | upper }}]{% endmacro %}{% for m in messages %}{{ row(m) }}{% endfor %}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ '%05.1f' | format(2.5) }}",
    ],
)
def test_the_contract_templates_rely_on(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template([TALK], tools=TOOLS, chat_template=template)
    assert make(template).render(TALK, tools=TOOLS) == expected


def test_tojson_leaves_characters_alone():
    assert make("{{ tools | tojson }}").render(HI, tools=TOOLS) == json.dumps(TOOLS, ensure_ascii=False)


def test_strftime_now():
    assert make("{{ strftime_now('%Y') }}").render(HI) in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_keywords_and_special_tokens_reach_the_template():
    template = make("{{ bos_token }}{{ enable_thinking }}{{ tools is none }}", bos_token="<s>")
    assert template.render(HI, enable_thinking=False) == "<s>FalseTrue"


@pytest.mark.parametrize("name", ["messages", "raise_exception", "strftime_now"])
def test_reserved_keywords(name):
    error = refusal(lambda: make(CHATML).render(HI, **{name: "x"}))
    assert error.param == "chat_template_kwargs" and name in error.message


# ---- messages ----------------------------------------------------------------------------------------------------


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert make("{{ messages[0].content }}").render([{"role": "user", "content": parts}]) == "a\nb"


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}],
        [{"type": "text"}],
        ["a"],
        [3],
        3,
        {"text": "a"},
    ],
)
def test_other_content_is_refused(content):
    error = refusal(lambda: make(CHATML).render([*HI, {"role": "user", "content": content}]))
    assert error.param == "messages[1].content" and error.status == 400


@pytest.mark.parametrize("messages", [[], "hi", None, {"role": "user"}])
def test_messages_must_be_a_list(messages):
    assert refusal(lambda: make(CHATML).render(messages)).param == "messages"


@pytest.mark.parametrize("message", [3, {"content": "a"}, {"role": 3, "content": "a"}])
def test_a_message_needs_a_role(message):
    assert refusal(lambda: make(CHATML).render([message])).param == "messages[0]"


def test_tool_calls():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    template = make("[{{ messages[0].content }}]{{ messages[0].tool_calls[0].function.arguments.x }}")
    assert template.render([message]) == "[]1"
    assert call["function"]["arguments"] == '{"x": 1}'
    call["function"]["arguments"] = "{"
    assert refusal(lambda: template.render([message])).param == "messages[0].tool_calls[0].function.arguments"
    for bad in (3, [3], [{}]):
        error = refusal(lambda bad=bad: template.render([{"role": "assistant", "tool_calls": bad}]))
        assert error.param.startswith("messages[0].tool_calls")


# ---- which template ----------------------------------------------------------------------------------------------


def test_order_of_sources(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("flag {{ messages[0].content }}")
    assert make("own").render(HI) == "own"
    assert make("own", str(path)).render(HI) == "flag hi"
    assert make("own", "text {{ messages[0].content }}").render(HI) == "text hi"
    assert make("own", str(path)).render(HI, chat_template="request") == "request"
    assert make(None).render(HI, chat_template="{{ messages[0].content }}") == "hi"


def test_no_template():
    error = refusal(lambda: make(None).render(HI))
    assert "--chat-template" in error.message and "/v1/completions" in error.message


def test_unusable_templates_are_found_at_start(tmp_path):
    with pytest.raises(ConfigError, match="--chat-template"):
        make(None, "{% if %}")
    with pytest.raises(ConfigError, match=r"nowhere\.jinja"):
        make(None, str(tmp_path / "nowhere.jinja"))
    with pytest.raises(CheckpointError, match="--chat-template"):
        make("{% nonsense %}")


# ---- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_template", [True, False])
def test_raise_exception(request_template):
    text = "{{ raise_exception('roles must alternate') }}"
    template = make(None if request_template else text)
    error = refusal(lambda: template.render(HI, chat_template=text if request_template else None))
    assert error.param == "messages" and "roles must alternate" in error.message


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{{ nothing.at.all }}", "{{ messages[0].content + 3 }}"])
def test_runtime_faults(text):
    assert refusal(lambda: make(text).render(HI)).param == "messages"
    assert refusal(lambda: make(None).render(HI, chat_template=text)).param == "chat_template"


def test_syntax_fault_in_a_request():
    assert refusal(lambda: make(CHATML).render(HI, chat_template="{% if %}")).param == "chat_template"


# ---- strangers' templates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ ''.__class__.__name__ }}",
        "{{ raise_exception.__globals__['sys'].modules }}",
        "{{ strftime_now.__code__ }}{{ strftime_now.__code__.co_code }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{{ self.__init__ }}{{ self._TemplateReference__context.environment }}",
        "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ range(100001) | list | length }}",
    ],
)
def test_the_sandbox_holds(text):
    from jinja2.sandbox import SecurityError

    assert refusal(lambda: make(None).render(HI, chat_template=text)).param == "chat_template"
    cause = refusal(lambda: make(text).render(HI)).__cause__
    assert isinstance(cause, (SecurityError, TypeError, OverflowError))


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ ('a' * 10 ** 9) | length }}",
        "{{ '%999999999d' % 1 }}",
        "{{ ('b' * 17000000) }}",
        "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
        "{% set a = 'ab' %}" + "{% set a = a ~ a %}" * 60 + "{{ a | length }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "x" * 200_001,
    ],
)
def test_a_costly_template_is_given_up(monkeypatch, text):
    monkeypatch.setattr(module, "WALL_LIMIT_S", 60.0)
    assert refusal(lambda: make(None).render(HI, chat_template=text)).param == "chat_template"


def test_a_template_that_does_not_come_back(monkeypatch):
    monkeypatch.setattr(module, "CHILD_COMMAND", "import time; time.sleep(60)")
    monkeypatch.setattr(module, "WALL_LIMIT_S", 0.2)
    template = make(None)
    assert "was not rendered in" in refusal(lambda: template.render(HI, chat_template="x")).message
    for _ in range(module.N_CHILDREN):
        template._children.acquire()
    with pytest.raises(Overloaded):
        template.render(HI, chat_template="x")


def test_a_broken_process_is_not_the_fault_of_the_request(monkeypatch):
    monkeypatch.setattr(module, "CHILD_COMMAND", "raise SystemExit('no module')")
    with pytest.raises(RuntimeError, match="no module"):
        make(None).render(HI, chat_template="x")


def test_the_process_knows_no_secrets(monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.setattr(
        module, "CHILD_COMMAND", "import json, os; print(json.dumps({'text': ' '.join(sorted(os.environ))}))"
    )
    seen = make(None).render(HI, chat_template="x").split()
    assert "PYTHONPATH" in seen and "API_KEY" not in seen and "API_KEY" in os.environ


def test_own_template_sent_along_is_not_a_strangers(monkeypatch):
    monkeypatch.setattr(module, "CHILD_COMMAND", "raise SystemExit('must not start')")
    assert make(ERNIE).render(HI, chat_template=ERNIE).endswith("Assistant: ")


def test_output_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_TEXT_CHARS", 100)
    assert make("{{ 'a' * 100 }}").render(HI) == "a" * 100
    error = refusal(lambda: make("{% for i in range(101) %}a{% endfor %}").render(HI))
    assert "longer than 100 characters" in error.message
    error = refusal(lambda: make("{% set x %}{{ 'a' * 101 }}{% endset %}").render(HI))
    assert "longer than 100 characters" in error.message
