"""Reading tagged sentences from text files: CoNLL columns, and verbs with their roles."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from ptv2_fast.files import read_text
from ptv2_fast.tasks.sources import Source
from ptv2_fast.tasks.tables import check_not_empty

# Of CoNLL-2003, of CoNLL-2004 with relations, and of CoNLL-2012.
_DOCUMENT_LINE = re.compile(r"-DOCSTART-(\s|$)|#doc\s+\d+\s*$|#(begin|end) document\b")
# "# sent_id = 5" and "# a licence" of CoNLL-U, "#\thttp://...\t[2009-10-17]" of GermEval.
_COMMENT = re.compile(r"#(\s|$)|#\s*[\w.:-]+\s*=|#(sent_id|text|newdoc|newpar|global\.columns)\b")
_ASSIGNMENT = re.compile(r"#\s*[\w.:-]+\s*=")
_SEPARATOR = re.compile(r"([=*_~+#-])\1{2,}(\s.*)?")
# CoNLL-U's words of several tokens, "1-2", and empty nodes, "5.1".
_NO_WORD = re.compile(r"\d+[-.]\d+")
_WORD_NAME = re.compile(r"#?\s*(tokens?|words?|forms?|texts?|wort)", re.IGNORECASE)
_TAG_NAME = re.compile(
    r"(gold|ner|pos|upos|bio|iob|entity|chunk)?[ _-]?(labels?|tags?|class|type)|ner|u?pos|bio|"
    r"iob2?|gold|entity|chunk", re.IGNORECASE
)  # fmt: skip
_CONLL_U_COLUMNS = 10
_LINE_END = re.compile(r"\r*\n|\r")


class _Line(NamedTuple):
    number: int  # from 1
    text: str
    fields: list[str]  # its columns


def read_conll(
    source: Source,
    word_column: int,
    tag_column: int | None,
    comments: bool = True,
    names: tuple[str, ...] = (),
) -> tuple[dict[str, list], dict[str, Any]]:
    """Read sentences from lines of columns; an empty line ends a sentence.

    The columns are cut at tabs in a line that has a tab, else at blanks. Lines that begin a
    document (-DOCSTART-, "#doc 12", "#begin document") are no words and end a sentence, and a last
    sentence without an empty line after it counts. Left out and remarked on are a first line that
    names the columns, comments, and CoNLL-U's numbers of several tokens ("1-2", "5.1").

    Args:
        source: a text file, UTF-8, compressed by gzip or not.
        word_column, tag_column: numbers from 0, negative from the end; None = no labels.
        comments: whether lines before a sentence that begin with "#" and are not words with a label
            of others are left out.
        names: of columns, beside those in use.

    Returns:
        ({"words": one list per sentence, "tags": the same, unless tag_column is None}, remarks).

    Raises:
        ValueError: naming the line that lacks a column or, where labels are wanted, has no label,
            has it where the word is, or has more or fewer columns than the first of its sentence,
            or than most of the file when columns are counted from the end; a line that separates
            pages; or the file without a sentence.
    """
    blocks = _blocks(source)
    layout = _Layout(blocks, word_column, tag_column)
    remarks: dict[str, Any] = {}
    if blocks and layout.is_header(blocks[0][0], names):
        remarks["header left out"] = blocks[0].pop(0).fields
    left_out: Counter[str] = Counter()
    sentences: list[list[_Line]] = []
    for block in blocks:
        lines: list[_Line] = []
        for line in block:
            if comments and not lines and layout.is_comment(line):
                left_out["comments left out"] += 1
            elif layout.is_no_word(line):
                left_out["numbers of several tokens and of none left out"] += 1
            else:
                lines.append(line)
        if lines:
            sentences.append(lines)
    check_not_empty(source, len(sentences))
    pairs = [
        [_word_and_tag(source, line, lines[0], layout) for line in lines] for lines in sentences
    ]
    columns = {"words": [[word for word, _ in row] for row in pairs]}
    if tag_column is not None:
        columns["tags"] = [[tag for _, tag in row] for row in pairs]
        for first, *_ in sentences:
            if tag_column < 0 and len(first.fields) != layout.width:
                raise _other_width(source, first, layout)
    return columns, remarks | left_out


def holds_columns(source: Source, words_name: str) -> bool:
    """Whether a file of tab-separated values has empty lines between sentences, one word a line,
    and is no table whose cells hold several words."""
    lines = [line for _, line in _lines(source)]
    while lines and not lines[-1].strip():
        lines.pop()
    if all(line.strip() for line in lines):
        return False
    several = any(len(at_blanks(cell)) > 1 for line in lines[1:] for cell in line.split("\t"))
    return not (several and words_name in lines[0].split("\t"))


class _Layout:
    """What most lines of a file have: their number of columns, and their labels."""

    def __init__(self, blocks: list[list[_Line]], word_column: int, tag_column: int | None) -> None:
        self.word_column, self.tag_column = word_column, tag_column
        lines = (line for block in blocks for line in block)
        words = [line.fields for line in lines if not line.text.startswith("#")]
        widths = Counter(map(len, words))
        self.width = widths.most_common(1)[0][0] if widths else 0
        self.tags = Counter(self.cell(fields, tag_column) for fields in words)
        numbered = (fields[0].partition("-")[0].partition(".")[0] for fields in words)
        self.is_conll_u = self.width == _CONLL_U_COLUMNS and all(map(str.isdecimal, numbered))

    def cell(self, fields: list[str], column: int | None) -> str:
        """A cell of a line; empty where there is none."""
        if column is None or not -len(fields) <= column < len(fields):
            return ""
        return fields[column].strip()

    def is_header(self, line: _Line, names: tuple[str, ...]) -> bool:
        """Whether a line names the columns: its label is that of no other line."""
        fields = line.fields
        word, tag = self.cell(fields, self.word_column), self.cell(fields, self.tag_column)
        names_word = word in names or _WORD_NAME.fullmatch(word)
        if self.tag_column is None:
            others = [cell.strip() for cell in fields if cell.strip() != word]
            return bool(names_word and others) and any(map(_TAG_NAME.fullmatch, others))
        names_tag = tag in names or _TAG_NAME.fullmatch(tag)
        return bool(names_word and names_tag) and self.tags[tag] <= 1

    def is_comment(self, line: _Line) -> bool:
        """Whether a line before the first word of a sentence is none with a known label."""
        _, text, fields = line
        if not _COMMENT.match(text) or not self.width:
            return False
        if self.tag_column is None:
            return len(fields) != self.width or _ASSIGNMENT.match(text) is not None
        return len(fields) != self.width or not self.tags[self.cell(fields, self.tag_column)]

    def is_no_word(self, line: _Line) -> bool:
        """Whether a line of CoNLL-U numbers something else than a word."""
        return self.is_conll_u and _NO_WORD.fullmatch(line.fields[0]) is not None

    def is_separator(self, fields: list[str]) -> bool:
        """Whether a line draws one, as "=== page 3", with a label that no other line has."""
        if not _SEPARATOR.fullmatch(self.cell(fields, self.word_column)):
            return False
        once = self.tag_column is not None and self.tags[self.cell(fields, self.tag_column)] <= 1
        return once or len(fields) != self.width


def _blocks(source: Source) -> list[list[_Line]]:
    """The lines between empty ones and those that begin a document."""
    blocks: list[list[_Line]] = [[]]
    for number, line in _lines(source):
        if line.strip() and not _DOCUMENT_LINE.match(line):
            fields = line.split("\t") if "\t" in line.rstrip(" \t") else at_blanks(line)
            blocks[-1].append(_Line(number, line, fields))
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def _word_and_tag(source: Source, line: _Line, first: _Line, layout: _Layout) -> tuple[str, str]:
    """The cells of a line, checked; `first` is the first line of its sentence."""
    fields = line.fields
    if layout.is_separator(fields):
        raise ValueError(
            f"{source.name} line {line.number}: expected a word, got {fields}, which looks like a "
            "line between pages; delete such lines"
        )
    word_column, tag_column, width = layout.word_column, layout.tag_column, len(first.fields)
    word, tag = layout.cell(fields, word_column), layout.cell(fields, tag_column)
    places = range(len(fields))
    lacking = not -len(fields) <= word_column < len(fields)
    if not lacking and tag_column is None:
        return word, tag
    wanted = f"conll_word_column {word_column}"
    if tag_column is not None:
        # A line without a label, whose last column is another, or a comment.
        if not lacking and tag and len(fields) == width:
            if places[tag_column] != places[word_column]:
                return word, tag
        if len(fields) == layout.width != width:
            raise _other_width(source, first, layout)
        wanted += f" and conll_tag_column {tag_column}, {width} columns as the sentence has"
    raise ValueError(f"{source.name} line {line.number}: expected {wanted}, got {fields}")


def _other_width(source: Source, line: _Line, layout: _Layout) -> ValueError:
    return ValueError(
        f"{source.name} line {line.number}: expected {layout.width} columns as most lines have, "
        f"got {line.fields}"
    )


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
        text = read_text(source.path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source.name}: cannot be read as UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"{source.name}: cannot be read ({error})") from error
    # Not splitlines(): it also cuts at characters that occur inside words. Carriage returns are the
    # ends of lines of old, or come before a line's end once or more often.
    yield from enumerate(_LINE_END.split(text), 1)
