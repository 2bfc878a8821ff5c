"""Chat templates render as transformers renders them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from toy_bundle import toy_tokenizer
from transformers import AutoTokenizer

from runtimes.errors import BundleError, InputError
from runtimes.text import template_sandbox
from runtimes.text.chat import ChatTemplate

LLAMA = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson(indent=2)) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {% generation %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {% endgeneration %}
    {%- if loop.index0 == ns.last %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
MISTRAL = """{%- set loop_messages = messages %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}"""
TEMPLATES = {"llama": LLAMA, "chatml": CHATML, "gemma": GEMMA, "mistral": MISTRAL}

USER = {"role": "user", "content": "  Is <b> & 'é' ok?\n"}
CHATS = {
    "user": [USER],
    "turns": [USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Good"}],
    "absent content": [USER, {"role": "assistant", "content": "x", "tool_calls": None}, USER],
}
TOOLS = [{"type": "function", "function": {"name": "größe", "description": "a < b & c", "parameters": {"type": "object"}}}]


def save(folder: Path, template: object = None, **files: str) -> Path:
    toy_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config if template is None else config | {"chat_template": template}))
    for name, content in files.items():
        path = folder / (f"{name}.jinja" if name == "chat_template" else f"additional_chat_templates/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def reference(folder: Path, messages: list, **options: object) -> str:
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, name: str, chat: str, generation: bool) -> None:
    save(tmp_path, TEMPLATES[name])
    rendered = ChatTemplate.load(tmp_path).render(CHATS[chat], add_generation_prompt=generation)
    assert rendered == reference(tmp_path, CHATS[chat], add_generation_prompt=generation)


def test_tools_variables_and_tool_calls(tmp_path: Path) -> None:
    save(tmp_path, CHATML)
    messages = [USER, {"role": "assistant", "tool_calls": [{"name": "größe", "arguments": {"x": "<é>"}}]}, USER]
    rendered = ChatTemplate.load(tmp_path).render(messages, tools=TOOLS, variables={"enable_thinking": False})
    assert rendered == reference(tmp_path, messages, tools=TOOLS, add_generation_prompt=True, enable_thinking=False)
    assert '{"x": "<é>"}' in rendered.replace("\n  ", "").replace("\n}", "}") and "<think>" in rendered


def test_system_message(tmp_path: Path) -> None:
    save(tmp_path, LLAMA)
    messages = [{"role": "system", "content": " Be brief. "}, USER]
    assert ChatTemplate.load(tmp_path).render(messages) == reference(tmp_path, messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("template", "files", "tools"),
    [
        ([{"name": "default", "template": MISTRAL}, {"name": "tool_use", "template": CHATML}], {}, None),
        ([{"name": "default", "template": MISTRAL}, {"name": "tool_use", "template": CHATML}], {}, TOOLS),
        (MISTRAL, {"chat_template": GEMMA}, None),
        (None, {"chat_template": MISTRAL, "tool_use": CHATML}, TOOLS),
        (None, {"chat_template": MISTRAL, "tool_use": CHATML}, None),
    ],
)
def test_named_templates_and_files(tmp_path: Path, template: object, files: dict[str, str], tools: list | None) -> None:
    save(tmp_path, template, **files)
    rendered = ChatTemplate.load(tmp_path).render([USER], tools=tools)
    assert rendered == reference(tmp_path, [USER], tools=tools, add_generation_prompt=True)


def test_a_template_by_name(tmp_path: Path) -> None:
    save(tmp_path, [{"name": "default", "template": MISTRAL}, {"name": "short", "template": "{{ messages|length }}"}])
    chat = ChatTemplate.load(tmp_path)
    assert chat.render([USER], template="short") == "1"
    with pytest.raises(InputError, match="no chat template 'long'; this tokenizer has: default, short"):
        chat.render([USER], template="long")


def test_no_template(tmp_path: Path) -> None:
    assert ChatTemplate.load(save(tmp_path)) is None


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (GEMMA, [{"role": "system", "content": "x"}], "System role not supported"),
        (MISTRAL, [{"role": "user"}], "refuses these messages"),
        (MISTRAL, [], "a list of messages"),
        (MISTRAL, ["hello"], "a list of messages"),
        ("{{ messages.append(1) }}", [USER], "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", [USER], "refuses these messages"),
        (MISTRAL, [{"role": "user", "content": object()}], "JSON values only"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, template: str, messages: list, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ChatTemplate.load(save(tmp_path, template)).render(messages)
    assert "\n" not in str(caught.value)


def test_a_template_that_does_not_parse(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="line 1"):
        ChatTemplate.load(save(tmp_path, "{% if %}")).render([USER])
    with pytest.raises(BundleError, match="tokenizer_config.json: chat_template"):
        ChatTemplate.load(save(tmp_path, [{"name": "x"}]))


HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = 1 %}{% endfor %}{% endfor %}",
    "a loop in a function": "{% macro f() %}{% for a in range(9999) %}{% endfor %}{% endmacro %}"
    "{% for b in range(9999) %}{{ f() }}{% endfor %}",
    "twice itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "endless": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for a in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}",
    "a power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "a product of products": "{% set n = namespace(v=9) %}{% for i in range(99) %}{% set n.v = n.v * n.v %}{% endfor %}{{ n.v }}",
    "a repeated text": "{{ 'ab' * 999999999 }}",
    "a repeated list": "{{ [1] * 999999999 }}",
    "doubled": "{% set n = namespace(v='ab') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}{% endfor %}{{ n.v }}",
    "doubled by plus": "{% set n = namespace(v='ab') %}{% for i in range(99) %}{% set n.v = n.v + n.v %}{% endfor %}{{ n.v }}",
    "doubled lists": "{% set n = namespace(v=[1]) %}{% for i in range(99) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v }}",
    "compared": "{% set n = namespace(v=[1], w=[1]) %}{% for i in range(40) %}{% set n.v = [n.v, n.v] %}{% set n.w = [n.w, n.w] %}"
    "{% endfor %}"
    "{{ n.v == n.w }}",
    "summed": "{{ ([range(9999)|list] * 9999)|sum(start=[])|length }}",
    "centered": "{{ 'x'|center(999999999) }}",
    "a method": "{{ 'x'.ljust(999999999) }}",
    "a mapped filter": "{{ ['x']|map('center', 999999999)|list }}",
    "formatted": "{{ '%999999999d' % 1 }}",
    "formatted by a method": "{{ '{:999999999}'.format(1) }}",
    "formatted by a filter": "{{ '%999999999d'|format(1) }}",
    "formatted by an argument": "{{ '%*d' % (999999999, 1) }}",
    "replaced": "{% set s = 'x' * 99999 %}{{ s|replace('x', s) }}",
    "replaced by a method": "{% set s = 'x' * 99999 %}{{ s.replace('', s) }}",
    "joined": "{% set s = 'x' * 99999 %}{{ ([s] * 9)|join(s * 9) }}{{ range(99999)|join(s) }}",
    "joined as it comes": "{% set s = 'x' * 9999 %}{{ range(9999)|map('string')|join(s) }}",
    "a date": "{{ strftime_now('%999999999d') }}",
    "indented": "{{ {'a': [1] * 9999}|tojson(indent=99999) }}",
    "printed": "{% set s = 'x' * 9999999 %}{% for i in range(99) %}{{ s }}{% endfor %}",
    "caught": "{% set s = 'x' * 9999999 %}{% set t %}{% for i in range(99) %}{{ s }}{% endfor %}{% endset %}{{ t|length }}",
    "sliced": "{% set s = 'x' * 9999999 %}{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "upper": "{% set s = 'x' * 9999999 %}{% for i in range(99999) %}{% set t = s|upper %}{% endfor %}",
    "a method in a loop": "{% set s = 'x' * 9999999 %}{% for i in range(99999) %}{% set t = s.upper() %}{% endfor %}",
    "found": "{% set s = 'x' * 9999999 %}{% for i in range(99999) %}{% if 'y' in s %}{% endif %}{% endfor %}",
    "divided by zero": "{{ 1 / 0 }}",
    "too deep to parse": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "too deep to compile": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "too long a number": "{{ " + "1" * 9999 + " }}",
    "a page's filter": "{{ '<'|striptags }}",
    "an attribute": "{{ ''.__class__.__mro__ }}",
    "too long": "x" * 1_000_001,
    "control characters in an error": "{{ raise_exception('\\x1b[2J' + 'a' * 9999) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and sizes are counted, so this ends at the same place on any machine; none comes near this memory."""
    monkeypatch.setattr(template_sandbox, "STEPS", 20_000)
    template = ChatTemplate(templates={"default": HOSTILE[name]}, special_tokens={})
    tracemalloc.start()
    try:
        with pytest.raises((BundleError, InputError), match="chat template 'default'") as caught:
            template.render([{"role": "user", "content": "hello"}])
        assert tracemalloc.get_traced_memory()[1] < 400e6
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500 and len(str(caught.value).splitlines()) == 1


def test_a_long_conversation_is_no_hostile_one(tmp_path: Path) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(2000)]
    text = ChatTemplate(templates={"default": CHATML}, special_tokens={}).render(messages)
    assert text.count("<|im_start|>") == 2001
