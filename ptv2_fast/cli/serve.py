"""ptv2-fast serve."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from ptv2_fast.cli.parser import BadInput, add_command, checked, quieten
from ptv2_fast.training.adapter_lists import find_encoder, read_adapters

_KEY = "PTV2_FAST_API_KEY"
_LOCAL = ("127.0.0.1", "::1", "localhost")


def add(commands: Any) -> None:
    """Add the command."""
    serve = add_command(
        commands, "serve", _serve, "serve adapters on one encoder over HTTP",
        epilog=f"With {_KEY} in the environment, requests must bring that key "
        "(Authorization: Bearer ...).",
    )  # fmt: skip
    serve.add_argument("--model", help="the encoder; default: the one that the runs name")
    serve.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=FOLDER",
        help="a run of p-tuning-v2, and the name by which requests ask for it; may be repeated",
    )  # fmt: skip
    serve.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0 = any")
    group = serve.add_argument_group("limits")
    for name, kind, default, text in (
        ("max-batch-tokens", int, 16384, "tokens that run together, padding included"),
        ("max-wait-ms", float, 5.0, "milliseconds that a text waits for others to run with"),
        ("max-queue", int, 1024, "texts that are taken and not answered yet; others get 429"),
        ("max-client-batch", int, 64, "texts of a request"),
        ("max-body-bytes", int, 2_000_000, "bytes of a request"),
    ):
        shown = (
            f"{text} (default: {default:g})" if kind is float else f"{text} (default: {default})"
        )
        group.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=shown)
    group = serve.add_argument_group("loading and unloading while it runs")
    group.add_argument(
        "--allow-adapter-updates", action="store_true",
        help="serve /v1/adapters/load and /v1/adapters/unload; needs --adapter-root",
    )  # fmt: skip
    group.add_argument("--adapter-root", help="folder under which adapters may be loaded from")


def _serve(options: dict[str, Any]) -> None:
    adapters = checked(read_adapters, options["adapter"])
    if options["allow_adapter_updates"] != (options["adapter_root"] is not None):
        raise BadInput("adapter_root: expected together with --allow-adapter-updates")
    if not adapters and not options["allow_adapter_updates"]:
        raise BadInput("adapter: expected at least one, or --allow-adapter-updates")
    model = checked(find_encoder, adapters, options["model"])
    if not 0 <= options["port"] < 65536:
        raise BadInput(f"port: expected a number below 65536, got {options['port']}")
    from ptv2_fast.serving.options import ServeOptions

    names = ("max_batch_tokens", "max_wait_ms", "max_queue", "max_client_batch", "max_body_bytes")
    root = options["adapter_root"]
    limits = checked(
        ServeOptions,
        **{name: options[name] for name in names},
        adapter_root=None if root is None else Path(root),
        api_key=os.environ.get(_KEY),
    )
    # oneDNN keeps 1024 kernels, each for one number of tokens, and nearly each batch has another.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    quieten()
    # Of scripts without blanks, for each text that comes.
    warnings.filterwarnings("ignore", message="typed text")
    from ptv2_fast.serving.application import make_app
    from ptv2_fast.serving.engine import BankEngine
    from ptv2_fast.serving.server import run
    from ptv2_fast.training.bank import AdapterBank
    from ptv2_fast.training.pretrained import load_encoder

    bank = checked(AdapterBank, checked(load_encoder, model))
    engine = BankEngine(bank, model, limits.max_batch_tokens)
    for name, folder in adapters.items():
        checked(engine.load, name, folder)
    if limits.api_key is None and options["host"] not in _LOCAL:
        print(f"note: anyone who reaches {options['host']} is served; {_KEY} sets a key",
              file=sys.stderr)  # fmt: skip
    run(make_app(engine, limits), options["host"], options["port"])
