"""Questions on two or three small facts of one kind or of several.

Facts in one context never share a filling, and often share their frame, so an answer has to be
looked up by the words of its question.  Competing habits: the bare answer, which exact match
rewards, and a whole sentence.
"""

import random
from typing import NamedTuple

from grpocem_jax.builtin.grammar import Sample, articles, draw, sentence, slots

TEMPLATE = "{context}\nQuestion: {question}\nAnswer:"


class Ask(NamedTuple):
    """A question, its bare answer and the sentence that says the same."""

    question: str
    answer: str
    full: str


class Fact(NamedTuple):
    """A statement and what may be asked of it."""

    text: str
    asks: tuple[Ask, ...]


TRAIN = (
    Fact(
        "{who} put the {thing} {place}",
        (
            Ask("Where did {who} put the {thing}?", "{place}", "{who} put it {place}."),
            Ask("Who put the {thing} {place}?", "{who}", "It was {who}."),
            Ask("What did {who} put {place}?", "the {thing}", "It was the {thing}."),
        ),
    ),
    Fact(
        "{who} lost a {colour} {thing} {place}",
        (
            Ask("Where did {who} lose the {thing}?", "{place}", "{who} lost it {place}."),
            Ask("What colour was the {thing}?", "{colour}", "It was {colour}."),
        ),
    ),
    Fact(
        "{who} went to the {building} {day}",
        (
            Ask("Where did {who} go {day}?", "to the {building}", "{who} went to the {building}."),
            Ask("When did {who} go to the {building}?", "{day}", "It was {day}."),
            Ask("Who went to the {building} {day}?", "{who}", "It was {who}."),
        ),
    ),
    Fact(
        "{who} counted {number} {items} {place}",
        (
            Ask("How many {items} did {who} count?", "{number}", "{who} counted {number}."),
            Ask("Where did {who} count the {items}?", "{place}", "{who} counted them {place}."),
            Ask("Who counted the {items}?", "{who}", "It was {who}."),
        ),
    ),
    Fact(
        "{who} came home late because {reason}",
        (
            Ask("Why did {who} come home late?", "because {reason}", "It was because {reason}."),
            Ask("Who came home late because {reason}?", "{who}", "It was {who}."),
        ),
    ),
    Fact(
        "{who} works as a {job} in {town}",
        (
            Ask("What is {who}'s job?", "a {job}", "{who} is a {job}."),
            Ask("Where does {who} work?", "in {town}", "{who} works in {town}."),
            Ask("Who works as a {job} in {town}?", "{who}", "It is {who}."),
        ),
    ),
    Fact(
        "{who} gave {who2} a {colour} {thing}",
        (
            Ask("What did {who} give {who2}?", "a {colour} {thing}", "It was a {colour} {thing}."),
            Ask("Who gave {who2} a {thing}?", "{who}", "It was {who}."),
            Ask("Who got the {thing} from {who}?", "{who2}", "It was {who2}."),
            Ask("What colour was the {thing} from {who}?", "{colour}", "It was {colour}."),
        ),
    ),
    Fact(
        "{who} met {who2} at the {building}",
        (
            Ask("Where did {who} meet {who2}?", "at the {building}", "It was at the {building}."),
            Ask("Whom did {who} meet at the {building}?", "{who2}", "It was {who2}."),
            Ask("Who met {who2} at the {building}?", "{who}", "It was {who}."),
        ),
    ),
    Fact(
        "{who} painted the {part} {colour}",
        (
            Ask("Which colour did {who} paint the {part}?", "{colour}", "It was {colour}."),
            Ask("Who painted the {part} {colour}?", "{who}", "It was {who}."),
            Ask("What did {who} paint {colour}?", "the {part}", "It was the {part}."),
        ),
    ),
    Fact(
        "the train to {town} leaves {clock}",
        (
            Ask("When does the train to {town} leave?", "{clock}", "It leaves {clock}."),
            Ask("Where does the train {clock} go?", "to {town}", "It goes to {town}."),
        ),
    ),
    Fact(
        "{who} sold {number} {items} to {who2}",
        (
            Ask("How many {items} did {who} sell to {who2}?", "{number}", "{who} sold {number}."),
            Ask("Who bought the {items}?", "{who2}", "It was {who2}."),
            Ask("Who sold the {items} to {who2}?", "{who}", "It was {who}."),
        ),
    ),
    Fact(
        "{who} cooked {dish} for {who2}",
        (
            Ask("What did {who} cook for {who2}?", "{dish}", "{who} cooked {dish}."),
            Ask("For whom did {who} cook {dish}?", "for {who2}", "It was for {who2}."),
            Ask("Who cooked {dish} for {who2}?", "{who}", "It was {who}."),
        ),
    ),
    Fact(
        "{who} practised the {instrument} {place}",
        (
            Ask(
                "Which instrument did {who} practise?",
                "the {instrument}",
                "It was the {instrument}.",
            ),
            Ask("Where did {who} practise?", "{place}", "{who} practised {place}."),
            Ask("Who practised the {instrument}?", "{who}", "It was {who}."),
        ),
    ),
    Fact(
        "{who}'s {animal} sleeps {place}",
        (
            Ask("Where does {who}'s {animal} sleep?", "{place}", "It sleeps {place}."),
            Ask("Which animal sleeps {place}?", "the {animal}", "It is the {animal}."),
        ),
    ),
)
HELDOUT = (
    Fact(
        "{who} hid the {thing} {place} {clock}",
        (
            Ask("Where was the {thing} hidden?", "{place}", "It was hidden {place}."),
            Ask("When did {who} hide the {thing}?", "{clock}", "It was {clock}."),
            Ask("Who hid the {thing}?", "{who}", "It was {who}."),
        ),
    ),
    Fact(
        "{day}, {who} repaired the {thing}",
        (
            Ask("When did {who} repair the {thing}?", "{day}", "It was {day}."),
            Ask("What did {who} repair {day}?", "the {thing}", "It was the {thing}."),
            Ask("Who repaired the {thing} {day}?", "{who}", "It was {who}."),
        ),
    ),
    Fact(
        "{who} wore a {colour} {garment} to the {building}",
        (
            Ask("Which colour was {who}'s {garment}?", "{colour}", "It was {colour}."),
            Ask("Who wore the {colour} {garment}?", "{who}", "It was {who}."),
            Ask("What did {who} wear?", "a {colour} {garment}", "It was a {colour} {garment}."),
        ),
    ),
    Fact(
        "as {reason}, {who} stayed at home",
        (
            Ask("Why did {who} stay at home?", "because {reason}", "It was because {reason}."),
            Ask("Who stayed at home because {reason}?", "{who}", "It was {who}."),
        ),
    ),
    Fact(
        "{who} caught {number} {fish} {water}",
        (
            Ask("How many {fish} did {who} catch?", "{number}", "{who} caught {number}."),
            Ask("Where did {who} catch the {fish}?", "{water}", "{who} caught them {water}."),
            Ask("Who caught the {fish}?", "{who}", "It was {who}."),
        ),
    ),
    Fact(
        "{who} teaches {subject} in {town}",
        (
            Ask("Which subject does {who} teach?", "{subject}", "{who} teaches {subject}."),
            Ask("In which town does {who} teach?", "in {town}", "{who} teaches in {town}."),
            Ask("Who teaches {subject} in {town}?", "{who}", "It is {who}."),
        ),
    ),
)
FRAMES = {"train": TRAIN, "heldout": HELDOUT}
JOINTS = {"train": (". ", ", and "), "heldout": (". ", "; ")}
_LEADING = ("in", "behind", "under", "near", "beside", "on", "at", "to", "for", "off", "because")
_SLOTS = {fact: slots(fact.text) for fact in TRAIN + HELDOUT}
Drawn = list[tuple[Fact, dict[str, str]]]
"""Facts with the fillings of their slots."""


def accepted(answer: str) -> list[str]:
    """The bare answer, and the same without its preposition or conjunction."""
    first, _, rest = answer.partition(" ")
    return [answer, rest] if first in _LEADING else [answer]


def facts(rng: random.Random, split: str, count: int) -> tuple[str, Drawn]:
    """Draws ``count`` facts with disjoint fillings, and the context that states them."""
    used: set[str] = set()
    kind = rng.choice(FRAMES[split])
    drawn = []
    for _ in range(count):
        drawn.append((kind, draw(rng, _SLOTS[kind], used)))
        if rng.random() < 0.4:
            kind = rng.choice(FRAMES[split])
    context, joint = "", ""
    for fact, filling in drawn:
        text = fact.text.format(**filling)
        context += joint + (sentence(text) if joint in ("", ". ") else text)
        joint = ". " if joint not in ("", ". ") else rng.choice(JOINTS[split])
    return articles(context) + ".", drawn


def sample(rng: random.Random, split: str) -> Sample:
    """Draws a context, a question on one of its facts, and both answers."""
    context, drawn = facts(rng, split, rng.choice((2, 2, 3)))
    fact, filling = rng.choice(drawn)
    ask = rng.choice(fact.asks)
    question = ask.question.format(**filling)
    answer = articles(ask.answer.format(**filling))
    row = {"context": context, "question": articles(question), "answers": accepted(answer)}
    full = articles(ask.full.format(**filling))
    return Sample(row, TEMPLATE.format(**row), f" {answer}.", f" {full}")


def quiz(rng: random.Random, split: str, full: bool) -> tuple[str, str]:
    """A context with several questions, all answered bare or all in full; split at an answer."""
    context, drawn = facts(rng, split, rng.choice((2, 3)))
    lines = [context]
    choices = [(ask, filling) for fact, filling in drawn for ask in fact.asks]
    for ask, filling in rng.sample(choices, min(4, len(choices))):
        answer = ask.full if full else f"{ask.answer}."
        lines.append(f"Q: {ask.question.format(**filling)}\nA: {answer.format(**filling)}")
    prompt, mark, answers = articles("\n".join(lines)).partition("\nA:")
    return prompt + mark, answers
