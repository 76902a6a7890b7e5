"""A real Llama and texts like those that it was trained on, from the shared folder."""

import json
from pathlib import Path

import tokenizers

MODEL = Path("models/tinystories-656k")


def texts(shared: Path) -> list[str]:
    """The first 100 stories."""
    lines = (shared / "data" / "tinystories" / "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in lines.splitlines()[:100]]


def tokens(shared: Path) -> list[list[int]]:
    """Their first 200 tokens, as the model's tokenizer.json has it."""
    tokenizer = tokenizers.Tokenizer.from_file(str(shared / MODEL / "tokenizer.json"))
    return [tokenizer.encode(text).ids[:200] for text in texts(shared)]
