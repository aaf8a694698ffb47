"""A grammar of short stories: what the tiny model learns its English from.

A template is text with choices in brackets, "[a|b|c]", which may nest, and slots in
braces, "{hero}", which are filled once for a whole story, so that names, pronouns and
things stay the same from its first sentence to its last.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mlxtp.stories.plots import ENDINGS, OPENINGS, PLOTS, WEATHER


def words(text: str) -> list[str]:
    """Split at white space."""
    return text.split()


def phrases(text: str) -> list[str]:
    """Split at bars."""
    return [" ".join(phrase.split()) for phrase in text.split("|")]


GIRLS = words(
    """
    Mia Lily Anna Sara Emma Rosa Nina Ella Lucy Zoe Ada Clara Ruby Maya Ivy Grace Alice
    Eva Molly Tara Nora Hana Lena Amy Kate Daisy Olga Priya Yuki Fatima Sue Jane Mary
    """
)
BOYS = words(
    """
    Tom Ben Max Sam Leo Tim Jack Finn Noah Oscar Hugo Adam Theo Luis Omar Ned Paul Felix
    Peter Dan Jim Henry Otto Kofi Ravi Ivan Milo Bob Joe Alex David Mark John
    """
)
PETS = words("Pip Dot Coco Bram Tuli Fern Mops Bibi Rusty Pepper Momo Hazel Kip Nutty")
ANIMALS = words(
    """
    fox rabbit bear mouse duck frog cat dog hen pig squirrel hedgehog turtle mole lamb
    pony goat deer bee crow otter badger beaver wolf elephant lion dragon robot bird
    monkey snail penguin horse cow fish
    """
)
MEN = words(
    """
    king farmer baker sailor wizard giant prince knight miller painter tailor fisherman
    shepherd gardener teacher doctor old_man
    """
)
WOMEN = words(
    """
    queen farmer baker sailor witch princess teacher painter tailor cook gardener doctor
    old_woman
    """
)
LOOKS = words(
    "little small young brave shy kind clever happy funny quiet merry tiny hungry lazy"
)
WISE = words("old wise kind friendly gentle clever tall big")
FAMILY = (
    ("Grandma", True),
    ("Grandpa", False),
    ("Mother", True),
    ("Father", False),
    ("Mom", True),
    ("Dad", False),
)
PLACES = phrases(
    """
    in the forest| in the garden| in the meadow| in the village| in the park| in the
    barn| in the woods| in the field| in the valley| by the river| by the lake| by the
    pond| by the sea| on the hill| on the beach| on the farm| on the island| at the
    market| at the mill| at the castle| near the bridge| near the mountain| near the old
    tower
    """
)
COLORS = words("red blue green yellow golden silver white purple")
TOYS = words(
    """
    ball kite boat drum hat book bell doll lamp key scarf spoon cup ring map flute coat
    basket button wagon box blanket clock
    """
)
FOODS = phrases(
    """
    bread| soup| apples| berries| honey| cake| nuts| cheese| milk| cookies| carrots|
    pears| tea| pancakes| corn| pie
    """
)
HIDING = phrases(
    """
    under the bed| behind the door| in the tall grass| under a pile of leaves| inside a
    boot| on top of the wall| in a basket| beside the well| in the hay| between two
    stones| under a bush| in a hollow tree| behind the fence| under the table
    """
)
FRUITS = words("apples pears plums cherries berries nuts")
CRAFTS = words("boat kite house bridge cart tower ship chair raft swing wall drum")
FEARS = phrases(
    """
    the dark| the water| the storm| loud noises| the deep woods| high places| big dogs|
    the moon| the cold river| being alone
    """
)
SYLLABLES = words(
    """
    ba be bo da de di do fa fi ga go ha ja ka ki la le li lo lu ma mi mo na ne ni no pa
    po ra ri ro sa si ta te to va vi wa wi za zo bri gra tho she qua plu
    """
)
CODAS = ("", "", "n", "l", "r", "s", "x", "ck", "th", "m", "d", "ll", "ng", "ph")


@dataclass(frozen=True)
class Character:
    """Who takes part: how a story first speaks of them, and how it does afterwards."""

    intro: str
    name: str
    female: bool


def a(phrase: str) -> str:
    """Put the right indefinite article before a phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def upper(text: str) -> str:
    """Make the first letter a capital."""
    return text[0].upper() + text[1:]


def made_up_name(rng: Random) -> str:
    """Return a name that nobody has, so that a model must copy it to keep to it."""
    syllables = rng.choices(SYLLABLES, k=rng.choice((2, 2, 3)))
    return upper("".join(syllables) + rng.choice(CODAS))


def character(rng: Random, looks: Sequence[str] = LOOKS) -> Character:
    """Draw a child, an animal with or without a name, or somebody with a trade."""
    female = rng.random() < 0.5
    look = rng.choice(looks)
    invented = rng.random() < 0.25
    kind = rng.random()
    if kind < 0.36:
        name = made_up_name(rng) if invented else rng.choice(GIRLS if female else BOYS)
        noun = "girl" if female else "boy"
        noun = noun if rng.random() < 0.5 else f"{rng.choice(LOOKS)} {noun}"
        called = rng.choice(("named", "named", "called"))
        return Character(f"{a(noun)} {called} {name}", name, female)
    if kind < 0.5:
        name = made_up_name(rng) if invented else rng.choice(PETS)
        noun = f"{look} {rng.choice(ANIMALS)}"
        called = rng.choice(("named", "named", "called"))
        return Character(f"{a(noun)} {called} {name}", name, female)
    if kind < 0.77:
        noun = rng.choice(ANIMALS)
    else:
        noun = rng.choice(WOMEN if female else MEN).replace("_", " ")
    name = f"the {noun}" if rng.random() < 0.6 else f"the {look} {noun}"
    noun = noun if " " in noun else f"{look} {noun}"
    return Character(a(noun), name, female)


def nouns(character: Character) -> set[str]:
    """Return the words by which a character is known."""
    known = {*character.intro.split(), *character.name.split()}
    return known - {*LOOKS, *WISE, *words("a an the girl boy named called")}


def helper(rng: Random, hero: Character, family: bool) -> Character:
    """Draw a second character who cannot be taken for the first."""
    if family and rng.random() < 0.3:
        name, female = rng.choice(FAMILY)
        return Character(name, name, female)
    while True:
        other = character(rng, WISE)
        if not nouns(hero) & nouns(other):
            return other


def pronouns(prefix: str, character: Character) -> dict[str, str]:
    """Return the slots that speak of a character: "he" stands for "she" as well."""
    he, him, his = ("she", "her", "her") if character.female else ("he", "him", "his")
    slots = {"he": he, "him": him, "his": his, "self": him + "self"}
    short = character.name.removeprefix("the ")
    slots |= {"short": short, "a_short": a(short) if short.islower() else short}
    slots |= {"intro": character.intro, "name": character.name}
    slots |= {upper(slot): upper(text) for slot, text in slots.items()}
    return {prefix + slot: text for slot, text in slots.items()}


def slots(rng: Random, family: bool) -> dict[str, str]:
    """Draw all that stays the same throughout one story."""
    hero = character(rng)
    friend = helper(rng, hero, family)
    place, there = rng.sample(PLACES, 2)
    toy, other_toy = rng.sample(TOYS, 2)
    color = rng.choice(COLORS)
    food, other_food = rng.sample(FOODS, 2)
    animal = rng.choice(sorted({*ANIMALS} - nouns(hero) - nouns(friend)))
    return {
        **pronouns("", hero),
        **pronouns("f_", friend),
        "in_place": place,
        "place": place.split(" ", 1)[1],
        "in_there": there,
        "there": there.split(" ", 1)[1],
        "toy": toy,
        "a_toy": a(f"{color} {toy}"),
        "color": color,
        "an_other": f"an old {other_toy}",
        "food": food,
        "other_food": other_food,
        "hiding": rng.choice(HIDING),
        "animal": animal,
        "fruit": rng.choice(FRUITS),
        "craft": rng.choice(CRAFTS),
        "fear": rng.choice(FEARS),
    }


def expand(rng: Random, template: str) -> str:
    """Settle every choice in a template, innermost first."""

    def choose(match: re.Match[str]) -> str:
        return rng.choice(match[1].split("|"))

    choice = re.compile(r"\[([^\[\]]*)\]")
    while choice.search(template):
        template = choice.sub(choose, template)
    return template


def story(rng: Random) -> str:
    """Tell one story, of about a hundred words in one paragraph."""
    plot = rng.choice(PLOTS)
    opening = plot.opening if rng.random() < 0.3 else f"{OPENINGS} {plot.start}"
    weather = WEATHER if rng.random() < 0.3 else ""
    ending = ENDINGS if rng.random() < 0.6 else plot.ending
    parts = (opening, weather, *plot.stages, ending)
    text = " ".join(expand(rng, part) for part in parts).format_map(
        slots(rng, plot.family)
    )
    return upper(
        re.sub(r"(?<=[.!?] )[a-z]", lambda m: m[0].upper(), " ".join(text.split()))
    )
