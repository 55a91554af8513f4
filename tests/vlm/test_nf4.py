"""nf4.py and adopt_nf4.py: bitsandbytes' 4-bit weights packed anew, and their products."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from vlm import adopt_nf4, nf4
from vlm.adopt_nf4 import adopt, groups_of, unfit
from vlm.nf4 import CODE, EIGHTS, NF4Linear, Plan, pack, pack_scales, packed, unpack
from vlm.steps import TREE_SIZES, Steps

bitsandbytes = pytest.importorskip("bitsandbytes")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA kernel")
SIZES = [(64, 64), (192, 320), (512, 1024)]
REAL_SIZES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]


def linear4bit(n, k, dtype=torch.bfloat16, device="cpu", bias=False, nested=True, kind="nf4"):
    """bitsandbytes' layer with random weights (n, k)."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 0.02
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=bias, compute_dtype=dtype, quant_type=kind,
                                       device="meta")
    layer.weight = bitsandbytes.nn.Params4bit(weight.to(dtype), requires_grad=False, quant_type=kind,
                                              compress_statistics=nested).to(device)
    layer.bias = nn.Parameter(torch.randn(n).to(device, dtype),
                              requires_grad=False) if bias else None
    layer.support_avx512bf16_for_cpu = False         # it would pack the weights in a way of its own
    return layer


def exact_weight(layer) -> torch.Tensor:
    """(N, K) float32, by bitsandbytes."""
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


# ------------------------------------------------------------------------------------- packing
@pytest.mark.parametrize("size", SIZES)
def test_packing_loses_nothing(size):
    n, k = size
    weights = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    assert torch.equal(unpack(pack(weights)), weights)


@pytest.mark.parametrize(("tile", "block", "g", "t", "word", "half", "pair"), [
    (0, 0, 0, 0, 0, 0, 0), (2, 1, 5, 3, 2, 1, 1), (1, 2, 7, 1, 3, 0, 1)])
def test_a_thread_finds_the_pairs_that_its_registers_hold(tile, block, g, t, word, half, pair):
    weights = torch.randint(0, 256, (48, 96), dtype=torch.uint8)
    words = pack(weights).view(3, 3, 32, 4, 4)
    row, column = tile * 16 + 8 * half + g, (block * 64 + 16 * t + 4 * word + 2 * pair) // 2
    assert words[tile, block, 4 * g + t, word, 2 * pair + half] == weights[row, column]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_packed_weights_are_bitsandbytes_weights(size, nested):
    layer = linear4bit(*size, nested=nested)
    assert layer.weight.quant_state.nested == nested
    ours = packed([layer], torch.bfloat16)
    assert distance(ours.exact_weight(), exact_weight(layer)) < 3e-4         # scales of 11 bits


def test_scales_of_any_size_survive():
    scales = torch.rand(32, 5) * torch.tensor([1e-9, 1e-3, 1.0, 1e4, 0.0])
    packed_scales, factor = pack_scales(scales)
    assert packed_scales.isfinite().all()
    assert (nf4.unpack_scales(packed_scales, factor) - scales).abs().max() <= scales.max() * 2**-11
    assert not nf4.unpack_scales(*pack_scales(torch.zeros(16, 1))).any()


@pytest.mark.parametrize("bias", [False, True])
def test_layers_side_by_side_are_rows_of_one_on_the_same_memory(bias):
    layers = [linear4bit(n, 128, torch.float16, bias=bias) for n in (64, 128, 64)]
    fused = packed(layers, torch.float16)
    x, first = torch.randn(3, 128).half(), 0
    for layer in layers:
        last = first + layer.out_features
        part = fused.rows(first, last)
        assert part.fused is fused
        assert part.words.untyped_storage().data_ptr() == fused.words.data_ptr()
        exact = x.float() @ exact_weight(layer).T + (layer.bias.float() if bias else 0)
        assert distance(part(x), exact) < 2e-3
        assert torch.allclose(part(x), fused(x)[:, first:last], atol=1e-2)
        first = last
    assert len(list(fused.parameters())) == 2 + bias


def test_the_code_is_bitsandbytes():
    theirs = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(theirs, torch.tensor(CODE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stretched_values_are_closer_to_16_bits_than_plain_ones(dtype):
    values = torch.tensor(CODE, dtype=torch.float64)
    stretched = (values * nf4.STRETCH[dtype]).to(dtype).double() / nf4.STRETCH[dtype]
    assert distance(stretched, values) < 0.65 * distance(values.to(dtype), values)


# --------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize(("n", "k"), [*REAL_SIZES, (64, 64), (64, 11008)])
@pytest.mark.parametrize("processors", [46, 128, 132])
def test_parts_cover_k_and_none_is_empty(n, k, processors):
    parts, blocks = nf4.parts_of(n, k, processors), k // 64
    size = -(-blocks // parts)
    assert 1 <= parts <= nf4.MAX_PARTS and size * (parts - 1) < blocks <= size * parts


@pytest.mark.parametrize("room_kib", [99, 227])
@pytest.mark.parametrize("n", [64, 4096, 12288, 22016])
def test_every_number_of_rows_has_a_plan_that_the_device_has_room_for(n, room_kib):
    for rows in range(1, 200):
        plan = nf4.plan_for(rows, n, room_kib * 1024)
        assert plan.rows in EIGHTS and plan.shared <= room_kib * 1024
        assert rows <= 8 * plan.rows < rows + 8 or rows > 72


@pytest.mark.parametrize("rows", [1, 9, 64, 65, 130])
@pytest.mark.parametrize("size", [(64, 64), (4096, 320)])
def test_the_kernel_is_asked_for_the_whole_product(rows, size, monkeypatch):
    layer = packed([linear4bit(*size, bias=True)], torch.bfloat16)
    monkeypatch.setattr(nf4, "processors", lambda device: 132)
    monkeypatch.setattr(nf4, "shared_room", lambda device: 99 * 1024)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    plans = []

    def launch(grid, threads, x, words, scales, pairs, bias, y, partial, arrived, m, n, k, part, factor):
        plan = plans[-1]
        assert (m, n, k) == (rows, *size) and x.data_ptr() % 16 == 0 and threads == 32 * plan.warps
        outputs = 16 * plan.tiles * plan.warps
        assert grid[0] * 8 * plan.rows >= m and grid[1] * outputs >= n
        assert grid[2] * part >= k // 64 > (grid[2] - 1) * part
        assert len(arrived) >= grid[0] * grid[1] and not arrived.any()
        sums = grid[0] * grid[1] * grid[2] * 8 * plan.rows * outputs
        assert len(partial) == (sums if grid[2] > 1 else 0) and pairs.shape == (256, 2)
        y.copy_(x.float() @ layer.exact_weight().T + bias.float())

    monkeypatch.setattr(nf4, "kernel", lambda *what: plans.append(what[-1]) or launch)
    x = torch.randn(rows, size[1] + 1).bfloat16()[:, 1:]                     # not aligned
    assert distance(layer.few(x), layer.many(x)) < 0.01


# ------------------------------------------------------------------------------------ adoption
def small_llama(dtype=torch.bfloat16, device="cpu") -> LlamaForCausalLM:
    """A LLaMA whose layers are Linear4bit."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=99, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64,
                         attn_implementation="sdpa")
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(device, dtype)
    for layer in model.model.layers:
        for parent, names in groups_of(layer):
            for name in names:
                old = getattr(parent, name)
                new = linear4bit(old.out_features, old.in_features, dtype, device)
                new.weight = bitsandbytes.nn.Params4bit(
                    old.weight.data.cpu(), requires_grad=False, quant_type="nf4",
                    compress_statistics=True).to(device)
                setattr(parent, name, new)
    return model


def test_on_a_cpu_nothing_changes(capsys):
    model = small_llama()
    before = dict(model.named_modules())
    assert not adopt(model.model, torch.bfloat16)
    assert dict(model.named_modules()) == before and "nf4" not in capsys.readouterr().out


def test_what_cannot_be_packed_is_named():
    parent, names = groups_of(small_llama().model.layers[0])[0]
    assert unfit(parent, names, torch.bfloat16) == ""
    assert "float32" in unfit(parent, names, torch.float32)
    for layer, reason in ((nn.Linear(128, 128, bias=False), "k_proj is not in NF4"),
                          (linear4bit(128, 128, kind="fp4"), "k_proj is not in NF4"),
                          (linear4bit(40, 128), "k_proj is 40 x 128"),
                          (linear4bit(128, 128, bias=True), "only some of q_proj, k_proj, v_proj")):
        parent.k_proj = layer
        assert unfit(parent, names, torch.bfloat16).startswith(reason)


@pytest.fixture
def no_kernel(monkeypatch):
    """PyTorch's own product in the kernel's place, and nothing compiled."""
    monkeypatch.setattr(NF4Linear, "few", lambda self, x, plan=None: torch.cat(
        [self.many(row[None]) for row in x]))
    monkeypatch.setattr(adopt_nf4, "compile_all", lambda *what: None)


def first_layer(model) -> list[list[nn.Module]]:
    groups = groups_of(model.model.layers[0])
    return [[getattr(parent, name) for name in names] for parent, names in groups]


def test_the_trial_tells_up_to_how_many_rows_the_kernel_pays(no_kernel, monkeypatch, capsys):
    # 192 rows pay, 256 don't
    times = iter([1.0, 3.0, 2.0, 4.0, *[1.0, 2.0] * 2, 2.0, 1.0] * 4)
    monkeypatch.setattr(adopt_nf4, "microseconds", lambda work: next(times))
    assert adopt_nf4.trial(first_layer(small_llama()), torch.bfloat16) == [192] * 4
    assert "up to 192 rows | us a layer (bitsandbytes') by rows: 1 4 (12), 9 8 (16)" in (
        capsys.readouterr().out)


def test_a_kernel_that_is_slow_or_wrong_is_refused(no_kernel, monkeypatch):
    monkeypatch.setattr(adopt_nf4, "microseconds", lambda work: 1.0)
    layers = first_layer(small_llama())
    with pytest.raises(RuntimeError, match="not faster"):
        adopt_nf4.trial(layers, torch.bfloat16)
    monkeypatch.setattr(NF4Linear, "few", lambda self, x: 1.02 * self.many(x))
    with pytest.raises(RuntimeError, match="few rows is off by 2"):
        adopt_nf4.trial(layers, torch.bfloat16)
    monkeypatch.setattr(NF4Linear, "few", lambda self, x: self.many(x) + 1e-6 * len(x))
    with pytest.raises(RuntimeError, match="1 rows alone differ"):
        adopt_nf4.trial(layers, torch.bfloat16)


def test_replaced_layers_answer_alike_and_hold_one_copy():
    model, ids = small_llama(), torch.arange(1, 30)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    for layer in model.model.layers:
        for parent, names in groups_of(layer):
            adopt_nf4.replace(parent, names, torch.bfloat16, 72)
    assert model.model.layers[0].self_attn.v_proj.fused.out_features == 3 * 128
    steps = Steps(model.model, model.lm_head, room=64)
    assert steps.gate_up[1] is model.model.layers[1].mlp.up_proj.fused
    with torch.inference_mode():
        # transformers' own forward
        assert distance(model(input_ids=ids).logits, before) < 0.03
    assert distance(steps.prefill(steps.embed(ids[0]), outputs=29).logits, before[0]) < 0.03
    weights = 2 * (4 * 128 * 128 + 3 * 128 * 192)
    norms = sum(part.nbytes for name, part in model.model.layers.named_parameters() if "norm" in name)
    held = sum(part.nbytes for part in model.model.layers.parameters()) - norms
    assert held == weights * 4.25 / 8


# ----------------------------------------------------------------------------------- on a GPU
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [*SIZES, (4096, 4096), (1024, 11008)])
def test_few_rows_are_as_right_as_bitsandbytes_and_independent(size, dtype):
    layer = linear4bit(*size, dtype, "cuda", bias=True)
    ours, weight = packed([layer], dtype), exact_weight(layer)
    rounding = distance(weight.to(dtype), weight)
    assert distance(ours.weight(), weight) <= 1.3 * rounding + 3e-4
    x = torch.randn(150, size[1], device="cuda").to(dtype)
    exact = x.double() @ weight.double().T + layer.bias.double()
    theirs = distance(nn.functional.linear(x, weight.to(dtype), layer.bias), exact)
    product = ours.few(x)
    assert distance(product, exact) <= 1.3 * theirs + 1e-4
    for rows in (1, 2, 7, 8, 9, 16, 17, 31, 33, 48, 49, 64, 65, 72, 73, 128):
        assert torch.equal(ours.few(x[:rows]), product[:rows])                 # bit for bit
    x[1:] = torch.nan
    # Whatever else is there
    assert torch.equal(ours.few(x)[:1], product[:1])


@needs_gpu
@pytest.mark.parametrize("number", EIGHTS)
def test_no_plan_changes_a_bit(number):
    layer = packed([linear4bit(192, 1088, device="cuda")], torch.bfloat16)
    x = torch.randn(8 * number, 1088, device="cuda").bfloat16()
    plans = {nf4.plan_for(8 * number, n, room * 1024) for n in (64, 12288, 22016) for room in (99, 227)}
    for plan in plans | {Plan(number, 2, 4, 2, 3, 1)}:
        assert torch.equal(layer.few(x, plan), layer.few(x)), plan


@needs_gpu
def test_a_model_adopts_its_layers_and_answers_alike(monkeypatch, capsys):
    model, ids = small_llama(device="cuda"), torch.arange(1, 30, device="cuda")[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    # Then: no more rows pay
    times = iter([1.0, 2.0, 1.0, 2.0, *[1.0] * 6] * 4)
    monkeypatch.setattr(adopt_nf4, "microseconds", lambda work: next(times))
    steps = Steps(model.model, model.lm_head, room=64)
    assert type(steps.qkv[0]) is type(model.model.layers[1].mlp.down_proj) is NF4Linear
    assert sorted(steps.graphs) == [size for size in (*range(1, 18), *TREE_SIZES) if size <= 64]
    with torch.inference_mode():
        # transformers' own forward
        assert distance(model(input_ids=ids).logits, before) < 0.03
    steps.prefill(steps.embed(ids[0, :12]))
    assert distance(steps.verify(ids[0, 12:]).logits, before[0, 12:]) < 0.03
    reopened = Steps(model.model, model.lm_head, room=64, graphs=False)         # finds them packed
    assert reopened.qkv[0] is steps.qkv[0]


@needs_gpu
def test_a_wrong_kernel_is_told_once_and_not_used(monkeypatch, capsys):
    model, few = small_llama(device="cuda"), NF4Linear.few
    monkeypatch.setattr(NF4Linear, "few", lambda self, x, plan=None: 1.02 * few(self, x, plan))
    assert not adopt(model.model, torch.bfloat16) and not adopt(model.model, torch.bfloat16)
    assert capsys.readouterr().out.count("4-bit products are bitsandbytes': the fused product") == 1
