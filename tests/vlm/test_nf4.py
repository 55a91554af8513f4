"""nf4.py: bitsandbytes' 4-bit weights packed anew, and their products."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import vlm.nf4 as nf4
from vlm.nf4 import CODE, NF4Linear, adopt, pack, pack_scales, packed, parts_of, scales_of, unpack
from vlm.steps import Steps

bitsandbytes = pytest.importorskip("bitsandbytes")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA kernel")
SIZES = [(64, 64), (192, 320), (512, 1024)]


def linear4bit(n: int, k: int, dtype=torch.bfloat16, device="cpu", bias=False, nested=True, kind="nf4"):
    """bitsandbytes' layer with random weights (n, k)."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 0.02
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=bias, compute_dtype=dtype, quant_type=kind, device="meta")
    layer.weight = bitsandbytes.nn.Params4bit(weight.to(dtype), requires_grad=False, quant_type=kind,
                                              compress_statistics=nested).to(device)
    layer.bias = nn.Parameter(torch.randn(n).to(device, dtype), requires_grad=False) if bias else None
    layer.support_avx512bf16_for_cpu = False         # it would pack the weights in a way of its own
    return layer


def exact_weight(layer) -> torch.Tensor:
    """(N, K) float32, by bitsandbytes."""
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


# ------------------------------------------------------------------------------------------------- packing
@pytest.mark.parametrize("size", SIZES)
def test_packing_loses_nothing(size):
    n, k = size
    weights = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    assert torch.equal(unpack(pack(weights)), weights)


def test_a_thread_finds_the_pairs_that_its_registers_hold():
    weights = torch.randint(0, 256, (48, 96), dtype=torch.uint8)
    words = pack(weights).view(3, 3, 32, 4, 4)
    for tile, block, g, t, word, half, r in ((0, 0, 0, 0, 0, 0, 0), (2, 1, 5, 3, 2, 1, 1), (1, 2, 7, 1, 3, 0, 1)):
        column = (block * 64 + 16 * t + 4 * word + 2 * r) // 2
        assert words[tile, block, 4 * g + t, word, 2 * r + half] == weights[tile * 16 + 8 * half + g, column]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_packed_weights_are_bitsandbytes_weights(size, nested):
    layer = linear4bit(*size, nested=nested)
    ours = packed([layer], torch.bfloat16)
    assert distance(ours.exact_weight(), exact_weight(layer)) < 3e-4             # scales of 11 bits


def test_scales_of_any_size_survive():
    scales = torch.rand(32, 5) * torch.tensor([1e-9, 1e-3, 1.0, 1e4, 0.0])
    kept, factor = pack_scales(scales)
    assert kept.isfinite().all()
    assert (nf4.unpack_scales(kept, factor) - scales).abs().max() <= scales.max() * 2**-11
    assert not nf4.unpack_scales(*pack_scales(torch.zeros(16, 1))).any()


@pytest.mark.parametrize("bias", [False, True])
def test_layers_side_by_side_are_rows_of_one_on_the_same_memory(bias):
    layers = [linear4bit(n, 128, torch.float16, bias=bias) for n in (64, 128, 64)]
    fused = packed(layers, torch.float16)
    x, first = torch.randn(3, 128).half(), 0
    for layer in layers:
        part = fused.rows(first, first + layer.out_features)
        assert part.fused is fused and part.words.untyped_storage().data_ptr() == fused.words.data_ptr()
        exact = x.float() @ exact_weight(layer).T + (layer.bias.float() if bias else 0)
        assert distance(part(x), exact) < 2e-3
        assert torch.allclose(part(x), fused(x)[:, first:first + layer.out_features], atol=1e-2)
        first += layer.out_features
    assert len(list(fused.parameters())) == 2 + bias


def test_the_code_is_bitsandbytes():
    assert torch.equal(bitsandbytes.functional.get_4bit_type("nf4", device="cpu"), torch.tensor(CODE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stretched_values_are_closer_to_16_bits_than_plain_ones(dtype):
    code = torch.tensor(CODE, dtype=torch.float64)
    stretched = (code * nf4.STRETCH[dtype]).to(dtype).double() / nf4.STRETCH[dtype]
    assert distance(stretched, code) < 0.65 * distance(code.to(dtype), code)


@pytest.mark.parametrize(("n", "k"), [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (64, 64), (64, 11008)])
@pytest.mark.parametrize("processors", [46, 128, 132])
def test_parts_cover_k_and_none_is_empty(n, k, processors):
    parts, blocks = parts_of(n, k, processors), k // 64
    size = -(-blocks // parts)
    assert 1 <= parts <= 8 and size * (parts - 1) < blocks <= size * parts


def test_every_number_of_rows_has_a_plan_that_every_card_has_room_for():
    layer = packed([linear4bit(64, 64)], torch.bfloat16)
    for rows in range(1, 200):
        plan = layer.plans[nf4.eights(rows)]
        assert min(rows, 64) <= 8 * plan.rows < rows + 16 or rows > 64
        assert plan.shared <= 99 * 1024                                  # what every card since 2020 can give


# ------------------------------------------------------------------------------------------------ adoption
def small_llama(dtype=torch.bfloat16, device="cpu", **changes) -> LlamaForCausalLM:
    """A LLaMA whose layers are Linear4bit."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=99, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64, attn_implementation="sdpa", **changes)
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(device, dtype)
    for layer in model.model.layers:
        for parent, names in nf4.groups_of(layer):
            for name in names:
                old = getattr(parent, name)
                new = linear4bit(old.out_features, old.in_features, dtype, device)
                new.weight = bitsandbytes.nn.Params4bit(old.weight.data.cpu(), requires_grad=False,
                                                        quant_type="nf4", compress_statistics=True).to(device)
                setattr(parent, name, new)
    return model


def test_on_a_cpu_nothing_changes(capsys):
    model = small_llama()
    before = copy.copy(dict(model.named_modules()))
    assert not adopt(model.model, torch.bfloat16)
    assert dict(model.named_modules()) == before and "nf4" not in capsys.readouterr().out


def test_what_cannot_be_packed_is_named():
    model = small_llama()
    parent, names = nf4.groups_of(model.model.layers[0])[0]
    assert nf4.unfit(parent, names, torch.bfloat16) == ""
    assert "float32" in nf4.unfit(parent, names, torch.float32)
    parent.k_proj = nn.Linear(128, 128, bias=False)
    assert nf4.unfit(parent, names, torch.bfloat16) == "k_proj is not in NF4"
    parent.k_proj = linear4bit(128, 128, kind="fp4")
    assert nf4.unfit(parent, names, torch.bfloat16) == "k_proj is not in NF4"
    parent.k_proj = linear4bit(40, 128)
    assert "k_proj is 40 x 128" in nf4.unfit(parent, names, torch.bfloat16)
    parent.k_proj = linear4bit(128, 128, bias=True)
    assert "bias" in nf4.unfit(parent, names, torch.bfloat16)


# ----------------------------------------------------------------------------------------------- on a GPU
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [*SIZES, (4096, 4096), (1024, 11008)])
def test_few_rows_are_as_right_as_bitsandbytes_and_independent(size, dtype):
    nf4.compile_all(torch.device("cuda", torch.cuda.current_device()), dtype)            # side by side: quicker
    layer = linear4bit(*size, dtype, "cuda", bias=True)
    ours, weight = packed([layer], dtype), exact_weight(layer)
    assert distance(ours.weight(), weight) <= 1.3 * distance(weight.to(dtype), weight) + 3e-4
    x = torch.randn(150, size[1], device="cuda").to(dtype)
    exact = x.double() @ weight.double().T + layer.bias.double()
    theirs = distance(nn.functional.linear(x, weight.to(dtype), layer.bias), exact)
    whole = ours.few(x)
    assert distance(whole, exact) <= 1.3 * theirs + 1e-4
    for rows in (1, 2, 7, 8, 9, 16, 17, 31, 33, 48, 64, 65, 128):
        assert torch.equal(ours.few(x[:rows]), whole[:rows])          # bit for bit
    for number in nf4.EIGHTS:                                                             # no plan changes a bit
        for plan in nf4.candidates(number, layer.weight.device):
            assert torch.equal(ours.few(x[:8 * number], plan), whole[:8 * number]), plan
    x[1:] = torch.nan
    assert torch.equal(ours.few(x)[:1], whole[:1])                    # whatever else is there


@needs_gpu
def test_a_model_adopts_its_layers_and_answers_alike(monkeypatch, capsys):
    model, same = small_llama(device="cuda"), small_llama(device="cuda")
    ids = torch.arange(1, 30, device="cuda")[None]
    before = model(input_ids=ids).logits
    monkeypatch.setattr(nf4, "microseconds", lambda work: 1.0)                           # as small as this nothing pays
    assert not adopt(model.model, torch.bfloat16) and "not faster" in capsys.readouterr().out
    monkeypatch.setattr(nf4, "fastest", lambda fused, number: nf4.Plan(number))
    times = iter([1.0, 2.0, 1.0, 2.0, *[1.0] * 6] * 4)                                    # then: more rows don't pay
    monkeypatch.setattr(nf4, "microseconds", lambda work: next(times))
    steps = Steps(model.model, model.lm_head, room=64)
    assert type(steps.qkv[0]) is NF4Linear and type(model.model.layers[1].mlp.down_proj) is NF4Linear
    assert sorted(steps.graphs) == list(range(1, 18))
    assert distance(model(input_ids=ids).logits, before) < 0.02                          # transformers' own forward
    steps.prefill(steps.embed(ids[0, :12]))
    assert distance(steps.verify(ids[0, 12:]).logits, before[0, 12:]) < 0.02
    again = Steps(model.model, model.lm_head, room=64, graphs=False)                     # finds them packed
    assert again.qkv[0] is steps.qkv[0]
    held = sum(part.nbytes for part in model.model.layers.parameters())
    weights = sum(part.numel() for part in small_llama().model.layers.parameters() if part.dtype == torch.uint8) * 2
    assert held <= weights * 4.3 / 8 + 1e4 and same is not None


@needs_gpu
def test_a_wrong_kernel_is_not_used(monkeypatch, capsys):
    model = small_llama(device="cuda")
    monkeypatch.setattr(nf4, "pairs", lambda device, dtype: torch.ones(256, 2, device=device, dtype=dtype))
    assert not adopt(model.model, torch.bfloat16)
    assert "4-bit products are bitsandbytes': the fused product of few rows is off" in capsys.readouterr().out


def test_scales_are_read_nested_or_plain():
    for nested in (False, True):
        layer = linear4bit(64, 128, nested=nested)
        assert layer.weight.quant_state.nested == nested
        assert scales_of(layer.weight.quant_state).shape == (128,)
