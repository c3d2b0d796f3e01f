"""What an adapter of an attached model is: what its configuration says, and its tensors."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import ptv2_fast
from ptv2_fast.encoders.adapter_tensors import check_saved
from ptv2_fast.encoders.vocabulary import added_rows, embeddings_name, vocabulary_size
from ptv2_fast.prefix import EXECUTION_FIELDS

if TYPE_CHECKING:
    from ptv2_fast.encoders.attachment import Attachment


def describe_adapter(attachment: "Attachment") -> dict[str, Any]:
    """What ptv2_config.json says about this model, JSON-ready."""
    config = attachment.model.config
    fields = attachment.config.to_dict().items()
    return {
        "prefix_config": {k: value for k, value in fields if k not in EXECUTION_FIELDS},
        "base_model": config.name_or_path,
        "model_class": type(attachment.model).__name__,
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": vocabulary_size(attachment.model),
        "base_vocab_size": attachment.base_vocabulary_size,
        "num_labels": config.num_labels,
        # Users name classes by numbers too, numpy's among them, which JSON does not know.
        "id2label": {int(n): str(label) for n, label in (config.id2label or {}).items()},
        "problem_type": config.problem_type,
        "max_length": attachment.family.max_positions(config) - attachment.positions_taken,
        "torch_version": torch.__version__,
        "ptv2_version": ptv2_fast.__version__,
    }


def select_tensors(
    attachment: "Attachment", state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of the adapter that the model has too, from `state_dict` or from the model.

    Raises:
        ValueError: when `state_dict` lacks one of them, or a parameter trains that the adapter
            would not hold.
    """
    check_saved(attachment.model, attachment.saved_names)
    tensors = attachment.model.state_dict() if state_dict is None else state_dict
    missing = [name for name in attachment.saved_names if name not in tensors]
    if missing:
        raise ValueError(f"state_dict: expected the adapter's tensors, got none for {missing}")
    return {name: tensors[name] for name in attachment.saved_names}


def written_tensors(
    attachment: "Attachment", state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """As `select_tensors`, with the rows of added tokens."""
    tensors = select_tensors(attachment, state_dict)
    if embeddings_name(attachment.model) in tensors:
        return tensors
    return tensors | added_rows(attachment.model, attachment.base_vocabulary_size, state_dict)
