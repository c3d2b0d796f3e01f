"""The encoders of the training benchmark and the ways to train them."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from ptv2_fast import PTuningV2Config, attach

# Random weights: speed and memory do not depend on them.
MODELS = {
    "minilm-l6": BertConfig(
        num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536
    ),
    "bert-base": BertConfig(),
    "bert-large": BertConfig(
        num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, intermediate_size=4096
    ),
}


def _bert(name: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig.from_dict(MODELS[name].to_dict())
    config._attn_implementation = attention
    return BertForSequenceClassification(config)


def _peft(name: str, attention: str, peft_config: object) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(_bert(name, attention), peft_config)


def ptv2_fast(name: str, prefix_length: int) -> nn.Module:
    return attach(_bert(name, "sdpa"), PTuningV2Config(num_virtual_tokens=prefix_length))


def ptv2_fast_like_peft(name: str, prefix_length: int) -> nn.Module:
    """With PEFT's shifted position ids: the same function of the same prefix."""
    config = PTuningV2Config(num_virtual_tokens=prefix_length, position_offset="prefix")
    return attach(_bert(name, "sdpa"), config)


def _prefix_by_peft(name: str, attention: str, prefix_length: int) -> nn.Module:
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=prefix_length)
    return _peft(name, attention, config)


def _lora(name: str) -> nn.Module:
    from peft import LoraConfig

    return _peft(name, "sdpa", LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear"))


# Each takes (model name, prefix length) and gives a model in training mode.
METHODS: dict[str, Callable[[str, int], nn.Module]] = {
    "ptv2-fast": ptv2_fast,
    "prefix, peft sdpa": lambda name, prefix: _prefix_by_peft(name, "sdpa", prefix),
    "prefix, peft eager": lambda name, prefix: _prefix_by_peft(name, "eager", prefix),
    "LoRA r8, peft sdpa": lambda name, prefix: _lora(name),
    "full fine-tuning, sdpa": lambda name, prefix: _bert(name, "sdpa"),
    "full fine-tuning, eager": lambda name, prefix: _bert(name, "eager"),
}
