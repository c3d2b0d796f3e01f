"""Heads that read the first token's state and no other: which they are, and when that holds."""

from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from ptv2_fast.encoders.backbone_forward import replaced_by_prefix
from ptv2_fast.encoders.hooks import KNOWN_CODE, has_backward_hooks, has_foreign_hooks

# Class of the model -> the module that reads the states of its backbone: "" = the pooler of the
# backbone, None = the forward of model or backbone itself, row 0.
_READERS: dict[str, str | None] = {
    "AlbertForSequenceClassification": None,
    "AlbertForMultipleChoice": None,
    "BertForSequenceClassification": "",
    "BertForMultipleChoice": "",
    "CamembertForSequenceClassification": "classifier",
    "CamembertForMultipleChoice": "",
    "Data2VecTextForSequenceClassification": "classifier",
    "Data2VecTextForMultipleChoice": "",
    "DistilBertForSequenceClassification": None,
    "DistilBertForMultipleChoice": None,
    "ElectraForSequenceClassification": "classifier",
    "ElectraForMultipleChoice": "sequence_summary",
    "ErnieForSequenceClassification": "",
    "ErnieForMultipleChoice": "",
    "EsmForSequenceClassification": "classifier",
    "EuroBertForSequenceClassification": None,
    "GLMForSequenceClassification": None,
    "GLMForMultipleChoice": None,
    "GteForSequenceClassification": "",
    "JinaEmbeddingsV3ForSequenceClassification": "classifier",
    "ModernBertForSequenceClassification": None,
    "MPNetForSequenceClassification": "classifier",
    "MPNetForMultipleChoice": "",
    "NomicBertForSequenceClassification": "",
    "RobertaForSequenceClassification": "classifier",
    "RobertaForMultipleChoice": "",
    "RobertaPreLayerNormForSequenceClassification": "classifier",
    "RobertaPreLayerNormForMultipleChoice": "",
    "XLMRobertaForSequenceClassification": "classifier",
    "XLMRobertaForMultipleChoice": "",
    "XLMRobertaXLForSequenceClassification": "classifier",
    "XLMRobertaXLForMultipleChoice": "",
}
_READ_FIRST = (
    "BertPooler",
    "CamembertClassificationHead",
    "CamembertPooler",
    "Data2VecTextClassificationHead",
    "Data2VecTextPooler",
    "ElectraClassificationHead",
    "ErniePooler",
    "EsmClassificationHead",
    "EsmPooler",
    "GtePooler",
    "JinaEmbeddingsV3ClassificationHead",
    "JinaEmbeddingsV3Pooler",
    "MPNetClassificationHead",
    "MPNetPooler",
    "NomicBertPooler",
    "RobertaClassificationHead",
    "RobertaPooler",
    "RobertaPreLayerNormClassificationHead",
    "RobertaPreLayerNormPooler",
    "XLMRobertaClassificationHead",
    "XLMRobertaPooler",
    "XLMRobertaXLClassificationHead",
    "XLMRobertaXLPooler",
)

# Heads that can read other rows: the option of their configuration, and its value for row 0.
_POOLING = {
    "EuroBertForSequenceClassification": "bos",
    "ModernBertForSequenceClassification": "cls",
}

# Where the wrappers are from that accelerate puts around a forward for mixed precision.
_MIXED_PRECISION = ("accelerate.utils.operations", "torch.amp.autocast_mode")


def reads_first_token_only(
    model: nn.Module, backbone: nn.Module, encoder: nn.Module, exit: nn.Module | None = None
) -> bool:
    """Whether, in a call made now, nothing reads another state than the first token's.

    So it is where all that stands between the encoder's output and the logits is transformers'
    own, neither replaced nor watched, and known to read row 0.

    Args:
        model: with its head.
        backbone, encoder: of this model.
        exit: what normalises the encoder's output, if anything.
    """
    name = type(model).__name__
    if name not in _READERS or torch_module._has_any_global_hook():
        return False
    config: Any = model.config
    if name in _POOLING and config.classifier_pooling != _POOLING[name]:
        return False
    reader, readers = _READERS[name], []
    if reader is not None:
        pooler = getattr(backbone, "pooler", None)
        # A pooler that the head leaves aside is called all the same.
        readers = [pooler] if pooler is not None or not reader else []
        if reader:
            readers.append(getattr(model, reader, None))
    return (
        _has_own_forward(model)
        and (exit is None or not (_is_watched(exit) or "forward" in vars(exit)))
        and all(_is_untouched(module) for module in (backbone, encoder, *readers))
        and all(_reads_first(module) for module in readers)
    )


def _has_own_forward(module: object) -> bool:
    if not isinstance(module, nn.Module):
        return False
    kind = type(module)
    return (
        kind.__module__.startswith(KNOWN_CODE)
        and getattr(kind.forward, "__module__", "").startswith(KNOWN_CODE)
        and _innermost_forward(module) is kind.forward
    )


def _innermost_forward(module: nn.Module) -> object:
    """The forward that a call runs, below a prefix and accelerate's mixed precision."""
    forward: object = vars(module).get("forward", type(module).forward)
    while True:
        replaced = replaced_by_prefix(forward, module)
        if replaced is not None:
            forward = replaced
        elif isinstance(forward, MethodType) and forward.__self__ is module:
            forward = forward.__func__
        elif _converts_numbers(forward):
            forward = forward.__wrapped__  # type: ignore[attr-defined]
        else:
            return forward


def _converts_numbers(forward: object) -> bool:
    """Whether a wrapper is accelerate's mixed precision: autocast, outputs in float32."""
    # Of a function not its __module__, which wrappers take from what they wrap.
    names = getattr(forward, "__globals__", None)
    place = type(forward).__module__ if names is None else names["__name__"]
    return place in _MIXED_PRECISION and hasattr(forward, "__wrapped__")


def _is_untouched(module: object) -> bool:
    return isinstance(module, nn.Module) and _has_own_forward(module) and not _is_watched(module)


def _is_watched(module: nn.Module) -> bool:
    return has_foreign_hooks(module) or has_backward_hooks(module)


def _reads_first(module: object) -> bool:
    name = type(module).__name__
    return name in _READ_FIRST or (
        name == "ElectraSequenceSummary" and getattr(module, "summary_type", None) == "first"
    )
