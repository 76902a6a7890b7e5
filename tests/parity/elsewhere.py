"""Prints as JSON what the transformers of some environment makes of checkpoint folders.

    PYTHON tests/parity/elsewhere.py FOLDER...

Needs torch, transformers and numpy, and nothing of the repository.
"""

import json
import sys

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "w7 w8<turn>w9 w60 w12 other"
NEW = 12


@torch.no_grad()
def look(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = np.random.default_rng(3).integers(0, model.config.vocab_size, (2, 16))
    prompt = torch.from_numpy(rows[:, :5])
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW
    )
    chat = [{"role": "user", "content": "w9 w10"}]
    settings = model.generation_config.to_dict()
    return {
        "tokens": rows.tolist(),
        "logits": model(torch.from_numpy(rows)).logits.tolist(),
        "written": written[:, 5:].tolist(),
        "dtype": str(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype),
        "ids": tokenizer.encode(TEXT),
        "text": tokenizer.decode(tokenizer.encode(TEXT), skip_special_tokens=True),
        "chat": tokenizer.chat_template and tokenizer.apply_chat_template(chat, tokenize=False),
        "generation": {k: x for k, x in settings.items() if x is not None},
        "ends": [model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id],
    }


if __name__ == "__main__":
    print(transformers.__version__, file=sys.stderr)
    print(json.dumps({folder: look(folder) for folder in sys.argv[1:]}))
