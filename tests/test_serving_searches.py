"""Jobs of many users: each finds what it finds by itself, whoever comes and goes beside it."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import adaptation
from grpocem_jax.adaptation import Text
from grpocem_jax.runs import checkpoints
from grpocem_jax.search import CEM, GradientAscent, lanes, rows
from grpocem_jax.serving.jobs import QueueFullError
from grpocem_jax.serving.searches import Searches
from grpocem_jax.utils.errors import InputError
from tests.runs import OTHER, PROMPT, get_config, no_search, random_offsets, thin_model

pytestmark = pytest.mark.usefixtures("one_policy")

REVIEW = "Review: The {}.\nSentiment:"
NEGATIVE = [
    Text(REVIEW.format(x), " negative")
    for x in ("soup was cold", "bed was hard", "bill was wrong and high", "rain")
]
POSITIVE = [
    Text(REVIEW.format(x), " positive")
    for x in (
        "tea was warm",
        "view was clear",
        "room had a large window",
        "staff was kind",
        "bread",
    )
]
ADAM = 1e-4
"""Adam divides by the gradient's size: what rounds otherwise ends so far away after some steps;
`adapt` itself does where its texts are padded to another length."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An adapter and experts that nobody trained."""
    library = tmp_path_factory.mktemp("library")
    changes = {"search.generations": 4, "search.experts": str(library)}
    found = adaptation.load_base(get_config(**{"model.source": thin_model(), **changes}))
    card = found.policy.adapter_config(found.config.adapter)
    for seed in range(3):
        expert = random_offsets(found.offsets, seed=seed, scale=0.3)
        checkpoints.save_adapter(library / str(seed), expert, card, "An expert for tests.")
    return found._replace(offsets=random_offsets(found.offsets))


@pytest.fixture(scope="module")
def searches(run):
    return Searches(run, users=4)


def finish(searches):
    while searches.step():
        pass


def adapted(searches, examples, method="gradient", seed=0, generations=None):
    """What `adapt` finds."""
    settings = searches.settings_of(method, generations)
    key = jax.random.key(seed)
    return adaptation.adapt(searches.run, examples, key=key, settings=settings)


def assert_same(found, expected, tolerance=1e-5):
    assert found.note == expected.note
    assert found.returned == expected.returned
    values = [(x.fitness_before, x.fitness_after) for x in (found, expected)]
    np.testing.assert_allclose(*values, rtol=0, atol=1e-5)
    pairs = [(found.offsets, expected.offsets)]
    if expected.search is None:
        assert found.search is None
    else:
        one, other = found.search, expected.search
        pairs += [(one.final, other.final), (one.offsets, other.offsets)]
        for name in ("generations", "candidates", "converged"):
            assert getattr(one, name) == getattr(other, name), name
        np.testing.assert_allclose(one.held_back_gain, other.held_back_gain, rtol=0, atol=1e-4)
        for values in zip(one.history, other.history, strict=True):
            np.testing.assert_allclose(*values, rtol=0, atol=1e-4)
    for one, other in pairs:
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), one, other
        )


# Results


@pytest.mark.parametrize(
    ("method", "examples"),
    [
        ("gradient", NEGATIVE + POSITIVE[:2]),
        ("gradient", [PROMPT]),
        ("cem", POSITIVE),
        ("experts", POSITIVE),
    ],
)
def test_a_job_by_itself_finds_what_adapt_finds(searches, method, examples):
    job = searches.submit(examples, method=method, seed=3)
    assert (job.state, job.generation, job.progress) == ("queued", 0, None)
    finish(searches)
    assert (job.state, job.generation, job.error) == ("done", 4, None)
    assert [x.generation for x in job.curve] == [1, 2, 3, 4]
    assert job.wait(0)
    assert_same(job.result, adapted(searches, examples, method, 3), ADAM)
    history = job.result.search.history
    np.testing.assert_allclose([x.mean for x in job.curve], history.mean, rtol=0, atol=1e-5)
    assert job.progress.best >= job.progress.mean


def test_jobs_come_and_go_and_each_finds_what_it_finds_alone(searches):
    asked = [
        (POSITIVE[:4], "gradient", 0, 6),
        (NEGATIVE, "gradient", 1, 2),
        (POSITIVE[:3], "cem", 2, 4),
        ([PROMPT, OTHER, REVIEW], "gradient", 3, 5),
        (NEGATIVE + POSITIVE, "gradient", 4, 3),
        (POSITIVE[:3], "cem", 2, 2),
    ]
    alone = [adapted(searches, *own) for own in asked]
    jobs = []
    for examples, method, seed, generations in asked:
        jobs.append(searches.submit(examples, method=method, seed=seed, generations=generations))
        searches.step()
    assert len({job.state for job in jobs}) == 2  # some run, some are done
    finish(searches)
    for job, expected in zip(jobs, alone, strict=True):
        assert job.state == "done"
        assert_same(job.result, expected, ADAM)
    assert {x.returned for x in alone} == {"mean", "start"}


def programs():
    names = ("_ask", "_score", "_tell", "_score_points", "_progress")
    return [getattr(lanes, name)._cache_size() for name in names]


def test_another_mix_of_the_same_lengths_compiles_nothing(run):
    searches = Searches(run, users=3)
    for text in NEGATIVE + POSITIVE:
        both = [text._replace(completion=label) for label in (" negative", " positive")]
        searches.submit(both * 2, generations=1)
    finish(searches)
    before = programs()
    jobs = []
    for i in (3, 2, 0, 4, 1, 1):
        jobs.append(searches.submit((NEGATIVE + POSITIVE)[: 4 + i], generations=1 + i))
        searches.step()
    finish(searches)
    assert programs() == before
    assert_same(jobs[-1].result, jobs[-2].result)
    assert_same(jobs[0].result, adapted(searches, (NEGATIVE + POSITIVE)[:7]), ADAM)


def test_a_search_that_converges_leaves_the_others_running(run):
    config = dataclasses.replace(run.config, cem=CEM(population_size=6, threshold=0.2))
    searches = Searches(run._replace(config=config), users=2)
    jobs = [searches.submit(x, method="cem", generations=40) for x in (POSITIVE, NEGATIVE)]
    finish(searches)
    expected = [adapted(searches, x, "cem", 0, 40) for x in (POSITIVE, NEGATIVE)]
    assert all(x.search.converged for x in expected)
    assert len({x.search.generations for x in expected}) == 2
    for job, own in zip(jobs, expected, strict=True):
        assert_same(job.result, own)


@pytest.mark.parametrize("returned", ["mean", "best"])
def test_without_the_gate_all_texts_are_searched_by_at_once(run, returned):
    settings = dataclasses.replace(run.config.search, gate=False, returned=returned)
    searches = Searches(run, users=2, settings=settings)
    job = searches.submit(POSITIVE[:3], method="cem")
    finish(searches)
    assert job.result.returned == returned
    assert_same(job.result, adapted(searches, POSITIVE[:3], "cem"))


@pytest.mark.parametrize(("text", "note"), [("Review: The", "too few"), ("The", "single token")])
def test_what_is_too_short_to_search_by_comes_back_with_a_note(searches, monkeypatch, text, note):
    monkeypatch.setattr(searches._lanes_of("gradient"), "advance", no_search)
    job = searches.submit([text])
    finish(searches)
    assert (job.state, job.generation) == ("done", 0)
    assert note in job.result.note
    assert job.result.offsets is searches.run.offsets
    assert_same(job.result, adapted(searches, [text]))


def test_what_is_compiled_in_the_last_step_is_no_time_of_the_search(run, monkeypatch):
    settings = dataclasses.replace(run.config.search, gate=False)
    searches = Searches(run, users=2, settings=settings)
    job = searches.submit(POSITIVE, generations=1)
    conclude = searches._judge.conclude

    def compiles(*arguments):
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 9e9)
        return conclude(*arguments)

    monkeypatch.setattr(searches._judge, "conclude", compiles)
    finish(searches)
    assert job.result.search.seconds == 0
    assert job.result.search.compile_seconds > 0


# Failure, and leaving


def test_a_likelihood_that_is_not_finite_fails_its_job_and_no_other(run, searches):
    longest = 17
    params = dict(run.policy.params)
    params["wpe"] = params["wpe"].at[longest:].set(jnp.nan)
    policy = dataclasses.replace(run.policy, params=params)
    broken = Searches(run._replace(policy=policy), users=2)
    long = [Text(PROMPT + PROMPT, " negative")] * 4
    jobs = [broken.submit(x) for x in (long, NEGATIVE, long)]
    finish(broken)
    assert [job.state for job in jobs] == ["failed", "done", "failed"]
    with pytest.raises(InputError, match="is nan for the adapter to start from") as error:
        adapted(broken, long)
    assert jobs[0].error == str(error.value)
    assert jobs[0].result is None
    assert_same(jobs[1].result, adapted(searches, NEGATIVE), ADAM)


def test_what_ends_at_an_adapter_without_a_finite_likelihood_fails(run):
    config = dataclasses.replace(run.config, gradient=GradientAscent(learning_rate=3e38))
    settings = dataclasses.replace(config.search, gate=False)
    searches = Searches(run._replace(config=config), users=2, settings=settings)
    job, other = searches.submit(NEGATIVE), searches.submit(NEGATIVE, method="cem")
    finish(searches)
    assert (job.state, other.state) == ("failed", "done")
    with pytest.raises(InputError, match="for the adapter found") as error:
        adapted(searches, NEGATIVE)
    assert job.error == str(error.value)


def test_a_job_that_is_cancelled_frees_its_place(run):
    searches = Searches(run, users=1)
    first, second, third = (searches.submit(NEGATIVE, seed=i) for i in range(3))
    searches.step()
    assert [x.state for x in (first, second, third)] == ["running", "queued", "queued"]
    assert (searches.running, searches.waiting) == (1, 2)
    assert first.cancel()
    assert second.cancel()
    assert (first.state, second.state) == ("cancelled", "cancelled")
    assert (searches.running, searches.waiting) == (0, 1)
    searches.step()
    assert (third.state, third.generation) == ("running", 1)
    finish(searches)
    assert not first.cancel()
    assert (first.state, first.result, first.generation) == ("cancelled", None, 1)
    assert_same(third.result, adapted(searches, NEGATIVE, seed=2), ADAM)
    assert not searches.step()


def test_a_generation_in_pieces_is_that_in_one(run, searches):
    pieces = Searches(run, users=2)
    jobs = [pieces.submit(NEGATIVE + POSITIVE, method=x, seed=1) for x in ("cem", "gradient")]
    late = pieces.submit(POSITIVE, seed=2)
    steps, seen = 0, set()
    while pieces.step(pieces=1):
        steps += 1
        seen.add((jobs[0].generation, late.state))
    assert steps > 4 + 4
    assert {(0, "queued"), (4, "done")} <= seen
    for job, method in zip(jobs, ("cem", "gradient"), strict=True):
        assert_same(job.result, adapted(searches, NEGATIVE + POSITIVE, method, 1), ADAM)
    assert_same(late.result, adapted(searches, POSITIVE, seed=2), ADAM)
    with pytest.raises(InputError, match="pieces=0: must be at least 1"):
        pieces.step(pieces=0)


def test_a_job_that_is_cancelled_amid_a_generation_leaves_nothing_behind(run, searches):
    pieces = Searches(run, users=1)
    first = pieces.submit(NEGATIVE + POSITIVE, method="cem")
    second = pieces.submit(POSITIVE, method="cem", seed=2)
    pieces.step(pieces=1)
    assert (first.state, first.generation) == ("running", 0)
    first.cancel()
    finish(pieces)
    assert_same(second.result, adapted(searches, POSITIVE, "cem", 2))


def test_an_error_in_a_generation_fails_the_jobs_in_it(run, monkeypatch):
    searches = Searches(run, users=2)
    jobs = [searches.submit(NEGATIVE), searches.submit(POSITIVE)]
    searches.step()
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(lanes, "_ask", fail)
        assert searches.step()
    assert [job.state for job in jobs] == ["failed", "failed"]
    assert "out of device memory in the searches of many users: give fewer" in jobs[0].error
    job = searches.submit(NEGATIVE)
    finish(searches)
    assert job.state == "done"


def test_a_bug_as_some_jobs_begin_fails_them_alone_and_is_raised(run, searches, monkeypatch):
    beside = Searches(run, users=2)
    job, other = (beside.submit(POSITIVE, method=x) for x in ("gradient", "cem"))

    def fail(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(beside._lanes_of("gradient"), "scores", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        beside.step()
    assert (job.state, job.error) == ("failed", "a bug")
    for _ in range(20):  # more than it takes
        beside.step()
    assert other.state == "done"
    assert_same(other.result, adapted(searches, POSITIVE, "cem"))


def test_the_queue_has_an_end(run):
    searches = Searches(run, users=1, max_queue=2)
    jobs = [searches.submit(NEGATIVE) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 jobs wait"):
        searches.submit(NEGATIVE)
    jobs[0].cancel()
    assert searches.submit(NEGATIVE).state == "queued"


def test_many_threads_ask_while_one_steps(run, searches):
    jobs, stop = [], threading.Event()

    def ask(seed):
        jobs.append(searches.submit(NEGATIVE, seed=seed, generations=2))
        jobs[-1].wait(60)

    def serve():
        while not stop.is_set():
            searches.step()

    server = threading.Thread(target=serve)
    users = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in (server, *users):
        thread.start()
    for thread in users:
        thread.join(60)
    stop.set()
    server.join(60)
    assert [job.state for job in jobs] == ["done"] * 8
    for job in jobs:  # the gradient's key is never used
        assert_same(job.result, jobs[0].result)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"examples": []}, "nothing to adapt to"),
        ({"examples": 3}, "nothing to adapt to"),
        ({"examples": [" "]}, "the prompt is empty"),
        ({"examples": ["Review: The soup", 7]}, "give"),
        ({"examples": [PROMPT * 20]}, "longer than the limit of"),
        ({"examples": [PROMPT] * 65}, "65 texts are more than the 64"),
        ({"method": "adam"}, "method='adam': must be one of gradient, cem, experts"),
        ({"generations": 0}, "generations=0: must be at least 1 and at most 1000"),
        ({"generations": 1001}, "generations=1001: must be"),
        ({"generations": 2.5}, "generations=2.5: must be an integer"),
        ({"generations": True}, "generations=True: must be an integer"),
        ({"seed": -1}, "seed=-1: must be an integer from 0"),
        ({"seed": "a"}, "seed='a': must be an integer from 0"),
    ],
)
def test_what_cannot_be_used_is_refused_before_it_waits(searches, arguments, fragment):
    with pytest.raises(InputError) as error:
        searches.submit(**{"examples": [PROMPT], **arguments})
    assert fragment in str(error.value)
    assert searches.waiting == 0


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"fitness": "reward"}, "config.search.fitness='reward': many users adapt at once by"),
        ({"budget_s": 1.0}, "config.search.budget_s=1.0: a budget of time is for a search"),
    ],
)
def test_settings_for_a_single_search_are_refused(run, changes, fragment):
    with pytest.raises(InputError) as error:
        Searches(run, settings=dataclasses.replace(run.config.search, **changes))
    assert fragment in str(error.value)
    with pytest.raises(InputError, match="users=0: must be at least 1"):
        Searches(run, users=0)


def test_a_job_for_experts_that_are_not_there_is_refused(run, tmp_path):
    settings = dataclasses.replace(run.config.search, experts=str(tmp_path))
    searches = Searches(run, settings=settings)
    with pytest.raises(InputError, match="no library of experts there"):
        searches.submit(NEGATIVE, method="experts")
    assert searches.waiting == 0


# Rows


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0), (1, 8), (8, 8), (9, 16), (33, 40), (64, 64), (65, 80), (127, 128), (129, 160)],
)
def test_lengths_are_padded_to_eighths(length, expected):
    assert rows.padded(length) == expected
    assert rows.padded(length, parts=1) in (0, 8, 16, 64, 128, 256)


def encoded(count, first, last=None):
    """A text of so many tokens, of which those from ``first`` to ``last`` count."""
    places = np.arange(count)
    return places.astype(np.int32) + 5, (places >= first) & (places < (last or count))


@pytest.mark.parametrize(
    ("text", "tokens", "lengths"),
    [
        (encoded(10, 9), 10, (16, 1)),
        (encoded(10, 1), 10, (16, 16)),
        (encoded(10, 0), 10, (16, 16)),  # the first never counts
        (encoded(20, 10, 13), 13, (16, 4)),
        (encoded(40, 20), 40, (40, 40)),  # no more than there are
        (encoded(97, 80), 97, (96, 64)),
    ],
)
def test_a_text_is_cut_after_the_last_token_that_counts(text, tokens, lengths):
    row = rows.cut(*text)
    np.testing.assert_array_equal(row.tokens, text[0][:tokens])
    np.testing.assert_array_equal(row.scored[1:], text[1][1:tokens])
    assert not row.scored[0]
    assert row.scored.sum() == text[1][1:].sum()
    assert rows.page_lengths(row) == lengths


def test_a_text_without_a_token_that_counts_is_no_row():
    assert rows.cut(*encoded(5, 5)) is None
    assert rows.cut(*encoded(5, 0, 1)) is None  # the first has nothing before it


def test_every_row_is_in_one_page_and_pages_are_filled():
    rng = np.random.default_rng(0)
    drawn = []
    for lane in range(40):
        count = int(rng.integers(4, 60))
        first = int(rng.integers(1, count))
        drawn.append((lane, rows.cut(*encoded(count, first))))
    pages = rows.lay_out(drawn, lanes=40, tokens=200)
    seen = [i for _, held in pages for i in held]
    assert sorted(seen) == list(range(40))
    for page, held in pages:
        assert list(page.lane[: len(held)]) == [drawn[i][0] for i in held]
        assert set(page.lane[len(held) :]) <= {40}
        for place, i in enumerate(held):
            row = drawn[i][1]
            texts = page.texts
            np.testing.assert_array_equal(texts.tokens[place][texts.mask[place]], row.tokens)
            np.testing.assert_array_equal(texts.scored[place][texts.mask[place]], row.scored)
            if texts.places is not None:
                wanted = set(np.flatnonzero(row.scored) - 1)
                assert wanted <= set(texts.places[place])
    assert rows.lay_out([], lanes=3, tokens=10) == []


@pytest.mark.parametrize("text", [PROMPT, NEGATIVE[0], POSITIVE[4]])
def test_the_likelihood_of_a_row_is_that_of_its_text(run, searches, text):
    tokens, counts = adaptation.encode(run.policy, text, run.config.search)
    score = searches._score
    batch = adaptation.batch([(tokens, counts)], run.config.search)
    values, scored = jax.jit(score.scores)(run.offsets, batch, jax.random.key(0))
    mine = searches._lanes_of("gradient")
    (found,) = mine.scores(mine.origins(), [(1, rows.cut(tokens, counts))])
    np.testing.assert_allclose(found, values[scored], rtol=0, atol=1e-5)
