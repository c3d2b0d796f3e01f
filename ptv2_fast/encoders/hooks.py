"""Who else listens to a module."""

from torch import nn


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether someone else than this package and transformers listens to a module's forward."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ours = ("ptv2_fast.", "transformers.")
    return any(not getattr(hook, "__module__", "").startswith(ours) for hook in hooks)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether someone listens to a module's backward pass."""
    return bool(module._backward_hooks or module._backward_pre_hooks)
