"""What the devices of a compiled program exchange, counted in the program itself."""

import collections
import math
import re
from typing import Any

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_BITS = {"pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "f32": 32}
_BITS |= {"s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64}
_ARRAY = re.compile(rf"\b({'|'.join(_BITS)})\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_RESULT = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_CALLED = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def received(program: Any, *, trips: int = 1) -> dict[str, int]:
    """Bytes that collectives leave on each device in one run of a compiled program, by kind.

    They are those of the collectives' results, so the part that a device had itself is among them.

    Args:
      program: a compiled program of several devices.
      trips: how often a loop runs whose number of iterations the program does not know.
    """
    name = entry = ""
    own: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    called: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for line in program.as_text().splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            entry = name if head[1] else entry
        elif result := _RESULT.search(line):
            own[name][result[2]] += sum(_size(*each) for each in _ARRAY.findall(result[1]))
        elif "=" in line:
            looped = re.search(r"\bwhile\(", line)
            known = _TRIPS.search(line)
            times = 1 if not looped else int(known[1]) if known else trips
            names = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                names += [each.strip().lstrip("%") for each in branches.split(",")]
            called[name] += [(each, times) for each in names]

    def total(name: str) -> collections.Counter[str]:
        found = collections.Counter(own[name])
        for each, times in called.get(name, ()):
            for kind, size in total(each).items():
                found[kind] += times * size
        return found

    return {kind: total(entry)[kind] for kind in KINDS if total(entry)[kind]}


def _size(kind: str, shape: str) -> int:
    return _BITS[kind] // 8 * math.prod(int(n) for n in shape.split(",") if n)
