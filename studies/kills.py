"""Kills training with SIGKILL at random moments and compares what the resumed runs end with.

    python -m studies.kills [--kills 50] [--workdir DIR]

A small run that writes a checkpoint after every step is killed again and again until it completes,
in turns at a random moment and while it writes a checkpoint; then the next one begins.  Every run
must end with the adapter, metrics and completions of one that nothing interrupted, bit for bit,
times apart.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from grpocem_jax.config import commands
from grpocem_jax.utils.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12
OVERRIDES = {
    "data.tasks": ("sentiment", "general"),
    "data.max_samples": 64,
    "data.heldout_samples": 2,
    "generation.max_new_tokens": 8,
    "grpo.group_size": 4,
    "logging.interval": 1,
    "train.batch_size": 16,
    "train.checkpoint_every_steps": 1,
    "train.eval_samples": 1,
    "train.max_steps": STEPS,
}


def start(workdir: Path) -> subprocess.Popen[bytes]:
    """Starts the command on a run directory."""
    overrides = [f"--config.{name}={value}" for name, value in OVERRIDES.items()]
    return subprocess.Popen(
        [sys.executable, "train.py", "--config", "tiny", *overrides, "--workdir", str(workdir)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=(workdir.parent / f"{workdir.name}.err").open("a"),
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Waits for a process that must succeed."""
    process.communicate()
    if process.returncode:
        raise InputError(f"a run ended with status {process.returncode}; see its .err file.")


def outcome(workdir: Path) -> tuple[bytes, list[dict[str, Any]], bytes]:
    """What a run ended with: adapter, metrics without times, completions."""
    records = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["step_time"]
    offsets = (workdir / "adapter" / "adapter_model.safetensors").read_bytes()
    return offsets, records, (workdir / "completions.jsonl").read_bytes()


def kill_at_random(
    workdir: Path, life: float, rng: random.Random, *, in_write: bool
) -> tuple[bool, bool]:
    """Starts the run and kills it within ``life`` seconds, or where it next writes a checkpoint.

    Returns:
      whether it was killed before it ended, and whether a checkpoint was being written.
    """
    process = start(workdir)
    began, until = time.monotonic(), rng.uniform(0, life)

    def writing() -> bool:
        return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    while process.poll() is None:
        if writing() if in_write else time.monotonic() - began > until:
            process.kill()
            process.communicate()
            return True, writing()
        time.sleep(0.001)
    process.communicate()
    return False, False


def main(argv: Sequence[str]) -> None:
    """Runs the study and prints its figures."""
    del argv
    values = flags.FLAGS
    folder = Path(values.workdir or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(values.seed)
    finish(start(folder / "warm"))  # compiles, so that the next one's life is that of the others
    began = time.monotonic()
    finish(start(folder / "whole"))
    life = time.monotonic() - began
    expected = outcome(folder / "whole")
    kills = writing = runs = equal = 0
    while kills < values.kills:
        runs += 1
        workdir = folder / f"run-{runs}"
        while kills < values.kills:
            killed, during_write = kill_at_random(workdir, life, rng, in_write=kills % 2 == 1)
            kills += killed
            writing += during_write
            if not killed:
                break
        finish(start(workdir))
        equal += outcome(workdir) == expected
        print(
            f"{kills} kills, {writing} while a checkpoint was written: {equal} of {runs} runs "
            "ended with the bits of the uninterrupted one",
            flush=True,
        )
    if equal < runs:
        raise InputError(f"{runs - equal} of {runs} runs differ; they are in {folder}.")


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 50, "How many times to kill.", 1)
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    flags.DEFINE_string("workdir", None, "Folder of the runs; by default a temporary one.")
    commands.run(main)
