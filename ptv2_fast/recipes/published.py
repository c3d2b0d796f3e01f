"""Scores that the P-Tuning v2 paper and its authors' repository print, from published.yaml.

Only the standard library and yaml are imported.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# Column of the paper -> our method. "PT" is the better of two shallow methods on a frozen encoder;
# "MPT-2" is p-tuning-v2 that starts from a multi-task run.
COLUMNS = {
    "FT": "fine-tuning",
    "PT": "prompt-tuning",
    "PT-2": "p-tuning-v2",
    "MPT-2": "p-tuning-v2",
}
# The paper's model -> its titles, and names under which it is published.
TITLES = {
    "bert-large": "BERT-large",
    "roberta-large": "RoBERTa-large",
    "deberta-xlarge": "DeBERTa-xlarge",
    "glm-xlarge": "GLM-xlarge",
    "glm-xxlarge": "GLM-xxlarge",
}
_HUB_NAMES = {
    "bert-large-cased": "bert-large",
    "bert-large-uncased": "bert-large",
    "glm-2b": "glm-xlarge",
    "glm-10b": "glm-xxlarge",
    **{name: name for name in TITLES},
}
_README = "README of THUDM/P-tuning-v2"


@dataclass(frozen=True, kw_only=True)
class PublishedScore:
    """One printed score.

    Attributes:
        task: name of the published data set.
        model: a key of TITLES.
        column: a key of COLUMNS.
        metric: as our reports call it.
        split: "validation", "test", "test_wsj" or "test_brown".
        head: "linear", or "lm" for the language model's head in Table 4.
        value: in percent.
        source: "Table 2", "Table 3", "Table 4", or the authors' README.
        verified: whether a written source was compared with it (see published.yaml).
        best_epoch: of the authors' run; None where they do not say.
    """

    task: str
    model: str
    column: str
    metric: str
    split: str = "validation"
    head: str = "linear"
    value: float
    source: str
    verified: bool
    best_epoch: int | None = None


def model_size(model: str) -> str | None:
    """The paper's model that a hub name or folder names; None for any other.

    "google-bert/bert-large-cased" -> "bert-large"; variants that were trained differently, such as
    bert-large-uncased-whole-word-masking, are others.
    """
    return _HUB_NAMES.get(model.rstrip("/").rpartition("/")[2].lower())


def published(task: str, model: str) -> list[PublishedScore]:
    """The scores for a data set and a model, the paper's before the README's.

    Args:
        task: name of a published data set, as "rte".
        model: hub name, folder or the paper's name, as "FacebookAI/roberta-large".

    Returns:
        Every method, metric, split and source; empty where nothing was published.
    """
    size = model_size(model)
    return [score for score in published_scores() if (score.task, score.model) == (task, size)]


@functools.cache
def published_scores() -> tuple[PublishedScore, ...]:
    """Every score, in the order of the paper's tables, then the README's."""
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    sources = {**content["paper"], _README: content["readme"]}
    return tuple(
        score for source, rows in sources.items() for row in rows for score in _of_row(row, source)
    )


def _of_row(row: dict[str, Any], source: str) -> Iterator[PublishedScore]:
    row = dict(row)
    verified = COLUMNS if source == _README else row.pop("confirmed", ())
    values = {column: row.pop(column) for column in COLUMNS if column in row}
    for column, value in values.items():
        yield PublishedScore(
            **row, column=column, value=value, source=source, verified=column in verified
        )
