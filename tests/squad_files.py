"""Small files in the official formats of SQuAD 1.1 and 2.0."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_run import PEOPLE, PLACES

VERBS = ("lives", "works")


def question(number: int, answerable: bool = True) -> dict[str, Any]:
    """A question about two sentences; every other answer stands in the second."""
    person, other = PEOPLE[number % 2], PEOPLE[1 - number % 2]
    place, verb = PLACES[number // 2 % 2], VERBS[number // 4 % 2]
    sentences = [f"{person} {verb} in {place}.", f"{other} sleeps and was good."]
    context = " ".join(sentences if number % 3 else reversed(sentences))
    asked = person if answerable else other
    answers = [{"text": place, "answer_start": context.index(place)}] if answerable else []
    return {
        "context": context,
        "qas": [
            {
                "id": f"q{number}",
                "question": f" {asked} {verb} in",
                "answers": answers,
                "is_impossible": not answerable,
            }
        ],
    }


def write_squad(path: Path, paragraphs: list[dict[str, Any]], version: str = "1.1") -> str:
    """An official file of one article."""
    articles = [{"title": "made up", "paragraphs": paragraphs}]
    path.write_text(json.dumps({"version": version, "data": articles}), encoding="utf-8")
    return str(path)


def write_squad_1(folder: Path, count: int) -> None:
    """Both files of SQuAD 1.1."""
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        write_squad(folder / name, [question(number) for number in range(count)])


def write_squad_2(folder: Path, count: int) -> None:
    """Both files of SQuAD 2.0; every fourth question has no answer."""
    for name in ("train-v2.0.json", "dev-v2.0.json"):
        rows = [question(number, number % 4 != 3) for number in range(count)]
        write_squad(folder / name, rows, "v2.0")


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "squad": write_squad_1,
    "squad_v2": write_squad_2,
}
