"""Models with adapters on one encoder, texts for them, and what each gives by itself."""

import torch
from torch import Tensor

import ptv2_fast
from ptv2_fast import PTuningV2Config
from ptv2_fast.encoders.families import FAMILIES
from tests.models import auto_class, tiny_config

SIZES = {"max_position_embeddings": 130}


def with_adapter(plain, head: str, num_labels: int, fields: dict, **options):
    """A model of its class on the weights of `plain`, with an adapter that is large everywhere."""
    model_type = plain.config.model_type
    if fields.get("position_offset") and not FAMILIES[model_type].has_position_table(plain.config):
        fields = {**fields, "position_offset": "none"}
    config = tiny_config(model_type, num_labels=num_labels, **SIZES, **options)
    model = auto_class(model_type, head).from_config(config).eval()
    weights = plain.state_dict()
    own = model.base_model.state_dict()
    model.base_model.load_state_dict({n: t for n, t in weights.items() if n in own}, strict=False)
    if model_type == "modernbert":
        fields = {name: value for name, value in fields.items() if name != "train_biases"}
    ptv2_fast.attach(model, PTuningV2Config(**fields))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5 if "prefix" in name else 0.3)
    return model.eval()


def texts_of(lengths) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 60, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 1), mask.long()


def results_of(model, ids: Tensor, lengths) -> list[Tensor]:
    """What a model makes of each of some texts, [B, T]."""
    has_choices = type(model).__name__.endswith("ForMultipleChoice")
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    output = model(**({n: t[:, None] for n, t in inputs.items()} if has_choices else inputs))
    if has_choices:
        return list(output.logits[:, 0])
    if "start_logits" in output:
        whole = torch.stack((output.start_logits, output.end_logits), dim=-1)
    else:
        whole = output.logits if "logits" in output else output.last_hidden_state
    if whole.dim() == 2:
        return list(whole)
    return [row[:length] for row, length in zip(whole, lengths, strict=True)]
