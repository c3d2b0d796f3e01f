"""ptv2-fast train."""

import json
import sys
from pathlib import Path
from typing import Any

from ptv2_fast.cli.parser import add_command, add_run_settings, checked, quieten, run_config
from ptv2_fast.training import run_folder
from ptv2_fast.training.options import RunConfig

_EXAMPLE = """examples:
  ptv2-fast train --task token-classification --model bert-base-cased --output runs/ner \\
      --train-file train.txt --validation-file valid.txt --num-virtual-tokens 32
  ptv2-fast train --recipe rte-roberta-large --output runs/rte
  ptv2-fast eval --run runs/ner --data test.txt
  ptv2-fast predict --run runs/ner --text "Angela Merkel visited Paris."
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "train", _train, "train a method on a task", _EXAMPLE)
    run = parser.add_argument_group("run")
    run.add_argument("--output", required=True, help="folder of the run, new or empty")
    run.add_argument(
        "--resume", action="store_true", help="go on with the interrupted run in --output"
    )
    run.add_argument("--overwrite", action="store_true", help="delete the run in --output first")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="check data, model and options, print the options, and train nothing",
    )
    add_run_settings(parser)


def _train(options: dict[str, Any]) -> None:
    folder = Path(options.pop("output"))
    resume, overwrite = options.pop("resume"), options.pop("overwrite")
    dry_run = options.pop("dry_run")
    config = checked(run_config, options, checked(_before, folder) if resume else None)
    checked(run_folder.check_output, folder, resume, overwrite)
    if resume:
        checked(run_folder.check_same_run, folder, config)
    if resume and (folder / run_folder.REPORT).is_file():
        print(f"{folder} is complete: see {folder / run_folder.REPORT}", file=sys.stderr)
        return
    _train_one(config, folder, resume, overwrite, dry_run)


def _before(folder: Path) -> dict[str, Any]:
    """The options of the run in the folder, flat; none when it has not begun."""
    if not (folder / run_folder.CONFIG).is_file():
        return {}
    config, _ = run_folder.read_run_config(folder)
    return config.flat()


def _train_one(
    config: RunConfig, folder: Path, resume: bool, overwrite: bool, dry_run: bool
) -> None:
    quieten()
    from ptv2_fast.encoders import print_trainable_parameters
    from ptv2_fast.training.prepare import prepare
    from ptv2_fast.training.run import train

    prepared = checked(prepare, config, folder, resume=resume, overwrite=overwrite)
    for name, features in prepared.features.items():
        cut = features.truncated
        note = f", {cut} cut to {prepared.max_length} tokens" if cut else ""
        print(f"{name}: {len(features.examples)} examples{note}", file=sys.stderr)
        for remark, value in features.examples.remarks.items():
            print(f"{name}: {remark}: {value}", file=sys.stderr)
    print_trainable_parameters(prepared.model)
    if dry_run:
        print(json.dumps(config.to_dict(), indent=2))
        return
    report = train(prepared)
    for name, scores in report["metrics"].items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))
    print(f"written to {folder}")
