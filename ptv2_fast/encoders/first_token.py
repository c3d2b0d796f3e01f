"""Heads that read the first token's state and no other: which they are, and when that holds."""

from torch import nn
from torch.nn.modules import module as torch_module

# The argument by which an attached model tells its backbone, for one call, that only the first
# token is read. transformers' heads hand it down among their keyword arguments.
FIRST_TOKEN_ARGUMENT = "ptv2_first_token_only"

# Class of the model -> the module that reads the backbone's states ("" = the backbone's pooler).
_READERS = {
    "BertForSequenceClassification": "",
    "BertForMultipleChoice": "",
    "RobertaForSequenceClassification": "classifier",
    "RobertaForMultipleChoice": "",
    "XLMRobertaForSequenceClassification": "classifier",
    "XLMRobertaForMultipleChoice": "",
    "ElectraForSequenceClassification": "classifier",
    "ElectraForMultipleChoice": "sequence_summary",
}
_READ_FIRST = (
    "BertPooler",
    "RobertaPooler",
    "RobertaClassificationHead",
    "XLMRobertaPooler",
    "XLMRobertaClassificationHead",
    "ElectraClassificationHead",
)


def reads_first_only(model: nn.Module, backbone: nn.Module, encoder: nn.Module) -> bool:
    """Whether, in a call made now, nothing reads another state than the first token's.

    So it is where all that stands between the encoder's output and the logits is transformers'
    own, neither replaced nor watched, and known to read row 0.

    Args:
        model: with its head.
        backbone, encoder: of this model.
    """
    reader = _READERS.get(type(model).__name__)
    if reader is None or torch_module._has_any_global_hook():
        return False
    pooler = getattr(backbone, "pooler", None)
    # A pooler that the head leaves aside is called all the same.
    readers = [pooler] if pooler is not None or not reader else []
    if reader:
        readers.append(getattr(model, reader, None))
    return (
        _has_own_forward(model)
        and all(_is_untouched(module) for module in (backbone, encoder, *readers))
        and all(_reads_first(module) for module in readers)
    )


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether someone else than this package and transformers listens to a module's forward."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ours = ("ptv2_fast.", "transformers.")
    return any(not getattr(hook, "__module__", "").startswith(ours) for hook in hooks)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether someone listens to a module's backward pass."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _has_own_forward(module: object) -> bool:
    if not isinstance(module, nn.Module):
        return False
    kind, models = type(module), "transformers.models."
    return (
        kind.__module__.startswith(models)
        and getattr(kind.forward, "__module__", "").startswith(models)
        and "forward" not in vars(module)
    )


def _is_untouched(module: object) -> bool:
    return (
        isinstance(module, nn.Module)
        and _has_own_forward(module)
        and not has_foreign_hooks(module)
        and not has_backward_hooks(module)
    )


def _reads_first(module: object) -> bool:
    name = type(module).__name__
    return name in _READ_FIRST or (
        name == "ElectraSequenceSummary" and getattr(module, "summary_type", None) == "first"
    )
