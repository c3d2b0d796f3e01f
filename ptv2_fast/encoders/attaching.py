"""attach, detach and what one asks of an attached model."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.adapter_tensors import ENCODER_NAME
from ptv2_fast.encoders.attachment import Attachment, find_attachment
from ptv2_fast.encoders.disabling import disabling
from ptv2_fast.encoders.families import check_backbone, find_family
from ptv2_fast.encoders.family import Family
from ptv2_fast.encoders.token_init import token_prefix
from ptv2_fast.prefix import PrefixEncoder, PTuningV2Config


def attach(
    model: PreTrainedModel, config: PTuningV2Config, init_input_ids: Tensor | None = None
) -> PreTrainedModel:
    """Put a trainable prefix in front of every layer's attention (P-Tuning v2), in place.

    Frozen: the backbone, which is embeddings and encoder layers. Trainable: the prefix, registered
    as `prefix_encoder` with float32 weights, and everything outside the backbone, as head and
    pooler. With `train_biases`, `train_norms` or `low_rank` the prefix encoder also holds trainable
    copies of biases and norms, and updates of matrices. The class of the model and the signature of
    its forward do not change.

    At the end two tokens run through the backbone, to prove that every layer calls the attention
    operator exactly once. On the meta device, or with hooks on all modules, the first forward
    proves it.

    Args:
        model: a model of transformers of a supported family, bare or with a head.
        config: see `PTuningV2Config`.
        init_input_ids: for `init="tokens"`: token ids of any shape, at least P of them. The frozen
            backbone runs on the first P as one text, and their keys and values in each layer
            become the prefix; None = P random ids.

    Returns:
        The same object.

    Raises:
        ValueError: for a model that cannot carry this prefix (the message says why, and for an
            unsupported `model_type` what is supported), or one that already carries an adapter.
    """
    if init_input_ids is not None and config.init != "tokens":
        raise ValueError(f"init_input_ids: expected None with init={config.init!r}, got token ids")
    family = check_model(model, config)
    encoder = make_encoder(model, family, config)
    if config.init == "tokens":
        encoder.set_layers(token_prefix(model, family, encoder, init_input_ids))
    Attachment(model, family, encoder)
    return model


def attach_uninitialised(model: PreTrainedModel, config: PTuningV2Config) -> Attachment:
    """Attach a prefix whose values the caller is about to overwrite."""
    family = check_model(model, config)
    return Attachment(model, family, make_encoder(model, family, config))


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`: forward, configuration, requires_grad flags and `save_pretrained`.

    Weights outside the backbone (the head) keep what they learned.

    Raises:
        ValueError: when the model is not attached.
    """
    require_attachment(model).undo()
    return model


@contextlib.contextmanager
def disabled(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Within the context the model runs without its prefix and without its position offset.

    Its layers have the biases, norms and matrices of before `attach`. The head stays the trained
    one. Other threads keep their prefix.

    Raises:
        ValueError: when the model is not attached.
    """
    with disabling(require_attachment(model)):
        yield model


def max_input_tokens(model: PreTrainedModel) -> int:
    """Longest input, in tokens, that a supported model takes; attached or not.

    With `position_offset="prefix"` the prefix takes P of the positions.

    Raises:
        ValueError: when the model's family is not supported.
    """
    attachment = find_attachment(model)
    taken = 0 if attachment is None else attachment.positions_taken
    return find_family(model.config).max_positions(model.config) - taken


def get_nb_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the numbers of trainable and of all parameters, and their ratio, in PEFT's format."""
    trainable, total = get_nb_trainable_parameters(model)
    print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )


def require_attachment(model: nn.Module) -> Attachment:
    """The attachment of a model.

    Raises:
        ValueError: when it has none.
    """
    attachment = find_attachment(model)
    if attachment is None:
        raise ValueError(f"model: expected an attached model, got a plain {type(model).__name__}")
    return attachment


def check_model(model: PreTrainedModel, config: PTuningV2Config) -> Family:
    """The family of a model that can carry this prefix.

    Raises:
        ValueError: as `attach`.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            "model: expected a transformers PreTrainedModel (attach before compiling or wrapping "
            f"it), got {type(model).__module__}.{type(model).__name__}"
        )
    if find_attachment(model) is not None or hasattr(model, ENCODER_NAME):
        raise ValueError("model: expected a model without a prefix, got one; detach it first")
    for name, module in model.named_modules():
        if find_attachment(module) is not None:
            raise ValueError(
                "model: expected a backbone without a prefix, got one that another attached model "
                f"shares ({name}); detach that one first"
            )
    from_peft = any(type(module).__module__.startswith("peft.") for module in model.modules())
    if from_peft or hasattr(model, "peft_config"):
        raise ValueError("model: expected a model without PEFT adapters, got one with them")
    check_backbone(model.base_model)
    family = find_family(model.config)
    limit = family.max_positions(model.config)
    if config.position_offset == "prefix" and config.num_virtual_tokens >= limit:
        raise ValueError(
            "num_virtual_tokens: expected fewer than the encoder's positions with "
            f"position_offset='prefix', got {config.num_virtual_tokens} of {limit}: no position "
            "remains for a token"
        )
    return family


def make_encoder(model: PreTrainedModel, family: Family, config: PTuningV2Config) -> PrefixEncoder:
    """A new prefix on a model's device.

    Raises:
        ValueError: for heads that the operator does not serve.
    """
    heads, head_dim = family.key_shape(model.config)
    if head_dim % 8 != 0 or head_dim > 256:
        raise ValueError(
            f"model: expected a head_dim that is a multiple of 8 up to 256, got {head_dim}"
        )
    num_layers = len(family.layer_modules(model.base_model))
    encoder = PrefixEncoder(config, num_layers=num_layers, num_heads=heads, head_dim=head_dim)
    return encoder.to(model.get_input_embeddings().weight.device)  # type: ignore[arg-type]
