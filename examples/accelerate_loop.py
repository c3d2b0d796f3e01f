"""A training loop of one's own with accelerate: mixed precision, several devices, accumulation.

accelerate launch examples/accelerate_loop.py --model roberta-base --output adapter

Without arguments a tiny random model trains in this process.
"""

import argparse

import torch
from accelerate import Accelerator
from tiny import open_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from ptv2_fast import PTuningV2Config, attach, save_adapter

SENTENCES = [("the film was good .", 1), ("it was bad .", 0), ("a good film .", 1)] * 4


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder or a name on the hub")
    parser.add_argument("--output", default="runs/example-accelerate")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args(arguments)

    model, tokenizer = open_model(options.model, AutoModelForSequenceClassification, num_labels=2)
    attach(model, PTuningV2Config(num_virtual_tokens=8, recompute="ffn+qkv"))

    def collate(rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([label for _, label in rows])}

    loader = DataLoader(SENTENCES, batch_size=4, shuffle=True, collate_fn=collate)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(options.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    if accelerator.is_main_process:
        save_adapter(accelerator.unwrap_model(model), options.output)


if __name__ == "__main__":
    main()
