"""Which tensors of a model belong to an adapter: what is trained and saved beside the prefix."""

from transformers import PreTrainedModel

from ptv2_fast.encoders.families import Family


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


def _qualified(model: PreTrainedModel, names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Prefixes of the state dict's keys below the named parts of the backbone."""
    base = "" if model.base_model is model else model.base_model_prefix + "."
    return tuple(f"{base}{name}." for name in names)
