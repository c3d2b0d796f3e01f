"""SuperGLUE (Wang et al. 2019), phrased as the authors of P-Tuning v2 do.

Rows are those of the official JSON lines or of the hub's tables; both give the same.
"""

import functools
from collections.abc import Iterator
from typing import Any

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark
from ptv2_fast.tasks.benchmarks.rows import class_label, sentences, text

_NO_YES = ("False", "True")


def copa(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
    """The premise and how a cause or an effect goes on; the choices; the index of the right one."""
    joiners = {"cause": "because", "effect": "so"}
    yield {
        "text": f"{text(row, 'premise')} {joiners[row['question']]}",
        "choices": [text(row, "choice1"), text(row, "choice2")],
        "label": class_label(row.get("label"), ("choice1", "choice2")),
    }


def multirc(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
    """(paragraph, question and answer) for each answer; `group` is the question."""
    if "passage" in row:
        answers = [
            (text(row["passage"], "text"), text(question, "question"), text(answer, "text"),
             answer.get("label"), f"{row['idx']} {question['idx']}")
            for question in row["passage"]["questions"] for answer in question["answers"]
        ]  # fmt: skip
    else:
        group = f"{row['idx']['paragraph']} {row['idx']['question']}"
        answers = [
            (text(row, "paragraph"), text(row, "question"), text(row, "answer"), row.get("label"),
             group)
        ]  # fmt: skip
    for paragraph, question, answer, label, group in answers:
        yield {
            "text": paragraph,
            "text_pair": f"{question} {answer}",
            "label": class_label(label, _NO_YES),
            "group": group,
        }


def record(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
    """(passage, query with an entity in its place) for each entity; `group` is the query.

    The label is "1" for an entity that is one of the answers. Entities and answers are named once
    each, in the order of the alphabet.
    """
    if isinstance(row["passage"], str):
        passage, entities = row["passage"], row["entities"]
        group = f"{row['idx']['passage']} {row['idx']['query']}"
        queries = [(text(row, "query"), row["answers"], group)]
    else:
        passage = text(row["passage"], "text")
        spans = row["passage"]["entities"]
        entities = [passage[span["start"] : span["end"] + 1] for span in spans]
        queries = [
            (text(query, "query"), [text(answer, "text") for answer in query.get("answers") or ()],
             f"{row['idx']} {query['idx']}")
            for query in row["qas"]
        ]  # fmt: skip
    lines = passage.replace("@highlight\n", "- ")
    for query, answers, group in queries:
        for entity in sorted(set(entities)):
            yield {
                "text": lines,
                "text_pair": query.replace("@placeholder", entity),
                "label": str(int(entity in answers)) if answers else None,
                "group": group,
                "entity": entity,
                "answers": sorted(set(answers)),
            }


def wic(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
    """Template "0" (for RoBERTa): one text that asks; "1" (for BERT): the word before each."""
    word, first, second = (text(row, name) for name in ("word", "sentence1", "sentence2"))
    label = {"label": class_label(row.get("label"))}
    if template == "0":
        question = f"Does {word} have the same meaning in both sentences?"
        yield {"text": f"{first} {second} {question}", **label}
    else:
        yield {"text": f"{word}: {first}", "text_pair": f"{word}: {second}", **label}


def wsc(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
    """Template "0": ("pronoun: text", candidate); "1": the pronoun between asterisks."""
    spans = row.get("target") or row
    sentence = text(row, "text")
    if template == "0":
        marked = f"{text(spans, 'span2_text')}: {sentence}"
    else:
        words = sentence.split()
        words[spans["span2_index"]] = f"*{words[spans['span2_index']]}*"
        marked = " ".join(words)
    yield {
        "text": marked,
        "text_pair": text(spans, "span1_text"),
        "label": class_label(row.get("label")),
    }


_HUB = "aps/super_glue"
# What most of the eight have in common.
_superglue = functools.partial(
    Benchmark,
    suite="SuperGLUE",
    family="text-classification",
    metrics=("accuracy",),
    files={"train": ("train.jsonl",), "validation": ("val.jsonl",)},
    pairs=("default",),
)
_entailment = sentences(("premise", "hypothesis", "label"))

SUPERGLUE = (
    _superglue(
        "boolq", "BoolQ", hub=(_HUB, "boolq"), rows=sentences(("question", "passage", "label"))
    ),
    _superglue("cb", "CB", hub=(_HUB, "cb"), rows=_entailment, metrics=("accuracy", "f1")),
    _superglue(
        "copa", "COPA", hub=(_HUB, "copa"), rows=copa, family="multiple-choice", pairs=()
    ),
    _superglue(
        "multirc", "MultiRC", hub=(_HUB, "multirc"), rows=multirc, metrics=("f1a", "em")
    ),
    _superglue("record", "ReCoRD", hub=(_HUB, "record"), rows=record, metrics=("f1", "em")),
    _superglue("rte", "RTE", hub=(_HUB, "rte"), rows=_entailment),
    _superglue(
        "wic", "WiC", hub=(_HUB, "wic"), rows=wic, templates=("0", "1"), pairs=("1",)
    ),
    _superglue(
        "wsc", "WSC", hub=(_HUB, "wsc"), rows=wsc, templates=("0", "1"), pairs=("0", "1")
    ),
)  # fmt: skip
