"""Launch configurations: one per (kernel, head_dim class, element size, vendor).

PTV2_AUTOTUNE=1 tunes over a list instead, by triton.autotune with results cached on disk. Tiles do
not depend on the number of tokens: equal sequences give equal bits whatever they are batched with.
Chosen by compiling ahead of time (registers, spills, shared memory); not yet timed on a GPU.
"""

import os
from dataclasses import dataclass

import torch
import triton

AUTOTUNE = os.environ.get("PTV2_AUTOTUNE") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The default of triton turns to False in 3.10; the interpreter takes no compiler options.
COMPILER_OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": True}
KERNELS = ("forward", "query", "key_value", "prefix")


@dataclass(frozen=True)
class Config:
    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, int]:
        options = {
            "BLOCK_QUERIES": self.block_queries,
            "BLOCK_KEYS": self.block_keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


def head_dim_class(head_dim: int) -> int:
    """The padded head_dim of the tiles: a power of two from 16 to 256."""
    return max(16, triton.next_power_of_2(head_dim))


def tile_widths(head_dim: int) -> tuple[int, ...]:
    """How wide the matrices of a tile are: powers of two."""
    return (head_dim_class(head_dim),)


def shipped_config(kernel: str, head_dim: int, element_size: int, amd: bool) -> Config:
    """The configuration of one kernel; `kernel` is one of KERNELS.

    Backward tiles are narrower in keys: dropout decisions and four operands live beside two
    accumulators, and 64 x 64 spills on sm_80 and sm_86.
    """
    block_dim = head_dim_class(head_dim)
    if element_size == 4:  # tf32 in three passes keeps twice the operands
        return Config(32, 32, 4, 1) if block_dim <= 128 else Config(16, 16, 4, 1)
    if block_dim <= 64:
        if kernel == "forward":
            return Config(64, 64, 4, 1 if amd else 2)
        # Left alone, ptxas stops at 168 registers for sm_120 and spills.
        return Config(64, 32, 4, 1) if amd else Config(64, 32, 4, 2, maxnreg=255)
    if block_dim == 128 and amd:
        return Config(64, 32, 4, 1) if kernel == "forward" else Config(32, 32, 4, 1)
    if block_dim == 128:
        return Config(64, 64, 8, 2) if kernel == "forward" else Config(32, 64, 8, 1)
    return Config(32, 32, 4 if amd else 8, 1)


def candidate_configs() -> list[triton.Config]:
    """What PTV2_AUTOTUNE=1 chooses from."""
    return [
        triton.Config(
            {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys}, num_warps=warps, num_stages=stages
        )
        for queries, keys in ((32, 32), (64, 32), (64, 64), (128, 64))
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ]


def tunable(kernel):
    """Wraps a jit function for autotuning when it is asked for."""
    if not AUTOTUNE:
        return kernel
    key = ["HEAD_DIM", "INPUT_PRECISION"]
    return triton.autotune(configs=candidate_configs(), key=key, cache_results=True)(kernel)


def launch_options(
    kernel: str, query: torch.Tensor, prefix_length: int | None = None
) -> dict[str, object]:
    """Keyword arguments of a launch: blocks, warps, stages, precision of float32 products.

    `prefix_length`: for the kernels that read the prefix.
    """
    head_dim = query.shape[-1]
    options: dict[str, object] = {"HEAD_DIM": head_dim, "BLOCK_DIMS": tile_widths(head_dim)}
    # None tells autotuning 16-bit products, which have one precision, from those of float32.
    options["INPUT_PRECISION"] = input_precision() if query.element_size() == 4 else None
    amd = torch.version.hip is not None
    config = shipped_config(kernel, head_dim, query.element_size(), amd)
    if not AUTOTUNE:
        options |= config.options()
    if prefix_length is not None:
        options |= prefix_options(kernel, prefix_length, config.block_keys)
    return options | COMPILER_OPTIONS


def prefix_options(kernel: str, prefix_length: int, block_keys: int) -> dict[str, object]:
    """Tiles over the prefix, as short as it allows: few columns are computed in vain."""
    block = min(block_keys, max(16, triton.next_power_of_2(prefix_length)))
    if kernel == "prefix":
        return {} if AUTOTUNE else {"BLOCK_KEYS": block}
    if prefix_length == 0:
        block = 0
    return {"BLOCK_PREFIX": block, "ONE_PREFIX_TILE": prefix_length <= block, "PEELED": True}


def input_precision() -> str:
    """How float32 products are computed: as torch.set_float32_matmul_precision asks.

    "ieee" has no tensor cores on NVIDIA and spills; three tf32 products come close to float32. AMD
    has float32 matrix instructions, and no tf32x3.
    """
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
