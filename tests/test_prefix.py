"""PTuningV2Config and PrefixEncoder: validation, layout, projection, folding, master weights."""

import pytest
import torch

from ptv2_fast.prefix import PrefixEncoder, PTuningV2Config

SIZES = {"num_layers": 4, "num_heads": 3, "head_dim": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: expected an integer >= 1, got 0"),
        ({"num_virtual_tokens": 2.0}, "num_virtual_tokens: expected an integer"),
        ({"prefix_dropout": 1.0}, r"prefix_dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"layers": []}, "layers: expected None or a non-empty list"),
        ({"layers": [1, 1]}, "layers: expected None or a non-empty list of distinct"),
        ({"layers": [-1]}, "layers: expected None or a non-empty list of distinct layer indices"),
        ({"position_offset": "shift"}, "position_offset: expected one of"),
        ({"init": "zeros"}, "init: expected one of"),
        ({"init": "tokens", "prefix_projection": True}, "init: expected 'normal' with"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size: expected None or an integer >= 1"),
        ({"modules_to_save": "pooler"}, "modules_to_save: expected None or a list"),
        ({"prefix_projection": 1}, "prefix_projection: expected True or False, got 1"),
        (
            {"num_virtual_tokens": 0, "train_norms": True, "prefix_gate": True},
            "prefix_gate: expected False without a prefix",
        ),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PTuningV2Config(**fields)


def test_a_dictionary_round_trip_keeps_every_field_and_refuses_unknown_keys():
    config = PTuningV2Config(7, True, 12, "SEQ_CLS", ["pooler"], True, 0.1, [2, 0], "prefix")
    assert PTuningV2Config.from_dict(config.to_dict()) == config
    assert config.layers == (0, 2)
    with pytest.raises(ValueError, match=r"unknown keys \['num_layers', 'token_dim'\]"):
        PTuningV2Config.from_dict({**config.to_dict(), "token_dim": 1, "num_layers": 2})


def test_layers_out_of_range_name_the_range():
    config = PTuningV2Config(layers=[0, 4])
    with pytest.raises(ValueError, match=r"layers: expected indices in the range 0\.\.3"):
        PrefixEncoder(config, **SIZES)


def test_row_p_of_the_table_is_layers_key_value_heads_head_dim():
    encoder = PrefixEncoder(PTuningV2Config(5, layers=[1, 3]), **SIZES)
    prefix = encoder()
    assert encoder.embedding.weight.shape == (5, 2 * 2 * 3 * 8)
    assert prefix.shape == (2, 2, 3, 5, 8)
    row = encoder.embedding.weight[4].view(2, 2, 3, 8)
    assert torch.equal(prefix[:, :, :, 4], row)
    for index, layer in enumerate((1, 3)):
        key, value, gate = encoder.layer_prefixes()[layer]
        assert gate is None
        assert torch.equal(key[:, 4], row[index, 0]) and torch.equal(value[:, 4], row[index, 1])
        assert key.is_contiguous() and value.is_contiguous()


def test_weights_start_at_a_deviation_of_0_02_and_biases_at_zero():
    encoder = PrefixEncoder(PTuningV2Config(64, True, 32), num_layers=4, num_heads=4, head_dim=32)
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())
    assert encoder.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert encoder.projection[2].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not encoder.projection[0].bias.any() and not encoder.projection[2].bias.any()


def test_the_projection_is_embedding_linear_tanh_linear_and_folds_into_a_table():
    encoder = PrefixEncoder(PTuningV2Config(5, True, 12), **SIZES)
    first, _, second = encoder.projection
    assert encoder.embedding.weight.shape == (5, 24) and first.weight.shape == (12, 24)
    torch.nn.init.normal_(second.bias)
    table = second(torch.tanh(first(encoder.embedding.weight)))
    assert torch.equal(encoder(), table.view(5, 4, 2, 3, 8).permute(1, 2, 3, 0, 4))
    folded = encoder.fold()
    assert not folded.config.prefix_projection and folded.projection is None
    assert torch.equal(folded(), encoder())
    assert folded.embedding.weight.data_ptr() != encoder.embedding.weight.data_ptr()


def test_gradients_of_all_layers_reach_their_place_in_the_table():
    encoder = PrefixEncoder(PTuningV2Config(5, layers=[0, 2]), **SIZES)
    weights = torch.randn(2, 2, 3, 5, 8)
    loss = sum(
        (key * weights[i, 0]).sum() + (value * weights[i, 1]).sum()
        for i, (key, value, _) in enumerate(encoder.layer_prefixes().values())
    )
    loss.backward()
    assert torch.equal(encoder.embedding.weight.grad, weights.permute(3, 0, 1, 2, 4).reshape(5, -1))


def test_a_gate_is_the_size_of_a_number_that_starts_at_zero_and_leaves_it():
    """At 0 it has a gradient, and below 0 one that brings it up."""
    encoder = PrefixEncoder(PTuningV2Config(5, layers=[1, 3], prefix_gate=True), **SIZES)
    assert encoder.gate.shape == (2, 3) and encoder.gate.dtype == torch.float32
    assert not encoder.gate.any()
    with torch.no_grad():
        encoder.gate[1] = torch.tensor([0.5, -0.25, 0.0])
    gates = {layer: prefix.gate for layer, prefix in encoder.layer_prefixes().items()}
    assert gates[1].tolist() == [0.0] * 3 and gates[3].tolist() == [0.5, 0.25, 0.0]
    sum(gate.sum() for gate in gates.values()).backward()
    assert encoder.gate.grad.tolist() == [[1.0] * 3, [1.0, -1.0, 1.0]]
    assert torch.equal(encoder.fold().gate, encoder.gate)
    assert encoder.layer_prefixes()[3].query_gate(6).tolist() == [0.5, 0.5, 0.25, 0.25, 0.0, 0.0]


def test_a_narrow_dtype_moves_the_module_but_keeps_its_float32_master():
    encoder = PrefixEncoder(PTuningV2Config(5, True, 12), **SIZES)
    before = encoder().clone()
    encoder.to(torch.bfloat16).half()
    assert torch.equal(encoder(), before)
    assert encoder.double()().dtype == torch.float64


def test_a_table_is_overwritten_only_by_its_own_shape():
    encoder = PrefixEncoder(PTuningV2Config(5), **SIZES)
    prefix = torch.randn(4, 2, 3, 5, 8)
    encoder.set_layers(prefix)
    assert torch.equal(encoder(), prefix)
    with pytest.raises(ValueError, match=r"prefix: expected shape \[4, 2, 3, 5, 8\]"):
        encoder.set_layers(prefix[:3])
