"""Exact match of a number."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(prompts, completions, Answer, **columns):  # noqa: N803 - the name of SVAMP's column
    """1 where the first number of a completion is the answer, else -1."""
    rewards = []
    for completion, answer in zip(completions, Answer, strict=True):
        found = NUMBER.search(completion)
        right = found is not None and float(found[0].replace(",", "")) == float(answer)
        rewards.append(1.0 if right else -1.0)
    return rewards
