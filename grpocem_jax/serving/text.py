"""The text of a completion as its tokens come, up to a stop string and in whole characters."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from grpocem_jax.models import tokenizer as tokenizers
from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.utils.errors import InputError


class Vocabulary(NamedTuple):
    """What tokens write.

    Attributes:
      first: bytes of each token at the beginning of a text.
      later: bytes of each token after other text.
      names: of tokens that write nothing, the names by which a stop string may mean them.
    """

    first: list[bytes]
    later: list[bytes]
    names: dict[int, str]


def vocabulary(policy: Policy) -> Vocabulary:
    """What the tokens of a policy's completions write.

    Raises:
      InputError: a tokenizer of which that depends on the tokens around.
    """
    tokenizer, size = policy.continuing, policy.model.vocab_size
    try:
        first, later = tokenizers.token_bytes(
            tokenizer, size, keep_special_tokens=policy.keep_special_tokens
        )
    except InputError as error:
        raise InputError(
            f"model.source={policy.pretrained.source!r}: {error}, so that its completions cannot "
            "be written as they come; serve a model with another tokenizer."
        ) from error
    silent = [
        number for number in tokenizer.get_vocab().values() if number < size and not later[number]
    ]
    names = {
        number: tokenizers.decode(tokenizer, [[number]], keep_special_tokens=True)[0]
        for number in silent
    }
    return Vocabulary(first, later, names)


class Writer:
    """Writes one completion.

    The parts that `take` returns make up what `Policy.decode_completions` makes of all tokens, but
    that a stop string of one's own cuts the text as the policy's do.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str]):
        """Begins with no text; ``stop`` is what ends the completion."""
        self._vocabulary = vocabulary
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self._held = ""

    def add(self, token: int) -> bool:
        """Writes a token; returns whether that completes a stop string, which ends the text."""
        piece = (self._vocabulary.later if self._begun else self._vocabulary.first)[token]
        if not piece:
            name = self._vocabulary.names.get(token, "")
            return any(stop in name for stop in self._stop)
        self._begun = True
        self._held += self._decoder.decode(piece)
        if not self._stop:
            return False
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if not found:
            return False
        self._held = self._held[: min(found)]
        self._decoder.reset()
        return True

    def take(self, *, last: bool = False) -> str:
        """What has been written since the last call.

        Args:
          last: whether nothing follows. Before that, what may be the beginning of a stop string or
            of a character is held back.
        """
        if last:
            self._held += self._decoder.decode(b"", final=True)
        keep = 0 if last else self._beginning()
        end = len(self._held) - keep
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _beginning(self) -> int:
        """The length of the longest end of the text with which a stop string begins."""
        for length in range(min(len(self._held), self._longest - 1), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
