"""Frozen blocks: every policy, dropout, precision and layout against plain torch."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptv2_fast.frozen import engine
from ptv2_fast.frozen.layout import full_layout, masked_layout
from ptv2_fast.frozen.memory import kept_bytes_per_token
from ptv2_fast.frozen.spec import POLICIES, UPPER_BLOCK, BlockShape
from ptv2_fast.ops.dropout import (
    ATTENTION_OUTPUT_STREAM,
    FEED_FORWARD_STREAM,
    dropout_multiplier,
)
from ptv2_fast.ops.options import AttentionOptions
from ptv2_fast.ops.reference import reference_attention
from ptv2_fast.training.measure import kept_bytes, process_memory
from tests.models import (
    DROPOUT,
    WITHOUT_FALLBACK,
    assert_close_to_model,
    attached,
    make_batch,
    one_thread,  # noqa: F401
    real_tokens,
    set_fields,
    step_results,
    tiny_model,
)


@pytest.mark.parametrize("layers", [None, [1], [2]], ids=["all", "middle", "last"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_policies_give_the_same_bits(head, precision, layers, monkeypatch):
    monkeypatch.setattr(engine, "CPU_CHUNK", 8)  # several chunks, the last one shorter
    plain = tiny_model(head=head, **DROPOUT)
    if precision == "bfloat16":
        plain.to(torch.bfloat16)
    fields = {"layers": layers, "prefix_dropout": 0.2, **WITHOUT_FALLBACK}
    fields["prefix_gate"] = layers == [1]
    model = attached(head, model=plain, **fields).train()
    batch, all_results = make_batch(head), {}
    for policy in POLICIES:
        set_fields(model, recompute=policy)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            all_results[policy] = step_results(model, batch, head)
    for policy in POLICIES[1:]:
        for actual, expected in zip(all_results[policy], all_results["none"], strict=True):
            assert torch.equal(actual, expected)
    assert all(tensor.abs().max() > 0 for tensor in all_results["none"])


def reference_forward(
    plain, prefix: Tensor, gate: Tensor, batch, seeds: Tensor, prefix_dropout: float
) -> Tensor:
    """The logits of a BERT with a prefix [L, 2, H, P, D] and a gate [L, H], by definition."""
    hidden = plain.bert.embeddings(batch["input_ids"])
    rows, tokens, width = hidden.shape
    mask = batch["attention_mask"].bool()
    for index, layer in enumerate(plain.bert.encoder.layer):
        seed = seeds[index : index + 1]
        attention = layer.attention.self
        query, key, value = (
            linear(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        options = AttentionOptions(
            mask, seed, 8**-0.5, attention.dropout.p, prefix_dropout,
            prefix_gate=gate[index : index + 1],
        )  # fmt: skip
        out, _ = reference_attention(
            query, key, value, prefix[index, :1], prefix[index, 1:], options
        )
        out = out.to(hidden.dtype).transpose(1, 2).flatten(2)
        for part, stream in (
            (layer.attention.output, ATTENTION_OUTPUT_STREAM),
            (layer.output, FEED_FORWARD_STREAM),
        ):
            if stream == FEED_FORWARD_STREAM:
                out = layer.intermediate(hidden)
            multiplier = dropout_multiplier(
                (rows, 1, tokens, width), part.dropout.p, seed, stream, hidden.dtype
            )
            hidden = part.LayerNorm(hidden + part.dense(out) * multiplier[:, 0])
    return plain.classifier(hidden) * batch["attention_mask"][..., None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_outputs_and_gradients_equal_a_reference_that_draws_the_same_counters(p, dtype):
    plain = tiny_model(head="token", hidden_dropout_prob=p, attention_probs_dropout_prob=p)
    plain.to(dtype)
    plain.bert.embeddings.dropout.p = 0.0  # the blocks' draws are the first
    model = attached("token", model=copy.deepcopy(plain), prefix_dropout=p, prefix_gate=True,
                     **WITHOUT_FALLBACK)  # fmt: skip
    batch, table = make_batch("token"), model.prefix_encoder.embedding.weight
    gate = model.prefix_encoder.gate
    gate.data.abs_()[0] = 0.0
    table.data = table.data.to(dtype).float()  # the oracle starts from the same values
    grad_out = torch.randn(3, 11, 3).to(dtype)
    torch.manual_seed(5)
    seeds = torch.randint(2**63 - 1, (3,))
    torch.manual_seed(5)
    logits = model.train()(**batch).logits * batch["attention_mask"][..., None]
    of_table, of_gate = torch.autograd.grad(logits, (table, gate), grad_out)
    actual = (logits.detach(), of_table.to(dtype), of_gate.to(dtype))

    def reference(plain, prefix: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaves = (prefix.requires_grad_(), gate.requires_grad_())
        output = reference_forward(plain, *leaves, batch, seeds, p)
        of_prefix, of_gate = torch.autograd.grad(output, leaves, grad_out.to(output.dtype))
        of_table = of_prefix.permute(3, 0, 1, 2, 4).reshape(table.shape)
        return output.detach(), of_table, of_gate

    start = (model.prefix_encoder().detach(), gate.detach())
    assert_close_to_model(actual, reference, plain.eval(), *start, dtype=dtype)


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("lengths", [(11, 11, 11), (11, 7, 1)], ids=["unpadded", "padded"])
def test_dropout_does_not_depend_on_the_width_of_the_batch(lengths, head):
    model = attached(head, model=tiny_model(head=head, **DROPOUT), **WITHOUT_FALLBACK).train()
    model.bert.embeddings.dropout.p = model.dropout.p = 0.0
    narrow = make_batch(head, lengths)
    wide = {
        "input_ids": nn.functional.pad(narrow["input_ids"], (0, 6), value=1),
        "attention_mask": nn.functional.pad(narrow["attention_mask"], (0, 6)),
    }
    if head == "sequence":
        for actual, expected in zip(
            step_results(model, wide), step_results(model, narrow), strict=True
        ):
            assert torch.equal(actual, expected)
    else:
        torch.manual_seed(1)
        expected = model(**narrow).logits * real_tokens(head, narrow)
        torch.manual_seed(1)
        assert torch.equal(model(**wide).logits[:, :11] * real_tokens(head, narrow), expected)


def test_hidden_states_are_those_of_the_hook_path_and_pads_are_zero():
    plain, batch = tiny_model(head="sequence"), make_batch()
    model = attached(model=copy.deepcopy(plain), **WITHOUT_FALLBACK)
    hook = attached(model=plain, backbone="hook")
    hook.load_state_dict(model.state_dict())
    mask = batch["attention_mask"][..., None]
    states = model(**batch, output_hidden_states=True).hidden_states
    expected = hook(**batch, output_hidden_states=True).hidden_states
    for actual, state in zip(states[1:], expected[1:], strict=True):
        assert torch.equal(actual, actual * mask)
        torch.testing.assert_close(actual, state * mask)


def test_a_sequence_classifier_computes_the_rows_its_head_reads():
    model, batch, rows = attached(**WITHOUT_FALLBACK), make_batch(), []
    original = engine.run_block

    def spy(*arguments):
        result = original(*arguments)
        rows.append(len(result.residual))
        return result

    engine.run_block = spy
    try:
        alone = model(**batch).logits
        assert rows == [32, 32, 3]  # 22 tokens; CPUs round up
        # Whoever else may look gets all rows.
        assert torch.equal(model.bert(**batch).last_hidden_state[1, 7:], torch.zeros(4, 16))
        with_states = model(**batch, output_hidden_states=True).logits
        handle = model.bert.encoder.register_forward_hook(lambda *unused: None)
        watched = model(**batch).logits
        handle.remove()
        assert rows[3:] == [32] * 9
    finally:
        engine.run_block = original
    torch.testing.assert_close(with_states, alone)
    assert torch.equal(watched, with_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
def test_kept_bytes_are_those_of_the_formula(policy, dtype):
    hidden, heads, layers = 64, 4, 5
    overrides = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 256}
    model = tiny_model(head="token", num_hidden_layers=layers, **overrides, **DROPOUT).to(dtype)
    attached("token", model=model, recompute=policy, **WITHOUT_FALLBACK).train()
    size = dtype.itemsize
    shape = BlockShape(hidden, 256, heads, heads, hidden // heads, False, size, size)

    def kept(lengths) -> int:
        batch = make_batch("token", lengths, width=39)
        return kept_bytes(lambda: model(**batch).logits.sum(), model)

    # A difference of two batches: what does not grow with the tokens is no matter here.
    upper = kept_bytes_per_token(policy, shape)
    lowest = kept_bytes_per_token(policy, shape, UPPER_BLOCK.of_lowest())
    expected = 16 * ((layers - 1) * upper + lowest)
    shared = 16 * (8 + 8)  # once a forward: the coordinates and the places of the rows
    assert kept((38, 20, 6)) - kept((22, 20, 6)) == expected + shared


def test_products_see_few_numbers_of_rows_on_cpus():
    """oneDNN keeps code for each, so the memory of a run grew with the lengths of its batches."""
    device, seen = torch.device("cpu"), set()
    for tokens in range(1, 4097):
        rows = len(full_layout(1, tokens, device).coordinates)
        assert tokens <= rows <= max(tokens * 9 / 8, tokens + 15)
        seen.add(rows)
    assert len(seen) <= 16 + 8 * 4
    mask = torch.arange(9) < torch.tensor([5, 9, 8])[:, None]
    layout, padded = masked_layout(mask), torch.randn(3, 9, 4) * mask[..., None]
    assert len(layout.coordinates) == len(layout.pack(padded)) == 32
    assert torch.equal(layout.unpack(layout.pack(padded)), padded)


@pytest.mark.slow
def test_the_process_does_not_grow_with_the_lengths_it_has_seen():
    # One row a sequence reaches the head, whose products are torch's own matter.
    sizes_of_minilm = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    sizes_of_minilm |= {"num_hidden_layers": 6, "vocab_size": 30_522}
    model = tiny_model(max_position_embeddings=130, **sizes_of_minilm)
    model = attached(model=model, **WITHOUT_FALLBACK).train()
    generator, sizes = torch.Generator().manual_seed(0), []
    for step in range(1001):
        lengths = torch.randint(5, 129, (16,), generator=generator)
        batch = make_batch(lengths=lengths.tolist(), width=int(lengths.max()))
        model(**batch).logits.sum().backward()
        if step in (100, 1000):
            sizes.append(process_memory("VmRSS"))
    assert sizes[1] < 1.05 * sizes[0]


@pytest.mark.parametrize("more", [False, True], ids=["prefix", "biases and norms"])
def test_a_memory_budget_is_met_or_names_the_least(more):
    fields = {"train_biases": more, "train_norms": more, **WITHOUT_FALLBACK}
    model = attached(model=tiny_model(num_hidden_layers=6), **fields).train()
    batch = make_batch()
    free, reference = (
        kept_bytes(lambda: model(**batch).logits.sum(), model),
        step_results(model, batch),
    )
    set_fields(model, memory_budget=1)
    with pytest.raises(ValueError, match=r"memory_budget: expected at least \d+ bytes") as error:
        model(**batch)
    least = int(str(error.value).split("at least ")[1].split()[0])
    set_fields(model, memory_budget=least)
    assert kept_bytes(lambda: model(**batch).logits.sum(), model) < free
    for actual, expected in zip(step_results(model, batch), reference, strict=True):
        assert torch.equal(actual, expected)


def test_a_step_reads_from_the_device_once():
    """Counted by the operators that would wait for a GPU."""
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item"}
    called: list[str] = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            indices = args[1] if name == "index" else ()
            if name in waits or any(i is not None and i.dtype == torch.bool for i in indices):
                called.append(name)
            return func(*args, **(kwargs or {}))

    model = attached("token", model=tiny_model(head="token", **DROPOUT), prefix_dropout=0.2,
                     **WITHOUT_FALLBACK).train()  # fmt: skip
    batch, lists, original = make_batch("token"), [], Tensor.tolist
    Tensor.tolist = lambda tensor: lists.append(1) or original(tensor)
    try:
        with Listen():
            model(**batch).logits.square().sum().backward()
    finally:
        Tensor.tolist = original
    assert lists == [1] and not called
