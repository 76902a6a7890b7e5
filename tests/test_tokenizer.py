"""Tokens of a text, and of what goes on with it."""

import importlib.util
import itertools
import json

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpocem_jax import adaptation
from grpocem_jax.adaptation import Text
from grpocem_jax.config.files import load_config
from grpocem_jax.config import parse_config
from grpocem_jax.models import hub
from grpocem_jax.models import llama as llama_model
from grpocem_jax.models.tokenizer import _BYTES, continuing, decode, load_tokenizer, stop_table
from grpocem_jax.rollouts import engine as rollouts
from grpocem_jax.rollouts.policy import load_policy
from grpocem_jax.utils.errors import InputError

LETTERS = "▁adehinoprsty.\n"


def characters(**stages):
    """A tokenizer with a token for each of a few characters, and these stages."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{x: i for i, x in enumerate(LETTERS, start=2)}}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.add_special_tokens(["</s>"])
    for name, stage in stages.items():
        setattr(backend, name, stage)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )


def llama():
    """The stages of the first Llamas' tokenizers."""
    return characters(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )


def metaspace():
    """Those of later files of the same tokenizers."""
    return characters(
        pre_tokenizer=pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False),
        decoder=decoders.Metaspace("▁", prepend_scheme="first", split=False),
    )


def byte_level():
    """GPT-2's stages, but with the space that it leaves out."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.model = models.BPE({x: i for i, x in enumerate(alphabet)}, [])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("made", [llama, metaspace, byte_level])
def test_a_completion_has_no_space_of_its_own(made):
    whole = made()
    after = continuing(whole)
    (space,) = after.encode(" ")
    for text in ("happy", " happy", "\nhappy", "  a"):
        tokens = after.encode(text)
        assert len(tokens) == len(text)  # one more with the space before it
        assert after.decode(tokens) == text
        assert whole.encode(text) == [space, *tokens] or text.startswith(" ")
    both = whole.encode("on a rope") + after.encode(" happy")
    assert both == whole.encode("on a rope happy")
    ended = [*after.encode(" a"), *whole.all_special_ids]
    assert after.decode(ended, skip_special_tokens=True) == " a"


def test_a_tokenizer_that_puts_no_space_is_taken_as_it_is():
    tokenizer = load_tokenizer(hub.BUILTIN)
    assert continuing(tokenizer) is tokenizer


def test_the_real_gpt2_puts_no_space(shared):
    tokenizer = load_tokenizer(shared / "gpt2")
    assert continuing(tokenizer) is tokenizer


@pytest.fixture
def stories(shared):
    folder = shared / "models" / "tinystories-656k"
    settings = load_config("llama")
    settings.model.source, settings.generation.stop = str(folder), ("\n",)
    return load_policy(parse_config(settings))


def test_a_completion_of_a_real_llama_stands_behind_its_prompt_as_it_is(stories):
    prompt, completion = "Once upon a time, there was a little ", "girl named Lily."
    cem = parse_config(load_config("llama")).cem
    tokens, scored = adaptation.encode(stories, Text(prompt, completion), cem)
    # With a space of its own there would be two before the girl.
    assert stories.tokenizer.decode(tokens[len(stories.start_ids) :]) == prompt + completion
    assert stories.decode_completions([tokens[scored]]) == [completion]
    assert stories.decode_completions([stories.encode_completion(" happy")]) == [" happy"]


def test_a_stop_string_of_a_real_llama_is_its_token(stories):
    vocabulary = stories.tokenizer.get_vocab()
    assert vocabulary["\n"] in stories.end_ids


# Stop strings


def words(decoder=None):
    """A word for each token, with a space between them where there is no decoder."""
    vocabulary = {x: i for i, x in enumerate(["<unk>", "</s>", "<b>", "a", "b", ".", "no"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.add_special_tokens(["</s>", "<b>"])
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def bytes_and_pairs():
    """Byte-level BPE with some tokens of several bytes, in which stop strings can hide."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    shown = {byte: char for char, byte in _BYTES.items()}
    pieces = ["\n", "a", "b", ".", " ", ".\n", "\n\n", "ab", "aab", "é", "ba\nb", "。"]
    parts = [*(piece.encode() for piece in pieces), *(bytes([x]) for x in "é。".encode())]
    vocabulary = {"".join(shown[x] for x in part): i for i, part in enumerate(parts)}
    backend.model = models.BPE(vocabulary, [])
    backend.add_special_tokens(["<x>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def byte_fallback():
    """Bytes as tokens beside characters, as in the first Llamas' tokenizers."""
    made = llama()
    stages = json.loads(made.backend_tokenizer.to_str())
    for byte in "é\n":
        for x in byte.encode():
            stages["model"]["vocab"][f"<0x{x:02X}>"] = len(stages["model"]["vocab"]) + 1
    stages["model"]["byte_fallback"] = True
    stages["decoder"]["decoders"].insert(1, {"type": "ByteFallback"})
    backend = tokenizers.Tokenizer.from_str(json.dumps(stages))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


STOPS = {
    words: [("b a",), (" .", "no"), ("a b a",), ("a",)],
    bytes_and_pairs: [("\n",), ("b\n", "é"), ("aba", "bab"), ("。",), ("\n\n\n",), (". ",)],
    byte_fallback: [("\n",), ("é",), ("a é", "p")],
    metaspace: [(" a",), ("a ", "d e")],
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("made", "stops"), [(m, x) for m, every in STOPS.items() for x in every])
def test_the_table_ends_where_the_text_first_has_a_stop_string(made, stops, keep):
    tokenizer = continuing(made())
    size = max(tokenizer.get_vocab().values()) + 4  # rows of the embedding without a token
    table = stop_table(tokenizer, stops, size, keep_special_tokens=keep)
    rng, ended = np.random.default_rng(0), 0
    for _ in range(400):
        row = rng.integers(size - 3, size=10).tolist()
        texts = [decode(tokenizer, [row[: n + 1]], keep_special_tokens=keep)[0] for n in range(10)]
        first = next((n for n, text in enumerate(texts) if any(x in text for x in stops)), None)
        state, found = 0, None
        for n, token in enumerate(row):
            state = table[state, token]
            if state == len(table):
                found = n
                break
        if found != first:
            # Bytes that are no whole text make their neighbours illegible, and only those.
            assert made is byte_fallback
            assert "\N{REPLACEMENT CHARACTER}" in texts[found]
        ended += found is not None
    assert ended >= 5


def test_a_special_token_that_is_no_text_ends_where_it_is_the_stop_string():
    tokenizer = words()
    table = stop_table(tokenizer, ["<b>", "a b"], 7, keep_special_tokens=False)
    assert table[0, 2] == len(table)
    assert table[0, 1] == 0
    # The other special token leaves no trace: "a", then "b", are "a b".
    assert table[table[table[0, 3], 1], 4] == len(table)


def test_an_empty_stop_string_and_a_tokenizer_of_other_texts_are_refused():
    with pytest.raises(InputError, match=r"generation\.stop: '' is in every text"):
        stop_table(words(), ["a", ""], 7, keep_special_tokens=True)
    joining = words(decoders.CTC(pad_token="<unk>", word_delimiter_token="no"))
    with pytest.raises(InputError, match="depends on their neighbours"):
        stop_table(joining, ["."], 7, keep_special_tokens=True)


# A small model whose next token is known


def chain(folder, tokenizer, successor, **fields):
    """A Llama without attention and MLP, whose head takes each token to its successor."""
    config = llama_model.Config(
        model_type="llama", vocab_size=fields.pop("vocab_size", len(tokenizer)), context_length=64,
        width=64, inner=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=32, qkv_bias=False,
        tied=False,
    )  # fmt: skip
    params = jax.device_get(llama_model.init_params(jax.random.key(0), config))
    rows = np.random.default_rng(0).standard_normal((config.vocab_size, 64)).astype(np.float32)
    head = np.zeros_like(rows)
    for token, after in successor.items():
        head[after] += 9 * rows[token] / 64
    block = params["layers_0"]
    for name in ("self_attn_v_proj", "mlp_down_proj"):
        block[name]["kernel"] = np.zeros_like(block[name]["kernel"])
    hub.save_model(folder, config, params | {"embed_tokens": rows, "lm_head": head}, tokenizer)
    return folder


def load_chain(folder, **generation):
    settings = load_config("llama")
    settings.model.source = str(folder)
    settings.generation.max_new_tokens = 8
    for name, value in generation.items():
        settings.generation[name] = value
    config = parse_config(settings)
    policy = load_policy(config)
    return adaptation.TrainedRun(config, policy, policy.zero)


@pytest.fixture
def thinking(tmp_path):
    """Writes "a", <x>, "b", ".\\n", "ab" and its end, one after the other."""
    tokenizer = bytes_and_pairs()
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in ("a", "b", "<x>", "ab", "</s>")}
    ids["."] = tokenizer.convert_tokens_to_ids(".Ċ")
    order = ["a", "<x>", "b", ".", "ab", "</s>"]
    successor = {ids[x]: ids[y] for x, y in itertools.pairwise(order)}
    return chain(tmp_path / "thinking", tokenizer, successor)


@pytest.mark.parametrize(
    ("generation", "text", "length"),
    [
        ({}, "<x>b.\nab", 5),
        ({"keep_special_tokens": False}, "b.\nab", 5),
        ({"stop": ("\n",)}, "<x>b.", 3),
        ({"stop": ("\n",), "keep_special_tokens": False}, "b.", 3),
        ({"stop": ("b.",)}, "<x>", 3),
        ({"stop": ("\na",)}, "<x>b.", 4),
        ({"stop": ("<x>",)}, "", 1),
        ({"stop": ("<x>",), "keep_special_tokens": False}, "", 1),
        ({"stop": ("no such", "ab")}, "<x>b.\n", 4),
    ],
)
def test_completions_keep_special_tokens_and_are_cut_at_a_stop_string(
    thinking, generation, text, length
):
    """The mask holds the token that ends the completion, the end token or the one that completes
    the stop string; the text goes up to the string, and has no end token."""
    run = load_chain(thinking, **generation)
    assert adaptation.complete(run, run.offsets, ["a"]) == [text]
    prompts = rollouts.pad([np.array(run.policy.encode("a"))], 4)
    keys = jax.random.split(jax.random.key(0), 1)
    settings = run.config.generation
    out = rollouts.generate(
        run.policy,
        run.offsets,
        prompts,
        keys,
        settings,
        num_samples=1,
        temperature=1.0,
        greedy=True,
    )
    assert int(out.mask.sum()) == length
    assert rollouts.decode(run.policy, np.asarray(out.tokens), np.asarray(out.mask)) == [[text]]


def test_a_padding_token_beyond_the_embedding_is_taken_and_refused_in_a_text(tmp_path):
    tokenizer = bytes_and_pairs()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    folder = chain(tmp_path / "padded", tokenizer, {}, vocab_size=size)
    run = load_chain(folder, stop=("\n",))
    assert run.policy.encode("ab") == bytes_and_pairs().encode("ab")
    for encode in (run.policy.encode, run.policy.encode_completion):
        with pytest.raises(
            InputError, match=rf"a text has '\[PAD\]', token {size} .* {size} tokens"
        ):
            encode("a[PAD]")
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=f"has {size + 2} tokens, among them 'more'"):
        hub.load_model(str(folder))


def test_a_rendered_chat_prompt_has_one_start_token(tmp_path):
    tokenizer = bytes_and_pairs()
    start = tokenizer.convert_tokens_to_ids("<x>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<x> $A", special_tokens=[("<x>", start)]
    )
    tokenizer.chat_template = "<x>{% for m in messages %}{{ m['content'] }}.{% endfor %}"
    run = load_chain(chain(tmp_path / "chat", tokenizer, {}))
    assert run.policy.start_ids == (start,)
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert expected.count(start) == 1
    assert run.policy.encode(rendered) == expected
    assert run.policy.encode("ab") == [start, *tokenizer.encode("ab", add_special_tokens=False)]
    assert run.policy.encode("") == []


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="it is installed")
def test_a_sentencepiece_file_alone_says_what_it_takes(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(InputError, match=r"tokenizer\.model: reading it takes .* sentencepiece"):
        load_tokenizer(tmp_path)
