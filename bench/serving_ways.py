"""Ways to answer requests for many adapters of one encoder, each a function of the same batch."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.memory_model import LORA_RANK
from bench.models import MODELS, classifier, ours
from ptv2_fast import AdapterBank
from ptv2_fast.encoders.families import find_family

# Fine-tuned models beyond so many take turns on these: their time does not depend on the number,
# their bytes are computed.
MOST_MODELS = 8
INSIDE = {"train_biases": True, "train_norms": True, "low_rank": LORA_RANK}

Answer = Callable[[], Tensor]  # logits [B, 2], in the order of the batch


class Requests:
    """A batch of texts, and the adapter that each asks for.

    Args:
        case: model, number of texts and their lengths.
        adapters: how many; text i asks for adapter i modulo this.
    """

    def __init__(self, case: Case, adapters: int) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor(case.sequence_lengths())
        lengths = lengths[torch.randperm(case.batch, generator=generator)]
        shape, words = (case.batch, int(lengths.max())), min(30000, MODELS[case.model].vocab_size)
        self.input_ids = torch.randint(5, words, shape, generator=generator)
        self.attention_mask = (torch.arange(shape[1]) < lengths[:, None]).long()
        self.adapters = [index % adapters for index in range(case.batch)]

    def of(self, rows: list[int]) -> dict[str, Tensor]:
        """Some rows, padded to the longest of them."""
        mask = self.attention_mask[rows]
        longest = int(mask.sum(1).max())
        return {
            "input_ids": self.input_ids[rows, :longest],
            "attention_mask": mask[:, :longest],
        }

    def by_adapter(self) -> dict[int, list[int]]:
        """The rows of each adapter."""
        found: dict[int, list[int]] = {}
        for row, adapter in enumerate(self.adapters):
            found.setdefault(adapter, []).append(row)
        return found

    def each(self, run: Callable[[int, dict[str, Tensor]], Tensor]) -> Tensor:
        """The logits of all rows, one pass for each adapter."""
        out = torch.empty(len(self.adapters), 2, dtype=torch.get_default_dtype())
        for adapter, rows in self.by_adapter().items():
            out[rows] = run(adapter, self.of(rows)).to(out.dtype)
        return out


def _attached(case: Case, double: bool, **more: Any) -> nn.Module:
    model = ours(case, inference_mode=True, **more).eval()
    return model.double() if double else model


def _draw(model: nn.Module, adapter: int) -> dict[str, Tensor]:
    """Fill in the prefix and the head of an adapter, random; returns them by name.

    What is drawn is float32, whatever the model's dtype.
    """
    generator = torch.Generator().manual_seed(adapter)
    family = find_family(model.config)
    frozen = tuple(f"{model.base_model_prefix}.{part}." for part in family.frozen)
    tensors = {}
    for name, parameter in model.named_parameters():
        if not name.startswith(frozen):
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values)
            tensors[name] = parameter.detach().clone()
    return tensors


def bank(
    case: Case, adapters: int, requests: Requests, double: bool = False, **more: Any
) -> Answer:
    """One pass for all rows; `more`: fields of the prefix's configuration."""
    model = _attached(case, double, **more)
    plain = classifier(case, "sdpa").to(model.dtype)
    shared = AdapterBank(plain)
    for adapter in range(adapters):
        _draw(model, adapter)
        shared.add(str(adapter), model)
    names = [str(adapter) for adapter in requests.adapters]
    inputs = requests.of(list(range(len(names))))
    return lambda: torch.stack(shared(**inputs, adapter_names=names))


def bank_inside(case: Case, adapters: int, requests: Requests) -> Answer:
    """The bank with adapters that hold biases, norms and low-rank updates too, as presets' do."""
    return bank(case, adapters, requests, **INSIDE)


def switching(
    case: Case, adapters: int, requests: Requests, double: bool = False, **more: Any
) -> Answer:
    """One attached model, into which the tensors of the next adapter are copied before its pass."""
    model = _attached(case, double, **more)
    kept = [_draw(model, adapter) for adapter in range(adapters)]
    parameters = dict(model.named_parameters())

    def run(adapter: int, inputs: dict[str, Tensor]) -> Tensor:
        for name, tensor in kept[adapter].items():
            parameters[name].data.copy_(tensor)
        return model(**inputs).logits

    return lambda: requests.each(run)


def models(case: Case, adapters: int, requests: Requests) -> Answer:
    """A fine-tuned model for each adapter; of more than MOST_MODELS some stand for the others."""
    plain = classifier(case, "sdpa").to(case.torch_dtype).eval()
    copies = [copy.deepcopy(plain) for _ in range(min(adapters, MOST_MODELS))]
    return lambda: requests.each(lambda i, inputs: copies[i % len(copies)](**inputs).logits)


def peft_lora(case: Case, adapters: int, requests: Requests) -> Answer:
    """LoRA with `adapter_names`, all rows in one pass; one head, which all adapters share."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, target_modules="all-linear")
    model = get_peft_model(classifier(case, "sdpa"), config, adapter_name="0")
    for adapter in range(1, adapters):
        model.add_adapter(str(adapter), config)
    model = model.to(case.torch_dtype).eval()
    names = [str(adapter) for adapter in requests.adapters]
    inputs = requests.of(list(range(len(names))))
    return lambda: model(**inputs, adapter_names=names).logits


def encoder_alone(case: Case, adapters: int, requests: Requests) -> Answer:
    """One plain model for all rows: what memory is compared with."""
    plain = classifier(case, "sdpa").to(case.torch_dtype).eval()
    inputs = requests.of(list(range(len(requests.adapters))))
    return lambda: plain(**inputs).logits


WAYS: dict[str, Callable[[Case, int, Requests], Answer]] = {
    "bank": bank,
    f"bank, biases, norms and LoRA r{LORA_RANK} beside the prefix": bank_inside,
    "one attached model, a pass for each adapter": switching,
    "fine-tuned models, a pass for each": models,
    "LoRA r8, peft adapter_names": peft_lora,
    "encoder alone": encoder_alone,
}
