"""Who did what to whom: one label for each word of a sentence, given one of its verbs."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ptv2_fast.tasks.alignment import align
from ptv2_fast.tasks.chunks import IOB, chunk_scores, spans
from ptv2_fast.tasks.conll import read_role_lines
from ptv2_fast.tasks.examples import Examples
from ptv2_fast.tasks.features import TaskTokenizer
from ptv2_fast.tasks.sources import TYPED, Source
from ptv2_fast.tasks.task import Result
from ptv2_fast.tasks.token_classification import TokenClassification

# The verb itself, and its other part: "gave ... up".
_VERB = ("V", "C-V")


class SemanticRoleLabeling(TokenClassification):
    """Columns: words, predicate (the index of the verb), tags (B-ARG0, I-ARG0, B-V, O, ...).

    The verb is marked as in P-Tuning v2: the sentence, the separator, the verb again, all of token
    type 0. With BERT that is [CLS] words [SEP] verb [SEP]. The separator is the model's own, so
    RoBERTa gets <s> words </s></s> verb </s>. Only the words of the sentence have labels. A
    sentence that is too long loses its end, never the verb after it. The mark is a word, so two
    equal verbs of a sentence are the same input.
    """

    name = "semantic-role-labeling"
    columns: ClassVar[dict[str, str]] = {"words": "words", "predicate": "pred", "tags": "tags"}
    default_metrics = ("f1", "f1_without_v", "precision", "recall")

    def read_lines(self, source: Source, labelled: bool) -> tuple[dict[str, list], dict[str, Any]]:
        return read_role_lines(source, labelled), {}

    def _read_table(self, source: Source, labelled: bool) -> tuple[dict[str, list], dict[str, Any]]:
        columns, remarks = super()._read_table(source, labelled)
        # A cell of a CSV file is text.
        columns["predicate"] = [
            int(cell) if isinstance(cell, str) and cell.isdecimal() else cell
            for cell in columns["predicate"]
        ]
        return columns, remarks

    def check(self, columns: dict[str, list], examples: Examples) -> None:
        super().check(columns, examples)
        rows = zip(columns["words"], columns["predicate"], strict=True)
        for index, (words, predicate) in enumerate(rows):
            if type(predicate) is not int or not 0 <= predicate < len(words):
                expected = f"the index of a verb among {len(words)} words"
                raise examples.error(index, expected, predicate)
        for index, tags in enumerate(columns.get("tags", ())):
            if not all(map(IOB.fits, tags)):
                raise examples.error(index, "the labels O, B-ROLE and I-ROLE", tags)

    @property
    def text_names(self) -> tuple[str, ...]:
        return ("sentence", "verb")

    def from_texts(self, texts: Sequence[str], source: Source = TYPED) -> Examples:
        """Words are cut at blanks and around punctuation; the verb follows after a tab."""
        sentences = super().from_texts([text.rpartition("\t")[0] for text in texts], source)
        words = sentences.table["words"][:]
        predicates = [
            _find_verb(row, text.rpartition("\t")[2].strip(), sentences.where(index))
            for index, (row, text) in enumerate(zip(words, texts, strict=True))
        ]
        table = sentences.table.add_column("predicate", predicates)
        return Examples(source, table, unit="text")

    def tokenize(self, rows: dict[str, list], tokenizer: TaskTokenizer) -> dict[str, list]:
        sentences = rows["words"]
        verbs = [[words[index]] for words, index in zip(sentences, rows["predicate"], strict=True)]
        try:
            encoding, was_cut = tokenizer(
                sentences, verbs, is_split_into_words=True, truncation="only_first"
            )
        except Exception as error:  # tokenizers has no kind of its own for it
            longest = max((verb for (verb,) in verbs), key=len)
            raise ValueError(
                f"max_length: expected room for a word and the longest verb, {longest!r}, got "
                f"{tokenizer.max_length} ({error})"
            ) from error
        columns = dict(encoding)
        if "token_type_ids" in columns:
            columns["token_type_ids"] = [[0] * len(ids) for ids in columns["input_ids"]]
        aligned = align(encoding, rows.get("tags"), tokenizer.label_numbers, len(sentences))
        return columns | aligned | {"was_cut": was_cut}

    def metrics(self, results: list, examples: Examples, labels: list[str]) -> dict[str, float]:
        """Of whole spans by seqeval, over all labels and, "..._without_v", without the verb's.

        The authors of P-Tuning v2 count the verb's own span, which is given and easy. The figures
        without it are closer to those of the CoNLL-2005 script, which also joins C-X to X.
        """
        scores = super().metrics(results, examples, labels)
        true = [_without_verb(tags) for tags in self.expected(examples)]
        without = chunk_scores(IOB, true, [_without_verb(result["tags"]) for result in results])
        return scores | {f"{name}_without_v": score for name, score in without.items()}

    def titles(self, labels: list[str]) -> dict[str, str]:
        titles = super().titles(labels)
        without = {f"{name}_without_v": f"{title}, the verb's own left out"
                   for name, title in titles.items()}  # fmt: skip
        return titles | without

    def describe(self, example: dict, result: Result, labels: Sequence[str] = ()) -> Result:
        described = super().describe(example, result, labels)
        described.pop("entities", None)
        roles = described | {"tags": _without_verb(result["tags"])}
        return {
            "words": described.pop("words"),
            "predicate": example["predicate"],
            **described,
            "arguments": spans(IOB, roles, "role"),
        }


def _without_verb(tags: list[str]) -> list[str]:
    return ["O" if tag[2:] in _VERB else tag for tag in tags]


def _find_verb(words: list[str], verb: str, where: str) -> int:
    """The index that a typed verb or number stands for."""
    places = [index for index, word in enumerate(words) if word == verb]
    if verb.isdecimal() and int(verb) < len(words):
        places = [int(verb)]
    if len(places) != 1:
        raise ValueError(
            f"{where}: expected a sentence, a tab, and its verb, or the verb's index from 0, got "
            f"{verb!r}, which is there {len(places)} times, in the words {words}"
        )
    return places[0]
