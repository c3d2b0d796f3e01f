"""Requests and answers as they are written: TEI's /predict, vLLM's and OpenAI's /v1."""

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ptv2_fast.serving.errors import RequestError


def _plain(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected text, got half of a surrogate pair") from None
    return text


Name = Annotated[str, Field(min_length=1, max_length=128)]
# One text, or the texts that an adapter reads together: a pair, a question and its context.
Plain = Annotated[str, AfterValidator(_plain)]
Text = Plain | Annotated[list[Plain], Field(min_length=1)]


@dataclass(frozen=True)
class Prediction:
    """What an adapter says of a text.

    Attributes:
        line: as `ptv2-fast predict` prints it.
        labels: of the adapter; of the choices, where the text has such.
        logits: of the labels; None where the adapter does not choose a label for the whole text.
        tokens: that the encoder saw.
    """

    line: dict[str, Any]
    labels: Sequence[str]
    logits: Sequence[float] | None
    tokens: int


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class PredictRequest(_Strict):
    """A text, or several; each element is a text or the list of the texts that an adapter reads
    together. One adapter for all texts, one for each text, or several for one text."""

    inputs: Plain | Annotated[list[Text], Field(min_length=1)]
    adapter: Name | list[Name] | None = Field(
        None, description="the adapter, or one for each input; may be left out where one is loaded"
    )
    model: Name | list[Name] | None = Field(None, description="another word for adapter")
    top_k: int | None = Field(None, ge=1, description="labels or answers of each text; all if null")
    aggregate: bool = Field(True, description="tokens: spans rather than words")
    truncate: bool = Field(False, description="cut texts that are too long rather than refuse them")
    raw_scores: bool = Field(False, description="logits rather than probabilities of labels")


class InputRequest(_Strict):
    """vLLM's: one adapter for one text or several."""

    model: Name | None = None
    input: Plain | Annotated[list[Text], Field(min_length=1)]
    truncate: bool = False
    user: str | None = Field(None, description="not read")


class LoadRequest(_Strict):
    """An adapter to load, of a run's folder or an adapter's, under the server's adapter root."""

    name: Name
    folder: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadRequest(_Strict):
    """An adapter to unload."""

    name: Name


class ErrorBody(BaseModel):
    """The shape of every error."""

    error: str
    error_type: str


class LabelScore(BaseModel):
    """A label and its probability; of a regression, the number."""

    label: str
    score: float
    choice: str | None = Field(None, description="the text that the label numbers, of choices")


class Span(BaseModel):
    """A span of a text, places in characters."""

    entity_group: str
    word: str
    start: int
    end: int
    score: float | None


class Word(BaseModel):
    """A word of a text."""

    entity: str
    word: str
    index: int
    start: int
    end: int
    score: float | None


class Answer(BaseModel):
    """An answer to a question, "" for none, and its probability among those that are given."""

    answer: str
    score: float | None


Answers = list[LabelScore] | list[Span] | list[Word] | list[Answer]


class ClassifyData(BaseModel):
    """vLLM's; the label of a regression is "score", and its one "probability" the number."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class TokenData(BaseModel):
    """Words of a text with their labels and probabilities, and the spans that they make."""

    index: int
    words: list[str]
    labels: list[str]
    scores: list[float | None]
    offsets: list[tuple[int, int]]
    entities: list[Span]


class Usage(BaseModel):
    """Tokens that the encoder saw."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class ClassifyResponse(BaseModel):
    """The answer of /v1/classify."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[ClassifyData]
    usage: Usage


class TokenClassifyResponse(BaseModel):
    """The answer of /v1/token_classify."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[TokenData]
    usage: Usage


def texts_of(inputs: str | list) -> tuple[list[str | list[str]], bool]:
    """The texts of a request, and whether they came alone."""
    if isinstance(inputs, str):
        return [inputs], True
    return [one[0] if isinstance(one, list) and len(one) == 1 else one for one in inputs], False


def paired(
    texts: list[str | list[str]], adapters: str | list[str]
) -> tuple[list[str | list[str]], list[str]]:
    """A text and an adapter for each row: one of either goes with all of the other.

    Raises:
        RequestError: 422 for several of both, not as many of each.
    """
    names = [adapters] if isinstance(adapters, str) else adapters
    if len(names) == 1:
        names = names * len(texts)
    elif len(texts) == 1:
        texts = texts * len(names)
    if len(names) != len(texts) or not names:
        message = f"adapter: expected a name for each of {len(texts)} inputs, got {len(names)}"
        raise RequestError(422, "validation", message)
    return texts, names


def answers(prediction: Prediction, request: PredictRequest) -> list[dict[str, Any]]:
    """The element of /predict for one text."""
    line, count = prediction.line, request.top_k
    if prediction.logits is not None:
        return _labels(prediction, request.raw_scores)[:count]
    if "n_best" in line:
        found = [{"answer": one["text"], "score": one["probability"]} for one in line["n_best"]]
        return found[:count]
    if "words" in line:
        spans = _spans(line)
        return spans if request.aggregate and spans is not None else _words(line)
    return [{"label": label, "score": line["score"]} for label in prediction.labels]


def classify_data(index: int, prediction: Prediction) -> dict[str, Any]:
    """The element of /v1/classify for one text."""
    if prediction.logits is None:
        label, shares = prediction.labels[0], [prediction.line["score"]]
    else:
        label, shares = prediction.line["label"], softmax(prediction.logits)
    return {"index": index, "label": label, "probs": shares, "num_classes": len(shares)}


def token_data(index: int, prediction: Prediction) -> dict[str, Any]:
    """The element of /v1/token_classify for one text."""
    line = prediction.line
    return {
        "index": index,
        "words": line["words"],
        "labels": line["tags"],
        "scores": line["scores"],
        "offsets": line["offsets"],
        "entities": _spans(line) or [],
    }


def envelope(kind: str, model: str, data: list, predictions: Sequence[Prediction]) -> dict:
    """What the /v1 endpoints put around their data."""
    tokens = sum(prediction.tokens for prediction in predictions)
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": Usage(prompt_tokens=tokens, total_tokens=tokens).model_dump(),
    }


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities, which sum to 1."""
    best = max(logits)
    weights = [math.exp(logit - best) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _labels(prediction: Prediction, raw: bool) -> list[dict[str, Any]]:
    """Labels with their scores, the best first."""
    assert prediction.logits is not None
    scores = list(prediction.logits) if raw else softmax(prediction.logits)
    pairs = sorted(zip(prediction.labels, scores, strict=True), key=lambda pair: -pair[1])
    choices = prediction.line.get("choices")
    return [
        {"label": label, "score": score}
        | ({} if choices is None else {"choice": choices[int(label)]})
        for label, score in pairs
    ]


def _spans(line: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Entities, or the arguments of a verb; None where labels are of single words."""
    for name, kind in (("entities", "type"), ("arguments", "role")):
        if name in line:
            return [
                {
                    "entity_group": span[kind],
                    "word": span["text"],
                    "start": span["start"],
                    "end": span["end"],
                    "score": span["score"],
                }
                for span in line[name]
            ]
    return None


def _words(line: dict[str, Any]) -> list[dict[str, Any]]:
    columns = zip(line["words"], line["tags"], line["scores"], line["offsets"], strict=True)
    return [
        {"entity": tag, "word": word, "index": index, "start": start, "end": end, "score": score}
        for index, (word, tag, score, (start, end)) in enumerate(columns)
    ]
