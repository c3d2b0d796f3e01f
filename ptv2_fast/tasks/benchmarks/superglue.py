"""SuperGLUE (Wang et al. 2019), phrased as the authors of P-Tuning v2 do.

Rows are those of the official JSON lines or of the hub's tables; both give the same.
"""

from collections.abc import Iterator
from typing import Any

from ptv2_fast.tasks.benchmarks.benchmark import Benchmark, Rows
from ptv2_fast.tasks.benchmarks.fields import class_label, text

_CLASSIFICATION = "text-classification"
_NO_YES = ("False", "True")


def boolq(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
    """(question, passage)."""
    yield {
        "text": text(row, "question"),
        "text_pair": text(row, "passage"),
        "label": class_label(row.get("label")),
    }


def entailment(row: dict[str, Any], template: str) -> Iterator[dict[str, Any]]:
    """RTE and CB: (premise, hypothesis)."""
    yield {
        "text": text(row, "premise"),
        "text_pair": text(row, "hypothesis"),
        "label": class_label(row.get("label")),
    }


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
    if "passage" not in row:
        yield _multirc_answer(
            text(row, "paragraph"), text(row, "question"), text(row, "answer"), row.get("label"),
            group=f"{row['idx']['paragraph']} {row['idx']['question']}",
        )  # fmt: skip
        return
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            yield _multirc_answer(
                text(row["passage"], "text"), text(question, "question"), text(answer, "text"),
                answer.get("label"), group=f"{row['idx']} {question['idx']}",
            )  # fmt: skip


def _multirc_answer(
    paragraph: str, question: str, answer: str, label: Any, group: str
) -> dict[str, Any]:
    return {
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
        yield from _record_entities(
            row["passage"], text(row, "query"), row["entities"], row["answers"],
            group=f"{row['idx']['passage']} {row['idx']['query']}",
        )  # fmt: skip
        return
    passage = text(row["passage"], "text")
    spans = row["passage"]["entities"]
    entities = [passage[span["start"] : span["end"] + 1] for span in spans]
    for question in row["qas"]:
        answers = [text(answer, "text") for answer in question.get("answers") or ()]
        yield from _record_entities(
            passage, text(question, "query"), entities, answers, f"{row['idx']} {question['idx']}"
        )


def _record_entities(
    passage: str, query: str, entities: list[str], answers: list[str], group: str
) -> Iterator[dict[str, Any]]:
    lines = passage.replace("@highlight\n", "- ")
    answers = sorted(set(answers))
    for entity in sorted(set(entities)):
        yield {
            "text": lines,
            "text_pair": query.replace("@placeholder", entity),
            "label": str(int(entity in answers)) if answers else None,
            "group": group,
            "entity": entity,
            "answers": answers,
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


def _benchmark(name: str, title: str, rows: Rows, **more: Any) -> Benchmark:
    """What all eight have in common."""
    values: dict[str, Any] = {
        "family": _CLASSIFICATION,
        "metrics": ("accuracy",),
        "pairs": ("default",),
        **more,
    }
    return Benchmark(
        name=name,
        title=title,
        suite="SuperGLUE",
        files={"train": ("train.jsonl",), "validation": ("val.jsonl",)},
        hub=("aps/super_glue", name),
        hub_splits={"train": "train", "validation": "validation"},
        rows=rows,
        **values,
    )


SUPERGLUE = (
    _benchmark("boolq", "BoolQ", boolq),
    _benchmark("cb", "CB", entailment, metrics=("accuracy", "f1")),
    _benchmark("copa", "COPA", copa, family="multiple-choice", pairs=()),
    _benchmark("multirc", "MultiRC", multirc, metrics=("f1a", "em")),
    _benchmark("record", "ReCoRD", record, metrics=("f1", "em")),
    _benchmark("rte", "RTE", entailment),
    _benchmark("wic", "WiC", wic, templates=("0", "1"), pairs=("1",)),
    _benchmark("wsc", "WSC", wsc, templates=("0", "1"), pairs=("0", "1")),
)
