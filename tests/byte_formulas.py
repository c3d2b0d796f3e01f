"""How many bytes the kernels move, by formula: tests hold it against what the interpreter counts.

Requested bytes count every repeat that a program asks of its caches; compulsory bytes count every
element once, what a perfect cache would move.
"""

from dataclasses import dataclass
from itertools import product
from math import ceil, prod

Blocks = dict[str, tuple[int, int]]  # (block_queries, block_keys) of each kernel


@dataclass(frozen=True)
class Moved:
    """One argument of one kernel, bytes."""

    kernel: str
    argument: str
    requested: int
    compulsory: int
    stored: bool = False


@dataclass(frozen=True)
class Problem:
    """Sequences of (queries, tokens) with a shared prefix."""

    sequences: tuple[tuple[int, int], ...]
    heads: int
    prefix: int
    head_dim: int
    itemsize: int  # bytes of an element
    group: int = 1  # query heads per key/value head
    masked: bool = False  # with a mask that hides nothing

    @property
    def kv_heads(self) -> int:
        return self.heads // self.group

    @property
    def row(self) -> int:
        """Bytes of one row of one head."""
        return self.head_dim * self.itemsize

    @property
    def queries(self) -> int:
        return sum(queries for queries, _ in self.sequences)

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.sequences)


def _by_query_tile(problem: Problem, kernel: str, blocks: tuple[int, int]) -> list[Moved]:
    """What a program that owns a query tile reads of keys and values: all, for each tile.

    It scans the mask once, and reads it again where a tile of columns is not whole.
    """
    block_queries, block_keys = blocks
    tiles = sum(ceil(queries / block_queries) for queries, _ in problem.sequences)
    columns = sum(ceil(queries / block_queries) * tokens for queries, tokens in problem.sequences)
    keys = problem.heads * columns * problem.row, problem.kv_heads * problem.tokens * problem.row
    prefixes = (
        problem.heads * tiles * problem.prefix * problem.row,
        problem.kv_heads * problem.prefix * problem.row,
    )
    moved = [Moved(kernel, name, *keys) for name in ("key", "value")]
    moved += [Moved(kernel, name, *prefixes) for name in ("prefix_key", "prefix_value")]
    if problem.masked:
        scanned = sum(
            ceil(queries / block_queries) * (tokens + tokens % block_keys)
            for queries, tokens in problem.sequences
        )
        moved.append(Moved(kernel, "key_mask", problem.heads * scanned, problem.tokens))
    return moved


def _once(kernel: str, sizes: dict[str, int], stored: bool = False) -> list[Moved]:
    return [Moved(kernel, name, size, size, stored) for name, size in sizes.items()]


def _rows(problem: Problem) -> tuple[int, int]:
    """Bytes of all query rows, and of a float32 statistic of them."""
    rows = problem.heads * problem.queries
    return rows * problem.row, rows * 4


def forward_bytes(problem: Problem, blocks: Blocks) -> list[Moved]:
    kernel = "prefix_attention_forward"
    rows, statistic = _rows(problem)
    return [
        *_once(kernel, {"query": rows}),
        *_by_query_tile(problem, kernel, blocks[kernel]),
        *_once(kernel, {"out": rows, "lse": statistic}, stored=True),
    ]


def backward_bytes(problem: Problem, blocks: Blocks, splits: int) -> list[Moved]:
    """`splits`: parts of the batch that the prefix gradient is summed over one by one."""
    rows, statistic = _rows(problem)
    moved = _once("delta", {"out": rows, "grad_out": rows})
    moved += _once("delta", {"delta": statistic}, stored=True)
    statistics = {"lse": statistic, "delta": statistic}
    moved += _once("grad_query", {"query": rows, "grad_out": rows, **statistics})
    moved += _by_query_tile(problem, "grad_query", blocks["grad_query"])
    moved += _once("grad_query", {"grad_query": rows}, stored=True)

    kernel = "grad_key_value"
    keys = problem.kv_heads * problem.tokens * problem.row
    moved += _once(kernel, {"key": keys, "value": keys})
    moved += _once(kernel, {"grad_key": keys, "grad_value": keys}, stored=True)
    block_keys = blocks[kernel][1]
    repeats = sum(queries * ceil(tokens / block_keys) for queries, tokens in problem.sequences)
    moved += _per_row(problem, kernel, repeats)
    if problem.masked:
        moved.append(Moved(kernel, "key_mask", problem.kv_heads * problem.tokens, problem.tokens))
    return moved + _prefix_bytes(problem, blocks, splits)


def _per_row(problem: Problem, kernel: str, rows: int) -> list[Moved]:
    """What the owners of columns read of `rows` query rows per head, repeats included."""
    whole = dict(zip(("row", "statistic"), _rows(problem), strict=True))
    return [
        Moved(kernel, name, problem.heads * rows * size, whole[kind])
        for name, kind, size in (
            ("query", "row", problem.row),
            ("grad_out", "row", problem.row),
            ("lse", "statistic", 4),
            ("delta", "statistic", 4),
        )
    ]


def position_bytes(problem: Problem, blocks: Blocks, slots: int) -> list[Moved]:
    """What both tables of `slots` rows add: of each tile, twice its longer side of their rows.

    The gradients of queries and of keys read one of the tables once more.
    """
    moved = []
    for kernel, *reads in (
        ("prefix_attention_forward", 1, 1),
        ("grad_query", 2, 1),
        ("grad_key_value", 1, 2),
    ):
        width, tiles, known = max(blocks[kernel]), 0, 0
        for length, _ in problem.sequences:
            starts = (range(0, length, block) for block in blocks[kernel])
            middles = [row - column for row, column in product(*starts)]
            tiles += len(middles)
            known += sum(
                min(length, middle + width) - max(1 - length, middle - width) for middle in middles
            )
        rows, table = problem.heads * tiles * 2 * width, problem.heads * slots * problem.row
        longest = max(length for length, _ in problem.sequences)
        moved += [
            Moved(kernel, "position_key", reads[0] * rows * problem.row, table),
            Moved(kernel, "position_query", reads[1] * rows * problem.row, table),
            Moved(kernel, "slots", sum(reads) * problem.heads * known * 4, (2 * longest - 1) * 4),
        ]
    return moved


def _prefix_bytes(problem: Problem, blocks: Blocks, splits: int) -> list[Moved]:
    if problem.prefix == 0:
        return []
    kernel = "grad_prefix"
    tiles = ceil(problem.prefix / blocks[kernel][1])
    prefix = problem.kv_heads * problem.prefix * problem.row
    partial = prod((splits, 2, problem.kv_heads, problem.prefix, problem.head_dim, 4))
    gradients = {"grad_prefix_key": prefix, "grad_prefix_value": prefix}
    return [
        *_per_row(problem, kernel, problem.queries * tiles),
        *(Moved(kernel, name, splits * prefix, prefix) for name in ("prefix_key", "prefix_value")),
        *_once(kernel, {"partial": partial}, stored=True),
        *_once("sum_partials", {"partial": partial}),
        *_once("sum_partials", gradients, stored=True),
    ]


@dataclass(frozen=True)
class Rows:
    """Of what the elementwise operators of a block take.

    Args:
        columns: C.
        products: bytes of an element of X.
        residual: bytes of an element of R.
        has_dropout: p > 0.
        rotated: elements of a row that are rotated, those of all heads together.
        rotary_dim: of one head.
        gradients: given to dropout_add_norm_backward, of grad_out, grad_other and grad_total.
    """

    columns: int
    products: int
    residual: int
    has_dropout: bool
    rotated: int = 0
    rotary_dim: int = 0
    gradients: tuple[bool, bool, bool] = (True, True, True)


def elementwise_bytes(rows: Rows) -> dict[str, int]:
    """By kernel: bytes of one row, each element moved once; weights stay in the caches."""
    narrow, wide = rows.products * rows.columns, rows.residual * rows.columns
    statistics, coordinates = 8, 8 * rows.has_dropout
    # Without dropout and in one dtype, the gradient of input would be that of residual again.
    is_same = not rows.has_dropout and rows.products == rows.residual
    grad_input = 0 if is_same else narrow
    given = sum(g * size for g, size in zip(rows.gradients, (wide, narrow, wide), strict=True))
    return {
        "bias_activation": 2 * narrow,
        "bias_activation_backward": 3 * narrow,
        "gated_activation": 3 * narrow,
        "gated_activation_backward": 5 * narrow,
        "dropout_add_norm": narrow + 3 * wide + statistics + coordinates,
        "dropout_add_norm_backward": given + 2 * wide + grad_input + statistics + coordinates,
        "norm_from_stats": 2 * wide + statistics,
        "dropout_add": narrow + 2 * wide + coordinates,
        "dropout_backward": 0 if is_same else wide + narrow + coordinates,
        "rotate": 2 * rows.rotated * rows.products + 4 * rows.rotary_dim,
    }


def concatenated(problem: Problem) -> Problem:
    """The same attention with the prefix in front of every sequence's own keys and values."""
    sequences = tuple((queries, problem.prefix + tokens) for queries, tokens in problem.sequences)
    return Problem(
        sequences, problem.heads, 0, problem.head_dim, problem.itemsize, problem.group,
        problem.masked,
    )  # fmt: skip


def concatenation_bytes(problem: Problem) -> tuple[int, int]:
    """Around the kernels, forward and backward: the prefix is read and written once per launch.

    torch.cat of keys and of values; gradients of tokens made contiguous, those of the prefix summed
    over the batch.
    """
    tokens = problem.kv_heads * problem.tokens * problem.row
    prefix = problem.kv_heads * problem.prefix * problem.row
    copies = len(problem.sequences) * prefix
    forward = 2 * (tokens + prefix) + 2 * (tokens + copies)
    backward = 2 * (tokens + tokens) + 2 * (copies + prefix)
    return forward, backward
