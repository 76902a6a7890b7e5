"""A Llama, Qwen2, Qwen3 or Mistral on the built-in tasks.

    python train.py --config configs/llama.py --config.model.source=FOLDER

The settings of configs/tiny.py otherwise.  They were found on the built-in model, and other models
may want a smaller learning rate.
"""

import ml_collections

from grpocem_jax.config.files import load_config


def get_config() -> ml_collections.ConfigDict:
    config = load_config("tiny")
    config.model.source = "Qwen/Qwen2-0.5B"
    config.adapter.sites = ("self_attn.o_proj",)  # the attention's output
    # Other tokenizers make more tokens of the built-in prompts than the one made for them.
    config.data.max_prompt_tokens = 192
    config.generation.prompt_buckets = (64, 128)
    config.generation.max_new_tokens = 48
    config.search.buckets = (16, 32, 64, 128, 256)
    config.search.experts = ""  # those in the package are of the built-in model
    return config
