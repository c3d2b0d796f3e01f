"""Text classification with transformers' Trainer: the prefix and the head train, nothing else.

python examples/trainer.py --model bert-base-cased --train-file train.csv --output adapter

The CSV file has the columns text and label (an integer). Without arguments a tiny random model
trains on two sentences.
"""

import argparse

import datasets
from tiny import open_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from ptv2_fast import PTuningV2Config, attach, load_adapter, print_trainable_parameters

SENTENCES = {"text": ["the film was good .", "the film was bad ."] * 8, "label": [1, 0] * 8}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder or a name on the hub")
    parser.add_argument("--train-file", help="a CSV file")
    parser.add_argument("--output", default="runs/example-trainer")
    options = parser.parse_args(arguments)

    data = datasets.Dataset.from_dict(SENTENCES)
    if options.train_file:
        data = datasets.load_dataset("csv", data_files=options.train_file, split="train")
    labels = max(data["label"]) + 1
    model, tokenizer = open_model(
        options.model, AutoModelForSequenceClassification, num_labels=labels
    )
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)

    attach(model, PTuningV2Config(num_virtual_tokens=16, prefix_dropout=0.1))
    print_trainable_parameters(model)
    training = TrainingArguments(
        options.output, num_train_epochs=2, learning_rate=1e-2, save_strategy="no", report_to=[]
    )
    Trainer(model, training, train_dataset=data, processing_class=tokenizer).train()
    model.save_pretrained(options.output)  # the adapter: prefix and head

    fresh, _ = open_model(options.model, AutoModelForSequenceClassification, num_labels=labels)
    load_adapter(fresh, options.output)
    print("the adapter is in", options.output)


if __name__ == "__main__":
    main()
