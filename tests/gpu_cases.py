"""What is checked on a GPU, by group and name: the list of `pytest -m gpu` and `bench.gpu check`.

A check takes the device and returns the largest error over its budget where it has one; it raises
AssertionError, or Unavailable. On a CPU it is a rehearsal: tiny shapes, interpreted kernels, and
of checks that differ in numbers only, some.
"""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from ptv2_fast.frozen.spec import POLICIES
from ptv2_fast.ops.activations import ACTIVATIONS
from tests import attention_checks, elementwise_checks, large_checks, sanitizer_checks
from tests.activation_checks import check_tails
from tests.attention_checks import check
from tests.devices import Unavailable, matmul_precision, needs_memory, unwritten_is_nan
from tests.elementwise_cases import DTYPES
from tests.elementwise_checks import VARIANTS, make_variant
from tests.fuzzing import check_seeds
from tests.inputs import MASKS, POSITIONS, ROWS, Shape
from tests.norm_checks import check_dropout_mask, check_rows_of_zeros
from tests.rotary_checks import RotaryShape, check_rotations, make_rotary
from tests.tracing_checks import check_compiles_as_one_graph, check_raw_operators_pass_opcheck

# Of block_kinds.py, which needs transformers.
BLOCK_KINDS = (
    "bert", "nomic", "mpnet", "esm", "glm", "modernbert", "llama", "qwen3", "mistral", "t5",
)  # fmt: skip
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEAD_DIMS = {"narrow": (8, 16, 24, 32, 40, 64), "wide": (80, 96, 128, 160, 192, 256)}
WITH_DROPOUT = (32, 64, 80, 256)
REHEARSED_DIMS = (8, 80)
PRECISIONS = {  # dtype, torch.set_float32_matmul_precision
    "bf16": (BF16, "highest"),
    "fp16": (FP16, "highest"),
    "fp32": (FP32, "highest"),  # three tf32 products
    "tf32": (FP32, "high"),
}
PREFIXES = (0, 1, 16, 17, 64, 65, 128, 512)
COLUMNS = (128, 312, 384, 768, 1000, 1024, 3072, 4096)
FUZZ_CASES, FUZZ_CASES_PER_CHECK = 48, 4


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        run: of the device.
        rehearsed: on a CPU too; False where it repeats another one with other numbers.
    """

    run: Callable[[torch.device], float | None]
    rehearsed: bool = True


def tiny(shape: Shape) -> Shape:
    """For the interpreter: a tile and a bit of everything."""
    return replace(
        shape,
        batch=min(shape.batch, 2),
        heads=min(shape.heads, shape.group),
        queries=min(shape.queries, 7),
        tokens=min(shape.tokens, 7),
        prefix=min(shape.prefix, 5),
    )


def attention(
    shape: Shape,
    dtype: torch.dtype = BF16,
    mask: str = "right padding",
    p: float = 0.0,
    prefix_p: float = 0.0,
    precision: str = "highest",
    rehearsed: bool = True,
    gigabytes: int = 2,
    **made,
) -> Check:
    """The operator against the oracle; `made`: as of make_inputs."""

    def run(device: torch.device) -> float:
        needs_memory(device, gigabytes)
        sizes = tiny(shape) if device.type == "cpu" else shape
        with unwritten_is_nan(), matmul_precision(precision):
            return check(["triton"], sizes, dtype, mask, p, prefix_p, device, **made)

    return Check(run, rehearsed)


def head_dims(precision: str, dims: Iterable[int]) -> dict[str, Check]:
    dtype, float32_precision = PRECISIONS[precision]
    checks = {}
    for head_dim in dims:
        shape = Shape(2, 4, 150, 150, 20, head_dim)
        options = {"precision": float32_precision, "rehearsed": head_dim in REHEARSED_DIMS}
        checks[f"d{head_dim}"] = attention(shape, dtype, **options)
        if head_dim in WITH_DROPOUT:
            checks[f"d{head_dim} dropout"] = attention(shape, dtype, p=0.1, prefix_p=0.2, **options)
    return checks


def prefixes() -> dict[str, dict[str, Check]]:
    shapes = {p: Shape(3, 4, 128, 128, p, 64) for p in (*PREFIXES, 20, 33, 100, 200)}
    some = {p: p in (0, 512) for p in shapes}
    return {
        "attention-prefixes": {
            f"p{p}": attention(shapes[p], mask="random", rehearsed=some[p]) for p in PREFIXES
        },
        "attention-prefixes-fp32": {
            f"p{p}": attention(shapes[p], FP32, rehearsed=some[p]) for p in (0, 33, 100, 200)
        }
        | {
            f"p{p} dropout": attention(shapes[p], prefix_p=0.2, rehearsed=some[p])
            for p in (20, 100, 512)
        },
    }


def lengths() -> dict[str, dict[str, Check]]:
    short = {
        "1 token": Shape(1, 1, 1, 1, 1, 64),
        "17 and 33": Shape(3, 4, 17, 33, 20, 64),
        "128": Shape(8, 12, 128, 128, 20, 64),
        "129 and 257": Shape(2, 4, 129, 257, 33, 64),
        "512": Shape(4, 4, 512, 512, 20, 64),
        "no tokens": Shape(2, 4, 70, 0, 20, 64),
        "no queries": Shape(2, 4, 0, 70, 20, 64),
        "no sequences": Shape(0, 4, 70, 70, 20, 64),
    }
    long = Shape(1, 2, 4096, 4096, 128, 64)
    thousand, four_thousand = {"gigabytes": 4}, {"rehearsed": False, "gigabytes": 16}
    return {
        "attention-lengths": {name: attention(shape) for name, shape in short.items()},
        "attention-long": {
            "1000 fp32": attention(replace(long, queries=1000, tokens=1000), FP32, **thousand),
            "2048": attention(replace(long, queries=2048, tokens=2048), **thousand),
            "4096": attention(long, **four_thousand),
            "4096 dropout": attention(long, p=0.1, prefix_p=0.1, **four_thousand),
            "4096 both, lse": attention(long, rows="both", lse=True, **four_thousand),
            "4096 packed": attention(long, packed=True, **four_thousand),
        },
    }


def options(precision: str) -> dict[str, dict[str, Check]]:
    """What is visible to rows, and everything else that a call may have."""
    dtype = PRECISIONS[precision][0]
    square, none = Shape(3, 4, 300, 300, 20, 64), Shape(3, 4, 300, 300, 0, 64)
    grouped = Shape(3, 6, 150, 150, 33, 32, group=3)
    everything = {"packed": True, "bank": 3, "bias": "holes", "rows": "both", "lse": True}
    some = {"rehearsed": precision == "bf16"}
    dropout = {"p": 0.1, "prefix_p": 0.2, **some}
    return {
        f"attention-rows-{precision}": {
            rows: attention(square, dtype, rows=rows, lse=True, **dropout) for rows in ROWS
        }
        | {mask: attention(none, dtype, mask, **some) for mask in MASKS[2:]},
        f"attention-options-{precision}": {
            "bank": attention(square, dtype, bank=4, lse=True, **some),
            "bank, dropout": attention(replace(square, batch=11), dtype, bank=4, **dropout),
            "bias shared": attention(square, dtype, bias="shared", p=0.1, **some),
            "bias with holes": attention(square, dtype, "random", bias="holes", **some),
            "packed": attention(square, dtype, packed=True, strides="sliced", **dropout),
            "packed, everything": attention(grouped, dtype, **everything, **dropout),
            "sliced": attention(replace(square, head_dim=80), dtype, strides="sliced", **some),
            "grouped": attention(grouped, dtype, **dropout),
            "gates": attention(square, dtype, gate="closed", **some),
            "gates, everything": attention(grouped, dtype, gate="open", **everything, **dropout),
        },
    }


def positions(precision: str) -> dict[str, dict[str, Check]]:
    """DeBERTa's scores by distance, with tiles on the diagonal and beside it."""
    dtype = PRECISIONS[precision][0]
    some = {"rehearsed": precision == "bf16"}
    dropout = {"p": 0.1, "prefix_p": 0.2, **some}
    shape = Shape(3, 4, 150, 150, 20, 64)
    return {
        f"attention-positions-{precision}": {
            f"t{t} p{p}": attention(
                Shape(2, 4, t, t, p, 64), dtype, positions="both", rehearsed=False
            )
            for t in (1, 33, 128, 512)
            for p in (0, 1, 20, 100)
        }
        | {
            f"{kind}, dropout": attention(shape, dtype, positions=kind, lse=True, **dropout)
            for kind in POSITIONS
        }
        | {
            f"packed d{head_dim}": attention(
                replace(shape, head_dim=head_dim), dtype, positions="both", packed=True, bank=3,
                strides="sliced", **dropout,
            )
            for head_dim in (32, 80, 128)
        }
    }  # fmt: skip


def operator_check(
    function: Callable, *arguments, shape: Shape | None = None, runs: int | None = None, **options
) -> Check:
    """A check of attention_checks on Triton, with these sizes on a device."""
    rehearsed = FP32 not in arguments

    def run(device: torch.device) -> None:
        sizes = {}
        if shape is not None:
            small = Shape(2, 2, 7, 7, 5, 16, group=shape.group)
            sizes["shape"] = shape if device.type == "cuda" else small
        if runs is not None:
            sizes["runs"] = runs if device.type == "cuda" else 2
        with unwritten_is_nan():
            function("triton", *arguments, device=device, **options, **sizes)

    return Check(run, rehearsed)


def bits() -> dict[str, dict[str, Check]]:
    """Equal bits, and gradients against gradients."""
    several, one_group = Shape(5, 4, 300, 300, 70, 64, group=2), Shape(3, 4, 150, 150, 20, 64)
    distant = replace(several, group=1)
    ten = {"runs": 10, "shape": Shape(40, 12, 128, 128, 20, 64)}
    checks = attention_checks
    groups = {
        f"bits-{name}": {
            "packed equals padded": operator_check(
                checks.check_packed_equals_padded, dtype, shape=several
            ),
            "whatever the batch": operator_check(
                checks.check_equal_sequences_give_equal_bits, dtype, shape=several
            ),
            "10 runs": operator_check(checks.check_runs_are_bit_equal, dtype, **ten),
            "10 runs packed": operator_check(
                checks.check_runs_are_bit_equal, dtype, **ten, packed=True, bank=3
            ),
            "packed equals padded, positions": operator_check(
                checks.check_packed_equals_padded, dtype, shape=distant, positions="both"
            ),
            "packed equals padded, gates": operator_check(
                checks.check_packed_equals_padded, dtype, shape=several, gate="open"
            ),
            "10 runs, positions": operator_check(
                checks.check_runs_are_bit_equal, dtype, **ten, positions="both"
            ),
            "by dispatch": operator_check(checks.check_dispatch, dtype, shape=several),
        }
        for name, dtype in (("bf16", BF16), ("fp32", FP32))
    }
    groups["bits-gradients"] = {
        "joint": operator_check(checks.check_joint_gradients, shape=several),
        "only needed": operator_check(checks.check_only_needed_gradients, shape=one_group),
        "prefix only": operator_check(checks.check_prefix_only_backward_never_reads_the_tokens),
        "banks": operator_check(checks.check_bank_equals_separate_calls),
        "closed gates": operator_check(checks.check_closed_gates_are_no_prefix, shape=one_group),
        "merged by lse": operator_check(checks.check_merging_by_lse, shape=one_group),
        "rows without columns": operator_check(checks.check_rows_without_a_visible_column),
        "prefix in bf16": operator_check(
            checks.check_prefix_gradient_is_no_worse_than_concatenation
        ),
        "strides": operator_check(checks.check_strides_are_those_of_the_cpu),
    }
    return groups


def elementwise(dtypes: str, columns: int) -> Check:
    def run(device: torch.device) -> float:
        rows, ratios = 1003 if device.type == "cuda" else 3, []
        with unwritten_is_nan():
            for variant in VARIANTS:
                case = make_variant((rows, columns), dtypes, variant, device)
                ratios.append(elementwise_checks.check_operators("triton", case))
        return max(ratios)

    return Check(run, rehearsed=columns in (312, 1024))


def elementwise_groups() -> dict[str, dict[str, Check]]:
    checks, triton = elementwise_checks, "triton"
    groups = {
        f"elementwise-{dtypes}": {
            f"c{columns}": elementwise(dtypes, columns) for columns in COLUMNS
        }
        for dtypes in DTYPES
    }
    groups["elementwise-rules"] = {
        f"tails {activation} {name}": Check(
            lambda device, activation=activation, dtype=dtype: check_tails(
                triton, activation, dtype, device
            ),
            rehearsed=(activation, dtype) == ("gelu", FP32),
        )
        for activation in ACTIVATIONS
        for name, dtype in (("fp32", FP32), ("bf16", BF16))
    }
    groups["elementwise-rules"] |= {
        f"rotation {name}": Check(
            lambda device, dtype=dtype: check_rotations(triton, dtype, device)
        )
        for name, dtype in (("fp32", FP32), ("bf16", BF16), ("fp16", FP16))
    }
    groups["elementwise-bits"] = {}
    for dtypes in DTYPES:
        groups["elementwise-rules"] |= {
            f"mask {dtypes}": Check(
                lambda device, dtypes=dtypes: check_dropout_mask(triton, dtypes, device)
            ),
            **{
                f"rows of zeros {norm} {dtypes}": Check(
                    lambda device, dtypes=dtypes, is_layer=norm == "layer": check_rows_of_zeros(
                        triton, dtypes, is_layer, device
                    )
                )
                for norm in ("layer", "rms")
            },
            f"opcheck {dtypes}": Check(
                lambda device, dtypes=dtypes: checks.check_opcheck(
                    make_variant((5, 20), dtypes, "rms-bare-dropout", device),
                    make_rotary(RotaryShape(5, 2, 20, 7), DTYPES[dtypes][0], device),
                )
            ),
        }
        groups["elementwise-bits"] |= {
            f"wherever rows stand {dtypes}": Check(
                lambda device, dtypes=dtypes: checks.check_rows_do_not_depend_on_where_they_stand(
                    triton, dtypes, device
                ),
                rehearsed=dtypes == "mixed",
            ),
            f"by dispatch {dtypes}": Check(
                lambda device, dtypes=dtypes: checks.check_dispatch(dtypes, device)
            ),
        }
    return groups


def tracing() -> dict[str, dict[str, Check]]:
    def opcheck(backend: str | None, packed: bool) -> Check:
        rehearsed = backend is None  # opcheck of interpreted kernels takes 20 s
        return Check(
            lambda device: check_raw_operators_pass_opcheck(backend, packed, device), rehearsed
        )

    def compiled(backend: str | None, packed: bool, compiler: str) -> Check:
        rehearsed = compiler == "aot_eager" and not packed
        return Check(
            lambda device: check_compiles_as_one_graph(backend, packed, device, compiler), rehearsed
        )

    calls = [(backend, packed) for backend in (None, "triton") for packed in (False, True)]
    names = [f"{b or 'dispatched'} {'packed' if packed else 'padded'}" for b, packed in calls]
    groups = {"operators-opcheck": {n: opcheck(*c) for n, c in zip(names, calls, strict=True)}}
    for compiler in ("aot_eager", "inductor"):
        groups[f"operators-{compiler}"] = {
            name: compiled(*call, compiler) for name, call in zip(names, calls, strict=True)
        }
    return groups


def models() -> dict[str, dict[str, Check]]:
    """Whole models, which need transformers; nothing else here loads it."""

    def model(function: str, *arguments, rehearsed: bool = True, **fields) -> Check:
        def run(device: torch.device) -> float | None:
            if importlib.util.find_spec("transformers") is None:
                raise Unavailable("needs transformers, not installed here")
            from tests import block_kinds, model_checks

            module = block_kinds if hasattr(block_kinds, function) else model_checks
            return getattr(module, function)(device, *arguments, **fields)

        return Check(run, rehearsed)

    ways: dict[str, dict] = {policy: {"recompute": policy} for policy in POLICIES}
    ways = {name: {**fields, "backbone": "frozen", "strict": True} for name, fields in ways.items()}
    ways["hook"] = {"backbone": "hook"}
    return {
        **{
            f"model-{precision}": {
                name: model("check_model", dtype, **fields) for name, fields in ways.items()
            }
            for precision, dtype in (("fp32", FP32), ("bf16", BF16))
        },
        **{
            f"blocks-{precision}": {
                kind: model("check_kind", kind, dtype, p=0.3, rehearsed=kind == "modernbert")
                for kind in BLOCK_KINDS
            }
            for precision, dtype in (("fp32", FP32), ("bf16", BF16))
        },
        **{
            f"vectors-{precision}": {
                kind: model(
                    "check_kind", kind, dtype, p=0.3, trains_more=True, rehearsed=kind == "esm"
                )
                for kind in ("bert", "esm", "llama", "qwen3")
            }
            for precision, dtype in (("fp32", FP32), ("bf16", BF16))
        },
        "model-bank": {
            f"{backbone} {precision}": model("check_bank", dtype, backbone=backbone)
            for backbone in ("frozen", "hook")
            for precision, dtype in (("fp32", FP32), ("bf16", BF16))
        },
        "model-policies": {
            precision: model("check_policies_give_equal_bits", precision)
            for precision in ("float32", "bfloat16", "autocast")
        },
    }


def fuzz(first: int) -> Check:
    """Random calls in guarded memory, each by the numerics rule and twice to the bit."""

    def run(device: torch.device) -> float:
        largest, count = (333, FUZZ_CASES_PER_CHECK) if device.type == "cuda" else (16, 1)
        with unwritten_is_nan():
            return check_seeds(["triton"], range(first, first + count), largest, device)

    return Check(run, rehearsed=first < 2 * FUZZ_CASES_PER_CHECK)


def all_groups(fuzz_cases: int = FUZZ_CASES) -> dict[str, dict[str, Check]]:
    """Every group, in the order in which they are worth their time."""
    groups = {
        "large-tensors": {name: Check(run) for name, run in large_checks.CHECKS.items()},
        **{
            f"attention-{precision}-{width}": head_dims(precision, dims)
            for precision in PRECISIONS
            for width, dims in HEAD_DIMS.items()
        },
        **lengths(),
        **options("bf16"),
        **positions("bf16"),
        **bits(),
        **elementwise_groups(),
        **models(),
        **prefixes(),
        **options("fp32"),
        **positions("fp32"),
        **tracing(),
        "sanitizer": {name: Check(run) for name, run in sanitizer_checks.CHECKS.items()},
    }
    for first in range(0, fuzz_cases, FUZZ_CASES_PER_CHECK):
        groups[f"fuzz-{first}"] = {f"seed {first}": fuzz(first)}
    return groups


GROUPS = all_groups()
