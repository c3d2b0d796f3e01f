"""ptv2-fast ablate."""

from pathlib import Path
from typing import Any

from ptv2_fast.cli.parser import (
    BadInput,
    add_command,
    add_run_settings,
    checked,
    note_unread,
    run_config,
)
from ptv2_fast.cli.sweeps import (
    add_output,
    list_of_integers,
    refuse_given,
    rest_of,
    run_and_print,
    sweep_before,
)
from ptv2_fast.training.sweeps.plan import VARIED

_EXAMPLE = """kinds:
  depth    the prefix in the first 4, 8, ... layers of 24 and in the last (figure 3 of the paper)
  length   4 to 128 virtual tokens, with and without the MLP (figure 4)
  reparam  with and without the MLP at the given length
  head     a linear head and the language model's head with label words (table 4)

examples:
  ptv2-fast ablate depth --recipe rte-roberta-large --seeds 11,12,13 --output runs/depth
  ptv2-fast ablate length --values 8,32 --recipe rte-roberta-large --output runs/length
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "ablate", _ablate, "vary one choice and train each", _EXAMPLE)
    parser.add_argument("kind", choices=tuple(VARIED), help="what is varied")
    run = parser.add_argument_group("ablation")
    add_output(run, "ablation")
    run.add_argument(
        "--seeds",
        type=list_of_integers,
        metavar="N,N,...",
        help="seeds of each run; with --resume they may become more",
    )
    run.add_argument("--steps", type=int, metavar="N", help="depth: how many depths (default: 6)")
    run.add_argument(
        "--values", type=list_of_integers, metavar="N,N,...",
        help="length: numbers of virtual tokens (default: 4,8,16,32,64,128)",
    )  # fmt: skip
    add_run_settings(parser)


def _ablate(options: dict[str, Any]) -> None:
    kind, folder = options.pop("kind"), Path(options.pop("output"))
    flags = {name: options.pop(name) for name in ("resume", "overwrite", "dry_run")}
    seeds = options.pop("seeds")
    settings = {name: options.pop(name) for name in ("steps", "values")}
    settings = {name: value for name, value in settings.items() if value is not None}
    for name, owner in (("steps", "depth"), ("values", "length")):
        if name in settings and kind != owner:
            raise BadInput(f"{name}: expected no value for the ablation of {kind}, got "
                           f"{settings[name]!r}")  # fmt: skip
    refuse_given(options, (*VARIED[kind], *(() if seeds is None else ("seed",))))
    before = checked(sweep_before, folder) if flags["resume"] else None
    if before is not None and before.kind == kind and not settings:
        run_and_print(rest_of(before, options, seeds), folder, **flags)
        return
    if kind == "head":
        options["head"] = "lm"  # the verbalizer is its option
    base = checked(run_config, options, before.base.options() if before else None)
    note_unread(base, options, VARIED[kind])

    from ptv2_fast.training.sweeps import ablation

    plan = getattr(ablation, f"{kind}_sweep")
    run_and_print(checked(plan, base, seeds=seeds, **settings), folder, **flags)
