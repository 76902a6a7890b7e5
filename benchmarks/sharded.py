"""Memory of each device where the weights of a model are divided among several.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 XLA_FLAGS=--xla_backend_optimization_level=0 \\
        python -m benchmarks.sharded [--json] [--programs rollouts] \\
        --config.model.source=random:qwen2-7b --config.model.dtype=bfloat16 \\
        --config.model.weight_shards=8

Compiles the three programs of training and adaptation (the rollouts and the update of a step at the
config's full setting, and a CEM generation) for all devices from shapes alone, so that no weights
are made and nothing runs; the flag spares the part of compilation that the memory does not depend
on.  The memory is that of each device by the compiler's own account.  What
the devices exchange is counted in the programs, see `benchmarks.collectives`.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from absl import flags

from benchmarks import collectives, common, decode, grpo, memory
from grpocem_jax.adapters.base import get
from grpocem_jax.utils import devices
from grpocem_jax.utils.errors import InputError


def of_each_device(arrays: Iterable[Any]) -> int:
    """Bytes of some arrays, or shapes with shardings, that lie on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


PROGRAMS = ("rollouts", "update", "generation")


def measure(
    settings: Any, *, prompt_length: int, length: int, text_length: int, names: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Compiles; returns the text to show and the JSON record.

    Raises:
      InputError: one device; settings that cannot be used; more tokens than the model's context.
    """
    subject = common.outline(settings)
    mesh, config, attached = subject.mesh, subject.config, subject.attached
    if mesh is None:
        raise InputError(
            "a single device has all weights; start it with JAX_NUM_CPU_DEVICES=8, or where there "
            "are several devices."
        )
    prompt_length = prompt_length or config.data.max_prompt_tokens
    length = length or config.generation.max_new_tokens
    decode.check_length(subject, prompt_length, max(length, text_length))
    started = time.perf_counter()
    arguments = decode.sampling_arguments(subject, prompt_length)
    makers: dict[str, Callable[[], Any]] = {
        "rollouts": lambda: grpo.compile_rollouts(subject, arguments, length)[0],
        "update": lambda: grpo.compile_update(subject, arguments, length)[1],
        "generation": lambda: memory.cem_program(subject, text_length),
    }
    programs = {name: makers[name]() for name in names}
    seconds = time.perf_counter() - started
    weights = jax.tree.leaves(attached.params)
    factors = jax.tree.leaves([get(attached.params, path) for path in attached.sites.values()])
    sizes = {
        "weights": sum(x.size * x.dtype.itemsize for x in weights),
        "weights_of_a_device": of_each_device(weights),
        "factors": sum(x.size * x.dtype.itemsize for x in factors),
        "factors_of_a_device": of_each_device(factors),
    }
    found: dict[str, dict[str, int]] = {}
    for name, program in programs.items():
        trips = length - 1 if name == "rollouts" else 1  # as its loop over tokens may run
        analysis = program.memory_analysis()
        found[name] = {
            "arguments": analysis.argument_size_in_bytes,
            "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
            "in all": memory.program_bytes(program),
            "exchanged": sum(collectives.received(program, trips=trips).values()),
        }
    population = config.cem.population_size
    labels = {
        "rollouts": f"rollouts, {config.prompts_per_step} prompts of {prompt_length} tokens",
        "update": f"update, micro-batch {config.train.batch_size}",
        "generation": f"CEM, {population} candidates x {text_length} tokens",
    }
    columns = tuple(found[names[0]])
    rows = [("GB of each device", *columns)]
    rows += [
        (labels[name], *(f"{each[column] / 1e9:.2f}" for column in columns))
        for name, each in found.items()
    ]
    samples = config.prompts_per_step * config.grpo.group_size
    data, shards = devices.rows(mesh), mesh.shape[devices.WEIGHTS]
    lines = [
        common.headline(
            f"Weights on a mesh of {data} x {shards} devices (rows x weights), {samples} "
            f"completions of {length} tokens",
            subject,
        ),
        f"weights   {sizes['weights'] / 1e9:.2f} GB, {sizes['weights_of_a_device'] / 1e9:.2f} GB "
        f"on each device; of them factors of the adapted matrices {sizes['factors'] / 1e9:.2f} and "
        f"{sizes['factors_of_a_device'] / 1e9:.2f} GB",
        "",
        common.table(rows),
        "",
        f"how       XLA's memory analysis of programs compiled in {seconds:.0f} s and not run; "
        "exchanged is the size of what the collectives of one run leave on a device",
    ]
    record = {
        "mesh": {"rows": data, "weights": shards},
        **{f"{name}_bytes": size for name, size in sizes.items()},
        "programs": found,
        "compile_seconds": seconds,
        "samples": samples,
        "prompt_tokens": prompt_length,
        "tokens": length,
        "text_tokens": text_length,
        "model": subject.source,
    }
    return "\n".join(lines), record


if __name__ == "__main__":
    common.define_flags("llama")
    flags.DEFINE_integer("prompt_tokens", 0, "Tokens of each prompt; 0: as the config.", 0)
    flags.DEFINE_integer("tokens", 0, "Tokens of each completion; 0: as the config.", 0)
    flags.DEFINE_multi_enum("programs", list(PROGRAMS), PROGRAMS, "What to compile; repeated.")
    flags.DEFINE_integer("text_tokens", 64, "Tokens of the text that CEM scores.", 2)
    common.run(
        lambda flag: measure(
            flag.config,
            prompt_length=flag.prompt_tokens,
            length=flag.tokens,
            text_length=flag.text_tokens,
            names=flag.programs,
        )
    )
