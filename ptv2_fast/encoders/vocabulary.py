"""Tokens that were added to a model: their rows of the word embeddings, which no checkpoint has.

`resize_token_embeddings` draws them at random. An adapter keeps those beyond the vocabulary of the
base model, and the size of the whole.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROWS_NAME = "added_token_embeddings"  # in an adapter's file; the model has no such tensor


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of a model's word embeddings."""
    return _weight(model).shape[0]


def base_vocabulary_size(model: PreTrainedModel) -> int:
    """Rows that the checkpoint has which a model was loaded from; nothing is downloaded.

    Where that is not to be found (a model made from a configuration), those that the model has now.
    """
    name, kind = model.config.name_or_path, type(model.config)
    if name:
        try:
            base = kind.from_pretrained(name, local_files_only=True, trust_remote_code=False)
            return base.vocab_size
        except (OSError, ValueError):
            pass
    return vocabulary_size(model)


def embeddings_name(model: PreTrainedModel) -> str:
    """The word embeddings' name in the state dict; "" where they are no parameter of their own."""
    weight = _weight(model)
    names = (name for name, parameter in model.named_parameters() if parameter is weight)
    return next(names, "")


def added_rows(
    model: PreTrainedModel, base_size: int, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What an adapter keeps of the word embeddings: nothing, or the rows from `base_size` on.

    Args:
        model: attached.
        base_size: rows of the base model.
        state_dict: take them from here, where it has them.
    """
    if vocabulary_size(model) <= base_size:
        return {}
    weight = (state_dict or {}).get(embeddings_name(model), _weight(model))
    return {ROWS_NAME: weight[base_size:]}


def check_vocabulary(
    description: dict[str, Any],
    rows: Tensor | None,
    model: PreTrainedModel,
    may_resize: bool = True,
) -> None:
    """Check that a model has the vocabulary of an adapter, or lacks the added rows only.

    Args:
        description: what adapter_config.json says; one without sizes is of an older version.
        rows: those of added tokens, or None.
        model: plain or attached.
        may_resize: the caller can give the model the added rows.

    Raises:
        ValueError: when it has not, or sizes and rows contradict each other.
    """
    size, current = description.get("vocab_size"), vocabulary_size(model)
    if size is None and rows is None:
        return
    base_size = description.get("base_vocab_size")
    count, width = (0, 0) if rows is None else (rows.shape if rows.dim() == 2 else (-1, -1))
    expected = _weight(model).shape[1]
    if not isinstance(size, int) or not isinstance(base_size, int) or (
        rows is not None and (count != size - base_size or count < 1 or width != expected)
    ):  # fmt: skip
        raise ValueError(
            f"adapter: expected {ROWS_NAME} for the tokens between base_vocab_size and vocab_size, "
            f"got {None if rows is None else list(rows.shape)} for {base_size!r} and {size!r}"
        )
    if current != size and (rows is None or current != base_size or not may_resize):
        raise ValueError(
            f"model: expected the vocabulary of {size} tokens that the adapter was trained with, "
            f"got {current}; call model.resize_token_embeddings({size}) first, with the tokens "
            "that were added to the tokenizer"
        )


def resize_vocabulary(model: PreTrainedModel, size: int) -> None:
    """Give a model so many rows of word embeddings, if it has others."""
    if vocabulary_size(model) != size:
        model.resize_token_embeddings(size, mean_resizing=False)


@torch.no_grad()
def restore_rows(model: PreTrainedModel, rows: Tensor | None) -> None:
    """Overwrite the last rows of the word embeddings."""
    if rows is not None:
        _weight(model)[-len(rows) :].copy_(rows)


def _weight(model: PreTrainedModel) -> Tensor:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight
