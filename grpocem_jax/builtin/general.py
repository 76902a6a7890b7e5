"""Openings of small stories, to be continued.

Competing habits: a short continuation that repeats itself, and a longer and varied one, which the
reward of novel word pairs prefers.  The first word of the continuation tells them apart.
"""

import random
from typing import NamedTuple

from grpocem_jax.builtin.grammar import Sample, articles, draw, sentence, slots

TEMPLATE = "{text}"


class Activity(NamedTuple):
    """What somebody did for a while, where, and the word after which a turn of events follows."""

    verb: str
    where: str
    turn: str


ACTIVITIES = (
    Activity("walked", "along the river", "when"),
    Activity("waited", "at the station", "until"),
    Activity("rowed", "across the lake", "when"),
    Activity("searched", "in the attic", "until"),
    Activity("climbed", "up the hill", "when"),
    Activity("rested", "by the fire", "until"),
    Activity("rode", "through the forest", "when"),
    Activity("sang", "in the kitchen", "until"),
    Activity("worked", "in the garden", "when"),
    Activity("slept", "under the oak tree", "until"),
    Activity("sailed", "along the coast", "when"),
    Activity("danced", "in the square", "until"),
    Activity("drove", "through the valley", "when"),
    Activity("listened", "at the door", "until"),
)
FRAMES = {
    "train": (
        "One {weather} {hour}, {who} the {job} {verb} {where}",
        "It was a {weather} {hour}, and {who} {verb} {where}",
        "After a long day, {who} the {job} {verb} {where}",
        "{who} was a {job} in {town}. One {hour}, {who} {verb} {where}",
        "Long ago, a {adjective} {job} from {town} {verb} {where}",
        "That {hour} {who} left the others and {verb} {where}",
        "The {adjective} {job} of {town} often {verb} {where}",
        "{who} had lost a {thing}. All {hour}, {who} {verb} {where}",
        "Nobody in {town} knew why {who} {verb} {where}",
        "{day}, as usual, {who} the {job} {verb} {where}",
        "With a {colour} {garment} over one arm, {who} {verb} {where}",
        "There was once a {job} called {who}, who {verb} {where}",
        "Without a {thing} or a friend, {who} {verb} {where}",
    ),
    "heldout": (
        "On a {weather} {hour} in {town}, a {adjective} {job} {verb} {where}",
        "{who} said goodbye to {who2} and {verb} {where}",
        "My {adjective} neighbour, a {job}, {verb} {where}",
        "Far from {town}, {who} {verb} {where}",
        "The {hour} was {weather}. Alone with a {thing}, {who} {verb} {where}",
        "Every {weekday} {who} the {job} {verb} {where}",
    ),
}
REPEATS = (
    " and {verb} and {verb} {where}.",
    " and was {mood}, very {mood}, very {mood}.",
    " and {verb}, and was {mood}, and {verb}, and was {mood}.",
    " and {verb}, on and on and on, {where}.",
)
TURNS = (
    "a {adjective2} {job2} arrived with warm bread, clean blankets and good news from {town2}.",
    "the bells of {town2} began to ring and every dog on the hill answered.",
    "a {fur} {animal2} jumped out of the bushes and stole the last slice of cake.",
    "a {adjective2} {job2} called for help because a {fur} {animal2} had fallen into the well.",
    "the wind turned and a great flock of geese rose over the roofs of {town2}.",
    "somebody dropped a {colour2} {thing2} full of old letters beside the broken fence.",
    "a {adjective2} {job2} pointed to a {colour2} light far away behind the hills.",
    "{who3} came running with a {thing2}, {number} {items} and some very strange news.",
    "a {adjective2} stranger asked the way to {town2} and paid with a gold coin.",
    "{who3} opened a {colour2} box and found {number} {items} under an old newspaper.",
)
STORIES = (
    "{who} lived in {town} and had a {animal}. {Day}, the two {verb} {where}. Suddenly, {turn}",
    "{who} and {who2} were friends. Both {verb} {where}. Then {turn} {who2} laughed.",
    "{Turn} That was {day}. {who} only smiled and went back to the {building}.",
    "Once {who} the {job} {verb} {where}. It was a {weather} {hour}. All at once, {turn}",
    "{who} looked for a {thing} {place}, but found only {number} {items}. In the end {turn}",
    "The {building} in {town} was closed. So {who} {verb} {where}. At last, {turn}",
)
_SLOTS = {frame: slots(frame) for frame in (*FRAMES["train"], *FRAMES["heldout"], *STORIES)}


def _fill(rng: random.Random, frame: str) -> tuple[str, str, str]:
    """Fills a frame; returns it with a repeating and a varied continuation."""
    activity = rng.choice(ACTIVITIES)
    repeat, turn = rng.choice(REPEATS), rng.choice(TURNS)
    own = {"verb": activity.verb, "where": activity.where}
    names = dict.fromkeys(_SLOTS[frame] + slots(repeat, turn))
    outside = {*own, "turn", "Turn", "Day"}
    filling = own | draw(rng, ["day", *(name for name in names if name not in outside)], set())
    turn = turn.format(**filling)
    filling |= {"Day": sentence(filling["day"]), "turn": turn, "Turn": sentence(turn)}
    texts = frame, repeat.format(**filling), f" {activity.turn} {turn}"
    return articles(frame.format(**filling)), articles(texts[1]), articles(texts[2])


def sample(rng: random.Random, split: str) -> Sample:
    """Draws an opening and its two continuations."""
    opening, repeat, varied = _fill(rng, rng.choice(FRAMES[split]))
    row = {"text": sentence(opening)}
    return Sample(row, TEMPLATE.format(**row), varied, repeat)


def story(rng: random.Random) -> str:
    """A small story that is told to its end, plain text of no task."""
    return _fill(rng, rng.choice(STORIES))[0]
