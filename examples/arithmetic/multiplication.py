"""Makes the files of multiplications beside it: factors of two digits and of one.

python -m examples.arithmetic.multiplication
"""

import itertools
import json
import random
from pathlib import Path

SIZES = {"train": 500, "test": 100}


def rows():
    """All products of a number from 10 to 99 and one from 2 to 9, in random order."""
    pairs = list(itertools.product(range(10, 100), range(2, 10)))
    random.Random(0).shuffle(pairs)
    return [{"prompt": f"{a} x {b} =", "Answer": a * b} for a, b in pairs]


def main():
    """Writes the files, whose rows are different ones."""
    made = iter(rows())
    for split, count in SIZES.items():
        lines = [json.dumps(row) for row in itertools.islice(made, count)]
        path = Path(__file__).with_name(f"{split}.jsonl")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
