"""Functions of the user's own: named in a config, imported, and refused in one sentence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpocem_jax import adapters, grpo
from grpocem_jax.adaptation import TrainedRun
from grpocem_jax.config import parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.export import model as export
from grpocem_jax.grpo import checks
from grpocem_jax.models import hub
from grpocem_jax.rollouts.policy import attach, load_policy, make_adapter
from grpocem_jax.runs import rundir
from grpocem_jax.training import loop as training
from grpocem_jax.training.algorithm import make_algorithm
from grpocem_jax.utils import user_code
from grpocem_jax.utils.errors import InputError
from tests.runs import OUT_OF_MEMORY, training_config

MODULE = """
class Rewards:
    @staticmethod
    def short(prompts, completions, **columns):
        return [1.0 / (1 + len(c)) for c in completions]

def adapter(**options):
    raise KeyError("rank")

def exits():
    raise SystemExit(0)

def no_adapter():
    return {"rank": 1}

number = 3

def clip(high):
    import grpocem_jax as gj
    return gj.clipped(high=high)

def objective(logps, batch):
    return logps, {}

def means():
    return lambda logps, batch: (logps.mean(-1), {})

def leaks():
    kept = []
    return lambda logps, batch: (kept.append(logps), (logps, {}))[1]

def ungrouped():
    return lambda rewards, step_rewards, tokens, mask: rewards

def later():
    import numpy as np
    calls = []

    def advantages(rewards, step_rewards, tokens, mask):
        calls.append(1)
        return np.zeros(mask.shape, np.float32) / (0 if len(calls) > 3 else 1)

    return advantages

def in_place():
    import numpy as np

    def advantages(rewards, step_rewards, tokens, mask):
        tokens += 1
        mask &= True
        step_rewards[:] = 0
        rewards[np.isnan(rewards)] = 0
        rewards -= rewards.mean(-1, keepdims=True)
        return rewards[..., None] * mask

    return advantages

def everywhere():
    import jax.numpy as jnp
    return lambda key, rollouts: (jnp.ones(rollouts.mask.shape), None)

def ascent(learning_rate):
    import optax
    return optax.scale(1.0)

def no_rate():
    import optax
    return optax.sgd(0.1)

def momenta(learning_rate, betas):
    import optax
    return optax.adam(learning_rate, *betas)

def no_optimizer(learning_rate):
    return learning_rate

def broken(part):
    import jax.numpy as jnp
    import grpocem_jax as gj

    def fail(*_):
        raise ZeroDivisionError("by zero\\nand more")

    def scaled(kernel, offsets, x):
        return (x @ kernel) * (1 + offsets)[None]

    parts = {
        "factor": lambda key, kernel: jnp.asarray(kernel),
        "init": gj.each_site(lambda key, kernel: jnp.zeros(kernel.shape[1:])),
        "apply": scaled,
        "merge": lambda kernel, offsets: kernel * (1 + offsets)[None],
    }
    others = {
        "shape": {"apply": lambda kernel, offsets, x: x},
        "pair": {"apply": lambda *x: (scaled(*x), x)},
        "untraceable": {"apply": lambda *x: scaled(*x) if x[1][0] > 0 else x[2]},
        "none": {"factor": lambda key, kernel: ["kernel"]},
        "whole": {"init": gj.each_site(lambda key, kernel: jnp.zeros(3, int))},
        "good": {},
    }
    return gj.Adapter(**parts | others.get(part, {part: fail}))
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module in the working directory."""
    (tmp_path / "mine_for_tests.py").write_text(MODULE)
    (tmp_path / "broken_for_tests.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "leaves_for_tests.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "stopped_for_tests.py").write_text(
        "from grpocem_jax.runs.rundir import Interrupted\nraise Interrupted(143)\n"
    )
    monkeypatch.chdir(tmp_path)


def test_the_working_directory_is_looked_in_and_dots_reach_into_classes():
    function = user_code.load_function("mine_for_tests:Rewards.short", field="f")
    assert function(["p"], ["abc"]) == [0.25]


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("mine_for_tests", ["not of the form package.module:function"]),
        (":short", ["not of the form package.module:function"]),
        ("mine_for_tests:", ["not of the form package.module:function"]),
        ("mine_for_tests:long", ["has no function long"]),
        ("mine_for_tests:Rewards.long", ["has no function Rewards.long"]),
        ("mine_for_tests:number", ["has no function number"]),
        ("no_such_module:f", ["no_such_module cannot be imported", "start where it lies"]),
        ("broken_for_tests:f", ["ModuleNotFoundError", "nowhere_to_be_found"]),
        ("leaves_for_tests:f", ["cannot be imported (SystemExit: 0)"]),
    ],
)
def test_what_cannot_be_imported_is_named(name, fragments):
    with pytest.raises(InputError) as error:
        user_code.load_function(name, field="config.some.field")
    for fragment in ["config.some.field", repr(name), *fragments]:
        assert fragment in str(error.value)


def test_a_signal_during_an_import_ends_the_run():
    with pytest.raises(rundir.Interrupted):
        user_code.load_function("stopped_for_tests:f", field="f")


def parse(**changes):
    settings = load_config("tiny")
    settings.update_from_flattened_dict(changes)
    return parse_config(settings)


def own_task(section, name="mine"):
    settings = load_config("tiny")
    settings.data.tasks = (name,)
    settings.data[name] = section
    return parse_config(settings).task(name)


GOOD = {"source": "somewhere", "rewards": ("mine_for_tests:Rewards.short",)}


def test_training_imports_rewards_before_it_loads_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load_policy", lambda *args, **kwargs: pytest.fail("loaded"))
    settings = load_config("tiny")
    settings.data.qa = {"source": "builtin", "rewards": ("mine_for_tests:gone",)}
    with pytest.raises(InputError, match="has no function gone"):
        training.train(settings, tmp_path / "run")


def test_a_built_in_task_takes_other_rewards():
    settings = load_config("tiny")
    settings.data.qa = {"source": "builtin", "rewards": GOOD["rewards"], "reward_weights": (2.0,)}
    (reward,) = parse_config(settings).task("qa").rewards
    assert (reward.name, reward.weight) == ("short", 2.0)
    # They stand in place of those of the steps as well.
    settings.data.general = {"source": "builtin", "rewards": GOOD["rewards"]}
    assert parse_config(settings).task("general").process_reward is None


@pytest.mark.parametrize(
    ("section", "name", "fragments"),
    [
        ({"source": "x"}, "mine", ["config.data.mine.rewards is missing", "package.module"]),
        ({"source": "x"}, "sentimnt", ["did you mean 'sentiment'?"]),
        ({"source": "x", "rewards": ()}, "mine", ["config.data.mine.rewards"]),
        ({"rewards": GOOD["rewards"]}, "mine", ["config.data.mine.source"]),
        (GOOD, "over all", ["letters, digits"]),
        (GOOD, "overall", ["'overall'"]),
        ({**GOOD, "reward_weights": (1.0, 2.0)}, "mine", ["reward_weights", "each of the 1"]),
        ({**GOOD, "rewards": ("mine_for_tests:nothing",)}, "mine", ["has no function nothing"]),
        ({**GOOD, "rewards": 2 * GOOD["rewards"]}, "mine", ["two functions have the same name"]),
    ],
)
def test_a_task_of_ones_own_that_lacks_something_is_refused(section, name, fragments):
    with pytest.raises(InputError) as error:
        own_task(section, name)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"adapter.type": "dora"}, ["adapter.type='dora'", "'svf'", "package.module:function"]),
        ({"adapter.type": "mine_for_tests:gone"}, ["config.adapter.type", "no function gone"]),
        ({"search.fitness": "likelyhood"}, ["search.fitness='likelyhood'"]),
        ({"search.fitness": "mine_for_tests:gone"}, ["config.search.fitness", "no function gone"]),
        ({"grpo.objective": "dapo"}, ["config.grpo.objective='dapo'", "package.module:function"]),
        (
            {"grpo.advantages": "mine_for_tests:gone"},
            ["config.grpo.advantages", "no function gone"],
        ),
        ({"grpo.weights": "no_such_module:f"}, ["config.grpo.weights", "cannot be imported"]),
        ({"train.optimizer": "optax:lyon"}, ["config.train.optimizer", "has no function lyon"]),
        ({"logging.report_to": ("mlflow",)}, ["logging.report_to", "'wandb'"]),
        ({"train.target_kl": 0.1, "grpo.beta": 0.0}, ["target_kl=0.1", "grpo.beta"]),
    ],
)
def test_settings_that_name_nothing_are_refused_before_a_model_is_loaded(changes, fragments):
    with pytest.raises(InputError) as error:
        parse(**changes)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("field", "name", "options", "fragments"),
    [
        ("grpo.objective", "exits", {}, ["raised SystemExit (0)", "return a function (logps, ba"]),
        ("grpo.objective", "objective", {}, ["raised TypeError", "missing 2 required", "options"]),
        ("grpo.objective", "no_adapter", {}, ["is dict, not a function", "it must take (logps"]),
        ("grpo.objective", "means", {}, ["returned float32 of shape (1, 8)", "values [P, G, N]"]),
        ("grpo.objective", "leaks", {}, ["a traced leak"]),
        ("grpo.objective", "clip", {"high": -1}, ["high=-1: must be above 0"]),
        ("grpo.objective", "clip", {"hihg": 1}, ["options {'hihg': 1}", "unexpected keyword"]),
        ("grpo.objective", "clipped", {"hihg": 1}, ["options {'hihg': 1}", "unexpected keyword"]),
        ("grpo.objective", "clipped", {"ratio": "group"}, ["ratio='group': must be one of token"]),
        ("grpo.advantages", "ungrouped", {}, ["returned float32 of shape (2, 4)", "[P, G, N]"]),
        ("grpo.advantages", "objective", {}, ["raised TypeError", "return a function (rewards"]),
        ("grpo.advantages", "scaled", {"by": 3}, ["raised TypeError", "unexpected keyword"]),
        ("grpo.advantages", "group", {"scale": 3}, ["raised TypeError", "unexpected keyword"]),
        ("grpo.weights", "everywhere", {}, ["not zero where rollouts.mask is False"]),
        ("grpo.weights", "no_adapter", {}, ["is dict, not a function", "(weights, positions)"]),
        ("grpo.weights", "token", {"x": 1}, ["options {'x': 1}", "raised TypeError"]),
        ("train.optimizer", "ascent", {}, ["goes up the gradient"]),
        ("train.optimizer", "no_rate", {}, ["unexpected keyword", "learning_rate, a schedule"]),
        ("train.optimizer", "no_optimizer", {}, ["must be an optax.GradientTransformation"]),
        ("train.optimizer", "adamw", {"b1": 2}, ["b1=2: must be from 0 to below 1"]),
    ],
)
def test_a_part_of_grpo_that_cannot_be_used_is_named_before_a_model_is_loaded(
    field, name, options, fragments, tmp_path, monkeypatch
):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(training, "load_policy", loaded)
    own = name not in ("clipped", "scaled", "group", "token", "adamw")
    value = f"mine_for_tests:{name}" if own else name
    settings = load_config("tiny")
    settings.update_from_flattened_dict({field: value})
    section, option = field.split(".")
    settings[section][f"{option}_options"] = options
    with pytest.raises(InputError) as error:
        training.train(settings, tmp_path / "run")
    assert str(error.value).startswith(f"config.{field}={value!r}")
    for fragment in fragments:
        assert fragment in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_advantage_function_may_write_to_what_it_is_given(tmp_path):
    settings = training_config(
        **{"grpo.advantages": "mine_for_tests:in_place", "train.max_steps": 1}
    )
    assert training.train(settings, tmp_path / "run")["steps"] == 1


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_part_of_grpo_that_fails_later_is_named_too():
    config = parse(**{"grpo.advantages": "mine_for_tests:later"})
    advantages = make_algorithm(config).advantages
    out = checks.sample_rollouts()
    with pytest.raises(
        InputError, match=r"^config.grpo.advantages='mine_for_tests:later': the adv"
    ):
        advantages(out.logps[..., 0], out.logps, out.tokens, out.mask)


def test_options_of_the_packages_own_parts_reach_them():
    settings = load_config("tiny")
    settings.grpo.objective_options = {"high": 0.28}
    assert make_algorithm(parse_config(settings)).objective == grpo.clipped(0.2, 0.28)
    settings.grpo.advantages = "scaled"
    settings.grpo.advantages_options = {"clip": 0.05}
    found = make_algorithm(parse_config(settings)).advantages(
        jnp.array([[0.0, 2.0]]), None, None, jnp.ones((1, 2, 1), bool)
    )
    # Scores of -1 and 1, times 0.1, bounded by 0.05 where the setting has 3.
    np.testing.assert_allclose(found[0, :, 0], [-0.05, 0.05])


def optimizer(name, **options):
    settings = load_config("tiny")
    settings.train.optimizer, settings.train.optimizer_options = name, options
    return make_algorithm(parse_config(settings)).optimizer


def test_equal_options_make_the_same_optimizer_so_that_no_update_is_compiled_again():
    one = optimizer("extrapolated", every=4, ahead=1)
    assert optimizer("extrapolated", every=4, ahead=1) is one
    assert optimizer("extrapolated", every=4, ahead=2) is not one
    with pytest.raises(InputError, match=r"every=4\.0: must be a whole number"):
        optimizer("extrapolated", every=4.0, ahead=1)
    own = optimizer("mine_for_tests:momenta", betas=(0.5, 0.75))
    assert optimizer("mine_for_tests:momenta", betas=(0.5, 0.75)) is own


def test_options_of_an_optimizer_may_be_lists():
    offsets = {"h.0": jnp.ones(3)}
    found = [
        optimizer("mine_for_tests:momenta", betas=betas).init(offsets)
        for betas in ([0.5, 0.75], (0.5, 0.75))
    ]
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("adapter", ["raised KeyError", "rank"]),
        ("exits", ["raised SystemExit (0)"]),
        ("no_adapter", ["returned dict", "grpocem_jax.Adapter"]),
    ],
)
def test_a_function_that_makes_no_adapter_is_named(name, fragments):
    config = parse(**{"adapter.type": f"mine_for_tests:{name}"})
    with pytest.raises(InputError) as error:
        make_adapter(config.adapter)
    for fragment in [f"mine_for_tests:{name}", *fragments]:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("part", "fragment"),
    [
        ("factor", "the adapter's factor raised ZeroDivisionError (by zero); correct it."),
        ("init", "the adapter's init raised ZeroDivisionError (by zero); correct it."),
        ("apply", "the adapter's apply raised ZeroDivisionError (by zero); correct it."),
        ("shape", "apply returned (2, 128) at h.0.attn.c_attn for x of shape (2, 128); it must"),
        ("pair", "the adapter's apply returned tuple at h.0.attn.c_attn"),
        ("untraceable", "the adapter's apply raised TracerBoolConversionError"),
        ("none", "the adapter's factor returned str at h.0.attn.c_attn"),
        ("whole", "the adapter's init returned int32 at h.0.attn.c_attn"),
    ],
)
def test_an_adapter_that_does_not_keep_to_the_interface_is_named_before_it_is_used(part, fragment):
    with pytest.raises(InputError) as error:
        attach(hub.load_model("builtin"), with_adapter(part))
    assert fragment in str(error.value)
    assert f"config.adapter.type='mine_for_tests:broken' with options {{'part': '{part}'}}: " in (
        str(error.value)
    )


def test_an_adapter_that_keeps_to_the_interface_is_put_on_its_sites():
    attached = attach(hub.load_model("builtin"), with_adapter("good"), dtype="bfloat16")
    assert {x.shape for x in attached.zero.values()} == {(3 * 128,)}


def test_an_adapter_that_cannot_be_merged_is_named():
    config = with_adapter("merge")
    policy = load_policy(config)
    run = TrainedRun(config, policy, policy.zero)
    with pytest.raises(InputError, match=r"the adapter's merge raised ZeroDivisionError \(by zero"):
        export._merge(run, attach(policy.pretrained, config))


def test_memory_that_runs_out_is_not_taken_for_a_mistake_of_an_adapter():
    error = jax.errors.JaxRuntimeError(OUT_OF_MEMORY)
    with pytest.raises(jax.errors.JaxRuntimeError), adapters.calling("factor"):
        raise error


def with_adapter(part):
    changes = {
        "type": "mine_for_tests:broken",
        "sites": ("attn.c_attn",),
        "options": {"part": part},
    }
    config = parse()
    return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **changes))
