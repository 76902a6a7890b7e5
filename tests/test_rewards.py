"""Rewards: values worked out by hand, and properties that hold for any text."""

import random
from typing import Any

import numpy as np
import pytest

from grpocem_jax.tasks import rewards


def answer(completion: str, *answers: str) -> float | None:
    return rewards.answer_reward(["?"], [completion], answers=[list(answers)])[0]


def label(completion: str, right: str, *names: str) -> float | None:
    return rewards.label_reward(["?"], [completion], label=[right], labels=[names])[0]


def summary(completion: str, *references: str) -> float | None:
    return rewards.summary_reward(["?"], [completion], summary=[list(references)])[0]


FLUENT = np.log([1 / 8, 1 / 16, 1 / 32])
"""Log-probabilities of tokens of which the perplexity is 16."""


def text(completion: str, prompt: str = "", base_logps: np.ndarray = FLUENT) -> float | None:
    return rewards.text_reward([prompt], [completion], base_logps=[base_logps])[0]


def steps(
    completion: str, prompt: str = "", base_logps: np.ndarray = FLUENT
) -> list[rewards.StepReward]:
    return rewards.text_process_reward([prompt], [completion], base_logps=[base_logps])[0]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        # Normalised, both are "black cat": exact match 1, F1 1, and 1 + 1 - 1 = 1.
        (" The black cat.", 1.0),
        # {black} of 1 and of 2 tokens: P 1, R 1/2, F1 = 2/3.  Raw tokens would keep "a": F1 1/2.
        ("a black", 2 / 3 - 1),
        # The same tokens in another order are no exact match: 0 + 1 - 1.
        ("cat, black!", 0.0),
        # {black, cat} of 4 and of 2: P 1/2, R 1, F1 = 2/3.
        ("black cat sat down", 2 / 3 - 1),
        # "black" twice is matched once: P 1/2, R 1/2.  Sets instead of counts would give 2/3.
        ("black black", 0.5 - 1),
        ("dog", -1.0),
        ("", -1.0),
        (" \n", -1.0),
    ],
)
def test_answer_reward_is_exact_match_plus_f1_minus_1(completion, expected):
    assert answer(completion, "black cat") == pytest.approx(expected, abs=1e-12)


def test_answer_reward_takes_the_best_answer_and_abstains_without_one():
    assert answer("two", "dog", "two", "two dogs") == 1.0
    assert answer("two", "dog", "two dogs") == pytest.approx(2 / 3 - 1)
    assert answer("two") is None
    assert rewards.answer_reward(["?"], ["two"], answers=["two"]) == [1.0]  # a bare string


def test_an_answer_that_is_only_an_article_can_be_matched_but_not_by_silence():
    # SQuAD's normalisation leaves nothing of "A", so tokens alone could never reach exact match.
    assert answer("A", "A") == 1.0
    assert answer("", "A") == -1.0


def test_punctuation_inside_a_word_goes_without_splitting_it():
    assert answer("U.S.", "US") == 1.0
    assert rewards.normalise_answer("  The U.S.'s  an-apple, a day ") == "uss anapple day"


NEWS = ("World", "Sports", "Business", "Sci/Tech", "Sci")


@pytest.mark.parametrize(
    ("completion", "right", "expected"),
    [
        (" sports.", "Sports", 1.0),
        ("It is BUSINESS, not sports", "Business", 1.0),  # the first label counts
        ("It is BUSINESS, not sports", "Sports", -1.0),
        ("sci/tech news", "Sci/Tech", 1.0),  # the longer of two labels that begin here
        ("sci/tech news", "Sci", -1.0),
        ("sci: fi", "Sci", 1.0),
        ("worldwide sports", "Sports", 1.0),  # "worldwide" does not name World
        ("underworld", "World", -1.0),
        ("none of them", "World", -1.0),
        ("", "World", -1.0),
    ],
)
def test_label_reward_judges_the_first_label_named(completion, right, expected):
    assert label(completion, right, *NEWS) == expected


def test_labels_may_hold_characters_that_regular_expressions_use():
    assert label("it is C++ (old)", "C++", "C", "C++", "(old)") == 1.0
    assert label("(old) one", "(old)", "C", "C++", "(old)") == 1.0


def test_summary_reward_is_the_mean_of_rouge_1_and_rouge_l():
    # Unigrams: 3 of 4 and of 3, P 3/4, R 1, F 6/7.  Longest common subsequence "dogs chase": 2,
    # P 2/4, R 2/3, F 4/7.  2 (6/7 + 4/7) / 2 - 1 = 3/7; ROUGE-1 alone would give 5/7.
    assert summary("cats dogs chase now", "dogs chase cats") == pytest.approx(3 / 7)


def test_summary_reward_takes_the_best_reference_as_a_whole():
    # Reversed words: ROUGE-1 F 1, ROUGE-L F 1/2, so 1/2.  Other reference: P 1, R 2/3, F 4/5 for
    # both, so 3/5.  The best of each metric separately would give 1 + 4/5 - 1 = 4/5.
    assert summary("red fox", "fox red") == pytest.approx(0.5)
    assert summary("red fox", "red fox runs") == pytest.approx(0.6)
    assert summary("red fox", "fox red", "red fox runs") == pytest.approx(0.6)
    assert rewards.summary_reward(["?"], ["a fox"], summary=["a fox"]) == [pytest.approx(1.0)]


def test_summary_reward_of_nothing_in_common_is_minus_1_and_abstains_without_reference():
    assert summary("red fox", "blue whale") == -1.0
    assert summary("", "blue whale") == -1.0
    assert summary("red fox") is None


TWELVE = "one two three four five six seven eight nine ten eleven twelve"


@pytest.mark.parametrize(
    ("completion", "prompt", "expected"),
    [
        (TWELVE + ".", "", 1.0),  # 11 of 11 bigrams new, complete, 12 of 12 words
        (TWELVE + '!" ', "", 1.0),  # closing quotes and white space after the end
        (TWELVE + " . ''", "", 1.0),  # as WikiText writes it
        (TWELVE, "", 0.0),  # broken off: 2 x 1/2 - 1
        (TWELVE + ",", "", 0.0),
        ("one two three.", "", 2 * 3 / 12 - 1),
        # 4 of 11 bigrams stand in the prompt: 2 x 7/11 - 1.
        (TWELVE + ".", "zero one two three four five", 2 * 7 / 11 - 1),
        # Bigrams ab, bc, ca, ab, bc: 3 of 5 new; 6 of 12 words: 2 x 3/5 x 1/2 - 1.
        ("A b c. A B, c.", "", 2 * 3 / 5 / 2 - 1),
        ("Yes.", "", 2 / 12 - 1),  # a lone word counts as a bigram
        ("Yes. Yes. Yes.", "", 2 * (1 / 2) * (3 / 12) - 1),  # yes yes, twice
        ("", "once", -1.0),
        (" \n ", "once", -1.0),
        ('..."', "once", -1.0),
    ],
)
def test_text_reward_is_novelty_times_completeness_times_length(completion, prompt, expected):
    assert text(completion, prompt) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("probabilities", "fluency"),
    [
        ([1.0, 1.0], 1.0),
        ([1 / 16, 1 / 64], 1.0),  # a perplexity of sqrt(16 x 64) = 32
        ([1 / 64], 1 / 2),
        ([1 / 64, 1 / 256], 1 / 4),  # 128
        ([0.0], 0.0),
        ([], 1.0),
    ],
)
def test_a_text_above_a_perplexity_of_32_is_marked_down_as_not_fluent(probabilities, fluency):
    with np.errstate(divide="ignore"):
        logps = np.log(np.asarray(probabilities, float))
    assert text(TWELVE + ".", "", logps) == pytest.approx(2 * fluency - 1)
    found = [step.reward for step in steps("Go now. Come back soon", "", logps)]
    assert found == pytest.approx([2 * fluency - 1, fluency - 1])


def test_a_step_per_sentence_is_rewarded_for_novelty():
    completion = "We saw a dog. A dog ran off! We saw it"
    # 1: we-saw, saw-a, a-dog; "a dog" is the prompt's: 2 x 2/3 - 1.
    # 2: a-dog, dog-ran, ran-off; the first is old: 2 x 2/3 - 1.
    # 3: we-saw, saw-it; the first is old, and the text breaks off: 2 x 1/2 x 1/2 - 1.
    expected = [(13, 1 / 3), (28, 1 / 3), (38, -1 / 2)]
    assert len(completion) == 38
    assert completion[:13].endswith("dog.")
    assert completion[:28].endswith("off!")
    for step, (end, reward) in zip(steps(completion, "A dog."), expected, strict=True):
        assert step.end == end
        assert step.reward == pytest.approx(reward)


def test_completeness_weighs_on_the_last_sentence_only():
    assert [step.reward for step in steps("Go now. Come back soon")] == [1.0, 0.0]
    assert [step.reward for step in steps("Go now. Come back soon.")] == [1.0, 1.0]


def test_a_repeated_one_word_sentence_is_not_novel():
    assert [step.reward for step in steps("Yes. Yes. Yes.")] == [1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("completion", "ends"),
    [
        ("", []),
        ("  ", [2]),  # no word: one step, reward -1
        ("...", [3]),
        ("It cost 3.50 in all. ok", [20, 23]),  # a point inside a number ends nothing
        ('"Stop!" he said. ', [7, 17]),  # the closing quote and the last space belong to a step
        ("Well ... yes . ''", [8, 17]),  # a detached quote joins the sentence before
    ],
)
def test_steps_end_where_sentences_do(completion, ends):
    found = steps(completion)
    assert [step.end for step in found] == ends
    if not completion.strip(" ."):
        assert all(step.reward == -1.0 for step in found)


WORDS = ["a", "the", "cat", "World", "Sci/Tech", "sat", ".", "!", '"', "3.5", "cat's", "\n", "é"]


def random_texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(20))) for _ in range(count)]


def every_reward(prompts: list[str], completions: list[str], references: list[str]):
    columns: dict[str, Any] = {
        "answers": [[reference] for reference in references],
        "summary": references,
        "label": ["World"] * len(prompts),
        "labels": [NEWS] * len(prompts),
        "base_logps": [FLUENT] * len(prompts),
        "unread": [0] * len(prompts),
    }
    functions = (
        rewards.answer_reward,
        rewards.label_reward,
        rewards.summary_reward,
        rewards.text_reward,
    )
    return [function(prompts, completions, **columns) for function in functions]


def test_every_reward_lies_in_range_and_ignores_white_space_around():
    prompts, completions, references = (random_texts(300, seed) for seed in range(3))
    values = every_reward(prompts, completions, references)
    padded = every_reward(prompts, [f" \n{text}\t " for text in completions], references)
    assert values == padded
    for per_sample in values:
        assert all(isinstance(value, float) and -1.0 <= value <= 1.0 for value in per_sample)
        assert len(set(per_sample)) > 1


def test_samples_do_not_influence_each_other():
    prompts, completions, references = (random_texts(50, seed) for seed in range(3, 6))
    values = every_reward(prompts, completions, references)
    order = random.Random(6).sample(range(50), 50)
    permuted = every_reward(
        *([texts[i] for i in order] for texts in (prompts, completions, references))
    )
    assert permuted == [[per_sample[i] for i in order] for per_sample in values]


def test_steps_rise_to_the_end_and_lie_in_range():
    prompts, completions = random_texts(300, 7), random_texts(300, 8)
    for completion, found in zip(
        completions,
        rewards.text_process_reward(prompts, completions, base_logps=[FLUENT] * 300, unread=[]),
        strict=True,
    ):
        ends = [step.end for step in found]
        assert ends == sorted(set(ends))
        assert ends[-1:] == [len(completion)] * bool(completion)
        assert all(end > 0 and -1.0 <= reward <= 1.0 for end, reward in found)


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        rewards.answer_reward(["?", "?"], ["one", "two"], answers=[["one"]])
