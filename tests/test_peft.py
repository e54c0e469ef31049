"""Methods: exact sizes, what each trains, and what each computes."""

import copy
import math
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from fedray.models import hugging_face
from fedray.models.pretrained import classifier
from fedray.peft import METHODS, Tuned, count, paper_cost_mib, table
from fedray.peft.parts import blocks_of

pytest.importorskip("transformers")
pytest.importorskip("peft")

TOWER_METHODS = sorted(
    set(METHODS) - {"coop", "soft_prompt"}
)  # of text: tests/test_clip.py, tests/test_language_peft.py


def tuned(name: str, model: Any = None, **options: Any) -> Tuned:
    torch.manual_seed(0)
    tower = hugging_face.image_tower(tiny_models.vit() if model is None else model)
    return Tuned(tower, lambda trunk: METHODS[name](trunk, **options), call=last_state)


def last_state(trunk: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return trunk(pixel_values=x).last_hidden_state


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


# --- sizes, without memory for a single weight ---


def vit_b16(num_classes: int, name: str, **options: Any) -> nn.Module:
    from transformers import AutoModel, ViTConfig

    with torch.device("meta"):
        tower = hugging_face.image_tower(AutoModel.from_config(ViTConfig()))
        return classifier(tower, num_classes, lambda trunk: METHODS[name](trunk, **options))


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("full", {}, (85_875_556, 85_833_261, 85_800_194)),
        ("head", {}, (76_900, 34_605, 1_538)),
        ("bias", {}, (179_812, 137_517, 104_450)),
        ("adapter", {}, (225_220, 182_925, 149_858)),
        ("prompt", {}, (169_060, 126_765, 93_698)),
        ("adapter", {"shared": False}, (1_856_740, 1_814_445, 1_781_378)),
        ("layernorm", {}, (115_300, 73_005, 39_938)),
        ("lora", {"rank": 4}, (224_356, 182_061, 148_994)),
        ("lora", {"rank": 8}, (371_812, 329_517, 296_450)),
        ("prompt", {"depth": "shallow"}, (84_580, 42_285, 9_218)),  # the head, and 10 × 768
        ("last_blocks", {}, (7_164_772, 7_122_477, 7_089_410)),  # the head, and a block of 7,087,872
        ("ia3", {}, (132_196, 89_901, 56_834)),  # the head, and 12 × (768 + 768 + 3072)
    ],
)
def test_fedpefts_table_of_parameters_comes_out_to_the_digit(name, options, sizes):
    for num_classes, size in zip((100, 45, 2), sizes, strict=True):
        found = count(vit_b16(num_classes, name, **options))
        assert (found.trained, found.bytes) == (size, 4 * size)


@pytest.mark.parametrize(
    ("name", "percent"),
    [("full", 100), ("head", 0.090), ("bias", 0.209), ("adapter", 0.262), ("prompt", 0.197), ("layernorm", 0.134)],
)
def test_percentages_are_of_full_fine_tuning(name, percent):
    assert round(100 * count(vit_b16(100, name)).trained / 85_875_556, 3) == percent


@pytest.mark.parametrize(
    ("name", "clients", "exact", "papers"),
    [
        ("full", 8, 2620.7, 2.56 * 1024),
        ("full", 4, 1310.4, 1.28 * 1024),
        ("full", 2, 655.2, 655),
        ("full", 1, 327.6, 328),
        ("head", 8, 2.35, 2.44),
        ("head", 64, 18.77, 19.53),
        ("bias", 8, 5.49, 5.49),
        ("adapter", 8, 6.87, 7.02),
        ("prompt", 8, 5.16, 5.19),
    ],
)
def test_fedpefts_table_of_megabytes_comes_out(name, clients, exact, papers):
    found = count(vit_b16(100, name))
    assert clients * found.mib == pytest.approx(exact, abs=0.06 if exact > 100 else 0.006)
    assert paper_cost_mib(found.trained, clients) == pytest.approx(papers, rel=0.003)


def test_clips_towers_have_their_published_sizes():
    from transformers import AutoModel, CLIPConfig

    with torch.device("meta"):
        for patch, tower, whole in ((16, 85_799_424, 149_620_737), (32, 87_456_000, 151_277_313)):
            model = AutoModel.from_config(CLIPConfig(vision_config={"patch_size": patch}))
            assert count(model).total == whole
            assert count(METHODS["full"](model.vision_model)).trained == tower
        assert count(METHODS["bias"](model.vision_model)).trained == 102_912
        assert count(METHODS["layernorm"](model.vision_model)).trained == 39_936
        assert count(METHODS["bias"](model.text_model)).trained == 68_096


def test_a_table_of_sizes_is_markdown():
    rows = table({name: vit_b16(100, name) for name in ("full", "bias")}, clients=8).splitlines()
    assert rows[2:] == ["| full | 85,875,556 | 100.000 | 2620.71 |", "| bias | 179,812 | 0.209 | 5.49 |"]


# --- what is trained ---

EXPECTED = {
    "full": lambda name: True,
    "head": lambda name: False,
    "bias": lambda name: name.endswith(".bias"),
    "layernorm": lambda name: "layernorm" in name,
    "prompt": lambda name: name.endswith(".prompts.tokens"),
    "adapter": lambda name: name.startswith("trunk.layers.0.mlp.adapter."),
    "lora": lambda name: name.endswith((".lora_A.default.weight", ".lora_B.default.weight")),
    "ia3": lambda name: name.endswith(".ia3_l.default"),
    "last_blocks": lambda name: name.startswith("trunk.layers.2."),
}


@pytest.mark.parametrize("make", [tiny_models.vit, tiny_models.dinov2, lambda: tiny_models.clip().vision_model])
@pytest.mark.parametrize("name", TOWER_METHODS)
def test_exactly_the_chosen_part_is_trained_and_gets_gradients(name, make):
    model = tuned(name, make()).eval()
    own = {tensor_name for tensor_name, _ in model.named_parameters()}
    if make is tiny_models.vit:
        assert set(trained(model)) == set(filter(EXPECTED[name], own))
    chosen = trained(model)
    assert bool(chosen) == (name != "head")
    if chosen:
        gradients = torch.autograd.grad(model(images()).square().sum(), list(chosen.values()), allow_unused=True)
        silent = {
            key for key, gradient in zip(chosen, gradients, strict=True) if gradient is None or not gradient.any()
        }
        never = ("mask_token", "post_layernorm", "lora_A", "adapter.down")  # unused, or behind a zero at the start
        assert {key for key in silent if not any(part in key for part in (*never, "k_proj.bias"))} == set()


@pytest.mark.parametrize("name", ["head", "bias", "layernorm", "adapter", "lora", "ia3", "full", "last_blocks"])
def test_at_the_start_the_model_is_the_pre_trained_one(name):
    torch.testing.assert_close(tuned(name).eval()(images()), tuned("head").eval()(images()))


@pytest.mark.parametrize("name", TOWER_METHODS)
def test_the_frozen_part_stays_in_evaluation_mode(name):
    model = tuned(name).train()
    for path, module in model.trunk.named_modules():
        own = [p.requires_grad for p in module.parameters(recurse=False)]
        if own:
            assert module.training == all(own), path
        elif isinstance(module, nn.Dropout) and name not in ("full", "last_blocks"):
            assert module.training == ("prompts" in path), path
    drops = not torch.equal(model(images()), model(images()))
    assert drops == (name in ("full", "last_blocks", "prompt"))
    assert not any(module.training for module in model.eval().modules())


def test_loras_own_dropout_is_on_in_training_only():
    model = tuned("lora", dropout=0.5)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            nn.init.ones_(p)
    model.train()
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), model(images()))


# --- what it computes ---


def explicit(model: Any, x: torch.Tensor, prompts: list[torch.Tensor | None], cut_always: bool) -> torch.Tensor:
    """VPT (Jia et al., 2022, equations 4 to 7), with the prompts at the end, as a loop over a plain ViT's parts."""
    hidden = model.embeddings(x)
    length = hidden.shape[1]
    for block, tokens in zip(model.layers, prompts, strict=True):
        if tokens is not None:
            hidden = torch.cat([hidden, tokens.expand(len(x), -1, -1)], 1)
        hidden = block(hidden)
        hidden = hidden[:, :length] if cut_always else hidden
    return model.layernorm(hidden[:, :length])


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_visual_prompts_equal_an_explicit_loop(depth):
    plain = tiny_models.vit()
    model = tuned("prompt", copy.deepcopy(plain), length=3, depth=depth).eval()
    tokens = list(trained(model).values())
    assert [tuple(t.shape) for t in tokens] == [(3, 8)] * (3 if depth == "deep" else 1)
    assert all(t.detach().abs().max() <= math.sqrt(6 / (3 * 16 + 8)) and t.any() for t in tokens)
    expected = explicit(plain, images(), tokens if depth == "deep" else [*tokens, None, None], depth == "deep")
    assert torch.equal(model(images()), expected)
    assert not torch.allclose(expected, tuned("head").eval()(images()))


def test_prompts_are_dropped_out_while_the_backbone_is_not():
    assert torch.equal(*(tuned("prompt", dropout=0.0).train()(images()) for _ in range(2)))


def adapter_steps(init: str) -> dict[str, bool]:
    """Which of the adapter's tensors 20 steps of the authors' optimizer move."""
    model = tuned("adapter", init=init, reduction=2)
    start = {name: p.detach().clone() for name, p in trained(model).items()}
    optimizer = torch.optim.SGD(trained(model).values(), lr=5e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for _ in range(20):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    return {name.split("adapter.")[1]: not torch.equal(p, start[name]) for name, p in trained(model).items()}


def test_the_authors_all_zero_adapter_moves_only_the_upper_bias():
    never, always = dict.fromkeys(("down.weight", "down.bias", "up.weight"), False), {"up.bias": True}
    assert adapter_steps("authors_all_zero") == never | always
    assert adapter_steps("up_zero") == dict.fromkeys(never | always, True)


def test_an_adapter_stands_on_the_mlps_output_in_every_block():
    plain = tiny_models.vit()
    model = tuned("adapter", copy.deepcopy(plain)).eval()
    adapter = model.trunk.layers[0].mlp.adapter
    nn.init.normal_(adapter.up.weight)
    assert sum(isinstance(module, type(adapter)) for module in model.modules()) == 1
    own = [block.mlp.adapter for block in tuned("adapter", shared=False).trunk.layers]
    assert len({id(a) for a in own}) == 3
    hidden = plain.embeddings(images())
    for block in plain.layers:
        hidden = hidden + block.attention(block.layernorm_before(hidden))[0]
        m = block.mlp(block.layernorm_after(hidden))
        hidden = hidden + m + adapter.up(nn.functional.gelu(adapter.down(m)))
    torch.testing.assert_close(model(images()), plain.layernorm(hidden))


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_lora_adds_the_scaled_product(stabilised, scale):
    model = tuned("lora", rank=4, alpha=6.0, rank_stabilised=stabilised).eval()
    layer = model.trunk.layers[1].attention.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((4, 8), (8, 4))
    assert not b.any()
    nn.init.normal_(b)
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * x @ (b @ a).T)


# --- mistakes ---


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("last_blocks", {"count": 4}, "count is 4; it must be between 1 and 3"),
        ("prompt", {"length": 0}, "length is 0; it must be >= 1"),
        ("prompt", {"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ("adapter", {"reduction": 9}, "reduction is 9; it must be between 1 and the width, 8"),
        ("lora", {"rank": 0}, "rank is 0; it must be >= 1"),
        ("lora", {"dropout": -0.1}, "dropout is -0.1; it must be"),
        ("lora", {"targets": ["query", "value"]}, r"targets is \['query', 'value'\]; .*'q_proj'"),
        ("ia3", {"targets": ["nothing"]}, r"targets is \['nothing'\]"),
        ("soft_prompt", {}, "does not embed tokens; soft prompts are for language models"),
        ("coop", {}, "coop learns the text prompts of CLIP; use it with task.model.name=clip"),
    ],
)
def test_impossible_options_say_what_to_do(name, options, message):
    with pytest.raises(ValueError, match=message):
        tuned(name, **options)


def test_a_network_of_stages_has_no_blocks():
    with pytest.raises(ValueError, match="no list of equal blocks; choose full"):
        blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])))
    with pytest.raises(ValueError, match="has no biases; choose another method"):
        METHODS["bias"](nn.Linear(2, 2, bias=False))
