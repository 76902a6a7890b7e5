"""What ``/v1/completions`` and ``/v1/chat/completions`` are asked, with the fields of OpenAI's."""

import dataclasses
import secrets
from typing import Any

from grpocem_jax.rollouts.policy import Policy
from grpocem_jax.serving.errors import ApiError
from grpocem_jax.serving.fields import Fields, is_integer, is_text
from grpocem_jax.serving.requests import COLDEST
from grpocem_jax.utils.errors import InputError

MOST_CHOICES = 32
"""Completions of one request: prompts times ``n``."""

MOST_STOPS, MOST_STOP = 4, 64
"""Stop strings of a request, and characters of one."""

DEFAULT_TOKENS = 16
"""OpenAI's ``max_tokens`` of a completion."""

MOST_SEED = 2**31 - 1
HOTTEST = 2.0


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
      chat: whether it is a conversation.
      model: the name of the base or of an adapter.
      prompts: texts, lists of tokens, or one conversation.
      n: completions of each prompt.
      max_tokens: of each; None for the default.
      temperature: 0 for the most probable tokens.
      top_p: above 0 and at most 1.
      stop: strings that end a completion.
      seed: of the first completion, the next ones have the next seeds; drawn where None was given.
      stream: whether the completions are sent while they are made.
      include_usage: whether a stream ends with the counts of tokens.
    """

    chat: bool
    model: str
    prompts: tuple[Any, ...]
    n: int
    max_tokens: int | None
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int
    stream: bool
    include_usage: bool


def read(body: dict[str, Any], *, chat: bool, most_tokens: int, most_characters: int) -> Asked:
    """Reads the fields of a request.

    Args:
      body: a JSON object.
      chat: whether it has ``messages`` in place of ``prompt``.
      most_tokens: of a completion.
      most_characters: of a prompt.

    Raises:
      ApiError: a field that is missing, of another type or out of its range, or that the server
        does not have.
    """
    fields = Fields(body)
    model = read_model(fields)
    prompts = (_messages(fields, most_characters),) if chat else _prompts(fields, most_characters)
    n = fields.integer("n", 1, MOST_CHOICES) or 1
    if n * len(prompts) > MOST_CHOICES:
        raise fields.refuse("n", n, f"at most {MOST_CHOICES} / {len(prompts)} for so many prompts")
    max_tokens = fields.integer("max_tokens", 1, most_tokens)
    if chat:
        newer = fields.integer("max_completion_tokens", 1, most_tokens)
        max_tokens = max_tokens if newer is None else newer
    temperature = fields.number(
        "temperature",
        lambda x: x == 0 or COLDEST <= x <= HOTTEST,
        f"0, for the most probable tokens, or from {COLDEST} to {HOTTEST}",
    )
    top_p = fields.number("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1")
    seed = fields.integer("seed", 0, MOST_SEED)
    stream = fields.boolean("stream")
    asked = Asked(
        chat=chat,
        model=model,
        prompts=prompts,
        n=n,
        max_tokens=max_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        stop=_stop(fields),
        seed=secrets.randbelow(MOST_SEED + 1) if seed is None else seed,
        stream=stream,
        include_usage=_include_usage(fields, stream),
    )
    _read_neutral(fields, chat, n)
    fields.finish()
    return asked


def read_model(fields: Fields) -> str:
    """The field ``model``.

    Raises:
      ApiError: it is missing or no name.
    """
    model = fields.string("model", most=256)
    if model is None:
        raise fields.missing("model", "give the name of a model, which GET /v1/models lists")
    return model


def _prompts(fields: Fields, most: int) -> tuple[Any, ...]:
    given = fields.take("prompt")
    if given is None:
        raise fields.missing("prompt", "give a string")
    listed = given if isinstance(given, list) and not _are_tokens(given) else [given]
    if not 0 < len(listed) <= MOST_CHOICES or not all(
        is_text(x, most) or (_are_tokens(x) and len(x) <= most) for x in listed
    ):
        raise fields.refuse(
            "prompt",
            given,
            f"a string of 1 to {most} characters, or a list of tokens, or {MOST_CHOICES} of them",
        )
    return tuple(listed)


def _are_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(is_integer(x) and 0 <= x < 2**31 for x in value)
    )


def _messages(fields: Fields, most: int) -> list[dict[str, str]]:
    given = fields.take("messages")
    if given is None:
        raise fields.missing("messages", "give a list of messages, each with role and content")
    return read_messages(given, "messages", most)


def read_messages(given: Any, name: str, most: int) -> list[dict[str, str]]:
    """A conversation: messages with ``role`` and ``content``, a string or parts of text.

    Args:
      given: a value of JSON.
      name: its field.
      most: characters of a message.

    Raises:
      ApiError: something else.
    """
    if not isinstance(given, list) or not given:
        raise Fields({}).refuse(name, given, "a list of messages, each with role and content")
    messages = []
    for number, message in enumerate(given):
        where = f"{name}[{number}]"
        if not isinstance(message, dict):
            raise Fields({}).refuse(where, message, "an object with role and content")
        fields = Fields(message, f"{where}.")
        role = fields.choice("role", ("system", "user", "assistant"))
        if role is None:
            raise fields.missing("role", "give system, user or assistant")
        content = fields.take("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts = []
        for part in parts:
            known = isinstance(part, dict) and part.keys() == {"type", "text"}
            if not known or part["type"] != "text" or not is_text(part["text"], most):
                raise fields.refuse(
                    "content", content, f"a string of 1 to {most} characters, or parts of text"
                )
            texts.append(part["text"])
        if not texts:
            raise fields.refuse("content", content, "a string, or at least one part of text")
        fields.neutral("name", [])
        fields.neutral("refusal", [])
        fields.finish()
        messages.append({"role": role, "content": "".join(texts)})
    return messages


def _stop(fields: Fields) -> tuple[str, ...]:
    given = fields.take("stop")
    if given is None:
        return ()
    listed = given if isinstance(given, list) else [given]
    if len(listed) > MOST_STOPS or not all(is_text(x, MOST_STOP) for x in listed):
        raise fields.refuse(
            "stop", given, f"up to {MOST_STOPS} strings of 1 to {MOST_STOP} characters"
        )
    return tuple(dict.fromkeys(listed))


def _include_usage(fields: Fields, stream: bool) -> bool:
    given = fields.take("stream_options")
    if given is None:
        return False
    if not isinstance(given, dict) or not stream:
        raise fields.refuse("stream_options", given, "an object, and given with stream=true alone")
    options = Fields(given, "stream_options.")
    include = options.boolean("include_usage")
    options.neutral("include_obfuscation", [False])
    options.finish()
    return include


def _read_neutral(fields: Fields, chat: bool, n: int) -> None:
    """Fields of OpenAI's interface that have to be at their defaults here."""
    fields.string("user", most=256)
    fields.neutral("frequency_penalty", [0, 0.0])
    fields.neutral("presence_penalty", [0, 0.0])
    fields.neutral("logit_bias", [{}])
    if chat:
        fields.neutral("logprobs", [False])
        fields.neutral("top_logprobs", [0])
        fields.neutral("tools", [[]])
        fields.neutral("tool_choice", ["none"])
        fields.neutral("response_format", [{"type": "text"}])
        fields.neutral("modalities", [["text"]])
        fields.neutral("store", [False])
        fields.neutral("metadata", [{}])
    else:
        fields.neutral("logprobs", [])
        fields.neutral("echo", [False])
        fields.neutral("suffix", [""])
        fields.neutral("best_of", [n])


def encode(policy: Policy, asked: Asked, *, room: int) -> list[list[int]]:
    """Tokens of the prompts.

    Args:
      policy: for its tokenizer and its chat template.
      asked: the request.
      room: tokens of the longest prompt.

    Raises:
      ApiError: a prompt that cannot be used.
    """
    name = "messages" if asked.chat else "prompt"
    if asked.chat and policy.prompt_format.render is None:
        raise ApiError(
            400,
            "messages: the model's tokenizer has no chat template; ask POST /v1/completions with a "
            "prompt, or serve a model that was trained to chat.",
            param="messages",
            code="no_chat_template",
        )
    encoded = []
    for prompt in asked.prompts:
        if isinstance(prompt, list) and not asked.chat:
            tokens = prompt
            if max(tokens) >= policy.model.vocab_size:
                raise ApiError(
                    400,
                    f"prompt has token {max(tokens)}: must be below {policy.model.vocab_size}.",
                    param="prompt",
                )
        else:
            try:
                text = policy.prompt_format.write(prompt) if asked.chat else prompt
                tokens = policy.encode(text)
            except InputError as error:
                raise ApiError(400, f"{name}: {error}", param=name) from None
        if not tokens:
            raise ApiError(400, f"{name} is no token; give some text.", param=name)
        if len(tokens) > room:
            raise ApiError(
                400,
                f"{name} has {len(tokens)} tokens: must have at most {room}; shorten it.",
                param=name,
                code="context_length_exceeded",
            )
        encoded.append(tokens)
    return encoded


def new_tokens(asked: Asked, length: int, *, room: int, most: int) -> int:
    """How many tokens a completion may have behind a prompt of ``length`` tokens.

    Args:
      asked: the request.
      length: tokens of the prompt.
      room: tokens of prompt and completion together.
      most: of a completion.

    Raises:
      ApiError: the request wants more than there is room for.
    """
    left = min(most, room - length)
    if asked.max_tokens is None:
        wanted = left if asked.chat else min(DEFAULT_TOKENS, left)
    else:
        wanted = asked.max_tokens
    if not 0 < wanted <= left:
        raise ApiError(
            400,
            f"max_tokens={wanted}: a prompt of {length} tokens leaves room for {max(left, 0)}, as "
            f"both may have {room}; shorten the prompt, or ask for fewer.",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return wanted
