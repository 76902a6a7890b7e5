"""Pretrains the built-in model from nothing but this repository.

    python -m grpocem_jax.builtin.pretrain [--out DIR] [--steps N] [--seed S]

trains a byte-level BPE tokenizer and a GPT-2 of 4 layers on generated text and writes a Hugging
Face folder.  The defaults make the folder that comes with the package, in about 14 minutes on two
cores; `--steps 20` is a smoke test.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpocem_jax.builtin import circuits, data
from grpocem_jax.models import gpt2, hub
from grpocem_jax.models.base import Model, Params

END = "<|endoftext|>"
CONFIG = gpt2.GPT2Config(vocab_size=2048, context_length=128, width=128, num_layers=4, num_heads=4)
STEPS = 1600
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.1
LENGTH_STEP = 16
# Most of a prompt is chance, which no model can predict; learning should not be about that.
PROMPT_WEIGHT = 0.2
CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The built-in model of grpocem_jax

A GPT-2 of {layers} layers, width {width} and {params:,} parameters, pretrained by

    python -m grpocem_jax.builtin.pretrain --steps {steps} --seed {seed}

on {texts:,} texts ({tokens:,} tokens) that the package generates itself: prompts of five tasks with
an answer in one of two styles, and small stories. It knows both styles of each task and mostly
takes the one that the task's reward does not prefer, which makes it a test bed for reinforcement
learning. It knows nothing else and is of no use for anything else.

Made in {steps} steps of {batch} texts and {minutes:.0f} minutes on {cpus} CPU cores; mean loss of
the last tenth {loss:.3f} nats a token, prompts at a fifth of the weight.
"""


def train_tokenizer(texts: Iterator[str]) -> Any:
    """A byte-level BPE with the vocabulary of `CONFIG`, as a transformers tokenizer."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, model_max_length=CONFIG.context_length
    )


class Batch(NamedTuple):
    """Texts of similar length, each ended and then padded with the end token.

    Attributes:
      tokens: int32 ``[BATCH_SIZE, T]``, ``T`` a multiple of `LENGTH_STEP`.
      weights: float32 ``[BATCH_SIZE, T]``, each token's weight in the loss; zero on padding.
    """

    tokens: np.ndarray
    weights: np.ndarray


def batches(tokenizer: Any, pairs: Iterator[tuple[str, str]], seed: int) -> Iterator[Batch]:
    """Encodes prompts with answers and groups them by length, groups in random order."""
    rng = np.random.default_rng(seed)
    end = tokenizer.eos_token_id
    while pool := list(itertools.islice(pairs, 16 * BATCH_SIZE)):
        encoded = zip(
            *(tokenizer(part)["input_ids"] for part in zip(*pool, strict=True)), strict=True
        )
        texts = [(prompt, [*answer, end]) for prompt, answer in encoded]
        texts.sort(key=lambda text: sum(map(len, text)))
        for start in rng.permutation(np.arange(0, len(texts), BATCH_SIZE)):
            chosen = texts[start : start + BATCH_SIZE]
            length = -(-sum(map(len, chosen[-1])) // LENGTH_STEP) * LENGTH_STEP
            tokens = np.full((len(chosen), length), end, np.int32)
            weights = np.zeros((len(chosen), length), np.float32)
            for i, (prompt, answer) in enumerate(chosen):
                both = len(prompt) + len(answer)
                tokens[i, :both] = prompt + answer
                weights[i, :both] = 1.0
                weights[i, : len(prompt)] = PROMPT_WEIGHT
            yield Batch(tokens, weights)


def loss_fn(params: Params, model: Model, batch: Batch) -> jax.Array:
    """Weighted mean cross-entropy in nats of the tokens after the first."""
    forward = jax.vmap(model.forward, (None, None, 0, 0))
    hidden = forward(params, {}, batch.tokens, batch.weights > 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model.logits(params, hidden[:, :-1]), batch.tokens[:, 1:]
    )
    return jnp.average(losses, weights=batch.weights[:, 1:])


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW (matrices decay, vectors do not) with linear warmup and a cosine to a fiftieth."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, min(WARMUP_STEPS, steps // 2), steps, 0.02 * LEARNING_RATE
    )
    matrices = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=WEIGHT_DECAY, mask=matrices),
    )


def pretrain(out: Path, *, steps: int, seed: int) -> float:
    """Trains and writes a Hugging Face folder with a model card.

    Args:
      out: the folder.
      steps: optimizer steps, each on `BATCH_SIZE` new texts.
      seed: of the texts, their order and the initial parameters.

    Returns:
      the mean loss of the last tenth of the steps, in nats a token, weighted as in training.
    """
    started = time.perf_counter()
    tokenizer = train_tokenizer(data.pretraining_texts(seed, 20_000))
    model, optimizer = gpt2.build(CONFIG), make_optimizer(steps)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, model, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = circuits.init_params(jax.random.key(seed), CONFIG)
    state = optimizer.init(params)
    pairs = data.pretraining_pairs(seed + 1, steps * BATCH_SIZE)
    losses, seen = [], 0
    for number, batch in enumerate(batches(tokenizer, pairs, seed), start=1):
        params, state, loss = step(params, state, batch)
        losses.append(loss)
        seen += int(np.sum(batch.weights > 0))
        if number % 100 == 0 or number == steps:
            recent = np.mean(jax.device_get(losses[-100:]))
            elapsed = time.perf_counter() - started
            print(f"step {number}/{steps}  loss {recent:.4f}  {elapsed:.0f} s", file=sys.stderr)
    final = float(np.mean(jax.device_get(losses[-max(1, steps // 10) :])))

    hub.save_model(out, CONFIG, jax.device_get(params), tokenizer)
    card = CARD.format(
        layers=CONFIG.num_layers,
        width=CONFIG.width,
        params=sum(x.size for x in jax.tree.leaves(params)),
        steps=steps,
        seed=seed,
        texts=steps * BATCH_SIZE,
        tokens=seen,
        batch=BATCH_SIZE,
        minutes=(time.perf_counter() - started) / 60,
        cpus=os.cpu_count(),
        loss=final,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    return final


def main() -> None:
    """Reads the flags and pretrains."""
    parser = argparse.ArgumentParser(description="Pretrains the built-in model.")
    parser.add_argument("--out", type=Path, default=hub.BUILTIN, help="the folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of data and parameters")
    args = parser.parse_args()
    pretrain(args.out, steps=args.steps, seed=args.seed)


if __name__ == "__main__":
    main()
