"""How the prompts of a task are written: its template, examples before it, a chat."""

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from grpocem_jax.utils.errors import InputError

Messages = Sequence[Mapping[str, str]]
"""A conversation, each message with ``role`` and ``content``, as chat templates and TRL have it."""


class Shot(NamedTuple):
    """An example that stands before a prompt."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """From what is asked to the text that the model continues.

    Without a chat, examples and prompt are separated by an empty line.  In a chat every prompt is
    a message of the user and every example's completion one of the assistant, and the tokenizer's
    chat template writes them up to where the assistant's answer begins.

    Attributes:
      render: writes messages by a chat template; None where the tokenizer has none.
      chat: whether a prompt that is a string is a message of the user.  A list of messages always
        is a conversation.
      system: the system's message at the beginning of a chat; "" for none of our own.
      shots: examples before every prompt.
    """

    render: Callable[[Messages], str] | None = None
    chat: bool = False
    system: str = ""
    shots: tuple[Shot, ...] = ()

    def write(self, prompt: str | Messages) -> str:
        """The whole prompt.

        Raises:
          InputError: what is neither a string nor a conversation that ends with the user, or a
            conversation where there is no chat template or that it refuses.
        """
        if isinstance(prompt, str) and not self.chat:
            return "".join(f"{shot.prompt}{shot.completion}\n\n" for shot in self.shots) + prompt
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        messages = _checked(prompt)
        if self.render is None:
            raise InputError(
                "a prompt is a list of messages, and the tokenizer has no chat template; give "
                "strings, or a model that was trained to chat."
            )
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        if self.system and not system:
            system = [{"role": "system", "content": self.system}]
        for shot in reversed(self.shots):
            turns = [
                {"role": "user", "content": shot.prompt},
                {"role": "assistant", "content": shot.completion},
                *turns,
            ]
        return self.render([*system, *turns])


def _checked(prompt: Any) -> list[Mapping[str, str]]:
    """A conversation that ends with the user."""
    if not isinstance(prompt, Sequence) or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in prompt
    ):
        raise InputError(
            f"a prompt is {prompt!r}; give a string, or a list of messages, each with the strings "
            "'role' and 'content'."
        )
    if not prompt or prompt[-1]["role"] != "user":
        raise InputError(
            f"a prompt is a conversation that ends with {prompt[-1]['role']!r}; end it with what "
            "the user says, which the model answers."
            if prompt
            else "a prompt is a conversation without messages; give at least one of the user's."
        )
    return list(prompt)


def template_fields(template: str, field: str) -> tuple[str, ...]:
    """The columns that a template names, each once and in order.

    Args:
      template: a format string such as ``"{text}\\nTopic:"``; a brace of the text is doubled.
      field: the config's, for error messages.

    Raises:
      InputError: no columns, or braces that are not around a column's name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"{field}={template!r}: its braces do not match ({error}); put a column's name in each "
            "pair, and double a brace of the text."
        ) from None
    names = [name for _, name, _, _ in parts if name is not None]
    if any(spec or conversion for _, _, spec, conversion in parts) or not all(
        name.replace("-", "_").isidentifier() for name in names
    ):
        raise InputError(
            f"{field}={template!r}: has braces around something else than the name of a column; "
            "put nothing but that in them, and double a brace of the text."
        )
    if not names:
        raise InputError(
            f"{field}={template!r}: names no column, so all prompts would be the same; put one in "
            "braces."
        )
    return tuple(dict.fromkeys(names))
