"""GRPO with a loop and a reward of one's own, from the parts: sample, judge, update.

python examples/grpo_alone.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import grpocem_jax as gj

REVIEWS = {
    "The soup was cold and the waiter was rude.": "negative",
    "A warm and funny film with a lovely end.": "positive",
    "The plot was dull and the actors were worse.": "negative",
    "The bread was fresh and the staff were kind.": "positive",
}


def reward(completion: str, answer: str) -> float:
    """1 where the completion ends with the answer and gives no reason for it, else 0."""
    return float(completion.endswith(f" {answer}."))


def main(steps: int = 20, group: int = 16) -> None:
    """Steps of ``group`` completions for each review; the reward is their mean."""
    pretrained = gj.load_model("builtin")
    tokenizer = pretrained.tokenizer
    # One model record, as jitted functions know it by identity.
    model, params, *_, zero = gj.attach(pretrained, gj.svf(rank_ratio=0.8), ["attn.c_proj"])

    ids = [tokenizer.encode(f"Review: {text}\nSentiment:") for text in REVIEWS]
    length = max(map(len, ids))
    prompts = np.array([[0] * (length - len(row)) + row for row in ids])  # padded on the left
    prompt_mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in ids])

    objective, optimizer = gj.clipped(), optax.adamw(5e-2, weight_decay=0.01)
    state = gj.init_state(zero, optimizer)
    for step, key in enumerate(jax.random.split(jax.random.key(1), steps)):
        rollouts = gj.sample(
            params,
            state.offsets,
            prompts,
            prompt_mask,
            jax.random.split(key, len(ids)),
            jnp.array(pretrained.end_ids),
            1.0,
            model=model,
            num_samples=group,
            max_new_tokens=8,
        )
        tokens, mask = jax.device_get((rollouts.tokens, rollouts.mask))
        rewards = np.zeros(mask.shape[:2], np.float32)
        for row, answer in enumerate(REVIEWS.values()):
            for sample in range(group):
                written = tokens[row, sample][mask[row, sample]]
                text = tokenizer.decode(written, skip_special_tokens=True)
                rewards[row, sample] = reward(text, answer)
        batch = gj.Batch(
            prompts=prompts,
            prompt_mask=prompt_mask,
            completions=rollouts.tokens,
            mask=rollouts.mask,
            old_logps=rollouts.logps,
            advantages=gj.outcome_advantages(rewards, rollouts.mask),
            weights=gj.token_weights(rollouts.mask),
        )
        state, metrics = gj.update(
            state,
            params,
            batch,
            1.0,
            model=model,
            objective=objective,
            optimizer=optimizer,
            beta=0.01,
        )
        print(f"step {step + 1:2}  reward {rewards.mean():.2f}  KL {metrics['kl']:.3f}")


if __name__ == "__main__":
    main()
