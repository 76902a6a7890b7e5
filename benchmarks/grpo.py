"""Seconds of one GRPO step.

    python -m benchmarks.grpo [--config configs/gpt2.py] [--tokens 32] [--json] [--peers]

Times what `train.py` does in an optimizer step: `sampling.sample`, advantages, weights, and
`update_program` with the config's micro-batch, reference policy, KL term and entropy
bonus.  The reward is the share of odd tokens; no text is made of them.
"""

import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import common, decode
from grpocem_jax import grpo
from grpocem_jax.models import sampling
from grpocem_jax.training.algorithm import make_algorithm
from grpocem_jax.training.update import update_program
from grpocem_jax.utils import devices


class Step(NamedTuple):
    """The compiled programs of a step and what they are called with."""

    sample: Any
    update: Any
    arguments: tuple[Any, ...]
    state: grpo.TrainState
    compile_seconds: float


def make_batch(arguments: tuple[Any, ...], out: sampling.Rollouts) -> grpo.Batch:
    """Rollouts with advantages and weights, as `grpo.update` takes them."""
    _, _, prompts, prompt_mask, *_ = arguments
    rewards = jnp.sum(out.mask & (out.tokens % 2 == 1), -1) / jnp.sum(out.mask, -1)
    advantages = grpo.outcome_advantages(rewards, out.mask)
    weights = grpo.token_weights(out.mask)
    return grpo.Batch(prompts, prompt_mask, out.tokens, out.mask, out.logps, advantages, weights)


def update_settings(subject: common.Subject) -> dict[str, Any]:
    """The static arguments of `grpo.update`, but for the model."""
    config, algorithm = subject.config, make_algorithm(subject.config)
    return {
        "objective": algorithm.objective,
        "optimizer": algorithm.optimizer,
        "beta": config.grpo.beta,
        "entropy": config.grpo.entropy,
        "micro_batch": config.train.batch_size,
    }


def compile_step(subject: common.Subject, prompt_length: int, length: int) -> Step:
    """Compiles the two programs of a step."""
    arguments = decode.sampling_arguments(subject, prompt_length)
    sample, sample_seconds = compile_rollouts(subject, arguments, length)
    state, update, update_seconds = compile_update(subject, arguments, length)
    return Step(sample, update, arguments, state, sample_seconds + update_seconds)


def compile_rollouts(
    subject: common.Subject, arguments: tuple[Any, ...], length: int
) -> tuple[Any, float]:
    """Compiles the rollouts of a step; with the seconds."""
    settings = decode.sampling_settings(subject, length)
    program = jax.jit(sampling.sample, static_argnames=tuple(settings))
    return common.compile_ahead(program, *arguments, **settings)


def compile_update(
    subject: common.Subject, arguments: tuple[Any, ...], length: int
) -> tuple[grpo.TrainState, Any, float]:
    """Compiles the update of a step; with the state before it, and the seconds."""
    settings = decode.sampling_settings(subject, length)
    update_with = update_settings(subject)
    state = grpo.init_state(subject.attached.zero, update_with["optimizer"])
    shapes = jax.eval_shape(lambda *x: sampling.sample(*x, **settings), *arguments)
    batch = jax.eval_shape(lambda out: make_batch(arguments, out), shapes)
    # Arrays, as shapes alone do not say among which devices they are divided.
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    batch = devices.divide(subject.mesh, batch)
    update, seconds = common.compile_ahead(
        update_program,
        state,
        subject.attached.params,
        batch,
        arguments[-1],
        model=subject.attached.model,
        **update_with,
    )
    return state, update, seconds


def run_step(subject: common.Subject, step: Step) -> tuple[float, float]:
    """One step; the seconds of its rollouts and of the rest of it."""
    started = time.perf_counter()
    out = jax.block_until_ready(step.sample(*step.arguments))
    sampled = time.perf_counter()
    batch = make_batch(step.arguments, out)
    temperature = step.arguments[-1]
    state, _ = step.update(step.state, subject.attached.params, batch, temperature)
    jax.block_until_ready(state)
    return sampled - started, time.perf_counter() - sampled


def step_products(subject: common.Subject, prompt_length: int, length: int) -> list[common.Product]:
    """The products of a step in the sizes in which they are run.

    Linear maps: once for the reference, once forward and once backward, as nothing of the model is
    trained but the offsets.  The head: the same, and once more where its logits are too large to be
    kept.
    """
    config = subject.config
    micro = config.train.batch_size
    rows = micro // config.grpo.group_size * prompt_length + micro * (length - 1)
    count = config.train.accumulation_steps
    passes = 3 if config.grpo.beta else 2
    again = not grpo.keep_logits(micro * length, subject.attached.model)
    return [
        *decode.rollout_products(subject, prompt_length, length),
        *common.linear_products(subject, rows, passes * count),
        common.head_product(subject, micro * length, (passes + again) * count),
    ]


def measure(
    settings: Any, *, prompt_length: int, length: int, repetitions: int, peers: bool
) -> tuple[str, dict[str, Any]]:
    """Runs the benchmark; returns the text to show and the JSON record."""
    subject = common.load(settings)
    decode.check_length(subject, prompt_length, length)
    config = subject.config
    step = compile_step(subject, prompt_length, length)
    products = step_products(subject, prompt_length, length)
    run_products = common.run_products(products, config.model.dtype)
    run_peer = _peer(subject, prompt_length, length) if peers else None
    run_step(subject, step)
    run_products()
    parts, product_seconds, peer_seconds = [], [], []
    for _ in range(repetitions):
        parts.append(run_step(subject, step))
        started = time.perf_counter()
        run_products()
        product_seconds.append(time.perf_counter() - started)
        if run_peer is not None:
            peer_seconds += run_peer()[1:]  # the first step warms up

    timings = {
        "step": common.summarize([sum(x) for x in parts]),
        "rollout": common.summarize([x for x, _ in parts]),
        "update": common.summarize([x for _, x in parts]),
        "products": common.summarize(product_seconds),
    }
    if peer_seconds:
        timings["trl"] = common.summarize(peer_seconds)
    seconds = timings["step"].median
    fraction = timings["products"].median / seconds
    samples = config.prompts_per_step * config.grpo.group_size
    # As TRL's num_tokens and ours: every completion with its prompt.
    tokens = samples * (prompt_length + length)
    labels = {
        "step": "one step",
        "rollout": "  rollouts",
        "update": "  update",
        "products": "its matrix products alone",
        "trl": "TRL, LoRA of rank 1",
    }
    rows: list[tuple[str, ...]] = [("", "seconds", "spread")]
    rows += [(labels[name], *common.timing_cells(x)) for name, x in timings.items()]
    lines = [
        common.headline(
            f"One GRPO step, {config.prompts_per_step} prompts of {prompt_length} tokens x "
            f"{config.grpo.group_size} completions of {length} tokens, micro-batch "
            f"{config.train.batch_size}",
            subject,
        ),
        f"loss      beta {config.grpo.beta}, entropy bonus {config.grpo.entropy}",
        "",
        common.table(rows),
        "",
        f"tokens/s            {tokens / seconds:.0f}",
        f"gemm_fraction       {fraction:.2f} of the speed of the products alone",
        f"compilation         {step.compile_seconds:.1f} s",
    ]
    if "trl" in timings:
        lines.append(f"against TRL         {timings['trl'].median / seconds:.1f} times")
    record = {
        "step_seconds": seconds,
        "rollout_seconds": timings["rollout"].median,
        "update_seconds": timings["update"].median,
        "tokens_per_s": tokens / seconds,
        "gemm_fraction": fraction,
        "compile_seconds": step.compile_seconds,
        "peers": {"trl": timings["trl"].median} if "trl" in timings else {},
        "samples": samples,
        "prompt_tokens": prompt_length,
        "tokens": length,
        "gemm_flops": common.arithmetic(products),
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "model": subject.source,
    }
    return "\n".join(lines), record


def _peer(subject: common.Subject, prompt_length: int, length: int) -> Any:
    peers, config = common.import_peers("peers_trl"), subject.config
    model = common.peer_model(subject)
    prompts = common.random_tokens(subject, config.prompts_per_step, prompt_length)

    def run() -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            return peers.trl_grpo(
                model,
                prompts,
                num_samples=config.grpo.group_size,
                max_new_tokens=length,
                temperature=config.generation.temperature,
                top_p=config.generation.top_p,
                repetition_penalty=config.generation.repetition_penalty,
                beta=config.grpo.beta,
                entropy=config.grpo.entropy,
                micro_batch=config.train.batch_size,
                sites=list(subject.attached.sites),
                steps=2,
                folder=folder,
            )

    return run


if __name__ == "__main__":
    decode.run(measure)
