"""Tags words from a CSV file with one word a row: train, open what was trained, tag a sentence.

python examples/tag_csv.py --model bert-base-cased --train-file words.csv --text "Bob lives here."

Its columns are sentence_id, tokens and ner_tags. Without arguments a tiny random model trains on
a few rows; the same as a command is `ptv2-fast train --task token-classification ...`.
"""

import argparse
import csv
from pathlib import Path

from tiny import open_model
from transformers import AutoModel, pipeline

import ptv2_fast
from ptv2_fast import cli

WORDS = ("anna lives in oslo .", "bob works in berlin .")
TAGS = ("B-PER O O B-LOC O", "B-PER O O B-LOC O")


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("sentence_id", "tokens", "ner_tags"))
        for number in range(8):
            words, tags = WORDS[number % 2].split(), TAGS[number % 2].split()
            rows.writerows((number, *pair) for pair in zip(words, tags, strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder or a name on the hub")
    parser.add_argument("--train-file", help="a CSV file")
    parser.add_argument("--text", default=WORDS[0])
    parser.add_argument("--output", default="runs/example-tagger", type=Path)
    options = parser.parse_args(arguments)

    model, data = options.model, options.train_file
    options.output.mkdir(parents=True, exist_ok=True)
    if model is None:
        model = str(options.output / "encoder")
        for part in open_model(None, AutoModel):
            part.save_pretrained(model)
    if data is None:
        data = str(options.output / "words.csv")
        write_csv(Path(data))
    command = f"train --task token-classification --num-virtual-tokens 8 --learning-rate 0.03 \
        --num-train-epochs 5 --batch-size 4 --overwrite --output {options.output / 'run'}"
    files = ["--model", model, "--train-file", data, "--validation-file", data]
    if cli.main([*command.split(), *files]) == 0:
        tagger, tokenizer, labels = ptv2_fast.load(options.output / "run")
        print("labels:", labels)
        print(pipeline("token-classification", tagger, tokenizer=tokenizer)(options.text))


if __name__ == "__main__":
    main()
