"""Made-up sentences in the official file formats of named entity recognition and role labelling."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.tiny_run import tagged_sentences

Verb = tuple[list[str], int, list[str]]


def verbs_with_roles(count: int) -> Iterator[Verb]:
    """Words, index of the verb, tags; a sentence with two verbs gives two different rows."""
    number = 0
    for sentence in tagged_sentences(count):
        words = [word for word, _ in sentence]
        for index, word in enumerate(words):
            if word not in ("lives", "sleeps") or number == count:
                continue
            number += 1
            tags = ["B-ARG0", *["O"] * (len(words) - 1)]
            tags[index] = "B-V"
            if word == "lives":
                tags[2:4] = ["B-ARGM-LOC", "I-ARGM-LOC"]
            yield words, index, tags


def write_conll2003(folder: Path, count: int) -> None:
    for name in ("train.txt", "valid.txt", "test.txt"):
        lines = ["-DOCSTART- -X- -X- O", ""]
        for sentence in tagged_sentences(count):
            lines += [f"{word} NNP B-NP {tag}" for word, tag in sentence] + [""]
        _write(folder / name, lines)


def write_conll2004(folder: Path, count: int) -> None:
    """With blanks in the relations, and without an empty line between or after sentences."""
    kinds = {"B-PER": "B-Peop", "B-LOC": "B-Loc", "O": "O"}
    for name in ("train.txt", "dev.txt", "test.txt"):
        lines = []
        for number, sentence in enumerate(tagged_sentences(count)):
            lines.append(f"#doc {number}")
            lines += [
                f"{index}\t{word}\t{kinds[tag]}\t['Live_In', 'Work_For']\t[{index}, 3]"
                for index, (word, tag) in enumerate(sentence)
            ]
        _write(folder / name, lines)


def write_ontonotes(folder: Path, count: int) -> None:
    """Eleven columns; no empty line after the last sentence."""
    kinds = {"B-PER": "B-PERSON", "B-LOC": "B-GPE", "O": "O"}
    for split in ("train", "dev", "test"):
        blocks = [
            "\n".join(
                f"{index}\t{word}\t_\tNNP\tNNP\t_\t2\tnsubj\t_\t_\t{kinds[tag]}"
                for index, (word, tag) in enumerate(sentence, 1)
            )
            for sentence in tagged_sentences(count)
        ]
        _write(folder / f"{split}.sd.conllx", ["\n\n".join(blocks)])


def write_conll2005(folder: Path, count: int) -> None:
    for split in ("train", "devel", "test.wsj", "test.brown"):
        lines = [
            _role_line(
                words, index, [tag.replace("ARGM", "AM").replace("ARG", "A") for tag in tags]
            )
            for words, index, tags in verbs_with_roles(count)
        ]
        _write(folder / f"conll05.{split}.txt", lines)


def write_conll2012(folder: Path, count: int) -> None:
    for split in ("train", "devel", "test"):
        _write(
            folder / f"conll2012.{split}.txt",
            [_role_line(*verb) for verb in verbs_with_roles(count)],
        )


def write_propbank(folder: Path, count: int) -> None:
    for split in ("train", "dev", "test"):
        lines = [
            json.dumps({"words": words, "pred": index, "sense": "live.01", "tags": tags})
            for words, index, tags in verbs_with_roles(count)
        ]
        _write(folder / f"{split}.jsonl", lines)


def _role_line(words: list[str], index: int, tags: list[str]) -> str:
    return f"{index} {' '.join(words)} ||| {' '.join(tags)}"


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# The name of a published data set -> writes its splits into a folder, `count` examples each.
WRITERS: dict[str, Callable[[Path, int], None]] = {
    "conll2003": write_conll2003,
    "conll2004": write_conll2004,
    "ontonotes": write_ontonotes,
    "conll2005": write_conll2005,
    "conll2012": write_conll2012,
    "propbank": write_propbank,
}
