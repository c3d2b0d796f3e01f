"""Tiny random encoders of transformers, their batches, and prefix attention by concatenation."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, DynamicCache, PreTrainedModel

import ptv2_fast
from bench.models import cache_argument
from ptv2_fast import PTuningV2Config
from ptv2_fast.encoders.attachment import find_attachment
from ptv2_fast.encoders.families import FAMILIES
from tests.closeness import assert_close_to_oracle
from tests.concatenation import concatenating_attention


def is_served(model_type: str) -> bool:
    """Whether the installed transformers has this family, and lets it call another attention."""
    if model_type not in CONFIG_MAPPING:
        return False
    if model_type != "modernbert":
        return True
    return transformers.ModernBertModel._can_set_attn_implementation()


MODEL_TYPES = tuple(name for name in FAMILIES if is_served(name))
# Backbones that take no cache; what some configurations need or name differently.
WITHOUT_CACHE = (
    "albert", "deberta", "deberta-v2", "distilbert", "glm2021", "mobilebert", "mpnet",
)  # fmt: skip
# The encoder alone, where transformers' AutoModel is an encoder with a decoder.
TEXT_ENCODERS = ("t5", "mt5", "umt5")
DEBERTA = {"relative_attention": True, "pos_att_type": "p2c|c2p", "max_relative_positions": 6}
T5 = {"d_kv": 8, "d_ff": 24, "dropout_rate": 0.0}
OVERRIDES = {
    "albert": {"embedding_size": 24, "num_hidden_groups": 2, "classifier_dropout_prob": 0.0},
    # A span and buckets that end within the text.
    "deberta": DEBERTA,
    "deberta-v2": {
        **DEBERTA,
        "position_buckets": 4,
        "max_relative_positions": 9,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
    },
    "distilbert": {
        "hidden_dim": 24,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "qa_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "electra": {"embedding_size": 24},
    "esm": {
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": True,
        "token_dropout": True,
        "mask_token_id": 4,
    },
    "eurobert": {"num_key_value_heads": 1},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 6,
        "use_bidirectional_attention": True,
    },
    "glm2021": {"embedding_dropout_prob": 0.0},
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 4},
    "modernbert": {"local_attention": 6, "norm_bias": True, "classifier_bias": True},
    "qwen2": {
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    # Norms that only scale and shift: its states would grow with large weights.
    "mobilebert": {"embedding_size": 8, "intra_bottleneck_size": 16, "initializer_range": 0.15},
    "mt5": T5,
    "t5": T5,
    "umt5": T5,
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
}
HEADS = {
    "bare": transformers.AutoModel,
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "question": transformers.AutoModelForQuestionAnswering,
    "choice": transformers.AutoModelForMultipleChoice,
}
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
WITHOUT_FALLBACK = {"backbone": "frozen", "strict": True}
MAX_POSITIONS = 40  # rows of the position table
P = 5  # virtual tokens
SIGN_DRAWS = 4


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors only wait for a second thread; import this into the test files it is for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(model_type: str = "bert", **overrides):
    """Three layers of two heads of width 8, without dropout, with weights that attend unevenly."""
    values = {
        "vocab_size": 60,
        "hidden_size": 16,
        "embedding_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": MAX_POSITIONS,
        "num_labels": 3,
        "initializer_range": 0.3,
        "pad_token_id": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "summary_last_dropout": 0.0,
        "classifier_dropout": 0.0,
        "attn_implementation": "eager",
    }
    values |= OVERRIDES.get(model_type, {})
    return AutoConfig.for_model(model_type, **{**values, **overrides})


def tiny_model(model_type: str = "bert", head: str = "sequence", **overrides) -> PreTrainedModel:
    labels = {"num_labels": 2} if head == "question" else {}
    config = tiny_config(model_type, **labels, **overrides)
    return auto_class(model_type, head).from_config(config).eval()


def auto_class(model_type: str, head: str):
    if head == "bare" and model_type in TEXT_ENCODERS:
        return transformers.AutoModelForTextEncoding
    return HEADS[head]


def attached(head: str = "sequence", model_type: str = "bert", model=None, **fields):
    """An attached model whose prefix is as large as real keys and values."""
    model = tiny_model(model_type, head) if model is None else model
    ptv2_fast.attach(model, PTuningV2Config(**{"num_virtual_tokens": P, **fields}))
    for parameter in model.prefix_encoder.parameters():
        torch.nn.init.normal_(parameter)
    return model


def has_class(model_type: str, head: str) -> bool:
    """Whether transformers has such a model, and one that runs.

    Some versions build XLM-R for choices without the pooler that its head reads.
    """
    mapping = auto_class(model_type, head)._model_mapping
    if CONFIG_MAPPING[model_type] not in mapping:
        return False
    if hasattr(tiny_model(model_type, head).base_model, "decoder"):
        return False
    return head != "choice" or getattr(tiny_model(model_type, head).base_model, "pooler", True)


def has_frozen_blocks(model_type: str) -> bool:
    """Whether a family runs as frozen blocks, which depends on the version of transformers too."""
    head = next(head for head in ("token", "sequence") if has_class(model_type, head))
    try:
        attached(head, model_type, backbone="frozen", strict=True)
    except ValueError as error:
        assert "expected layers that run as frozen blocks" in str(error), error
        return False
    return True


BACKBONES = {
    name: ("frozen", "hook") if has_frozen_blocks(name) else ("hook",) for name in MODEL_TYPES
}
WAYS = [(name, backbone) for name, ways in BACKBONES.items() for backbone in ways]
MODELS = [(name, head) for name in MODEL_TYPES for head in HEADS if has_class(name, head)]


def make_batch(head: str = "sequence", lengths=(11, 7, 4), width: int = 11) -> dict[str, Tensor]:
    """Right-padded ids and mask, [B, T], or [B, 2, T] for multiple choice."""
    input_ids = torch.randint(2, 60, (len(lengths), width))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    input_ids = input_ids.masked_fill(~mask, 1)
    if head == "choice":
        input_ids, mask = (torch.stack((x, x.flip(0)), dim=1) for x in (input_ids, mask))
    return {"input_ids": input_ids, "attention_mask": mask.long()}


def outputs_of(head: str, output) -> Tensor:
    """The result of a head as one tensor."""
    if head == "question":
        return torch.stack((output.start_logits, output.end_logits))
    return output.last_hidden_state if head == "bare" else output.logits


def real_tokens(head: str, batch: dict[str, Tensor]) -> Tensor | int:
    """A factor for `outputs_of`: 0 where its entry belongs to a pad token, whose state is free."""
    mask = batch["attention_mask"]
    return {"bare": mask[..., None], "token": mask[..., None], "question": mask}.get(head, 1)


def unshifted_positions(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Position ids without an offset, by the rule of the model's family, [B, T]."""
    if not FAMILIES[model.config.model_type].pads_keep_position:
        return torch.arange(input_ids.shape[-1], device=input_ids.device).expand(input_ids.shape)
    pad = model.config.pad_token_id
    real = input_ids.ne(pad).long()
    return real.cumsum(-1) * real + pad


def concatenated_forward(
    model: PreTrainedModel, prefix: Tensor, batch: dict[str, Tensor], shifted: bool
):
    """Prefix tuning as PEFT runs it, by transformers' cache: expand, concatenate, widen the mask.

    Models that take no cache run an attention function that does this instead.

    Args:
        model: a plain model.
        prefix: [L, 2, H, P, D].
        batch: input_ids and attention_mask.
        shifted: leave the positions to transformers, which counts from the cache's length.
    """
    input_ids, mask = batch["input_ids"], batch["attention_mask"]
    if model.config.model_type in WITHOUT_CACHE:
        offset = {"position_ids": unshifted_positions(model, input_ids) + prefix.shape[3]}
        with concatenating_attention(model, dict(enumerate(prefix))):
            return model(**batch, **(offset if shifted else {}))
    cache = DynamicCache()
    rows = input_ids.numel() // input_ids.shape[-1]
    for layer, (key, value) in enumerate(prefix):
        cache.update(key.expand(rows, *key.shape), value.expand(rows, *value.shape), layer)
    ones = mask.new_ones(*mask.shape[:-1], prefix.shape[3])
    positions = {} if shifted else {"position_ids": unshifted_positions(model, input_ids)}
    return model(
        input_ids=input_ids,
        attention_mask=torch.cat((ones, mask), dim=-1),
        **{cache_argument(model.base_model): cache},
        **positions,
    )


def plain_results(
    run: Callable[..., tuple[Tensor, ...]],
    *models_and_tensors: PreTrainedModel | Tensor,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What results are held against: the oracle, plain torch, and the natural size of rounding.

    The oracle is `run(*copies)` in float64; the natural size is how far one rounding of every
    weight moves it, at most of some draws of their signs.

    Args:
        run: takes copies of the models and tensors, all of one dtype, and returns the results.
        dtype: of plain torch.
    """

    def results_in(dtype: torch.dtype, relative_noise: float = 0.0) -> tuple[Tensor, ...]:
        copies = [copy.deepcopy(item).to(dtype) for item in models_and_tensors]
        for item in copies:
            for weight in item.parameters() if isinstance(item, torch.nn.Module) else [item]:
                noise = torch.randn_like(weight).sign()
                weight.data.mul_(1 + relative_noise * noise)
        return run(*copies)

    epsilon = torch.finfo(dtype).eps
    oracle, same_dtype = results_in(torch.float64), results_in(dtype)
    draws = [results_in(torch.float64, epsilon) for _ in range(SIGN_DRAWS)]
    moved = zip(*draws, strict=True)
    magnitudes = [
        torch.stack([(draw - middle).abs() for draw in each]).amax(0) / epsilon
        for middle, each in zip(oracle, moved, strict=True)
    ]
    return list(zip(oracle, same_dtype, magnitudes, strict=True))


def assert_close_to_plain(
    actual: tuple[Tensor, ...], plain: list[tuple[Tensor, Tensor, Tensor]], name: str = "result"
) -> float:
    """Hold results against the first of `plain_results`; returns the worst error in budgets."""
    return max(
        assert_close_to_oracle(tensor, *expected, f"{name} {i}")
        for i, (tensor, expected) in enumerate(zip(actual, plain, strict=False))
    )


def assert_close_to_model(
    actual: tuple[Tensor, ...],
    run: Callable[..., tuple[Tensor, ...]],
    *models_and_tensors: PreTrainedModel | Tensor,
    dtype: torch.dtype = torch.float32,
) -> float:
    """As `assert_close_to_plain`, for results that are compared once."""
    return assert_close_to_plain(actual, plain_results(run, *models_and_tensors, dtype=dtype))


def check_equals_concatenation(
    plain: PreTrainedModel,
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    head: str,
    shifted: bool = False,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Outputs of real tokens and prefix gradients of an attached model against transformers' cache.

    `dtype`: of both models.
    """
    table = model.prefix_encoder.embedding.weight
    table.data = table.data.to(dtype).float()  # transformers starts from the same values
    real = real_tokens(head, batch)

    def results(output: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        output = output * real
        return output.detach(), torch.autograd.grad(output, table, grad_out.to(output.dtype))[0]

    output = outputs_of(head, model(**batch))
    grad_out = torch.randn(output.shape).to(output)
    output, gradient = results(output, table)
    assert gradient.abs().min() > 0  # every entry of every layer's prefix is tested

    def concatenated(plain, prefix: Tensor) -> tuple[Tensor, Tensor]:
        prefix.requires_grad_()
        expected = outputs_of(head, concatenated_forward(plain, prefix, batch, shifted))
        output, gradient = results(expected, prefix)
        return output, gradient.permute(3, 0, 1, 2, 4).reshape(table.shape)

    actual = (output, gradient.to(dtype))
    prefix = model.prefix_encoder().detach()
    return assert_close_to_model(actual, concatenated, plain, prefix, dtype=dtype)


def step_results(model, batch, head: str = "sequence", seed: int = 1) -> list[Tensor]:
    """The output of real tokens and all gradients, with the same draws for every call."""
    torch.manual_seed(seed)
    output = outputs_of(head, model(**batch)) * real_tokens(head, batch)
    grad_out = torch.randn(output.shape).to(output)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, trained, grad_out)]


def set_fields(model, **fields) -> None:
    """Change how the layers of an attached model run."""
    frozen = find_attachment(model).frozen
    frozen.config = dataclasses.replace(frozen.config, **fields)
