"""Device memory that runs out: the sentence, and sizes that are halved where that is asked for."""

import json
import subprocess
import sys

import jax
import pytest

from grpocem_jax.config import commands
from grpocem_jax.utils import memory
from grpocem_jax.utils.errors import InputError
from tests.command_line import COMMANDS
from tests.runs import OUT_OF_MEMORY, ROOT


def fits(limit, tried):
    """Something that needs as much memory as its size, of which there is ``limit``."""

    def function(size):
        tried.append(size)
        if size > limit:
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
        return size

    return function


def test_a_chunk_is_halved_until_it_fits_and_stays_there(capsys):
    chunk, tried = memory.population_chunk(100, lower=True), []
    assert chunk.run(fits(30, tried)) == 25
    assert tried == [100, 50, 25]
    assert chunk.run(fits(30, tried)) == 25
    assert tried == [100, 50, 25, 25]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "out of device memory in the search: population_chunk is lowered from "
        f"{sizes}; the results are the same up to rounding"
        for sizes in ("100 to 50", "50 to 25")
    ]


def test_a_chunk_that_must_not_be_lowered_says_which_setting_and_how_far():
    with pytest.raises(InputError) as error:
        memory.population_chunk(100, lower=False).run(fits(30, []))
    for part in ("out of device memory", "population_chunk=50", "fit_memory=True"):
        assert part in str(error.value)


def test_a_single_candidate_that_does_not_fit_is_an_error_too():
    tried = []
    with pytest.raises(InputError, match="a single candidate does not fit"):
        memory.population_chunk(3, lower=True).run(fits(0, tried))
    assert tried == [3, 1]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (OUT_OF_MEMORY, True),
        ("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes.", True),
        ("YNNPACK operation failed", True),
        ("INTERNAL: something else", False),
    ],
)
def test_memory_that_ran_out_is_known_by_what_jax_says(message, expected):
    assert memory.ran_out(jax.errors.JaxRuntimeError(message)) == expected
    assert not memory.ran_out(ValueError(message))


def test_other_errors_of_the_device_pass_through():
    def fails(size):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        memory.population_chunk(3, lower=True).run(fails)
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        memory.advise("a place", "nothing"),
    ):
        fails(3)


def test_a_command_ends_with_a_sentence_wherever_memory_runs_out(run_command, monkeypatch):
    def main(argv):
        raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)

    monkeypatch.setitem(COMMANDS, "short", lambda: commands.run(main))
    status, _, err = run_command("short")
    assert status == 2
    assert f"error: out of device memory ({OUT_OF_MEMORY}); take a smaller" in err
    assert "Traceback" not in err


def test_advice_names_place_and_remedy():
    with (
        pytest.raises(InputError, match=r"^out of device memory in a place: lower it\.$"),
        memory.advise("a place", "lower it"),
    ):
        raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY)


# Memory that really runs out: the system gives the process no more than it has and a little.

LIMITED = """
import contextlib, dataclasses, json, os, resource, tempfile
from pathlib import Path
# Stacks of threads count too, and there is one for each core.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax
import grpocem_jax as gj
from tests.runs import thin_model

@contextlib.contextmanager
def limited(megabytes):
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + megabytes * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
"""

SEARCH = """
settings = gj.load_config("tiny")
settings.model.source = thin_model()
config = gj.parse_config(settings)
policy = gj.load_policy(config)
run = gj.TrainedRun(config, policy, policy.zero)

def adapt(chunk):
    settings = dataclasses.replace(
        config.search, generations=1, population_chunk=chunk, fit_memory=True, gate=False
    )
    text = "the film was good . " * 12
    method = gj.CEM(population_size=256)
    return gj.adapt(run, text, key=jax.random.key(0), settings=settings, method=method)

expected = adapt(8)
with limited(400):
    found = adapt(256)
print(json.dumps([found.search.population_chunk, found.fitness_after, expected.fitness_after]))
"""

TRAINING = """
from grpocem_jax.training import loop as training
config = gj.load_config("tiny")
config.update_from_flattened_dict({
    "model.source": thin_model(), "data.tasks": ("general",),
    "data.heldout_samples": 2, "train.eval_samples": 1,
    "generation.max_new_tokens": 24, "train.max_steps": 1, "train.fit_memory": True,
    "train.batch_size": 256, "train.accumulation_steps": 1,
})
update = training.stages.update_program

def scarce(*args, **options):
    with limited(150):
        return jax.block_until_ready(update(*args, **options))

training.stages.update_program = scarce
print(json.dumps(training.train(config, tempfile.mkdtemp() + "/run")["micro_batch"]))
"""


def with_little_memory(code):
    result = subprocess.run(
        [sys.executable, "-c", LIMITED + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "out of device memory in " in result.stderr
    return json.loads(result.stdout.splitlines()[-1])


linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or jax.default_backend() != "cpu",
    reason="only Linux bounds the memory of a process, and only that of the CPU",
)


@linux
def test_a_search_goes_on_with_fewer_candidates_at_a_time():
    chunk, found, expected = with_little_memory(SEARCH)
    assert 8 <= chunk < 256
    assert found == pytest.approx(expected, abs=1e-5)


@linux
def test_a_training_step_goes_on_with_a_smaller_micro_batch():
    assert 8 <= with_little_memory(TRAINING) < 256
