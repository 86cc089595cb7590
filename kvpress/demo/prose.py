"""Seeded prose that never repeats a sentence: a haystack that no policy can win by spotting noise."""

import random
from collections.abc import Iterator

PLACES = (
    "harbour", "mill", "orchard", "library", "quarry", "chapel", "market square", "ferry landing", "schoolhouse",
    "observatory", "glass works", "railway yard", "north meadow", "cider cellar", "post office", "lighthouse",
    "botanical garden", "town archive", "tannery", "canal lock", "bell tower", "salt store", "weaving hall",
)  # fmt: skip
PEOPLE = (
    "the keeper", "an old surveyor", "the baker's daughter", "a travelling clerk", "the apprentice", "Doctor Hale",
    "the bookbinder", "a retired captain", "Mrs. Abernathy", "the night watchman", "a young botanist", "the carter",
    "Father Lorenz", "the clockmaker", "a visiting engineer", "the schoolteacher", "the miller's widow", "Ilse Moran",
    "the mapmaker", "a stranger from the coast", "the organist", "Tobias Reed", "the gardener", "a quiet lodger",
)  # fmt: skip
ACTS = (
    "repaired", "described", "misplaced", "copied", "examined", "borrowed", "painted", "measured", "catalogued",
    "forgot", "defended", "inherited", "sketched", "questioned", "polished", "wrapped", "returned", "admired",
)  # fmt: skip
THINGS = (
    "a brass compass", "the parish ledger", "a bundle of letters", "an unfinished violin", "the winter seed stock",
    "a cracked lantern", "the tide tables", "a box of lenses", "the eastern gate", "a borrowed overcoat",
    "the survey maps", "a copper kettle", "two wooden models", "the rainfall records", "a torn almanac",
    "an iron weather vane", "the visitors' book", "a tray of fossils", "the spare rudder", "a folded tapestry",
)  # fmt: skip
TIMES = (
    "before the frost", "late in the spring", "on the second market day", "after the flood", "during the long strike",
    "while the river was low", "in the year of the comet", "shortly after dawn", "towards the end of harvest",
    "when the bridge was closed", "one grey afternoon", "in the week of the fair", "at the turn of the tide",
    "as the lamps were lit", "through most of that autumn", "under the new council",
)  # fmt: skip
REASONS = (
    "because nobody else had offered to", "although the rain had not stopped", "so that the council would listen",
    "without telling the neighbours", "as if it had always been the custom", "since the road was still passable",
    "though the work took longer than planned", "for reasons that were never written down",
    "until the light was too poor to continue", "which pleased almost everyone",
    "and was thanked with a basket of pears",
    "to settle a quarrel about the boundary", "despite the advice of two lawyers", "in exchange for a week of lodging",
    "hoping that the letter would arrive in time", "and left before supper",
)  # fmt: skip
TEMPLATES = (
    "{Time}, {person} {act} {thing} near the {place} {reason}.",
    "{Person} {act} {thing} at the {place} {time}, {reason}.",
    "It was {time} that {person} {act} {thing} {reason}.",
    "At the {place}, {person} {act} {thing}, and {person2} {act2} {thing2} {time}.",
    "Few people at the {place} knew that {person} {act} {thing} {time}.",
    "{Person} told {person2} about {thing}, which somebody {act} {time} {reason}.",
    "What {person} remembered of the {place} was {thing}, {act} {time} {reason}.",
    "Neither {person} nor {person2} ever explained who {act} {thing} {time}.",
    "The story goes that {thing} was kept in the {place} until {person} {act} it {time}.",
    "Between the {place} and the {place2}, {person} {act} {thing} {reason}.",
)


def sentences(seed: int) -> Iterator[str]:
    """An endless stream of sentences, each different from all before it; the same seed gives the same stream."""
    generator = random.Random(seed)
    told: set[str] = set()
    while True:
        sentence = one_sentence(generator)
        if sentence not in told:
            told.add(sentence)
            yield sentence


def one_sentence(generator: random.Random) -> str:
    """Fill a random template."""
    time = generator.choice(TIMES)
    person, person2 = generator.sample(PEOPLE, 2)
    place, place2 = generator.sample(PLACES, 2)
    thing, thing2 = generator.sample(THINGS, 2)
    act, act2 = generator.sample(ACTS, 2)
    return generator.choice(TEMPLATES).format(
        Time=capitalised(time), time=time, Person=capitalised(person), person=person, person2=person2, place=place,
        place2=place2, thing=thing, thing2=thing2, act=act, act2=act2, reason=generator.choice(REASONS),
    )  # fmt: skip


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
