"""Which tensors of a model belong to an adapter: what is trained and saved beside the prefix.

What trains is saved: parameters that are unfrozen after attach, or come with a module that is put
into the model later, are in no adapter. They are refused when the adapter is written, and before
that in the first forward of a training step: in training mode, with gradients, of a model that is
attached for training. Without training (in eval mode, say) they get their gradients as ever.
"""

from torch import nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.family import Family

ENCODER_NAME = "prefix_encoder"


def find_saved_names(
    model: PreTrainedModel, family: Family, modules_to_save: tuple[str, ...] | None
) -> list[str]:
    """Keys of the state dict outside the frozen parts of the backbone, or chosen by name.

    Args:
        model: without a prefix.
        family: its row in the table of families.
        modules_to_save: module names, whole or the end of a dotted name.

    Raises:
        ValueError: when one of `modules_to_save` names no module.
    """
    chosen: list[str] = []
    for entry in modules_to_save or ():
        matches = [
            name + "."
            for name, _ in model.named_modules()
            if name == entry or name.endswith("." + entry)
        ]
        if not matches:
            raise ValueError(
                f"modules_to_save: expected names of modules of {type(model).__name__}, got "
                f"{entry!r}"
            )
        chosen += matches
    stems = _qualified(model, family.frozen)
    tensors = model.state_dict(keep_vars=True)
    frozen = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(stems) and not name.startswith(tuple(chosen))
    }
    # By identity, so that an output layer tied to the frozen word embeddings is frozen too.
    frozen_ids = {id(tensor) for tensor in frozen.values()}
    return [
        name
        for name, tensor in tensors.items()
        if name not in frozen and id(tensor) not in frozen_ids
    ]


def trains_layers(model: PreTrainedModel, family: Family, saved_names: list[str]) -> bool:
    """Whether parameters of the encoder layers are among the saved tensors."""
    return any(name.startswith(_qualified(model, (family.layers,))) for name in saved_names)


def trained_ids(model: nn.Module) -> tuple[int, ...]:
    """Identities of the parameters that train; 10 times as fast as by their names."""
    found, modules = [], [model]
    while modules:
        module = modules.pop()
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                found.append(id(parameter))
        modules.extend(child for child in module._modules.values() if child is not None)
    return tuple(found)


def prefix_trains(model: nn.Module) -> bool:
    """Whether a parameter of the prefix trains."""
    encoder = model.get_submodule(ENCODER_NAME)
    return any(parameter.requires_grad for parameter in encoder.parameters())


def check_saved(model: nn.Module, saved_names: list[str]) -> None:
    """Check that an adapter holds all that trains.

    Raises:
        ValueError: when it does not.
    """
    saved = set(saved_names)
    lost = [name for name, p in model.named_parameters() if p.requires_grad and name not in saved]
    if not lost:
        return
    advice = "freeze them, or attach with their modules in modules_to_save"
    if not prefix_trains(model):
        advice = (
            "the prefix itself is frozen, as PEFT leaves it: a model trains a prefix or PEFT's "
            "adapters; detach one of them, or attach with inference_mode=True to keep the prefix "
            "as it is"
        )
    more = ", ..." if len(lost) > 5 else ""
    raise ValueError(
        f"model: expected that the adapter holds all that trains, got {len(lost)} other trained "
        f"parameters: {', '.join(lost[:5])}{more}; {advice}"
    )


def _qualified(model: PreTrainedModel, names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Prefixes of the state dict's keys below the named parts of the backbone."""
    base = "" if model.base_model is model else model.base_model_prefix + "."
    return tuple(f"{base}{name}." for name in names)


def frozen_stems(model: PreTrainedModel, family: Family) -> tuple[str, ...]:
    """What the names of tensors begin with that no adapter holds, but by `modules_to_save`."""
    return _qualified(model, family.frozen)
