"""The bytes that interpreted kernels move are those of the formula, for every argument."""

from dataclasses import replace
from math import ceil

import pytest
import torch

from tests.byte_counter import (
    LaunchTraffic,
    blocks_of,
    counted_bytes,
    disagreements,
    holds,
    splits_of,
)
from tests.byte_formulas import (
    Moved,
    Problem,
    Rows,
    backward_bytes,
    elementwise_bytes,
    forward_bytes,
    position_bytes,
)
from tests.devices import interpreted
from tests.sample_calls import (
    STYLES,
    Call,
    Sizes,
    packed_call,
    padded_call,
    position_call,
    run_elementwise,
)

pytestmark = interpreted
PADDED_IDS = ["two tiles", "ragged fp32", "grouped fp16", "one short tile"]
PADDED = [
    (Sizes(2, 2, 128, 20, 64), torch.bfloat16),
    (Sizes(3, 2, 70, 33, 32), torch.float32),
    (Sizes(2, 4, 65, 16, 80, group=2), torch.float16),
    (Sizes(2, 1, 5, 100, 16), torch.bfloat16),
]


def run(call: Call) -> list[LaunchTraffic]:
    with counted_bytes() as launches:
        call.both()
    return launches


def by_formula(problem: Problem, launches: list[LaunchTraffic]) -> list[Moved]:
    blocks = blocks_of(launches)
    return forward_bytes(problem, blocks) + backward_bytes(problem, blocks, splits_of(launches))


def problem_of(sizes: Sizes, dtype: torch.dtype, lengths: list[int] | None = None) -> Problem:
    lengths = lengths or [sizes.tokens] * sizes.batch
    return Problem(
        tuple((length, length) for length in lengths), sizes.heads, sizes.prefix, sizes.head_dim,
        dtype.itemsize, sizes.group, masked=True,
    )  # fmt: skip


@pytest.mark.parametrize(("sizes", "dtype"), PADDED, ids=PADDED_IDS)
def test_requested_bytes_are_those_of_the_formula(sizes, dtype):
    launches = run(padded_call(sizes, dtype))
    assert not disagreements(launches, by_formula(problem_of(sizes, dtype), launches))


def test_requested_bytes_of_packed_sequences_count_no_padding():
    lengths, sizes = [70, 5, 64], Sizes(heads=2, prefix=20, head_dim=32)
    launches = run(packed_call(lengths, sizes))
    problem = problem_of(sizes, torch.bfloat16, lengths)
    expected = [x for x in by_formula(problem, launches) if x.argument != "key_mask"]
    assert not disagreements(launches, expected)


def test_tables_of_positions_are_read_by_tile():
    """Of c2p and p2c products nothing lies in memory."""
    sizes = Sizes(1, 1, 70, 20, 32)
    launches = run(position_call(sizes))
    expected = by_formula(problem_of(sizes, torch.bfloat16), launches)
    expected += position_bytes(problem_of(sizes, torch.bfloat16), blocks_of(launches), slots=512)
    assert not disagreements(launches, expected)


def test_tiles_of_padding_are_not_read():
    """Of right-padded sequences, keys and values up to the tile that their last token is in."""
    sizes, lengths = Sizes(2, 1, 192, 8, 16), [70, 192]
    call = padded_call(sizes)
    call.options.key_mask.copy_(torch.arange(192) < torch.tensor(lengths)[:, None])
    launches = run(call)
    for launch in launches:
        if launch.kernel in ("prefix_attention_forward", "grad_query"):
            block_queries, block_keys = blocks_of(launches)[launch.kernel]
            columns = sum(ceil(length / block_keys) * block_keys for length in lengths)
            expected = ceil(192 / block_queries) * columns * 16 * 2
            assert launch.traffic["key"].loaded == launch.traffic["value"].loaded == expected


def test_a_wrong_formula_disagrees():
    """The comparison can fail: a prefix that is one row longer."""
    sizes = Sizes(1, 1, 20, 8, 16)
    launches = run(padded_call(sizes))
    longer = problem_of(replace(sizes, prefix=9), torch.bfloat16)
    wrong = " ".join(disagreements(launches, by_formula(longer, launches)))
    assert "prefix_key" in wrong
    assert "'query'" not in wrong


def test_dropout_moves_no_further_bytes():
    sizes = Sizes(2, 2, 70, 20, 32)
    launches = run(padded_call(sizes, dropout_p=0.1, prefix_dropout_p=0.1))
    expected = by_formula(problem_of(sizes, torch.bfloat16), launches)
    assert not disagreements(launches, expected)


@pytest.mark.parametrize(("sizes", "dtype"), PADDED[:3], ids=PADDED_IDS[:3])
def test_compulsory_bytes_read_and_write_everything_once(sizes, dtype):
    launches = run(padded_call(sizes, dtype))
    expected = by_formula(problem_of(sizes, dtype), launches)
    for launch in launches:
        least = sum(moved.compulsory for moved in expected if moved.kernel == launch.kernel)
        assert least <= launch.total("compulsory") <= 1.05 * least, launch.kernel


def test_prefix_is_read_in_place_whatever_the_batch():
    """Of the prefix, the same distinct bytes for one sequence and for four."""

    def prefix_bytes(batch: int) -> int:
        with counted_bytes() as launches:
            padded_call(Sizes(batch, 2, 20, 24, 32)).forward()
        return launches[0].traffic["prefix_key"].compulsory

    assert prefix_bytes(1) == prefix_bytes(4) == 2 * 24 * 32 * 2


def test_views_of_one_buffer_are_told_apart():
    buffer = torch.zeros(2, 5, 6, 8)
    query, key = buffer[:, :, :4].transpose(1, 2), buffer[:, :, 4:].transpose(1, 2)
    address = key[1, 1, 3, 2].data_ptr()
    assert holds(key, address)
    assert not holds(query, address)
    assert not holds(key, address + 1)
    assert not holds(key, key.data_ptr() + buffer.numel() * 4)


def test_joint_gradients_are_told_apart():
    call = padded_call(Sizes(2, 2, 20, 8, 16))
    out, lse = call.forward()
    with counted_bytes() as launches:
        call.backward(out, lse, joint=True)
    traffic = {name: each for launch in launches for name, each in launch.traffic.items()}
    for name in ("grad_query", "grad_key", "grad_value"):
        assert traffic[name].stored == 2 * 2 * 20 * 16 * 2


@pytest.mark.parametrize(
    ("style", "residual_dtype", "dropout_p"),
    [
        ("bert", torch.bfloat16, 0.0),
        ("llama", torch.bfloat16, 0.1),
        ("glm", torch.float32, 0.0),
        ("clip", torch.float32, 0.1),
    ],
    ids=str,
)
def test_elementwise_kernels_move_every_element_once(style, residual_dtype, dropout_p):
    rows, columns, head_dim, rotary_dim = 21, 96, 32, 24
    with counted_bytes() as launches:
        run_elementwise(
            torch.bfloat16, residual_dtype, rows, columns, dropout_p, STYLES[style], head_dim,
            rotary_dim,
        )  # fmt: skip
    rotated = 2 * columns // head_dim * rotary_dim
    problem = Rows(columns, 2, residual_dtype.itemsize, dropout_p > 0, rotated, rotary_dim)
    expected = elementwise_bytes(problem)
    vectors = {"bias", "weight", "beta"}
    counted = dict.fromkeys(expected, 0)
    for launch in launches:
        per_row = [each for name, each in launch.traffic.items() if name not in vectors | {"seed"}]
        counted[launch.kernel] += sum(each.loaded + each.stored for each in per_row)
        for name in vectors & launch.traffic.keys():
            size = launch.tensors[name].nbytes
            assert launch.traffic[name].compulsory == size, (launch.kernel, name)
    assert counted == {kernel: rows * size for kernel, size in expected.items()}
