"""How a model is served, and what each tenant may ask for; every field is a flag of the command."""

import dataclasses

from grpocem_jax.utils.errors import InputError
from grpocem_jax.utils.settings import above, at_least, check, count, setting, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is served."""

    host: str = setting(
        "Address to listen on; another than this machine's own needs --keys.", default="127.0.0.1"
    )
    port: int = setting("Port to listen on; 0 for any free one.", within(0, 65535), default=8000)
    keys: str = setting(
        "File of API keys, of which --add_key makes one; without, all who reach the server may do "
        "everything.",
        default="",
    )
    store: str = setting(
        "Folder that keeps adapters, and that several servers may share; by default served/ in the "
        "run directory, or in the current one.",
        default="",
    )
    slots: int = setting("Completions under way at a time.", count(1), default=32)
    rows: int = setting("Adapters on the device at a time.", count(1), default=256)
    queue: int = setting("Completions that may wait for a slot.", count(1), default=256)
    max_prompt: int = setting(
        "Tokens of the longest prompt, within the model's context.", at_least(2), default=512
    )
    max_new_tokens: int = setting(
        "Tokens of the longest completion, at most half of the model's context.",
        at_least(1),
        default=256,
    )
    prefix_tokens: int = setting(
        "Tokens of beginnings of prompts that stay on the device; 0 for none.",
        at_least(0),
        default=4096,
    )
    users: int = setting("Searches that advance in one program.", count(1), default=32)
    share: float = setting(
        "Share of the time that searches get while there are completions.",
        within(0, 0.95),
        default=0.5,
    )
    timeout_s: float = setting("Seconds that a completion may take.", above(0), default=300.0)
    body_timeout_s: float = setting(
        "Seconds in which a request's body has to be there.", above(0), default=30.0
    )

    def __post_init__(self) -> None:
        check(self)
        if "://" in self.store:
            raise InputError(
                f"--store={self.store!r}: is an address, and the index of the adapters needs a "
                "disk with locks; give a folder, one for each machine (docs/serving.md, Beyond one "
                "machine)."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one tenant may ask for.

    With several servers on one folder, adapters and jobs are counted together, the others by each
    server for itself.
    """

    requests_per_minute: int = setting("Requests in a minute.", at_least(1), default=600)
    tokens_per_minute: int = setting(
        "Tokens in a minute, of prompts and of completions.", at_least(1), default=100_000
    )
    max_open: int = setting("Requests under way at a time.", at_least(1), default=64)
    max_body_bytes: int = setting("Bytes of a request's body.", at_least(1), default=1_000_000)
    max_adapters: int = setting("Adapters, ready or not.", at_least(0), default=1000)
    max_jobs: int = setting("Searches that have not ended.", at_least(0), default=4)
    max_examples: int = setting("Examples of a search.", at_least(1), default=64)
    max_generations: int = setting("Generations of a search.", at_least(1), default=200)

    def __post_init__(self) -> None:
        check(self)
