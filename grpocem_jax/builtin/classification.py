"""News-like snippets of five topics, most on one special subject, some on the topic at large.

Competing habits: to name the topic, which is asked for, and to name the special subject where
there is one.
"""

import random
from typing import NamedTuple

from grpocem_jax.builtin.grammar import Sample, draw, sentence

TEMPLATE = "Text: {text}\nTopic:"
LABELS = ("sports", "science", "business", "food", "travel")


class Subject(NamedTuple):
    """A subject's name, who takes part in it and what any of them may have done."""

    name: str
    actors: tuple[str, ...]
    deeds: tuple[str, ...]


def _subject(name: str, actors: str, deeds: str) -> Subject:
    return Subject(name, tuple(actors.split("; ")), tuple(deeds.split("; ")))


# The first subject of each topic is the topic itself.
SUBJECTS = {
    "sports": (
        _subject(
            "sports",
            "the athletes; the national team; the young champion",
            "hoped for a gold medal; got ready for the championship; celebrated a great victory; "
            "missed the final by one point; trained hard before the match",
        ),
        _subject(
            "football",
            "the home team; the young striker; the team in red",
            "scored twice in the second half; won a late penalty; hit the post before the break; "
            "headed the ball into the net",
        ),
        _subject(
            "tennis",
            "the top seed; the left-handed player; last year's winner",
            "won in straight sets; lost the first set; served nine aces; hit the ball into the "
            "net at match point",
        ),
        _subject(
            "swimming",
            "the fastest girl in the pool; the relay team; the butterfly champion",
            "set a record over two hundred metres; touched the wall first; slipped on the "
            "starting block; swam the last length alone",
        ),
        _subject(
            "cycling",
            "the leader of the tour; the sprinter; a rider in yellow",
            "broke away on the last climb; had a flat tyre near the finish; won the mountain "
            "stage; crashed on a wet bend",
        ),
        _subject(
            "rowing",
            "the crew of eight; the women's crew; the college crew",
            "won by half a length; broke an oar at the start; was first at the last buoy; steered "
            "into the bank",
        ),
    ),
    "science": (
        _subject(
            "science",
            "the researchers; a professor; the institute",
            "published a careful study; repeated the experiment; tested a bold theory; shared the "
            "data with the world; doubted the first results",
        ),
        _subject(
            "astronomy",
            "a team with a large telescope; two watchers of the night sky; the observatory",
            "discovered a new comet; measured the light of a distant star; found a ring around a "
            "small planet; mapped the craters of the moon",
        ),
        _subject(
            "biology",
            "a team in the rain forest; a marine laboratory; two students of insects",
            "described a new species; examined the cells of a leaf; watched how a rare moss "
            "grows; found a gene for blue petals",
        ),
        _subject(
            "chemistry",
            "a laboratory full of flasks; the inventor of a new acid; an expert on dyes",
            "found a cheaper catalyst; heated the salt until it melted; made crystals grow in a "
            "flask; turned the liquid into a gas",
        ),
        _subject(
            "physics",
            "a group at the accelerator; a laser laboratory; an expert on magnets",
            "measured the mass of a particle; cooled the atoms with a laser; built a magnet of "
            "record strength; timed the fall of a tiny sphere",
        ),
        _subject(
            "geology",
            "a survey team; two experts on rocks; an expedition to the volcano",
            "dated the layers of a cliff; drilled into very old rock; traced the fault under the "
            "valley; collected samples of lava",
        ),
    ),
    "business": (
        _subject(
            "business",
            "the company; the family firm; the group",
            "reported higher profits; expects a weak quarter; announced a merger; found new "
            "investors; replaced its director",
        ),
        _subject(
            "banking",
            "a large lender; the savings house; the biggest lender in the country",
            "raised its interest rates; refused new loans; offered cheaper mortgages; lowered the "
            "fees on accounts",
        ),
        _subject(
            "retail",
            "a chain of stores; the old department store; the discount chain",
            "cut its prices before the sale; hired more cashiers; put new tills near the door; "
            "kept its shop windows lit all night",
        ),
        _subject(
            "shipping",
            "a freight line; the port operator; the owner of twelve cargo ships",
            "ordered larger container ships; waited for space in the docks; raised the price of "
            "each container; sent its freight around the cape",
        ),
        _subject(
            "mining",
            "the owner of a copper pit; a coal producer; the gold producer",
            "dug a deeper shaft; shut its oldest pit; found a rich vein of ore; sold its drills "
            "to a rival",
        ),
        _subject(
            "insurance",
            "an insurer; the old insurer; the largest insurer of houses",
            "paid for the flood damage; raised its premiums; refused a claim after the fire; "
            "wrote cheaper policies for drivers",
        ),
    ),
    "food": (
        _subject(
            "food",
            "the chef; a famous cook; the new kitchen",
            "prepared a tasty dinner; changed the menu for spring; served lunch to sixty guests; "
            "won praise for a simple dish; shared a secret recipe",
        ),
        _subject(
            "baking",
            "the cake stall; a pastry cook; the owner of a brick oven",
            "rolled the dough very thin; filled the tarts with plums; let the loaves rise "
            "overnight; brushed the buns with butter",
        ),
        _subject(
            "cheese",
            "a dairy in the hills; a herdsman; the goat farm",
            "aged the wheels in a cave; stirred the curds by hand; pressed the curds into moulds; "
            "washed the rind with salt water",
        ),
        _subject(
            "coffee",
            "a small roaster; the barista; the corner bar",
            "roasted the beans slowly; ground the beans for each cup; poured a perfect espresso; "
            "frothed the milk for a latte",
        ),
        _subject(
            "soup",
            "the canteen; a grandmother; the inn",
            "simmered the leeks for an hour; thickened the broth with cream; served a bowl of hot "
            "lentils; boiled the bones for stock",
        ),
        _subject(
            "chocolate",
            "a sweet maker; the confectioner; the praline shop",
            "melted the cocoa butter; filled the truffles with cream; mixed the cocoa with nuts; "
            "wrapped the pralines in gold foil",
        ),
    ),
    "travel": (
        _subject(
            "travel",
            "the tourists; many visitors; a couple on holiday",
            "spent two weeks by the sea; looked for a cheap hotel; took pictures of the old "
            "harbour; bought a guidebook and a map; sent postcards to their friends",
        ),
        _subject(
            "hiking",
            "a group of walkers; two friends in heavy boots; the mountain guide",
            "followed the trail to the summit; crossed the pass before the snow came; lost the "
            "path in the fog; rested at a hut below the peak",
        ),
        _subject(
            "cruises",
            "the guests on deck; a couple on the liner; the captain of the liner",
            "enjoyed the view from the upper deck; left the ship for a day on the island; danced "
            "in the ballroom of the ship; moved to a cabin with a porthole",
        ),
        _subject(
            "camping",
            "a family with a tent; three scouts; a young couple with a tent",
            "slept beside a lake; lit a fire outside the tent; shivered in thin sleeping bags; "
            "packed the tent in the rain",
        ),
        _subject(
            "railways",
            "two passengers; a retired teacher; a girl with a rail pass",
            "took the night train to the coast; slept in the carriage until the border; changed "
            "trains at a tiny station; watched the hills from the dining car",
        ),
        _subject(
            "flying",
            "a family at the gate; two backpackers; a late passenger",
            "missed the last plane home; checked in two bags at the airport; waited for the plane "
            "to land; fell asleep before take-off",
        ),
    ),
}
# Slots: an actor, a deed, and where or when it was.
FRAMES = {
    "train": (
        "{Actor} {deed} {day}.",
        "{Day}, {actor} {deed}.",
        "In {town}, {actor} {deed} {day}.",
        "{Actor} {deed}, a local paper reports.",
        "According to a reporter in {town}, {actor} {deed}.",
        "{Actor} {deed} last week.",
        "News from {town}: {actor} {deed}.",
        "Last month, {actor} {deed}, and hardly anyone noticed.",
        "It was a busy day in {town}: {actor} {deed}.",
        "This week {actor} {deed}, the radio said.",
        "As we heard {day}, {actor} {deed}.",
        "{Actor} {deed}, and all of {town} talked about it.",
        "{Town}, {weekday}: {actor} {deed}.",
    ),
    "heldout": (
        "Yesterday {actor} {deed}.",
        "The {town} Herald writes that {actor} {deed}.",
        "{Actor} {deed} earlier this year.",
        "A reader from {town} saw how {actor} {deed}.",
        "Shortly after noon {day}, {actor} {deed}.",
        "People in {town} say that {actor} {deed}.",
    ),
}
BROAD_SHARE = 0.3


def sample(rng: random.Random, split: str) -> Sample:
    """Draws a snippet, the name of its topic and the name of its subject."""
    label = rng.choice(LABELS)
    broad, *special = SUBJECTS[label]
    subject = broad if rng.random() < BROAD_SHARE else rng.choice(special)
    frame = rng.choice(FRAMES[split])
    filling = {"actor": rng.choice(subject.actors), "deed": rng.choice(subject.deeds)}
    filling |= draw(rng, ("town", "day", "weekday"), set())
    filling |= {name.title(): sentence(part) for name, part in filling.items()}
    row = {"text": frame.format(**filling), "label": label}
    return Sample(row, TEMPLATE.format(**row), f" {label}.", f" {subject.name}.")
