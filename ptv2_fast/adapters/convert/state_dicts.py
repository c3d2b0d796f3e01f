"""State dicts with a prefix encoder in them: of P-Tuning v2's own code, and of ChatGLM's.

Both name the table `prefix_encoder.embedding.weight` [P, 2 * L * hidden], or the embedding of a
projection `prefix_encoder.trans`. The authors' models count the positions of tokens from P;
ChatGLM's, whose prefix encoder is in its `transformer`, do not.
"""

import re
from pathlib import Path
from typing import Any

from ptv2_fast.adapters.convert.foreign import (
    ForeignAdapter,
    head_of_class,
    labels_of,
    projection_fields,
)
from ptv2_fast.adapters.convert.tensor_files import Stored, check_inside, find_tensors, open_tensors
from ptv2_fast.files import read_json_object

_PARTS = {
    "embedding.weight": "embedding.weight",
    **{f"trans.{i}.{kind}": f"projection.{i}.{kind}" for i in (0, 2) for kind in
       ("weight", "bias")},
}  # fmt: skip
# DataParallel and DeepSpeed put `module.` in front of every name.
_NAME = re.compile(r"(?:module\.)?(.*?)prefix_encoder\.(.+)")
_CHATGLM = "transformer."
_FILES = ("adapter_model", "model", "pytorch_model")
_HEAD_NAMES = ("classifier.", "score.", "qa_outputs.")


def read_state_dict(source: Path, allow_pickle: bool) -> ForeignAdapter:
    """Read the prefix and the head out of a state dict, of a whole model or of these alone.

    Args:
        source: the file, or the folder of a checkpoint, whose config.json names class and labels.
        allow_pickle: read a .bin, .pt or .pth.

    Raises:
        ValueError: for files that are missing or corrupt, and tensors that are no prefix encoder.
    """
    path = find_tensors(source, *_FILES) if source.is_dir() else source
    file = open_tensors(path, allow_pickle)
    prefix: dict[str, Stored] = {}
    others: dict[str, Stored] = {}
    owners: set[str] = set()
    for name in file.shapes:
        match = _NAME.fullmatch(name)
        if match is None:
            others[name.removeprefix("module.")] = Stored(file, name)
        elif match[2] in _PARTS:
            prefix[_PARTS[match[2]]] = Stored(file, name)
            owners.add(match[1])
        else:
            raise ValueError(f"{path}: expected the tensors {[*_PARTS]} of a prefix encoder, got "
                             f"{name!r:.200}")  # fmt: skip
    if "embedding.weight" not in prefix or len(owners) != 1:
        raise ValueError(
            f"{path}: expected one tensor prefix_encoder.embedding.weight, as P-Tuning v2's code "
            f"and ChatGLM's name it, got prefix encoders of {sorted(owners)!r:.100}; adapters of "
            "PEFT and of the package adapters have an adapter_config.json beside their tensors"
        )
    shape = prefix["embedding.weight"].shape
    if len(shape) != 2:
        raise ValueError(f"{path}: expected a prefix_encoder.embedding.weight [P, width], got the "
                         f"shape {list(shape)}")  # fmt: skip
    of_chatglm = owners == {_CHATGLM}
    config = _read_config(source)
    head = None if any(name.startswith(_HEAD_NAMES) for name in others) else "bare"
    if any(name.startswith("qa_outputs.") for name in others):
        head = "question"
    classes = config.get("architectures")
    if isinstance(classes, list) and len(classes) == 1:
        head = head_of_class(str(classes[0])) or head
    base = config.get("_name_or_path")
    return ForeignAdapter(
        kind="ChatGLM" if of_chatglm else "P-Tuning v2",
        place=source,
        prefix=prefix,
        others=others,
        fields={"num_virtual_tokens": shape[0], **projection_fields(prefix)},
        facts={name: config[name] for name in ("model_type", "hidden_size") if name in config},
        counts_prefix=not of_chatglm,
        head=head,
        labels=labels_of(config.get("id2label"), source),
        base_model=base if isinstance(base, str) and base else None,
    )


def _read_config(source: Path) -> dict[str, Any]:
    """What the config.json beside the tensors says; nothing where there is none."""
    path = source / "config.json"
    if not source.is_dir() or not path.exists():
        return {}
    check_inside(path)
    return read_json_object(path)
