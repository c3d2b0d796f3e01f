"""Compiles the shipped kernels for every target, without a GPU, and reads the machine code.

    python -m tests.triton_builds --targets sm_80 gfx942 --head-dims 64 --dtypes bf16
    python -m tests.triton_builds --targets sm_80 gfx942 --columns 768 1024 --styles bert llama

Run without TRITON_INTERPRET; prints one JSON object per kernel.
"""

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from tests.fake_gpu import GPUS, Launch, fake_gpu
from tests.machine_code import read
from tests.sample_calls import DTYPES, LAYOUTS, STYLES, layout_call, run_elementwise

# Of the products and of the residual stream, without and with autocast.
DTYPE_PAIRS = {
    "bf16": ("bf16", "bf16"),
    "mixed": ("bf16", "fp32"),
    "fp32": ("fp32", "fp32"),
}


@dataclass(frozen=True)
class Case:
    target: str
    dtype: str
    head_dim: int
    layout: str
    dropout: float
    prefix_dropout: float

    def run(self) -> None:
        """A forward and a backward pass of the attention."""
        dropout = (self.dropout, self.prefix_dropout)
        layout_call(self.layout, DTYPES[self.dtype], self.head_dim, *dropout).both()


@dataclass(frozen=True)
class ElementwiseCase:
    target: str
    input_dtype: str
    residual_dtype: str
    columns: int
    dropout: float
    style: str

    def run(self) -> None:
        dtypes = (DTYPES[self.input_dtype], DTYPES[self.residual_dtype])
        run_elementwise(*dtypes, 1000, self.columns, self.dropout, STYLES[self.style])


def padding_share(launch: Launch) -> float:
    """The part of the tiles' width that is head_dim, not padding."""
    widths = launch.arguments.get("BLOCK_DIMS")
    return launch.arguments["HEAD_DIM"] / sum(widths) if widths else 1.0


def build(case: Case | ElementwiseCase) -> list[dict[str, object]]:
    """Compiles the kernels that a case runs; one row for each."""
    with fake_gpu(case.target) as gpu:
        case.run()
    return [
        {
            **asdict(case),
            "kernel": launch.kernel,
            "block_queries": launch.arguments.get("BLOCK_QUERIES"),
            "block_keys": launch.arguments.get("BLOCK_KEYS"),
            "num_warps": launch.compiled.metadata.num_warps,
            "num_stages": launch.compiled.metadata.num_stages,
            "shared_limit": GPUS[case.target].shared_limit,
            **asdict(read(launch.compiled, case.target, padding_share(launch))),
        }
        for launch in gpu.launches
    ]


def build_all(
    cases: Sequence[Case | ElementwiseCase], processes: int
) -> Iterator[dict[str, object]]:
    """The rows of all cases as they are done, not in order."""
    if processes == 1:
        results = map(build, cases)
        yield from itertools.chain.from_iterable(results)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from itertools.chain.from_iterable(pool.imap_unordered(build, cases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["padded"])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0])
    parser.add_argument("--prefix-dropout", type=float, default=0.0)
    parser.add_argument(
        "--columns", nargs="+", type=int, help="the elementwise kernels of these widths instead"
    )
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=["bert"])
    parser.add_argument("--pairs", nargs="+", choices=DTYPE_PAIRS, default=list(DTYPE_PAIRS))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    cases: list[Case | ElementwiseCase]
    if options.columns:
        cases = [
            ElementwiseCase(target, *DTYPE_PAIRS[pair], columns, dropout, style)
            for columns, pair, dropout, style, target in itertools.product(
                options.columns, options.pairs, options.dropout, options.styles, options.targets
            )
        ]
    else:
        cases = [
            Case(target, dtype, head_dim, layout, dropout, options.prefix_dropout)
            for head_dim, dtype, layout, dropout, target in itertools.product(
                options.head_dims, options.dtypes, options.layouts, options.dropout, options.targets
            )
        ]
    for row in build_all(cases, options.processes):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
