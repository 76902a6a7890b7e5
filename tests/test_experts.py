"""The expert library: which experts there are, the one that ships, and training a small one."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpocem_jax import tasks
from grpocem_jax.adaptation import LIBRARY
from grpocem_jax.config import parse_config
from grpocem_jax.config.files import load_config
from grpocem_jax.experts import mixtures, train_experts
from grpocem_jax.runs import checkpoints, rundir
from grpocem_jax.search import spaces
from grpocem_jax.training import loop as training
from grpocem_jax.utils.errors import InputError
from tests.runs import ROOT, get_config, one_policy, random_offsets, thin_model, tiny_policy

pytestmark = pytest.mark.usefixtures("one_policy")

TASKS = ("qa", "sentiment", "summarization", "classification", "general")
SMALL = {
    "model.source": thin_model(),
    "data.tasks": ("qa", "sentiment"),
    "data.heldout_samples": 2,
    "data.max_samples": 16,
    "train.max_steps": 2,
    "train.warmup_steps": 1,
    "train.batch_size": 32,
    "train.eval_batch_size": 4,
    "train.eval_samples": 2,
    "generation.max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()[0]


@pytest.fixture(scope="module")
def shipped(policy):
    return checkpoints.load_library(LIBRARY, policy.zero, base_sha256=policy.pretrained.sha256)


def tasks_of(names):
    return [tasks.TASKS[name] for name in names]


def own_task(name):
    """A task of the user's own, which has no labels."""
    columns = {"prompt": "the prompt"}
    return tasks.Task(name, columns, "{prompt}", (), reference="completion", own=True)


def test_five_tasks_make_eight_experts():
    experts = mixtures(tasks_of(TASKS))
    assert experts == {
        **{name: (name,) for name in TASKS},
        "labels": ("sentiment", "classification"),
        "texts": ("qa", "summarization", "general"),
        "all": TASKS,
    }
    assert len(experts) == checkpoints.MAX_EXPERTS


@pytest.mark.parametrize(
    ("tasks", "names"),
    [
        (("qa",), ["qa"]),
        (("qa", "sentiment"), ["qa", "sentiment", "all"]),
        (("qa", "general"), ["qa", "general", "texts"]),
        (("sentiment", "classification"), ["sentiment", "classification", "labels"]),
    ],
)
def test_a_mixture_has_several_tasks_and_occurs_once(tasks, names):
    experts = mixtures(tasks_of(tasks))
    assert list(experts) == names
    assert len(set(experts.values())) == len(experts)


def test_tasks_of_the_users_own_are_mixed_too_and_keep_their_names_apart():
    assert mixtures([*tasks_of(["sentiment"]), own_task("mine"), own_task("yours")]) == {
        **{name: (name,) for name in ("sentiment", "mine", "yours")},
        "texts": ("mine", "yours"),
        "all": ("sentiment", "mine", "yours"),
    }
    assert mixtures([own_task("all")]) == {"all": ("all",)}
    with pytest.raises(InputError, match="names 'all', as one of the experts on several tasks"):
        mixtures([*tasks_of(["sentiment"]), own_task("all")])


# The library that ships


def test_the_shipped_library_holds_the_eight_experts_of_the_builtin_model(policy, shipped):
    experts, vectors = shipped
    assert list(experts) == sorted(mixtures(tasks_of(TASKS)))
    for offsets in experts.values():
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(offsets)) > 0.01
    # The experts come first, then snapshots of their training.
    for row, offsets in enumerate(experts.values()):
        for site, value in offsets.items():
            np.testing.assert_array_equal(vectors[site][row], value)
    counts = {len(x) for x in jax.tree.leaves(vectors)}
    assert len(counts) == 1
    assert counts.pop() > 32
    assert vectors.keys() == policy.zero.keys()


def test_weight_one_of_an_expert_is_that_expert(policy, shipped):
    experts, _ = shipped
    space = spaces.expert_space(policy.zero, list(experts.values()))
    weights = jnp.zeros(8).at[list(experts).index("sentiment")].set(1.0)
    mixed = spaces.decode(space, weights)
    alone = checkpoints.load_adapter(LIBRARY / "sentiment", policy.zero)
    for site, value in alone.items():
        np.testing.assert_allclose(mixed[site], value, atol=1e-7)
    per_site = spaces.expert_space(policy.zero, list(experts.values()), per_site=True)
    mixed = spaces.decode(per_site, dict.fromkeys(policy.zero, weights))
    for site, value in alone.items():
        np.testing.assert_allclose(mixed[site], value, atol=1e-7)


def test_the_shipped_library_has_32_principal_directions(policy, shipped):
    _, vectors = shipped
    space = spaces.principal_space(policy.zero, vectors, 32)
    basis = np.concatenate([np.array(space.basis[site]) for site in policy.zero], axis=1)
    np.testing.assert_allclose(basis @ basis.T, np.eye(32), atol=1e-4)
    rows = np.concatenate([np.array(vectors[site]) for site in policy.zero], axis=1)
    # No other directions hold more of the vectors than the principal ones.
    kept = np.square(rows @ basis.T).sum() / np.square(rows).sum()
    values = np.linalg.svd(rows, compute_uv=False) ** 2
    np.testing.assert_allclose(kept, values[:32].sum() / values.sum(), rtol=1e-4)


# Libraries that cannot be used


def write_expert(folder, policy, seed=1, **changes):
    config = {"base_model": "builtin", "base_sha256": policy.pretrained.sha256, **changes}
    checkpoints.save_adapter(folder, random_offsets(policy.zero, seed), config, "")


def test_a_library_without_snapshots_has_the_experts_as_its_vectors(policy, tmp_path):
    for number, name in enumerate("ab"):
        write_expert(tmp_path / name, policy, number)
    (tmp_path / "notes").mkdir()
    experts, vectors = checkpoints.load_library(
        tmp_path, policy.zero, base_sha256=policy.pretrained.sha256
    )
    assert list(experts) == ["a", "b"]
    assert {len(x) for x in jax.tree.leaves(vectors)} == {2}


def test_an_expert_of_another_model_is_refused(policy, tmp_path):
    write_expert(tmp_path / "a", policy)
    write_expert(tmp_path / "b", policy, base_sha256="0" * 64)
    with pytest.raises(InputError, match=r"b/adapter_config\.json: the adapter was trained on"):
        checkpoints.load_library(tmp_path, policy.zero, base_sha256=policy.pretrained.sha256)


@pytest.mark.parametrize("folder", ["", "nothing"])
def test_a_folder_without_experts_is_no_library(policy, tmp_path, folder):
    with pytest.raises(InputError, match="no library of experts there"):
        checkpoints.load_library(tmp_path / folder, policy.zero)


def test_more_experts_than_the_report_mixes_are_refused(policy, tmp_path):
    for number in range(9):
        shutil.copytree(LIBRARY / "qa", tmp_path / f"expert{number}")
    with pytest.raises(InputError, match="holds 9 experts; at most 8"):
        checkpoints.load_library(tmp_path, policy.zero)


def test_snapshots_of_another_shape_are_refused(policy, tmp_path):
    write_expert(tmp_path / "a", policy)
    wrong = {name: np.zeros((5, 3), np.float32) for name in policy.zero}
    save_file(wrong, tmp_path / checkpoints.TRAJECTORY)
    with pytest.raises(InputError, match=r"trajectory\.safetensors: does not fit this model"):
        checkpoints.load_library(tmp_path, policy.zero)


@pytest.mark.parametrize("kind", ["damaged", "empty"])
def test_snapshots_that_cannot_be_read_are_named(policy, tmp_path, kind):
    write_expert(tmp_path / "a", policy)
    save_file({}, tmp_path / checkpoints.TRAJECTORY)
    if kind == "damaged":
        (tmp_path / checkpoints.TRAJECTORY).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"trajectory\.safetensors"):
        checkpoints.load_library(tmp_path, policy.zero)


# Training one


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("experts")
    return workdir, train_experts(get_config(**SMALL), workdir)


def test_training_writes_a_library_and_ordinary_runs(trained):
    workdir, library = trained
    assert library == workdir / "library"
    names = {"qa", "sentiment", "all"}
    assert {path.name for path in library.iterdir()} == names | {checkpoints.TRAJECTORY}
    assert {path.name for path in (workdir / "runs").iterdir()} == names
    for name in names:
        files = {path.name: path.read_bytes() for path in (library / name).iterdir()}
        assert files.keys() == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
        run = workdir / "runs" / name
        assert files == {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
        config = json.loads((run / "config.json").read_text())
        assert tuple(config["data"]["tasks"]) == mixtures(tasks_of(("qa", "sentiment")))[name]


def test_a_trained_library_can_be_read_and_ends_where_its_trainings_ended(trained):
    _, library = trained
    policy = one_policy(parse_config(get_config(**SMALL)))
    experts, vectors = checkpoints.load_library(
        library, policy.zero, base_sha256=policy.pretrained.sha256
    )
    assert list(experts) == ["all", "qa", "sentiment"]
    snapshots = load_file(library / checkpoints.TRAJECTORY)
    for site in policy.zero:
        # Two steps of three trainings.
        assert snapshots[site].shape == (6, *policy.zero[site].shape)
        assert len(vectors[site]) == 9
        for last, name in ((1, "qa"), (3, "sentiment"), (5, "all")):
            np.testing.assert_array_equal(snapshots[site][last], experts[name][site])
        assert np.abs(snapshots[site][0] - snapshots[site][1]).max() > 0


def interrupt(patch, task, at):
    """A signal in step ``at`` of the training on one task."""
    step = training.Run.step

    def interrupted(self, state, done):
        if self.config.data.tasks == (task,) and done == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, state, done)

    patch.setattr(training.Run, "step", interrupted)


def test_an_interrupted_command_leaves_no_library_and_is_continued_by_the_same(
    trained, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    def call(error):
        with pytest.raises(error):
            train_experts(get_config(**SMALL), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["runs"]

    with monkeypatch.context() as patch:
        interrupt(patch, "sentiment", 0)
        call(rundir.Interrupted)
    assert not (tmp_path / "runs" / "all").exists()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_trajectory", full)
        call(InputError)
    assert "resumed   after step 1" in capsys.readouterr().out
    library = train_experts(get_config(**SMALL), tmp_path)
    assert library == tmp_path / "library"
    for path in trained[1].rglob("*.safetensors"):
        assert (library / path.relative_to(trained[1])).read_bytes() == path.read_bytes()


def test_the_checkpoint_of_an_interruption_is_no_snapshot(tmp_path, monkeypatch):
    settings = get_config(
        **{**SMALL, "data.tasks": ("qa",), "data.max_samples": 24, "train.max_steps": 0}
    )
    with monkeypatch.context() as patch:
        interrupt(patch, "qa", 2)
        with pytest.raises(rundir.Interrupted):
            train_experts(settings, tmp_path)
    library = train_experts(settings, tmp_path)
    # Of six steps every second; the interruption has left a checkpoint of the third.
    assert (tmp_path / "runs" / "qa" / "checkpoints" / "3").is_dir()
    assert {len(x) for x in load_file(library / checkpoints.TRAJECTORY).values()} == {3}


def test_a_task_of_the_users_own_has_an_expert(tmp_path):
    settings = load_config(str(ROOT / "examples" / "own_task" / "config.py"))
    small = {**SMALL, "data.tasks": ("reviews",), "train.max_steps": 1}
    settings.update_from_flattened_dict(small)
    library = train_experts(settings, tmp_path)
    assert {path.name for path in library.iterdir()} == {"reviews", checkpoints.TRAJECTORY}


def test_a_library_is_not_overwritten(trained):
    workdir, library = trained
    before = {path: path.read_bytes() for path in library.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds a library already"):
        train_experts(get_config(**SMALL), workdir)
    assert {path: path.read_bytes() for path in library.rglob("*") if path.is_file()} == before
