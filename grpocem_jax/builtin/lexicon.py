"""Word classes shared by the grammars of the five tasks.

Every member of a class fits every frame that names the class.  Prepositional classes (``place``,
``day``, ``clock``) carry their preposition.
"""


def words(text: str) -> tuple[str, ...]:
    """The words of a line, as a class."""
    return tuple(text.split())


WHO = words(
    "Anna Tom Clara Peter Rosa Henry Lucy Oscar Emma Felix Nora Victor Julia Martin Sofia Daniel "
    "Alice Simon Helen Robert Greta Leo Maria David Ella Paul Irene Max Ruth Adam Vera Ben"
)
TOWN = words(
    "Millbrook Ashford Linton Harwick Oakdale Redcliff Norwell Fernhill Stonebridge Kingsport "
    "Westby Larkfield"
)
THING = words(
    "kettle lamp basket clock drum kite ladder map umbrella violin blanket lantern bucket rope "
    "vase mirror saddle apron teapot camera compass suitcase hammer whistle"
)
PLACE = (
    "in the cellar",
    "behind the barn",
    "under the stairs",
    "near the well",
    "in the attic",
    "beside the stove",
    "in the garden",
    "on the balcony",
    "under the bench",
    "behind the shed",
    "in the kitchen",
    "near the gate",
    "beside the pond",
    "in the hallway",
    "on the porch",
    "under the oak tree",
)
BUILDING = (
    "library",
    "market",
    "museum",
    "harbour",
    "bakery",
    "school",
    "station",
    "mill",
    "theatre",
    "post office",
    "castle",
    "hospital",
    "chapel",
    "town hall",
)
WEEKDAY = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
HOUSE = ("bakery", "mill", "theatre", "castle", "museum", "dairy", "boathouse", "inn")
DAY = tuple(f"on {day}" for day in WEEKDAY)
CLOCK = tuple(f"at {hour}" for hour in words("noon dawn midnight six seven eight nine ten"))
COLOUR = words("red blue green yellow white black brown purple grey orange")
NUMBER = words("two three four five six seven eight nine ten twelve twenty thirty")
ITEMS = words("eggs apples candles bottles jars buttons coins keys pears shells stamps pots")
JOB = words(
    "baker doctor teacher sailor farmer painter tailor gardener pilot nurse carpenter fisherman "
    "musician engineer actor"
)
REASON = (
    "it was raining",
    "the road was icy",
    "the bus was late",
    "the shops were closed",
    "the bridge was closed",
    "the car broke down",
    "a guest had arrived",
    "the dog was ill",
    "the snow was deep",
    "the train was full",
)
PART = words("door fence gate chair boat roof wall table shed bench cupboard")
DISH = (
    "fish soup",
    "roast lamb",
    "rice pudding",
    "onion pie",
    "mushroom stew",
    "fried eggs",
    "pancakes",
    "noodles",
    "baked potatoes",
    "bean salad",
)
INSTRUMENT = words("flute guitar trumpet clarinet fiddle banjo accordion mandolin")
ANIMAL = words("dog cat rabbit parrot puppy kitten hen hamster goat lamb")
GARMENT = words("coat hat scarf shirt jacket cap cloak waistcoat")
FISH = words("trout eels crabs carp perch salmon")
WATER = (
    "in the river",
    "in the lake",
    "off the pier",
    "in the bay",
    "near the weir",
    "in the canal",
)
SUBJECT = words("history music drawing geography Latin chess algebra botany French dancing")
CONTEST = ("chess cup", "spelling contest", "baking prize", "swimming race", "poetry prize")
FUR = words("white black brown grey spotted wild")
MOOD = words("tired happy cold lonely quiet cheerful sad calm thirsty hungry")
ADJECTIVE = words("cheerful friendly old young shy clever tall kind elderly")
WEATHER = words("cold warm windy foggy rainy quiet grey mild")
HOUR = ("morning", "evening", "afternoon", "night")

CLASSES: dict[str, tuple[str, ...]] = {
    "who": WHO,
    "town": TOWN,
    "thing": THING,
    "place": PLACE,
    "building": BUILDING,
    "weekday": WEEKDAY,
    "house": HOUSE,
    "day": DAY,
    "clock": CLOCK,
    "colour": COLOUR,
    "number": NUMBER,
    "items": ITEMS,
    "job": JOB,
    "reason": REASON,
    "part": PART,
    "dish": DISH,
    "instrument": INSTRUMENT,
    "animal": ANIMAL,
    "garment": GARMENT,
    "fish": FISH,
    "water": WATER,
    "subject": SUBJECT,
    "contest": CONTEST,
    "fur": FUR,
    "mood": MOOD,
    "adjective": ADJECTIVE,
    "weather": WEATHER,
    "hour": HOUR,
}
