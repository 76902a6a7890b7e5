"""Live comparison with PyTorch and transformers; ``make parity`` has an environment with both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from grpocem_jax import adaptation
from grpocem_jax.export import model as export
from grpocem_jax.models import base, hub, rope, sampling
from tests.parity import stories, weights
from tests.parity.layers import REFERENCE, TOLERANCE, run, story_losses
from tests.runs import PROMPT, write_trained

torch = pytest.importorskip("torch", reason="PyTorch is not installed; use make parity")

from transformers import (  # noqa: E402 (after the skip)
    AutoModelForCausalLM,
    AutoTokenizer,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from tests.parity import record  # noqa: E402

pytestmark = pytest.mark.parity

RECORDED = {**weights.SHAPES, **weights.LLAMAS}
SHAPES = {
    **RECORDED,
    "wide heads": weights.SHAPES["small"] | {"n_embd": 64, "n_head": 1, "n_layer": 4},
    "narrow heads": weights.SHAPES["small"] | {"n_embd": 48, "n_head": 24, "n_layer": 1},
}
SMALL, QWEN2 = weights.SHAPES["small"], weights.LLAMAS["qwen2-untied"]
SAVED = [*weights.LLAMAS, "small"]


def ours(fields, state=None):
    """Config, parameters and model functions of the same weights on our side."""
    module = hub.ARCHITECTURES[fields["model_type"]]
    config = module.config_from_hf(fields, "live")
    params = module.params_from_state(state or weights.state(fields), config, "live")
    return config, base.cast_params(params, jnp.float32), module.build(config)


def compare(name, found, expected, capsys):
    """Asserts the tolerance and prints what was measured."""
    error = {key: float(np.abs(found[key] - expected[key]).max()) for key in expected}
    size = {key: float(np.abs(expected[key]).max()) for key in expected}
    with capsys.disabled():
        parts = (f"{key} {error[key]:.1e} of {size[key]:.1f}" for key in expected)
        print(f"\n{name}: largest difference {', '.join(parts)}")
    assert max(error.values()) <= TOLERANCE


@pytest.mark.parametrize("case", SHAPES)
def test_layers_and_logits_equal_transformers(case, capsys):
    fields = SHAPES[case]
    state = weights.state(fields)
    tokens = weights.tokens(fields, 12)
    expected = record.outputs(record.build(fields, state), tokens)
    config, params, _ = ours(fields, state)
    compare(case, run(config, params, tokens), expected, capsys)
    if case in RECORDED:
        stored = np.load(REFERENCE / f"{case}.npz")
        for key, at in (("blocks", "at_hidden"), ("hidden", "at_hidden"), ("logits", "at_logits")):
            np.testing.assert_allclose(
                stored[key], expected[key][..., stored[at]], rtol=0, atol=TOLERANCE
            )


def test_llama3_frequencies_equal_transformers():
    for name, expected in record.frequencies().items():
        head_dim, theta, *scaling = weights.LLAMA3[name]
        found = rope.Llama3Scaling(*scaling)(theta ** (-np.arange(0, head_dim, 2) / head_dim))
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)


def test_the_builtin_model_equals_transformers(capsys):
    model = record.load(hub.BUILTIN)
    pretrained = hub.load_model("builtin")
    tokens = np.array(pretrained.tokenizer.encode(record.TEXT), np.int32)
    found = run(pretrained.config, pretrained.params, tokens)
    compare("builtin", found, record.outputs(model, tokens), capsys)


def test_a_real_model_costs_its_stories_what_it_does_in_transformers(shared, capsys):
    """The mean of the cross-entropy over the first 200 tokens of 100 stories."""
    texts = stories.tokens(shared)
    count = sum(len(text) - 1 for text in texts)
    expected = record.losses(record.load(shared / stories.MODEL), texts).sum() / count
    found = story_losses(hub.load_model(str(shared / stories.MODEL)), texts).sum() / count
    with capsys.disabled():
        print(f"\nstories: {found:.6f} nats a token, {found - expected:+.1e} from transformers")
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("fields", [SMALL, QWEN2], ids=["gpt2", "qwen2"])
def test_every_position_of_the_context_and_left_padding_equal_transformers(fields):
    model = record.build(fields, weights.state(fields))
    _, params, functions = ours(fields)
    tokens = np.stack([weights.tokens(fields, 24, seed=seed) for seed in range(3)])
    mask = np.arange(24) >= np.array([[0], [5], [20]])
    with torch.no_grad():
        expected = model(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            position_ids=torch.from_numpy(np.maximum(mask.cumsum(-1) - 1, 0)),
        ).logits.numpy()
    hidden = jax.vmap(functions.forward, (None, None, 0, 0))(params, {}, tokens, mask)
    found = np.asarray(functions.logits(params, hidden))
    np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=TOLERANCE)


@pytest.fixture
def tokenizer():
    vocabulary = {f"w{i}": i for i in range(61)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w3", unk_token="w0")


@pytest.mark.parametrize("case", SAVED)
def test_transformers_loads_what_we_save(case, tmp_path, tokenizer, capsys):
    fields = RECORDED[case]
    config, params, _ = ours(fields)
    hub.save_model(tmp_path, config, params, tokenizer)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert model.config.model_type == fields["model_type"]
    assert model.config.eos_token_id == model.config.bos_token_id == 3
    for name, x in weights.state(fields).items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), x, err_msg=name)
    tokens = weights.tokens(fields, 12)
    compare("saved", run(config, params, tokens), record.outputs(model.eval(), tokens), capsys)


def test_transformers_computes_and_writes_what_we_do_from_an_export(tmp_path, capsys):
    """Logits of base model and adapter, and greedy completions that end at the run's stop token."""
    changes = {"generation.stop": (",",), "generation.max_new_tokens": 24}
    run = adaptation.load_run(write_trained(tmp_path / "run", changes=changes))
    exported = export.export_model(tmp_path / "run", tmp_path / "model")
    model, report = AutoModelForCausalLM.from_pretrained(exported.folder, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight
    tokens = np.random.default_rng(2).integers(0, model.config.vocab_size, 128)
    hidden = run.policy.model.forward(run.policy.params, run.offsets, tokens, np.ones(128, bool))
    expected = np.asarray(run.policy.model.logits(run.policy.params, hidden))
    with torch.no_grad():
        found = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert exported.transformers_difference < TOLERANCE
    compare("exported", {"logits": found}, {"logits": expected}, capsys)
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    for prompt in (PROMPT, "On Monday, as usual,"):
        given = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**given, do_sample=False, max_new_tokens=24)[0]
        text = tokenizer.decode(out[given["input_ids"].shape[1] :])
        (ours,) = adaptation.complete(run, run.offsets, [prompt])
        assert len(ours) > 10
        assert text == f"{ours},"


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("shard_size", ["1GB", "30KB"])
def test_we_load_what_transformers_saves(case, tmp_path, tokenizer, shard_size, capsys):
    fields = RECORDED[case]
    model = record.build(fields, weights.state(fields))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file() == (shard_size == "1GB")
    pretrained = hub.load_model(str(tmp_path))
    state = pretrained.architecture.params_to_state(pretrained.params, pretrained.config)
    for name, x in state.items():
        np.testing.assert_array_equal(x, weights.state(fields)[name], err_msg=name)
    tokens = weights.tokens(fields, 12)
    found = run(pretrained.config, pretrained.params, tokens)
    compare(f"loaded, {shard_size}", found, record.outputs(model, tokens), capsys)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 5.0])
def test_the_repetition_penalty_equals_transformers(penalty):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (8, 1000)).astype(np.float32)
    tokens = rng.integers(0, 1000, (8, 40))
    process = RepetitionPenaltyLogitsProcessor(penalty)
    expected = process(torch.from_numpy(tokens), torch.from_numpy(logits)).numpy()
    for row in range(8):
        seen = np.isin(np.arange(1000), tokens[row])
        found = sampling.penalize_repetition(logits[row], seen, penalty)
        np.testing.assert_allclose(found, expected[row], rtol=1e-6)


@pytest.mark.parametrize("top_p", [1e-4, 0.1, 0.5, 0.85, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_the_nucleus_equals_transformers(top_p, spread):
    logits = np.random.default_rng(0).normal(0, spread, (8, 1000)).astype(np.float32)
    kept = torch.isfinite(TopPLogitsWarper(top_p)(None, torch.from_numpy(logits))).numpy()
    in_nucleus = jax.vmap(functools.partial(sampling.in_nucleus, top_p=top_p), in_axes=(None, 0))
    found = jax.vmap(lambda x: in_nucleus(jax.nn.softmax(x), jnp.arange(1000)))(logits)
    np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize(("fields", "penalty"), [(SMALL, 1.0), (SMALL, 1.3), (QWEN2, 1.3)])
def test_greedy_completions_equal_transformers_token_by_token(fields, penalty):
    """Prompts of several lengths padded together here, one at a time there."""
    model = record.build(fields, weights.state(fields))
    _, params, functions = ours(fields)
    prompts = [weights.tokens(fields, length, seed=length) for length in (1, 5, 9, 12)]
    padded, mask = np.zeros((4, 12), np.int32), np.zeros((4, 12), bool)
    for row, prompt in enumerate(prompts):
        padded[row, 12 - len(prompt) :] = prompt
        mask[row, 12 - len(prompt) :] = True

    def generate(end):
        out = sampling.sample(
            params,
            {},
            padded,
            mask,
            jax.random.split(jax.random.key(0), 4),
            jnp.array([end]),
            1.0,
            model=functions,
            num_samples=1,
            max_new_tokens=12,
            repetition_penalty=penalty,
            greedy=True,
        )
        rows = zip(np.asarray(out.tokens[:, 0]), np.asarray(out.mask[:, 0]), strict=True)
        return [tokens[kept].tolist() for tokens, kept in rows]

    def expected(end):
        return [
            model.generate(
                torch.from_numpy(prompt)[None].long(),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                repetition_penalty=penalty,
                max_new_tokens=12,
                eos_token_id=end,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]

    endless = generate(-1)
    assert endless == expected(None)
    assert {len(tokens) for tokens in endless} == {12}
    end = endless[1][4]
    ended = generate(end)
    assert ended == expected(end)
    assert len(ended[1]) <= 5
