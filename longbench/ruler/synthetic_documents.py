"""An offline stand-in for SQuAD and HotpotQA: invented people, their towns and trades.

The scores are not comparable with scores on the real sets, so results name the data "synthetic documents".
"""

from random import Random

from .documents import DocumentQuestion, DocumentSet

_ONSETS = ("B", "D", "F", "G", "H", "K", "L", "M", "N", "P", "R", "S", "T", "V", "W", "Br", "Cr", "Dr", "St", "Tr")
_MIDDLES = ("al", "an", "ar", "el", "en", "er", "il", "in", "ol", "on", "or", "ul", "un", "ath", "esk", "ond")
_PERSON_ENDS = ("a", "o", "ia", "us", "ek", "ina")
_TOWN_ENDS = ("burg", "ford", "haven", "mouth", "stead", "wick")
_TRADES = (
    "clockmaker",
    "glassblower",
    "surveyor",
    "botanist",
    "printer",
    "cartographer",
    "weaver",
    "engraver",
    "beekeeper",
    "organist",
    "shipwright",
    "locksmith",
    "chemist",
    "translator",
    "mason",
    "apothecary",
)
_GOODS = ("salt", "wool", "copper", "cider", "paper", "amber", "rope", "linen", "pottery", "honey", "slate", "tea")


def synthetic_documents(count: int, *, seed: int, hops: int = 1) -> DocumentSet:
    """`count` people and their towns, one short document each, and `count` questions.

    Args:
        count: number of people, at least 1.
        seed: equal seeds give equal sets.
        hops: 1 asks for a fact of one document (`qa_1`); 2 for what the town of a person is known for (`qa_2`).
    """
    rng = Random(f"synthetic documents/{seed}")
    people = _names(count, _PERSON_ENDS, rng, words=2)
    towns = _names(count, _TOWN_ENDS, rng, words=1)
    documents: list[str] = []
    questions: list[DocumentQuestion] = []
    for person, town in zip(people, towns, strict=True):
        trade, goods = rng.choice(_TRADES), rng.choice(_GOODS)
        born, founded = rng.randrange(1700, 1950), rng.randrange(900, 1700)
        documents.append(
            f"{person} was a {trade} who was born in {born} and lived in {town}. "
            f"Friends of {person} praised the patience with which every piece was finished."
        )
        documents.append(
            f"{town} is a town founded in {founded}. It is known for its {goods}, which is traded every autumn."
        )
        gold = (len(documents) - 2, len(documents) - 1)
        if hops == 2:
            question = DocumentQuestion(f"What is the town where {person} lived known for?", (goods,), gold)
        else:
            query, answer = rng.choice(
                [
                    (f"What was the trade of {person}?", trade),
                    (f"In which town did {person} live?", town),
                    (f"In which year was {person} born?", str(born)),
                ]
            )
            question = DocumentQuestion(query, (answer,), gold[:1], gold[1:])
        questions.append(question)
    return DocumentSet("synthetic documents", tuple(documents), tuple(questions))


def _names(count: int, ends: tuple[str, ...], rng: Random, *, words: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        parts = [
            rng.choice(_ONSETS) + rng.choice(_MIDDLES) + rng.choice(_MIDDLES) + rng.choice(ends) for _ in range(words)
        ]
        names[" ".join(parts)] = None
    return list(names)
