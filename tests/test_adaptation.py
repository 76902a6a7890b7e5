"""Adaptation: what is fitted and held back, searches in every space, rewards of populations."""

import dataclasses
import functools
import json
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import adaptation, rollouts
from grpocem_jax.adaptation import Text, workflow
from grpocem_jax.adaptation import texts as adaptation_texts
from grpocem_jax.config import parse_config
from grpocem_jax.runs import checkpoints
from grpocem_jax.search import GradientAscent, fitness, loop
from grpocem_jax.tasks import TASKS, Example, Reward
from grpocem_jax.utils.clock import CompileClock
from grpocem_jax.utils.errors import InputError
from tests.runs import (
    OTHER,
    OUT_OF_MEMORY,
    PROMPT,
    REWARD,
    get_config,
    no_search,
    question_examples,
    random_offsets,
    thin_config,
    write_run,
)

pytestmark = pytest.mark.usefixtures("one_policy")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), settings=thin_config())


@pytest.fixture(scope="module")
def run(workdir):
    return adaptation.load_run(workdir)


@pytest.fixture(scope="module")
def builtin_workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def builtin(builtin_workdir):
    """A run with the built-in model, whose experts come with the package."""
    return adaptation.load_run(builtin_workdir)


@pytest.fixture(scope="module")
def questions(run):
    return rollouts.encode(run.policy, TASKS["qa"], question_examples())


def cem(run, **changes):
    return dataclasses.replace(run.config.search, **changes)


def reward_settings(run, **changes):
    return cem(run, **{name.removeprefix("search."): x for name, x in REWARD.items()} | changes)


def stacked(*adapters):
    return jax.tree.map(lambda *x: jnp.stack(x), *adapters)


def unstacked(adapters):
    count = len(jax.tree.leaves(adapters)[0])
    return [jax.tree.map(lambda x, row=row: x[row], adapters) for row in range(count)]


def distance(a, b):
    return max(float(jnp.abs(a[name] - b[name]).max()) for name in b)


def assert_equal(a, b):
    chex.assert_trees_all_equal(a, b)


# Runs


def test_three_lines_load_a_run_adapt_to_a_prompt_and_complete_it(builtin_workdir):
    run = adaptation.load_run(builtin_workdir)
    result = adaptation.adapt(run, PROMPT)
    (text,) = adaptation.complete(run, result.offsets, [PROMPT])
    assert isinstance(text, str)
    assert result.returned in ("mean", "start")
    assert result.search.generations == 2
    assert result.search.candidates == 24  # of both halves and of all
    # The settings came from the run's config.json, not from the defaults.
    assert run.config == parse_config(get_config())


def test_other_settings_may_be_given_than_the_runs_own(workdir):
    run = adaptation.load_run(workdir, thin_config(**{"search.generations": 7}))
    assert run.config.search.generations == 7


@pytest.mark.parametrize("method", ["cem", "gradient"])
def test_adapting_changes_neither_the_model_nor_the_trained_adapter(run, method):
    before = jax.tree.map(np.array, (run.policy.params, run.offsets))
    result = adaptation.adapt(run, PROMPT, settings=cem(run, method=method, gate=False))
    assert distance(result.offsets, run.offsets) > 0
    assert_equal((run.policy.params, run.offsets), before)


def test_an_adapted_vector_saved_and_loaded_again_is_equal(run, tmp_path):
    result = adaptation.adapt(run, PROMPT, settings=cem(run, gate=False))
    sha256 = run.policy.pretrained.sha256
    described = {"base_model": "thin", "base_sha256": sha256}
    checkpoints.save_adapter(tmp_path / "adapted", result.offsets, described, "")
    again = checkpoints.load_adapter(tmp_path / "adapted", run.policy.zero, base_sha256=sha256)
    assert_equal(again, result.offsets)


def test_a_run_without_a_readable_config_is_named(run, tmp_path):
    checkpoints.copy_adapter(write_run(tmp_path / "a") / "adapter", tmp_path / "b" / "adapter")
    with pytest.raises(InputError, match=r"b/config\.json: cannot be read"):
        adaptation.load_run(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text('{"seed": ')
    with pytest.raises(InputError, match=r"b/config\.json: cannot be read"):
        adaptation.load_run(tmp_path / "b")


# Adapting to likelihood


def test_the_same_key_gives_the_same_adapter_bit_for_bit_and_another_does_not(run):
    settings = cem(run, gate=False)
    first, again, other = (
        adaptation.adapt(run, PROMPT, key=jax.random.key(seed), settings=settings).offsets
        for seed in (3, 3, 4)
    )
    assert_equal(first, again)
    assert distance(first, other) > 0


def test_fitness_before_and_after_are_the_mean_likelihoods_of_the_text(run):
    result = adaptation.adapt(run, PROMPT, settings=cem(run, gate=False))
    both = stacked(run.offsets, result.offsets)
    values = adaptation.log_likelihoods(run, both, [Text(PROMPT)] * 2, own_adapters=True)
    np.testing.assert_allclose(values, [result.fitness_before, result.fitness_after], rtol=1e-5)


def test_the_gradient_method_raises_the_likelihood(run):
    settings = cem(run, method="gradient", gate=False)
    result = adaptation.adapt(run, PROMPT, settings=settings)
    assert result.fitness_after > result.fitness_before
    assert result.search.candidates == 2
    # Two steps of Adam.
    assert distance(result.offsets, run.offsets) < 2.1 * run.config.gradient.learning_rate


@pytest.mark.parametrize(
    ("changes", "dimensions"),
    [
        ({"space": "experts"}, 8),
        ({"space": "experts", "per_site": True}, 8),
        ({"space": "subspace", "rank": 5}, 5),
    ],
)
def test_a_search_in_a_space_of_experts_ends_in_that_space(builtin, changes, dimensions):
    run = builtin
    settings = cem(run, experts="builtin", gate=False, **changes)
    space = adaptation.make_space(run.policy, run.offsets, settings)
    result = adaptation.adapt(run, PROMPT, settings=settings)
    move = jax.tree.map(lambda x, start: np.array(x - start), result.offsets, run.offsets)
    assert distance(result.offsets, run.offsets) > 0
    sites = list(move)
    groups = [[site] for site in sites] if settings.per_site else [sites]
    for group in groups:
        basis = np.concatenate([np.array(space.basis[site]) for site in group], axis=1)
        target = np.concatenate([move[site] for site in group])
        assert len(basis) == dimensions
        weights = np.linalg.lstsq(basis.T, target)[0]
        np.testing.assert_allclose(weights @ basis, target, atol=1e-5)
    if settings.per_site:
        # One set of weights for all sites does not explain what was found.
        basis = np.concatenate([np.array(space.basis[site]) for site in sites], axis=1)
        target = np.concatenate([move[site] for site in sites])
        residual = np.linalg.lstsq(basis.T, target)[0] @ basis - target
        assert np.abs(residual).max() > 1e-3


def test_a_space_of_experts_says_when_there_are_too_few_directions(builtin):
    settings = cem(builtin, space="subspace", rank=400)
    with pytest.raises(InputError, match=r"search\.rank=400"):
        adaptation.make_space(builtin.policy, builtin.offsets, settings)


def test_the_smallest_budget_is_one_generation(run):
    result = adaptation.adapt(run, PROMPT, settings=cem(run, generations=3, budget_s=1e-9))
    assert result.search.generations == 1
    assert result.search.converged is False


def test_a_second_prompt_of_another_length_in_the_bucket_compiles_nothing(run):
    lengths = [len(adaptation.encode(run.policy, p, run.config.search)[0]) for p in (PROMPT, OTHER)]
    assert lengths[0] < lengths[1] <= run.config.search.buckets[0]
    adaptation.adapt(run, PROMPT)
    clock = CompileClock.start()
    adaptation.adapt(run, OTHER)
    clock.stop()
    assert clock.seconds == 0.0


# The gate


def test_three_tokens_are_too_few_for_the_gate_and_the_start_comes_back_with_a_note(run):
    result = adaptation.adapt(run, "Review: The")
    assert result.offsets is run.offsets
    assert result.returned == "start"
    assert result.search is None
    assert "too few tokens" in result.note
    assert result.fitness_after == result.fitness_before
    summary = adaptation.summary(result)
    assert summary["adapted"] is False
    assert summary["generations"] == summary["candidates"] == 0
    assert summary["note"] == result.note
    json.dumps(summary, allow_nan=False)


def test_a_gate_that_lets_nothing_pass_returns_the_start_bit_for_bit(run):
    result = adaptation.adapt(run, PROMPT, settings=cem(run, gate_z=1e6))
    assert result.returned == "start"
    assert_equal(result.offsets, run.offsets)
    assert result.fitness_after == result.fitness_before
    assert adaptation.summary(result)["adapted"] is False
    assert result.search.generations == 2


@pytest.mark.parametrize("text", [Text(OTHER), Text(OTHER, " bad. The soup was cold and bad.")])
def test_one_text_is_split_in_the_middle_of_what_is_scored(run, text):
    tokens, scored = adaptation.encode(run.policy, text, run.config.search)
    parts = adaptation.halves([(tokens, scored)], run.config.search)
    first, second = [type(part)(*map(np.array, part)) for part in parts]
    assert first.tokens.shape == second.tokens.shape == (1, 16 if len(tokens) <= 16 else 32)
    places = [np.flatnonzero(part.scored[0]) for part in (first, second)]
    np.testing.assert_array_equal(np.concatenate(places), np.flatnonzero(scored))
    assert len(places[1]) - len(places[0]) in (0, 1)
    # Each token is judged after all that comes before it.
    for part in (first, second):
        np.testing.assert_array_equal(part.tokens[0][part.mask[0]], tokens)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_several_texts_are_dealt_in_turn_and_the_last_of_an_odd_number_is_shared(run, count):
    words = "soup tea milk rice bread".split()[:count]
    texts = [Text(f"{OTHER} Cold {word}", " and bad or so") for word in words]
    encoded = [adaptation.encode(run.policy, text, run.config.search) for text in texts]
    first, second = adaptation.halves(encoded, run.config.search)
    assert first.tokens.shape == second.tokens.shape == ((count + 1) // 2, 32)
    rows = rows_of(adaptation.batch(encoded, run.config.search))
    even = count // 2
    assert rows_of(first)[:even] == rows[: 2 * even : 2]
    assert rows_of(second)[:even] == rows[1 : 2 * even : 2]
    if count % 2:
        last = [np.array(part.scored[-1]) for part in (first, second)]
        assert not np.any(last[0] & last[1])
        np.testing.assert_array_equal((last[0] | last[1])[: len(encoded[-1][1])], encoded[-1][1])


def test_both_halves_have_their_share_of_each_label(run):
    labels = [" good", " bad", " cold", " good", " bad", " cold", " good", " bad"]
    texts = [Text(f"{OTHER} {i}", label) for i, label in enumerate(labels)]
    encoded = [adaptation.encode(run.policy, text, run.config.search) for text in texts]
    rows = rows_of(adaptation.batch(encoded, run.config.search))
    first, second = adaptation.halves(encoded, run.config.search)
    # good 0, 3, 6; bad 1, 4, 7; cold 2, 5
    assert rows_of(first) == [rows[i] for i in (0, 6, 4, 2)]
    assert rows_of(second) == [rows[i] for i in (3, 1, 7, 5)]


def test_copies_of_a_text_are_in_one_half(run):
    """Or each half would be judged by what it was fitted to."""
    texts = [OTHER, PROMPT, OTHER, OTHER, PROMPT]
    encoded = [adaptation.encode(run.policy, text, run.config.search) for text in texts]
    rows = rows_of(adaptation.batch(encoded, run.config.search))
    first, second = adaptation.halves(encoded, run.config.search)
    assert rows_of(first) == [rows[0]] * 3
    assert rows_of(second)[:2] == [rows[1]] * 2
    assert np.asarray(second.scored).any(axis=1).tolist() == [True, True, False]
    assert first.tokens.shape == second.tokens.shape
    # A text alone is split in its middle, each copy alike.
    first, second = adaptation.halves(encoded[:1] * 2, run.config.search)
    assert first.tokens.shape == (2, 16)
    np.testing.assert_array_equal(first.scored[0], first.scored[1])
    assert not np.any(np.asarray(first.scored) & np.asarray(second.scored))


def test_copies_of_a_prompt_are_in_one_half(run, questions):
    settings = reward_settings(run, gate=True)
    subject = workflow._rewarded(run, [*questions[:4], *questions[:2]], settings, jax.random.key(0))
    halves = [[item.tokens.tolist() for item in half] for half in subject.halves]
    assert list(map(len, halves)) == [3, 3]
    assert not [tokens for tokens in halves[0] if tokens in halves[1]]
    with pytest.raises(
        InputError, match=r"^6 prompts to adapt to: .* 4 that differ; these are 3\."
    ):
        workflow._rewarded(run, [*questions[:3], *questions[:3]], settings, jax.random.key(0))


@pytest.mark.parametrize(
    ("texts", "states"),
    [
        ([Text(f"{OTHER} {i}", " bad") for i in range(4)], 1),
        ([OTHER, OTHER, Text(OTHER, " bad"), Text(OTHER, " bad")], None),
        ([OTHER], None),
    ],
)
def test_no_more_states_predict_than_there_are_scored_tokens_in_a_text(run, texts, states):
    settings = run.config.search
    encoded = [adaptation.encode(run.policy, text, settings) for text in texts]
    batch = adaptation.batch(encoded, settings)
    assert (None if batch.places is None else batch.places.shape) == (
        None if states is None else (len(texts), states)
    )
    parts = adaptation.halves(encoded, settings)
    score = jax.jit(adaptation.make_fitness(run.policy, settings, batch))
    for part in parts if batch.places is None else (batch,):
        whole = part._replace(places=None)
        found, expected = (score(run.offsets, x, jax.random.key(0)) for x in (part, whole))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    if len(texts) == 1:
        assert parts[0].places.shape == parts[1].places.shape == (1, 8)  # of 15


def labelled(instruction):
    words = "soup tea milk rice bread corn salt fish".split()
    return [Text(f"{instruction} {word} was cold.", " bad") for word in words]


def test_what_texts_begin_with_alike_is_a_prefix_up_to_before_what_counts(run):
    settings = run.config.search

    def prefix(texts):
        encoded = [adaptation.encode(run.policy, text, settings) for text in texts]
        batch = adaptation.batch(encoded, settings, prefix=True)
        for part in adaptation.halves(encoded, settings, prefix=True) or ():
            assert (part.prefix is None) == (batch.prefix is None)
            assert part.tokens.shape[1] == batch.tokens.shape[1]
        return [] if batch.prefix is None else batch.prefix.tolist(), batch

    texts = labelled(OTHER)
    own, others = (run.policy.encode(f"{OTHER}{end}") for end in ("", " soup was"))
    found, batch = prefix(texts)
    assert found == own[: len(own) // 4 * 4]
    assert len(found) >= 8
    # Padded to the bucket of what is behind it.
    assert batch.tokens.shape == (8, len(found) + 16)
    # Texts that are the same: the last token before what counts has to be behind the prefix.
    found, _ = prefix(texts[:1] * 8)
    before = len(run.policy.encode(texts[0].prompt))
    assert found == others[: (before - 1) // 4 * 4]
    # Where all of a text counts, and where it does not pay, there is none.
    assert prefix([*texts, OTHER])[0] == []
    assert prefix(texts[:7])[0] == []
    long = [Text(f"Review: The soup was {i} {OTHER}", " bad") for i in range(8)]
    start = len(run.policy.encode("Review: The soup was"))
    assert 4 <= start < len(run.policy.encode(long[0].prompt)) / 4
    assert prefix(long)[0] == []


@pytest.mark.parametrize("method", ["cem", "gradient"])
def test_a_search_over_texts_with_a_prefix_finds_what_one_over_whole_texts_does(
    run, method, monkeypatch
):
    settings = cem(run, method=method, gate_z=0.0, buckets=(16, 32, 64))
    texts = labelled(OTHER)

    def found():
        result = adaptation.adapt(run, texts, settings=settings)
        return result, adaptation.log_likelihoods(run, result.offsets, texts)

    (short, after), seen = found(), []
    chunk = fitness.population_chunk
    with monkeypatch.context() as patch:
        patch.setattr(adaptation_texts, "PREFIX_STEP", 10_000)
        patch.setattr(fitness, "population_chunk", lambda n, x: seen.append(x) or chunk(n, x))
        whole, expected = found()
    assert [x.prefix for x in seen] == [None]
    assert short.returned == whole.returned == "mean"
    assert distance(short.offsets, run.offsets) > 1e-2
    assert distance(short.offsets, whole.offsets) < 1e-3
    np.testing.assert_allclose(after, expected, rtol=1e-4)


def rows_of(batch):
    """Each text of a batch as something that compares."""
    arrays = [np.array(x) for x in batch if x is not None]
    return [b"".join(x.tobytes() for x in row) for row in zip(*arrays, strict=True)]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "prompt is empty"),
        (" \n ", "prompt is empty"),
        (Text("", " completion"), "prompt is empty"),
        ("Review", "one token"),
        (PROMPT * 20, "longer than the limit of 127"),
    ],
)
def test_a_text_that_cannot_be_adapted_to_is_refused(run, text, fragment):
    with pytest.raises(InputError, match=fragment):
        adaptation.adapt(run, [PROMPT, text])


def test_only_a_completion_counts_where_there_is_one(run):
    tokens, scored = adaptation.encode(run.policy, Text(PROMPT, " negative"), run.config.search)
    np.testing.assert_array_equal(scored, [False] * (len(tokens) - 1) + [True])
    tokens, scored = adaptation.encode(run.policy, PROMPT, run.config.search)
    np.testing.assert_array_equal(scored, [False] + [True] * (len(tokens) - 1))


def test_likelihoods_under_own_adapters_are_those_of_one_call_for_each_text(run):
    # More texts than a batch holds, and not a multiple of it.
    texts = [Text(PROMPT), Text(OTHER), Text(PROMPT, " positive")] * 6
    adapters = [random_offsets(run.policy.zero, seed) for seed in range(3)] * 6
    together = adaptation.log_likelihoods(run, stacked(*adapters), texts, own_adapters=True)
    assert together.shape == (18,)
    for row in range(3):
        alone = adaptation.log_likelihoods(run, adapters[row], [texts[row]])
        np.testing.assert_allclose(together[row::3], alone[0], rtol=1e-5)
    assert len({round(float(x), 4) for x in together}) == 3


# Completions


def test_a_completion_is_the_most_probable_token_after_the_other_each_time_the_same(run):
    model, params = run.policy.model, run.policy.params
    prompt, _ = adaptation.encode(run.policy, PROMPT, run.config.search)
    end_ids = np.array(run.policy.end_ids).tolist()

    @jax.jit
    def best(tokens, length):
        hidden = model.forward(params, run.offsets, tokens, jnp.arange(16) < length)
        return jnp.argmax(model.logits(params, hidden[length - 1]))

    tokens = prompt.tolist()
    for _ in range(4):
        padded = np.array(tokens + [0] * (16 - len(tokens)), np.int32)
        token = int(best(padded, len(tokens)))
        if token in end_ids:
            break
        tokens.append(token)
    expected = run.policy.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
    hot = run._replace(
        config=dataclasses.replace(
            run.config, generation=dataclasses.replace(run.config.generation, temperature=50.0)
        )
    )
    for one in (run, run, hot):
        assert adaptation.complete(one, run.offsets, [PROMPT]) == [expected]


def test_a_prompt_that_leaves_no_room_for_a_completion_is_refused(run):
    long = run.policy.tokenizer.decode(
        adaptation.encode(run.policy, PROMPT, run.config.search)[0].tolist() * 12 + [5] * 6
    )
    with pytest.raises(InputError, match="=4 of a context of 128 allow 124"):
        adaptation.complete(run, run.offsets, [long])


def captured_shape(monkeypatch, call):
    """The shape of the padded prompts that a call generates from."""

    class Generated(Exception):  # noqa: N818
        pass

    def generate(policy, offsets, prompts, *args, **kwargs):
        raise Generated(prompts.tokens.shape)

    monkeypatch.setattr(rollouts.engine, "generate", generate)
    with pytest.raises(Generated) as caught:
        call()
    return caught.value.args[0]


def test_completions_are_padded_to_a_bucket_so_that_lengths_share_a_program(run, monkeypatch):
    shape = captured_shape(monkeypatch, lambda: adaptation.complete(run, run.offsets, [PROMPT]))
    assert shape == (1, 16)


def test_prompts_of_a_population_are_padded_to_a_bucket(run, questions, monkeypatch):
    shape = captured_shape(
        monkeypatch, lambda: rewards_of(run, stacked(run.offsets), questions[:2], buckets=(64,))
    )
    assert shape == (2, 64)


def test_nothing_is_padded_beyond_the_context(run, questions, monkeypatch):
    beyond = (16, 2**31 - 1)
    wide = run._replace(config=dataclasses.replace(run.config, search=cem(run, buckets=beyond)))
    long, context = " the" * 40, run.policy.model.context_length
    for call in (
        lambda: adaptation.complete(wide, run.offsets, [long]),
        lambda: rewards_of(run, stacked(run.offsets), questions[:1], buckets=beyond),
    ):
        with monkeypatch.context() as patch:
            assert captured_shape(patch, call) == (1, context)
    whole = cem(run, buckets=(context,))
    capped = run._replace(config=dataclasses.replace(run.config, search=whole))
    for function in (
        lambda run: adaptation.log_likelihoods(run, run.offsets, [adaptation.Text(long)])[0],
        lambda run: adaptation.adapt(run, long, settings=run.config.search).fitness_before,
    ):
        assert function(wide) == function(capped)


# Rewards


def rewards_of(run, adapters, items, key=None, **options):
    key = jax.random.key(5) if key is None else key
    options = {"num_samples": 2, "buckets": run.config.search.buckets, **options}
    return rollouts.population_rewards(
        run.policy, adapters, items, key, run.config.generation, **options
    )


@pytest.fixture(scope="module")
def by_words():
    """A task whose reward tells completions apart, which few of the real ones would here."""

    def words(prompts, completions, **columns):
        return [hash_of(text) for text in completions]

    def hash_of(text):
        return sum(map(ord, text)) % 1000 / 1000

    return dataclasses.replace(TASKS["qa"], rewards=(Reward(words),))


@pytest.fixture(scope="module")
def population(run):
    return [random_offsets(run.policy.zero, seed, scale=0.5) for seed in range(4)]


def test_a_population_gets_the_rewards_of_one_call_for_each_candidate(
    run, questions, population, by_words
):
    items = [item._replace(task=by_words) for item in questions[:2]]
    together = rewards_of(run, stacked(*population), items)
    assert together.shape == (4, 2)
    alone = [rewards_of(run, stacked(candidate), items)[0] for candidate in population]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert len(np.unique(together, axis=0)) > 2
    # Common random numbers: a candidate that occurs twice is worth the same both times.
    twice = rewards_of(run, stacked(*population[:2], *population[:2]), items)
    np.testing.assert_array_equal(twice[:2], twice[2:])


def test_samples_under_own_adapters_are_those_of_one_call_for_each_adapter(
    run, questions, population
):
    prompts = rollouts.pad([item.tokens for item in questions[:2]], len(questions[0].tokens))
    keys = jax.random.split(jax.random.key(5), 8)

    def draw(offsets, prompts, keys, **options):
        generation = run.config.generation
        options |= {"num_samples": 2, "temperature": 0.9}
        return rollouts.generate(run.policy, offsets, prompts, keys, generation, **options)

    own = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), stacked(*population))
    tiled = rollouts.Prompts(*(np.tile(x, (4, 1)) for x in prompts))
    together = draw(own, tiled, keys, own_adapters=True)
    for number, offsets in enumerate(population):
        rows = slice(2 * number, 2 * number + 2)
        alone = draw(offsets, prompts, keys[rows])
        np.testing.assert_array_equal(together.tokens[rows], alone.tokens)
        np.testing.assert_array_equal(together.mask[rows], alone.mask)
        np.testing.assert_allclose(together.logps[rows], alone.logps, atol=1e-5)
        np.testing.assert_allclose(together.entropies[rows], alone.entropies, atol=1e-5)
    # The adapters do make a difference.
    other = draw(population[0], prompts, keys[2:4])
    assert not np.allclose(together.logps[2:4], other.logps, atol=1e-3)


def test_a_search_for_reward_reports_the_rewards_of_its_start_and_its_result(
    builtin, questions, by_words, monkeypatch
):
    run = builtin
    monkeypatch.setattr(workflow, "JUDGED_SAMPLES", 1)

    def compiling(**columns):
        jax.jit(lambda x: x + 1)(0.0)  # a new function: the other programs may be there already
        return by_words.rewards[0].function(**columns)

    task = dataclasses.replace(by_words, rewards=(Reward(compiling),))
    items = [item._replace(task=task) for item in questions]
    key, seen = jax.random.key(8), []
    settings = reward_settings(run, gate_z=0.0)
    before = jax.tree.map(np.array, run.offsets)
    result = adaptation.adapt(
        run, items, key=key, settings=settings, on_chunk=lambda done, history: seen.append(done)
    )
    rewards = rewards_of(run, stacked(run.offsets, result.offsets), items, key).mean(-1)
    assert result.fitness_before == pytest.approx(rewards[0], rel=1e-6)
    assert result.fitness_after == pytest.approx(rewards[1], rel=1e-6)
    assert_equal(run.offsets, before)
    found = result.search
    assert found.seconds > 0
    assert found.compile_seconds > 0
    assert seen == [1, 2]
    assert found.generations == 2
    # Of both halves and, where they pass, of all.
    assert found.candidates == 8 * (3 if result.returned == "mean" else 2)
    assert result.returned in ("mean", "start")
    assert (found.held_back_gain > 0) == (result.returned == "mean")
    assert np.all(found.history.best >= found.history.mean)
    if result.returned == "start":
        assert_equal(result.offsets, run.offsets)


@pytest.mark.parametrize("asked", [True, False])
def test_where_memory_runs_out_fewer_candidates_answer_at_a_time(
    run, questions, by_words, asked, monkeypatch, capsys
):
    rewards, sizes = rollouts.population_rewards, []

    def short(policy, adapters, *args, **options):
        sizes.append(len(jax.tree.leaves(adapters)[0]))
        if sizes[-1] > 2:
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
        return rewards(policy, adapters, *args, **options)

    items = [item._replace(task=by_words) for item in questions]
    settings = reward_settings(run, gate=False, fit_memory=asked)
    search = functools.partial(adaptation.adapt, run, items, key=jax.random.key(8))
    expected = search(settings=dataclasses.replace(settings, population_chunk=2))
    monkeypatch.setattr(rollouts, "population_rewards", short)
    if not asked:
        with pytest.raises(
            InputError, match=r"memory in the search: .* config\.search\.population_chunk=2,"
        ):
            search(settings=settings)
        return
    found = search(settings=settings)
    assert_equal(found.offsets, expected.offsets)
    assert found.search.population_chunk == adaptation.summary(found)["population_chunk"] == 2
    # After the start by itself, four candidates did not fit once.
    assert sizes[:4] == [1, 4, 2, 2]
    assert "is lowered from 4 to 2" in capsys.readouterr().err


def test_a_gate_on_rewards_that_lets_nothing_pass_returns_the_start(run, questions):
    result = adaptation.adapt(
        run, questions, settings=reward_settings(run, gate_z=1e6, generations=1)
    )
    assert result.returned == "start"
    assert_equal(result.offsets, run.offsets)
    assert result.fitness_after == result.fitness_before


def abstains(prompts, completions, **columns):
    return [None] * len(completions)


@pytest.mark.parametrize("gate", [True, False])
def test_rewards_that_all_abstain_are_named_before_the_search(run, questions, gate, monkeypatch):
    task = dataclasses.replace(questions[0].task, rewards=(Reward(abstains),))
    items = [item._replace(task=task) for item in questions]
    with pytest.raises(InputError) as error:
        adaptation.adapt(run, items, settings=reward_settings(run, gate=gate))
    for part in ("config.search.fitness='reward' is nan", "to start from", "abstained each time"):
        assert part in str(error.value)


def test_a_result_whose_rewards_all_abstain_is_named(run, questions):
    calls = []

    def once(prompts, completions, **columns):
        calls.append(completions)
        return [0.5 if len(calls) == 1 else None] * len(completions)

    task = dataclasses.replace(questions[0].task, rewards=(Reward(once),))
    items = [item._replace(task=task) for item in questions]
    with pytest.raises(InputError, match="is nan for the adapter found"):
        adaptation.adapt(run, items, settings=reward_settings(run, gate=False))


def test_several_texts_are_adapted_to_together(run, questions):
    texts = [Text(i.example.prompt, i.task.completion(i.example)) for i in questions]
    settings = cem(run, gate_z=0.0, generations=3)
    method = GradientAscent(learning_rate=0.05)
    result = adaptation.adapt(run, texts, settings=settings, method=method)
    scored = np.array([adaptation.encode(run.policy, text, settings)[1].sum() for text in texts])
    values = adaptation.log_likelihoods(run, run.offsets, texts)
    assert result.fitness_before == pytest.approx(float(values @ scored / scored.sum()), rel=1e-5)
    assert result.fitness_after > result.fitness_before


@pytest.mark.parametrize(
    ("answers", "first", "second"),
    [("abcd", [0, 2], [1, 3]), ("abab", [0, 1], [2, 3])],  # each half has its share of both
)
def test_the_halves_of_the_prompts_are_searched_and_judge_each_other(
    run, questions, answers, first, second, monkeypatch
):
    asked = []

    def record(prompts, completions, **columns):
        asked.append([by_prompt[prompt] for prompt in dict.fromkeys(prompts)])
        return [0.0] * len(prompts)

    task = dataclasses.replace(TASKS["qa"], rewards=(Reward(record),))
    items = [
        item._replace(task=task, example=item.example._replace(columns={"answers": answer}))
        for item, answer in zip(questions, answers, strict=True)
    ]
    by_prompt = {item.example.prompt: row for row, item in enumerate(items)}
    monkeypatch.setattr(workflow, "JUDGED_SAMPLES", 1)
    adaptation.adapt(run, items, settings=reward_settings(run, generations=1))
    # Before; the candidates of each half; the points of each by the other; after.
    everything = [0, 1, 2, 3]
    assert asked == [everything, first, second, second, first, everything]


def test_the_spread_over_prompts_decides_what_passes_the_gate(run, questions, monkeypatch):
    gains = dict(zip((i.example.prompt for i in questions), (3.0, -1.0, 0.0, 2.0), strict=True))

    def rewards(policy, adapters, items, *args, **options):
        moved = [distance(a, run.offsets) > 0 for a in unstacked(adapters)]
        return np.array([[gains[i.example.prompt] * away for i in items] for away in moved])

    monkeypatch.setattr(rollouts, "population_rewards", rewards)
    search = functools.partial(adaptation.adapt, run, questions)
    # The mean gain is 1, its standard error sqrt(10 / 3) / 2 = 0.91.
    settings = reward_settings(run, generations=1)
    assert search(settings=dataclasses.replace(settings, gate_z=1.2)).returned == "start"
    result = search(settings=dataclasses.replace(settings, gate_z=1.0))
    assert result.returned == "mean"
    assert result.search.held_back_gain == 1.0


def test_a_reward_has_no_gradient(run, questions):
    settings = reward_settings(run, method="gradient")
    with pytest.raises(InputError, match="a reward has no gradient"):
        adaptation.adapt(run, questions, settings=settings)


@pytest.mark.parametrize("count", [1, 3])
def test_the_gate_needs_four_prompts(run, questions, count):
    with pytest.raises(InputError, match=f"^{count} prompts to adapt to: .* at least 4"):
        adaptation.adapt(run, questions[:count], settings=reward_settings(run))


def test_texts_have_no_reward_and_prompts_of_a_task_no_likelihood(run, questions):
    with pytest.raises(InputError, match=r"search\.fitness='reward': a text has no reward"):
        adaptation.adapt(run, PROMPT, settings=reward_settings(run))
    with pytest.raises(InputError, match=r"search\.fitness='likelihood': .* give texts"):
        adaptation.adapt(run, questions)


def constant(value, model, params, offsets, texts, key):
    return sum(jnp.sum(x) for x in jax.tree.leaves(offsets)) * 0 + value


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_fitness_that_is_not_finite_at_the_start_is_named_before_the_search(
    run, value, gate, monkeypatch
):
    monkeypatch.setattr(loop, "maximize", no_search)
    function = functools.partial(constant, value)
    monkeypatch.setattr(workflow.user_code, "load_function", lambda *args, **kwargs: function)
    settings = cem(run, fitness="mine:constant", gate=gate)
    with pytest.raises(InputError) as error:
        adaptation.adapt(run, PROMPT, settings=settings)
    assert f"config.search.fitness='mine:constant' is {value} for the adapter to start" in str(
        error.value
    )


def test_a_fitness_that_is_not_finite_for_the_result_is_named(run, monkeypatch):
    def off_the_start(model, params, offsets, texts, key):
        moved = sum(jnp.sum(jnp.abs(offsets[name] - run.offsets[name])) for name in offsets)
        return jnp.where(moved > 0, jnp.nan, 1.0)

    monkeypatch.setattr(workflow.user_code, "load_function", lambda *args, **kwargs: off_the_start)
    found = types.SimpleNamespace(offsets=jax.tree.map(lambda x: x + 1, run.offsets))
    monkeypatch.setattr(loop, "maximize", lambda *args, **kwargs: found)
    with pytest.raises(InputError, match=r"is nan for the adapter found.*search.gate=True"):
        adaptation.adapt(run, PROMPT, settings=cem(run, fitness="mine:f", gate=False))


def test_a_prompt_of_a_task_that_leaves_no_room_is_refused(run, questions, monkeypatch):
    example = questions[0].example
    long = Example(example.prompt * 8, example.columns)
    items = rollouts.encode(run.policy, TASKS["qa"], [long] * 4)
    with pytest.raises(InputError, match="shorten it"):
        adaptation.adapt(run, items, settings=reward_settings(run))


def test_likelihoods_of_no_texts_are_refused(run):
    with pytest.raises(InputError, match="there are no texts"):
        adaptation.log_likelihoods(run, run.offsets, [])
