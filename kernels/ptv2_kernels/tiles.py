"""Tiles: where they lie in memory, loading and storing them, their products.

A tile is a tuple of one or two matrices side by side along head_dim, as wide as BLOCK_DIMS says
(powers of two): head_dim 80 is 64 + 16 without padding. A start counts what strides[0] steps over.
"""

import triton
import triton.language as tl


@triton.jit
def chunk_pointers(
    tensor, start, head, first_row, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr
):
    """Addresses [ROWS, WIDTH] from column FIRST on.

    Where the tile begins is one number in int64, as tensors pass 2^31 elements; what lies inside
    it is counted in int32, the same in every step of a loop: one instruction to an address.
    """
    tile_ptr = tensor.ptr + tl.cast(start, tl.int64) * tensor.strides[0]
    tile_ptr += tl.cast(head, tl.int64) * tensor.strides[1]
    tile_ptr += tl.cast(first_row, tl.int64) * tensor.strides[2]
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = tl.arange(0, ROWS)[:, None] * tensor.strides[2]
    return tile_ptr + (offsets + columns[None, :] * tensor.strides[3])


@triton.jit
def chunk_mask(
    first_row,
    row_count,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """What of a chunk is inside: rows below row_count, columns below HEAD_DIM."""
    mask = (tl.arange(0, ROWS) < row_count - first_row)[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        mask = mask & (FIRST + tl.arange(0, WIDTH) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_chunk(
    pointers, first_row, row_count,
    ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Zeros outside; a row_count of None stands for enough rows."""
    if row_count is not None:
        mask = chunk_mask(first_row, row_count, ROWS, FIRST, WIDTH, HEAD_DIM)
        return tl.load(pointers, mask=mask, other=0.0)
    elif FIRST + WIDTH > HEAD_DIM:
        inside = (FIRST + tl.arange(0, WIDTH) < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def widened(tile, chunk):
    """The tile with one more matrix at its right."""
    return tile + (chunk,)  # noqa: RUF005


@triton.jit
def load_tile(
    tensor,
    start,
    head,
    first_row,
    row_count,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
):
    """ROWS rows of one head of one sequence; zeros outside."""
    tile = ()
    for chunk in tl.static_range(len(BLOCK_DIMS)):
        pointers = chunk_pointers(
            tensor, start, head, first_row, ROWS, chunk * BLOCK_DIMS[0], BLOCK_DIMS[chunk]
        )
        loaded = load_chunk(
            pointers, first_row, row_count, ROWS, chunk * BLOCK_DIMS[0], BLOCK_DIMS[chunk], HEAD_DIM
        )
        tile = widened(tile, loaded)
    return tile


@triton.jit
def load_queries(
    tensor, place, first_row,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIMS: tl.constexpr,
):  # fmt: skip
    """One tile of query or of grad_out."""
    return load_tile(
        tensor, place.start, place.head, first_row, place.row_count, ROWS, HEAD_DIM, BLOCK_DIMS
    )


@triton.jit
def load_tokens(
    key, value, place, first_column,
    COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIMS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values; WHOLE: it lies inside the sequence."""
    start, head = place.start, place.kv_head
    count = None if WHOLE else place.column_count
    return (
        load_tile(key, start, head, first_column, count, COLUMNS, HEAD_DIM, BLOCK_DIMS),
        load_tile(value, start, head, first_column, count, COLUMNS, HEAD_DIM, BLOCK_DIMS),
    )


@triton.jit
def store_tile(
    tensor,
    tile,
    start,
    head,
    first_row,
    row_count,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
):
    for chunk in tl.static_range(len(BLOCK_DIMS)):
        pointers = chunk_pointers(
            tensor, start, head, first_row, ROWS, chunk * BLOCK_DIMS[0], BLOCK_DIMS[chunk]
        )
        mask = chunk_mask(
            first_row, row_count, ROWS, chunk * BLOCK_DIMS[0], BLOCK_DIMS[chunk], HEAD_DIM
        )
        tl.store(pointers, tile[chunk].to(tensor.ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_tile(ROWS: tl.constexpr, BLOCK_DIMS: tl.constexpr):
    tile = ()
    for chunk in tl.static_range(len(BLOCK_DIMS)):
        tile = widened(tile, zeros(ROWS, BLOCK_DIMS[chunk]))
    return tile


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A shape of constants; elements of a tuple are plain numbers up to Triton 3.7."""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def sum_rows(matrix):
    """[ROWS, WIDTH] -> [ROWS], neighbours first: in this order whatever threads hold what.

    tl.sum adds in the order in which the threads hold a matrix, and that follows from what Triton
    knows of the strides and addresses it was loaded by.
    """
    for _ in tl.static_range(8):  # no tile is wider than 2^8
        if matrix.shape[1] > 1:
            pairs = tl.reshape(matrix, (matrix.shape[0], matrix.shape[1] // 2, 2))
            left, right = tl.split(pairs)
            matrix = left + right
    return tl.reshape(matrix, (matrix.shape[0],))


@triton.jit
def scale_tile(tile, factor):
    scaled = ()
    for chunk in tl.static_range(len(tile)):
        scaled = widened(scaled, tile[chunk] * factor)
    return scaled


@triton.jit
def keep_rows(tile, kept):
    """Zeros in the rows that are not kept, whatever stood there."""
    selected = ()
    for chunk in tl.static_range(len(tile)):
        selected = widened(selected, tl.where(kept[:, None], tile[chunk], 0.0))
    return selected


@triton.jit
def add_tiles(left, right):
    total = ()
    for chunk in tl.static_range(len(left)):
        total = widened(total, left[chunk] + right[chunk])
    return total


@triton.jit
def inner_products(left, right, INPUT_PRECISION: tl.constexpr):
    """left @ right^T, float32."""
    products = tl.dot(left[0], tl.trans(right[0]), input_precision=INPUT_PRECISION)
    for chunk in tl.static_range(1, len(left)):
        products = tl.dot(
            left[chunk], tl.trans(right[chunk]), products, input_precision=INPUT_PRECISION
        )
    return products


@triton.jit
def add_product(weights, tile, accumulator, INPUT_PRECISION: tl.constexpr):
    """accumulator + weights @ tile, the weights in the dtype of the tile."""
    weights = weights.to(tile[0].dtype)
    total = ()
    for chunk in tl.static_range(len(tile)):
        product = tl.dot(weights, tile[chunk], accumulator[chunk], input_precision=INPUT_PRECISION)
        total = widened(total, product)
    return total
