"""Tokenizers of checkpoints, through transformers: of whole texts, and of what goes on with one."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpocem_jax.errors import InputError
from grpocem_jax.files import read_object, write_json


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer through transformers.

    Raises:
      InputError: none that can be loaded, or one that came out empty.
    """
    # Without this, transformers announces on every start that PyTorch is absent.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        if (folder / "tokenizer.json").is_file() and type(tokenizer) is not PreTrainedTokenizerFast:
            # Classes of single models put parts of their own in the place of the file's, which is
            # what the model was trained with; Llama's drops characters outside the vocabulary.
            # Their special tokens are of use where the folder does not say.
            defaults = tokenizer.special_tokens_map
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
            known = tokenizer.get_vocab()
            tokenizer.add_special_tokens(
                {
                    name: defaults[name]
                    for name in ("bos_token", "eos_token", "pad_token")
                    if getattr(tokenizer, name) is None and defaults.get(name) in known
                }
            )
        tokenizer.decode(tokenizer.encode("A trial."))
    except BaseException as error:
        # The libraries underneath raise many kinds of errors; a panic in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        try:
            if (folder / "config.json").is_file():
                AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as refused:  # its classes check their fields, each in its own way
            raise InputError(
                f"{folder / 'config.json'}: transformers refuses it, and with it the tokenizer: "
                f"{' '.join(str(refused).split())}; correct that field."
            ) from error
        raise InputError(
            f"{folder}: no tokenizer could be loaded ({type(error).__name__}); put tokenizer.json, "
            "or vocab.json and merges.txt, beside config.json."
        ) from error
    # Lengths are checked where they matter; transformers would warn of the first long text.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    # Special tokens alone are what transformers makes of a folder without the tokenizer's own file.
    if not set(tokenizer.get_vocab()).difference(
        tokenizer.get_added_vocab(), tokenizer.all_special_tokens
    ):
        raise InputError(
            f"{folder}: the tokenizer is empty; put tokenizer.json, or vocab.json and merges.txt, "
            "beside config.json."
        )
    return tokenizer


def fitting_tokenizer(folder: Path, vocab_size: int) -> Any:
    """`load_tokenizer`, refusing one with more tokens than the model has.

    Raises:
      InputError: as there, or a token that is not below ``vocab_size``.
    """
    tokenizer = load_tokenizer(folder)
    size = max(len(tokenizer), *(1 + token for token in tokenizer.get_vocab().values()))
    if size > vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {size} tokens but config.json says "
            f"vocab_size={vocab_size}; use the tokenizer that belongs to the checkpoint."
        )
    return tokenizer


FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template.*"),
    "additional_chat_templates/*",
)
"""Patterns of the files that make a tokenizer and its chat templates."""


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Writes the files of a tokenizer, in a form that transformers 4 reads as well.

    Args:
      folder: is there.
      tokenizer: a transformers tokenizer.

    Raises:
      OSError: a file that cannot be written.
    """
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        if type(error) is not Exception:
            raise
        # The tokenizers library has no class of its own for a file that it cannot write.
        raise OSError(str(error)) from error
    _make_plain(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer's files and chat templates, in a form that transformers 4 reads as well.

    Args:
      source: a checkpoint folder.
      folder: is there.

    Raises:
      InputError: a tokenizer_config.json that cannot be read.
      OSError: a file that cannot be read or written.
    """
    for path in sorted(path for pattern in FILES for path in source.glob(pattern)):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    _make_plain(folder)


def _make_plain(folder: Path) -> None:
    """Puts what transformers 5 alone writes into tokenizer_config.json as transformers 4 has it.

    Both read that.  Other files are alike in both.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    fields = before = read_object(path, fix="fetch the file again")
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields = fields | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(fields.get("extra_special_tokens"), list):
        fields = fields | {"additional_special_tokens": fields["extra_special_tokens"]}
        del fields["extra_special_tokens"]
    if isinstance(fields.get("model_specific_special_tokens"), dict):
        fields = fields | {"extra_special_tokens": fields["model_specific_special_tokens"]}
        del fields["model_specific_special_tokens"]
    if fields != before:
        write_json(path, fields)


def continuing(tokenizer: Any) -> Any:
    """A tokenizer for what follows other text, such as a completion.

    Tokenizers in the manner of SentencePiece (the first Llamas', Mistral's) put a space before
    every text and take it off what they decode.  Of a completion that would be a space too many in
    its tokens, and one too few in its text.

    Args:
      tokenizer: a transformers tokenizer.

    Returns:
      one without that space; the same one where it puts none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    stages = json.loads(backend.to_str())
    bare = stages | {
        name: _continuing(stages[name], name) for name in ("normalizer", "pre_tokenizer", "decoder")
    }
    if bare == stages:
        return tokenizer
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(bare)),
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        **tokenizer.special_tokens_map,
    )


def _continuing(part: Mapping[str, Any] | None, stage: str) -> Mapping[str, Any] | None:
    """A part of a tokenizer's stage without what it does to the beginning of a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        (name,) = (name for name in part if name != "type")
        parts = (_continuing(each, stage) for each in part[name])
        return {**part, name: [each for each in parts if each is not None]}
    changes: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "Strip": {"start": 0} if stage == "decoder" else {},
        "ByteLevel": {"add_prefix_space": False} if stage == "pre_tokenizer" else {},
    }
    return {**part, **changes.get(part["type"], {})}
