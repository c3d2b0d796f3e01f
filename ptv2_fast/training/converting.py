"""Folders of adapters into other folders: ours of those of other packages, and the other way."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from ptv2_fast.adapters import export_peft, fold_adapter, save_adapter
from ptv2_fast.adapters.convert import HEADS, ForeignAdapter, load_foreign, named_for, read_foreign
from ptv2_fast.training.models import load
from ptv2_fast.training.pretrained import load_config, read_pretrained


def import_folder(
    source: Path,
    target: Path,
    model: str | None = None,
    head: str | None = None,
    labels: Sequence[str] | None = None,
    allow_pickle: bool = False,
    fold: bool = False,
) -> None:
    """Write what another package trained as an adapter of ours.

    Args:
        source: an adapter's folder, or the file of a state dict.
        target: folder; created when missing.
        model: name or folder of the pretrained model; None = the one that the adapter names.
        head: a key of HEADS; None = the one that the adapter says.
        labels: by number; None = those of the adapter, or of the pretrained model's configuration.
        allow_pickle: read pickles, as weights only.
        fold: of a prefix with a projection write the table that it gives.

    Raises:
        ValueError, OSError: as `import_adapter`; when the model, the head or the labels are not
            known or do not fit, and for a pretrained model that cannot be loaded.
    """
    foreign = read_foreign(source, allow_pickle)
    opened = _open_model(foreign, model, head, labels)
    load_foreign(opened, foreign)
    if labels is not None:
        opened.config.id2label = dict(enumerate(labels))
        opened.config.label2id = {label: number for number, label in enumerate(labels)}
    if not fold:
        save_adapter(opened, target)
        return
    with tempfile.TemporaryDirectory() as place:
        save_adapter(opened, place)
        fold_adapter(place, target)


def export_folder(source: Path, target: Path) -> None:
    """Write a run's adapter, or one alone, so that PEFT loads it.

    Raises:
        ValueError: as `export_peft` and `load`.
    """
    export_peft(load(source).model, target)


def _open_model(
    foreign: ForeignAdapter, name: str | None, head: str | None, labels: Sequence[str] | None
) -> PreTrainedModel:
    """The pretrained model that an adapter was trained on, with the head that it was trained with.

    Weights that neither the adapter nor the pretrained model has would be drawn at random.
    """
    name, head = name or foreign.base_model, head or foreign.head
    if name is None:
        raise ValueError(
            f"model: expected the name or folder of the pretrained model, which {foreign.place} "
            "does not say; give it as --model"
        )
    if head is None:
        raise ValueError(
            f"head: expected one of {[*HEADS]}; {foreign.place} has a classifier and does not say "
            "of what; give it as --head"
        )
    count = {"choice": 1, "question": 2}.get(head, foreign.num_labels)
    if labels is not None and (len(labels) != count or len({*labels} - {""}) != count):
        raise ValueError(f"labels: expected {count} different names for the head of "
                         f"{foreign.place}, got {[*labels]!r:.200}")  # fmt: skip
    config = load_config(name)
    if count is not None and head != "bare" and config.num_labels != count:
        config.num_labels = count
    auto = "AutoModel" if head == "bare" else f"AutoModel{HEADS[head]}"
    model, drawn = read_pretrained(auto, name, config)
    missing = sorted(set(drawn) - set(named_for(model, foreign)))
    if missing:
        raise ValueError(
            f"model: expected every weight of a {type(model).__name__} in {name} or in "
            f"{foreign.place}, missing {missing!r:.300}"
        )
    return model
