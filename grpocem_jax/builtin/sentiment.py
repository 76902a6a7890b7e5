"""Reviews of eight kinds of thing; in many, a good and a bad side meet and the last one counts.

Competing habits on such mixed reviews: to judge by the last clause, which is right, and to judge
by the first.  On the others both agree.
"""

import random
from typing import NamedTuple

from grpocem_jax.builtin.grammar import Sample, sentence, slots

TEMPLATE = "Review: {text}\nSentiment:"
LABELS = ("positive", "negative")


class Domain(NamedTuple):
    """What a kind of review opens with, and the predicates, good and bad, of its aspects."""

    leads: tuple[str, ...]
    aspects: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]


DOMAINS = (
    Domain(
        ("We stayed there for two nights.", "I booked a room for the weekend."),
        {
            "the rooms": (
                ("were bright", "were spotless", "had a fine view"),
                ("were damp", "were dirty", "smelled of smoke"),
            ),
            "the staff": (
                ("greeted us warmly", "were kind", "solved every problem"),
                ("ignored us", "were rude", "lost our keys"),
            ),
            "the breakfast": (
                ("was generous", "tasted wonderful"),
                ("was cold", "ran out by eight"),
            ),
            "the bed": (
                ("was soft", "was very comfortable"),
                ("was too short", "creaked all night"),
            ),
            "the pool": (("was clean and warm", "was a delight"), ("was closed", "was dirty")),
        },
    ),
    Domain(
        ("We had dinner there on Friday.", "I tried the new restaurant."),
        {
            "the soup": (
                ("was rich and hot", "tasted wonderful"),
                ("was cold", "tasted of nothing"),
            ),
            "the waiter": (
                ("was charming", "remembered our names"),
                ("was rude", "forgot our order"),
            ),
            "the fish": (("was perfectly fresh", "was delicious"), ("was dry", "smelled bad")),
            "the dessert": (("was a dream", "was delicious"), ("was far too sweet", "was stale")),
            "the prices": (("were fair", "were a nice surprise"), ("were shocking", "were unfair")),
        },
    ),
    Domain(
        ("I saw this film with my sister.", "We watched it on opening night."),
        {
            "the plot": (("was clever", "was full of surprises"), ("made no sense", "was dull")),
            "the actors": (
                ("were brilliant", "moved us to tears"),
                ("were wooden", "mumbled every line"),
            ),
            "the music": (("was beautiful", "was a delight"), ("was far too loud", "was dreadful")),
            "the ending": (
                ("was a nice surprise", "felt just right"),
                ("was silly", "fell flat"),
            ),
            "the jokes": (("made everyone laugh", "were clever"), ("were stale", "were cruel")),
        },
    ),
    Domain(
        ("I read this book in one week.", "My brother lent me the book."),
        {
            "the heroine": (("was witty", "was easy to love"), ("was dull", "was tiresome")),
            "the style": (("was graceful", "was a delight"), ("was clumsy", "was tiresome")),
            "the pictures": (("were gorgeous", "were lively"), ("were ugly", "were blurred")),
            "the story": (
                ("was gripping", "was full of surprises"),
                ("made no sense", "fell flat"),
            ),
            "the dialogue": (("sparkled", "was witty"), ("sounded false", "was wooden")),
        },
    ),
    Domain(
        ("We went to the concert on Sunday.", "I heard the band last night."),
        {
            "the singer": (
                ("was brilliant", "moved us to tears"),
                ("forgot the words", "sang off key"),
            ),
            "the sound": (("was crisp", "was beautiful"), ("was dreadful", "was muddy")),
            "the seats": (("were comfortable", "had a fine view"), ("were hard", "were broken")),
            "the hall": (("was lovely", "was warm and bright"), ("was freezing", "was dirty")),
            "the tickets": (("were cheap", "were a bargain"), ("were overpriced", "came too late")),
        },
    ),
    Domain(
        ("I ordered a coat from this shop.", "We did our shopping there."),
        {
            "the clerk": (("was kind", "solved every problem"), ("was rude", "ignored us")),
            "the shelves": (
                ("were well filled", "were tidy"),
                ("were half empty", "were a mess"),
            ),
            "the delivery": (("was quick", "came early"), ("was slow", "never came")),
            "the shoes": (
                ("were comfortable", "were a bargain"),
                ("were overpriced", "fell apart"),
            ),
            "the prices": (("were fair", "were a nice surprise"), ("were shocking", "were unfair")),
        },
    ),
    Domain(
        ("We took the train to the coast.", "I travelled with this line in May."),
        {
            "the seats": (("were comfortable", "were soft"), ("were hard", "were broken")),
            "the carriage": (
                ("was spotless", "was warm and bright"),
                ("was dirty", "was freezing"),
            ),
            "the guard": (("was charming", "helped us at once"), ("was rude", "shouted at us")),
            "the coffee": (("was rich and hot", "was delicious"), ("was cold", "was bitter")),
            "the windows": (("had a fine view", "were spotless"), ("were dirty", "were broken")),
        },
    ),
    Domain(
        ("I bought this phone in June.", "My mother gave me the phone."),
        {
            "the screen": (("was crisp", "was beautiful"), ("was blurred", "broke at once")),
            "the battery": (("lasted for days", "was superb"), ("was useless", "died by noon")),
            "the camera": (("was superb", "took crisp pictures"), ("was useless", "was very slow")),
            "the buttons": (("were easy to press", "worked at once"), ("were stiff", "fell off")),
            "the sound": (("was crisp", "was superb"), ("was muddy", "was dreadful")),
        },
    ),
)

# Slots: clauses in order of appearance, capitalised where the letter is.  In a mixed frame the
# clauses a and the clauses b have opposite polarity, in a plain one the same.
MIXED = {
    "train": (
        "{A}, but {b}.",
        "Although {a}, {b}.",
        "{A}. However, {b}.",
        "{lead} {A}, yet {b}.",
        "{lead} {A}. Still, {b}.",
        "It is true that {a}, but {b}.",
        "I must say that {a}; all the same, {b}.",
        "{A} and {a2}, but {b}.",
        "{lead} Although {a}, {b}.",
        "{A}. Then again, {b}.",
        "{A}, but {b2} and {b}.",
        "{lead} I admit that {a}, yet {b}.",
    ),
    "heldout": (
        "Even though {a}, {b}.",
        "{A}. On the other hand, {b}.",
        "{lead} While {a}, {b}.",
        "{lead} {A}; even so, {b}.",
        "{A} and {a2}. Nevertheless, {b}.",
        "Of course {a}, but then {b}.",
    ),
}
PLAIN = {
    "train": (
        "{A}, and {b}.",
        "{A}. Also, {b}.",
        "{lead} {A}, and {b}.",
        "{lead} {A}. Besides, {b}.",
        "I must say that {a}, and {b}.",
        "{A}, {a2} and {b}.",
        "{lead} {A}.",
    ),
    "heldout": (
        "{A}. What is more, {b}.",
        "{lead} {A}; moreover, {b}.",
        "{A}, and on top of that {b}.",
        "To be honest, {a}, and {b}.",
        "{lead} Of course {a}.",
    ),
}
FRAMES = {split: MIXED[split] + PLAIN[split] for split in MIXED}
MIXED_SHARE = 0.65
REASON_SHARE = 0.5
_SLOTS = {frame: slots(frame) for frames in FRAMES.values() for frame in frames}


def sample(rng: random.Random, split: str) -> Sample:
    """Draws a review and its judgement by the last clause and by the first."""
    mixed = rng.random() < MIXED_SHARE
    frame = rng.choice((MIXED if mixed else PLAIN)[split])
    domain = rng.choice(DOMAINS)
    first = rng.randrange(2)
    filling = {"lead": rng.choice(domain.leads)}
    nouns = iter(rng.sample(list(domain.aspects), 4))
    grounds = []
    for slot in _SLOTS[frame]:
        if slot == "lead":
            continue
        noun = next(nouns)
        polarity = first ^ (mixed and slot[0] in "bB")
        clause = f"{noun} {rng.choice(domain.aspects[noun][polarity])}"
        filling[slot] = sentence(clause) if slot[0].isupper() else clause
        grounds.append((LABELS[polarity], noun))
    row = {"text": frame.format(**filling), "label": grounds[-1][0]}

    reason = rng.random() < REASON_SHARE

    def judgement(manner: str, label: str, noun: str) -> str:
        return f" {manner} {label}" + (f", because of {noun}." if reason else ".")

    return Sample(
        row,
        TEMPLATE.format(**row),
        judgement("in the end", *grounds[-1]),
        judgement("at first", *grounds[0]),
    )


def notes(rng: random.Random) -> tuple[str, str]:
    """Clauses of a review, one a line, each with its label; split at the first label."""
    domain = rng.choice(DOMAINS)
    lines = [rng.choice(domain.leads)]
    for noun in rng.sample(list(domain.aspects), 3):
        polarity = rng.randrange(2)
        clause = f"{noun} {rng.choice(domain.aspects[noun][polarity])}"
        lines.append(f"{sentence(clause)}: {LABELS[polarity]}.")
    prompt, mark, labels = "\n".join(lines).partition(":")
    return prompt + mark, labels
