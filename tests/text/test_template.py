"""Against transformers' own rendering, and everything that must be refused."""

from datetime import datetime
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import pointsman.tiny
from pointsman.text import ChatTemplate, Tokenizer

MINIMAX_LIKE = """
{%- if tools %}
# Tools
{%- for tool in tools %}
<tool>{{ tool.function | tojson(ensure_ascii=False) }}</tool>
{%- endfor %}
{%- endif %}
{%- for message in messages %}
{%- if message.role not in ('system', 'user', 'assistant', 'tool') %}
{{- raise_exception('unknown role ' ~ message.role) }}
{%- endif %}
{{- ']~b]' ~ ('ai' if message.role == 'assistant' else message.role) ~ '\\n' }}
{%- if message.role == 'assistant' %}
{%- set content = message.content or '' %}
{%- if '</think>' in content %}
{{- content.split('</think>')[0] ~ '</think>\\n\\n' }}
{%- set content = content.split('</think>')[-1].strip('\\n') %}
{%- endif %}
{%- generation %}
{{- content }}
{%- endgeneration %}
{%- for call in message.tool_calls or [] %}
<minimax:tool_call>
<invoke name="{{ call.function.name }}">
{% for name, value in call.function.arguments.items() %}
<parameter name="{{ name }}">{{ value | tojson if value is not string else value }}</parameter>
{% endfor %}
</invoke>
</minimax:tool_call>
{%- endfor %}
{%- else %}
{{- message.content }}
{%- endif %}
{{- eos_token ~ '\\n' }}
{%- if loop.last %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- ']~b]ai\\n<think>\\n' }}
{%- endif %}
"""

TEMPLATES = {
    "minimax-like": MINIMAX_LIKE,
    "json": "{{ messages | tojson }} {{ messages | tojson(indent=2, sort_keys=True) }} {{ 'ä<&>' | tojson(ensure_ascii=True) }}",
    "blocks": "  {% for m in messages %}\n   {{ m.content }}\n  {% endfor %}\n{% if flavour is defined %}{{ flavour }}{% endif %}",
}

CALL = {"type": "function", "id": "1", "function": {"name": "größe", "arguments": {"n": 3, "unit": "käse", "deep": [1, {"a": None}]}}}
CONVERSATIONS = {
    "one": [{"role": "user", "content": "Wie groß? 日本"}],
    "turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<think>\nadd</think>\n\n4"},
        {"role": "user", "content": " and <b>\n"},
    ],
    "calls": [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "7"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_same_as_transformers(template, conversation, tools, add_generation_prompt) -> None:
    arguments = {"tools": tools, "add_generation_prompt": add_generation_prompt, "flavour": "grün"}
    messages = CONVERSATIONS[conversation]
    (expected,), _ = render_jinja_template([messages], chat_template=TEMPLATES[template], eos_token="[e~[", **arguments)
    assert ChatTemplate(TEMPLATES[template], {"eos_token": "[e~["}).render(messages, **arguments) == expected


def test_the_bundled_template_is_the_same_as_in_transformers() -> None:
    tokenizer = Tokenizer.load(Path(pointsman.tiny.__file__).parent)
    assert tokenizer.chat_template is not None
    answer = {"role": "assistant", "content": "<think>\nhalf a thou"}
    for tools in (None, TOOLS):
        messages = [*CONVERSATIONS["turns"], *CONVERSATIONS["calls"], answer]
        arguments = {"tools": tools, "add_generation_prompt": False}
        (expected,), _ = render_jinja_template(
            [messages], chat_template=tokenizer.chat_template.source, **tokenizer.special_tokens, **arguments
        )
        assert tokenizer.chat_template.render(messages, **arguments) == expected
        continued = tokenizer.chat_template.render(messages, tools, continue_final_message=True)
        assert continued.endswith("half a thou") and expected.startswith(continued)


def render(source: str, messages=(), **arguments) -> str:
    return ChatTemplate(source, {"eos_token": "[e~["}).render(messages, **arguments)


def test_arguments_of_calls_become_objects() -> None:
    def conversation(arguments):
        return [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    expected = render(MINIMAX_LIKE, conversation({"a": [1, "é"]}))
    assert render(MINIMAX_LIKE, conversation('{"a": [1, "\\u00e9"]}')) == expected
    assert '<parameter name="a">[1, "é"]</parameter>' in expected
    assert render(MINIMAX_LIKE, conversation("")) == render(MINIMAX_LIKE, conversation({})) == render(MINIMAX_LIKE, conversation(None))
    for wrong, reason in (("{", "is not JSON"), ("[1]", "must be an object"), (3, "must be an object"), ("[" * 100_000, "is not JSON")):
        with pytest.raises(ValueError, match=rf"messages\[0\].tool_calls\[0\].function.arguments of 'f' {reason}"):
            render(MINIMAX_LIKE, conversation(wrong))


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert render(MINIMAX_LIKE, messages) == render(MINIMAX_LIKE, [{"role": "user", "content": "ab"}])
    assert messages[0]["content"] is parts, "the caller's messages are left alone"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("text", r"messages\[0\] must be an object with a role"),
        ({"content": "no role"}, r"messages\[0\] must be an object with a role"),
        ({"role": "user", "content": 3}, r"messages\[0\].content must be a text or a list of parts, not int"),
        ({"role": "user", "content": [{"type": "image_url"}]}, r"content\[0\] is of type 'image_url'; only parts of type 'text'"),
        ({"role": "user", "content": ["a"]}, r"content\[0\] is of type 'a'"),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[0\].content\[0\].text must be a text"),
        ({"role": "assistant", "tool_calls": {}}, r"messages\[0\].tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, r"tool_calls\[0\] must be an object with a function that has a name"),
        ({"role": "assistant", "tool_calls": ["x"]}, r"tool_calls\[0\] must be an object with a function that has a name"),
        ({"role": "juror", "content": "hm"}, "the chat template failed: unknown role juror"),
    ],
)
def test_malformed_messages(message, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        render(MINIMAX_LIKE, [message])


@pytest.mark.parametrize("content", ["The answer", "e", "[e~[", " spaces  ", "<think>\nhalf a thou", "<think>a</think>\n\nb", ""])
def test_continue_the_final_message(content) -> None:
    user = {"role": "user", "content": "e"}
    prompt = render(MINIMAX_LIKE, [user, {"role": "assistant", "content": content}], continue_final_message=True)
    closed = render(MINIMAX_LIKE, [user, {"role": "assistant", "content": content}], add_generation_prompt=False)
    assert closed == prompt + "[e~[\n"


def test_what_cannot_be_continued() -> None:
    def attempt(source, *messages):
        render(source, messages, continue_final_message=True)

    with pytest.raises(ValueError, match="needs a last message of role 'assistant'"):
        attempt(MINIMAX_LIKE, {"role": "user", "content": "a"})
    with pytest.raises(ValueError, match="needs a last message of role 'assistant'"):
        attempt(MINIMAX_LIKE)
    with pytest.raises(ValueError, match="it ends with tool calls"):
        attempt(MINIMAX_LIKE, {"role": "assistant", "content": "a", "tool_calls": [CALL]})
    for source in ("nothing", "{{ messages[0].content }}{{ messages[0].content }}", "{{ messages[0].content | upper }}"):
        with pytest.raises(ValueError, match="does not put its content into the prompt as it is"):
            attempt(source, {"role": "assistant", "content": "a"})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception.__globals__.os }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(100001) %}x{% endfor %}", "Range too big"),
        ("{{ 'x' * 100000000 }}", "too large"),
        ("{{ 100000000 * 'x' }}", "too large"),
        ("{{ [0] * 100000000 }}", "too large"),
        ("{{ 9 ** 99999 }}", "too large"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% for i in range(10000) %}{{ 'x' * 100000 }}{% endfor %}", "renders more than"),
        ("{{ nothing.here }}", "undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing | tojson }}", "not JSON serializable"),
        ("{{ 'a' + 1 }}", "str"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_what_a_template_may_not_do(source, reason) -> None:
    with pytest.raises(ValueError, match=f"the chat template failed: .*{reason}"):
        render(source, [{"role": "user", "content": "a"}])


def test_ordinary_arithmetic_is_let_through() -> None:
    assert render("{{ 3 * 4 }} {{ 2 ** 10 }} {{ '-' * 5 }} {{ 1.5 * 2 }} {{ 2 ** 0.5 > 1 }}") == "12 1024 ----- 3.0 True"


def test_variables() -> None:
    assert render("{{ model_identity }}{{ eos_token }}", model_identity="I") == "I[e~["
    for name in ("eos_token", "raise_exception", "range", "strftime_now"):
        with pytest.raises(ValueError, match=f"'{name}' cannot be set as a variable"):
            render("", **{name: "x"})


def test_the_clock_can_be_fixed() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", clock=lambda: datetime(2026, 11, 23))
    assert template.render([]) == "23 Nov 2026"
