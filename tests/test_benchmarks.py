"""The benchmarks: the real commands on the built-in model, and the arithmetic they report."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    collectives,
    common,
    decode,
    gpu,
    many_searches,
    memory,
    ppo,
    scaling,
    serve,
    serve_engine,
)
from benchmarks import grpo as grpo_benchmark
from grpocem_jax import grpo
from grpocem_jax.config import load_config
from grpocem_jax.grpo import step as grpo_step
from grpocem_jax.utils.errors import InputError
from tests.runs import ROOT, thin_model

SMALL = (
    "--config=configs/tiny.py",
    "--config.cem.population_size=10",
    "--config.train.batch_size=16",
    "--config.train.accumulation_steps=2",
)


def run(name, *flags):
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *SMALL, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def read(out):
    """The object below a table."""
    *table, last = out.splitlines()
    assert len(table) > 5
    return json.loads(last)


def record_of(name, *flags):
    result = run(name, "--json", *flags)
    assert result.returncode == 0, result.stderr
    return read(result.stdout)


@pytest.fixture
def measured(run_command):
    """The object that a benchmark prints in this process, which takes less than one of its own."""

    def measured(name, *flags):
        status, out, err = run_command(name, *SMALL, "--json", *flags)
        assert status == 0, err
        return read(out)

    return measured


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    """The shape of the built-in model with one layer, which compiles faster."""
    folder = tmp_path_factory.mktemp("thin")
    fields = json.loads((ROOT / "grpocem_jax/builtin/model/config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "n_layer": 1}))
    return f"--config.model.source=random:{folder}"


def test_cem_reports_what_it_promises(measured, thin):
    record = measured("cem", thin, "--tokens=8", "--repetitions=2")
    assert record["population"] == 10
    assert record["tokens"] == 8
    assert record["peers"] == {}
    rate = record["population"] / record["seconds_per_generation"]
    assert record["candidates_per_s"] == pytest.approx(rate)
    products, generation = (record["seconds"][x]["median"] for x in ("products", "generation"))
    assert record["gemm_fraction"] == pytest.approx(products / generation)
    assert record["seconds"]["generation"]["repetitions"] == 2
    assert record["compile_seconds"] > 0


def test_many_searches_reports_what_it_promises(measured):
    flags = ("--users=3", "--examples=4", "--repetitions=1", "--config.search.generations=2")
    record = measured("many_searches", f"--config.model.source={thin_model()}", *flags)
    assert (record["users"], record["examples"], record["method"]) == (3, 4, "gradient")
    alone, together = (record["seconds"][x] for x in ("alone", "together"))
    assert record["adapt_speedup"] == pytest.approx(alone["median"] / together["median"])
    assert alone["repetitions"] == together["repetitions"] == 1
    assert record["first_seconds"]["together"] > record["compile_seconds"]["together"] > 0
    assert record["same_verdict"] == 3
    assert record["largest_difference"] < 1e-3


def test_decode_reports_what_it_promises(measured, thin):
    record = measured("decode", thin, "--tokens=4", "--prompt_tokens=5", "--repetitions=1")
    assert record["samples"] == 32  # 16 x 2 completions
    expected = 32 * 4 / record["seconds"]["sample"]["median"]
    assert record["tokens_per_s"] == pytest.approx(expected)
    assert record["peers"] == {}


def test_grpo_reports_what_it_promises(measured, thin):
    record = measured("grpo", thin, "--tokens=4", "--prompt_tokens=5", "--repetitions=1")
    parts = record["rollout_seconds"] + record["update_seconds"]
    assert record["step_seconds"] == pytest.approx(parts)
    assert record["tokens_per_s"] == pytest.approx(32 * 9 / record["step_seconds"])


def test_memory_reports_what_it_promises(measured, thin):
    sizes = ("--tokens=4", "--prompt_tokens=5")
    record = record_of("memory", thin, *sizes)
    # A trained critic brings weights, gradients of a step and of a micro-batch, and two moments.
    weights = record["weight_bytes"]
    assert record["ppo_separate_critic_peak_bytes"] > record["grpo_peak_bytes"] + 3 * weights
    assert record["ppo_value_head_peak_bytes"] >= 0.9 * record["grpo_peak_bytes"]
    assert record["grpo_peak_bytes"] == max(
        record["grpo_rollout_bytes"], record["grpo_update_bytes"]
    )
    assert record["grpo_peak_bytes"] > weights
    for name in ("grpo_peak_bytes", "ppo_separate_critic_peak_bytes", "ppo_value_head_peak_bytes"):
        assert "memory analysis" in record["how"][name]
    # The compiler says the same of shapes alone, and PPO can be left out.
    outline = measured("memory", thin, *sizes, "--norun", "--noppo")
    for name in ("grpo_rollout_bytes", "grpo_update_bytes", "weight_bytes", "cem_generation_bytes"):
        assert outline[name] == record[name]
    for name in ("ppo_separate_critic_peak_bytes", "grpo_over_ppo_value_head"):
        assert outline[name] is None
    assert outline["grpo_measured_bytes"] is None


def test_serve_reports_what_it_promises(thin, monkeypatch):
    monkeypatch.setattr(serve_engine, "RESIDENT", 6)
    settings = load_config("tiny")
    settings.model.source = thin.partition("=")[2]
    text, record = serve.measure(
        settings, slots=4, prompt_length=5, length=8, repetitions=1, parts=("engine", "adapt")
    )
    seconds = {name: x["median"] for name, x in record["seconds"].items()}
    assert list(record)[:7] == [
        *("own_over_shared", "own_over_plain", "resident_2000_over_1"),
        *("concurrent_speedup", "continuous_speedup", "peft_speedup", "adapt_speedup"),
    ]
    assert record["tokens_per_s"]["own"] == pytest.approx(4 * 8 / seconds["own"])
    assert record["seconds"]["own"]["repetitions"] == 4
    # Of one round the ratios are those of the seconds; all four requests are also run alone.
    assert record["seconds"]["static"]["repetitions"] == 1
    for name, fast, slow in (
        ("continuous_speedup", "continuous", "static"),
        ("concurrent_speedup", "at_once", "one_by_one"),
        ("over_one_slot", "at_once", "one_slot"),
    ):
        assert record[name] == pytest.approx(seconds[slow] / seconds[fast])
    assert "4 requests, 4 adapters" in text
    # The shape has no tokenizer, and PEFT was left out.
    assert record["adapt_speedup"] is None
    assert "adapt_speedup is null: a shape has no tokenizer" in text
    assert record["peft_speedup"] is None


def test_serve_takes_what_many_searches_measures_and_asks_over_http(monkeypatch):
    asked = []

    def measure(settings, **options):
        asked.append(options)
        return "the searches", {"adapt_speedup": 2.5}

    monkeypatch.setattr(many_searches, "measure", measure)
    pytest.importorskip("uvicorn", reason="uvicorn is not installed; it is of the extra serve")
    settings = load_config("tiny")
    settings.model.source = thin_model()
    sizes = {"slots": 2, "prompt_length": 5, "length": 4, "repetitions": 4}
    text, record = serve.measure(
        settings, **sizes, parts=("http", "adapt"), users=3, examples=5, seconds=0.5
    )
    assert record["adapt_speedup"] == record["adapt"]["adapt_speedup"] == 2.5
    expected = {"users": 3, "examples": 5, "task": "sentiment", "method": "gradient"}
    assert asked == [{**expected, "repetitions": 2}]
    assert "the searches" in text
    assert list(record["http"]) == ["clients_1", "clients_2", "clients_8", "open"]
    for name, found in record["http"].items():
        assert found["failed"] == {}, name
        assert found["models"] == 3  # the base and an adapter for each slot
        assert found["tokens_per_s"] == pytest.approx(4 * found["requests_per_s"])
        latency = found["latency_s"]
        assert 0 < found["first_token_s"]["p50"] <= latency["p50"] <= latency["p99"]


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="PEFT is installed here")
def test_serve_without_peft_says_how_to_get_it(thin):
    settings = load_config("tiny")
    settings.model.source = thin.partition("=")[2]
    sizes = {"slots": 2, "prompt_length": 5, "length": 4, "repetitions": 1}
    text, record = serve.measure(settings, **sizes, parts=("peft",))
    assert record["peft_speedup"] is None
    assert "run `pip install -e '.[peers]'`" in text
    with pytest.raises(InputError, match="--parts='all': must be among engine"):
        serve.measure(settings, **sizes, parts=("all",))


def test_mixed_lengths_are_exponential_and_cut_off():
    lengths = serve_engine.mixed_lengths(1000, 90)
    assert (min(lengths), max(lengths)) == (1, 90)
    # P(X > 90) = exp(-3) of the lengths are cut off; half of them are up to 30 log 2 = 20.8.
    assert lengths.count(90) == pytest.approx(1000 * math.exp(-3), abs=2)
    assert np.median(lengths) == pytest.approx(21, abs=0.5)


def test_the_gpu_benchmark_runs_on_a_cpu(thin, tmp_path, monkeypatch, capsys):
    shape = thin.partition("=")[2]
    monkeypatch.setattr(gpu, "SMALL", dataclasses.replace(gpu.SMALL, shape=shape))
    stages = ("headline", "own", "step", "memory")
    assert gpu.main(["--small", f"--out={tmp_path}", f"--only={','.join(stages)}"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "gpu.json").read_text())
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert tuple(record["stages"]) == stages
    for precision, found in record["stages"]["headline"]["precisions"].items():
        assert found["candidates_per_s"] == pytest.approx(100 * 2 / found["seconds"]), precision
    scores = [x["fitness"] for x in record["stages"]["headline"]["precisions"].values()]
    assert scores[0] != scores[1]  # the precisions are not the same
    assert scores[0] == pytest.approx(scores[1], abs=0.1)
    shares = record["stages"]["own"]["scoring"]
    assert shares["own_over_shared"] == pytest.approx(
        shares["seconds"]["one"] / shares["seconds"]["own"]
    )
    step = record["stages"]["step"]["precisions"]["bfloat16"]
    assert step["update_bytes"] > step["weights_bytes"]
    assert "does not say" in record["stages"]["memory"]["skipped"]


def test_a_stage_of_the_gpu_benchmark_that_is_none_is_named(tmp_path):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--small", f"--out={tmp_path}", "--only=headlines"])


def test_a_stage_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    def broken(bench, out):
        return {"works": lambda: {"x": 1.0}, "fails": lambda: 1 / 0, "later": lambda: {"y": 2}}

    monkeypatch.setattr(gpu, "stages", broken)
    assert gpu.main(["--small", f"--out={tmp_path}"]) == 1
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["stages"]["works"] == {"x": 1.0}
    assert "ZeroDivisionError" in record["stages"]["fails"]["error"]
    assert record["stages"]["later"] == {"y": 2}


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is not None, reason="the peers are installed here"
)
def test_peers_that_are_not_installed_are_named(refused):
    said = refused("decode", "--config=tiny", "--tokens=2", "--prompt_tokens=2", "--peers")
    assert said.startswith("error: --peers: ")
    assert "is not installed" in said


@pytest.fixture(scope="module")
def subject():
    settings = load_config("tiny")
    settings.model.source = thin_model()
    settings.train.batch_size = 16
    settings.train.accumulation_steps = 2
    return common.load(settings)


def test_a_published_name_stands_for_its_shape(monkeypatch):

    asked = []

    class Stop(Exception):  # noqa: N818
        pass

    def load_model(source, *, seed):
        asked.append(source)
        raise Stop

    monkeypatch.setattr(common.hub, "load_model", load_model)
    with pytest.raises(Stop):
        common.load(load_config("gpt2"))
    assert asked == ["random:gpt2"]


def test_products_are_those_of_the_model(subject):
    products = common.linear_products(subject, 7)
    d, layers = subject.pretrained.config.width, subject.pretrained.config.num_layers
    # c_attn 3, c_proj as two factors 2, c_fc 4 and the MLP's c_proj 4, each times width squared.
    assert common.arithmetic(products) == 2 * 7 * 13 * d * d * layers
    head = common.head_product(subject, 7)
    assert head == common.Product(7, d, subject.pretrained.config.vocab_size, 1)
    # Before the first adapted map, the first layer's c_attn is the same for all candidates.
    shared = common.linear_products(subject, 7, shared_rows=1)
    assert common.arithmetic(products) - common.arithmetic(shared) == 2 * 6 * 3 * d * d


def test_a_step_counts_reference_policy_and_backward_pass(subject, monkeypatch):
    rollout = common.arithmetic(decode.rollout_products(subject, 5, 4))
    step = common.arithmetic(grpo_benchmark.step_products(subject, 5, 4))
    d, layers = subject.pretrained.config.width, subject.pretrained.config.num_layers
    vocabulary = subject.pretrained.config.vocab_size
    prompts, completions = 4, 32
    linear = 2 * 13 * d * d * layers * (prompts * 5 + completions * 3)
    head = 2 * d * vocabulary * completions * 4
    assert step - rollout == 3 * linear + 3 * head
    monkeypatch.setattr(grpo_step, "KEPT_LOGITS_BYTES", 0)
    step = common.arithmetic(grpo_benchmark.step_products(subject, 5, 4))
    assert step - rollout == 3 * linear + 4 * head


def test_functions_run_in_turn_after_one_untimed_round():
    calls = []
    timings = common.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repetitions=2
    )
    assert calls == ["a", "b"] * 3
    assert timings["a"].repetitions == 2
    assert timings["a"].low <= timings["a"].median <= timings["a"].high


def test_a_ratio_is_the_median_of_those_of_the_rounds():
    assert common.times_as_fast([1.0, 2.0, 4.0], [3.0, 2.0, 8.0]) == 2.0


def test_memory_counts_what_a_program_holds():
    program = jax.jit(lambda x: (x @ x) @ x).lower(jnp.ones((512, 512))).compile()
    size = 512 * 512 * 4
    assert 3 * size <= memory.program_bytes(program) <= 4 * size


def test_weights_on_several_devices_report_the_memory_of_each(thin, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    flags = (thin, "--config.model.weight_shards=2", "--programs=generation", "--text_tokens=8")
    record = record_of("sharded", *flags)
    assert record["mesh"] == {"rows": 2, "weights": 2}
    # Matrices in halves, vectors whole.
    assert 0.5 < record["weights_of_a_device_bytes"] / record["weights_bytes"] < 0.55
    assert 0.5 <= record["factors_of_a_device_bytes"] / record["factors_bytes"] < 0.55
    found = record["programs"]["generation"]
    assert found["arguments"] > record["weights_of_a_device_bytes"]
    assert found["arguments"] < 1.1 * record["weights_of_a_device_bytes"]
    assert found["exchanged"] > 0
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    alone = run("sharded", thin)
    assert alone.returncode == 2
    assert "a single device has all weights" in alone.stderr


def test_collectives_are_counted_in_loops_and_branches():
    text = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%region_0.4 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = f32[2,3]{1,0} all-reduce(%x), channel_id=1, to_apply=%region_0.4
}

%other (p: f32[8]) -> f32[8] {
  %ag = (bf16[4]{0}, bf16[8]{0}) all-gather(%x), channel_id=2, dimensions={0}
}

ENTRY %main.9_spmd (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %v = (s32[], f32[8]{0}) while(%t), condition=%region_0.4, body=%body
  %c = f32[8]{0} conditional(%i, %a, %b), branch_computations={%other, %region_0.4}
  ROOT %r = u8[3,2]{1,0} collective-permute(%c), channel_id=3
}
"""

    class Program:
        def as_text(self):
            return text

    expected = {"all-gather": 2 * 12, "all-reduce": 4 * 6 * (5 + 7), "collective-permute": 6}
    assert collectives.received(Program(), trips=7) == expected


def test_a_power_law_has_its_exponent():
    work = [1.0, 10.0, 200.0]
    assert scaling.exponent(work, [3 * x**1.5 for x in work]) == pytest.approx(1.5)


def test_advantages_by_hand():
    values = jnp.array([[0.5, 0.25, -0.5, 9.0]])
    mask = jnp.array([[True, True, True, False]])
    # delta = value of the next - own value, at the last token reward - own value.
    deltas = [0.25 - 0.5, -0.5 - 0.25, 1.0 + 0.5]
    third = deltas[2]
    second = deltas[1] + 0.95 * third
    first = deltas[0] + 0.95 * second
    found = ppo.advantages(jnp.array([[0.0, 0.0, 1.0, 0.0]]), values, mask)
    np.testing.assert_allclose(found, [[first, second, third, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("separate", [True, False])
def test_a_ppo_step_trains_policy_and_critic(subject, separate):
    attached = subject.attached
    optimizer = grpo.adamw(learning_rate=1e-2, warmup_steps=0)
    rng = np.random.default_rng(0)
    tokens = jnp.array(rng.integers(0, attached.model.vocab_size, (2, 4, 5)))
    everywhere = jnp.ones(tokens.shape, bool)
    rewards = jnp.array(rng.random(tokens.shape), jnp.float32)
    batch = grpo.Batch(
        tokens[:, 0, :3],
        everywhere[:, 0, :3],
        tokens,
        everywhere,
        -5.0 * everywhere,
        jnp.where(jnp.arange(5) == 4, rewards, 0.0),
        grpo.token_weights(everywhere),
    )
    critic = jax.tree.map(jnp.array, subject.pretrained.params) if separate else None
    width = subject.pretrained.config.width
    start = ppo.Trainable(jax.tree.map(jnp.array, attached.zero), 0.1 * jnp.ones(width), critic)
    copy = jax.tree.map(np.array, start)
    models = ppo.Models(attached.model, subject.pretrained.build())
    after, metrics = ppo.update(
        grpo.init_state(start, optimizer),
        attached.params,
        batch,
        1.0,
        model=models,
        objective=grpo.clipped(),
        optimizer=optimizer,
        beta=0.01,
        micro_batch=4,
    )
    assert float(metrics["value_loss"]) > 0
    for old, new in zip(jax.tree.leaves(copy), jax.tree.leaves(after.offsets), strict=True):
        assert np.all(np.isfinite(new))
        # AdamW's first step is about the learning rate, wherever there is a gradient.
        assert math.isclose(np.abs(new - old).max(), 1e-2, rel_tol=0.1)
