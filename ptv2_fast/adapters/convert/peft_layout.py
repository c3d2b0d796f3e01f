"""The layout of PEFT's adapters: adapter_config.json and adapter_model.safetensors.

PEFT saves a prefix as what its projection gives, `prompt_embeddings` [P, 2 * L * hidden], and what
trains beside it under `base_model.` and the model's own names.
"""

import re
from pathlib import Path
from typing import Any

from ptv2_fast.adapters.convert.foreign import ForeignAdapter, projection_fields, read_count
from ptv2_fast.adapters.convert.tensor_files import Stored, find_tensors, open_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TABLE_NAME = "prompt_embeddings"
BASE = "base_model."
LORA_BASE = "base_model.model."
TASKS = {
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "question": "QUESTION_ANS",
    "bare": "FEATURE_EXTRACTION",
}
# A state dict of the whole model: prompt_encoder.<name>.<part>, without or with a projection.
_PARTS = {
    "embedding.weight": "embedding.weight",
    **{f"transform.{i}.{kind}": f"projection.{i}.{kind}" for i in (0, 2) for kind in
       ("weight", "bias")},
}  # fmt: skip
_ENCODER = re.compile(r"prompt_encoder\.[^.]+\.(.+)")
_COPY = re.compile(r"\.modules_to_save\.[^.]+\.")
# In such a state dict: what a trained copy stands in for, and a second name of the embeddings.
_DUPLICATE = re.compile(r".*\.original_module\..*|word_embeddings\.weight")


def read_peft(folder: Path, content: dict[str, Any], allow_pickle: bool) -> ForeignAdapter:
    """Read a prefix of PEFT.

    Args:
        folder: of the adapter.
        content: of its adapter_config.json.
        allow_pickle: read a .bin.

    Raises:
        ValueError: for another kind of adapter, a task that encoders do not have, or files that are
            missing, corrupt or contradict each other.
    """
    place = folder / CONFIG_NAME
    if content["peft_type"] != "PREFIX_TUNING":
        raise ValueError(
            f"{place}: peft_type: expected 'PREFIX_TUNING', got {content['peft_type']!r:.100}"
        )
    heads = [head for head, task in TASKS.items() if task == content.get("task_type")]
    if not heads:
        raise ValueError(f"{place}: task_type: expected one of {[*TASKS.values()]}, for encoders, "
                         f"got {content.get('task_type')!r:.100}")  # fmt: skip
    if content.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(f"{place}: num_transformer_submodules: expected 1, of an encoder, got "
                         f"{content['num_transformer_submodules']!r:.100}")  # fmt: skip
    length = read_count(content, "num_virtual_tokens", place)
    file = open_tensors(find_tensors(folder, "adapter_model"), allow_pickle)
    stored = {name: Stored(file, name) for name in file.shapes}
    prefix = {"embedding.weight": stored.pop(TABLE_NAME)} if TABLE_NAME in stored else {}
    for name in list(stored):
        match = _ENCODER.fullmatch(name)
        if match and match[1] in _PARTS:
            prefix.setdefault(_PARTS[match[1]], stored.pop(name))
    if "embedding.weight" not in prefix:
        raise ValueError(
            f"{file.path}: expected a tensor {TABLE_NAME}, got {sorted(stored)!r:.200}"
        )
    named = ("num_layers", "num_attention_heads", "token_dim")
    trained = content.get("modules_to_save")
    base = content.get("base_model_name_or_path")
    return ForeignAdapter(
        kind="PEFT",
        place=folder,
        prefix=prefix,
        others={
            _COPY.sub(".", name.removeprefix(BASE)): tensor
            for name, tensor in stored.items()
            if not _DUPLICATE.fullmatch(name)
        },
        fields={
            "num_virtual_tokens": length,
            "task_type": content["task_type"],
            **projection_fields(prefix),
        },
        facts={name: content[name] for name in named if content.get(name) is not None},
        counts_prefix=True,
        needs_cache=True,
        trained=tuple(map(str, trained)) if isinstance(trained, list) else (),
        head=heads[0],
        base_model=base if isinstance(base, str) and base else None,
    )
