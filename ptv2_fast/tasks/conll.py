"""Reading tagged sentences from text files: CoNLL columns, and verbs with their roles."""

import re
from collections.abc import Iterator

from ptv2_fast.tasks.sources import Source, check_not_empty

# Of CoNLL-2003, of CoNLL-2004 with relations, and of CoNLL-2012.
_DOCUMENT_LINE = re.compile(r"-DOCSTART-(\s|$)|#doc\s+\d+\s*$|#(begin|end) document\b")


def read_conll(source: Source, word_column: int, tag_column: int | None) -> dict[str, list]:
    """Read sentences from lines of columns; an empty line ends a sentence.

    The columns are cut at tabs in a line that has a tab, else at blanks. Lines that begin a
    document (-DOCSTART-, "#doc 12", "#begin document") are no words and end a sentence, and a last
    sentence without an empty line after it counts.

    Args:
        source: a text file, UTF-8.
        word_column, tag_column: numbers from 0, negative from the end; None = no labels.

    Returns:
        {"words": one list per sentence, "tags": the same, unless tag_column is None}.

    Raises:
        ValueError: naming the line that lacks a column or, where labels are wanted, has no label,
            has it where the word is, or has more or fewer columns than the first of its sentence;
            or the file without a sentence.
    """
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    width = 0
    for number, line in _lines(source):
        if not line.strip() or _DOCUMENT_LINE.match(line):
            if words[-1]:
                words.append([])
                tags.append([])
            continue
        fields = line.split("\t") if "\t" in line.rstrip(" \t") else at_blanks(line)
        if not words[-1]:
            width = len(fields)
        places = range(len(fields))
        try:
            words[-1].append(fields[word_column].strip())
            if tag_column is not None:
                tag = fields[tag_column].strip()
                same = places[tag_column] == places[word_column]
                # A line without a label, whose last column is another, or a comment.
                if not tag or same or len(fields) != width:
                    raise IndexError
                tags[-1].append(tag)
        except IndexError:
            wanted = f"conll_word_column {word_column}"
            if tag_column is not None:
                wanted += f" and conll_tag_column {tag_column}, {width} columns as the sentence has"
            raise ValueError(
                f"{source.name} line {number}: expected {wanted}, got {fields}"
            ) from None
    if not words[-1]:
        words.pop()
        tags.pop()
    check_not_empty(source, len(words))
    return {"words": words} if tag_column is None else {"words": words, "tags": tags}


def read_role_lines(source: Source, labelled: bool) -> dict[str, list]:
    """Read lines "3 word word ... ||| tag tag ...", one for each verb of a sentence.

    The number is the index of the verb, from 0. This is how CoNLL-2005 and CoNLL-2012 are spread
    for span-based role labelling. Without labels the bars and what follows may be absent.

    Args:
        source: a text file, UTF-8.
        labelled: whether the tags are wanted.

    Returns:
        {"words": one list per line, "predicate": the index, "tags": one list, if labelled}.

    Raises:
        ValueError: naming the line that has another form, or the file without a line.
    """
    columns: dict[str, list] = {"words": [], "predicate": []}
    if labelled:
        columns["tags"] = []
    for number, line in _lines(source):
        if not line.strip():
            continue
        sentence, _, tag_text = line.partition("|||")
        index, *words = at_blanks(sentence) or [""]
        if not index.isdecimal() or not words:
            raise ValueError(
                f"{source.name} line {number}: expected the index of a verb, words, ||| and "
                f"labels, got {line[:60]!r}"
            )
        columns["words"].append(words)
        columns["predicate"].append(int(index))
        if labelled:
            tags = tag_text.split()
            if len(tags) != len(words):
                raise ValueError(
                    f"{source.name} line {number}: expected one label for each of {len(words)} "
                    f"words after |||, got {len(tags)}"
                )
            columns["tags"].append(tags)
    check_not_empty(source, len(columns["words"]))
    return columns


def at_blanks(text: str) -> list[str]:
    """The parts between blanks; unlike split(), words may hold no-break spaces, or be one."""
    return [part for part in re.split(r"[ \t\r\n]", text) if part]


def _lines(source: Source) -> Iterator[tuple[int, str]]:
    """The lines, counted from 1."""
    assert source.path is not None
    try:
        # Not splitlines(): it also cuts at characters that occur inside words.
        lines = source.path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source.name}: cannot be read as UTF-8 text: {error}") from error
    yield from enumerate(lines, 1)
