"""Which tokens stand for the words of a sentence."""

from typing import Any

IGNORED = -100  # what the loss of transformers skips


def align(
    encoding: Any, tags: list[list[str]] | None, label_numbers: dict[str, int] | None, count: int
) -> dict[str, list]:
    """Label numbers at the first sub-word of each word, and which words those are.

    Without labels a zero marks the place to read the prediction from.

    Args:
        encoding: of a fast tokenizer, of text split into words; of a pair, the first text counts.
        tags: one list a sentence.
        count: of sentences.

    Returns:
        {"labels": numbers per token, -100 elsewhere; "word_indices": the words left in it}.
    """
    labels, word_indices = [], []
    for index in range(count):
        places: dict[int, int] = {}  # of the first sub-word of each word
        tokens = zip(encoding.word_ids(index), encoding.sequence_ids(index), strict=True)
        for place, (word, sequence) in enumerate(tokens):
            if sequence == 0:
                places.setdefault(word, place)
        numbers = [IGNORED] * len(encoding.word_ids(index))
        for word, place in places.items():
            if label_numbers is None or tags is None:
                numbers[place] = 0
            else:
                numbers[place] = label_numbers[tags[index][word]]
        labels.append(numbers)
        word_indices.append([*places])
    return {"labels": labels, "word_indices": word_indices}
