"""Scores by the distance of two tokens (DeBERTa), and what they add to the gradients.

    scores(i, j) += query[i] . position_key[s] + key[j] . position_query[s],  s = slots[i - j]

Element (i, j) of a tile has the distance first_row - first_column + d, d = i - j, and WIDTH, the
longer side of the tile, bounds d: -WIDTH < d < WIDTH. Two products of the tile's queries (or keys)
with WIDTH rows of a table, one row for each distance, hold every score that the tile needs: those
`behind`, d >= 0, and those `ahead`, d < 0. Of every row the needed ones have different d mod WIDTH,
its turns: put together by turn, and each row turned by its number, they are the tile. Turned back,
the gradients of the tile meet the same rows of the table. So nothing by distance is ever stored,
and slots that distances share need no sum.
"""

import triton
import triton.language as tl

from ptv2_kernels.tiles import add_product, inner_products, load_chunk, widened


@triton.jit
def load_by_distance(
    table, extras, place, first_distance,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIMS: tl.constexpr,
):  # fmt: skip
    """The rows of a table for ROWS distances; any row for those that two tokens cannot have."""
    distances = first_distance + tl.arange(0, ROWS)
    inside = (distances < place.row_count) & (distances > -place.row_count)
    slots = tl.load(extras.slots_ptr + extras.slot_count // 2 + distances, mask=inside, other=0)
    rows_ptr = table.ptr + tl.cast(place.head, tl.int64) * table.strides[1]
    tile = ()
    for chunk in tl.static_range(len(BLOCK_DIMS)):
        columns = chunk * BLOCK_DIMS[0] + tl.arange(0, BLOCK_DIMS[chunk])
        offsets = slots[:, None] * table.strides[2] + columns[None, :] * table.strides[3]
        loaded = load_chunk(
            rows_ptr + offsets, 0, None, ROWS, chunk * BLOCK_DIMS[0], BLOCK_DIMS[chunk], HEAD_DIM
        )
        tile = widened(tile, loaded)
    return tile


@triton.jit
def load_both_sides(
    table, extras, place, first_row, first_column,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIMS: tl.constexpr,
):  # fmt: skip
    """(behind, ahead): the rows of a table for d = 0 .. WIDTH - 1 and d = -WIDTH .. -1."""
    distance = first_row - first_column
    return (
        load_by_distance(table, extras, place, distance, WIDTH, HEAD_DIM, BLOCK_DIMS),
        load_by_distance(table, extras, place, distance - WIDTH, WIDTH, HEAD_DIM, BLOCK_DIMS),
    )


@triton.jit
def turn_indices(
    first_row, first_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """Of a tile of ROWS queries and COLUMNS keys, OF_KEYS the other way round: [rows, columns],
    the turn of each element; [rows, WIDTH], the column of each turn, and which are behind.

    Both starts are at least 0: what depends on them is computed anew in every step of a loop.
    Kept in registers, as what a loop does not change is, these would spill.
    """
    nothing = tl.minimum(first_row, 0) + tl.minimum(first_column, 0)
    rows = nothing + tl.arange(0, ROWS)[:, None]
    columns, turns = tl.arange(0, COLUMNS)[None, :], tl.arange(0, WIDTH)[None, :]
    if OF_KEYS:
        return (columns - rows) & (WIDTH - 1), (rows + turns) & (WIDTH - 1), rows + turns < WIDTH
    else:
        return (rows - columns) & (WIDTH - 1), (rows - turns) & (WIDTH - 1), turns <= rows


@triton.jit
def scores_by_distance(
    tile, table, extras, place, first_row, first_column,
    COLUMNS: tl.constexpr, OF_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_DIMS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """[queries, keys] of a tile of queries with a table, OF_KEYS [keys, queries] of one of keys."""
    ROWS: tl.constexpr = tile[0].shape[0]
    WIDTH: tl.constexpr = ROWS if ROWS > COLUMNS else COLUMNS
    behind, ahead = load_both_sides(
        table, extras, place, first_row, first_column, WIDTH, HEAD_DIM, BLOCK_DIMS
    )
    turn, _, is_behind = turn_indices(first_row, first_column, ROWS, COLUMNS, WIDTH, OF_KEYS)
    by_turn = tl.where(
        is_behind,
        inner_products(tile, behind, INPUT_PRECISION),
        inner_products(tile, ahead, INPUT_PRECISION),
    )
    return tl.gather(by_turn, turn, 1)


@triton.jit
def add_position_scores(
    scores, query, key, extras, place, first_row, first_column,
    HEAD_DIM: tl.constexpr, BLOCK_DIMS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Unscaled scores of one tile of tokens, with those by distance."""
    if extras.position_key is not None:
        scores += scores_by_distance(
            query, extras.position_key, extras, place, first_row, first_column,
            scores.shape[1], False, HEAD_DIM, BLOCK_DIMS, INPUT_PRECISION,
        )  # fmt: skip
    if extras.position_query is not None:
        of_keys = scores_by_distance(
            key, extras.position_query, extras, place, first_row, first_column,
            scores.shape[0], True, HEAD_DIM, BLOCK_DIMS, INPUT_PRECISION,
        )  # fmt: skip
        scores += tl.trans(of_keys)
    return scores


@triton.jit
def add_position_gradient(
    grad_scores, accumulator, table, extras, place, first_row, first_column,
    OF_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_DIMS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """accumulator + what queries get through position_key, OF_KEYS keys through position_query.

    grad_scores: [queries, keys], OF_KEYS [keys, queries]; a table of None adds nothing.
    """
    if table is None:
        return accumulator
    else:
        ROWS: tl.constexpr = grad_scores.shape[0]
        COLUMNS: tl.constexpr = grad_scores.shape[1]
        WIDTH: tl.constexpr = ROWS if ROWS > COLUMNS else COLUMNS
        behind, ahead = load_both_sides(
            table, extras, place, first_row, first_column, WIDTH, HEAD_DIM, BLOCK_DIMS
        )
        _, column, is_behind = turn_indices(first_row, first_column, ROWS, COLUMNS, WIDTH, OF_KEYS)
        weights = grad_scores.to(behind[0].dtype)
        zeros = tl.zeros((ROWS, WIDTH), weights.dtype)
        if COLUMNS < WIDTH:
            by_turn = tl.gather(weights, tl.minimum(column, COLUMNS - 1), 1)
            by_turn = tl.where(column < COLUMNS, by_turn, zeros)
        else:
            by_turn = tl.gather(weights, column, 1)
        accumulator = add_product(
            tl.where(is_behind, by_turn, zeros), behind, accumulator, INPUT_PRECISION
        )
        return add_product(tl.where(is_behind, zeros, by_turn), ahead, accumulator, INPUT_PRECISION)
