"""`init="tokens"`: start the prefix at the keys and values of real tokens."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.families import Family
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
    for layer in dict.fromkeys(family.layer_modules(backbone)):
        attention = layer.get_submodule(family.attention)
        for name, record in ((family.key, keys), (family.value, values)):
            handles.append(attention.get_submodule(name).register_forward_hook(_recorder(record)))
    try:
        with in_eval_mode(backbone):
            for chunk in ids.split(family.max_positions(model.config)):
                backbone(input_ids=chunk[None])
    finally:
        for handle in handles:
            handle.remove()
    count = encoder.num_layers  # each chunk of the tokens ran through all of them
    pairs = [torch.cat(part[i::count]) for i in encoder.layers for part in (keys, values)]
    heads = torch.stack(pairs).view(
        len(encoder.layers), 2, length, encoder.num_heads, encoder.head_dim
    )
    return heads.transpose(2, 3).float()


def _recorder(record: list[Tensor]):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        record.append(output[0])

    return hook
