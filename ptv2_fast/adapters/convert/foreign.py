"""What an adapter of another package is, whatever its layout."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ptv2_fast.adapters.convert.tensor_files import Stored

# The heads of encoders, by the names that `ptv2-fast models` shows, and how classes of transformers
# end that have them.
HEADS = {
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "question": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
    "bare": "Model",
}
# A dense layer and tanh behind the first token, as BERT's pooler is and RoBERTa's head begins.
FIRST_TOKEN_DENSE = "first_token.dense"
_LABELLED = ("classifier.out_proj.weight", "classifier.weight", "score.weight")


@dataclasses.dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of another package; its numbers are still in its files.

    Attributes:
        kind: whose, for messages.
        place: the folder or file.
        prefix: tensors by their names in a PrefixEncoder.
        others: of the head and the rest, by their names in a model.
        fields: of a PTuningV2Config.
        facts: sizes and names that the adapter says about its model, by the adapter's own words.
        counts_prefix: whether the first token stands at position P there.
        needs_cache: whether the prefix reaches the attention as past keys and values of a cache.
        left_out: the layers without a prefix.
        trained: names of modules that were trained whole, or ends of them.
        head: a key of HEADS; None = not said.
        labels: by number; None = not said.
        base_model: the name of the pretrained model; None = not said.
    """

    kind: str
    place: Path
    prefix: dict[str, Stored]
    others: dict[str, Stored]
    fields: dict[str, Any]
    facts: dict[str, Any]
    counts_prefix: bool
    needs_cache: bool = False
    left_out: tuple[int, ...] = ()
    trained: tuple[str, ...] = ()
    head: str | None = None
    labels: tuple[str, ...] | None = None
    base_model: str | None = None

    @property
    def num_labels(self) -> int | None:
        """The outputs of the head; None where there is none, or another one."""
        for ending in _LABELLED:
            for name, stored in self.others.items():
                if name.endswith(ending) and len(stored.shape) == 2:
                    return stored.shape[0]
        return None


def head_of_class(name: str) -> str | None:
    """The head of a class by its name: transformers' own, and those of the authors' code."""
    return next((head for head, ending in HEADS.items() if name.endswith(ending)), None)


def head_of(model: PreTrainedModel) -> str | None:
    """The head of a model, also where its class is a user's own; None = none of HEADS."""
    if model.base_model is model:
        return "bare"
    heads = (head_of_class(kind.__name__) for kind in type(model).__mro__)
    return next((head for head in heads if head not in (None, "bare")), None)


def projection_fields(prefix: dict[str, Stored]) -> dict[str, Any]:
    """What a PTuningV2Config says of a prefix' projection, where the prefix has one.

    Raises:
        ValueError: for one that is no matrix.
    """
    stored = prefix.get("projection.0.weight")
    if stored is None:
        return {}
    if len(stored.shape) != 2:
        raise ValueError(f"{stored.file.path}: expected a matrix {stored.name}, got the shape "
                         f"{list(stored.shape)}")  # fmt: skip
    return {"prefix_projection": True, "encoder_hidden_size": stored.shape[0]}


def labels_of(id2label: object, place: Path) -> tuple[str, ...] | None:
    """The labels of a configuration by number; None where it does not say.

    Raises:
        ValueError: for numbers that are not those below their count.
    """
    if id2label is None or id2label == {}:
        return None
    numbers = [str(number) for number in range(len(id2label))] if isinstance(id2label, dict) else []
    if not isinstance(id2label, dict) or set(map(str, id2label)) != set(numbers):
        raise ValueError(f"{place}: id2label: expected a label for each number, got "
                         f"{id2label!r:.100}")  # fmt: skip
    by_number = {str(number): label for number, label in id2label.items()}
    return tuple(str(by_number[number]) for number in numbers)


def read_count(content: dict[str, Any], name: str, place: Path) -> int:
    """A number of things that a configuration says.

    Raises:
        ValueError: for anything but an integer above 0.
    """
    value = content.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{place}: {name}: expected an integer >= 1, got {value!r:.100}")
    return value
