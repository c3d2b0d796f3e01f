"""Words of typed text in any script: marks and joiners belong to words, emoji stay whole."""

import itertools
import warnings
from collections.abc import Callable, Sequence

import regex

# Letters, digits and their marks; joiners and other invisible signs between them, but not the zero
# width space, which parts words; and joiners at the end.
_LETTERS = r"[\w\p{N}\p{M}](?:[\w\p{N}\p{M}]|[\p{Cf}--\u200b]+(?=[\w\p{N}\p{M}]))*[\u200c\u200d]*"
# Points, hyphens and apostrophes inside a word do not cut it; signs are words of their own.
_WORD = regex.compile(
    rf"{_LETTERS}(?:[.'\u2019\u2010-]{_LETTERS})*|(?![\s\p{{Cf}}\p{{Cc}}])\X", regex.VERSION1
)
_UNSPACED = regex.compile(
    r"\p{Han}|\p{Hiragana}|\p{Katakana}|\p{Thai}|\p{Lao}|\p{Khmer}|\p{Myanmar}|\p{Tibetan}"
)
_LONGEST = 8  # letters of a word in such a script that was hardly cut


def typed_words(
    texts: Sequence[str], number: Callable[[int], int] = lambda index: index + 1
) -> tuple[list[list[str]], list[list[tuple[int, int]]]]:
    """Cut texts at blanks and around punctuation.

    Warns of texts in scripts that put no blanks between words, of which a sentence is one word.

    Args:
        number: how the warning numbers a text.

    Returns:
        The words of each text, and where they start and end in it.
    """
    found = [list(_WORD.finditer(text)) for text in texts]
    words = [[match.group() for match in row] for row in found]
    unspaced = [
        number(index) for index, row in enumerate(words) if any(_is_unspaced(w, row) for w in row)
    ]
    if unspaced:
        warnings.warn(
            f"typed text {', '.join(map(str, unspaced[:5]))}{', …' if len(unspaced) > 5 else ''}: "
            "words are cut at blanks, which this script does not put between them; put blanks "
            "where the training data have the ends of words",
            stacklevel=3,
        )
    return words, [[match.span() for match in row] for row in found]


def word_offsets(words: Sequence[str]) -> list[tuple[int, int]]:
    """Where words start and end in the text that they make with a blank between each two."""
    ends = list(itertools.accumulate(len(word) + 1 for word in words))
    return [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]


def _is_unspaced(word: str, row: list[str]) -> bool:
    letters = len(_UNSPACED.findall(word))
    return letters > (1 if len(row) == 1 else _LONGEST)
