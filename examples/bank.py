"""Many adapters on one encoder: each text of a batch is read by another one, in one pass.

python examples/bank.py --model bert-base-cased --adapter ner=runs/ner --adapter rte=runs/rte

Without arguments two random adapters of a tiny random model are made first.
"""

import argparse
from pathlib import Path

from tiny import open_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ptv2_fast import AdapterBank, PTuningV2Config, attach

TEXTS = ["anna lives in oslo .", "it was good .", "bob works .", "the film was bad ."]


def make_adapters(encoder: Path, folder: Path) -> dict[str, str]:
    """A classifier and a tagger with prefixes of unequal length, untrained; name -> folder."""
    kinds = {
        "sentiment": AutoModelForSequenceClassification,
        "ner": AutoModelForTokenClassification,
    }
    for length, (name, auto_class) in enumerate(kinds.items(), start=4):
        model = auto_class.from_pretrained(encoder, num_labels=2 + length % 4)
        attach(model, PTuningV2Config(num_virtual_tokens=length)).save_pretrained(folder / name)
    return {name: str(folder / name) for name in kinds}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="the encoder, a folder or a name on the hub")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--output", default="runs/example-bank", type=Path)
    options = parser.parse_args(arguments)

    encoder, tokenizer = open_model(options.model, AutoModel)
    adapters = dict(each.split("=", 1) for each in options.adapter)
    if not adapters:
        encoder.save_pretrained(options.output / "encoder")
        adapters = make_adapters(options.output / "encoder", options.output)
    bank = AdapterBank(encoder)
    for name, folder in adapters.items():
        bank.load(name, folder)
    names = [list(adapters)[row % len(adapters)] for row in range(len(TEXTS))]
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    results = bank(**batch, adapter_names=names)
    for text, name, result in zip(TEXTS, names, results, strict=True):
        print(f"{text:24} {name:10} logits {tuple(result.shape)}")


if __name__ == "__main__":
    main()
