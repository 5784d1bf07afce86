"""Claims about rendering chat templates: what hostile ones may not do. `test_chat_format` has what sound ones write."""

import time

import pytest

from llama_jax.errors import ConfigError
from llama_jax.text import rendering

MESSAGES = {"messages": [{"role": "user", "content": "x"}]}
MOST_SECONDS = 15  # of a loaded machine: the limit is 1.5 s of CPU time
MOST_MEMORY = 300 << 20

HOSTILE = {
    "endless loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "a huge string": "{{ 'a' * 10**9 }}",
    "a growing string": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s * 2 %}{% endfor %}",
    "a huge number": "{{ ('9' * 4000) | int ** 9999999 }}",
    "a wide format": "{{ '%999999999d' % 1 }}",
    "a long output": "{{ 'a' * 9000000 }}",
    "a macro without an end": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "deep parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "a class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "a change of the messages": "{{ messages.append(1) }}",
    "an attribute of a namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "no Jinja": "{% for %}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_in_one_line_within_its_limits(source):
    start = time.monotonic()
    with pytest.raises(ConfigError, match="the chat template cannot be used: ") as error:
        rendering.render(source, MESSAGES)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert time.monotonic() - start < MOST_SECONDS
    assert rendering.render("{{ messages[0].content }}", MESSAGES).text == "x"  # the next one is served


@pytest.mark.parametrize("source", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}"])
def test_a_template_reads_no_files(source):
    with pytest.raises(ValueError, match="no loader"):
        rendering.render(source, MESSAGES)


def test_no_process_of_a_template_was_larger_than_its_limit():
    with pytest.raises(ConfigError):
        rendering.render("{{ 'a' * 10**9 }}", MESSAGES)
    with open(f"/proc/{rendering._worker.process.pid}/status") as file:
        peak = next(line for line in file if line.startswith("VmHWM"))
    assert int(peak.split()[1]) * 1024 < MOST_MEMORY


def test_a_template_that_refuses_a_dialog_gives_its_own_reason():
    with pytest.raises(rendering.Refused, match="cannot write this dialog: roles must alternate"):
        rendering.render("{{ raise_exception('roles must\nalternate') }}", MESSAGES)


def test_values_that_are_no_json_are_refused_before_they_are_sent():
    with pytest.raises(ValueError, match="must be JSON values"):
        rendering.render("x", {"messages": [{"role": "user", "content": object()}]})


def test_text_comes_back_as_it_was_sent():
    text = "é 😀 \ud800 \x00 \u2028"
    assert rendering.render("{{ messages[0] }}", {"messages": [text]}).text == text


def test_a_cut_is_measured_against_the_whole():
    source = "{% for m in messages %}[{{ m }}]{% endfor %}{{ '>' if add_generation_prompt else '.' }}"
    found = rendering.render(
        source, {"messages": ["a", "b"], "add_generation_prompt": False}, cuts=[(1, False), (1, True), (0, True)]
    )
    assert found.text == "[a][b]." and found.cuts == [(4, 3, "[a]."), (4, 3, "[a]>"), (1, 0, ">")]


def test_a_template_sees_the_date_that_it_is_given():
    assert rendering.render("{{ strftime_now('%d %b %Y') }}", {}, date=(2024, 7, 26)).text == "26 Jul 2024"
