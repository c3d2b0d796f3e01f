"""ptv2-fast convert."""

from pathlib import Path
from typing import Any

from ptv2_fast.cli.parser import BadInput, add_command, checked, quieten
from ptv2_fast.files import find_description, read_json_object
from ptv2_fast.training import output
from ptv2_fast.training.run_folder import ADAPTER
from ptv2_fast.training.run_lookup import is_run

_EXAMPLE = """examples:
  ptv2-fast convert peft-adapter adapter --model roberta-base
  ptv2-fast convert checkpoint-900 adapter --model roberta-large --head sequence --allow-pickle
  ptv2-fast convert runs/ner peft-adapter --to peft
  ptv2-fast convert runs/ner folded --fold

Read are prefixes of PEFT, of P-Tuning v2's own code (state dicts with prefix_encoder.*) and of
ChatGLM's (transformer.prefix_encoder.*), and of the package adapters. Only safetensors are read
unless a pickle is allowed.
"""
_OURS, _PEFT = "ptv2-fast", "peft"
_HEADS = ("sequence", "token", "question", "choice", "bare")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "convert",
        _convert,
        "read adapters of other packages, or write for PEFT",
        _EXAMPLE,
    )
    parser.add_argument("source", help="folder of an adapter or a run, or file of a state dict")
    parser.add_argument("target", help="new or empty folder")
    parser.add_argument("--to", choices=(_OURS, _PEFT), default=_OURS, help="default: ptv2-fast")
    parser.add_argument(
        "--model", help="the pretrained model of an adapter that does not name it, or names another"
    )
    parser.add_argument("--head", choices=_HEADS, help="where the adapter does not say it")
    parser.add_argument(
        "--labels", metavar="NAME,NAME,...", help="by number, where the adapter has no names"
    )
    parser.add_argument(
        "--fold", action="store_true", help="of an adapter with a projection keep what it gives"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="also read .bin and .pt, as weights only"
    )


def _convert(options: dict[str, Any]) -> None:
    source, target = Path(options["source"]), Path(options["target"])
    if not source.exists():
        raise BadInput(f"source: expected an adapter, got no such file or folder, {str(source)!r}")
    checked(_check_new, target)
    own = checked(_own_adapter, source)
    if options["to"] == _PEFT and own is None:
        raise BadInput(f"source: expected an adapter of ptv2-fast or a run, got {str(source)!r}")
    if options["to"] == _OURS and own is not None and not options["fold"]:
        raise BadInput(f"source: {str(source)!r} is an adapter of ptv2-fast; expected --to or "
                       "--fold")  # fmt: skip
    quieten()
    from ptv2_fast.adapters import fold_adapter
    from ptv2_fast.training.converting import export_folder, import_folder

    if options["to"] == _PEFT:
        checked(export_folder, source, target)
    elif own is not None:
        checked(fold_adapter, own, target)
    else:
        labels = options["labels"].split(",") if options["labels"] else None
        checked(import_folder, source, target, options["model"], options["head"], labels,
                options["allow_pickle"], options["fold"])  # fmt: skip
    print(f"written to {target}")


def _check_new(target: Path) -> None:
    output.check_place(target, "target")
    if output.contents(target):
        raise ValueError(f"target: expected a new or empty folder, got {str(target)!r}")


def _own_adapter(source: Path) -> Path | None:
    """The folder of an adapter of ours that a path names; None of others."""
    if not source.is_dir():
        return None
    if is_run(source) and (source / ADAPTER).is_dir():
        return source / ADAPTER
    description = find_description(source)
    if description is None or "ptv2_format" not in read_json_object(description):
        return None
    return source
