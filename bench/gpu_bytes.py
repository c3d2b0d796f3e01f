"""How many bytes the GPU kernels move, against the same kernels on concatenated keys and values?

    TRITON_INTERPRET=1 python -m bench.gpu_bytes

Needs no GPU. Every figure is by formula; for few tokens the interpreted kernels are counted too, at
a smaller batch and one head, and nothing is printed where they disagree. Prints one JSON object per
number of tokens and prefix length.
"""

import json
from itertools import product

import torch

from ptv2_kernels.backward_prefix import count_splits
from tests.byte_counter import (
    LaunchTraffic,
    blocks_of,
    counted_bytes,
    disagreements,
    splits_of,
)
from tests.byte_formulas import (
    Blocks,
    Moved,
    Problem,
    backward_bytes,
    concatenated,
    concatenation_bytes,
    forward_bytes,
)
from tests.sample_calls import Sizes, padded_call
from tests.triton_interpreter import repair_interpreter

TOKENS = (64, 128, 256, 512)
PREFIXES = (8, 20, 100, 128)
BATCH, HEADS, HEAD_DIM, DTYPE = 16, 12, 64, torch.bfloat16  # a base encoder
INTERPRETED_TOKENS = 128  # up to here the formula is held against the interpreter
MULTIPROCESSORS = 108  # A100


def shipped_blocks(prefix: int) -> Blocks:
    """The tiles of every kernel, which do not depend on the number of tokens."""
    with counted_bytes() as launches:
        padded_call(Sizes(1, 1, 8, prefix, HEAD_DIM), DTYPE).both()
    return blocks_of(launches)


def problem_of(batch: int, heads: int, tokens: int, prefix: int) -> Problem:
    return Problem(((tokens, tokens),) * batch, heads, prefix, HEAD_DIM, DTYPE.itemsize)


def check(launches: list[LaunchTraffic], problem: Problem, blocks: Blocks) -> None:
    expected = forward_bytes(problem, blocks)
    expected += backward_bytes(problem, blocks, splits_of(launches))
    if wrong := disagreements(launches, expected):
        raise AssertionError("\n".join(wrong))


def interpret(tokens: int, prefix: int, blocks: Blocks) -> None:
    """Raises where the interpreted kernels do not move what the formula says."""
    batch, heads = 2, 1
    problem = problem_of(batch, heads, tokens, prefix)
    fused = Sizes(batch, heads, tokens, prefix, HEAD_DIM)
    joined = Sizes(batch, heads, prefix + tokens, 0, HEAD_DIM, queries=tokens)
    for sizes, each in ((fused, problem), (joined, concatenated(problem))):
        with counted_bytes() as launches:
            padded_call(sizes, DTYPE, masked=False).both()
        check(launches, each, blocks)


def total(moved: list[Moved], attribute: str, around: int = 0) -> int:
    return sum(getattr(each, attribute) for each in moved) + around


def row_of(tokens: int, prefix: int, blocks: Blocks) -> dict[str, object]:
    problem = problem_of(BATCH, HEADS, tokens, prefix)
    joined, around = concatenated(problem), concatenation_bytes(problem)
    programs = HEADS * -(-prefix // blocks["grad_prefix"][1])
    splits = count_splits(BATCH, programs, MULTIPROCESSORS)
    passes = {
        "forward": (forward_bytes(problem, blocks), forward_bytes(joined, blocks), around[0]),
        "backward": (
            backward_bytes(problem, blocks, splits), backward_bytes(joined, blocks, 0), around[1]
        ),
    }  # fmt: skip
    row: dict[str, object] = {
        "batch": BATCH, "heads": HEADS, "head_dim": HEAD_DIM, "tokens": tokens, "prefix": prefix,
        "checked": "interpreter" if tokens <= INTERPRETED_TOKENS else "formula",
    }  # fmt: skip
    for name, (fused, concat, copies) in passes.items():
        for kind in ("requested", "compulsory"):
            ours, theirs = total(fused, kind), total(concat, kind, copies)
            row[f"{name}_{kind}_fused"], row[f"{name}_{kind}_concat"] = ours, theirs
            row[f"{name}_{kind}_ratio"] = round(theirs / ours, 3)
    return row


def main() -> None:
    repair_interpreter()
    blocks_by_prefix = {prefix: shipped_blocks(prefix) for prefix in PREFIXES}
    for tokens, prefix in product(TOKENS, PREFIXES):
        blocks = blocks_by_prefix[prefix]
        if tokens <= INTERPRETED_TOKENS:
            interpret(tokens, prefix, blocks)
        print(json.dumps(row_of(tokens, prefix, blocks)), flush=True)


if __name__ == "__main__":
    main()
