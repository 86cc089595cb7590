"""Calibration of TidalDecode: the layer whose choice serves the layers after it best, from attention weights made anew."""

import pytest
import torch
from transformers import DynamicCache

from kvpress.calibration import ROWS, coverage, reselect_layer
from kvpress.testing.families import random_tokens, tiny_model

TOP_K = 12


def weights_and_choices(model, ids):
    """Of the last rows in fp64, from the model's own eager attention; the choice by logits, which weights of one head order alike."""
    model = model.double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True, past_key_values=DynamicCache(config=model.config)).attentions
    return [layer[0, :, -ROWS:] for layer in attentions]


def oracle(model, ids, dense):
    layers = weights_and_choices(model, ids)
    choices = [layer.topk(TOP_K, dim=-1).indices for layer in layers]

    def share(chooser, follower):
        held = layers[follower].gather(-1, choices[chooser]).sum()
        return float(held / layers[follower].gather(-1, choices[follower]).sum())

    count, result = len(layers), []
    for again in range(dense + 1, count):
        shares = [share(dense, layer) for layer in range(dense + 1, again)]
        shares += [share(again, layer) for layer in range(again + 1, count)]
        result.append(sum(shares) / (count - dense - 2))
    return result


@pytest.mark.parametrize("dense", [0, 1, 2])
def test_equals_attention_weights_made_anew(dense):
    ids = random_tokens(1, 60, seed=4)
    model = tiny_model("llama", num_hidden_layers=6, num_key_value_heads=4, dtype=torch.float64)
    found = coverage(model, ids, TOP_K, dense)
    expected = oracle(tiny_model("llama", num_hidden_layers=6, num_key_value_heads=4), ids, dense)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.005, "all layers are alike: nothing was told apart"
    assert reselect_layer(model, ids, TOP_K, dense) == dense + 1 + expected.index(max(expected))


def test_a_layer_that_the_others_repeat_is_found():
    """Layers 3 to 5 have the weights of layer 3's attention and no say in the hidden states, so that they attend alike."""
    model = tiny_model("llama", num_hidden_layers=6)
    layers = model.model.layers
    for layer in layers[3:]:
        layer.load_state_dict(layers[3].state_dict())
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(output.weight)
    ids = random_tokens(2, 60, seed=4)
    assert float(coverage(model, ids, TOP_K, 1)[1]) > float(coverage(model, ids, TOP_K, 1)[0])
    assert reselect_layer(model, ids, TOP_K, 1) == 3
    assert model.generate(ids[:1], max_new_tokens=2).shape == (1, 62), "the model goes on as before"


def test_what_cannot_be_calibrated():
    model = tiny_model("llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match="more than top_k=60 tokens"):
        reselect_layer(model, random_tokens(1, 60), 60)
    with pytest.raises(ValueError, match="dense_layers must leave two of the model's 3 compressed layers, got 2"):
        reselect_layer(model, random_tokens(1, 60), 12, 2)
