"""What the Triton kernels do on a GPU, in stages of less than nine minutes each.

    python -m bench.gpu check attention --output results
    python -m bench.gpu attention --output results --only base-b32-t128-p20 --without flex
    python -m bench.gpu check attention elementwise step memory tune --output rehearsal --dry-run

Needs the source tree (PYTHONPATH=.:kernels), torch and triton, and for whole models transformers;
no C++ extension, no network. Each stage writes OUTPUT/STAGE.csv, a row as it comes, and ends by
itself after --minutes; the same call then goes on with what is left. What fails is a row. `tune`
also writes OUTPUT/tuned-ARCHITECTURE.json, which belongs into kernels/ptv2_kernels/measured/.

Exit code: 0; 1 when something failed; 2 when a stage cannot run on this machine.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from bench.gpu.runner import Results, StageRun
from bench.gpu.stages import STAGES, StageOptions, units_of, why_not
from bench.measure import machine_columns


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        epilog="\n".join(f"{name:12} {stage.purpose}" for name, stage in STAGES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help="in this order")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", action="append", metavar="UNIT", help="units of one stage")
    parser.add_argument("--without", action="append", default=[], metavar="WAY", help="say, flex")
    parser.add_argument("--minutes", type=float, default=8.5, help="for each stage")
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time per row")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU, tiny shapes")
    parser.add_argument("--commit", help="of the sources, where git cannot tell")
    parser.add_argument("--list", action="store_true", help="print the units and end")
    arguments = parser.parse_args()
    if arguments.only and len(arguments.stages) > 1:
        parser.error(f"--only: expected one stage, got {arguments.stages}")
    return arguments


def main() -> int:
    arguments = parse()
    console = Console(width=200, soft_wrap=True, highlight=False)
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    # A rehearsal's times mean nothing.
    seconds, rounds = (0.0, 1) if arguments.dry_run else (arguments.seconds, 5)
    folder = str(arguments.output.resolve())
    options = StageOptions(tuple(arguments.without), seconds, rounds, folder)
    unable, failed = [], 0
    for stage in arguments.stages:
        reason = why_not(stage, arguments.dry_run)
        if reason is not None:
            print(f"bench.gpu {stage}: {reason}", file=sys.stderr)
            unable.append(stage)
            continue
        try:
            units = units_of(stage, device, arguments.only)
        except ValueError as error:
            print(f"bench.gpu {stage}: {error}", file=sys.stderr)
            return 2
        if arguments.list:
            console.print("\n".join(units))
            continue
        machine = machine_columns(device)
        if arguments.commit:
            machine["commit"] = arguments.commit
        results = Results(arguments.output / f"{stage}.csv", machine)
        deadline = time.monotonic() + 60 * arguments.minutes
        stage_failures = StageRun(stage, device, options, results, console, deadline).run(units)
        console.print(f"{stage}: {stage_failures} of {len(units)} units failed; {results.path}")
        failed += stage_failures
    return 2 if unable else int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
