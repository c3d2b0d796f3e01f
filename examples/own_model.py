"""The operator in a model of one's own: a frozen layer of plain torch with a trained prefix.

python examples/own_model.py --heads 12 --head-dim 64 --prefix 20
"""

import argparse

import torch
from torch import Tensor, nn

from ptv2_fast import prefix_attention


class Layer(nn.Module):
    """Self-attention with a residual; the prefix is the only thing that trains."""

    def __init__(self, heads: int, head_dim: int, prefix: int) -> None:
        super().__init__()
        self.heads, width = heads, heads * head_dim
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.requires_grad_(False)
        self.prefix_key = nn.Parameter(0.02 * torch.randn(heads, prefix, head_dim))
        self.prefix_value = nn.Parameter(0.02 * torch.randn(heads, prefix, head_dim))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:  # [B, T, C], bool [B, T]
        joint = self.query_key_value(self.norm(states))
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D], views
            for part in joint.chunk(3, dim=-1)
        )
        out = prefix_attention(
            query, key, value, self.prefix_key, self.prefix_value,
            key_mask=mask, dropout_p=0.1 if self.training else 0.0,
        )  # fmt: skip
        return states + self.out(out.transpose(1, 2).flatten(2))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=8)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    layer = Layer(options.heads, options.head_dim, options.prefix)
    states = torch.randn(4, 10, options.heads * options.head_dim)
    mask = torch.arange(10) < torch.tensor([10, 7, 4, 9])[:, None]
    target = states[mask].roll(1, dims=-1)
    optimizer = torch.optim.AdamW([layer.prefix_key, layer.prefix_value], lr=1e-2)
    for step in range(20):
        loss = nn.functional.mse_loss(layer(states, mask)[mask], target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
