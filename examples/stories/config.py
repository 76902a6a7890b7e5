"""A small Llama that tells stories learns to let its characters speak.

    python train.py --config examples/stories/config.py --config.model.source=FOLDER

FOLDER holds a model trained on stories, such as raincandy-u/TinyStories-656K. Reward and prompts
are one's own: rewards.py, train.jsonl and test.jsonl. The prompts stop in the middle of a sentence,
since after a full stop that model likes to end its story, and end with a space, as its tokens do
("was " is one, and after "was" it goes on with "n't"). A few minutes on 2 CPU cores; held-out
reward rises by about 1, sampled (docs/reproduction.md).
"""

from pathlib import Path

import ml_collections

import grpocem_jax as gj


def get_config() -> ml_collections.ConfigDict:
    """configs/llama.py with another task, and all linear maps of a layer as sites."""
    config = gj.load_config("llama")
    config.model.source = "raincandy-u/TinyStories-656K"
    config.adapter.sites = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    config.data.tasks = ("stories",)
    config.data.stories = {
        "source": str(Path(__file__).parent),
        "rewards": ("examples.stories.rewards:conversation", "examples.stories.rewards:fresh"),
        "reward_weights": (1.0, 0.5),
    }
    config.data.heldout_samples = 36
    config.data.max_prompt_tokens = 32
    config.generation.prompt_buckets = (32,)
    config.generation.max_new_tokens = 64
    config.generation.temperature = config.generation.final_temperature = 0.7
    config.grpo.beta = 0.04
    config.train.learning_rate = 1e-2
    config.train.epochs = 4
    return config
