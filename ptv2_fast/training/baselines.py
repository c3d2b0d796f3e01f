"""What P-Tuning v2 is compared with: fine-tuning, a linear probe, shallow prompts and LoRA."""

import functools
import inspect
import os
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptv2_fast.encoders.families import find_family
from ptv2_fast.training.options import ModelOptions
from ptv2_fast.training.output import write_bytes

PROMPT = "prompt"  # the module that gives the vectors in front of the input
LORA = ".lora_"  # in the names of LoRA's parameters
_INIT_STD = 0.02
# Backbones that leave scale, positions or norm of embeddings out where they get vectors.
_WITHOUT_PROMPTS = ("esm",)


def fine_tuning(model: PreTrainedModel, options: ModelOptions, init_ids: Tensor | None) -> None:
    """Train every parameter."""
    model.requires_grad_(True)


def linear_probe(model: PreTrainedModel, options: ModelOptions, init_ids: Tensor | None) -> None:
    """Train what lies outside the embeddings and the encoder layers: the head, and a pooler.

    That is also what P-Tuning v2 trains beside its prefix.
    """
    _freeze_backbone(model)


def prompt_tuning(model: PreTrainedModel, options: ModelOptions, init_ids: Tensor | None) -> None:
    """Shallow prompt tuning (Lester et al. 2021): P trained vectors in front of the input.

    They stand beside the word embeddings of the tokens, before positions, types and LayerNorm, at
    positions 0 to P - 1. Outputs are cut back to the tokens, so that heads and labels do not see
    them. The head trains as in `linear_probe`.

    Raises:
        ValueError: for a backbone that takes vectors in another way than token ids.
    """
    embeddings = cast(nn.Module, model.get_input_embeddings())
    weight = cast(Tensor, embeddings.weight)  # [vocabulary, hidden]
    if init_ids is None:
        values = torch.randn(options.num_virtual_tokens, weight.shape[1]) * _INIT_STD
    else:  # by the module, since some scale what is in the table
        values = embeddings(init_ids.to(weight.device)).detach().clone()
    prompt = nn.Embedding.from_pretrained(values.to(weight.device, torch.float32), freeze=False)
    add_prompt(model, prompt, len(values))


def p_tuning_v1(model: PreTrainedModel, options: ModelOptions, init_ids: Tensor | None) -> None:
    """P-tuning (Liu et al. 2021): as `prompt_tuning`, with vectors that a small network computes.

    That is PEFT's PromptEncoder: P embeddings through a bidirectional LSTM of two layers and an
    MLP, or through an MLP of three layers alone. The prompt stands in front of the input as a whole
    (the paper also puts parts of it inside a template) and the backbone is frozen, as in the
    comparison of P-Tuning v2's paper. init="tokens" sets the P embeddings; else they start as
    PEFT's. A finished run keeps the vectors only.

    Raises:
        ValueError: when PEFT is not installed, and as `prompt_tuning`.
    """
    peft = _import_peft(options.method)
    weight = cast(Tensor, model.get_input_embeddings().weight)  # [vocabulary, hidden]
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=options.num_virtual_tokens,
        token_dim=weight.shape[1],
        num_transformer_submodules=1,
        encoder_reparameterization_type=options.prompt_encoder.upper(),
        encoder_hidden_size=options.encoder_hidden_size or weight.shape[1],
    )
    prompt = peft.PromptEncoder(config).to(weight.device)
    if init_ids is not None:
        prompt.embedding.weight.data.copy_(weight[init_ids.to(weight.device)])
    add_prompt(model, prompt, options.num_virtual_tokens)


def lora(model: PreTrainedModel, options: ModelOptions, init_ids: Tensor | None) -> None:
    """LoRA (Hu et al. 2022) on the queries and values of every layer, by PEFT, in place.

    The head trains as in `linear_probe`.

    Raises:
        ValueError: when PEFT is not installed, or for a model of no known family.
    """
    family = find_family(model.config)
    peft = _import_peft(options.method)
    layers = set(family.layer_modules(model.base_model))
    attentions = [
        f"{name}.{family.attention}" for name, module in model.named_modules() if module in layers
    ]
    config = peft.LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=[f"{a}.{part}" for a in attentions for part in (family.query, family.value)],
    )
    peft.inject_adapter_in_model(config, model)
    _freeze_backbone(model)


def _import_peft(method: str) -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError(
            f"method: {method!r} needs the package peft (pip install 'ptv2-fast[baselines]')"
        ) from None
    return peft


def add_prompt(model: PreTrainedModel, prompt: nn.Module, length: int) -> None:
    """Put the vectors of a module in front of the input, and train it and the head.

    Args:
        model: with its head.
        prompt: takes indices [P] and gives vectors [P, hidden].
        length: P.

    Raises:
        ValueError: for a backbone that takes vectors in another way than token ids.
    """
    if model.config.model_type in _WITHOUT_PROMPTS:
        raise ValueError(
            "method: expected one without a prompt in front of the input for the model_type "
            f"{model.config.model_type!r}, which embeds token ids in another way than vectors"
        )
    model.add_module(PROMPT, prompt)
    _freeze_backbone(model)
    _InputPrompt(model, length)


class _InputPrompt:
    """The hooks of a backbone whose inputs begin with the model's prompt.

    Args:
        model: with a module under the name PROMPT that takes indices [P] and gives vectors
            [P, hidden].
        length: P.
    """

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        self.model, self.length = model, length
        backbone = model.base_model
        self.argument_names = tuple(inspect.signature(backbone.forward).parameters)
        backbone.register_forward_pre_hook(self.prepend, with_kwargs=True)
        backbone.register_forward_hook(self.cut_back)

    def prepend(
        self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Embed the ids and put the prompt in front; widen the mask and the types."""
        # zip is not strict: positional arguments are the first of the names.
        arguments = {**dict(zip(self.argument_names, args, strict=False)), **kwargs}
        input_ids = arguments.pop("input_ids")
        words = self.model.get_input_embeddings()(input_ids)  # [B, T, hidden]
        batch, length = len(words), self.length
        vectors = self.model.get_submodule(PROMPT)(torch.arange(length, device=words.device))
        prompt = vectors.to(words.dtype).expand(batch, -1, -1)
        arguments["inputs_embeds"] = torch.cat((prompt, words), dim=1)
        mask = arguments.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        arguments["attention_mask"] = nn.functional.pad(mask, (length, 0), value=1)
        if arguments.get("token_type_ids") is not None:
            arguments["token_type_ids"] = nn.functional.pad(
                arguments["token_type_ids"], (length, 0)
            )
        return (), arguments

    def cut_back(self, backbone: nn.Module, args: tuple, output: Any) -> Any:
        """Drop the prompt's rows, and pool the first token instead of the first prompt vector."""
        output.last_hidden_state = output.last_hidden_state[:, self.length :]
        pooler: Any = getattr(backbone, "pooler", None)
        if isinstance(pooler, nn.Linear):  # ALBERT's
            pooled = pooler(output.last_hidden_state[:, 0])
            output.pooler_output = backbone.pooler_activation(pooled)  # type: ignore[operator]
        elif pooler is not None:
            output.pooler_output = pooler(output.last_hidden_state)
        return output


def _freeze_backbone(model: PreTrainedModel) -> None:
    """Freeze embeddings and encoder layers, and let checkpoints hold the rest only.

    The rest is the head, a pooler, and what a method has added to the model before.
    """
    model.requires_grad_(True)
    for name, parameter in model.base_model.named_parameters():
        if not name.startswith("pooler.") and LORA not in name:
            parameter.requires_grad_(False)
    # Trainer is content when a checkpoint lacks exactly these.
    trained = trained_tensors(model)
    model._keys_to_ignore_on_save = set(model.state_dict()) - set(trained)
    model.save_pretrained = functools.partial(_save_checkpoint, model)  # type: ignore[method-assign]


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def final_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What remains of the trained tensors: of a prompt the vectors, not the network behind them."""
    tensors = trained_tensors(model)
    if not hasattr(model, PROMPT):
        return tensors
    prompt = model.get_submodule(PROMPT)
    table = next(prompt.parameters())  # with one row for each vector, in every kind of prompt
    vectors = prompt(torch.arange(len(table), device=table.device))
    rest = {name: t for name, t in tensors.items() if not name.startswith(f"{PROMPT}.")}
    return rest | {f"{PROMPT}.weight": vectors}


def _save_checkpoint(
    model: PreTrainedModel, save_directory: str | os.PathLike, **unused: object
) -> None:
    """Stands in for `save_pretrained`: the trained tensors under the name Trainer reloads.

    No config.json, so that `from_pretrained` refuses the folder instead of filling the backbone at
    random.
    """
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", trained_tensors(model))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name that then replaces the old one."""
    contents = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contents, {"format": "pt"}))
