"""The serving engine: what a completion depends on, and what it does not."""

import collections
import dataclasses
import json
import queue
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import adaptation
from grpocem_jax.models import sampling
from grpocem_jax.serving import Engine, Request, engine, text
from grpocem_jax.utils.errors import InputError
from tests.runs import ROOT, get_config, thin_model

TEXTS = (
    "The film",
    "Review: The soup was cold and the waiter was rude.\nSentiment:",
    "Review: Bad.\nSentiment:",
    "The tea was warm and good, and so",
    "A",
)
NEW = 12

pytestmark = pytest.mark.usefixtures("one_policy")


def load_run(**changes):
    settings = {"generation.max_new_tokens": NEW, "search.buckets": (32,)}
    return adaptation.load_base(get_config(**settings, **changes))


def offsets_of(zero, name):
    """An adapter by the number that is its name, far from the others."""
    leaves, form = jax.tree.flatten(zero)
    keys = jax.random.split(jax.random.key(int(name)), len(leaves))
    return form.unflatten(
        [2.0 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def make_engine(run, **changes):
    options = {"slots": 4, "rows": 3, "buckets": (8, 32), "max_new_tokens": NEW}
    generation = run.config.generation
    return Engine(
        run.policy,
        run.offsets,
        **{"load": lambda name: offsets_of(run.offsets, name), **options, **changes},
        top_k=generation.top_k,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
    )


def request(run, prompt=TEXTS[0], **changes):
    tokens = np.asarray(run.policy.encode(prompt), np.int32)
    return Request(**{"tokens": tokens, "max_new_tokens": NEW, **changes})


def finish(served):
    for _ in range(1000):
        if not served.step():
            return
    raise AssertionError("the engine does not come to an end")


def answer(ticket):
    """The text of a completion, how many tokens it has, and why it ended."""
    pieces = list(ticket.pieces(timeout=0))
    assert all(piece.finish is None for piece in pieces[:-1])
    return "".join(piece.text for piece in pieces), pieces[-1].tokens, pieces[-1].finish


def complete(served, *requests):
    tickets = [served.submit(each) for each in requests]
    finish(served)
    return [answer(ticket) for ticket in tickets]


@pytest.fixture(scope="module")
def run():
    return load_run(**{"model.source": thin_model()})


@pytest.fixture
def short(monkeypatch):
    """Slots of 11, 22 or 44 tokens; else they are of 44."""
    monkeypatch.setattr(engine, "SHORTEST", 10)


@pytest.fixture(scope="module")
def served(run):
    made = make_engine(run)
    made.warm_up()
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"generation.stop": (" the", "nd"), "generation.repetition_penalty": 1.3},
        {"adapter.type": "lora", "adapter.options.rank": 2, "adapter.sites": ("mlp.c_fc",)},
        {"adapter.type": "steering"},
        {"adapter.type": "grasp"},
    ],
    ids=["svf", "stops", "lora", "steering", "grasp"],
)
def test_greedy_answers_are_those_of_complete(changes):
    changed = load_run(**{"model.source": thin_model(), **changes})
    names = (None, "1", "2", "1", None)
    requests = [request(changed, *x) for x in zip(TEXTS, strict=True)]
    requests = [
        dataclasses.replace(x, adapter=name) for x, name in zip(requests, names, strict=True)
    ]
    found = complete(make_engine(changed), *requests)
    expected = [
        adaptation.complete(
            changed,
            changed.offsets if name is None else offsets_of(changed.offsets, name),
            [prompt],
        )[0]
        for name, prompt in zip(names, TEXTS, strict=True)
    ]
    assert [each for each, *_ in found] == expected
    assert len(set(expected)) >= 3


def test_a_llama_is_served_as_well(tmp_path):
    source = ROOT / "grpocem_jax" / "builtin" / "model"
    fields = {
        "model_type": "llama",
        "vocab_size": json.loads((source / "config.json").read_text())["vocab_size"],
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for path in source.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    sites = {"model.source": f"random:{tmp_path}", "adapter.sites": ("self_attn.o_proj",)}
    llama = load_run(**sites)
    found = complete(make_engine(llama), *(request(llama, prompt, adapter="1") for prompt in TEXTS))
    expected = adaptation.complete(llama, offsets_of(llama.offsets, "1"), TEXTS)
    assert [each for each, *_ in found] == expected
    assert found != complete(make_engine(llama), *(request(llama, prompt) for prompt in TEXTS))


def various(run, count, seed=0):
    """Requests that differ in everything."""
    rng = np.random.default_rng(seed)
    stops = ((), ("e",), (" the", "qu"))
    return [
        request(
            run,
            TEXTS[rng.integers(len(TEXTS))],
            adapter=(None, *"123456")[rng.integers(7)],
            max_new_tokens=int(rng.integers(1, NEW + 1)),
            temperature=float(rng.choice([0.0, 0.7, 2.0])),
            top_p=float(rng.choice([0.5, 0.9, 1.0])),
            stop=stops[rng.integers(3)],
            seed=int(rng.integers(2**32)),
        )
        for _ in range(count)
    ]


@pytest.mark.usefixtures("short")
def test_an_answer_is_the_same_alone_and_in_company(run):
    """200 mixes, in which requests also come while others are under way."""
    served = make_engine(run, slots=6, group=2)
    requests = various(run, 40)
    alone = [complete(served, each)[0] for each in requests]
    assert len(set(alone)) > 30
    assert {finish for *_, finish in alone} == {"stop", "length"}
    rng = np.random.default_rng(1)
    for _ in range(200):
        mix = rng.choice(len(requests), rng.integers(2, 10))
        tickets = []
        for each in mix:
            tickets.append(served.submit(requests[each]))
            if rng.random() < 0.3:
                served.step()
        finish(served)
        assert [answer(ticket) for ticket in tickets] == [alone[each] for each in mix]
    assert served.stats.evictions > 20


@pytest.mark.usefixtures("short")
def test_nothing_is_compiled_after_warming_up(run):
    compiled = []

    def note(name, *_, **__):
        compiled.append(name)

    served = make_engine(run, slots=6, group=2, rows=2, max_queue=100)
    assert served.warm_up() > 0
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for each in various(run, 40, seed=2):
            served.submit(each)
            served.step()
        served.submit(request(run)).cancel()
        finish(served)
        served.forget("1")
        complete(served, request(run, adapter="1"))
        assert compiled == []
        jax.jit(lambda x: x + 1)(0)
        assert any("compile" in name for name in compiled)  # that it would have been seen
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.usefixtures("short")
def test_the_slots_are_as_long_as_what_is_in_them_needs(run):
    served = make_engine(run)
    # Prompts of 2, 2 and 15 tokens.
    brief, long, longest = (request(run, TEXTS[i]) for i in (0, 0, 1))
    brief = dataclasses.replace(brief, max_new_tokens=3)
    expected = [complete(make_engine(run), each)[0] for each in (brief, long, longest)]
    lengths, tickets = [], []
    for each in (brief, long, longest, brief):
        tickets.append(served.submit(each))
        served.step()
        lengths.append(served._groups[0].length)
        finish(served)
    assert lengths == [11, 22, 44, 11]
    assert [answer(ticket) for ticket in tickets] == [*expected, expected[0]]
    served.submit(longest)
    served._admit()
    with pytest.raises(RuntimeError, match="under way"):
        served.warm_up()


def test_a_token_is_drawn_with_the_seed_and_its_number(run, served):
    drawn = request(run, TEXTS[1], temperature=1.5, top_p=0.8, seed=7)
    (whole, count, _), shorter = (
        complete(served, dataclasses.replace(drawn, max_new_tokens=n))[0] for n in (NEW, 3)
    )
    assert count > 3
    assert whole.startswith(shorter[0])
    model, params = run.policy.model, run.policy.params

    @jax.jit
    def draw(tokens, length, number):
        mask = jnp.arange(len(tokens)) < length
        hidden, _ = model.prefill(params, run.offsets, tokens, mask)
        key = jax.random.fold_in(jax.random.key(7), number)
        return sampling.draw(key, model.logits(params, hidden) / 1.5, 0.8)

    tokens = drawn.tokens
    for number in range(3):
        padded = np.pad(tokens, (0, 3 - number))
        tokens = np.append(tokens, np.int32(draw(padded, len(tokens), number)))
    assert run.policy.decode_completions([tokens[len(drawn.tokens) :]]) == [shorter[0]]
    assert complete(served, dataclasses.replace(drawn, seed=8))[0][0] != whole


def test_an_answer_ends_before_a_stop_string(run, served):
    whole, count, _ = complete(served, request(run, TEXTS[0]))[0]
    for start, end in ((3, 5), (0, 4), (len(whole) - 3, len(whole))):
        stop = whole[start:end]
        expected = whole[: whole.index(stop)]
        found, tokens, why = complete(served, request(run, TEXTS[0], stop=("never", stop)))[0]
        assert (found, why) == (expected, "stop")
        assert 1 <= tokens <= count


def test_pieces_come_as_they_are_made(run, monkeypatch):
    monkeypatch.setattr(engine, "MOST_STEPS", 2)
    served = make_engine(run)
    ticket = served.submit(request(run, TEXTS[0]))
    assert served.step()
    assert served.stats.active == 1
    first = next(ticket.pieces(timeout=0))
    assert first.finish is None
    assert 1 <= first.tokens <= 2
    with pytest.raises(TimeoutError, match="within 0 s"):
        list(ticket.pieces(timeout=0))
    finish(served)
    rest = list(ticket.pieces(timeout=0))
    assert len(rest) >= 5
    assert first.text + "".join(x.text for x in rest) == complete(served, request(run))[0][0]
    assert [x.tokens for x in rest] == sorted(x.tokens for x in rest)


def test_slots_are_taken_again_while_others_go_on(run):
    served = make_engine(run, slots=2)
    ended = []
    lengths = (NEW, 2, 3, 1, 2)
    for number, length in enumerate(lengths):
        # Of the drawn answers to this prompt none ends by itself.
        each = request(run, TEXTS[3], max_new_tokens=length, temperature=1.0, seed=number)
        served.submit(each, lambda x, n=number: x.finish and ended.append((n, x.tokens, x.finish)))
    finish(served)
    assert [n for n, *_ in ended] == [1, 2, 3, 4, 0]
    assert [(lengths[n], "length") for n, *_ in ended] == [x[1:] for x in ended]


@pytest.mark.parametrize(("second", "expected"), [(2, [16, 2, 1]), (9, [16, 1, 1, 1])])
def test_a_free_slot_waits_for_a_second_one_but_not_for_long(run, monkeypatch, second, expected):
    """Of 16 slots two are filled at once; one ends after a token and one after 2 or 9."""
    monkeypatch.setattr(engine, "HELD_STEPS", 3)
    monkeypatch.setattr(engine, "MOST_STEPS", 1)
    served, filled = make_engine(run, slots=16), []
    place = served._groups[0].place
    monkeypatch.setattr(
        served._groups[0], "place", lambda x, y: (filled.append(len(y)), place(x, y))[1]
    )
    for length in (*[NEW] * 14, 1, second, 1, 1, 1):
        served.submit(request(run, TEXTS[3], max_new_tokens=length, temperature=1.0, seed=0))
    finish(served)
    assert filled == expected


def test_groups_without_requests_do_not_run(run, monkeypatch):
    served, ran = make_engine(run, slots=5, group=2), []
    assert served.slots == 6  # three groups of two
    for number, group in enumerate(served._groups):
        decode = group.decode
        monkeypatch.setattr(
            group, "decode", lambda *x, n=number, f=decode, **y: (ran.append(n), f(*x, **y))[1]
        )
    expected = [complete(served, request(run, each))[0] for each in TEXTS]
    assert set(ran) == {0}
    assert complete(served, *(request(run, each) for each in TEXTS)) == expected
    assert set(ran) == {0, 1, 2}


def test_equal_prompts_of_a_batch_are_processed_once(run):
    served = make_engine(run)
    prompt = request(run, TEXTS[0], temperature=2.0, adapter="1")
    same = [dataclasses.replace(prompt, seed=seed) for seed in range(4)]
    found = complete(served, *same)
    assert served.stats.prompt_tokens == len(prompt.tokens)
    assert len(set(found)) > 1
    assert found == [complete(served, each)[0] for each in same]
    # Of another adapter the same prompt has other keys and values.
    before = served.stats.prompt_tokens
    complete(served, prompt, dataclasses.replace(prompt, adapter="2"))
    assert served.stats.prompt_tokens - before == 2 * len(prompt.tokens)


def test_adapters_used_last_stay_on_the_device(run):
    loaded = []

    def load(name):
        loaded.append(name)
        return offsets_of(run.offsets, name)

    served = make_engine(run, rows=2, load=load)
    for name in ("1", "2", "1", "3", "1", "2"):
        complete(served, request(run, adapter=name))
    assert loaded == ["1", "2", "3", "2"]
    assert (served.stats.resident, served.stats.evictions) == (2, 2)
    waits = served.submit(request(run, adapter="1"))
    served.forget("1")
    assert served.stats.resident == 1
    finish(served)
    assert loaded == ["1", "2", "3", "2", "1"]
    assert answer(waits) == complete(make_engine(run), request(run, adapter="1"))[0]
    served.forget("1")
    complete(served, request(run, adapter="1"), request(run, adapter="2"))
    assert loaded == ["1", "2", "3", "2", "1", "1"]
    assert served.stats.evictions == 3  # what had been forgotten was the first to go


def test_an_adapter_whose_name_stands_for_another_is_the_new_one(run):
    seeds = {"mine": "1"}
    served = make_engine(run, load=lambda name: offsets_of(run.offsets, seeds[name]))
    expected = [complete(make_engine(run), request(run, adapter=x))[0] for x in "12"]
    early = served.submit(request(run, adapter="mine"))
    seeds["mine"] = "2"
    served.forget("mine")
    late = served.submit(request(run, adapter="mine"))
    finish(served)
    assert [answer(early), answer(late)] == expected
    assert complete(served, request(run, adapter="mine")) == expected[1:]


def test_an_adapter_that_is_gone_when_its_turn_comes_ends_one_answer(run):
    there = {"1", "2"}

    def load(name):
        if name not in there:
            raise InputError(f"there is no adapter {name}.")
        return offsets_of(run.offsets, name)

    served = make_engine(run, slots=1, rows=1, load=load)
    complete(served, request(run, adapter="1"))
    late, other = served.submit(request(run, adapter="1")), request(run, adapter="2")
    served.forget("1")
    there.remove("1")
    ticket = served.submit(other)
    finish(served)
    (piece,) = late.pieces(timeout=0)
    assert (piece.finish, piece.error) == ("error", "there is no adapter 1.")
    assert answer(ticket)[2] in ("stop", "length")
    with pytest.raises(InputError, match="no adapter 3"):
        served.submit(request(run, adapter="3"))


def test_logits_that_are_not_finite_end_one_answer_and_spoil_no_other(run):
    def load(name):
        huge = jax.tree.map(lambda x: jnp.full_like(x, 3e38), run.offsets)
        return huge if name == "huge" else offsets_of(run.offsets, name)

    served = make_engine(run, slots=2, load=load)
    expected = complete(served, *(request(run, x, adapter="1") for x in TEXTS[:2]))
    good = served.submit(request(run, TEXTS[0], adapter="1"))
    bad = served.submit(request(run, TEXTS[1], adapter="huge"))
    finish(served)
    (piece,) = bad.pieces(timeout=0)
    assert piece.finish == "error"
    assert "not finite in float32" in piece.error
    assert answer(good) == expected[0]
    assert complete(served, *(request(run, x, adapter="1") for x in TEXTS[:2])) == expected


def test_a_request_that_is_cancelled_frees_its_slot(run, monkeypatch):
    monkeypatch.setattr(engine, "MOST_STEPS", 1)
    served = make_engine(run, slots=1)
    first, second = (served.submit(request(run)) for _ in range(2))
    third = served.submit(request(run, TEXTS[1]))
    served.step()
    first.cancel()
    second.cancel()
    served.step()
    served.step()
    assert (served.stats.active, served.stats.queued) == (1, 0)
    finish(served)
    assert answer(first)[1:] == (1, "cancelled")
    assert answer(second) == ("", 0, "cancelled")
    assert answer(third) == complete(served, request(run, TEXTS[1]))[0]


def test_a_receiver_that_fails_is_left_out(run):
    def gone(piece):
        raise RuntimeError("Event loop is closed")

    served = make_engine(run)
    lost = served.submit(request(run), gone)
    kept = served.submit(request(run))
    finish(served)
    assert lost.cancelled
    assert answer(kept) == complete(served, request(run))[0]
    assert served.stats.finished == served.stats.requests == 3


def test_a_full_queue_takes_no_more(run):
    served = make_engine(run, slots=1, max_queue=2)
    for _ in range(2):
        served.submit(request(run, max_new_tokens=1))
    with pytest.raises(queue.Full, match="2 requests wait already"):
        served.submit(request(run))
    assert served.stats.queued == 2
    finish(served)
    assert len(complete(served, request(run))) == 1


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"tokens": np.zeros(0, np.int32)}, "the prompt is empty"),
        ({"tokens": np.zeros(3)}, "tokens: are float64"),
        ({"tokens": np.array([1, 2048])}, "tokens: 2048 is no token of the model; they are 0 to"),
        ({"tokens": np.array([-1])}, "tokens: -1 is no token"),
        ({"tokens": np.ones(33, np.int32)}, "the prompt has 33 tokens and max_new_tokens=12"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be from 1 to 12"),
        ({"max_new_tokens": NEW + 1}, "max_new_tokens=13"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"temperature": -1.0}, "temperature=-1.0: must be 0"),
        ({"temperature": 1e-9}, "temperature=1e-09"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": -1}, "seed=-1: must be a whole number from 0"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"stop": "end"}, "stop='end': must be a list"),
        ({"stop": ("",)}, "stop=('',)"),
        ({"adapter": ""}, "adapter='': must be an adapter's name"),
        ({"adapter": "flat"}, "adapter='flat': is of another form"),
        ({"adapter": "nan"}, "adapter='nan': has numbers that are not finite"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(run, changes, fragment):
    def load(name):
        if name == "flat":
            return {}
        return jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), run.offsets)

    served = make_engine(run, load=load)
    with pytest.raises(InputError) as error:
        served.submit(request(run, **changes))
    assert fragment in str(error.value)
    assert served.stats.queued == 0


def test_settings_of_an_engine_that_cannot_be_used_are_named(run):
    for name, value, fragment in (
        ("slots", 0, "slots=0: must be"),
        ("rows", 1.5, "rows=1.5: must be"),
        ("buckets", (), "buckets=()"),
        ("max_new_tokens", 128, "max_new_tokens=128: leaves no room for a prompt"),
    ):
        with pytest.raises(InputError) as error:
            make_engine(run, **{name: value})
        assert fragment in str(error.value)
    with pytest.raises(InputError, match="one adapter only"):
        make_engine(run, load=None).submit(request(run, adapter="1"))


def test_slots_that_share_an_adapter_answer_as_those_with_it_as_their_own(run, served):
    other = run._replace(offsets=offsets_of(run.offsets, "1"))
    shared = complete(make_engine(other, load=None), *(request(run, x) for x in TEXTS))
    assert shared == complete(served, *(request(run, x, adapter="1") for x in TEXTS))


def test_other_work_gets_its_share_of_the_time(run, monkeypatch):
    """By a clock on which a step takes 2 s and a bit of the other work 3 s."""
    now, spent, stop = [0.0], collections.Counter(), threading.Event()
    served = make_engine(run)
    busy = [True]

    def take(name, seconds):
        now[0] += seconds
        spent[name] += seconds

    def step():
        if spent["step"] >= 400:
            busy[0] = False
        if busy[0]:
            take("step", 2.0)
        return busy[0]

    def between():
        take("between" if busy[0] else "idle", 3.0)
        if spent["idle"] >= 30:
            stop.set()
        return True

    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(served, "step", step)
    served.run(stop, between, share=0.25)
    assert 0.23 < spent["between"] / (spent["between"] + spent["step"]) < 0.27
    assert spent["idle"] == 30  # nobody else needs the time


def test_a_thread_serves_until_it_is_stopped(run):
    served, stop = make_engine(run), threading.Event()
    thread = threading.Thread(target=served.run, args=(stop,))
    thread.start()
    tickets = [served.submit(request(run, each)) for each in TEXTS[:2]]
    found = ["".join(piece.text for piece in ticket.pieces(timeout=60)) for ticket in tickets]
    assert found == adaptation.complete(run, run.offsets, TEXTS[:2])
    stop.set()
    thread.join(timeout=60)
    assert not thread.is_alive()
    with pytest.raises(queue.Full, match="has stopped"):
        served.submit(request(run))


def test_what_the_device_refuses_ends_its_answers_and_the_engine_goes_on(run, monkeypatch):
    served = make_engine(run)
    expected = complete(served, request(run, adapter="1"))
    ticket = served.submit(request(run, adapter="1"))
    with monkeypatch.context() as patch:
        patch.setattr(engine.device, "decode", lambda *args, **options: 1 / 0)
        served.step()
    (piece,) = ticket.pieces(timeout=0)
    assert (piece.finish, piece.error) == ("error", "division by zero")
    assert complete(served, request(run, adapter="1")) == expected


def test_text_comes_in_whole_characters_and_is_that_of_the_policy(run):
    words = text.vocabulary(run.policy)
    rng = np.random.default_rng(0)
    written = "naïve café, 5 € \N{GRINNING FACE}\n\n  two"
    rows = [run.policy.encode_completion(written)]
    rows += rng.integers(0, run.policy.model.vocab_size, (50, 12)).tolist()
    for row in rows:
        writer, parts = text.Writer(words, ()), []
        for token in row:
            assert not writer.add(token)
            parts.append(writer.take())
        parts.append(writer.take(last=True))
        assert "".join(parts) == run.policy.decode_completions([row])[0]
    writer, parts = text.Writer(words, ()), []
    for token in rows[0]:
        writer.add(token)
        parts.append(writer.take())
    assert "".join(parts) == written
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts)


def test_what_may_become_a_stop_string_is_held_back(run):
    words = text.Vocabulary(*[[b"", *(bytes([97 + i]) for i in range(5))]] * 2, {0: "<end>"})

    def write(letters, *stop):
        writer, parts = text.Writer(words, stop), []
        for letter in letters:
            if writer.add(0 if letter == "." else ord(letter) - 96):
                return parts, writer.take(last=True)
            parts.append(writer.take())
        return parts, writer.take(last=True)

    assert write("abac", "bc") == (["a", "", "ba", "c"], "")
    assert write("aabcd", "abc") == (["", "a", ""], "")
    # "abcd" begins first, but "c" is complete first.
    assert write("abcd", "abcd", "c") == (["", ""], "ab")
    assert write("ab", "abc") == (["", ""], "ab")
    # A token that writes nothing ends the text where its name has the stop string.
    assert write("ab.c", "<end>") == (["a", "b"], "")
    assert write("ab.c", "x") == (["a", "b", "", "c"], "")
