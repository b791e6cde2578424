"""Templates render as transformers renders them, and those that loop or grow are refused."""

from __future__ import annotations

import resource
import time

import pytest
from transformers.utils import chat_template_utils

from mllm_jax.loading import embedded
from mllm_jax.processors import template_sandbox
from tests.helpers import tiny

CHAT = [
    {"role": "system", "content": 'Be <brief> & "kind".\n'},
    {"role": "user", "content": "what is it ? é"},
    {"role": "assistant", "content": "a cat </think> a dog"},
    {"role": "user", "content": " and now ?\n"},
]
PARTS = [
    {"role": m["role"], "content": [{"type": "image"}, {"type": "text", "text": m["content"]}]}
    for m in CHAT
]
RICH = """
{%- macro show(content, strip=false) -%}
  {%- if content is string -%}{{ content|trim if strip else content }}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' -%}<image>{%- elif 'text' in part -%}{{ part.text }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1, seen=[]) -%}
{%- for m in messages[::-1] -%}
  {%- if m.role == 'user' -%}
    {%- set ns.last = messages|length - 1 - loop.index0 -%}{%- break -%}
  {%- endif -%}
{%- endfor -%}
{{ bos_token }}{% set x = {'a': 1, 'b': [1, 2, '<é>']} %}{{ x|tojson }} {{ 3 * 'ab' ~ (2 + 5) }} {{ 7 % 4 }}
{% if tools is none and not documents %}no tools{% endif %}
{% for m in messages if m.role != 'system' %}
{% set ns.seen = ns.seen + [m.role] %}
{% if m.role == 'assistant' %}{% generation %}{{ show(m.content).split('</think>')[-1].lstrip('\\n') }}{% endgeneration %}
{% else %}{{ '%s: %s' % (m.role, show(m.content, strip=true)) }}[{{ loop.index }}/{{ loop.length }}]
{% endif %}
{% endfor %}
{{ ns.seen|join(',') }} {{ messages|map(attribute='role')|unique|list }} {{ ns.last }}
{{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ 2 ** 10 }} {{ "a-b"|replace('-', '+') }}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""


@pytest.mark.parametrize("chat", [CHAT, PARTS], ids=["text", "parts"])
@pytest.mark.parametrize("source", [tiny.TEMPLATE, embedded.CHAT_TEMPLATE, RICH])
def test_as_transformers(source, chat):
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    want, _ = chat_template_utils.render_jinja_template(
        [chat], chat_template=source, add_generation_prompt=True, **variables
    )
    assert template_sandbox.render(source, chat, **variables) == want[0]
    want, _ = chat_template_utils.render_jinja_template([chat], chat_template=source, **variables)
    assert (
        template_sandbox.render(source, chat, add_generation_prompt=False, **variables) == want[0]
    )


def test_long_chats_are_within_the_limits():
    chat = [
        {"role": role, "content": "what is it ? " * 20000} for role in ("user", "assistant")
    ] * 4
    assert len(template_sandbox.render(tiny.TEMPLATE, chat)) > 8 * 260_000
    many = [{"role": "user", "content": "what ?"}] * 1000
    want, _ = chat_template_utils.render_jinja_template([many], chat_template=RICH, bos_token="")
    assert template_sandbox.render(RICH, many, add_generation_prompt=False, bos_token="") == want[0]


BIG = "{% set b = 'x' * 900000 %}"
NEST = "{{% for i in range(99999) %}}{{% for j in range(99999) %}}{}{{% endfor %}}{{% endfor %}}"
BLOCK = "{{% set c %}}{}{{% endset %}}"
GROWING = {
    "loop": (NEST.format(""), "it takes"),
    "loop that puts out": (NEST.format("x"), "it takes"),
    "loop in a block": (BLOCK.format(NEST.format("y" * 10000)), "it takes"),
    "values in a block": (BIG + BLOCK.format(NEST.format("{{ b }}")), "its text becomes too long"),
    "loop of one operation": (BIG + NEST.format("{% if 'a' in b %}{% endif %}"), "it takes"),
    "product": ("{{ 'x' * 10**9 }}", "would be too large"),
    "list": ("{% set x = [1] * 10**10 %}", "would be too large"),
    "power": ("{% set x = 9 ** (9 ** 9) %}", "an integer becomes"),
    "powers": ("{% set ns = namespace(s=9) %}{% for i in range(60) %}{% set ns.s = ns.s * ns.s %}"
               "{% endfor %}", "a value becomes"),
    "twice": ("{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
              "{% endfor %}", "a value becomes"),
    "sum": ("{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}"
            "{% endfor %}", "a value becomes"),
    "shared lists": ("{% set ns = namespace(s=[1]) %}{% for i in range(60) %}"
                     "{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s == ns.s }}", "a value becomes"),
    "macro": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "calls itself without end"),
    "many macros": ("{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
                    "{{ f(60) }}", "it takes"),
    "recursive loop": ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "without end"),
    "filter": ("{{ 'x'|center(10**9) }}", "would be too large"),
    "method": ("{{ 'x'.center(1000000000) }}", "would be too large"),
    "keyword": ("{{ 'a'.ljust(width=10**9) }}", "would be too large"),
    "width": ("{{ '%1000000000d' % 1 }}", "too large a width"),
    "width of a filter": ("{{ '%1000000000d'|format(1) }}", "too large a width"),
    "width of a method": ("{{ '{:1000000000}'.format(1) }}", "too large a width"),
    "star": ("{{ '%*d' % (1000000000, 1) }}", "too large a width"),
    "join": (BIG + "{{ range(99999)|map('string')|join(b) }}", "would be too large"),
    "default": (BIG + "{{ range(99999)|map(attribute='q', default=b)|join }}", "too large|too long"),
    "replace": (BIG + "{{ b.replace('x', b) }}", "would be too large"),
    "indent": ("{{ ('a\n' * 100000)|indent(100000) }}", "would be too large"),
    "json": ("{{ {'a': 1}|tojson(indent=10**9) }}", "would be too large"),
    "batch": ("{{ [1]|batch(10**9, 'x')|list }}", "would be too large"),
    "words": ("{{ lipsum(n=100000000) }}", "'lipsum' is undefined"),
    "deep": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "without end"),
    "long": ("x" * 100_000, "100,000 characters, more than 65,536"),
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "namespace": ("{{ namespace(__class__=1) }}", "takes no attribute '__class__'"),
    "file": ("{% include '/etc/passwd' %}", "no loader"),
    "syntax": ("{% for %}", "Expected an expression"),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_limits(name, monkeypatch):
    """In little time and memory."""
    source, message = GROWING[name]
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.3)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        template_sandbox.render(source, CHAT)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    assert time.process_time() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # in KiB


def test_a_namespace_is_no_text():
    """It may hold much, and be put out often."""
    assert template_sandbox.render("{{ namespace(a='x' * 100)|string }}", CHAT) == "<namespace>"
