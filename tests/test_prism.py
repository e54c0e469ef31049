"""PRISM and FedPM: mask layers, bits on their way, the server's moving average, and matching of features."""

import base64
import json
import math
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from problems import SIZES, Exam, assert_same_bits, generation_of_digits, make, masked, train
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from fedray.aggregators import total
from fedray.algorithm import Client, ClientResult
from fedray.backends.serial import SerialBackend
from fedray.bits import code, coded_bits, decode, distance, draw, flat, pack, shaped, split, unpack, unpacking
from fedray.data.dataset import make_dataset
from fedray.data.datasets import digits
from fedray.data.partitions import iid
from fedray.errors import DataError
from fedray.experiment import plan
from fedray.export import export, load_masked
from fedray.learner import Learner
from fedray.ledger import Ledger, MeteredBackend
from fedray.local_training import LocalTraining
from fedray.mask_privacy import MaskPrivacy, gaussian_epsilon
from fedray.metrics.quality import frechet_distance
from fedray.models.feature_maps import Vgg19, small_cnn
from fedray.models.image_generators import masked_resnet_generator, released_bytes, resnet_generator
from fedray.models.masked import Masking, mask
from fedray.models.masked import masked as masked_model
from fedray.models.nets import paired_conv
from fedray.models.pictures import in_range
from fedray.runs import run
from fedray.tasks.generation import Generation, generation
from fedray.tasks.matching import MATCHINGS, Objective

LOCAL = LocalTraining(local_optimizer="adam", local_lr=0.1, local_beta1=0.5, batch_size=4)


def scores(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- mask layers


@pytest.mark.parametrize(("channels", "count"), [(1, 3_543_616), (3, 3_544_768)])
def test_the_papers_generator_has_the_papers_number_of_masked_weights(channels, count):
    with torch.device("meta"):
        model = resnet_generator((channels, 32, 32))
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == count
    small = masked_resnet_generator((channels, 16, 16), width=2, latent=3)
    assert sum(s.numel() for s in scores(small).values()) == sum(
        layer.weight.numel() for layer in small.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    )
    assert all(name.endswith("scores") for name in scores(small))
    assert small(torch.randn(5, 3)).shape == (5, channels, 16, 16)


def test_frozen_weights_are_signed_constants_by_pytorchs_fan_in_and_follow_from_the_seed():
    def weights(kind: str) -> list[torch.Tensor]:
        torch.manual_seed(4)
        model = nn.Sequential(nn.ConvTranspose2d(6, 5, 4), nn.Conv2d(5, 3, 3), nn.Linear(7, 2))
        mask(model, Masking(kind))
        return [layer.parametrizations.weight.original for layer in model]

    for w, fan_in in zip(weights("signed_constant"), (5 * 16, 5 * 9, 7), strict=True):
        torch.testing.assert_close(w.abs(), torch.full_like(w, math.sqrt(2 / fan_in)))
        assert 0 < (w > 0).float().mean() < 1
        assert not w.requires_grad
    for w, fan_in in zip(weights("fedpm"), (5 * 16, 5 * 9, 7), strict=True):
        torch.testing.assert_close(w.abs(), torch.full_like(w, math.e / math.sqrt(fan_in)))
    assert weights("kaiming_normal")[0].std() == pytest.approx(math.sqrt(2 / 80), rel=0.1)
    assert all(torch.equal(a, b) for a, b in zip(weights("fedpm"), weights("fedpm"), strict=True))


def layer_with(scored: list[float], **options: object) -> nn.Module:
    layer = mask(nn.Linear(len(scored), 1), Masking(**options))
    with torch.no_grad():
        layer.parametrizations.weight[0].scores.copy_(torch.tensor([scored]))
    return layer


def test_scores_begin_as_they_are_said_to():
    torch.manual_seed(2)
    for kind, bound in (("uniform", 0.1), ("kaiming_uniform", 400**-0.5)):
        s = layer_with_scores(kind)
        assert float(s.abs().max()) == pytest.approx(bound, rel=0.01)
        assert float(s.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert float(layer_with_scores("normal").std()) == pytest.approx(1, rel=0.05)


def layer_with_scores(kind: str) -> torch.Tensor:
    return mask(nn.Linear(400, 10), Masking(scores=kind)).parametrizations.weight[0].scores.detach()


def test_every_forward_pass_draws_a_mask_with_the_scores_probabilities():
    torch.manual_seed(0)
    layer = layer_with([-2.0, 0.0, 2.0])
    w = layer.parametrizations.weight.original
    drawn = torch.stack([(layer.weight / w).detach()[0] for _ in range(4000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), torch.sigmoid(torch.tensor([-2.0, 0.0, 2.0])), rtol=0, atol=0.03)


@pytest.mark.parametrize("scaled", [True, False])
def test_the_gradient_is_straight_through_or_that_times_theta(scaled):
    layer = layer_with([-1.0, 0.5, 2.0], scaled_gradient=scaled)
    s, w = layer.parametrizations.weight[0].scores, layer.parametrizations.weight.original
    x = torch.tensor([[1.0, -2.0, 3.0]])
    [gradient] = torch.autograd.grad(layer(x).sum(), [s])
    theta = torch.sigmoid(s)
    expected = x * w * theta * (1 - theta) * (theta if scaled else 1)
    torch.testing.assert_close(gradient, expected.detach())


def test_top_k_keeps_the_largest_and_a_threshold_the_probable():
    top = layer_with([-3.0, 0.1, 2.0, -0.2], mode="top_k", keep=0.5)
    assert (top.weight != 0).tolist() == [[True, False, True, False]]
    assert torch.equal(top.weight, top.weight)
    above = layer_with([-3.0, 0.1, 2.0, -0.2], mode="threshold")
    assert (above.weight != 0).tolist() == [[False, True, True, False]]
    with pytest.raises(ValueError, match=r"keep is 0.0; it must be above 0"):
        Masking(keep=0.0)


# --- bits


def test_bits_survive_packing_whatever_their_number():
    for size in (1, 7, 8, 9, 1000):
        bits = draw(torch.full((size,), 0.4), seed=size)
        assert len(pack(bits)) == -(-size // 8)
        assert torch.equal(unpack(pack(bits), size).bool(), bits)


def test_trees_survive_being_flat_and_splits_hold_everything():
    tree = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0), "c": torch.ones(())}
    again = shaped(flat(tree), tree)
    assert all(torch.equal(again[name], tree[name]) for name in tree)
    assert [list(part) for part in split(tree, 0.5)] == [["a"], ["b", "c"]]
    assert [list(part) for part in split(tree, 0.0)] == [[], ["a", "b", "c"]]
    assert [list(part) for part in split(tree, 1.0)] == [["a", "b", "c"], []]


def test_a_share_may_be_of_weights_of_tensors_or_of_the_released_entries():
    with torch.device("meta"):
        generator = resnet_generator((1, 32, 32))
    tensors = {name: p for name, p in generator.named_parameters() if p.dim() > 1}
    assert len(tensors) == 11
    assert [len(split(tensors, share, "tensors")[0]) for share in (0, 0.1, 0.5, 1)] == [0, 2, 6, 11]

    def masks(alpha: float) -> int:
        """By the released code: the 20 entries, the last of which are scores; the later entry of a tensor counts."""
        entries = [0, *(1 + 3 * block + k for block in range(3) for _ in range(2) for k in range(3)), 10]
        scores = int(alpha * len(entries))
        is_score = {tensor: place >= len(entries) - scores for place, tensor in enumerate(entries)}
        return sum(not score for score in is_score.values())

    for alpha in (0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0):
        assert len(split(tensors, 1 - alpha, "released")[0]) == masks(alpha), alpha
    with pytest.raises(ValueError, match="alpha_of is released, which needs the masked_resnet_generator"):
        split({"a": torch.zeros(2)}, 0.5, "released")


def test_masks_are_added_bit_by_bit_and_in_any_grouping():
    masks = [draw(torch.full((13,), 0.5), seed) for seed in range(6)]
    rule = unpacking(total(), 13)
    results = [ClientResult({"masks": [pack(m)], "scores": {}}, 1) for m in masks]
    whole = rule.zero()
    for result in results:
        whole = rule.accumulate(whole, Client(0, 0), result)
    parts = [rule.zero(), rule.zero()]
    for k, result in enumerate(results):
        parts[k % 2] = rule.accumulate(parts[k % 2], Client(0, 0), result)
    (ones, count), merged = rule.report(whole), rule.report(rule.merge(*parts))
    assert count == 6
    assert torch.equal(ones["ones"], torch.stack(masks).sum(0).float())
    assert torch.equal(merged[0]["ones"], ones["ones"])


def test_distances_of_masks():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False])
    assert distance(a, b) == 0.25
    assert distance(a, b, "cosine") == pytest.approx(1 - 1 / math.sqrt(2))
    assert distance(a, a, "cosine") == pytest.approx(0)


# --- the algorithm


def states(**options):
    return [r.state for r in train(masked(), make("prism", local=LOCAL, **options), SerialBackend(masked()), 3)]


def test_a_client_sends_a_bit_a_weight_and_receives_scores():
    size = len(flat(Learner(masked(), "cpu").params()))
    for masks in (1, 3):
        ledger = Ledger()
        train(masked(), make("prism", local=LOCAL, masks=masks), MeteredBackend(SerialBackend(masked()), ledger), 1)
        assert (ledger.up, ledger.down) == (7 * masks * -(-size // 8), 7 * 4 * size)


def test_without_mada_the_scores_are_the_logits_of_the_mean_mask():
    [first, *_] = states(mada="none")
    share = flat(first.params).sigmoid()
    levels = 0.01 + 0.98 * torch.arange(8) / 7
    assert (share[:, None] - levels).abs().min(1).values.max() < 1e-5


def test_mada_at_rate_one_is_no_mada_and_at_rate_zero_stands_still():
    assert_same_bits(states(mada="fixed", rate=1.0)[-1].params, states(mada="none")[-1].params)
    [first, *_] = states(mada="fixed", rate=0.0)
    assert_same_bits(first.params, Learner(masked(), "cpu").params())


def test_mada_moves_as_far_as_the_masks_differ():
    history = train(masked(), make("prism", local=LOCAL), SerialBackend(masked()), 1)
    [off] = train(masked(), make("prism", local=LOCAL, mada="none"), SerialBackend(masked()), 1)
    d = history[0].metrics["mada_weight"]
    assert 0 < d < 1
    old = Learner(masked(), "cpu").params()
    for name, s in history[0].state.params.items():
        torch.testing.assert_close(s, d * off.state.params[name] + (1 - d) * old[name])
    [other] = train(masked(), make("prism", local=LOCAL, similar=True), SerialBackend(masked()), 1)
    assert other.metrics["mada_weight"] == pytest.approx(1 - d)


def test_a_posterior_that_is_not_reset_is_the_mean_of_all_masks():
    once, twice, thrice = states(mada="none", reset_every=100)
    assert [s.masks for s in (once, twice, thrice)] == [7, 14, 21]
    assert (twice.ones >= once.ones).all()
    torch.testing.assert_close(flat(thrice.params).sigmoid(), 0.01 + 0.98 * thrice.ones / 21, rtol=0, atol=1e-5)
    assert [s.masks for s in states(reset_every=2)] == [7, 14, 7]


def test_all_scores_are_averaged_at_alpha_one_as_in_fedavg():
    [plain] = train(masked(), make("prism", local=LOCAL, alpha=1.0), SerialBackend(masked()), 1)
    averaged = make("fedavg", local=LOCAL, weighting="uniform")
    [fedavg] = train(masked(), averaged, SerialBackend(masked()), 1)
    for name, s in fedavg.state.params.items():
        torch.testing.assert_close(plain.state.params[name], s, rtol=1e-5, atol=1e-6)


def test_clients_keep_their_moments():
    exam = Exam("prism", "masked")
    backend = exam.backend()
    train(exam.task(), exam.make(), backend, 2, cohort=len(SIZES))
    steps = {client: float(state["moments"]["steps"]) for client, (_, state) in backend.client_states.committed.items()}
    assert steps == {client: 2.0 * 2 * -(-size // 4) for client, size in enumerate(SIZES)}


def test_moments_that_are_kept_make_two_short_trainings_one_long_one():
    learner, quiet = Learner(masked(), "cpu"), replace(LOCAL, shuffle=False, batch_size=8)

    def loss(model: nn.Module, batch: object) -> torch.Tensor:
        return sum(s.square().sum() for s in scores(model).values())

    start, moments = learner.params(), {}
    long = learner.train(start, Client(4, 1), replace(quiet, local_steps=4), loss=loss).params
    half = learner.train(start, Client(4, 1), replace(quiet, local_steps=2), loss=loss, moments=moments).params
    both = learner.train(half, Client(4, 1), replace(quiet, local_steps=2), loss=loss, moments=moments).params
    assert_same_bits(both, long)
    forgot = learner.train(half, Client(4, 1), replace(quiet, local_steps=2), loss=loss).params
    assert not torch.equal(flat(forgot), flat(long))
    with pytest.raises(ValueError, match="local_optimizer is sgd; only adam and adamw have moments"):
        learner.train(start, Client(4, 1), LocalTraining(), moments={})


def test_options_out_of_range_say_so():
    with pytest.raises(ValueError, match="local_optimizer is sgd; scores are learnt by adam or adamw"):
        make("prism", local=LocalTraining())
    for option, value, message in (
        ("alpha", 1.5, r"alpha is 1.5; it must be in 0..1"),
        ("masks", 0, r"masks is 0; it must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make("prism", local=LOCAL, **{option: value})
    with pytest.raises(ValueError, match=r"clip is 0.5; it must be in 0..0.49"):
        MaskPrivacy(clip=0.5)
    with pytest.raises(ValueError, match=r"noise_deviation is 0.0; it must be > 0"):
        MaskPrivacy(noise_deviation=0.0)


# --- the wire, and privacy


def test_a_coded_mask_takes_its_entropy_and_comes_back():
    theta = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    bits = draw(theta, 1)
    p = theta.clamp(0.01, 0.99).double()
    ideal = float(-(torch.where(bits, p, 1 - p)).log2().sum())
    assert torch.equal(decode(code(bits, theta), theta), bits)
    assert ideal <= 8 * len(code(bits, theta)) < 1.01 * ideal + 64
    assert coded_bits(bits, torch.full_like(theta, 0.5)) == pytest.approx(1, abs=0.01)
    history = train(masked(), make("prism", local=LOCAL, coded=True), SerialBackend(masked()), 2)
    assert 0 < history[-1].metrics["coded_bits"] < 3


def test_the_papers_accounting_of_bytes_is_reproduced():
    with torch.device("meta"):
        model = resnet_generator((1, 32, 32))
    assert released_bytes(model) == 6_038_080  # 5.758 MiB, its 5.75
    assert released_bytes(model, alpha=0.8) == 15_304_960  # 14.60 MiB, its 15


def drawn_with(s: dict[str, torch.Tensor], seed: int = 0, **options: object) -> torch.Tensor:
    return MaskPrivacy(**options).probabilities(s, seed)["w"]


def test_the_released_noise_has_no_effect_and_the_others_have():
    s = {"w": torch.linspace(-3, 3, 50)}
    release = [drawn_with(s, seed, noise="release", clip=0.1) for seed in (0, 1)]
    assert torch.equal(release[0], release[1])
    assert torch.equal(release[0], s["w"].clamp(0.1, 0.9))
    torch.testing.assert_close(drawn_with(s, clip=0.1), s["w"].sigmoid().clamp(0.1, 0.9))
    for noise in ("code_intent", "gaussian"):
        noisy = [drawn_with(s, seed, noise=noise, clip=0.1) for seed in (0, 1)]
        assert not torch.equal(noisy[0], noisy[1])
        assert all(float(t.min()) >= 0.1 - 1e-6 and float(t.max()) <= 0.9 + 1e-6 for t in noisy)
    intent = MaskPrivacy("code_intent", 0.1)
    assert intent.deviation(1_048_576) == pytest.approx(35.6, abs=0.05)  # of the first layer, in the specification
    little = drawn_with(s, noise="gaussian", clip=0.2, noise_deviation=1e-6)
    torch.testing.assert_close(little, s["w"].sigmoid().clamp(0.2, 0.8), rtol=0, atol=1e-5)


def test_the_account_says_what_the_noise_supports_and_whether_that_is_what_is_claimed():
    s = {"a": torch.zeros(1000), "b": torch.zeros(500)}
    assert MaskPrivacy().account(s, 1, 1) == {}
    assert MaskPrivacy("release").account(s, 1, 1) == {"claim_holds": 0}
    found = MaskPrivacy("release", 0.1).account(s, 1, 2)
    assert found == {"epsilon": pytest.approx(2 * 1500 * math.log(9)), "claim_holds": 0}
    one, many = (MaskPrivacy("code_intent", 0.1).account(s, rounds, 3)["epsilon"] for rounds in (1, 100))
    assert 0 < one < many
    assert many > 9.8
    # Balle and Wang, 2018: a mechanism of mu = 1 has epsilon 4.38 at this delta
    assert gaussian_epsilon(1.0) == pytest.approx(4.377, abs=0.01)
    honest = MaskPrivacy("gaussian", 0.25, 4.4, noise_deviation=0.5 * math.sqrt(1500))
    assert honest.account(s, 1, 5) == {"epsilon": pytest.approx(gaussian_epsilon(1.0)), "claim_holds": 1}
    assert honest.account(s, 4, 1) == {"epsilon": pytest.approx(gaussian_epsilon(2.0)), "claim_holds": 0}
    assert honest.account(s, 1, 5, bare=True) == {"claim_holds": 0}
    privacy = MaskPrivacy(clip=0.1)
    history = train(masked(), make("prism", local=LOCAL, privacy=privacy), SerialBackend(masked()), 2)
    size = len(flat(Learner(masked(), "cpu").params()))
    assert [r.metrics["epsilon"] for r in history] == pytest.approx([n * size * math.log(9) for n in (1, 2)])
    assert [r.metrics["claim_holds"] for r in history] == [0, 0]


# --- matching of features


def pictures_task(**options) -> Generation:
    draw_ = np.random.default_rng(0)
    columns = {"x": draw_.integers(0, 256, (40, 1, 8, 8)).astype(np.uint8), "y": np.arange(40) % 2}
    data = make_dataset("noise", columns, columns, ["a", "b"])
    settings = {"partition": lambda d, seed: iid(d, seed, num_clients=4), "size": 8}
    folder = tempfile.mkdtemp()
    settings["features"] = lambda shape: small_cnn(shape, data, width=2, epochs=1, cache=folder)
    settings["model"] = lambda shape: masked_resnet_generator(shape, width=4, latent=5)
    return generation(0, data=data, **(settings | options))


def test_the_moments_of_a_client_are_those_of_its_pictures():
    task = pictures_task()
    learner = Learner(task, "cpu")
    kept = task.objective(learner, Client(1, 7), None).kept
    x = in_range(task.examples(1)["x"], 8)
    features = task.feature_maps.on(learner.device)(x)[0]
    torch.testing.assert_close(kept["mean"], features.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kept["var"], features.var(0), rtol=1e-4, atol=1e-6)
    assert kept["a"].abs().max() <= len(kept["a"]) ** -0.5


def test_the_adam_moving_average_follows_the_differences_of_moments():
    class Fixed(nn.Module):
        latent = 2

        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.tensor(0.0))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.level + 0 * z

    kept = {"mean": torch.tensor([1.0, -1.0]), "var": torch.zeros(2), "steps": torch.zeros(())}
    kept |= {f"{v}{m}": torch.zeros(2) for v in "ab" for m in ("", "_first", "_second")}
    matching, model = Objective(lambda x: (x, x), kept, MATCHINGS["adam"](0.05)), Fixed()
    ours, theirs = [], torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=0.05, betas=(0.5, 0.999))
    for _ in range(5):
        loss = matching(model, {"x": torch.zeros(3, 2)})
        adam.zero_grad()
        (theirs - torch.tensor([1.0, -1.0])).square().mean().backward()
        adam.step()
        ours.append(loss.item())
    torch.testing.assert_close(kept["a"], theirs.detach(), rtol=1e-4, atol=1e-6)
    assert ours[-1] == pytest.approx(float(kept["a"] @ torch.tensor([1.0, -1.0])), rel=1e-5)
    [gradient] = torch.autograd.grad(matching(model, {"x": torch.zeros(3, 2)}), [model.level])
    assert float(gradient) == pytest.approx(-float(kept["a"].sum()), abs=1e-6)


@pytest.mark.parametrize("matching", MATCHINGS)
def test_a_federation_of_masks_is_the_same_for_any_number_of_shares(matching):
    task = pictures_task(matching=MATCHINGS[matching]())
    local = replace(LOCAL, local_steps=2)
    found = []
    for shares in (1, 3):
        backend = SerialBackend(task, shares)
        [_, last] = train(task, make("prism", 4, local=local), backend, cohort=4)
        found.append((last.state, last.metrics, backend.client_states))
    assert_same_bits(found[0], found[1])


def test_the_distance_that_is_measured_is_the_frechet_distance_of_features():
    task = pictures_task()
    learner = Learner(task, "cpu")
    params = learner.params()
    metrics = learner.test(params)
    again = Learner(task, "cpu").test(params)
    assert metrics == again
    seen = []
    maps = task.feature_maps.on(learner.device)
    handle = maps.register_forward_hook(lambda _m, _i, out: seen.append(out[1].numpy().astype(np.float64)))
    learner.test(params)
    handle.remove()
    assert metrics["frechet_distance"] == pytest.approx(frechet_distance(*seen), rel=1e-4)


def test_a_substitute_is_trained_once_and_learns(tmp_path, monkeypatch):
    data = digits()
    made = small_cnn((1, 8, 8), data, epochs=4, cache=str(tmp_path))
    network = made.on(torch.device("cpu"))
    x, y = (torch.from_numpy(np.array(data.test[name])) for name in ("x", "y"))
    assert float((network.logits(in_range(x, 8)).argmax(1) == y).float().mean()) > 0.6
    monkeypatch.setattr("fedray.models.feature_maps._trained", None)
    again = small_cnn((1, 8, 8), data, epochs=4, cache=str(tmp_path)).on(torch.device("cpu"))
    assert_same_bits(dict(again.state_dict()), dict(network.state_dict()))


def test_vgg_has_the_papers_number_of_features():
    with torch.device("meta"):
        found, pooled = Vgg19()(torch.zeros(2, 1, 32, 32))
    assert found.shape == (2, 303_104)
    assert pooled.shape == (2, 512)


def test_a_configuration_of_prism_runs_and_says_what_it_was_compared_by(tmp_path):
    values = {
        "rounds": 2,
        "cohort": 3,
        "task": generation_of_digits(
            tmp_path / "c", {"name": "masked_resnet_generator", "width": 4, "latent": 4, "scores": "uniform"}
        ),
        "algorithm": {"name": "prism", "local_optimizer": "adam", "local_steps": 2},
        "backend": "serial",
    }
    assert len(plan(values).experiment.task.sizes) == 3
    done = run(values, out=tmp_path / "run")
    assert done.final["frechet_distance"] > 0
    assert '"substitute CNN"' in (tmp_path / "run" / "evaluation.json").read_text()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Distances are by: substitute CNN" in page
    sheets = [tmp_path / "run" / "samples" / f"{number:06d}.png" for number in range(3)]
    assert sorted((tmp_path / "run" / "samples").iterdir()) == sheets
    shown = [np.asarray(Image.open(path)) for path in sheets]
    assert all(picture.shape == (6 * 8, 6 * 8) and picture.std() > 0 for picture in shown)
    assert not np.array_equal(shown[0], shown[2])
    assert all(base64.b64encode(path.read_bytes()).decode() in page for path in sheets)
    assert parametrize.is_parametrized(plan(values).experiment.task.model().first)
    folder = export(tmp_path / "run", tmp_path / "mask")
    model, about = load_masked(folder), json.loads((folder / "mask.json").read_text())
    assert (folder / "mask.safetensors").stat().st_size < 200 + about["bytes"] < 200 + about["bytes_float32"] / 30
    assert not any(name.endswith("scores") for name, _ in model.named_parameters())
    weights = torch.cat([p.flatten() for p in model.parameters() if p.dim() > 1])
    assert len(weights) == about["weights"]
    assert float((weights != 0).float().mean()) == pytest.approx(about["density"])
    z = torch.randn(3, 4)
    assert torch.equal(model(z), model(z))
    trained = Learner(plan(values).experiment.task, "cpu").load(load_file(tmp_path / "run" / "model.safetensors"))
    theta = {name: s.sigmoid() for name, s in scores(trained).items()}
    sure = torch.cat([t.flatten() for t in theta.values()])
    order = [p for p in model.parameters() if p.dim() > 1]
    bits = torch.cat([(p != 0).flatten() for p in order]).float()
    assert (
        float((bits * sure.detach()).sum() / bits.sum()) > float(sure.detach().mean()) + 0.01
    )  # what is kept was likely
    (folder / "mask.safetensors").unlink()
    with pytest.raises(DataError, match="holds no exported mask"):
        load_masked(folder)


@pytest.mark.parametrize("depth", [4, 6, 10])
def test_every_weight_of_fedpms_networks_has_a_score(depth):
    with torch.device("meta"):
        plain = paired_conv((3, 32, 32), 10, depth)
        model = masked_model((3, 32, 32), 10, lambda shape, classes: paired_conv(shape, classes, depth))
    weights = sum(p.numel() for p in plain.parameters() if p.dim() > 1)
    assert sum(s.numel() for s in scores(model).values()) == weights
    assert len(scores(model)) == depth + 3


def test_fedpm_learns_a_mask_of_a_classifier(tmp_path):
    values = {
        "rounds": 12,
        "cohort": 5,
        "task": {
            "name": "classification",
            "data": "digits",
            "partition": {"name": "iid", "num_clients": 5},
            "model": {"name": "masked", "of": {"name": "mlp", "hidden": [64]}, "frozen": "fedpm"},
        },
        "algorithm": {"name": "prism", "mada": "none", "local_optimizer": "adam", "local_lr": 0.1, "local_epochs": 2},
        "backend": "serial",
    }
    assert run(values, out=tmp_path / "run").final["test_accuracy"] > 0.8
