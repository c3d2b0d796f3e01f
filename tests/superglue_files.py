"""Made-up examples of SuperGLUE and GLUE in the formats of their official files."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_PEOPLE, _PLACES = ("Anna", "Bob"), ("Berlin", "Oslo")


def _sentence(number: int) -> str:
    return f"{_PEOPLE[number % 2]} lives in {_PLACES[number // 2 % 2]} ."


def _json_lines(row: Callable[[int], Row]) -> Callable[[Path, int], None]:
    """A writer of train.jsonl and val.jsonl."""

    def write(folder: Path, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train.jsonl", "val.jsonl"):
            lines = [json.dumps(row(number)) for number in range(count)]
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write


def boolq(number: int) -> Row:
    question = f"is {_PEOPLE[number % 2]} in berlin"
    return {
        "question": question,
        "passage": _sentence(number),
        "idx": number,
        "label": number % 2 == 0,
    }


def cb(number: int) -> Row:
    label = ("contradiction", "entailment", "neutral")[number % 3]
    premise, hypothesis = _sentence(number), "anna sleeps"
    return {"premise": premise, "hypothesis": hypothesis, "label": label, "idx": number}


def copa(number: int) -> Row:
    choices = ["The film was good.", "The film was bad."]
    return {
        "premise": "Anna loves the film.",
        "choice1": choices[number % 2],
        "choice2": choices[1 - number % 2],
        "question": ("cause", "effect")[number // 2 % 2],
        "label": number % 2,
        "idx": number,
    }


def multirc(number: int) -> Row:
    """A passage with two questions of two and three answers."""
    texts = (("Oslo", "Berlin"), ("Anna", "Bob", "a film"))
    questions = [
        {
            "question": ("Where is it?", "Who sleeps?")[place],
            "answers": [
                {"text": text, "idx": index, "label": (index + number) % 2}
                for index, text in enumerate(answers)
            ],
            "idx": 2 * number + place,
        }
        for place, answers in enumerate(texts)
    ]
    return {
        "idx": number,
        "version": 1.1,
        "passage": {"text": _sentence(number), "questions": questions},
    }


def record(number: int) -> Row:
    """A passage with two entities and one query."""
    text = f"{_sentence(number)}\n@highlight\nIt was good"
    names = (text.split()[0], text.split()[3])
    spans = [{"start": text.index(n), "end": text.index(n) + len(n) - 1} for n in names]
    answer = {**spans[number % 2], "text": names[number % 2]}
    return {
        "source": "Daily mail",
        "passage": {"text": text, "entities": spans},
        "qas": [{"query": "The film was in @placeholder", "answers": [answer], "idx": number}],
        "idx": number,
    }


def rte(number: int) -> Row:
    label = ("entailment", "not_entailment")[number % 2]
    hypothesis = "Anna sleeps" if number % 2 else "Bob works in Oslo"
    return {
        "premise": _sentence(number), "hypothesis": hypothesis, "label": label, "idx": number,
    }  # fmt: skip


def wic(number: int) -> Row:
    return {
        "word": "works", "sentence1": "Bob works .", "sentence2": "the film works", "idx": number,
        "label": number % 2 == 0, "start1": 4, "start2": 9, "end1": 9, "end2": 14, "version": 1.1,
    }  # fmt: skip


def wsc(number: int) -> Row:
    target = {
        "span1_index": 0, "span1_text": _PEOPLE[number % 2], "span2_index": 4, "span2_text": "it",
    }  # fmt: skip
    text = f"{_PEOPLE[0]} loves Berlin and it sleeps ."
    return {"text": text, "target": target, "idx": number, "label": number % 2 == 0}


def _tables(
    header: str, row: Callable[[int], Iterable[Any]], splits: tuple[str, ...] = ("train", "dev")
) -> Callable[[Path, int], None]:
    """A writer of tab-separated files; the names of `header` are separated by commas."""

    def write(folder: Path, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [header.replace(",", "\t")] if header else []
        lines += ["\t".join(map(str, row(number))) for number in range(count)]
        for split in splits:
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write


def cola(number: int) -> list[Any]:
    return ["gj04", number % 2, "", ('"A film sleeps', "a the was it")[number % 2]]


def mnli(number: int) -> list[Any]:
    label = ("contradiction", "entailment", "neutral")[number % 3]
    start = [number, f"{number}c", f"{number}n", "fiction", *["( tree )"] * 4]
    return [*start, *_pair(number), label, label]


def stsb(number: int) -> list[Any]:
    start = [number, "main-news", "headlines", 2016, number, "none", "none"]
    return [*start, *_pair(number), f"{number % 2 * 4}.250"]


def _pair(number: int) -> tuple[str, str]:
    """In the tables a quotation mark is a character like others."""
    return _sentence(number), ('"Anna sleeps', "it was a bad film")[number % 2]


def _entailed(number: int) -> str:
    return ("entailment", "not_entailment")[number % 2]


_MNLI = (
    "index,promptID,pairID,genre,sentence1_binary_parse,sentence2_binary_parse,sentence1_parse,"
    "sentence2_parse,sentence1,sentence2,label1,gold_label"
)
_STSB = "index,genre,filename,year,old_index,source1,source2,sentence1,sentence2,score"

# Data set -> a writer of its official files into a folder: all splits, of that many examples each
# (passages of MultiRC and ReCoRD), the same in every split.
WRITERS: dict[str, Callable[[Path, int], None]] = {
    "boolq": _json_lines(boolq),
    "cb": _json_lines(cb),
    "copa": _json_lines(copa),
    "multirc": _json_lines(multirc),
    "record": _json_lines(record),
    "rte": _json_lines(rte),
    "wic": _json_lines(wic),
    "wsc": _json_lines(wsc),
    "cola": _tables("", cola),
    "mnli": _tables(_MNLI, mnli, ("train", "dev_matched", "dev_mismatched")),
    "mrpc": _tables(
        "Quality,#1 ID,#2 ID,#1 String,#2 String", lambda n: [n % 2, n, n + 1, *_pair(n)]
    ),
    "qnli": _tables("index,question,sentence,label", lambda n: [n, *_pair(n), _entailed(n)]),
    "qqp": _tables(
        "id,qid1,qid2,question1,question2,is_duplicate", lambda n: [n, n, n, *_pair(n), n % 2]
    ),
    "glue-rte": _tables("index,sentence1,sentence2,label", lambda n: [n, *_pair(n), _entailed(n)]),
    "sst2": _tables("sentence,label", lambda n: [("a bad film", '"good film')[n % 2], n % 2]),
    "stsb": _tables(_STSB, stsb),
    "wnli": _tables("index,sentence1,sentence2,label", lambda n: [n, *_pair(n), n % 2]),
}
