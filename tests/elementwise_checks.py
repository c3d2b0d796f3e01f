"""The rules that every backend of the elementwise operators is held to, all of them together."""

import dataclasses
import itertools
import random
import warnings

import torch

from ptv2_fast.ops.activations import ACTIVATIONS
from tests.activation_checks import check_activations, check_tails
from tests.devices import CPU
from tests.elementwise_cases import (
    DROPOUT_P,
    DTYPES,
    Case,
    calls_of,
    make_case,
    results_of,
    run_all,
)
from tests.norm_checks import check_norms
from tests.rotary_checks import (
    FLAGS,
    RotaryCase,
    RotaryShape,
    check_rotation,
    check_rotations,
    make_rotary,
)

# Of a case: extras, dropout_p, subtract_mean.
VARIANTS = {
    "layer-bare": (False, 0.0, True),
    "layer-extras-dropout": (True, DROPOUT_P, True),
    "rms-extras": (True, 0.0, False),
    "rms-bare-dropout": (False, DROPOUT_P, False),
}


def make_variant(
    shape: tuple[int, int], dtypes: str, variant: str, device: torch.device = CPU
) -> Case:
    extras, dropout_p, subtract_mean = VARIANTS[variant]
    return make_case(shape, dtypes, extras, dropout_p, device, subtract_mean)


def check_operators(backend: str, case: Case) -> float:
    """All but the rotation against float64; the largest error over its budget."""
    return max(check_activations(backend, case), check_norms(backend, case))


def check_rows_do_not_depend_on_where_they_stand(
    backend: str, dtypes: str, device: torch.device = CPU, shape: tuple[int, int] = (37, 387)
) -> None:
    """In another order, and as views that begin at a row, where no address is a whole vector's."""
    order = torch.randperm(shape[0]).to(device)
    for variant, activations in (("layer-extras-dropout", ACTIVATIONS), ("rms-bare-dropout", ())):
        case = make_variant(shape, dtypes, variant, device)
        for rows in (order, slice(1, None)):
            moved = case.map(
                lambda tensor, rows=rows: tensor[rows] if tensor.dim() == 2 else tensor
            )
            moved = dataclasses.replace(moved, coordinates=case.coordinates[rows])
            calls = (calls_of(each, activations) for each in (case, moved))
            for (name, arguments), (_, moved_arguments) in zip(*calls, strict=True):
                expected = results_of(backend, name, arguments)
                actual = results_of(backend, name, moved_arguments)
                for one, other in zip(expected, actual, strict=True):
                    named = [name, *(each for each in arguments if isinstance(each, str))]
                    assert torch.equal(one[rows], other), named
    rotary = make_rotary(RotaryShape(shape[0], 3, 20, 7), DTYPES[dtypes][0], device)
    moved = rotary._replace(
        packed=rotary.packed[order], cosine=rotary.cosine[order], sine=rotary.sine[order]
    )
    for interleaved, inverse in FLAGS:
        rotary.rotate(backend, interleaved, inverse)
        moved.rotate(backend, interleaved, inverse)
        assert torch.equal(rotary.packed[order], moved.packed)


def check_dispatch(dtypes: str, device: torch.device) -> None:
    """On a GPU the dispatcher serves the operators by Triton, and without a warning.

    On a CPU other kernels serve them, by the numerics rule.
    """
    case = make_case((37, 387), dtypes, device=device)
    rotary = make_rotary(RotaryShape(5, 3, 20, 7, behind=13), DTYPES[dtypes][0], device)
    if device.type == "cpu":
        check_operators("dispatched", case)
        check_rotation("dispatched", rotary)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of a kernel that does not compile
        results = run_all("dispatched", case)
        check_rotation("dispatched", rotary)
    for actual, expected in zip(results, run_all("triton", case), strict=True):
        assert torch.equal(actual, expected)


def check_opcheck(case: Case, rotary: RotaryCase) -> None:
    """Schemas and fakes of all operators."""
    rotation = (rotary.cosine, rotary.sine, rotary.shape.heads, rotary.shape.head_dim)
    calls = [*calls_of(case, ("silu",)), ("rotate_", (rotary.packed, *rotation, True, False))]
    for name, arguments in calls:
        torch.library.opcheck(getattr(torch.ops.ptv2, name).default, arguments)


def check_level() -> None:
    """All operators of C++ at the level of this process."""
    for shape, dtypes in itertools.product([(1, 8), (5, 21), (37, 387)], DTYPES):
        for variant in VARIANTS:
            check_operators("cpp", make_variant(shape, dtypes, variant))
    for dtype in (torch.float32, torch.bfloat16):
        check_rotations("cpp", dtype)
        for activation in ACTIVATIONS:
            check_tails("cpp", activation, dtype)


def check_random(backend: str, seed: int) -> float:
    """Random sizes, dtypes and options of all operators; a seed names a case."""
    generator = random.Random(f"elementwise {seed}")
    shape = generator.choice((1, 2, 3, 50)), generator.randint(1, generator.choice((20, 300, 2000)))
    dtypes, device = generator.choice(list(DTYPES)), CPU
    case = make_case(
        shape, dtypes, generator.random() < 0.5, generator.choice((0.0, 1e-6, 0.1, 0.9)), device,
        generator.random() < 0.5,
    )  # fmt: skip
    pairs = generator.randint(1, 70)
    rotary = RotaryShape(
        generator.randint(0, 20), generator.randint(1, 5),
        2 * pairs + generator.choice((0, 1, 8)), pairs,
        generator.choice((0, 1, 64)), generator.choice((0, 1, 40)),
    )  # fmt: skip
    rotated = check_rotation(backend, make_rotary(rotary, DTYPES[dtypes][0]))
    return max(check_operators(backend, case), rotated)
