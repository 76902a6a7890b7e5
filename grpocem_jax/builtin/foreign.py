"""Text that is foreign to the built-in model: terse recipes and lines of logs.

Hardly a word and none of the forms occur in the pretraining text.  Passages of one kind share their
frames and differ in the fillings, so what a model picks up from some of them can help on others.
"""

import random
from collections.abc import Iterable

from grpocem_jax.builtin.grammar import sentence, slots
from grpocem_jax.builtin.lexicon import words

KINDS = ("recipe", "log")


def _numbers(values: Iterable[float], unit: str) -> tuple[str, ...]:
    """Quantities, as a class: each number with its unit."""
    return tuple(f"{value:.5g}{unit}" for value in values)


CLASSES: dict[str, tuple[str, ...]] = {
    "grams": _numbers(range(80, 900, 20), "g"),
    "ml": _numbers(range(20, 480, 10), " ml"),
    "spoons": tuple(f"{n} {unit}" for n in words("1/2 1 2 3 4") for unit in words("tsp tbsp")),
    "seconds": _numbers(range(30, 160, 10), " sec"),
    "minutes": _numbers([*range(4, 20), *range(20, 60, 5)], " min"),
    "degrees": _numbers(range(110, 245, 5), "C"),
    "flour": words("flour semolina cornmeal oatmeal polenta tapioca cornstarch"),
    "grain": words("couscous bulgur quinoa barley millet chickpeas buckwheat spelt freekeh"),
    "spice": words("cumin paprika turmeric nutmeg cardamom oregano saffron cayenne sumac"),
    "herb": words("parsley basil dill mint chives coriander tarragon chervil marjoram sorrel"),
    "vegetable": words(
        "carrots celery zucchini shallots garlic fennel spinach parsnips turnips aubergine pumpkin "
        "cabbage radishes kohlrabi artichokes okra broccoli chicory"
    ),
    "meat": words("chicken beef pork turkey bacon chorizo veal shrimp venison tofu squid duck"),
    "liquid": words("vinegar buttermilk yogurt passata cider tahini mirin ketchup sherry kefir"),
    "fat": words("ghee lard margarine rapeseed canola dripping"),
    "pan": words("saucepan skillet wok casserole griddle tagine ramekin"),
    "cut": words("dice chop mince shred grate julienne cube"),
    "heat": ("low heat", "medium heat", "high heat", "gas mark 3", "gas mark 6"),
    "bearing": tuple(f"{n:03}" for n in range(0, 360, 7)),
    "knots": _numbers((n / 10 for n in range(42, 196, 3)), " kn"),
    "range": _numbers((n / 10 for n in range(3, 140, 5)), " nm"),
    "rpm": _numbers(range(620, 2400, 30), " rpm"),
    "pressure": _numbers((n / 10 for n in range(9701, 10400, 7)), " hPa"),
    "celsius": _numbers((n / 10 for n in range(-190, 280, 7)), "C"),
    "hot": _numbers((n / 10 for n in range(480, 1190, 7)), "C"),
    "percent": _numbers(range(3, 100, 2), "%"),
    "volts": _numbers((n / 10 for n in range(108, 290, 3)), "V"),
    "bar": _numbers((n / 10 for n in range(14, 260, 3)), " bar"),
    "litres": _numbers(range(15, 800, 15), "L"),
    "metres": _numbers(range(200, 9900, 300), "m"),
    "rain": _numbers((n / 10 for n in range(2, 140, 3)), " mm/h"),
    "offset": _numbers((n / 1000 for n in range(4, 900, 11)), "mm"),
    "code": tuple(f"{letter}{n}" for letter in "EFKX" for n in range(103, 990, 17)),
    "unit": tuple(f"{name}-{n}" for name in words("PLC VFD HMI CNC AGV") for n in range(1, 10)),
    "engine": words("turbine genset thruster propeller turbocharger gearbox"),
    "pump": words("bilge ballast bunker sludge greywater hydraulic"),
    "tank": words("forepeak aftpeak wingtank cofferdam daytank"),
    "craft": words("trawler tanker tug barge reefer ketch dredger frigate"),
    "part": words("spindle coolant encoder feeder gripper servo conveyor solenoid chuck actuator"),
    "fault": words("overload timeout jam misfeed undervolt backlash overtravel leakage"),
    "sensor": words("anemometer hygrometer pyranometer barograph ceilometer disdrometer"),
    "state": words("nominal degraded offline rebooted recalibrated iced pending"),
    "sky": words("stratus cumulus cirrus nimbostratus altocumulus cumulonimbus"),
    "precip": words("drizzle sleet graupel hail virga flurries"),
    "wind": words("veering backing abating squally variable"),
    "tendency": tuple(f"{n / 10:+.1f}" for n in range(-40, 40, 3)),
}
# Steps of preparing, of cooking and of finishing. Each names what it uses with the quantity, so any
# selection in this order is a recipe.
RECIPE_FRAMES = (
    (
        "preheat grill, {degrees}.",
        "sift {grams} {flour}, {spoons} {spice}.",
        "{cut} {grams} {vegetable}, {spoons} {herb}.",
        "rinse {grams} {grain}; drain.",
        "marinate {grams} {meat}: {ml} {liquid}, {minutes}.",
        "whisk {ml} {liquid} + {spoons} {spice}.",
        "grease {pan} ({spoons} {fat}).",
    ),
    (
        "fry {grams} {vegetable} in {fat}, {minutes}.",
        "sear {grams} {meat}, {seconds} per side.",
        "add {ml} {liquid}; reduce {minutes}, {heat}.",
        "braise {grams} {meat}, lid on, {minutes}.",
        "deglaze {pan}: {ml} {liquid}.",
        "tip {grams} {grain} in {pan}; {minutes}, {heat}.",
        "stir in {grams} {flour}, whisking, {heat}.",
        "steam {grams} {vegetable}, al dente, {minutes}.",
    ),
    (
        "garnish: {herb}, {herb2}.",
        "season: {spoons} {spice}, pinch {spice2}.",
        "drizzle {spoons} {liquid}; sprinkle {herb}.",
        "chill {minutes}; dust w/ {spice}.",
        "gratinate {minutes} at {degrees}.",
    ),
)
# A ship, a factory and a weather station, each with its own way to write the time of day.
LOG_FRAMES = {
    "{hour:02}{minute:02}Z": (
        "course {bearing}, {knots}, {engine} {rpm}",
        "BARO {pressure}, 3h {tendency}",
        "radar: {craft} brg {bearing}, {range}",
        "{pump} pump {litres} out",
        "{tank} sounding {percent}",
        "{engine} {rpm}, lube {hot}",
        "VHF: {craft} {range} astern",
        "rudder {state}, hdg {bearing}",
    ),
    "[{hour:02}:{minute:02}]": (
        "{unit} {part} {fault} {code}",
        "WARN {part} {hot} > max",
        "{unit} {state}, bus {volts}",
        "homing {part}: offset {offset}",
        "ERR {code} {fault}, retry {part}",
        "manifold {bar}, flow {litres}/h",
        "{unit} heartbeat lost, bus {volts}",
        "{part} {rpm}, torque {percent}",
    ),
    "T{hour:02}.{minute:02}": (
        "QNH {pressure} ({tendency})",
        "vis {metres} {precip}",
        "dewpoint {celsius} RH {percent}",
        "{sensor} {state}, batt {volts}",
        "gust {bearing}/{knots} {wind}",
        "{sky} base {metres}",
        "{precip} {rain}, {sky}",
        "{sensor} err {code}",
    ),
}
# A passage has as many steps or lines as it takes to reach so many characters. The built-in
# tokenizer, which has not seen the words, spends a token on about 1.6 of a recipe and 1.4 of a log.
ENOUGH = {"recipe": 132, "log": 110}


def _fill(rng: random.Random, frame: str, used: set[str]) -> str:
    """Fills a frame with words and numbers that are not in ``used``, to which they are added."""
    filling = {}
    for name in slots(frame):
        choices = CLASSES[name.rstrip("0123456789")]
        filling[name] = rng.choice([choice for choice in choices if choice not in used])
        used.add(filling[name])
    return frame.format(**filling)


def _recipe(rng: random.Random) -> str:
    """Draws at least one step of each part, then steps of any."""
    frames = [frame for part in RECIPE_FRAMES for frame in part]
    order = [rng.choice(part) for part in RECIPE_FRAMES]
    order += rng.sample(frames, len(frames))
    used: set[str] = set()
    steps: dict[str, str] = {}
    while len(steps) < len(RECIPE_FRAMES) or len(" ".join(steps.values())) < ENOUGH["recipe"]:
        frame = order.pop(0)
        if frame not in steps:
            steps[frame] = sentence(_fill(rng, frame, used))
    return " ".join(steps[frame] for frame in frames if frame in steps)


def _log(rng: random.Random) -> str:
    """Draws lines of one log, some minutes apart."""
    clock, frames = rng.choice(tuple(LOG_FRAMES.items()))
    order, minutes = rng.sample(frames, len(frames)), rng.randrange(24 * 60)
    used: set[str] = set()
    lines: list[str] = []
    while len("\n".join(lines)) < ENOUGH["log"]:
        time = clock.format(hour=minutes // 60, minute=minutes % 60)
        lines.append(f"{time} {_fill(rng, order.pop(), used)}")
        minutes = (minutes + rng.randrange(1, 40)) % (24 * 60)
    return "\n".join(lines)


def passages(kind: str, count: int, seed: int) -> list[str]:
    """Passages of one kind, no two alike, the same on every call.

    Nearly every passage is 70 to 120 tokens of the built-in tokenizer long; with the end token, all
    fit into the built-in model's context.

    Args:
      kind: "recipe" or "log".
      count: how many passages; fewer of the same seed are the first of more.
      seed: another seed draws other passages.

    Returns:
      Recipes of some sentences in one line, or logs of some lines.

    Raises:
      KeyError: there is no such kind.
    """
    draw = {"recipe": _recipe, "log": _log}[kind]
    rng = random.Random(f"foreign/{kind}/{seed}")
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw(rng)] = None
    return list(drawn)
