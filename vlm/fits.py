"""Whether vlm/llama.py can run a language model: every assumption about LLaMA is checked here.

vlm/any_model.py compares the logits too, once at loading.
"""

from collections.abc import Iterator

from torch import nn

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3",
               "qwen3_vl_text")
# dynamic and longrope turn by angles that change with the length: there is no table for all
# positions.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}                # Qwen3's
UNUSED = {"rotary_emb"}              # of an attention module: the model's own is taken
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "act_fn"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def why_not(config, language_model: nn.Module | None = None) -> str | None:
    """Why vlm/llama.py can't run a language model of this config (transformers' text config); None
    if it can.

    With the module itself its parts are looked at too: norms on queries and keys, or a third norm,
    would be skipped.
    """
    return next(_reasons(config, language_model), None)


def _reasons(config, language_model: nn.Module | None) -> Iterator[str]:
    if config.model_type not in MODEL_TYPES:
        yield f"its language model is a {config.model_type}, wanted one of {', '.join(MODEL_TYPES)}"
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else rope
    if kind not in ROPE_TYPES:
        yield f"its RoPE is of the type {kind!r}, wanted {', '.join(ROPE_TYPES)}"
    if isinstance(rope, dict) and rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "its RoPE turns only a part of each head"
    window, longest = window_of(config), config.max_position_embeddings
    if window is not None and window < longest:
        yield (f"its attention sees a window of {window:,} positions and its context has "
               f"{longest:,}: our caches keep all of it")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        yield f"it has {heads} heads for {kv_heads} of keys and values, wanted a multiple"
    for number, layer in enumerate(language_model.layers if language_model is not None else ()):
        for module, wanted, name in (
            (layer, LAYER, "layer"),
            (layer.self_attn, ATTENTION, "attention"),
            (layer.mlp, FEED_FORWARD, "feed-forward network"),
        ):
            parts = {name for name, _ in module.named_children()} - UNUSED
            if parts >= HEAD_NORMS and wanted is ATTENTION:
                parts -= HEAD_NORMS
            if parts != wanted:
                yield (
                    f"the {name} of layer {number} has {', '.join(sorted(parts ^ wanted))} "
                    f"{'beside' if parts > wanted else 'other than'} "
                    f"LLaMA's {', '.join(sorted(wanted))}"
                )


def window_of(config) -> int | None:
    """Positions that a layer with sliding attention sees; None if no layer has a window."""
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else config.model_type == "mistral"
    return getattr(config, "sliding_window", None) if slides else None
