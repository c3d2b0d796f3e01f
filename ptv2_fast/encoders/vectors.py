"""What trains of the prefixed layers beside the prefix: biases and norms (BitFit, Ben Zaken et al.
2022), and low-rank updates of matrices (LoRA, Hu et al. 2022).

The backbone stays as it is. Float32 copies of what trains lie with the prefix, in modules that
stand in for the backbone's: frozen blocks read them (frozen/vectors.py), and where the layers run
as transformers runs them, the forward of the backbone's modules does.
"""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ptv2_fast.encoders.family import Family
from ptv2_fast.frozen.vectors import StandIns
from ptv2_fast.frozen.weights import is_plain
from ptv2_fast.prefix import PrefixEncoder, PTuningV2Config

if TYPE_CHECKING:
    from ptv2_fast.encoders.attachment import Attachment

VECTORS_NAME = "vectors"  # in the prefix encoder
# Field of the configuration -> the modules that it needs, for messages.
_KINDS = {
    "train_biases": "linear layers with biases",
    "train_norms": "norms with weights",
    "low_rank": "linear layers of the names in low_rank_targets",
}


class TrainedModule(NamedTuple):
    """A module of an encoder layer whose vectors train.

    Args:
        layer: its index.
        path: of the module in it.
        module: a linear layer or a norm.
        fields: of the configuration, that say what of it trains.
    """

    layer: int
    path: str
    module: nn.Module
    fields: tuple[str, ...]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that others stand in for, by name."""
        own = {name: p for name, p in self.module.named_parameters(recurse=False)}
        if "train_norms" in self.fields:
            return own
        return {"bias": own["bias"]} if "train_biases" in self.fields else {}

    def count(self, rank: int | None) -> int:
        """Numbers that train, with low-rank updates of this rank."""
        count = sum(parameter.numel() for parameter in self.parameters.values())
        if rank is not None and "low_rank" in self.fields:
            count += rank * sum(cast(Tensor, self.module.weight).shape)
        return count


def find_vectors(
    backbone: nn.Module,
    family: Family,
    config: PTuningV2Config,
    trained: frozenset[int] = frozenset(),
) -> list[TrainedModule]:
    """The modules whose biases or norms train, or an update of whose matrix.

    DeBERTa's queries, keys and values stay as they are: its tables of positions are made of them.

    Args:
        backbone: the model without its head.
        family: its row in the table of families.
        config: of the prefix.
        trained: identities of parameters that train themselves (`modules_to_save`).

    Raises:
        ValueError: naming the field, where nothing would train, or something that cannot.
    """
    wanted = [field for field in _KINDS if getattr(config, field)]
    if not wanted:
        return []
    name, layers = type(backbone).__name__, family.layer_modules(backbone)
    if len(set(layers)) < len(layers):
        raise ValueError(f"{wanted[0]}: expected layers that share no weights, got those of {name}")
    has_tables = family.relative_positions(backbone) is not None
    modules: list[TrainedModule] = []
    for index in config.resolve_layers(len(layers)):
        for path, module in layers[index].named_modules():
            names = [
                key
                for key, parameter in module.named_parameters(recurse=False)
                if id(parameter) not in trained
            ]
            in_tables = has_tables and f"{path}.".startswith(f"{family.attention}.")
            fields = tuple(
                field
                for field in wanted
                if _serves(field, module, path, names, config)
                and (field == "train_norms" or not in_tables)
            )
            for field in fields:
                _check(module, names, field, f"{path} of layer {index}")
            if fields:
                modules.append(TrainedModule(index, path, module, fields))
    for field in wanted:
        if not any(field in each.fields for each in modules):
            raise ValueError(
                f"{field}: expected {_KINDS[field]} in the prefixed layers, got a {name} without"
            )
    updated = [each.path for each in modules if "low_rank" in each.fields]
    for target in config.low_rank_targets or ():
        if not any(_is_called(path, target) for path in updated):
            raise ValueError(
                f"low_rank_targets: expected names of linear layers of a {name}, got {target!r}; "
                f"updated are {sorted(set(updated))!r:.200}"
            )
    return modules


def _serves(
    field: str, module: nn.Module, path: str, names: list[str], config: PTuningV2Config
) -> bool:
    """Whether a field of the configuration asks for a module, which has parameters `names`."""
    if field == "train_norms":
        return _is_norm(module) and bool(names)
    if field == "train_biases":
        return not _is_norm(module) and any("bias" in name for name in names)
    if not isinstance(module, nn.Linear) or "weight" not in names:
        return False
    targets = config.low_rank_targets
    return targets is None or any(_is_called(path, name) for name in targets)


def _is_called(path: str, name: str) -> bool:
    """Whether a name is that of a module, or the end of it."""
    return f".{path}".endswith(f".{name}")


def _is_norm(module: nn.Module) -> bool:
    """By its name, as those of transformers have no class in common."""
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def _check(module: nn.Module, names: list[str], field: str, place: str) -> None:
    kind = type(module)
    if field == "low_rank" and not is_plain(module):
        raise ValueError(
            f"low_rank: expected plain linear layers, got a {kind.__module__}.{kind.__qualname__}, "
            f"{place}"
        )
    biases = [name for name in names if "bias" in name]
    if field == "train_biases" and (not is_plain(module) or biases != ["bias"]):
        raise ValueError(
            f"{field}: expected biases of plain linear layers, got {', '.join(biases)} of "
            f"{kind.__module__}.{kind.__qualname__}, {place}"
        )
    if "forward" in vars(module):
        raise ValueError(
            f"{field}: expected modules with their own forward, got one that was replaced by "
            f"something else, {place}"
        )


class StandInForward:
    """Takes the place of the forward of a linear layer or a norm whose vectors train.

    Args:
        module: of the backbone.
        stand_in: has the vectors.
        attachment: of the model; while it is disabled the module's own vectors hold.
    """

    def __init__(self, module: nn.Module, stand_in: nn.Module, attachment: "Attachment") -> None:
        self.module, self.stand_in = module, stand_in
        self.attachment: Attachment | None = attachment

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's own, in the dtype of its own."""
        module, stand_in = self.module, cast(Any, self.stand_in)
        if self.attachment is None or not self.attachment.enabled:
            return type(module).forward(module, input, *args, **kwargs)
        if isinstance(module, nn.Linear):
            bias = getattr(stand_in, "bias", module.bias)
            bias = None if bias is None else bias.to(module.weight.dtype)
            out = nn.functional.linear(input, module.weight, bias)
            if not hasattr(stand_in, "lora_A"):
                return out
            down, up = stand_in.lora_A.to(out.dtype), stand_in.lora_B.to(out.dtype)
            narrow = nn.functional.linear(input.to(out.dtype), down)
            return out + stand_in.scale * nn.functional.linear(narrow, up)
        weight: Any = module.weight
        if isinstance(module, nn.LayerNorm):  # which GPUs compute in one dtype only
            bias = None if stand_in.bias is None else stand_in.bias.to(weight.dtype)
            shape, scale = module.normalized_shape, stand_in.weight.to(weight.dtype)
            return nn.functional.layer_norm(input, shape, scale, bias, module.eps)
        out = type(module).forward(stand_in, input, *args, **kwargs)
        return out.to(torch.promote_types(input.dtype, weight.dtype))


class TrainedVectors:
    """The vectors of one model that train.

    Args:
        encoder: gets copies of them, named `vectors.<layer>.<path>`.
        modules: of the backbone, that have them.
        layers: of the backbone.

    Attributes:
        stand_ins: module of the backbone -> the one whose vectors hold instead of its own.
    """

    def __init__(
        self, encoder: PrefixEncoder, modules: list[TrainedModule], layers: list[nn.Module]
    ) -> None:
        self.stand_ins = {each.module: _stand_in(each, encoder.config) for each in modules}
        self._forwards: list[StandInForward] = []
        self._trained, self._layers = modules, layers
        # Every module on the way from a layer to one of them: (around it, its name there, itself).
        self._places: list[tuple[nn.Module, str, nn.Module]] = []
        for each in modules:
            around, parent = layers[each.layer], cast(Any, encoder)
            for name in (VECTORS_NAME, str(each.layer), *each.path.split(".")[:-1]):
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent._modules[name]
            parent.add_module(each.path.rpartition(".")[2], self.stand_ins[each.module])
            for name in each.path.split("."):
                inside = cast(nn.Module, around._modules[name])
                self._places.append((around, name, inside))
                around = inside
        self._places = list(dict.fromkeys(self._places))

    def install(self, attachment: "Attachment") -> None:
        """Take over the forwards of the backbone's modules."""
        for module, stand_in in self.stand_ins.items():
            forward = StandInForward(module, stand_in, attachment)
            module.forward = forward  # type: ignore[assignment]
            self._forwards.append(forward)

    def undo(self) -> None:
        """Give the forwards back, also under the wrappers of someone else."""
        for forward in self._forwards:
            forward.attachment = None
            if vars(forward.module).get("forward") is forward:
                del forward.module.forward

    @property
    def layers_inside(self) -> set[int]:
        """The numbers of the layers that have some."""
        return {each.layer for each in self._trained}

    def on(self, layers: Sequence[nn.Module]) -> StandIns:
        """`stand_ins` of the same modules in other layers of the same form."""
        return {
            layers[each.layer].get_submodule(each.path): self.stand_ins[each.module]
            for each in self._trained
        }

    def check(self) -> None:
        """Check, in front of a forward, that the modules are still in the layers.

        Raises:
            ValueError: when one was replaced and not wrapped: its trained vectors had no effect.
        """
        if all(around._modules.get(name) is inside for around, name, inside in self._places):
            return
        for each in self._trained:
            if not any(module is each.module for module in self._layers[each.layer].modules()):
                raise ValueError(
                    f"model: expected the {each.path} of layer {each.layer} that was attached, "
                    "since something of it trains, got another one; attach after replacing it"
                )


def _stand_in(trained: TrainedModule, config: PTuningV2Config) -> nn.Module:
    is_norm = "train_norms" in trained.fields
    stand_in: Any = copy.deepcopy(trained.module) if is_norm else nn.Module()
    for name, parameter in trained.parameters.items():
        wide = torch.promote_types(parameter.dtype, torch.float32)
        setattr(stand_in, name, nn.Parameter(parameter.detach().to(wide, copy=True)))
    if "low_rank" in trained.fields:
        weight, rank = cast(Tensor, trained.module.weight), cast(int, config.low_rank)
        wide = torch.promote_types(weight.dtype, torch.float32)
        out, width = weight.shape
        stand_in.lora_A = nn.Parameter(weight.new_empty(rank, width, dtype=wide))
        stand_in.lora_B = nn.Parameter(weight.new_zeros(out, rank, dtype=wide))
        nn.init.kaiming_uniform_(stand_in.lora_A, a=math.sqrt(5))  # as PEFT does
        stand_in.scale = cast(float, config.alpha) / rank
    return stand_in
