"""What the benchmarks of training steps write into their rows: times, kept bytes, peaks."""

from dataclasses import replace

import torch
from transformers import AutoModel

from bench.cases import Case
from bench.measure import Timing
from bench.memory_model import (
    Batch,
    Encoder,
    StepMemory,
    has_formula,
    kept_bytes_of_layer,
    predict_step,
)
from bench.models import GATED, MODELS
from bench.training_step import PeakMemory, kept_bytes_per_layer
from ptv2_fast.encoders.blocks import describe_bert
from ptv2_fast.encoders.families import find_family

MEBIBYTE = 2**20
Row = dict[str, object]


def encoder_of(case: Case) -> Encoder:
    config = MODELS[case.model]
    family = find_family(config)
    return Encoder(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings if family.position_types else 0,
        is_gated=config.model_type in GATED,
        is_bert=family.describe_block is describe_bert,
    )


def batch_of(case: Case, device: str) -> Batch:
    return Batch(
        sequences=case.batch,
        tokens=case.padded_tokens,
        prefix=case.prefix,
        element_bytes=case.torch_dtype.itemsize,
        real_tokens=sum(case.sequence_lengths()),
        has_dropout=case.dropout > 0,
        device=device,
    )


def time_columns(case: Case, timing: Timing, others: dict[str, Timing]) -> Row:
    """`others`: timings by method that this one is given in ratio to."""
    return {
        "step ms": round(timing.median, 2),
        "p20 ms": round(timing.p20, 2),
        "p80 ms": round(timing.p80, 2),
        **{
            f"time / {name}": round(timing.median / other.median, 3)
            for name, other in others.items()
        },
        "tokens/s": round(sum(case.sequence_lengths()) / timing.median * 1e3),
    }


def kept_columns(case: Case, method: str, device: str) -> Row:
    """Counted and, where there is one, by formula."""
    batch, encoder = batch_of(case, device), encoder_of(case)
    counted = round(kept_bytes_per_layer(method, case, device) / batch.rows, 1)
    row: Row = {"kept B/token/layer": counted}
    if has_formula(method, encoder):
        formula = kept_bytes_of_layer(method, encoder, batch)
        row["formula B/token/layer"] = round(formula / batch.rows, 1)
    return row


def predicted_step(case: Case, method: str, device: str) -> StepMemory | None:
    """By formula or, of layers without one, by what two of them keep and by the model's sizes."""
    encoder, batch = encoder_of(case), batch_of(case, device)
    if has_formula(method, encoder):
        return predict_step(method, encoder, batch)
    if encoder.is_bert:
        return None
    with torch.device("meta"):
        model = AutoModel.from_config(MODELS[case.model])
    encoder = replace(encoder, counted=sum(p.numel() for p in model.parameters()))
    kept = encoder.layers * kept_bytes_per_layer(method, case, device)
    return replace(predict_step(method, encoder, batch), kept=kept)


def peak_columns(case: Case, method: str, device: str, memory: PeakMemory) -> Row:
    """The parts of a step's peak, beside the predicted one."""
    predicted = predicted_step(case, method, device)
    return {
        "peak MiB": mebibytes(memory.above_idle),
        **({} if predicted is None else {"predicted peak MiB": mebibytes(predicted.above_idle)}),
        "weights MiB": mebibytes(memory.weights),
        "gradients MiB": mebibytes(memory.gradients),
        "optimizer MiB": mebibytes(memory.optimizer),
    }


def mebibytes(count: int) -> float:
    return round(count / MEBIBYTE, 1)
