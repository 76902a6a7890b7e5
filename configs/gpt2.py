"""GPT-2 124M with the settings of the 2025 report; ``configs/gpt2.py:tuned`` is our recipe.

    python train.py --config configs/gpt2.py
    python train.py --config configs/gpt2.py:tuned

Fetches the model and five data sets from the Hugging Face Hub.  Each can be a local folder
instead (``--config.model.source=FOLDER``, ``--config.data.qa.source=FOLDER``).  Where the report
does not say what a setting means, the comment gives our reading; docs/reproduction.md has the
reasons and what came of it.
"""

import ml_collections
from ml_collections import config_dict

from grpocem_jax.utils.errors import InputError


def get_config(recipe: str = "report") -> ml_collections.ConfigDict:
    if recipe not in ("report", "tuned"):
        raise InputError(f"gpt2: there is no recipe {recipe!r}; the recipes are report and tuned.")
    config = ml_collections.ConfigDict()
    config.seed = 0

    config.model = ml_collections.ConfigDict()
    config.model.source = "openai-community/gpt2"
    config.model.dtype = "float32"  # "mixed precision: False"

    config.adapter = ml_collections.ConfigDict()
    config.adapter.type = "svf"
    config.adapter.options = ml_collections.ConfigDict()
    # One projection per layer: 12 x floor(0.8 x 768) = 7,368. The report does not say which.
    config.adapter.sites = ("attn.c_proj",)
    config.adapter.rank_ratio = 0.8
    # Eq. 10 drops the other singular values, which changes the base model before any training;
    # we keep them, so that zero offsets are GPT-2 itself.
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
    config.data.heldout_samples = 100  # not in the report, which has no held-out set
    config.data.validation_samples = 20
    # "Max length 256" is prompt and completion together.
    config.data.max_prompt_tokens = 192
    config.data.qa = _source(
        "rajpurkar/squad",
        subset="plain_text",
        heldout_split="validation",
        columns={"context": "context", "question": "question", "answers": "answers.text"},
    )
    config.data.sentiment = _source(
        "stanfordnlp/sst2",
        heldout_split="validation",
        columns={"text": "sentence", "label": "label"},
        label_names=("negative", "positive"),
    )
    config.data.summarization = _source(
        "EdinburghNLP/xsum",
        revision="refs/convert/parquet",  # the main branch may be a script, which is not run
        heldout_split="validation",
        columns={"document": "document", "summary": "summary"},
    )
    config.data.classification = _source(
        "fancyzhx/ag_news",
        heldout_split="test",
        columns={"text": "text", "label": "label"},
        label_names=("World", "Sports", "Business", "Sci/Tech"),
    )
    config.data.general = _source(
        "Salesforce/wikitext",
        subset="wikitext-2-raw-v1",
        heldout_split="validation",
        columns={"text": "text"},
    )

    config.generation = ml_collections.ConfigDict()
    config.generation.max_new_tokens = 64
    config.generation.temperature = 0.6
    # "With annealing": linear over training; the report does not give the end.
    config.generation.final_temperature = 0.4
    config.generation.top_p = 0.85
    config.generation.top_k = 0  # off, as min_p
    config.generation.min_p = 0.0
    config.generation.repetition_penalty = 1.3
    # GPT-2 seldom ends an answer by itself; a line break does. Our choice.
    config.generation.stop = ("\n",)
    config.generation.keep_special_tokens = True
    config.generation.prompt_buckets = (64, 128)

    config.grpo = ml_collections.ConfigDict()
    config.grpo.group_size = 8
    config.grpo.supervision = "outcome"  # the report has both
    config.grpo.advantages = "scaled"  # eq. 7
    config.grpo.advantages_options = ml_collections.ConfigDict()
    config.grpo.reward_scale = 0.1
    config.grpo.reward_clip = 3.0
    config.grpo.objective = "clipped"
    config.grpo.objective_options = ml_collections.ConfigDict()
    config.grpo.clip = 0.2
    config.grpo.beta = 0.01
    config.grpo.entropy = 0.08
    config.grpo.weights = "sequence"  # eq. 1
    config.grpo.weights_options = ml_collections.ConfigDict()

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 5
    config.train.max_steps = 0
    # Batch 16 is the micro-batch: 16 x 4 = 64 completions a step, 8 prompts ("episodes") of 8.
    config.train.batch_size = 16
    config.train.accumulation_steps = 4
    config.train.optimizer = "adamw"
    config.train.optimizer_options = ml_collections.ConfigDict()
    config.train.learning_rate = 5e-5
    config.train.warmup_steps = 100
    config.train.weight_decay = 0.01
    config.train.max_grad_norm = 0.5
    # "Adaptive learning rate" is not defined: we scale it by the measured KL against a target.
    config.train.target_kl = 0.01
    config.train.lr_scale_range = (0.1, 10.0)
    config.train.save_interval = 1  # "save every epoch"
    config.train.checkpoint_every_steps = 0
    config.train.checkpoint_every_minutes = 0.0
    config.train.keep_checkpoints = 3
    config.train.evaluate_every_steps = 0
    config.train.fit_memory = False
    config.train.max_skipped_updates = 5
    config.train.eval_batch_size = 16
    config.train.eval_samples = 1

    config.cem = ml_collections.ConfigDict()
    config.cem.method = "cem"
    config.cem.options = ml_collections.ConfigDict()
    config.cem.fitness = "likelihood"
    config.cem.task = ""
    config.cem.support = 0
    config.cem.samples = 1
    config.cem.space = "full"
    config.cem.experts = ""
    config.cem.rank = 32  # "adaptation rank 32", not defined there
    config.cem.per_site = False
    config.cem.population_size = 100
    config.cem.elite_ratio = 0.3
    config.cem.noise_std = 0.3
    config.cem.generations = 50
    config.cem.threshold = 5e-3
    config.cem.momentum = 0.3
    config.cem.std_momentum = 0.3
    config.cem.min_std = 0.0
    config.cem.learning_rate = 1e-2
    config.cem.returned = "mean"
    config.cem.gate = False  # the report has none
    config.cem.gate_z = 1.5
    config.cem.held_back = 0.3
    config.cem.budget_s = config_dict.placeholder(float)
    if recipe == "report":
        config.cem.budget_s = 1.0  # "adaptation time 1.0000 s", whatever the task
    config.cem.population_chunk = 0
    config.cem.fit_memory = False
    config.cem.buckets = (16, 32, 64, 128, 256, 512, 1024)

    config.logging = ml_collections.ConfigDict()
    config.logging.report_to = ()
    config.logging.project = "enhanced-grpo-cem-gpt2"
    config.logging.interval = 10

    if recipe == "tuned":
        # At 5e-5 AdamW moves no offset by more than 5e-5 a step. docs/reproduction.md has both
        # rates on the built-in model; these values come from there and are untried on GPT-2.
        config.train.learning_rate = 1e-2
        config.train.warmup_steps = 10
        config.train.target_kl = 0.0
        config.train.epochs = 1
        # Scaled advantages leave the entropy bonus ten times its weight; ours are not scaled.
        # docs/adaptation.md, also on a real model: a smaller first spread loses less, and the gate
        # turns harm away.
        config.cem.noise_std = 0.1
        config.cem.gate = True
        config.grpo.advantages = "group"
        config.grpo.entropy = 0.0
        config.generation.temperature = 1.0
        config.generation.final_temperature = 1.0
        config.generation.top_p = 1.0
        config.generation.repetition_penalty = 1.0
    return config


def _source(
    source: str,
    *,
    subset: str = "",
    revision: str = "",
    heldout_split: str,
    columns: dict[str, str],
    label_names: tuple[str, ...] = (),
) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "source": source,
            "subset": subset,
            "revision": revision,
            "train_split": "train",
            "heldout_split": heldout_split,
            "columns": columns,
            "label_names": label_names,
            "rewards": (),
            "reward_weights": (),
        }
    )
