"""Tokens per second of rollouts.

    python -m benchmarks.decode [--config configs/gpt2.py] [--tokens 32] [--json] [--peers]

Times `grpocem_jax.models.sampling.sample` with the config's sampling settings: a step's prompts, a
group of completions of each, none of which ends early.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import common
from grpocem_jax.models import sampling
from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError


def sampling_settings(subject: common.Subject, length: int) -> dict[str, Any]:
    """Static arguments of `sampling.sample`."""
    config = subject.config
    return {
        "model": subject.attached.model,
        "num_samples": config.grpo.group_size,
        "max_new_tokens": length,
        "top_p": config.generation.top_p,
        "repetition_penalty": config.generation.repetition_penalty,
    }


def sampling_arguments(subject: common.Subject, prompt_length: int) -> tuple[Any, ...]:
    """The other arguments of `sampling.sample`, for the prompts of one step."""
    count = subject.config.prompts_per_step
    prompts = common.random_tokens(subject, count, prompt_length)
    attached, keys = subject.attached, jax.random.split(jax.random.key(0), count)
    rows = (jnp.asarray(prompts), jnp.ones(prompts.shape, bool), keys)
    return (
        attached.params,
        attached.zero,
        *devices.divide(subject.mesh, rows),
        jnp.array([-1]),  # no token ends a completion
        jnp.float32(subject.config.generation.temperature),
    )


def rollout_products(
    subject: common.Subject, prompt_length: int, length: int
) -> list[common.Product]:
    """The products of a rollout in the sizes in which they are run."""
    prompts = subject.config.prompts_per_step
    rows = prompts * subject.config.grpo.group_size
    return [
        *common.linear_products(subject, prompts * prompt_length),
        *common.linear_products(subject, rows, length - 1),
        common.head_product(subject, rows, length),
    ]


def check_length(subject: common.Subject, prompt_length: int, length: int) -> None:
    """Refuses more tokens than the model has positions."""
    limit = subject.attached.model.context_length
    if prompt_length + length > limit:
        raise InputError(
            f"--prompt_tokens={prompt_length} and --tokens={length} make "
            f"{prompt_length + length}, but the model's context is {limit}; lower one of them."
        )


def measure(
    settings: Any, *, prompt_length: int, length: int, repetitions: int, peers: bool
) -> tuple[str, dict[str, Any]]:
    """Runs the benchmark; returns the text to show and the JSON record."""
    subject = common.load(settings)
    check_length(subject, prompt_length, length)
    config = subject.config
    arguments = sampling_arguments(subject, prompt_length)
    settings = sampling_settings(subject, length)
    program, compile_seconds = common.compile_ahead(
        jax.jit(sampling.sample, static_argnames=tuple(settings)), *arguments, **settings
    )
    products = rollout_products(subject, prompt_length, length)
    work = {
        "sample": lambda: program(*arguments),
        "products": common.run_products(products, config.model.dtype),
    }
    if peers:
        work["transformers_generate"] = common.import_peers().transformers_generate(
            common.peer_model(subject),
            arguments[2],
            num_samples=config.grpo.group_size,
            max_new_tokens=length,
            temperature=config.generation.temperature,
            top_p=config.generation.top_p,
            repetition_penalty=config.generation.repetition_penalty,
        )
    timings = common.alternate(work, repetitions)

    samples = config.prompts_per_step * config.grpo.group_size
    tokens, seconds = samples * length, timings["sample"].median
    fraction = timings["products"].median / seconds
    rates = {name: tokens / timings[name].median for name in timings if name.startswith("trans")}
    rows: list[tuple[str, ...]] = [("", "seconds", "spread", "tokens/s")]
    for name, label in (
        ("sample", "sample"),
        ("products", "its matrix products alone"),
        ("transformers_generate", "transformers generate"),
    ):
        if name in timings:
            rate = "" if name == "products" else f"{tokens / timings[name].median:.0f}"
            rows.append((label, *common.timing_cells(timings[name]), rate))
    generation = config.generation
    lines = [
        common.headline(
            f"Decoding, {config.prompts_per_step} prompts of {prompt_length} tokens x "
            f"{config.grpo.group_size} samples x {length} tokens",
            subject,
        ),
        f"sampling  temperature {generation.temperature}, top-p {generation.top_p}, "
        f"repetition penalty {generation.repetition_penalty}",
        "",
        common.table(rows),
        "",
        f"gemm_fraction       {fraction:.2f} of the speed of the products alone",
        f"compilation         {compile_seconds:.1f} s",
        *(f"against {name}  {tokens / seconds / x:.1f} times" for name, x in rates.items()),
    ]
    record = {
        "tokens_per_s": tokens / seconds,
        "gemm_fraction": fraction,
        "compile_seconds": compile_seconds,
        "peers": rates,
        "samples": samples,
        "prompt_tokens": prompt_length,
        "tokens": length,
        "gemm_flops": common.arithmetic(products),
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "model": subject.source,
    }
    return "\n".join(lines), record


def run(measure: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    """The command of a benchmark of prompts and completions."""
    common.define_flags()
    common.define_timing_flags()
    flags.DEFINE_integer("tokens", 32, "Tokens of each completion.", 1)
    flags.DEFINE_integer("prompt_tokens", 23, "Tokens of each prompt.", 1)
    common.run(
        lambda flag: measure(
            flag.config,
            prompt_length=flag.prompt_tokens,
            length=flag.tokens,
            repetitions=flag.repetitions,
            peers=flag.peers,
        )
    )


if __name__ == "__main__":
    run(measure)
