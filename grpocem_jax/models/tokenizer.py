"""Tokenizers of checkpoints, through transformers: of whole texts, and of what goes on with one."""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.files import read_object, write_json


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
        if (
            (folder / "tokenizer.model").is_file()
            and not (folder / "tokenizer.json").is_file()
            and importlib.util.find_spec("sentencepiece") is None
        ):
            raise InputError(
                f"{folder / 'tokenizer.model'}: reading it takes the package sentencepiece, which "
                "is not installed; install sentencepiece and protobuf, or put tokenizer.json "
                "beside it."
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
    """`load_tokenizer`, refusing one with tokens that the model does not have.

    A padding token may be one: it was added to train with, and is in no text.

    Raises:
      InputError: as there, or another token that is not below ``vocab_size``.
    """
    tokenizer = load_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    beyond = [
        token
        for token, number in vocabulary.items()
        if number >= vocab_size and token != tokenizer.pad_token
    ]
    if beyond:
        raise InputError(
            f"{folder}: the tokenizer has {1 + max(vocabulary.values())} tokens, among them "
            f"{beyond[0]!r}, but config.json says vocab_size={vocab_size}; use the tokenizer that "
            "belongs to the checkpoint."
        )
    return tokenizer


def chat_writer(tokenizer: Any) -> Callable[[Sequence[Mapping[str, str]]], str] | None:
    """A function from messages to the text of a chat template, up to where the answer begins.

    None where the tokenizer has no template.  The function raises an InputError where the template
    refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None

    def write(messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
        except Exception as error:  # whatever the template's own code may raise
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"the tokenizer's chat template refuses messages of {roles} "
                f"({' '.join(str(error).split())}); give others."
            ) from error

    return write


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


def decode(tokenizer: Any, ids: Sequence[Any], *, keep_special_tokens: bool) -> list[str]:
    """The texts of several sequences of tokens, with every space as it was written."""
    return tokenizer.batch_decode(
        ids, skip_special_tokens=not keep_special_tokens, clean_up_tokenization_spaces=False
    )


def stop_table(
    tokenizer: Any, stop_strings: Sequence[str], vocab_size: int, *, keep_special_tokens: bool
) -> np.ndarray:
    """The automaton that finds the first stop string in a text as its tokens come (Aho and Corasick
    1975), wherever it begins and ends in them.

    Of several tokens the bytes are one after the other, which is checked on all of the vocabulary.
    A special token that `decode` leaves out of the text changes no state, but ends it where its own
    name has a stop string.

    Args:
      tokenizer: of what follows other text, see `continuing`.
      stop_strings: at least one.
      vocab_size: ``V``, tokens of the model.
      keep_special_tokens: as in `decode`.

    Returns:
      int32 ``[K, V]``: the state, of ``K``, in which each state is after each token; ``K`` itself
      once the text has a stop string. State 0 is the beginning.

    Raises:
      InputError: an empty stop string, or a tokenizer whose tokens change the text of others.
    """
    if not all(stop_strings):
        raise InputError("generation.stop: '' is in every text; remove it.")
    moves = _automaton([text.encode() for text in stop_strings])
    nodes = len(moves)
    try:
        first, later = token_bytes(tokenizer, vocab_size, keep_special_tokens=keep_special_tokens)
    except InputError as error:
        raise InputError(
            f"generation.stop: {error}, so that stop strings cannot be found as they come; leave "
            "it empty."
        ) from error
    # State 0 of the table is the root, of a text that is still empty; state 1 + n is node n.
    table = np.concatenate([1 + _walk(moves[:1], moves, first), 1 + _walk(moves, moves, later)])
    still_empty = np.array([not piece for piece in first])
    table[0, still_empty] = 0
    for token, number in tokenizer.get_vocab().items():
        if number < vocab_size and any(text in token for text in stop_strings):
            shown = decode(tokenizer, [[number]], keep_special_tokens=True)[0]
            if not later[number] and any(text in shown for text in stop_strings):
                table[:, number] = 1 + nodes
    return table


def _automaton(words: Sequence[bytes]) -> np.ndarray:
    """Of each node and byte the next node, int32 ``[n, 256]``; ``n`` where a word is complete."""
    edges: list[dict[int, int]] = [{}]
    ends = {0: False}
    for word in words:
        node = 0
        for byte in word:
            if byte not in edges[node]:
                edges[node][byte] = len(edges)
                ends[len(edges)] = False
                edges.append({})
            node = edges[node][byte]
        ends[node] = True
    moves = np.zeros((len(edges), 256), np.int32)
    back = [0] * len(edges)
    queue = [0]
    for node in queue:
        ends[node] |= ends[back[node]]
        if node:
            moves[node] = moves[back[node]]
        for byte, child in edges[node].items():
            back[child] = moves[node][byte] if node else 0
            moves[node, byte] = child
            queue.append(child)
    going = [node for node in range(len(edges)) if not ends[node]]
    number = np.full(len(edges), len(going), np.int32)
    number[going] = np.arange(len(going))
    return number[moves[going]]


def _walk(start: np.ndarray, moves: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
    """Where each piece leads from each of the first ``len(start)`` nodes, ``[len(start), V]``."""
    nodes = len(moves)
    absorbing = np.concatenate([moves, np.full((1, 256), nodes, np.int32)])
    states = np.tile(np.arange(len(start), dtype=np.int32)[:, None], len(pieces))
    lengths = np.array([len(piece) for piece in pieces])
    for place in range(lengths.max(initial=0)):
        rows = np.flatnonzero(lengths > place).tolist()
        read = np.array([pieces[row][place] for row in rows])
        states[:, rows] = absorbing[states[:, rows], read]
    return states


def token_bytes(
    tokenizer: Any, vocab_size: int, *, keep_special_tokens: bool
) -> tuple[list[bytes], list[bytes]]:
    """What each token writes at the beginning of a text and after other text.

    The text of several tokens is what they write one after the other, of bytes that are UTF-8; it
    is tried on all of the vocabulary.

    Args:
      tokenizer: of what follows other text, see `continuing`.
      vocab_size: ``V``, tokens of the model.
      keep_special_tokens: as in `decode`; else they write nothing.

    Returns:
      the bytes of each of ``V`` tokens, none of those that the tokenizer does not have.

    Raises:
      InputError: it depends on more than that.
    """
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    known = [number for number in range(vocab_size) if number in names]

    def texts(ids: list[list[int]]) -> list[str]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return decode(tokenizer, ids, keep_special_tokens=keep_special_tokens)
        return backend.decode_batch(ids, skip_special_tokens=not keep_special_tokens)

    alone = texts([[number] for number in known])
    plain, text = next(
        (x for x in zip(known, alone, strict=True) if x[1].isascii() and x[1].strip().isalpha()),
        (known[0], alone[0]),
    )
    after = [whole.removeprefix(text) for whole in texts([[plain, number] for number in known])]
    first, later = ([b""] * vocab_size for _ in range(2))
    for number, begins, follows in zip(known, alone, after, strict=True):
        raw = _raw_bytes(names[number]) if "\N{REPLACEMENT CHARACTER}" in follows else None
        first[number] = begins.encode() if raw is None else raw
        later[number] = follows.encode() if raw is None else raw
    for start in range(0, len(known), 16):
        some = known[start : start + 16]
        whole = b"".join([first[plain], *(later[number] for number in some)]).decode(
            errors="replace"
        )
        if _without_damage(whole) != _without_damage(texts([[plain, *some]])[0]):
            raise InputError("the text of this tokenizer's tokens depends on their neighbours")
    return first, later


def _without_damage(text: str) -> str:
    # Libraries differ in how many signs stand for bytes that are no text.
    return text.replace("\N{REPLACEMENT CHARACTER}", "")


def _raw_bytes(token: str) -> bytes | None:
    """The bytes of a token that are not whole characters; None of other tokens."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    if all(char in _BYTES for char in token):
        return bytes(_BYTES[char] for char in token)
    return None


def _byte_characters() -> dict[str, int]:
    """The byte for each of the printable characters by which byte-level BPE writes bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTES = _byte_characters()
