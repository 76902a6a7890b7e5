"""What is compiled while a server runs: nothing for completions, for searches each length once."""

import re

import jax

from grpocem_jax.serving.tenants import PUBLIC
from grpocem_jax.utils.clock import CompileClock
from tests.serving import EXAMPLES, PROMPT


def compiled(served):
    """The counters of `/metrics`: programs, and the seconds they took."""
    text = served("GET", "/metrics", PUBLIC).text
    names = ("grpocem_compilations_total", "grpocem_compilation_seconds_total")
    return tuple(float(re.search(rf"^{name} (\S+)$", text, re.M)[1]) for name in names)


def complete(served, **fields):
    asked = {"model": served.server.catalogue.base, "prompt": PROMPT, "max_tokens": 4, **fields}
    answer = served("POST", "/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text


def test_completions_compile_nothing_and_searches_each_length_once(served):
    mixes = (
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.9, "n": 3, "seed": 1},
        {"prompt": ["A", "The tea was warm and good, and so was the soup"], "stop": [","]},
        {"stream": True, "max_tokens": 16, "prompt": [1, 2, 3]},
    )
    for fields in mixes:
        complete(served, **fields)
    assert compiled(served) == (0, 0)
    # Of a length that no other test has, whose programs this process might have already.
    texts = [f"{text} {'cold and ' * 40}bad." for text in EXAMPLES]
    found = served.adapter(generations=2, seed=1, examples=texts)
    first, seconds = compiled(served)
    assert first > 0
    assert seconds > 0
    for fields in mixes:
        complete(served, model=found["id"], **fields)
    served.adapter(generations=3, seed=2, examples=texts[::-1])
    assert compiled(served) == (first, seconds)


def test_the_clock_counts_programs_until_it_is_stopped():
    clock = CompileClock.start()
    jax.jit(lambda x: x * 3 + 1)(1.0)
    counted, seconds = clock.programs, clock.seconds
    assert counted >= 1
    assert seconds > 0
    clock.stop()
    jax.jit(lambda x: x * 5 + 1)(1.0)
    assert (clock.programs, clock.seconds) == (counted, seconds)
