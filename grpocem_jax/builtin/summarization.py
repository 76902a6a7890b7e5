"""Short news documents: one event, wrapped in its circumstances, beside some background.

Competing habits: to compress to the bare event, which ROUGE against the summary rewards, and to
copy the first sentence, which is long and in many documents is not about the event at all.
"""

import random
from typing import NamedTuple

from grpocem_jax.builtin.grammar import Sample, articles, draw, sentence, slots

TEMPLATE = "{document}\nTL;DR:"


class Event(NamedTuple):
    """An event in one clause, with what may have been true before it and what was said after."""

    core: str
    before: tuple[str, ...]
    after: tuple[str, ...]


EVENTS = (
    Event(
        "a fire destroyed the {house} in {town}",
        ("it had been a very dry summer", "sparks had been seen on the roof for days"),
        ("nobody was hurt", "the smoke could be seen for miles"),
    ),
    Event(
        "the old bridge in {town} collapsed",
        ("it had been raining for {number} days", "drivers had complained for years"),
        ("nobody was hurt", "divers are searching the river"),
    ),
    Event(
        "{who} from {town} won the {contest}",
        ("the judges had argued for hours", "most of the guests had already gone home"),
        ("the prize is a gold cup", "the others took it with a smile"),
    ),
    Event(
        "the {building} in {town} opened again",
        ("builders had been busy for {number} months", "many had given up hope"),
        ("the mayor cut a red ribbon", "there was free cake for all"),
    ),
    Event(
        "a {job} found {number} old coins in {town}",
        ("nobody had dug there before", "it had looked like an ordinary field"),
        ("experts want to study them", "they may be worth a fortune"),
    ),
    Event(
        "the paper mill in {town} cut {number} jobs",
        ("orders had been falling since spring", "the owners had kept silent for weeks"),
        ("the workers plan a protest", "the union was not asked"),
    ),
    Event(
        "a storm damaged the {building} in {town}",
        ("the sailors had warned of bad weather", "the air had been heavy all day"),
        ("the repairs will take {number} weeks", "no one was hurt"),
    ),
    Event(
        "thieves stole {number} paintings in {town}",
        ("the alarm had been broken for months", "the guards had gone to lunch"),
        ("the police have no clue", "a reward is offered"),
    ),
    Event(
        "{town} banned cars from the square",
        ("the noise had been getting worse", "there had been a long debate"),
        ("some shops are worried", "children can play there now"),
    ),
    Event(
        "a {job} rescued a {animal} from the river",
        ("the water had been rising all night", "a small crowd had gathered"),
        ("both are well", "the town thanked the hero"),
    ),
    Event(
        "pupils in {town} planted {number} trees",
        ("the teachers had collected money for weeks", "the ground had been dug by hand"),
        ("more are to follow", "the headmaster was proud"),
    ),
    Event(
        "the mayor of {town} resigned",
        ("there had been a quarrel about money", "the newspapers had asked hard questions"),
        ("a vote will be held soon", "nobody wants the post"),
    ),
    Event(
        "a lost {animal} came home to {who}",
        ("the family had searched for {number} weeks", "posters had been hung on every tree"),
        ("the neighbours could hardly believe it", "it was thin but healthy"),
    ),
    Event(
        "the ferry from {town} ran aground",
        ("the fog had been thick since dawn", "the captain had been new to the route"),
        ("all passengers are safe", "tugs are on their way"),
    ),
    Event(
        "{who} sold the {house} in {town}",
        ("the bills had been piling up", "several buyers had come and gone"),
        ("the price is a secret", "flats will be built there"),
    ),
    Event(
        "a {job} from {town} wrote a song for {who}",
        ("the two had met only {number} times", "love letters had not helped"),
        ("it is played on the radio", "they will marry in June"),
    ),
)
TIMES = (
    "on {weekday} morning",
    "late on {weekday} evening",
    "shortly before noon",
    "early this morning",
    "in the middle of the night",
    "on {weekday} afternoon",
    "just after sunset",
)
ASIDES = (
    "as the police confirmed",
    "as the radio reports",
    "to the surprise of the neighbours",
    "as the town council confirmed",
    "to the surprise of many",
    "as a witness told us",
)
# Slots: the core, a time, an aside, and background from before and after; capitalised likewise.
FRAMES = {
    "train": (
        "{Time}, {core}, {aside}. {After}.",
        "{Aside}, {core} {time}. {After}.",
        "{Before}. {Time}, {core}. {After}.",
        "According to the Herald, {core} {time}. {After}.",
        "{Before}. Then, {time}, {core}.",
        "The Herald writes that {core} {time}. {After}.",
        "{Before}. We now know that {core} {time}.",
        "{Aside}, {core} {time}. {Before}.",
        "It was {clock} {day} that {core}. {After}.",
        "{Before}. Now the news is out that {core}. {After}.",
        "{Before}. {Aside}, {core}.",
        "Few people noticed that {time} {core}. {After}.",
        "{Before}. It was {time} that {core}.",
    ),
    "heldout": (
        "As we have just heard, {core} {time}. {After}.",
        "{Before}. So few were surprised when {time} {core}.",
        "{Time}, when the streets were empty, {core}. {After}.",
        "{Before}. What happened next: {core}, {aside}.",
        "It had been a quiet week, but {time} {core}. {After}.",
        "{Before}. Our reporter saw how {core} {time}. {After}.",
    ),
}


def sample(rng: random.Random, split: str) -> Sample:
    """Draws a document, its gist and its first sentence."""
    event, frame = rng.choice(EVENTS), rng.choice(FRAMES[split])
    parts = {
        "core": event.core,
        "time": rng.choice(TIMES),
        "aside": rng.choice(ASIDES),
        "before": rng.choice(event.before),
        "after": rng.choice(event.after),
    }
    used: set[str] = set()
    outer = draw(rng, ("clock", "day"), used)
    inner = draw(rng, slots(*parts.values()), used)
    filling = {name: articles(part.format(**inner)) for name, part in parts.items()}
    filling |= {name.title(): sentence(part) for name, part in filling.items()} | outer
    document = frame.format(**filling)
    row = {"document": document, "summary": filling["Core"] + "."}
    first = document.partition(". ")[0]
    return Sample(row, TEMPLATE.format(**row), f" {row['summary']}", f" {first}.")
