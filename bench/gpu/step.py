"""What does one whole training step cost beside fine-tuning, LoRA and concatenated prefixes?

A unit is a case: an encoder, a batch, a prefix, a dtype. All methods hold their models beside each
other and train the same batch under AdamW in turn, so that the ratios hold. Prefix gradients are
checked in float64 first. Rows have

    step ms, p20 ms, p80 ms     one step, by CUDA events, begun with a cold L2 cache
    tokens/s                    tokens that are no padding
    time / ...                  ratio of medians to the two methods that others are held against
"""

from collections.abc import Iterator

import torch

from bench.cases import Case
from bench.gpu.runner import FAILED
from bench.gpu.stages import LEFT_OUT, Row, StageOptions, reason_of, release
from bench.measure import time_interleaved
from bench.models import METHODS, MODELS, build, why_left_out
from bench.step_columns import time_columns
from bench.training_step import Step, check_gradients, small_case

HELD_AGAINST = ("frozen none", "full fine-tuning, sdpa")
LIKE_BERT = ("roberta", "xlm-roberta", "electra")
CASES = (
    Case("bert-base", 32, 128, 20, "bf16"),
    Case("bert-base", 32, 128, 20, "bf16", lengths="pad50"),
    Case("bert-large", 32, 128, 100, "bf16", lengths="pad50"),
    Case("bert-base", 16, 512, 128, "bf16"),
    Case("bert-large", 16, 512, 100, "bf16"),
    Case("bert-base", 32, 128, 128, "bf16", dropout=0.0),
    *(Case(f"{family}-base", 32, 128, 20, "bf16", lengths="pad50") for family in LIKE_BERT),
    *(
        Case(f"{family}-base", batch, tokens, 20, "bf16", 0.0, "pad50")
        for family in ("modernbert", "nomic_bert")
        for batch, tokens in ((32, 128), (16, 512), (2, 2048))
    ),
    Case("deberta-v2-base", 32, 128, 20, "bf16", lengths="pad50"),
    Case("deberta-v2-base", 16, 512, 20, "bf16", lengths="pad50"),
    Case("bert-base", 32, 256, 20, "bf16", dropout=0.0, lengths="pad70"),
    Case("bert-large", 32, 128, 20, "bf16", dropout=0.0),
    Case("bert-base", 32, 384, 100, "bf16", lengths="pad70"),
    Case("bert-large", 16, 512, 20, "bf16", dropout=0.0, lengths="pad50"),
    Case("bert-base", 32, 128, 20, lengths="pad50"),
)
REHEARSED = tuple(
    Case(f"{family}-tiny", 2, 16, 4, "bf16", lengths="pad50") for family in ("bert", "modernbert")
)


def cases_on(device: torch.device) -> dict[str, Case]:
    """Those whose model the installed transformers has."""
    listed = REHEARSED if device.type == "cpu" else CASES
    return {str(case): case for case in listed if case.model in MODELS}


def units(device: torch.device) -> list[str]:
    return list(cases_on(device))


def run(name: str, device: torch.device, options: StageOptions) -> Iterator[Row]:
    case = cases_on(device)[name]
    check_gradients(small_case(case), device.type)
    release()
    sizes = case_columns(case)
    steps: dict[str, Step] = {}
    for method in METHODS:
        if method in options.without:
            continue
        reason = why_left_out(method, case, device.type)
        if reason is not None:
            yield {"method": method, "status": LEFT_OUT, "reason": reason, **sizes}
            continue
        reason = _why_it_fails(method, case, device, steps)
        if reason is not None:
            yield {"method": method, "status": FAILED, "reason": reason, **sizes}
    timings = time_interleaved(steps, device, options.seconds * len(steps), options.rounds)
    others = {method: timings[method] for method in HELD_AGAINST if method in timings}
    for method, timing in timings.items():
        trained = sum(parameter.numel() for parameter in steps[method].trained)
        columns = time_columns(case, timing, others)
        yield {"method": method, **columns, "trainable": trained, **sizes}


def case_columns(case: Case) -> Row:
    names = ("model", "batch", "tokens", "prefix", "dtype", "dropout", "lengths")
    return {"case": str(case), **{name: getattr(case, name) for name in names}}


def _why_it_fails(
    method: str, case: Case, device: torch.device, steps: dict[str, Step]
) -> str | None:
    """Puts a warm step of the method among `steps`, or says in one line what went wrong."""
    try:
        steps[method] = _warm_step(method, case, device)
        return None
    except Exception as error:
        reason = reason_of(error)
    release()  # when nothing refers to the error any more, whose frames hold tensors
    return reason


def _warm_step(method: str, case: Case, device: torch.device) -> Step:
    step = Step(build(method, case, device.type), case, device.type)
    for _ in range(2):
        step()
    return step
