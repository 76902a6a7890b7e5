"""The fuzzer: a few inputs for each reader, and what a crash looks like."""

import gc
import random

import pytest

from studies import fuzz

# Orbax leaves coroutines behind that failed on a damaged checkpoint.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)
INPUTS = {
    "overrides": 60,
    "config": 60,
    "data": 60,
    "run_directory": 15,
    "checkpoint": 8,
    "library": 12,
    "model": 6,
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return fuzz.Readers(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_input_is_read_or_refused(name, readers, capfd):
    for number in range(INPUTS[name]):
        assert fuzz.read_one(readers, name, 1, number) == ""
    gc.collect()  # what is left behind is reported here, not in a test of another module


def test_an_input_is_a_function_of_target_seed_and_number(readers):
    first, again, other = (
        readers.config(random.Random(f"{seed} config 7"))[0] for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("error", "fragment"),
    [
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
        (fuzz.TooSlow(), "TooSlow"),
        (fuzz.InputError(""), "InputError without a sentence"),
    ],
)
def test_a_crash_is_reported_with_its_input_and_the_command_to_see_it_again(
    error, fragment, monkeypatch
):
    def target(self, rng):
        def read():
            raise error

        return "the input", read

    monkeypatch.setattr(fuzz.Readers, "config", target)
    monkeypatch.setattr(fuzz.Readers, "__init__", lambda self, folder: None)
    counts, crash = fuzz.fuzz(60, seed=3, only="config", start=5)
    assert counts == {"config": 0}
    assert fragment in crash
    assert crash.endswith("crash     --only config --seed 3 --start 5\ninput     the input")
