"""Checks how each layer of a model is described, and what a rank keeps of every token."""

from dataclasses import replace

from placement.model.layers import Dense, Gqa, LayerSpec, PagedState
from placement.model.part import Part, Span, kept_states
from tests.support.shapes import LLAMA_8B


def test_layers_are_alike_but_for_their_windows() -> None:
    model = replace(LLAMA_8B, num_layers=3, windows=(512, None, 512))
    attention = Gqa(num_heads=32, num_kv_heads=8, head_dim=128)
    assert [layer.attention for layer in model.layers] == [
        replace(attention, window=512),
        attention,
        replace(attention, window=512),
    ]
    assert {layer.ffn for layer in model.layers} == {Dense(size=model.ffn_size)}
    assert replace(model, windows=()).layers == (LayerSpec(attention=attention, ffn=Dense(size=model.ffn_size)),) * 3


def test_a_rank_keeps_keys_and_values_of_its_layers_and_heads() -> None:
    whole = Part.whole(LLAMA_8B)
    states = kept_states(LLAMA_8B, whole.layers, whole.kv_heads)
    assert states == (PagedState(num_kv_heads=8, head_dim=128),) * LLAMA_8B.num_layers
    assert states[0].elements_per_token == 2 * 8 * 128
    assert kept_states(LLAMA_8B, Span(3, 5), Span(2, 3)) == (PagedState(num_kv_heads=1, head_dim=128),) * 2
    assert [state.elements_per_token for state in kept_states(LLAMA_8B, Span(0, 1), Span(8, 8))] == [0]
