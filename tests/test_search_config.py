"""Search methods named in a config: what loads, what is refused, and adapt.py with each."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from grpocem_jax import adaptation
from grpocem_jax.adaptation import screens
from grpocem_jax.config import make_method, parse_config
from grpocem_jax.search import Eggroll, Evosax
from grpocem_jax.utils.errors import InputError
from tests.methods import Climber
from tests.runs import PROMPT, thin_config, write_run

pytestmark = pytest.mark.usefixtures("one_policy")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), settings=thin_config())


def climber(population_size=6):
    return Climber(population_size)


def nan_mean():
    return Spoiled()


class Spoiled(Climber):
    def tell(self, state, candidates, fitness):
        return state._replace(mean={k: x * jnp.nan for k, x in state.mean.items()})


def own(name, **changes):
    return thin_config(**{"search.method": f"tests.test_search_config:{name}", **changes})


def test_a_method_of_the_users_own_adapts_with_its_options(workdir):
    settings = own("climber", **{"search.gate": False})
    settings.search.options.population_size = 9
    run = adaptation.load_run(workdir, settings)
    assert make_method(run.config) is make_method(run.config)
    line = screens.adapting(run, str(workdir)).splitlines()[-1]
    assert "Climber, 2 generations of 9 candidates" in line
    found = adaptation.adapt(run, PROMPT)
    assert found.search.candidates == 18
    assert found.fitness_after >= found.fitness_before


@pytest.mark.evosax
def test_sep_cma_es_of_evosax_adapts_by_config(workdir):
    settings = thin_config(**{"search.method": "evosax:Sep_CMA_ES", "search.gate": False})
    run = adaptation.load_run(workdir, settings)
    assert make_method(run.config) == Evosax(name="Sep_CMA_ES", population_size=4, noise_std=0.1)
    assert "evosax:Sep_CMA_ES, 2 generations of 4" in screens.adapting(run, "runs/x")
    found = adaptation.adapt(run, PROMPT)
    assert found.search.candidates == 8
    assert found.fitness_after != found.fitness_before


def test_eggroll_adapts_by_config_and_refuses_options_of_another(workdir):
    settings = thin_config(**{"search.method": "eggroll", "search.gate": False})
    settings.search.options.learning_rate = 0.05
    run = adaptation.load_run(workdir, settings)
    assert make_method(run.config) == Eggroll(population_size=4, noise_std=0.1, learning_rate=0.05)
    assert "EGGROLL, 2 generations of 4" in screens.adapting(run, "runs/x")
    found = adaptation.adapt(run, PROMPT)
    assert found.fitness_after != found.fitness_before
    for option, reason in (
        ({"momentum": 0.3}, "has no option momentum; it has rank, learning_rate"),
        ({"rank": 0}, "rank=0: must be at least 1"),
    ):
        settings.search.options = option
        with pytest.raises(InputError, match=rf"^config\.search\.method='eggroll' .*{reason}"):
            parse_config(settings)


@pytest.mark.evosax
def test_a_strategy_that_evosax_lacks_is_named_with_the_field():
    with pytest.raises(InputError, match=r"^config\.search\.method='evosax:Sep_CMA': .*Sep_CMA_ES"):
        parse_config(thin_config(**{"search.method": "evosax:Sep_CMA"}))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("no.such:thing", r"^config\.search\.method='no\.such:thing': the module no\.such cannot"),
        ("tests.test_search_config:absent", r"^config\.search\.method=.* has no function absent"),
        ("sep_cma", r"^config\.search\.method='sep_cma': must be one of"),
    ],
)
def test_a_method_that_cannot_be_imported_is_refused_by_field(method, reason):
    with pytest.raises(InputError, match=reason):
        parse_config(thin_config(**{"search.method": method}))


def test_wrong_options_and_wrong_means_are_refused_by_field(workdir):
    settings = own("climber")
    settings.search.options.size = 9
    with pytest.raises(InputError, match=r"^config\.search\.method=.* raised TypeError .*size"):
        parse_config(settings)
    run = adaptation.load_run(workdir, own("nan_mean"))
    with pytest.raises(InputError, match=r"^config\.search\.method=.*: its tell returned .*not"):
        adaptation.adapt(run, PROMPT)
    settings = thin_config()
    settings.search.options.size = 9
    with pytest.raises(InputError, match=r"^config\.search\.options are settings of other methods"):
        parse_config(settings)


def test_a_setting_of_the_method_is_named_with_its_section():
    with pytest.raises(InputError, match=r"^config\.cem\.elite_ratio=0\.1 of config\.cem\.pop"):
        parse_config(thin_config(**{"cem.elite_ratio": 0.1}))


REMOVED = {
    "warm_start": (False, True),
    "mirrored": (False, True),
    "evaluate_mean": (False, True),
    "anchor": (0.0, 0.01),
    "common_random_numbers": (True, False),
    "held_back": (0.3, 0.5),
}


@pytest.mark.parametrize("name", REMOVED)
def test_a_run_with_settings_that_were_removed_still_loads_and_using_one_is_refused(workdir, name):
    _, used = REMOVED[name]
    stored = thin_config().to_dict()
    stored["cem"].update({old: value for old, (value, _) in REMOVED.items()})
    (workdir / "config.json").write_text(json.dumps(stored))
    config = adaptation.load_run(workdir).config
    assert make_method(config) == config.cem
    assert not {field.name for field in dataclasses.fields(config.cem)} & set(REMOVED)
    stored["cem"][name] = used
    (workdir / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=rf"^config\.cem\.{name}={used}: .* was removed"):
        adaptation.load_run(workdir)
