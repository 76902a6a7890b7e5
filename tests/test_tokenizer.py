"""Tokens of a text, and of what goes on with it."""

import dataclasses

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpocem_jax import adaptation
from grpocem_jax.adaptation import Text
from grpocem_jax.config import ModelConfig, parse_config
from grpocem_jax.config_files import load_config
from grpocem_jax.models import hub
from grpocem_jax.models.tokenizer import continuing, load_tokenizer
from grpocem_jax.policy import load_policy

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
    settings = parse_config(load_config("llama"))
    return load_policy(
        ModelConfig(source=str(folder), dtype="float32"),
        dataclasses.replace(settings.adapter, sites=("self_attn.o_proj",)),
        stop=("\n",),
    )


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
