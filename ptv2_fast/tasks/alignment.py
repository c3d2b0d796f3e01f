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
        word_ids = [
            word if sequence == 0 else None
            for word, sequence in zip(
                encoding.word_ids(index), encoding.sequence_ids(index), strict=True
            )
        ]
        first_of_word = _first_sub_words(word_ids)
        numbers = [IGNORED] * len(word_ids)
        for position, word in first_of_word:
            if label_numbers is None or tags is None:
                numbers[position] = 0
            else:
                numbers[position] = label_numbers[tags[index][word]]
        labels.append(numbers)
        word_indices.append([word for _, word in first_of_word])
    return {"labels": labels, "word_indices": word_indices}


def _first_sub_words(word_ids: list[int | None]) -> list[tuple[int, int]]:
    """(position, word) of the first sub-word of each word."""
    before = [None, *word_ids]
    return [
        (position, word)
        for position, word in enumerate(word_ids)
        if word is not None and word != before[position]
    ]
