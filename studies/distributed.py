"""Many processes on this machine: what they find, against one process, and what ends them.

    python -m studies.distributed [--kills 10] [--workdir DIR] [--parts parity,faults] [--apart]

`parity` trains the default for 20 steps and adapts it, to a prompt, in the space of the experts and
to a reward, as one process of four devices, two of two and four of one, and counts what each of
them does.  `faults` kills and stops
one of two processes, lets a reward function raise and hang in one, and cuts off a checkpoint; after
each the same command must continue to the bits of a run that nothing interrupted.  With `--apart`
process 0 updates and process 1 samples.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from safetensors.numpy import load_file

from grpocem_jax.config import commands
from grpocem_jax.utils.errors import InputError
from studies.kills import OVERRIDES, outcome

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    **OVERRIDES,
    "data.tasks": ("general",),
    "data.general.rewards": ("studies.distributed:judge",),
    "train.max_steps": 8,
}
APART = {"train.staleness": 1, "train.rollout_processes": 1}
CALLS: list[int] = []


def judge(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that raises or hangs, at its fourth call, where the environment says so."""
    del prompts, columns
    CALLS.append(len(completions))
    fault = os.environ.get("GRPOCEM_FAULT") if len(CALLS) > 3 else None
    if fault == "raise":
        raise ValueError("the judge is out")
    if fault == "hang":
        time.sleep(3600)
    return [len(set(text.split())) / 10 for text in completions]


class Together:
    """The same command in several processes of this machine.

    Args:
      arguments: of the script that all run.
      count: processes.
      devices: of each.
      faults: what is in the environment of one process, by its index.
      counts: beginning of the paths where each writes what it did, see `studies.counted`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        count: int,
        devices: int,
        faults: dict[int, str] | None = None,
        counts: Path | None = None,
    ):
        with socket.socket() as sought:
            sought.bind(("127.0.0.1", 0))
            port = sought.getsockname()[1]
        place = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}"]
        values = flags.FLAGS
        limits = [f"--wait_s={values.wait_s}", f"--dead_after_s={values.dead_after_s}"]
        device = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        self.counts = [Path(f"{counts}-{index}.json") for index in range(count if counts else 0)]
        counting = [["-m", "studies.counted", str(path)] for path in self.counts]
        self.began = time.monotonic()
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    *(counting[index] if counting else ()),
                    *arguments,
                    *place,
                    *limits,
                    f"--process_id={index}",
                ],
                cwd=ROOT,
                env={**os.environ, **device, "GRPOCEM_FAULT": (faults or {}).get(index, "")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def end(self, limit_s: float = 3600) -> tuple[list[int], list[str], list[str]]:
        """Waits for all; their statuses, standard outputs and errors.

        Raises:
          InputError: one is left behind.
        """
        out, err = [], []
        for process in self.processes:
            try:
                each = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                for other in self.processes:
                    other.kill()
                raise InputError(f"a process was left behind after {limit_s} s.") from None
            out.append(each[0])
            err.append(each[1])
        return [process.returncode for process in self.processes], out, err


def overrides(changes: dict[str, Any]) -> list[str]:
    """Changes of the settings as flags."""
    return [f"--config.{name}={value}" for name, value in changes.items()]


def succeed(together: Together) -> list[dict[str, int]]:
    """Waits for processes that must succeed; what each has counted, where it was to count."""
    statuses, _, err = together.end()
    if any(statuses):
        raise InputError(f"a process ended with {statuses}: {' '.join(err)[-2000:]}")
    return [json.loads(path.read_text()) for path in together.counts]


STEPS, GENERATIONS, POPULATION, PROMPTS = 20, 5, 16, 8
"""Of `parity`; a step of the default updates 8 prompts."""


def parity(folder: Path) -> None:
    """Trains and adapts the default as one, two and four processes, and prints how far apart.

    Raises:
      InputError: other completions, offsets further apart than 1e-6, or a process that does more
        than its share.
    """
    shapes = ((1, 4), (2, 2), (4, 1))
    adapters, texts, found = [], [], []
    whole = {"prompts updated": STEPS * PROMPTS, "scored": GENERATIONS * POPULATION}
    small = overrides({"train.max_steps": STEPS, "data.heldout_samples": 8})
    for count, devices in shapes:
        workdir = folder / f"default-{count}x{devices}"
        train = ["train.py", "--config", "tiny", *small, "--workdir", str(workdir)]
        counts = succeed(Together(train, count, devices, counts=folder / f"train-{count}"))
        adapters.append(load_file(workdir / "adapter" / "adapter_model.safetensors"))
        texts.append((workdir / "completions.jsonl").read_bytes())
        own, scored = adapt(folder / "default-1x4", folder / "found", count, devices)
        found.append(own)
        if count == 1:
            whole |= {name: counts[0][name] for name in ("prompts completed", "completions judged")}
        shares = {name: max(each[name] for each in counts) / whole[name] for name in whole}
        shares["scored"] = max(each["scored"] for each in scored) / whole["scored"]
        apart = {"adapter": distance(adapters[0], adapters[-1])}
        apart |= {name: distance(found[0][name], own) for name, own in found[-1].items()}
        shown = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
        same = "the same" if texts[-1] == texts[0] else "OTHER"
        print(
            f"{count} processes x {devices} devices: {same} completions; apart by {shown}; at most "
            f"of a process: {', '.join(f'{name} {x:.2f}' for name, x in shares.items())}",
            flush=True,
        )
        if same == "OTHER" or max(apart.values()) > 1e-6:
            raise InputError("several processes found something else than one.")
        if count > 1 and max(shares.values()) > {2: 0.55, 4: 0.3}[count]:
            raise InputError("a process did more than its share.")


def adapt(
    workdir: Path, folder: Path, count: int, devices: int
) -> tuple[dict[str, dict[str, Any]], list[dict[str, int]]]:
    """Adapts a trained run in three ways; the adapters found, and what was done for the first."""
    folder.mkdir(exist_ok=True)
    prompt = ["--prompt", "Review: The soup was cold, but the waiter was kind."]
    small = {"search.generations": GENERATIONS, "search.gate": False}
    small["cem.population_size"] = POPULATION
    reward = {"search.fitness": "reward", "search.task": "general", "search.samples": 2}
    ways = {
        "likelihood": [*prompt, *overrides(small)],
        "experts": [*prompt, *overrides({**small, "search.space": "experts"})],
        "reward": ["--examples", str(prompts(folder)), *overrides({**small, **reward})],
    }
    found, counts = {}, []
    for name, arguments in ways.items():
        saved = folder / f"{name}-{count}"
        shutil.rmtree(saved, ignore_errors=True)
        command = ["adapt.py", "--workdir", str(workdir), "--save", str(saved)]
        done = succeed(Together([*command, *arguments], count, devices, counts=folder / name))
        counts.append(done)
        found[name] = load_file(saved / "adapter_model.safetensors")
    return found, counts[0]


def prompts(folder: Path) -> Path:
    """Four prompts of the task that is judged without a reference."""
    texts = ("Once upon a time", "The dog ran to the", "In the garden", "She said that")
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    return path


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two adapters."""
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def faults(folder: Path, kills: int, seed: int, apart: bool) -> None:
    """Ends one of two processes in several ways, and continues."""
    rng = random.Random(seed)
    flags_given = overrides({**SMALL, **(APART if apart else {})})

    def run(workdir: Path, given: dict[int, str] | None = None) -> Together:
        train = ["train.py", "--config", "tiny", *flags_given, "--workdir", str(workdir)]
        return Together(train, 2, 1, given)

    succeed(run(folder / "warm"))
    began = time.monotonic()
    succeed(run(folder / "whole"))
    life, whole = time.monotonic() - began, outcome(folder / "whole")

    def signalled(number: int, index: int, until: Callable[[Path, float], bool]) -> Any:
        def end(workdir: Path) -> tuple[Together, float]:
            together = run(workdir)
            while not until(workdir, time.monotonic() - together.began):
                if all(process.poll() is not None for process in together.processes):
                    break
                time.sleep(0.01)
            together.processes[index].send_signal(number)
            return together, time.monotonic()

        return end

    def after(seconds: float) -> Callable[[Path, float], bool]:
        return lambda workdir, age: age > seconds

    def step(workdir: Path, age: float) -> bool:
        log = workdir / "metrics.jsonl"
        return log.exists() and len(log.read_text().splitlines()) >= 3

    def writing(workdir: Path, age: float) -> bool:
        return step(workdir, age) and any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def failing(how: str, index: int) -> Any:
        return lambda workdir: (run(workdir, {index: how}), time.monotonic())

    kill, stop = signal.SIGKILL, signal.SIGTERM
    named: list[tuple[str, Any]] = []
    for number in range(kills):
        index, moment = number % 2, after(rng.uniform(2, 0.9 * life))
        name = f"SIGKILL of process {index} at a random moment"
        named.append((name, signalled(kill, index, moment)))
    named.append(("SIGKILL of process 0 while it saves", signalled(kill, 0, writing)))
    named += [(f"SIGTERM of process {index}", signalled(stop, index, step)) for index in (0, 1)]
    named += [(f"reward that {how}s in process 1", failing(how, 1)) for how in ("raise", "hang")]
    if not apart:  # process 0 calls no reward
        named += [(f"reward that {x}s in process 0", failing(x, 0)) for x in ("raise", "hang")]
    equal = 0
    for number, (name, end) in enumerate(named):
        workdir = folder / f"fault-{number}"
        together, at = end(workdir)
        statuses, _, err = together.end()
        seconds = time.monotonic() - at
        said = [line for text in err for line in text.splitlines() if line.startswith("error")]
        succeed(run(workdir))
        same = outcome(workdir) == whole
        equal += same
        print(
            f"{name}: statuses {statuses} after {seconds:.0f} s; "
            f"{'continued to the same bits' if same else 'ENDED WITH OTHERS'}; "
            f"{said[0][:200] if said else 'no sentence'}",
            flush=True,
        )
    print(f"{equal} of {len(named)} ended with the bits of the uninterrupted run")
    if equal < len(named):
        raise InputError("a run ended with other bits.")


def main(argv: Sequence[str]) -> None:
    """Runs the study and prints its figures."""
    del argv
    values = flags.FLAGS
    folder = Path(values.workdir or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    parts = values.parts.split(",")
    if "parity" in parts:
        parity(folder)
    if "faults" in parts:
        faults(folder, values.kills, values.seed, values.apart)


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 10, "Processes to kill at random moments.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    flags.DEFINE_integer("wait_s", 90, "As of the commands, longer where others need the machine.")
    flags.DEFINE_integer("dead_after_s", 10, "The same.")
    flags.DEFINE_boolean("apart", False, "Of the faults: one process samples, one updates.")
    flags.DEFINE_string("parts", "parity,faults", "What to run.")
    flags.DEFINE_string("workdir", None, "Folder of the runs; by default a temporary one.")
    commands.run(main)
