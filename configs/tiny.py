"""The built-in default: a tiny GPT-2 and five tasks that come with the package; no network.

    python train.py --config configs/tiny.py

About two minutes on 2 CPU cores. Held-out reward rises by 0.22 sampled and by 0.51 to 0.62 greedy,
with three seeds (docs/reproduction.md).
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.model = ml_collections.ConfigDict()
    config.model.source = "builtin"
    config.model.dtype = "float32"

    config.adapter = ml_collections.ConfigDict()
    config.adapter.type = "svf"
    config.adapter.options = ml_collections.ConfigDict()
    config.adapter.sites = ("attn.c_proj",)
    config.adapter.rank_ratio = 0.8
    config.adapter.tail = "keep"
    config.adapter.min_singular_value = 1e-5

    config.data = ml_collections.ConfigDict()
    config.data.tasks = ("qa", "sentiment", "summarization", "classification", "general")
    config.data.max_samples = 500
    config.data.bad_lines = "error"
    config.data.reward_timeout_s = 600.0
    config.data.reward_retries = 0
    config.data.reward_on_error = "stop"
    config.data.find_failing_completion = False
    config.data.heldout_samples = 100
    config.data.validation_samples = 20
    config.data.max_prompt_tokens = 64
    for task in config.data.tasks:
        config.data[task] = ml_collections.ConfigDict({"source": "builtin"})

    config.generation = ml_collections.ConfigDict()
    config.generation.max_new_tokens = 24
    config.generation.temperature = 1.0
    config.generation.final_temperature = 1.0
    config.generation.top_p = 1.0
    config.generation.top_k = 0
    config.generation.min_p = 0.0
    # Good answers repeat words of the prompt.
    config.generation.repetition_penalty = 1.0
    config.generation.stop = ()
    config.generation.keep_special_tokens = True
    config.generation.prompt_buckets = (64,)

    config.grpo = ml_collections.ConfigDict()
    config.grpo.group_size = 8
    config.grpo.supervision = "outcome"
    config.grpo.advantages = "group"
    config.grpo.advantages_options = ml_collections.ConfigDict()
    config.grpo.reward_scale = 0.1
    config.grpo.reward_clip = 3.0
    config.grpo.objective = "clipped"
    config.grpo.objective_options = ml_collections.ConfigDict()
    config.grpo.clip = 0.2
    config.grpo.beta = 0.01
    config.grpo.entropy = 0.0
    config.grpo.weights = "sequence"
    config.grpo.weights_options = ml_collections.ConfigDict()

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 1
    config.train.max_steps = 0
    config.train.batch_size = 64
    config.train.accumulation_steps = 1
    config.train.optimizer = "adamw"
    config.train.optimizer_options = ml_collections.ConfigDict()
    # 1e-2 gives less (+0.20 sampled), the report's 5e-5 nothing.
    config.train.learning_rate = 2e-2
    config.train.warmup_steps = 10
    config.train.weight_decay = 0.01
    config.train.max_grad_norm = 0.5
    config.train.target_kl = 0.0
    config.train.lr_scale_range = (0.1, 10.0)
    config.train.save_interval = 1
    config.train.checkpoint_every_steps = 0
    config.train.checkpoint_every_minutes = 0.0
    config.train.keep_checkpoints = 3
    config.train.evaluate_every_steps = 0
    config.train.fit_memory = False
    config.train.max_skipped_updates = 5
    config.train.eval_batch_size = 16
    config.train.eval_samples = 4

    config.cem = ml_collections.ConfigDict()
    config.cem.method = "cem"
    config.cem.options = ml_collections.ConfigDict()
    config.cem.fitness = "likelihood"
    config.cem.task = ""
    config.cem.support = 0
    config.cem.samples = 1
    config.cem.space = "full"
    config.cem.experts = "builtin"
    config.cem.rank = 32
    config.cem.per_site = False
    config.cem.population_size = 100
    config.cem.elite_ratio = 0.3
    config.cem.noise_std = 0.1
    config.cem.generations = 50
    config.cem.threshold = 5e-3
    config.cem.momentum = 0.3
    config.cem.std_momentum = 0.3
    config.cem.min_std = 0.0
    config.cem.learning_rate = 1e-2
    config.cem.returned = "mean"
    config.cem.gate = True
    config.cem.gate_z = 1.5
    config.cem.held_back = 0.3
    config.cem.budget_s = config_dict.placeholder(float)
    config.cem.population_chunk = 0
    config.cem.fit_memory = False
    config.cem.buckets = (16, 32, 48, 64, 127)

    config.logging = ml_collections.ConfigDict()
    config.logging.report_to = ()
    config.logging.project = "enhanced-grpo-cem-gpt2"
    config.logging.interval = 50
    return config
