"""Peak memory of a GRPO step, of PPO in its place, and of a CEM generation.

    python -m benchmarks.memory [--config configs/gpt2.py] [--norun] [--json]

One optimizer step at the config's full setting: its prompts and completions at their largest
lengths, its micro-batch.  The peak of a program is what its arguments, results and temporaries take
together by the compiler's own account; the peak of a step is the larger of rollouts and update,
with everything in memory that outlives them.  The GRPO step is also run, and the system's figure
for the process put beside it; ``--norun`` only compiles, for models that do not fit in memory, and
``--noppo`` leaves PPO out, whose program XLA's CPU compiler takes longest over.  The CEM generation
scores the config's population on a text of ``--text_tokens``.
"""

from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

import grpocem_jax as gj
from benchmarks import cem, common, decode, grpo, ppo
from grpocem_jax.config import make_method
from grpocem_jax.grpo import init_state
from grpocem_jax.models import sampling
from grpocem_jax.search import fitness
from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError

COMPILER = (
    "largest of the step's compiled programs by XLA's memory analysis: arguments + results + "
    "temporaries - aliased; not run"
)
CRITICS = {"critic of its own": True, "value head": False}
"""The two forms of PPO, and whether the critic has weights of its own."""


def program_bytes(program: Any) -> int:
    """What a compiled program has in memory at its peak."""
    sizes = program.memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes
    )


def ppo_bytes(
    subject: common.Subject,
    arguments: tuple[Any, ...],
    rollouts: Any,
    length: int,
    *,
    separate: bool,
) -> int:
    """Peak of a PPO step, from shapes alone."""
    attached, settings = subject.attached, grpo.update_settings(subject)
    head = common.head_product(subject, 1)
    models = ppo.Models(attached.model, subject.pretrained.build())

    def start(critic: Any) -> Any:
        trainable = ppo.Trainable(attached.zero, jnp.zeros(head.inner), critic)
        return init_state(trainable, settings["optimizer"])

    state = jax.eval_shape(start, subject.pretrained.params if separate else None)
    out = jax.eval_shape(
        lambda *x: sampling.sample(*x, **decode.sampling_settings(subject, length)), *arguments
    )
    batch = jax.eval_shape(lambda out: grpo.make_batch(arguments, out), out)
    update = ppo.update.lower(
        state, attached.params, batch, arguments[-1], model=models, **settings
    ).compile()
    # While completions are sampled, critic and optimizer are there too.
    resident = common.parameter_bytes(state)
    return max(program_bytes(update), program_bytes(rollouts) + resident)


def cem_program(subject: common.Subject, length: int) -> Any:
    """Compiles a CEM generation on a text of ``length`` tokens, from shapes alone."""
    attached, method = subject.attached, make_method(subject.config)
    texts, chunk = cem.problem(subject, common.random_tokens(subject, length))
    space = gj.full_space(attached.zero)

    def generation(params: Any, search: gj.search.SearchState, texts: Any, key: Any) -> Any:
        score = fitness.Likelihood(params, attached.model)
        problem = gj.search.Problem.of(score, space, texts, key)
        return gj.search.advance(
            method, problem, search, 1, population_chunk=chunk, mesh=subject.mesh
        )

    key = jax.random.key(0)
    problem = gj.search.Problem.of(lambda *_: jnp.float32(0.0), space, texts, key)
    first = gj.search.begin(method, problem, generations=1)
    arguments = (attached.params, *devices.replicate(subject.mesh, (first, texts, key)))
    return jax.jit(generation).lower(*arguments).compile()


def measure(
    settings: Any, *, prompt_length: int, length: int, text_length: int, run: bool, compare: bool
) -> tuple[str, dict[str, Any]]:
    """Runs the benchmark; returns the text to show and the JSON record."""
    subject = common.load(settings) if run else common.outline(settings)
    config = subject.config
    prompt_length = prompt_length or config.data.max_prompt_tokens
    length = length or config.generation.max_new_tokens
    decode.check_length(subject, prompt_length, length)
    context = subject.attached.model.context_length
    if text_length > context:
        raise InputError(
            f"--text_tokens={text_length}: the model's context is {context}; lower it."
        )
    step = grpo.compile_step(subject, prompt_length, length)
    programs = {"rollouts": program_bytes(step.sample), "update": program_bytes(step.update)}
    peak = max(programs.values())
    ppo_peaks = {
        label: ppo_bytes(subject, step.arguments, step.sample, length, separate=separate)
        for label, separate in CRITICS.items()
        if compare
    }
    search = program_bytes(cem_program(subject, text_length))
    weights = common.parameter_bytes(subject.attached.params)
    measured, seconds, how_measured = None, None, "not run"
    if run:
        with common.PeakMemory() as memory:
            seconds = sum(grpo.run_step(subject, step))
        measured = None if memory.extra_bytes is None else weights + memory.extra_bytes
        how_measured = f"{seconds:.1f} s; weights, and {memory.source}"

    def row(label: str, size: int) -> tuple[str, str, str]:
        return label, f"{size / 1e6:,.0f}", f"{peak / size:.2f}"

    rows = [
        ("", "MB", "GRPO / this"),
        row("GRPO, one step", peak),
        row("  its rollouts", programs["rollouts"]),
        row("  its update", programs["update"]),
        row("  of these weights, with factors", weights),
    ]
    if measured is not None:
        rows.append(row("GRPO, one step, as run", measured))
    rows += [row(f"PPO, {label}", size) for label, size in ppo_peaks.items()]
    population = config.cem.population_size
    rows.append(row(f"CEM, {population} candidates x {text_length} tokens", search))
    samples = config.prompts_per_step * config.grpo.group_size
    lines = [
        common.headline(
            f"Memory, {samples} completions of {length} tokens, prompts of {prompt_length}, "
            f"micro-batch {config.train.batch_size}",
            subject,
        ),
        "",
        common.table(rows),
        "",
        f"how       {COMPILER}",
        *([f"as run    {how_measured}"] if run else []),
    ]
    separate, shared = (ppo_peaks.get(label) for label in CRITICS)
    record = {
        "grpo_peak_bytes": peak,
        "ppo_separate_critic_peak_bytes": separate,
        "ppo_value_head_peak_bytes": shared,
        "grpo_over_ppo_separate_critic": separate and peak / separate,
        "grpo_over_ppo_value_head": shared and peak / shared,
        "grpo_rollout_bytes": programs["rollouts"],
        "grpo_update_bytes": programs["update"],
        "weight_bytes": weights,
        "grpo_measured_bytes": measured,
        "grpo_first_step_seconds": seconds,
        "cem_generation_bytes": search,
        "how": {
            "grpo_peak_bytes": COMPILER,
            "ppo_separate_critic_peak_bytes": COMPILER,
            "ppo_value_head_peak_bytes": COMPILER,
            "grpo_measured_bytes": how_measured,
            "cem_generation_bytes": COMPILER,
        },
        "samples": samples,
        "prompt_tokens": prompt_length,
        "tokens": length,
        "micro_batch": config.train.batch_size,
        "model": subject.source,
    }
    return "\n".join(lines), record


if __name__ == "__main__":
    common.define_flags()
    flags.DEFINE_integer("tokens", 0, "Tokens of each completion; 0: as the config.", 0)
    flags.DEFINE_integer("prompt_tokens", 0, "Tokens of each prompt; 0: as the config.", 0)
    flags.DEFINE_integer("text_tokens", 12, "Tokens of the text that CEM adapts to.", 2)
    flags.DEFINE_bool("run", True, "Run the GRPO step as well, which needs the weights.")
    flags.DEFINE_bool("ppo", True, "Compile PPO as well.")
    common.run(
        lambda flag: measure(
            flag.config,
            prompt_length=flag.prompt_tokens,
            length=flag.tokens,
            text_length=flag.text_tokens,
            run=flag.run,
            compare=flag.ppo,
        )
    )
