"""`init="tokens"`: start the prefix at the keys and values of real tokens.

Keys are taken before attention rotates them: a prefix has no position.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.family import Family
from ptv2_fast.encoders.hooks import in_eval_mode
from ptv2_fast.prefix import PrefixEncoder


@torch.no_grad()
def token_prefix(
    model: PreTrainedModel, family: Family, encoder: PrefixEncoder, input_ids: Tensor | None
) -> Tensor:
    """Keys and values of P tokens in the prefixed layers of the plain, not yet attached backbone.

    The tokens run without dropout as one text, or as several when P exceeds the positions.

    Args:
        model: the model that is about to be attached.
        family: its row in the table of families.
        encoder: gives P, the layers and the head sizes.
        input_ids: at least P token ids of any shape; None = random ids other than the pad.

    Returns:
        [L', 2, H, P, D] in float32.

    Raises:
        ValueError: for fewer than P ids, or ids outside the vocabulary.
    """
    backbone, length = model.base_model, encoder.config.num_virtual_tokens
    device = encoder.embedding.weight.device
    if input_ids is None:
        vocabulary, pad = model.config.vocab_size, model.config.pad_token_id or 0
        input_ids = (pad + 1 + torch.randint(vocabulary - 1, (length,))) % vocabulary
    elif input_ids.numel() < length:
        raise ValueError(
            f"init_input_ids: expected at least {length} token ids, got {input_ids.numel()}"
        )
    ids = input_ids.flatten()[:length].to(device)
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"init_input_ids: expected ids in 0..{model.config.vocab_size - 1}, got "
            f"{ids.min().item()}..{ids.max().item()}"
        )

    # Of every layer in the order of the calls: one module may be several layers.
    keys: list[Tensor] = []
    values: list[Tensor] = []
    handles = []
    recorded: set[tuple[nn.Module, int]] = set()  # in the attention that runs
    for layer in dict.fromkeys(family.layer_modules(backbone)):
        attention = layer.get_submodule(family.attention)
        key_norm = attention.get_submodule(family.key_norm) if family.key_norm else None
        # Tokens come first: DeBERTa's keys may be those of relative positions too.
        handles.append(attention.register_forward_pre_hook(lambda *_: recorded.clear()))
        for index, name, norm, record in (
            (1, family.key, key_norm, keys),
            (2, family.value, None, values),
        ):
            # Of queries, keys and values in one.
            third = index if name == family.query else None
            linear = attention.get_submodule(name)

            def split(rows: Tensor, attention=attention, third=third) -> Tensor:
                return rows if third is None else family.third(attention, rows, third)

            recorder = _recorder(record, recorded, encoder.num_heads, split, index, norm)
            handles.append(linear.register_forward_hook(recorder))
    try:
        with in_eval_mode(backbone):
            for chunk in ids.split(family.max_positions(model.config)):
                backbone(input_ids=chunk[None])
    finally:
        for handle in handles:
            handle.remove()
    count = encoder.num_layers  # each chunk of the tokens ran through all of them
    pairs = [torch.cat(part[i::count]) for i in encoder.layers for part in (keys, values)]
    return torch.stack(pairs).unflatten(0, (-1, 2)).transpose(2, 3).float()


def _recorder(
    record: list[Tensor],
    recorded: set[tuple[nn.Module, int]],
    heads: int,
    split: Callable[[Tensor], Tensor],
    index: int,
    norm: nn.Module | None,
):
    """A hook that appends what a linear layer gives for the one text of a batch, [T, H, D].

    Args:
        record: gets it.
        recorded: layers whose first result is there already, with `index`.
        heads: H.
        split: takes out of a result what is meant.
        index: 1 for keys, 2 for values.
        norm: applied to each head; None = nothing.
    """

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        if (module, index) in recorded:
            return
        recorded.add((module, index))
        rows = split(output[0]).unflatten(-1, (heads, -1))
        record.append(rows if norm is None else norm(rows))

    return hook
