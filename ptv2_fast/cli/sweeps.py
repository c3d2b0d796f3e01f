"""What `train --seeds` and `ablate` share: options, the run of a sweep, and its means."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ptv2_fast.cli.parser import (
    BadInput,
    check_places,
    checked,
    note_unread,
    quieten,
    run_config,
)
from ptv2_fast.training.sweeps.plan import SWEEP, Sweep, read_sweep


def add_output(parser: Any, what: str) -> None:
    """--output, --resume, --overwrite and --dry-run."""
    parser.add_argument("--output", required=True, help=f"folder of the {what}, new or empty")
    parser.add_argument(
        "--resume", action="store_true", help=f"go on with the interrupted {what} in --output"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help=f"delete the {what} in --output first"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check data, model and options, print the options, and train nothing",
    )


def list_of_integers(text: str) -> list[int]:
    """11,12,13 -> [11, 12, 13]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers as 11,12,13, got {text!r}") from None


def sweep_before(folder: Path) -> Sweep | None:
    """The sweep in the folder; None when it has not begun.

    Raises:
        ValueError: when it cannot be read.
    """
    return read_sweep(folder) if (folder / SWEEP).is_file() else None


def rest_of(before: Sweep, options: dict[str, Any], seeds: list[int] | None) -> Sweep:
    """The sweep in the folder, with options given now, which must be those given then.

    Its settings get these seeds; None = those that they had.

    Raises:
        BadInput: for options that the runs set themselves, or bad ones.
    """
    varied = set().union(*before.runs.values())
    refuse_given(options, varied)
    base = checked(run_config, options, before.base.options())
    note_unread(base, options, varied)
    if seeds is not None:
        return checked(before.with_seeds, base, seeds)
    return dataclasses.replace(before, base=base)


def refuse_given(options: dict[str, Any], varied: Iterable[str]) -> None:
    """Refuse options on the command line that the runs set themselves.

    Raises:
        BadInput: naming them.
    """
    for name in sorted(set(varied) & set(options)):
        raise BadInput(
            f"{name}: expected no value, since the runs differ in it, got {options[name]!r}"
        )


def run_and_print(sweep: Sweep, folder: Path, resume: bool, overwrite: bool, dry_run: bool) -> None:
    """Run a sweep, and print mean and standard deviation by setting; or check its first run.

    Raises:
        BadInput: for bad input; at the end, when a run failed.
    """
    if not resume:  # what is finished needs its data no more
        check_places(sweep.base.model, sweep.base.data)
    quieten()
    from ptv2_fast.training.dry_run import describe_run, of_all_runs
    from ptv2_fast.training.prepare import prepare
    from ptv2_fast.training.sweeps.results import summarize
    from ptv2_fast.training.sweeps.sweep import check_sweep_output, is_finished, run_sweep

    sweep = checked(check_sweep_output, sweep, folder, resume=resume, overwrite=overwrite)
    if dry_run:
        configs = sweep.configs()
        left = [name for name in configs if not (resume and is_finished(folder / name))]
        name = next(iter(left or configs))
        config = configs[name]
        prepared = checked(prepare, config, folder / name, resume=resume, overwrite=overwrite)
        run = describe_run(prepared)["run"]
        first = json.dumps(run, ensure_ascii=False)
        print(f"{len(configs)} runs; the first, {name}: {first}", file=sys.stderr)
        whole = json.dumps(of_all_runs(run["estimate"], len(left)))
        print(f"all that are to be run, if each is like {name}: {whole}", file=sys.stderr)
        for name, changes in sweep.runs.items():
            print(name, *(f"{option}={value}" for option, value in changes.items()))
        return
    outcome = checked(
        run_sweep, sweep, folder, resume=resume, overwrite=overwrite,
        announce=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    for line in summary_lines(summarize(sweep, outcome)):
        print(line)
    print(f"written to {folder}")
    if outcome.failures:
        failed = "; ".join(f"{name}: {why}" for name, why in outcome.failures.items())
        raise BadInput(f"{len(outcome.failures)} of {len(sweep.runs)} runs failed: {failed}")


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """A line for each setting and split."""
    lines = []
    for group in summary["groups"]:
        options = "".join(f"{name}={value} " for name, value in group["options"].items())
        for split, metrics in group["metrics"].items():
            scores = []
            for name, score in metrics.items():
                deviation = "" if score["sd"] is None else f" ± {score['sd']:.4f}"
                scores.append(f"{name} {score['mean']:.4f}{deviation}")
            lines.append(f"{options}{split} ({score['n']} seeds): {', '.join(scores)}")
    return lines
