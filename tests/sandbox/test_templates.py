"""transformers' own rendering is the oracle."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from toppings.sandbox import templates

TURNS = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {"role": "assistant", "content": "4 — four 🦜"},
    {"role": "user", "content": "And 3 + 3?", "name": "ada"},
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<a>", "<b>"]}

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
        " + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "headers, stripped": (
        "{%- set loop_messages = messages -%}\n"
        "{%- for message in loop_messages -%}\n"
        "    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' -%}\n"
        "    {%- if loop.index0 == 0 -%}{%- set content = bos_token + content -%}{%- endif -%}\n"
        "    {{- content -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}\n"
    ),
    "system folded into the first user's turn": (
        "{% if messages[0]['role'] == 'system' %}\n"
        "    {% set system = messages[0]['content'] | trim + '\n\n' %}\n"
        "    {% set messages = messages[1:] %}\n"
        "{% else %}{% set system = '' %}{% endif %}\n"
        "{{ bos_token }}\n"
        "{% for m in messages %}\n"
        "    {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('no turns') }}{% endif %}\n"
        "    {% if m['role'] == 'user' %}[INST] {{ (system if loop.first else '') + m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}\n"
        "{% endfor %}"
    ),
    "names, macros and namespaces": (
        "{%- macro who(m) -%}{{ m.role }}{% if m.name is defined %} "
        "({{ m.name }}){% endif %}{%- endmacro -%}\n"
        "{%- set ns = namespace(count=0) -%}\n"
        "{% for m in messages %}{% set ns.count = ns.count + 1 %}{{ ns.count }}. {{ who(m) }}: "
        "{{ m.content }}\n"
        "{% endfor %}{{ dict(a=ns.count) | tojson }}"
    ),
    "json and loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m | tojson(indent=2) }}{{ messages | tojson }}"
        "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
        "{{ tools is none }} {{ documents is none }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "the year": "{{ strftime_now('%Y') }}{{ additional_special_tokens | join }}{{ messages | length }}",
}


def mine(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    settings: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": False, **options}
    return templates.render(
        template=template, messages=messages, variables=VARIABLES, max_chars=10**6, **settings
    )


def theirs(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    texts, _ = render_jinja_template([messages], chat_template=template, **VARIABLES, **options)
    text: str = texts[0]
    return text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_a_chat_is_rendered_as_transformers_renders_it(name: str, prompt: bool) -> None:
    template = TEMPLATES[name]
    assert mine(template, TURNS, add_generation_prompt=prompt) == theirs(
        template, TURNS, add_generation_prompt=prompt
    )


@pytest.mark.parametrize("name", ["chatml", "headers, stripped", "generation"])
@pytest.mark.parametrize("last", ["Six", "Six, since ", " padded "])
def test_a_final_message_is_continued_as_transformers_continues_it(name: str, last: str) -> None:
    chat = [*TURNS, {"role": "assistant", "content": last}]
    options = {"continue_final_message": True}
    assert mine(TEMPLATES[name], chat, **options) == theirs(TEMPLATES[name], chat, **options)


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (TEMPLATES["system folded into the first user's turn"], TURNS[2:]),
        ("{{ messages[0]['missing'].field }}", TURNS),
        ("{% for m in messages %}", TURNS),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", TURNS),
        ("{{ messages.pop() }}", TURNS),
    ],
)
def test_what_transformers_refuses_is_refused_in_its_words(
    template: str, messages: list[dict[str, Any]]
) -> None:
    with pytest.raises(Exception) as theirs_error:  # noqa: PT011
        theirs(template, messages)
    with pytest.raises(type(theirs_error.value)) as mine_error:
        mine(template, messages)
    if "underscore" not in str(theirs_error.value):
        assert str(mine_error.value) == str(theirs_error.value)


@pytest.mark.parametrize("template", ["nothing", "{{ messages[-1].content[:1] }}"])
def test_a_template_that_hides_the_final_message_cannot_continue_it(template: str) -> None:
    with pytest.raises(ValueError, match="continue_final_message"):
        mine(template, [{"role": "assistant", "content": "Six"}], continue_final_message=True)
