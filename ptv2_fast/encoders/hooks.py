"""Who else listens to a module, and forwards that nobody notices."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Where the code of models is that is known: that of transformers, and ours.
KNOWN_CODE = ("transformers.models.", "ptv2_fast.encoders.glm.")
_OWN = ("ptv2_fast.", "transformers.")


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether someone else than this package and transformers listens to a module's forward."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(_is_foreign(hook) for hook in hooks)


def _is_foreign(hook: Callable) -> bool:
    return not getattr(hook, "__module__", "").startswith(_OWN)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether someone listens to a module's backward pass."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


@contextlib.contextmanager
def in_eval_mode(backbone: nn.Module) -> Iterator[None]:
    """Within the context no module of a backbone is in training mode."""
    training = [module for module in backbone.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def without_foreign_hooks(backbone: nn.Module) -> Iterator[None]:
    """Within the context no forward of a module in a backbone calls someone else's hooks."""
    old = [
        (module, name, module.__dict__[name])
        for module in backbone.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks")
        if any(_is_foreign(hook) for hook in module.__dict__[name].values())
    ]
    try:
        for module, name, hooks in old:
            kept = {key: hook for key, hook in hooks.items() if not _is_foreign(hook)}
            module.__dict__[name] = OrderedDict(kept)
        yield
    finally:
        for module, name, hooks in old:
            module.__dict__[name] = hooks


class WithoutProducts(TorchFunctionMode):
    """Within the context plain linear layers give zeros, so that no weight matrix is read."""

    def __torch_function__(
        self,
        function: Callable,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Stands in for every function of torch."""
        if function is nn.functional.linear and len(args) > 1:
            input, weight = args[:2]
            if type(weight) in (torch.Tensor, nn.Parameter):
                return input.new_zeros(*input.shape[:-1], weight.shape[0])
        return function(*args, **(kwargs or {}))
