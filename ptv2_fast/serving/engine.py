"""A bank of adapters as the server runs it: texts to rows, rows to predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptv2_fast.serving.batching import Row
from ptv2_fast.serving.errors import RequestError, unknown_adapter, unloaded
from ptv2_fast.serving.shapes import Prediction
from ptv2_fast.tasks.memory_table import MemoryTable
from ptv2_fast.tasks.multiple_choice import MultipleChoice
from ptv2_fast.tasks.sources import Part, Source
from ptv2_fast.tasks.task import Examples, Features
from ptv2_fast.tasks.text_regression import TextRegression
from ptv2_fast.training.bank import AdapterBank
from ptv2_fast.training.bank_batches import AdapterExamples
from ptv2_fast.training.predictions import BoundTask
from ptv2_fast.training.run_lookup import find_run


class _Content(NamedTuple):
    """Of a row: one text for the adapter that was loaded when it came."""

    run: BoundTask
    features: Features


class BankEngine:
    """The adapters of a bank, all of runs.

    Args:
        bank: that this engine alone loads into and tokenizes for.
        model_name: of its encoder, for people.
        max_batch_tokens: of a pass, padding included; a text of several windows may take several.
    """

    def __init__(self, bank: AdapterBank, model_name: str, max_batch_tokens: int) -> None:
        self.model_name = model_name
        self._bank, self._max_batch_tokens = bank, max_batch_tokens

    @property
    def names(self) -> list[str]:
        """Of the adapters that are loaded."""
        return list(self._bank.names)

    def facts(self, name: str) -> dict[str, Any]:
        """What /v1/models says of an adapter beside its name."""
        run = self._run_of(name)
        is_number = isinstance(run.task, TextRegression)
        return {
            "task": "text-regression" if is_number else run.task.name,
            "inputs": run.task.text_names,
            "labels": self._bank.labels(name) or [],
            "max_length": run.max_length,
            "root": self.model_name,
        }

    def load(self, name: str, folder: Path) -> None:
        """Load the adapter of a run.

        Raises:
            ValueError: as `AdapterBank.load`, and for a folder of no run.
        """
        find_run(folder)
        self._bank.load(name, folder)

    def unload(self, name: str) -> None:
        """Let an adapter go."""
        self._bank.unload(name)

    def prepare(
        self, texts: Sequence[str | list[str]], adapters: Sequence[str], truncate: bool
    ) -> list[Row]:
        """The rows of texts, each for the adapter in its place.

        Raises:
            RequestError: for an unknown adapter, and a text that cannot be served.
        """
        runs = {name: self._run_of(name) for name in adapters}
        typed = [
            _typed(text, runs[name], place)
            for place, (text, name) in enumerate(zip(texts, adapters, strict=True))
        ]
        places: dict[Any, list[int]] = {}
        for place, name in enumerate(adapters):
            # The examples of a table have as many choices each.
            is_choice = isinstance(runs[name].task, MultipleChoice)
            key = (name, typed[place].count("\t") if is_choice else 0)
            places.setdefault(key, []).append(place)
        rows: dict[int, Row] = {}
        for (name, _), own in places.items():
            run = runs[name]
            features = _features([typed[place] for place in own], run, own, truncate)
            for index, place in enumerate(own):
                one = features.take([index])
                lengths = [length for row in one.input_lengths for length in row]
                rows[place] = Row(name, lengths, _Content(run, one))
        return [rows[place] for place in range(len(texts))]

    def run(self, rows: Sequence[Row]) -> list[Prediction | Exception]:
        """A result for each row; of a row whose adapter went, a RequestError."""
        groups: dict[Any, list[int]] = {}
        for number, row in enumerate(rows):
            is_choice = isinstance(row.content.run.task, MultipleChoice)
            key = (row.adapter, id(row.content.run), len(row.lengths) if is_choice else 0)
            groups.setdefault(key, []).append(number)
        parts: list[tuple[AdapterExamples, list[int]]] = []
        found: dict[int, Prediction | Exception] = {}
        for (name, *_), numbers in groups.items():
            run = rows[numbers[0]].content.run
            if not self._is_current(name, run):
                found |= dict.fromkeys(numbers, unloaded(name))
                continue
            features = [rows[number].content.features for number in numbers]
            parts.append((AdapterExamples(name, run, _joined(features)), numbers))
        if parts:
            longest = max(max(rows[n].lengths) for _, numbers in parts for n in numbers)
            batch_size = max(1, self._max_batch_tokens // longest)
            self._bank.run_parts([part for part, _ in parts], batch_size)
        for part, numbers in parts:
            for number, result, line in zip(numbers, part.results, part.lines(), strict=True):
                found[number] = _prediction(part.run, result, line, rows[number].tokens)
        return [found[number] for number in range(len(rows))]

    def _run_of(self, name: str) -> BoundTask:
        try:
            return self._bank.run_of(name)
        except ValueError as error:
            raise unknown_adapter(name, self.names) from error

    def _is_current(self, name: str, run: BoundTask) -> bool:
        try:
            return self._bank.run_of(name) is run
        except ValueError:
            return False


def _typed(given: str | list[str], run: BoundTask, place: int) -> str:
    """A text as the task takes typed ones: with tabs between its parts.

    Raises:
        RequestError: 400 for an empty one, 422 for another number of parts.
    """
    where, names = f"inputs: text {place + 1}", run.task.text_names
    if any(not part.strip() for part in ([given] if isinstance(given, str) else given)):
        raise RequestError(400, "empty", f"{where}: expected text, got an empty one")
    if isinstance(given, str):
        return given
    has_choices = isinstance(run.task, MultipleChoice)
    if len(given) < 3 if has_choices else len(given) != len(names):
        raise RequestError(
            422, "validation", f"{where}: expected {' and '.join(names)}, got {len(given)} texts"
        )
    if any("\t" in part for part in given):
        raise RequestError(422, "validation", f"{where}: expected no tabs in a list of texts")
    return "\t".join(given)


def _features(texts: list[str], run: BoundTask, places: list[int], truncate: bool) -> Features:
    """What the encoder reads of texts for one adapter.

    Raises:
        RequestError: 413 for one that is too long, 422 for one that does not fit the task.
    """
    source = Source("inputs", part=Part([place + 1 for place in places]))
    is_strict = run.task.options.long_input == "error"
    try:
        examples = run.task.from_texts(texts, source)
    except ValueError as error:
        raise RequestError(422, "validation", str(error)) from error
    try:
        features = run.featurize(examples)
    except ValueError as error:
        if is_strict:
            raise _too_long(run) from error
        raise RequestError(422, "validation", str(error)) from error
    if features.truncated and not truncate:
        raise _too_long(run)
    return features


def _too_long(run: BoundTask) -> RequestError:
    message = f"inputs: expected at most {run.max_length} tokens in a text, got more"
    hint = "" if run.task.options.long_input == "error" else "; with truncate they are cut"
    return RequestError(413, "validation", message + hint)


def _joined(features: Sequence[Features]) -> Features:
    """Those of several texts as of one group of examples."""
    if len(features) == 1:
        return features[0]
    tables = [one.table for one in features]
    counts = [len(table) for table in tables]
    table = MemoryTable.joined([one.remove_columns("example") for one in tables])
    owners = [index for index, count in enumerate(counts) for _ in range(count)]
    examples = MemoryTable.joined([one.examples.table for one in features])
    return Features(
        table.add_column("example", owners), Examples(features[0].examples.source, examples), 0
    )


def _prediction(run: BoundTask, result: Any, line: dict[str, Any], tokens: int) -> Prediction:
    logits = result.get("logits") if isinstance(result, dict) else None
    labels: Sequence[str] = run.labels
    if isinstance(run.task, MultipleChoice):
        labels = [str(index) for index in range(len(line["choices"]))]
    return Prediction(line, labels, logits, tokens)
