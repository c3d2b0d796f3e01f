"""Launch configurations of the kernels: measured ones where there are any (measured.py), else
those below, chosen by compiling ahead of time (registers, spills, shared memory).

Tiles do not depend on the number of tokens or sequences, nor on the layout: equal sequences give
equal bits whatever they are batched with.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime import driver

from ptv2_kernels.arguments import Extras
from ptv2_kernels.measured import Config, Workload, measured_configs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Which products the compiler fuses into sums differs between elements of a tile and from variant to
# variant of a kernel, and with it the last bit: the kernels say tl.fma where they mean it. The
# interpreter takes no compiler options.
COMPILER_OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": False}


def head_dim_class(head_dim: int) -> int:
    """The padded head_dim of the tiles: a power of two from 16 to 256."""
    return max(16, triton.next_power_of_2(head_dim))


def tile_widths(head_dim: int) -> tuple[int, ...]:
    """How wide the matrices of a tile are: one power of two, or two of them where that pads less.

    80 = 64 + 16, 96 = 64 + 32, 192 = 128 + 64; padded to 128 or 256, a quarter to a third of the
    products would be of zeros. 160 takes 128 + 64: beside 128 columns, 32 columns over eight warps
    drive ptxas for sm_80 to 32 registers.
    """
    whole = head_dim_class(head_dim)
    rest = max(64 if whole == 256 else 16, head_dim_class(head_dim - whole // 2))
    return (whole,) if whole <= 32 or rest > whole // 4 else (whole // 2, rest)


# By kernel: the configuration for tiles up to 32, 64, 96, 128 and 256 wide, of 16-bit elements.
WIDTH_CLASSES = (32, 64, 96, 128, 256)
_TABLES = {
    # A warp computes its own products (mma.sync): sm_80, sm_86, sm_89, sm_120.
    "mma": {
        "forward": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (32, 32, 8, 1)),
        "query": ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 8, 1)),
        "key_value": (
            (64, 32, 4, 2),
            (64, 64, 4, 1),
            (64, 32, 4, 1),
            (64, 64, 8, 2),
            (32, 32, 8, 1),
        ),
        "prefix": ((64, 32, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1), (64, 64, 8, 2), (32, 32, 8, 1)),
    },
    # Four warps compute a product together (wgmma, tcgen05): sm_90, sm_100.
    "warpgroup": {
        "forward": (
            (64, 64, 4, 2),
            (64, 64, 4, 2),
            (64, 64, 4, 2),
            (128, 64, 8, 2),
            (32, 32, 8, 1),
        ),
        "query": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 8, 1)),
        "key_value": (
            (64, 32, 4, 2),
            (64, 64, 4, 1),
            (32, 64, 8, 1),
            (32, 64, 8, 1),
            (32, 32, 8, 1),
        ),
        "prefix": ((64, 32, 4, 2), (64, 64, 4, 1), (32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
    },
    "amd": {
        "forward": ((64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
        "query": ((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        "key_value": (
            (64, 32, 4, 1),
            (64, 32, 4, 1),
            (32, 32, 4, 1),
            (32, 32, 4, 1),
            (32, 32, 4, 1),
        ),
        "prefix": ((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    },
}
# A tile of the bias is one more in registers: 64 keys spill inside the loop here.
BIAS_SPILLS = {"forward": (80, 86, 89), "key_value": (80, 86, 89, 90)}
ARCHITECTURES = ("amd", 80, 86, 89, 90, 100, 120)  # NVIDIA's by compute capability


def architecture() -> str | int:
    """What the current device is, one of ARCHITECTURES or another compute capability."""
    if INTERPRETED:
        return 80
    return _architecture(driver.active, driver.active.get_current_device())


@functools.cache
def _architecture(active: Any, device: int) -> str | int:
    target = active.get_current_target()
    return target.arch if target.backend == "cuda" else "amd"


def shipped_config(
    kernel: str, head_dim: int, element_size: int, architecture: str | int
) -> Config:
    """The configuration of one kernel; `kernel` is one of KERNELS."""
    width = sum(tile_widths(head_dim))
    if element_size == 4:  # tf32 in three passes keeps twice the operands
        return Config(32, 32, 4, 1) if width <= 128 else Config(16, 16, 4, 1)
    if architecture == "amd":
        table = "amd"
    else:
        table = "warpgroup" if architecture in (90, 100, 103) else "mma"
    width_class = next(i for i, widest in enumerate(WIDTH_CLASSES) if width <= widest)
    config = Config(*_TABLES[table][kernel][width_class])
    # Left alone, ptxas stops at 168 registers and spills: on sm_120, elsewhere for narrow heads.
    if architecture == 120 or (kernel == "forward" and width <= 32 and table == "mma"):
        config = dataclasses.replace(config, maxnreg=255)
    return config


def row_options(columns: int, architecture: str | int) -> dict[str, object]:
    """Tiles of whole rows, 16 elements to a thread: two loads of 16 bytes of each 16-bit tensor.

    Narrow rows share a program, which so reads the weights once and waits once for all their sums.
    """
    block_columns = max(16, triton.next_power_of_2(columns))
    block_rows = max(1, 2048 // block_columns)
    num_warps = min(16, block_rows * block_columns // 512)
    options: dict[str, object] = {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}
    if architecture != "amd":
        # 24 warps fit a multiprocessor; left alone, ptxas for sm_100 and sm_120 spills below 50.
        options["maxnreg"] = 80
    return options | {"num_warps": num_warps} | COMPILER_OPTIONS


def pair_options(heads: int, pairs: int) -> dict[str, object]:
    """Tiles of rows, heads and pairs of elements, eight pairs to a thread: 16 bytes of each half.

    No tile has a head too many; a program takes the heads of its rows tile by tile.
    """
    block_pairs = triton.next_power_of_2(pairs)
    block_heads = min(8, heads & -heads)  # the largest power of two that divides heads
    block_rows = max(1, 1024 // (block_heads * block_pairs))
    options: dict[str, object] = {"BLOCK_ROWS": block_rows, "BLOCK_HEADS": block_heads}
    return options | {"BLOCK_PAIRS": block_pairs, "num_warps": 4} | COMPILER_OPTIONS


@functools.cache
def chosen_config(workload: Workload, architecture: str | int) -> Config:
    """The measured configuration of a kernel, or else the shipped one."""
    measured = measured_configs(architecture).get(workload.key)
    if measured is not None:
        return measured
    return shipped_config(workload.kernel, workload.width, workload.element_size, architecture)


def launch_options(
    kernel: str,
    query: torch.Tensor,
    extras: Extras,
    prefix_length: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a launch: blocks, warps, stages, precision of float32 products.

    The same object, which nobody changes, for the same of them. `prefix_length`: for the kernels
    that read the prefix.
    """
    target, element_size = architecture(), query.element_size()
    return _launch_options(
        chosen_config,
        kernel,
        query.shape[-1],
        element_size,
        target,
        input_precision(target) if element_size == 4 else None,  # products of 16 bits have one
        extras.threshold is not None,
        extras.prefix_threshold is not None,
        extras.bias_ptr is not None,
        extras.slots_ptr is not None,
        prefix_length,
    )


@functools.cache
def _launch_options(
    choose: Callable[[Workload, str | int], Config],
    kernel: str,
    head_dim: int,
    element_size: int,
    target: str | int,
    precision: str | None,
    has_dropout: bool,
    prefix_dropout: bool,
    has_bias: bool,
    has_positions: bool,
    prefix_length: int | None,
) -> dict[str, Any]:
    widths = tile_widths(head_dim)
    options: dict[str, Any] = {"HEAD_DIM": head_dim, "BLOCK_DIMS": widths}
    options["INPUT_PRECISION"] = precision
    workload = Workload(kernel, sum(widths), element_size, has_dropout, prefix_length)
    config = choose(workload, target)
    if has_bias and target in BIAS_SPILLS.get(kernel, ()):
        config = dataclasses.replace(config, block_keys=32)
    if has_positions and kernel != "prefix" and element_size == 2:
        # Three products for each score, two of them turned: larger tiles spill inside the loop.
        num_warps, maxnreg = 4 if sum(widths) <= 128 else 8, 255 if target == 120 else None
        config = Config(32, 32, num_warps, 1, maxnreg)
    if prefix_dropout and kernel == "prefix" and sum(widths) > 64:
        # Sums of one sequence beside those of all of them: twice the registers of a wide head.
        config = dataclasses.replace(config, block_queries=32, block_keys=16, num_warps=8)
    elif prefix_dropout and kernel == "prefix" and target == 100:
        config = dataclasses.replace(config, block_queries=32)
    options |= config.options()
    if prefix_length is not None:
        # Dropped tiles of the prefix, and sums of one sequence, are more in registers.
        widest = min(config.block_keys, 32) if prefix_dropout else config.block_keys
        options |= prefix_options(kernel, prefix_length, widest)
    return options | COMPILER_OPTIONS


def prefix_options(kernel: str, prefix_length: int, block_keys: int) -> dict[str, object]:
    """Tiles over the prefix, as short as it allows: few columns are computed in vain."""
    block = min(block_keys, max(16, triton.next_power_of_2(prefix_length)))
    if kernel == "prefix":
        return {"BLOCK_KEYS": block}
    if prefix_length == 0:
        block = 0
    return {"BLOCK_PREFIX": block, "ONE_PREFIX_TILE": prefix_length <= block}


def input_precision(architecture: str | int) -> str:
    """How float32 products are computed: as torch.set_float32_matmul_precision asks.

    "ieee" has no tensor cores on NVIDIA and spills; three tf32 products come close to float32. AMD
    has float32 matrix instructions, and no tf32x3.
    """
    if architecture == "amd":
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
