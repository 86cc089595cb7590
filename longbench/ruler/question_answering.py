"""`qa_1` and `qa_2`: the paragraphs that answer a question, hidden among others."""

from random import Random

from ..errors import DataError
from .documents import DocumentSet
from .draft import Draft, fill
from .templates import DOCUMENT, QUESTION_ANSWERING


def draw_question(units: int, index: int, rng: Random, data: DocumentSet, *, seed: int) -> Draft:
    """Question number `index` with `units` documents: the gold ones, the same article's, then random others.

    One seed orders the documents of all samples, as in RULER.

    Raises:
        DataError: the data holds no question number `index`.
    """
    if index >= len(data.questions):
        raise DataError(f"{data.name} holds {len(data.questions)} questions; sample {index + 1} was asked for")
    question = data.questions[index]
    chosen = list(question.gold)
    missing = max(0, min(units, len(data.documents)) - len(chosen))
    if missing <= len(question.related):
        chosen += rng.sample(question.related, missing)
    else:
        chosen += question.related
        known = set(chosen)
        others = [number for number in range(len(data.documents)) if number not in known]
        chosen += rng.sample(others, min(len(others), missing - len(question.related)))
    documents = [data.documents[number] for number in chosen]
    # A set smaller than the haystack is repeated, as RULER does.
    documents += [data.documents[number % len(data.documents)] for number in range(units - len(documents))]
    Random(seed).shuffle(documents)
    text = "\n\n".join(
        DOCUMENT.format(number=number, document=document) for number, document in enumerate(documents, start=1)
    )
    parts = fill(QUESTION_ANSWERING, context=text, query=question.query)
    return Draft(*parts, question.answers, {"data": data.name, "documents": len(documents)})
