"""Templates of strangers: what chat templates do is as in Jinja, what takes for ever or makes too much is refused."""

import time

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxmerge.files.chat import TEMPLATES
from train.models import bounded
from train.models.bounded import BoundedEnvironment

MESSAGES = [
    {"role": "system", "content": "Be {brief}: 100 % of 1234567 {0:>12345678}."},
    {"role": "user", "content": "A\n\nB " * 2000},
    {"role": "assistant", "content": "<think>x</think> C", "tool_calls": [{"name": "f", "arguments": {"a": [1, 2]}}]},
    {"role": "user", "content": "D"},
]
HONEST = {
    **TEMPLATES,
    "parts": "{% set ns = namespace(n=0, s='') %}{% for m in messages[::-1] if m.role != 'x' %}"
    "{% set ns.n = ns.n + 1 %}"
    "{% set ns.s = ns.s ~ m['content'].split('</think>')[-1].lstrip('\\n') ~ ns.n %}{% endfor %}{{ ns.s }}",
    "macro": "{% macro f(x, n) %}{{ x | trim | upper }}{% if n %}{{ f(x, n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(messages[0].content, 3) }}{{ 'a' * 3 }}{{ '%s-%05d' % ('x', 7) }}{{ '{:>5}'.format('y') }}",
    "lists": "{{ messages | tojson }}{{ messages | map(attribute='role') | join(', ') }}{{ messages "
    "| selectattr('role', 'equalto', 'user') | list | length }}{{ messages[0].content.replace(' ', '_') | indent(4) }}"
    "{{ 7 // 2 + 2 ** 10 }}",
    "loop": "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.cycle('a', 'b') }}{% if loop.first %}"
    "{% continue %}{% endif %}{{ m.tool_calls or [] }}{% endfor %}"
    "{% set x %}{{ messages[3].content }}{% endset %}{{ x }}",
}
GROW = "{%% set ns = namespace(x=%s) %%}{%% for a in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
LONG = "{% set a = 'x' * 999999 %}"
HOSTILE = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer"),
    "a filtered loop": ("{% for a in range(99999) for b in x %}{% endfor %}", "valid|expected"),
    "loops that pass over": (
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}", "longer"
    ),
    "macros": (
        "{% macro f(n) %}{% for i in [1, 2] %}{{ f(n + 1) if n < 60 }}{% endfor %}{% endmacro %}{{ f(0) }}", "longer"
    ),
    "a deep macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "filters": ("{% for a in range(99999) %}{{ range(99999) | list | sort | length }}{% endfor %}", "longer"),
    "text times": ("{{ 'x' * 10 ** 11 }}", "more"),
    "times text": ("{{ (10 ** 11) * 'x' }}", "more"),
    "list times": ("{{ [0] * 10 ** 11 }}", "more"),
    "power": ("{{ 9 ** (9 ** 9) }}", "more"),
    "product": (GROW % ("9", "ns.x * ns.x"), "more"),
    "doubling": (GROW % ("'xy'", "ns.x ~ ns.x"), "more"),
    "plus": (GROW % ("'xy'", "ns.x + ns.x"), "more"),
    "lists": (GROW % ("[0]", "ns.x + ns.x"), "more|longer"),
    "nested lists": (
        GROW % ("[0]", "[ns.x, ns.x]") + "{{ ns.x }}", "more"
    ),
    "nested, as JSON": (
        GROW % ("[0]", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x | tojson }}", "more",
    ),
    "padding": ("{{ 'x'.ljust(10 ** 11) }}", "more"),
    "a filter that pads": ("{{ 'x' | center(10 ** 11) }}", "more"),
    "a width": ("{{ '%99999999999d' % 1 }}", "more"),
    "a width of format": ("{{ '{:99999999999}'.format(1) }}", "more"),
    "a width in a filter": ("{{ '%99999999999d' | format(1) }}", "more"),
    "a width of a date": ("{{ strftime_now('%99999999999d') }}", "more"),
    "replacing": (LONG + "{{ a.replace('', a) }}", "more"),
    "a filter that replaces": (LONG + "{{ a | replace('x', a) }}", "more"),
    "joining": (LONG + "{{ a.join(range(99999) | map('string')) }}", "more|longer"),
    "joining by a filter": (LONG + "{{ range(99999) | list | join(a) }}", "more"),
    "much output": (LONG + "{% for i in range(99999) %}{{ a }}{% endfor %}", "more"),
    "captured": (LONG + "{% set b %}{% for i in range(99) %}{{ a }}{% endfor %}{% endset %}", "more"),
    "tabs": ("{% set a = '\\t' * 99999 %}{{ a.expandtabs(99999) }}", "more"),
}  # fmt: skip


def options():
    return {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}


@pytest.mark.parametrize("name", HONEST)
def test_what_templates_do_is_as_in_jinja(name):
    values = {"messages": MESSAGES, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    outcome = []
    for kind in (ImmutableSandboxedEnvironment, BoundedEnvironment):
        environment = kind(**options())
        environment.globals["raise_exception"] = lambda message: (_ for _ in ()).throw(jinja2.TemplateError(message))
        try:
            outcome.append(environment.from_string(HONEST[name]).render(**values))
        except jinja2.TemplateError as error:
            outcome.append(str(error))
    assert outcome[0] == outcome[1]
    assert outcome[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_takes_for_ever_or_makes_too_much_is_refused(name, monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.5)
    template, message = HOSTILE[name]
    environment = BoundedEnvironment(**options())
    environment.globals["strftime_now"] = time.strftime
    start = time.monotonic()
    with pytest.raises((jinja2.TemplateError, RecursionError), match=message):
        environment.from_string(template).render(messages=MESSAGES)
    assert time.monotonic() - start < 5
