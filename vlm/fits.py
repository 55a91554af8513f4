"""Whether vlm/llama.py can run a language model: every assumption about LLaMA is checked here."""

from collections.abc import Iterator

from torch import nn

MODEL_TYPES = ("llama",)
# dynamic and longrope turn by angles that change with the length: there is no table for all
# positions.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
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
        yield f"its language model is a {config.model_type}, wanted {' or '.join(MODEL_TYPES)}"
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else rope
    if kind not in ROPE_TYPES:
        yield f"its RoPE is of the type {kind!r}, wanted {', '.join(ROPE_TYPES)}"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        yield f"it has {heads} heads for {kv_heads} of keys and values, wanted a multiple"
    for number, layer in enumerate(language_model.layers if language_model is not None else ()):
        for module, wanted, name in (
            (layer, LAYER, "layer"),
            (layer.self_attn, ATTENTION, "attention"),
            (layer.mlp, FEED_FORWARD, "feed-forward network"),
        ):
            parts = {name for name, _ in module.named_children()}
            if parts != wanted:
                yield (
                    f"the {name} of layer {number} has {', '.join(sorted(parts ^ wanted))} "
                    f"{'beside' if parts > wanted else 'other than'} "
                    f"LLaMA's {', '.join(sorted(wanted))}"
                )
