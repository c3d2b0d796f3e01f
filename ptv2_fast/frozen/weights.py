"""The frozen weights of an encoder block, in the dtype and the form its products want."""

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ptv2_fast.frozen.called_linears import CalledLinears
from ptv2_fast.frozen.linear import linear
from ptv2_fast.frozen.low_rank import LowRankUpdate
from ptv2_fast.frozen.modules import BiasSource, BlockModules, Norm, read_norm
from ptv2_fast.frozen.vectors import LAYERS, BlockVectors, norm_with
from ptv2_fast.ops.layout import widened

_SHARING_DEVICES = ("cpu", "cuda", "xpu")  # whose memory torch takes from others


class FrozenLinear:
    """A linear layer without a gradient of its own.

    Args:
        weight: [out, in] in the dtype of the products.
        bias: [out], any dtype.
        update: of the weight, in its dtype.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, update: LowRankUpdate | None = None
    ) -> None:
        self.weight, self.update = weight, update
        self.bias = None if bias is None else widened(bias)  # for what is fused with the bias
        self._bias = None if bias is None else bias.to(weight.dtype)

    def rows(self, first: int, last: int) -> "FrozenLinear":
        """The part that computes the outputs first to last - 1, sharing memory."""
        bias = None if self.bias is None else self.bias[first:last]
        update = None if self.update is None else self.update.rows(first, last)
        return FrozenLinear(self.weight[first:last], bias, update)

    def with_trained(self, bias: Tensor | None, update: LowRankUpdate | None) -> "FrozenLinear":
        """The same layer with another bias, if there is one, and an update, if there is one."""
        update = None if update is None else update.to(self.weight.dtype)
        return FrozenLinear(self.weight, self.bias if bias is None else bias, update)

    def biased(self, input: Tensor, chunk_index: int = 0) -> Tensor:
        """input @ weight^T + bias, [R, in] -> [R, out]; `chunk_index` is for `CalledLinears`."""
        return self._updated(linear(input, self.weight, self._bias), input)

    def unbiased(self, input: Tensor, chunk_index: int = 0) -> Tensor:
        """input @ weight^T, for a caller that fuses the bias with what follows."""
        return self._updated(linear(input, self.weight), input)

    def input_gradient(
        self, grad_out: Tensor, chunk_index: int = 0, narrow_gradient: Tensor | None = None
    ) -> Tensor:
        """grad_out @ weight, [R, out] -> [R, in]; the update's `narrow_gradient`, if at hand."""
        gradient = linear(grad_out, self.weight.t())
        if self.update is not None:
            if narrow_gradient is None:
                narrow_gradient = self.update.narrow_gradient(grad_out)
            self.update.add_input_gradient(gradient, narrow_gradient)
        return gradient

    def _updated(self, out: Tensor, input: Tensor) -> Tensor:
        if self.update is not None:
            self.update.add_output(out, input)
        return out


AnyLinear = FrozenLinear | CalledLinears


class BlockWeights:
    """The weights of a block, as they are now, for products in one dtype.

    Args:
        modules: of the block.
        dtype: of the products. Matrices that have it are used where they are.
        joined_inputs, joined_up: the weights of layers that share an input, in one matrix; None
            where these are no plain `nn.Linear`. Such layers are called.
    """

    def __init__(
        self,
        modules: BlockModules,
        dtype: torch.dtype,
        joined_inputs: Tensor | None,
        joined_up: Tensor | None,
    ) -> None:
        self.modules, self.spec, self.dtype = modules, modules.spec, dtype
        inputs = modules.inputs
        self.query_key_value = _joined(inputs, joined_inputs, dtype)
        if modules.input_biases is not None and isinstance(self.query_key_value, FrozenLinear):
            weight = self.query_key_value.weight
            self.query_key_value = FrozenLinear(weight, _biases_beside(modules, weight))
        self._split_inputs()
        self.attention_output = _frozen(modules.attention_output, dtype)
        self.up = _joined(modules.up, joined_up, dtype)
        self.down = _frozen(modules.down, dtype)
        subtract_mean, first_norm = modules.spec.subtract_mean, modules.first_norm
        self.first_norm = None if first_norm is None else read_norm(first_norm, subtract_mean)
        self.second_norm = read_norm(modules.second_norm, subtract_mean)
        self.head_norms = tuple(read_norm(norm, False) for norm in modules.head_norms)

    def _split_inputs(self) -> None:
        """The layers of queries alone, and of keys and values."""
        modules, inputs = self.modules, self.modules.inputs
        self.query: AnyLinear | None
        self.key_value: AnyLinear | None
        if isinstance(self.query_key_value, FrozenLinear) and not modules.spec.by_head:
            queries = modules.heads * modules.head_dim
            rows = queries + 2 * modules.key_value_heads * modules.head_dim
            self.query = self.query_key_value.rows(0, queries)
            self.key_value = self.query_key_value.rows(queries, rows)
        elif len(inputs) == 3:
            self.query, self.key_value = CalledLinears(inputs[:1]), CalledLinears(inputs[1:])
        else:  # all three for all rows: their weights are mixed, or the layer can only be called
            self.query = self.key_value = None

    def with_trained(
        self, vectors: BlockVectors, updates: Mapping[str, LowRankUpdate]
    ) -> "BlockWeights":
        """The weights with other biases, norms and updates, where there are any.

        These leave their graph.
        """
        values = BlockVectors(*(None if each is None else each.detach() for each in vectors))
        copied = copy.copy(self)
        for name in LAYERS:
            trained = getattr(values, name), updates.get(name)
            if trained != (None, None):  # whose layer is plain
                layer = cast(FrozenLinear, getattr(self, name))
                setattr(copied, name, layer.with_trained(*trained))
        copied._split_inputs()
        norm = (values.attention_norm_weight, values.attention_norm_beta)
        if self.spec.pre_norm:
            copied.second_norm = norm_with(self.second_norm, *norm)
        else:
            output_norm = (values.output_norm_weight, values.output_norm_beta)
            copied.second_norm = norm_with(self.second_norm, *output_norm)
            copied.first_norm = norm_with(cast(Norm, self.first_norm), *norm)
        copied.head_norms = tuple(
            norm_with(norm, weight, None)
            for norm, weight in zip(
                self.head_norms, (values.query_norm, values.key_norm), strict=False
            )
        )
        return copied

    def for_forward(self) -> "BlockWeights":
        """The weights for one forward: called layers leave their graph in a copy."""
        called = {
            name: part.for_forward()
            for name, part in vars(self).items()
            if isinstance(part, CalledLinears)
        }
        if not called:
            return self
        copied = copy.copy(self)
        vars(copied).update(called)
        return copied


class WeightReader:
    """Reads the `BlockWeights` of a block at each forward, whoever wrote them and however.

    The weights of layers that share an input become views of one matrix, so that their one product
    needs no memory; for products in another dtype than theirs all matrices are converted each time.
    """

    def __init__(self, modules: BlockModules) -> None:
        self._modules = modules
        self._inputs, self._up = _JoinedWeights(modules.inputs), _JoinedWeights(modules.up)

    def read(self, dtype: torch.dtype) -> BlockWeights:
        """The weights of now, for products in `dtype`."""
        # Parameters must not become inference tensors: they may be trained on afterwards.
        with torch.inference_mode(False), torch.no_grad():
            return BlockWeights(self._modules, dtype, self._inputs.join(), self._up.join())

    def separate(self) -> None:
        """Give the parameters that were joined memory of their own again."""
        self._inputs.separate()
        self._up.separate()


class _JoinedWeights:
    """The weights of linear layers that share an input, as views of one matrix."""

    def __init__(self, linears: tuple[nn.Linear, ...]) -> None:
        self._linears = linears
        self._joined: Tensor | None = None

    def join(self) -> Tensor | None:
        """[all outputs, in]; None when some layer is no plain one."""
        if not all(is_plain(linear) for linear in self._linears):
            return None
        weights = [linear.weight.detach() for linear in self._linears]
        if len(weights) == 1:
            return weights[0]
        sizes = [len(weight) for weight in weights]
        if self._joined is None or not _are_parts(weights, self._joined.split(sizes)):
            self._joined = torch.cat(weights)
            for linear, part in zip(self._linears, self._joined.split(sizes), strict=True):
                linear.weight.data = _with_own_storage(part)
        return self._joined

    def separate(self) -> None:
        if self._joined is not None:
            for linear in self._linears:
                linear.weight.data = linear.weight.data.clone()
            self._joined = None

    def __getstate__(self) -> dict:
        return {"_linears": self._linears, "_joined": None}


def _are_parts(weights: list[Tensor], parts: tuple[Tensor, ...]) -> bool:
    def place(tensor: Tensor) -> tuple:
        return tensor.data_ptr(), tensor.dtype, tensor.stride()

    return [place(weight) for weight in weights] == [place(part) for part in parts]


def _with_own_storage(view: Tensor) -> Tensor:
    """The same memory as a storage that holds no more than this view.

    Whoever saves a model tells tensors that are one by their storages (safetensors, accelerate),
    or writes the storage whole (torch.save).
    """
    return torch.from_dlpack(view) if view.device.type in _SHARING_DEVICES else view


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer is its weight and bias and no more."""
    return type(linear) is nn.Linear


def _joined(linears: tuple[nn.Linear, ...], joined: Tensor | None, dtype: torch.dtype) -> AnyLinear:
    if joined is None:
        return CalledLinears(linears)
    return FrozenLinear(joined.to(dtype), _join_biases(linears))


def _frozen(linear: nn.Linear, dtype: torch.dtype) -> AnyLinear:
    is_called = not is_plain(linear)
    return _joined((linear,), None if is_called else linear.weight.detach(), dtype)


def _biases_beside(modules: BlockModules, weight: Tensor) -> Tensor:
    """The biases that lie beside a layer of this weight, in the order of its rows, [out]."""
    beside = cast(BiasSource, modules.input_biases)
    zeros = weight.new_zeros(modules.heads * modules.head_dim)
    each = [
        zeros if name is None else getattr(beside.module, name).detach() for name in beside.names
    ]
    if not modules.spec.by_head:
        return torch.cat(each)
    return torch.stack([bias.unflatten(0, (modules.heads, -1)) for bias in each], dim=1).flatten()


def _join_biases(linears: tuple[nn.Linear, ...]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    if len(linears) == 1:
        return linears[0].bias.detach()
    return torch.cat(
        [
            linear.weight.new_zeros(linear.out_features)
            if linear.bias is None
            else linear.bias.detach()
            for linear in linears
        ]
    )
