"""What the host code does on a GPU, found out without one: a named scenario per line of output.

Run without TRITON_INTERPRET; prints {"scenario", "launches": [{"kernel", "grid", ...}], ...}.
"""

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from ptv2_fast import prefix_attention
from ptv2_fast.ops.options import AttentionOptions
from ptv2_kernels.launching import Launcher
from tests.elementwise_cases import DTYPES, calls_of, make_case, results_of
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.rotary_checks import FLAGS
from tests.sample_calls import (
    Call,
    Sizes,
    biased_call,
    packed_call,
    padded_call,
    run_elementwise,
)

SCENARIOS: dict[str, Callable[[FakeGpu], dict[str, object] | None]] = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


@scenario
def padded(gpu: FakeGpu) -> None:
    padded_call().both()


@scenario
def packed(gpu: FakeGpu) -> None:
    packed_call([200, 7, 0, 129], prefix_dropout_p=0.1).both()


@scenario
def packed_bank(gpu: FakeGpu) -> None:
    packed_call([200, 7, 129], Sizes(rows_of_bank=2)).both()


@scenario
def grouped_joint(gpu: FakeGpu) -> None:
    """Six query heads on three, gradients of query, key and value in one buffer."""
    padded_call(Sizes(heads=6, group=2)).both(joint=True)


@scenario
def first_layer(gpu: FakeGpu) -> None:
    """A frozen encoder's lowest layer needs the gradient of the prefix alone."""
    padded_call().both(needs_query=False, needs_key_value=False)


@scenario
def raw_operators(gpu: FakeGpu) -> None:
    call = padded_call()
    out, lse = torch.ops.ptv2.prefix_attention_forward_triton(*call.tensors, *call.options)
    torch.ops.ptv2.prefix_attention_backward_triton(
        torch.zeros_like(out), *call.tensors, out, lse, None, True, True, True, False, *call.options
    )


@scenario
def compiled_model(gpu: FakeGpu) -> None:
    """torch.compile of the public function, without a graph break."""
    call = padded_call()
    query, key, value, *bank = call.tensors
    prefixes = (rows[0] for rows in bank)  # [H_kv, P, D]
    tensors = [tensor.requires_grad_() for tensor in (query, key, value, *prefixes)]
    compiled = torch.compile(prefix_attention, backend="aot_eager", fullgraph=True)
    out = compiled(*tensors, key_mask=call.options.key_mask, dropout_p=0.1, backend="triton")
    out.backward(torch.ones_like(out))


def _recompilations(gpu: FakeGpu, calls: list[Callable[[], None]]) -> dict[str, object]:
    """Kernels compiled by the first call, and by each later one."""
    counts = []
    for call in calls:
        before = gpu.compilations
        call()
        counts.append(gpu.compilations - before)
    return {"compilations": counts}


@scenario
def other_sizes(gpu: FakeGpu) -> dict[str, object]:
    """Tokens and batch that change, among them multiples of 16 and 1."""
    sizes = [Sizes(2, 3, 200), Sizes(5, 3, 177), Sizes(7, 3, 256), Sizes(1, 3, 1)]
    return _recompilations(gpu, [padded_call(each, dropout_p=0.1).both for each in sizes])


@scenario
def other_lengths(gpu: FakeGpu) -> dict[str, object]:
    """max_seqlen, tokens, number of sequences, rows of the bank."""
    calls = [
        packed_call([200, 7, 129], Sizes(rows_of_bank=2)),
        packed_call([33, 300], Sizes(rows_of_bank=3)),
        packed_call([64, 64, 64, 64], Sizes(rows_of_bank=4)),
        packed_call([1], Sizes(rows_of_bank=2)),
    ]
    return _recompilations(gpu, [call.both for call in calls])


@scenario
def other_rows(gpu: FakeGpu) -> dict[str, object]:
    """Of the elementwise kernels, as test_kernel_builds.py compiles them."""
    dtypes = torch.bfloat16, torch.float32
    calls = [partial(run_elementwise, *dtypes, rows, 768, 0.1) for rows in (1000, 177, 256, 1)]
    return _recompilations(gpu, calls)


@scenario
def other_prefixes(gpu: FakeGpu) -> dict[str, object]:
    """Several tiles, a part of one, and one that is full."""
    calls = [padded_call(Sizes(prefix=length)).both for length in (100, 7, 20, 64, 128)]
    return _recompilations(gpu, calls)


@scenario
def other_biases(gpu: FakeGpu) -> dict[str, object]:
    """The strides of a bias change with the tokens: multiples of 16, or not."""
    return _recompilations(
        gpu, [biased_call(Sizes(tokens=n)).both for n in (64, 128, 65, 67, 96, 33)]
    )


def _flat(value: object) -> Iterator[object]:
    """The members of nested tuples; a tensor by its identity."""
    if isinstance(value, (tuple, list)):
        for member in value:
            yield from _flat(member)
    else:
        yield id(value) if isinstance(value, torch.Tensor) else value


class _Chosen:
    """Stands in for a compiled kernel, and writes down that it is run."""

    function = packed_metadata = 0

    def __init__(self, log: list) -> None:
        self.log = log

    def launch_metadata(self, *_) -> None:
        return None

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments) -> None:
        self.log.append((self, (x, y, z), arguments))


@scenario
def random_calls(gpu: FakeGpu) -> dict[str, object]:
    """Each launch of random calls once more by Triton: which kernels serve it, with what."""
    log: list = []
    counts = {"launches": 0, "direct": 0, "differ": 0}
    launch = Launcher.__call__

    def choose(kernel, key, *_, **__):
        return kernel.device_caches[gpu.index][0].setdefault(key, _Chosen(log))

    def by_triton(kernel, *arguments, **options):
        counts["direct"] -= 1
        return run(kernel, *arguments, **options)

    def twice(launcher, grid, options, *arguments):
        counts["direct"] += 1
        with patch.object(JITFunction, "run", by_triton):
            launch(launcher, grid, options, *arguments)
        launcher.kernel[grid](*arguments, **options)
        (kernel, *first), (expected, *second) = log[-2:]
        same = kernel is expected and [*_flat(first)] == [*_flat(second)]
        counts["launches"] += 1
        counts["differ"] += not same or len(log) != 2 * counts["launches"]

    run, generator = JITFunction.run, random.Random(0)
    with (
        patch.object(JITFunction, "_do_compile", choose),
        patch.object(Launcher, "__call__", twice),
    ):
        for _ in range(200):
            _random_attention(generator)
            _random_rows(generator)
    return {**counts, "chosen": len({id(kernel) for kernel, *_ in log})}


def _random_attention(generator: random.Random) -> None:
    """Forward and backward of a call, and of one like it with other strides and addresses."""
    one_of = generator.choice
    sizes = Sizes(
        one_of((1, 2)), one_of((2, 16)), one_of((1, 16, 17)), 7, 16, 2, one_of((1, 2)),
    )  # fmt: skip
    dtype, dropout = one_of((torch.float32, torch.bfloat16)), (one_of((0.0, 0.1)), 0.0)
    if one_of((True, False)):
        call = packed_call([sizes.tokens, one_of((1, 5))], sizes, dtype, *dropout)
    else:
        others = {"window": one_of((1, 5, 16))} if one_of((True, False)) else {}
        if one_of((True, False)):
            others["bias"] = torch.zeros(1, sizes.heads, sizes.tokens, sizes.tokens, dtype=dtype)
        call = padded_call(sizes, dtype, *dropout, masked=one_of((True, False)), **others)
    needs = {
        name: generator.random() < 0.8
        for name in ("needs_query", "needs_key_value", "needs_prefix")
    }
    call.both(**needs)
    tensors = tuple(_elsewhere(generator, tensor) for tensor in call.tensors)
    options = AttentionOptions(*(_elsewhere(generator, option) for option in call.options))
    Call(tensors, options).both(**needs)


def _elsewhere(generator: random.Random, value: object) -> object:
    """A tensor of zeros, now and then with gaps between its rows or at an odd address."""
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or generator.random() < 0.8:
        return value
    gap, first = generator.choice(((0, 1), (8, 0), (16, 0), (3, 0)))
    *shape, columns = value.shape
    memory = torch.zeros(first + value.numel() // columns * (columns + gap), dtype=value.dtype)
    return memory[first:].view(*shape, columns + gap)[..., :columns]


def _random_rows(generator: random.Random) -> None:
    """The elementwise operators, and a rotation."""
    one_of = generator.choice
    rows, columns, p = one_of((1, 5)), one_of((16, 40)), one_of((0.0, 0.1))
    case = make_case((rows, columns), one_of(list(DTYPES)), one_of((True, False)), p)
    for name, arguments in calls_of(case, ("silu",)):
        results_of("triton", name, arguments)
    packed = _elsewhere(generator, torch.zeros(rows, 64, dtype=case.input.dtype))
    angles = torch.zeros(rows, 8)
    results_of("triton", "rotate_", (packed, angles, angles, 2, 16, *one_of(FLAGS)))


def _describe(name: str, gpu: FakeGpu, extra: dict[str, object] | None) -> dict[str, object]:
    launches = [
        {
            "kernel": launch.kernel,
            "grid": launch.grid,
            "block_queries": launch.arguments.get("BLOCK_QUERIES"),
            "block_keys": launch.arguments.get("BLOCK_KEYS"),
            "shared_bytes": launch.compiled.metadata.shared,
            "warps": launch.compiled.metadata.num_warps,
            "constants": str({k: v for k, v in launch.arguments.items() if k.isupper()}),
        }
        for launch in gpu.launches
    ]
    return {"scenario": name, "launches": launches, **(extra or {})}


def main() -> None:
    for name, function in SCENARIOS.items():
        with fake_gpu("sm_80") as gpu:
            print(json.dumps(_describe(name, gpu, function(gpu))), flush=True)
    with fake_gpu("sm_80", shared_limit=4096) as gpu:
        try:
            padded_call().forward()
            error = ""
        except OutOfResources as raised:
            error = str(raised)
        print(json.dumps(_describe("little_shared_memory", gpu, {"error": error})))


if __name__ == "__main__":
    main()
