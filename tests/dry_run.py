"""What the host code does on a GPU, found out without one: a named scenario per line of output.

Run without TRITON_INTERPRET; prints {"scenario", "launches": [{"kernel", "grid", ...}], ...}.
"""

import json
from collections.abc import Callable
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from ptv2_fast import prefix_attention
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.sample_calls import Sizes, biased_call, packed_call, padded_call, run_elementwise

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
