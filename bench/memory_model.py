"""Bytes of a training step by formula: our policies, and what people run today.

    python -m bench.memory_model

It prints what models need that do not fit here. tests/test_memory_model.py holds the kept bytes
against a count of what autograd saves. Frozen blocks are summed by ptv2_fast/frozen/memory.py, of
whatever kind. The others are formulas of BERT's block; with X = bytes of an element, h = hidden,
a = heads, S = prefix + tokens, a block of transformers keeps, per token (padding included):

    q, k, v, out, total_1, total_2, u      (6h + intermediate) X, whoever trains
    x, LN(total_1), gelu(u)                (2h + intermediate) X, for gradients of weights and LoRA
    concatenated prefix                    2 h P X / tokens
    lse (sdpa) or probabilities (eager)    4a, or a S X; eager keeps `out` for the weights only
    mask (sdpa)                            S X
    dropout of hidden states               2h X on a CPU (the noise), 2h on a GPU (booleans)
    dropout of attention, eager            2 a S X on a CPU, a S (X + 1) on a GPU
    dropout of attention, sdpa             nothing on a GPU; a CPU computes with matrices in fp32:
                                           q, k, v in fp32 and 12 a S in place of out and mask
"""

from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from ptv2_fast.frozen.memory import kept_bytes_per_token, transient_bytes
from ptv2_fast.frozen.spec import BlockShape

LORA_RANK = 8
CHUNK = {"cpu": 1024, "cuda": 8192}  # tokens, of the frozen block's feed-forward network


@dataclass(frozen=True)
class Encoder:
    """Sizes of an encoder.

    Args:
        layers, hidden, heads, intermediate, vocabulary, positions: the last is 0 without a table.
        is_gated: its feed-forward networks are.
        is_bert: its layers are BERT's; of others the formulas know frozen blocks only.
        counted: its parameters, where they are not those of BERT's layers.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int = 30522
    positions: int = 512
    is_gated: bool = False
    is_bert: bool = True
    counted: int | None = None

    @property
    def parameters(self) -> int:
        """Of embeddings, layers and pooler, with BERT's biases and norms, or as counted."""
        if self.counted is not None:
            return self.counted
        hidden, inner = self.hidden, self.intermediate
        layer = 4 * hidden**2 + (2 + self.is_gated) * hidden * inner + 9 * hidden + inner
        embeddings = (self.vocabulary + self.positions + 4) * hidden
        return self.layers * layer + embeddings + hidden**2 + hidden


@dataclass(frozen=True)
class Batch:
    """One step's input.

    Args:
        sequences, tokens: of the padded batch.
        prefix: P.
        element_bytes: of the backbone's dtype.
        real_tokens: that are no padding, of all sequences; None = all.
        has_dropout: of hidden states and attention.
        device: "cpu" or "cuda".
    """

    sequences: int
    tokens: int
    prefix: int
    element_bytes: int = 2
    real_tokens: int | None = None
    has_dropout: bool = True
    device: str = "cuda"

    @property
    def all_tokens(self) -> int:
        return self.sequences * self.tokens

    @property
    def rows(self) -> int:
        """Tokens that are no padding."""
        return self.all_tokens if self.real_tokens is None else self.real_tokens


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step."""

    kept: int
    transient: int
    weights: int
    gradients: int
    optimizer: int
    update: int  # temporaries of the optimizer's step

    @property
    def above_idle(self) -> int:
        """The peak above weights and optimizer state.

        Gradients grow while what was kept is freed, so the larger of the two counts.
        """
        backward = max(self.kept, self.gradients) + self.transient
        return max(backward, self.gradients + self.update)

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.above_idle


def block_shape(encoder: Encoder, batch: Batch) -> BlockShape:
    head_dim, size = encoder.hidden // encoder.heads, batch.element_bytes
    return BlockShape(
        encoder.hidden, encoder.intermediate, encoder.heads, encoder.heads, head_dim,
        encoder.is_gated, size, size,
    )  # fmt: skip


def has_formula(method: str, encoder: Encoder) -> bool:
    """Whether this file knows a method's bytes; without padding it does not (flash)."""
    return method.startswith("frozen ") or (encoder.is_bert and not method.endswith("flash"))


def kept_bytes_of_layer(method: str, encoder: Encoder, batch: Batch) -> int:
    """Bytes that one layer (no lowest one) keeps for its backward pass, where `has_formula`.

    Args:
        method: a key of models.METHODS.
        encoder, batch: sizes.
    """
    size, hidden, heads = batch.element_bytes, encoder.hidden, encoder.heads
    shared_prefix = 2 * hidden * batch.prefix * size
    if method.startswith("frozen "):
        shape = block_shape(encoder, batch)
        per_token = kept_bytes_per_token(_policy(method), shape)
        # What trains of query, key and value, in one piece: biases, or updates.
        joined = 3 * hidden * 4 * _more(method, biases=1, updates=2 * LORA_RANK)
        return batch.rows * per_token + shared_prefix + joined
    is_cpu = batch.device == "cpu"
    statistics = 4 * (size if is_cpu else 4)
    noise = (size if is_cpu else 1) if batch.has_dropout else 0
    per_token = (2 * hidden + encoder.intermediate) * size + statistics + 2 * hidden * noise
    if method == "hook":
        return batch.all_tokens * (per_token + 4 * hidden * size + 4 * heads) + shared_prefix
    trains_weights = method.startswith(("full", "LoRA"))
    if trains_weights:
        per_token += (2 * hidden + encoder.intermediate) * size
    prefix = 0 if trains_weights else batch.prefix
    is_eager = method.endswith(("eager", "recipe"))
    attention = _eager_bytes if is_eager else _sdpa_bytes
    per_token += attention(encoder, batch, prefix, trains_weights)
    if method.startswith("LoRA"):
        per_token += 6 * LORA_RANK * size
    kept = batch.all_tokens * per_token
    if method.endswith("recipe"):
        kept += batch.sequences * 2 * hidden * prefix * (size if is_cpu else 1)  # prefix dropout
    return int(kept)


def _policy(method: str) -> str:
    return method.removeprefix("frozen ").partition(",")[0]


def _more(method: str, biases: int, updates: int) -> int:
    """A number for methods that train biases and norms too, or low-rank updates; else 0."""
    if not method.startswith("frozen "):
        return 0
    return biases if method.endswith("norms") else updates if "low rank" in method else 0


def _eager_bytes(encoder: Encoder, batch: Batch, prefix: int, keeps_out: bool) -> float:
    """q, k, v with the prefix, probabilities; per token."""
    size, columns = batch.element_bytes, prefix + batch.tokens
    scores = encoder.heads * columns
    kept = (3 + keeps_out + 2 * prefix / batch.tokens) * encoder.hidden * size + scores * size
    if batch.has_dropout:
        kept += scores * size + scores * (size if batch.device == "cpu" else 1)
    return kept


def _sdpa_bytes(encoder: Encoder, batch: Batch, prefix: int, keeps_out: bool) -> float:
    """q, k, v with the prefix, out, lse and the mask; per token."""
    size, columns = batch.element_bytes, prefix + batch.tokens
    inputs = (3 + 2 * prefix / batch.tokens) * encoder.hidden
    if batch.device == "cpu" and batch.has_dropout:
        return 4 * inputs + 12 * encoder.heads * columns + keeps_out * encoder.hidden * size
    mask = columns * size if batch.rows < batch.all_tokens else 0
    return (inputs + encoder.hidden) * size + 4 * encoder.heads + mask


def trained_parameters(method: str, encoder: Encoder, batch: Batch) -> int:
    """Parameters with a gradient, heads left out."""
    hidden, inner, layers = encoder.hidden, encoder.intermediate, encoder.layers
    if method.startswith("full"):
        return encoder.parameters
    if method.startswith("LoRA"):
        return LORA_RANK * (layers * (10 * hidden + 2 * inner) + 2 * hidden)
    updates = LORA_RANK * (10 * hidden + 2 * inner)
    more = layers * _more(method, biases=9 * hidden + inner, updates=updates)
    return 2 * layers * hidden * batch.prefix + more


def predict_step(method: str, encoder: Encoder, batch: Batch) -> StepMemory:
    """Bytes of a training step under AdamW, where `has_formula`.

    What embeddings and head keep is left out, and the last block is counted whole. The transient
    of a method that is not ours: two gradients of u and three of the hidden states and, with
    attention matrices, two of those.

    Args:
        method: a key of models.METHODS.
        encoder, batch: sizes.
    """
    is_ours = method == "hook" or method.startswith("frozen ")
    size = batch.element_bytes
    if method.startswith("frozen "):
        shape, chunk = block_shape(encoder, batch), CHUNK[batch.device]
        transient = transient_bytes(_policy(method), shape, batch.rows, chunk)
    else:
        per_token = (2 * encoder.intermediate + 3 * encoder.hidden) * size
        scores = encoder.heads * (batch.prefix + batch.tokens)
        if method.endswith(("eager", "recipe")):
            per_token = max(per_token, 2 * scores * size)
        elif method != "hook" and batch.device == "cpu" and batch.has_dropout:
            per_token = max(per_token, 2 * scores * 4)
        transient = batch.all_tokens * per_token
    trained = trained_parameters(method, encoder, batch) * (4 if is_ours else size)
    is_full = method.startswith("full")
    added = 0 if is_full else trained
    # A GPU updates all parameters at once with one copy; a CPU one by one with two, the largest of
    # which are those of the word embeddings.
    largest = encoder.vocabulary * encoder.hidden * size if is_full else trained
    update = 2 * largest if batch.device == "cpu" else trained
    return StepMemory(
        kept=encoder.layers * kept_bytes_of_layer(method, encoder, batch),
        transient=transient,
        weights=encoder.parameters * size + added,
        gradients=trained,
        optimizer=2 * trained,
        update=update,
    )


def largest_batch(budget_bytes: int, method: str, encoder: Encoder, batch: Batch) -> int:
    """The most sequences, as long and as padded as those of `batch`, whose peak fits."""

    def fits(sequences: int) -> bool:
        real = batch.rows * sequences // batch.sequences
        step = predict_step(method, encoder, replace(batch, sequences=sequences, real_tokens=real))
        return step.peak <= budget_bytes

    largest = 0
    while fits(max(1, 2 * largest)):
        largest = max(1, 2 * largest)
    step = largest // 2
    while step:
        if fits(largest + step):
            largest += step
        step //= 2
    return largest


BEYOND_REACH = {
    "DeBERTa-xlarge, without its position terms": Encoder(48, 1024, 16, 4096, 50265),
    "GLM-2B": Encoder(36, 2048, 32, 8192, 50304, 1024),
    "GLM-10B": Encoder(48, 4096, 64, 16384, 50304, 1024),
}
SHOWN = (
    "full fine-tuning, sdpa", "LoRA r8, peft sdpa", "prefix, peft sdpa", "hook", "frozen none",
    "frozen ffn", "frozen ffn+qkv", "frozen block",
)  # fmt: skip


def main() -> None:
    batch = Batch(sequences=8, tokens=512, prefix=100)
    budgets = (8, 16, 24, 80)
    table = Table(
        "encoder", "method", "kept", "transient", "weights", "gradients", "optimizer", "peak",
        *(f"batch in {gigabytes} GB" for gigabytes in budgets),
        title=f"GiB by formula, bf16 on a GPU: {batch}",
    )  # fmt: skip
    for name, encoder in BEYOND_REACH.items():
        for method in SHOWN:
            step = predict_step(method, encoder, batch)
            parts = (step.kept, step.transient, step.weights, step.gradients, step.optimizer)
            batches = (largest_batch(size * 10**9, method, encoder, batch) for size in budgets)
            numbers = (f"{part / 2**30:.2f}" for part in (*parts, step.peak))
            table.add_row(name, method, *numbers, *map(str, batches))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
