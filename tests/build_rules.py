"""What a compiled kernel must fulfil, and the recorded instructions per MMA it must not exceed.

`python -m bench.gpu_static --record` writes the records anew.
"""

import csv
import importlib.metadata
from pathlib import Path

BOUNDS = Path(__file__).parent.parent / "bench" / "results" / "gpu-static-bounds.csv"
BOUNDED_TARGETS = ("sm_80", "sm_90")
TOLERANCE = 1.1  # a kernel may have this many times the recorded instructions per MMA
HELPERS = ("delta", "sum_partials", "sum_gates")  # kernels without matrix products
# The targets that the limits on spills are promised for.
SPILL_TARGETS = ("sm_80", "sm_90", "sm_100")
ELEMENTWISE_WARPS = 24  # resident on a multiprocessor, at least
BITS = ("fusable", "sum_orders")  # what must not change a bit, of no interest in a table
METRICS = ("instructions_per_mma", "masked_instructions_per_mma")
_KEY = ("target", "dtype", "head_dim", "layout", "dropout", "prefix_dropout", "kernel")


def allowed_spills(row: dict) -> int | None:
    """Bytes of stack per thread; None where nothing is promised."""
    if row["target"] not in SPILL_TARGETS or row["head_dim"] > 128 or row["dtype"] == "fp32":
        return None
    if row["kernel"] == "prefix_attention_forward":
        return 0
    return 64 if row["head_dim"] <= 64 else 128


def faults(row: dict) -> list[str]:
    """What is wrong with one row of `tests.triton_builds`."""
    found = []
    if row["shared_bytes"] > row["shared_limit"]:
        found.append("shared memory over the limit")
    if row["blocks_per_processor"] < 1:
        found.append("no block fits on a multiprocessor")
    found += unstable_bits(row)
    if row["kernel"] in HELPERS:
        return found
    # Given a live set far over the limit, ptxas for sm_80 gives 32 registers and spills the rest.
    if row["registers"] <= 32:
        found.append("register cliff")
    if row["matrix_instructions"] == 0:
        found.append("no matrix instructions")
    if row["wide_loads"] == 0:
        found.append("no loads of 16 bytes")
    allowed = allowed_spills(row)
    if allowed is not None and row["spill_bytes"] > allowed:
        found.append(f"{row['spill_bytes']} bytes spilled, {allowed} allowed")
    if allowed is not None and row["loops_local_accesses"]:
        found.append(f"{row['loops_local_accesses']} local accesses in loops")
    return found


def unstable_bits(row: dict) -> list[str]:
    """What is left to the compiler and would change from element to element, or with a stride."""
    found = []
    if row["fusable"]:
        found.append(f"{row['fusable']} products and sums that ptxas may fuse")
    if row["kernel"] == "delta" and row["sum_orders"]:
        found.append(f"sums in the order of a layout, {row['sum_orders']}")
    return found


def elementwise_faults(row: dict) -> list[str]:
    """What is wrong with one row of `tests.triton_builds --columns`: memory bounds these kernels.

    Their loads must be wide, and enough warps resident to have many of them under way.
    """
    found = unstable_bits(row)
    if row["spill_bytes"]:
        found.append(f"{row['spill_bytes']} bytes spilled")
    if row["wide_loads"] == 0:
        found.append("no loads of 16 bytes")
    if row["blocks_per_processor"] * row["num_warps"] < ELEMENTWISE_WARPS:
        found.append(f"{row['blocks_per_processor']} blocks of {row['num_warps']} warps fit")
    return found


def key_of(row: dict) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in _KEY)


def _read() -> dict[tuple[str, ...], dict]:
    if not BOUNDS.exists():
        return {}
    with BOUNDS.open(newline="") as file:
        return {key_of(row): row for row in csv.DictReader(file)}


def read_bounds() -> dict[tuple[str, ...], dict[str, float]]:
    """METRICS as recorded of the installed Triton; records of another version bind nothing."""
    installed = importlib.metadata.version("triton")
    return {
        key: {metric: float(row[metric]) for metric in METRICS}
        for key, row in _read().items()
        if row["triton"] == installed
    }


def updated_bounds(rows: list[dict]) -> list[dict]:
    """The records in the order of their keys, with those of build rows put in their place."""
    installed = importlib.metadata.version("triton")
    records = _read()
    for row in rows:
        if row["target"] in BOUNDED_TARGETS and row["loops"]:
            key = {name: row[name] for name in _KEY}
            values = {metric: round(row[metric], 2) for metric in METRICS}
            records[key_of(row)] = {**key, **values, "triton": installed}
    return [records[key] for key in sorted(records)]


def over_bounds(row: dict, bounds: dict[tuple[str, ...], dict[str, float]]) -> list[str]:
    """How a build row breaks its record, if it has one."""
    recorded = bounds.get(key_of(row), {})
    return [
        f"{row[metric]:.2f} {metric.replace('_', ' ')}, {value} recorded"
        for metric, value in recorded.items()
        if row[metric] > TOLERANCE * value
    ]
