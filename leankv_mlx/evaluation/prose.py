"""Plausible English prose from a small grammar, and the names that generated facts are made of.

The prose serves as filler, evaluation text and demo documents.
A paragraph has a scene (one or two people, a place, a thing they care about); its sentences are
templates whose slots are filled from the scene or from word lists. The text is deterministic for
a seeded `random.Random`, has no digits and no proper names (so that it can never contain the
answer to a retrieval question by accident), and needs the standard library only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal


def words(block: str) -> list[str]:
    """The whitespace-separated words of a block: word lists stay readable, one thought a line."""
    return block.split()


Split = Literal["train", "calibration", "test"]
_MODULUS = 7
_RESIDUES: dict[Split, frozenset[int]] = {
    "train": frozenset(range(5)), "calibration": frozenset({5}), "test": frozenset({6}),
}  # fmt: skip

# Names for the facts of the retrieval tasks; the prose below never uses a place or a person's.
THINGS = words("""
archive hotel museum library harbour station theatre hospital factory bakery brewery school
laboratory gallery embassy stadium warehouse airport market bank cathedral observatory university
studio garage clinic restaurant shipyard refinery academy institute foundation nursery cinema
courthouse monastery zoo aquarium workshop vineyard quarry casino depot arena
""")
PLACES = words("""
Oslo Lima Cairo Bergen Quito Kyoto Dublin Tunis Havana Prague Lisbon Nairobi Helsinki Bogota Madrid
Warsaw Ankara Manila Seoul Zagreb Athens Geneva Boston Denver Toronto Jakarta Hanoi Riga Tallinn
Vilnius Sofia Bucharest Belgrade Vienna Zurich Milan Naples Turin Genoa Seville Porto Bilbao Lyon
Nantes Bordeaux Antwerp Ghent Rotterdam Utrecht Hamburg Bremen Dresden Leipzig Cologne Munich
Krakow Gdansk Brno Bratislava Budapest Odessa Minsk Tbilisi Yerevan Baku Tehran Baghdad Amman
Beirut Muscat Doha Karachi Lahore Delhi Mumbai Chennai Kolkata Colombo Dhaka Yangon Bangkok Hue
Phnom-Penh Saigon Shanghai Taipei Osaka Nagoya Sapporo Busan Perth Sydney Melbourne Auckland Suva
Honolulu Seattle Portland Oakland Phoenix Dallas Houston Chicago Detroit Memphis Atlanta Miami
Montreal Ottawa Quebec Calgary Winnipeg Halifax Bristol Leeds Glasgow Cardiff Belfast Cork Galway
Tromso Malmo Uppsala Aarhus Odense Reykjavik Turku Tampere Accra Lagos Dakar Bamako Kampala Kigali
Lusaka Harare Maputo Durban Windhoek Luanda Santiago Cordoba Rosario Asuncion Montevideo Recife
Salvador Caracas Medellin Cali Cusco Arequipa Panama Managua Oaxaca Puebla Tijuana Veracruz
""")
FIRST_NAMES = words("""
Clara Martin Helena Victor Ingrid Pablo Yusuf Amelia Tomas Greta Oscar Nadia Felix Miriam Hugo
Leila Anton Sylvia Bruno Teresa Konrad Dalia Edgar Paula Rafael Sonia Walter Irene Julian Vera
Marcus Elena Stefan Rosa Gustav Lydia Adrian Flora Casper Noemi Leonard Judith Emil Carla Dorian
Agnes Samuel Petra Roland Maya Albert Nora Simon Olga Dennis Hannah Rupert Celia Ivan Bertha
Lucian Frida Matteo Alma Boris Estelle Cedric Wanda Philip Zelda
""")
LAST_NAMES = words("""
Whitfield Garner Lindqvist Moreno Okafor Novak Hargrove Tanaka Delacroix Weiss Sorensen Pereira
Kowalski Abbott Castellan Fischer Mbeki Rowntree Vargas Petrov Halloran Nakamura Brandt Oliveira
Sinclair Haddad Jansen Corbett Romano Eriksen Blackwood Silva Kaplan Thornton Dubois Marchetti
Ashworth Ivanov Carmody Fontaine Bergstrom Quigley Santoro Holloway Reyes Underwood Kessler Barlow
Mancini Prescott Aalto Winslow Cordova Lockhart Yamada Fairbanks Dragan Pemberton Solberg Rivera
Trevino Hastings Zeller Montague Osborne Keating Laurent Stroud Valdez Merrick
""")
EPITHETS = words("""
silver golden crimson hidden frozen silent brave hungry ancient velvet broken electric gentle
wandering lucky midnight hollow burning clever dancing emerald distant feathered grumpy humble
iron jolly laughing mighty nimble orange patient quiet restless scarlet thirsty upright violet
wild young azure bitter copper drowsy eager fearless glowing honest invisible jade kind lonely
marble noble olive proud quick rusty sleepy tall unlikely vast weary amber bold calm dusty elder
faithful giant happy ivory lazy merry northern painted royal shy tiny vain whispering
""")
CREATURES = words("""
falcon badger tiger otter raven dolphin lantern compass tortoise heron panther walrus beetle
sparrow bison lynx cobra penguin anchor hammer thistle comet glacier meadow orchid pelican marmot
jackal ibis gazelle cactus drum feather goblet helmet kite ladder magnet needle oyster pebble quill
rocket saddle teapot umbrella violin willow yak zebra acorn boulder candle dagger eagle fountain
gander hedgehog island jaguar kettle lizard mirror nutmeg owl parrot rabbit salmon turtle unicorn
vulture weasel antler bear cricket donkey elk ferret goose hornet
""")
SHADES = words("""
pale deep dusty bright smoky soft dark warm cold muted vivid royal faded misty
light rich dull chalky glossy frosty milky stormy velvety washed tender brilliant sober glassy
""")
HUES = words("""
teal maroon indigo saffron turquoise magenta cobalt mauve russet lilac ochre cerise mustard coral
ivory crimson emerald ruby amber sapphire copper charcoal hazel plum jade peach olive lavender
""")
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
# Filler in which a fact stands out.
NOISE = [
    "The grass is green and the sky is blue.", "The river runs down to the sea.",
    "Here we go, there and back again.", "The sun is yellow and the night is dark.",
    "One day follows another, and the year goes round.",
]  # fmt: skip


def dealt(names: Sequence[str], split: Split) -> list[str]:
    """The part of a list of names that belongs to `split`.

    Names are dealt by position, numbers and made-up words by value, all modulo 7: residues 0-4
    are for training, 5 for calibration, 6 for test. A residue modulo 5 or 10 would show in the
    last digit of a number.
    """
    return [name for i, name in enumerate(names) if i % _MODULUS in _RESIDUES[split]]


def number(rng: random.Random, split: Split, digits: int) -> str:
    """A number of `digits` digits that belongs to `split`."""
    while True:
        value = rng.randrange(10 ** (digits - 1), 10**digits)
        if value % _MODULUS in _RESIDUES[split]:
            return str(value)


def made_up_word(rng: random.Random, split: Split) -> str:
    """Three syllables, such as "kavomi", of the share of `split`."""
    while True:
        indices = [rng.randrange(len(_SYLLABLES)) for _ in range(3)]
        if sum(indices) % _MODULUS in _RESIDUES[split]:
            return "".join(_SYLLABLES[i] for i in indices)


_PEOPLE = words("""
baker ferryman schoolteacher clockmaker surveyor beekeeper librarian carpenter nurse printer
gardener postman stonemason cartographer tailor violinist shepherd miller engineer botanist painter
innkeeper physician blacksmith fisherman astronomer weaver clerk widow apprentice traveller
magistrate glassblower potter captain watchman musician bookbinder orchardist lamplighter
journalist cooper
""")
_PLACES = words("""
harbour market orchard workshop library mill chapel station garden quarry vineyard schoolhouse
lighthouse kitchen courtyard theatre greenhouse boathouse bakery warehouse observatory meadow bridge
tavern tower pier granary cellar square foundry ropewalk hillside causeway stable
""")
_THINGS = words("""
letter ledger map lantern clock violin basket compass notebook kettle ladder rope key barrel
telescope painting bicycle blanket chair saddle loom bell parcel pump anvil cart sundial mirror
umbrella suitcase tapestry hammer window stove diary ship
""")
_MATERIALS = words("""
oak brass slate linen copper clay willow iron glass wool leather pine granite paper tin chalk silk
walnut bronze canvas
""")
_ADJECTIVES = words("""
narrow quiet old crooked broad pale heavy modest ancient bright damp sturdy faded plain crowded
handsome weathered simple remote busy dusty pleasant curious shallow steep familiar lonely spacious
neglected tidy strange cheerful gloomy elegant rough generous empty famous uneven splendid
""")
_MANNERS = words("""
patient careful stubborn cheerful thoughtful restless loyal shy proud gentle cautious practical
clever absent-minded sensible anxious good-humoured silent ambitious forgetful kindly sceptical
""")
_ADVERBS = words("""
slowly carefully quietly eagerly calmly reluctantly gladly patiently hastily politely firmly
cheerfully thoughtfully gently openly secretly promptly gravely awkwardly steadily
""")
_SUBSTANCES = words("""
bread tobacco rain salt coffee timber hay apples smoke lavender tar honey varnish moss
candle-wax cinnamon seaweed parchment pepper
""")
_TOPICS = [
    "the price of grain", "the coming election", "the new railway", "the quality of the water",
    "an old quarrel", "the best way to mend a roof", "the habits of swallows", "the tides",
    "a lost inheritance", "the repair of the bridge", "the music of the last festival",
    "the education of children", "the cause of the fire", "the history of the town",
    "the weather of the previous winter", "a curious dream", "the making of good paper",
    "the stars of the southern sky", "the cost of the journey", "the duties of a neighbour",
    "the proper care of fruit trees", "the failure of the bank", "a letter from abroad",
    "the strength of various woods", "the meaning of an old inscription",
]  # fmt: skip
_TIMES = [
    "In the early morning", "Towards evening", "On the first day of the fair", "Before the frost",
    "A week later", "During the long winter", "At the end of the summer", "Shortly after noon",
    "On market days", "When the rain had stopped", "In the following spring", "That same night",
    "Many years before", "After the harvest", "At first light", "While the others slept",
    "As soon as the road was dry", "On the eve of the holiday", "For most of the autumn",
    "Not long afterwards", "Once the guests had left", "Late in the afternoon",
]  # fmt: skip
_WEATHER = [
    "a thin mist lay over the {place}", "the wind came steadily from the {compass}",
    "the snow had begun to melt", "the sky was the colour of {material}",
    "a warm rain was falling on the {place}", "the sun stood low above the {place}",
    "the clouds moved quickly towards the {compass}", "there was thunder beyond the hills",
    "the frost had drawn patterns on the window", "the river had risen in the night",
]  # fmt: skip
_COMPASS = ["north", "south", "east", "west", "north-east", "south-west"]
_ACTIONS = [
    "repaired the {thing}", "walked to the {place}", "wrote a long letter to the {person}",
    "carried the {thing} across the {place}", "measured the {place} with a length of rope",
    "opened the door of the {place}", "painted the {thing} a dull green", "sold the {adj} {thing}",
    "spoke with the {person} about {topic}", "searched the {place} for the {material} {thing}",
    "borrowed a {thing} from the {person}", "counted the steps to the {place}",
    "planted a row of trees beside the {place}", "waited for the {person} at the {place}",
    "swept the floor of the {place}", "read aloud from a book about {topic}",
    "hung the {thing} beside the {material} door", "drew a plan of the {place}",
    "asked the {person} for advice", "learned the trade of a {person}",
]  # fmt: skip
_INFINITIVES = [
    "mend the {thing}", "leave the {place}", "visit the {person}", "buy a {material} {thing}",
    "finish the work before dark", "keep a record of {topic}", "clean the {thing}",
    "explain {topic} to the {person}", "build a second {place}", "find the {adj} {thing}",
    "return the {thing} to the {person}", "say nothing about {topic}", "rest for an hour",
    "follow the road to the {place}", "understand {topic}", "ask for a fair price",
]  # fmt: skip
_REASONS = [
    "because the {thing} was too {adj}", "since nobody else in the {place} cared about {topic}",
    "although the {person} had advised against it", "as the {person} had always done",
    "for the {place} was {adj} at that hour", "so that the {person} would not be disturbed",
    "even though {weather}", "because there was little else to do", "while {weather}",
    "as if {topic} were the only thing that mattered", "in spite of the smell of {substance}",
]  # fmt: skip
_SAYINGS = [
    "a {adj} {thing} is better than none", "every {place} has its own rules",
    "nothing is learned about {topic} in a single day", "good {substance} is worth the money",
    "the {person} had been right from the beginning", "patience costs less than a new {thing}",
    "it was too late to {infinitive}", "the {place} would look different in the spring",
    "one should never lend a {thing} to a {person}", "there was still time to {infinitive}",
]  # fmt: skip
_OPENINGS = [
    "The {a} {hero} lived beside a {adj} {scene} and thought often about {topic}.",
    "Everyone who came to the {scene} knew the {hero}, a {a} and {manner} soul.",
    "{time}, the {hero} {action}, and nobody in the {scene} was surprised.",
    "There was once a {adj} {scene} where a {a} {hero} kept a {prop}.",
    "Of all the buildings in the town, the {scene} was the most {adj}.",
    "Few people remember how the {hero} of the {adj} {scene} came to own a {material} {prop}.",
    "{time}, {weather}, and the {scene} smelled of {substance}.",
    "The story of the {prop} begins in the {scene}, where the {hero} worked with a {friend}.",
]  # fmt: skip
_SENTENCES = [
    "{time}, {pronoun} {action}.", "{time}, the {friend} {action} {reason}.",
    "The {friend} wanted to {infinitive}, but the {hero} preferred to {infinitive}.",
    "It was said that {saying}.", "The {prop} was made of {material} and smelled of {substance}.",
    "{Pronoun} had never tried to {infinitive} {reason}.",
    "On the table lay a {thing}, a {adj} {thing} and a handful of {substance}.",
    "The {hero} and the {friend} talked {adverb} about {topic} until {weather}.",
    "“I would rather {infinitive},” said the {friend} {adverb}.",
    "“If you want to {infinitive},” the {hero} answered, “you must first {infinitive}.”",
    "Nobody could say whether the {person} had {participle} the {thing} or only hidden it.",
    "Between the {scene} and the {place} ran a {adj} path, lined with {material} posts.",
    "{Pronoun} {adverb} {action}, and then {action}.",
    "The {adj} {thing} in the corner reminded {object} of {topic}.",
    "Some believed that {saying}; others only laughed.",
    "From the {place} one could see the {place}, the {place} and, on clear days, the {adj} hills.",
    "What troubled the {friend} most was {topic}.",
    "Whenever {weather}, the {hero} would {infinitive} and think about {topic}.",
    "The {person} who owned the {place} was {manner}, {manner} and seldom wrong.",
    "To {infinitive} was easy; to {infinitive} took the whole season.",
    "A {manner} {person} from the {place} offered to {infinitive}.",
    "{time}, {weather}.", "It took {object} three days to {infinitive}.",
    "In the end the {hero} decided to {infinitive}, {reason}.",
    "The {friend} had brought a {material} {thing}, which the {hero} {adverb} {participle}.",
    "Both of them knew that {saying}, yet neither spoke of it.",
    "No {thing} in the {scene} was as {adj} as the {prop}.",
    "The road to the {place} was {adj} and {adj}, {reason}.",
    "How the {prop} had come to the {scene} was a matter of some dispute.",
    "By then the {person} had {participle} the {thing}, and the {friend} {action}.",
]  # fmt: skip
_CLOSINGS = [
    "After that, the {scene} was never quite so {adj} again.",
    "The {friend} {action}, and the matter was forgotten.",
    "So it was that the {hero} learned that {saying}.",
    "{time}, the {prop} was still there, {adj} and {adj}.",
    "The {hero} smiled {adverb} and went home {reason}.",
]
_PARTICIPLES = words("""
sold repaired admired examined lost polished borrowed weighed unwrapped measured mended
""")

_WORDS: dict[str, list[str]] = {
    "person": _PEOPLE, "place": _PLACES, "thing": _THINGS, "material": _MATERIALS,
    "adj": _ADJECTIVES, "manner": _MANNERS, "adverb": _ADVERBS, "substance": _SUBSTANCES,
    "topic": _TOPICS, "time": _TIMES, "weather": _WEATHER, "compass": _COMPASS,
    "action": _ACTIONS, "infinitive": _INFINITIVES, "reason": _REASONS, "saying": _SAYINGS,
    "participle": _PARTICIPLES,
}  # fmt: skip
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


@dataclass(frozen=True)
class _Scene:
    """What one paragraph is about; its values fill the slots of the same names."""

    words: dict[str, str]

    @staticmethod
    def draw(rng: random.Random) -> _Scene:
        hero, friend = rng.sample(_PEOPLE, 2)
        pronoun, other = rng.choice([("he", "him"), ("she", "her")])
        return _Scene({
            "hero": hero, "friend": friend, "a": rng.choice(_MANNERS),
            "scene": rng.choice(_PLACES), "prop": rng.choice(_THINGS),
            "pronoun": pronoun, "Pronoun": pronoun.capitalize(), "object": other,
        })  # fmt: skip


def _expand(rng: random.Random, template: str, scene: _Scene) -> str:
    """Fill the slots of `template` until none is left; a template's word lists do not nest deep."""
    while "{" in template:
        template = _SLOT.sub(
            lambda slot: scene.words.get(slot[1]) or rng.choice(_WORDS[slot[1]]), template
        )
    sentence = _ARTICLE.sub(r"\1n ", template)
    return sentence[0].upper() + sentence[1:]


def paragraph(rng: random.Random) -> list[str]:
    """The sentences (3 to 8) of one paragraph."""
    scene = _Scene.draw(rng)
    middle = rng.sample(_SENTENCES, rng.randint(2, 6))
    templates = [rng.choice(_OPENINGS), *middle]
    if rng.random() < 0.5:
        templates.append(rng.choice(_CLOSINGS))
    return [_expand(rng, template, scene) for template in templates]


def paragraphs(rng: random.Random) -> Iterator[str]:
    """Paragraphs without end, each one line of text."""
    while True:
        yield " ".join(paragraph(rng))


def sentences(rng: random.Random) -> Iterator[str]:
    """The sentences of `paragraphs`, one by one."""
    while True:
        yield from paragraph(rng)


def text(rng: random.Random, characters: int) -> str:
    """At least `characters` of prose, in whole paragraphs separated by blank lines."""
    if characters < 0:
        raise ValueError(f"[text] expected characters >= 0, got {characters}.")
    parts: list[str] = []
    size = 0
    for part in paragraphs(rng):
        if size >= characters:
            break
        parts.append(part)
        size += len(part) + 2
    return "\n\n".join(parts)
