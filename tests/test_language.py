"""Language modelling: the model sees no further than it may, and the task keeps every law of the others."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import LOCAL, assert_same_bits, copy, initial, make

from fedray import cli, config, groups
from fedray.algorithm import EVERYONE
from fedray.backends.serial import SerialBackend
from fedray.data.tokens import Reading, text_dataset
from fedray.evaluation import evaluate
from fedray.execution import Execution
from fedray.experiment import plan
from fedray.learner import Learner
from fedray.models import LANGUAGE_MODELS
from fedray.rounds import rounds
from fedray.samplers import Population
from fedray.tasks import language
from fedray.tasks.language import LanguageModeling, language_modeling

LENGTH = 6
ALGORITHMS = ("fedavg", "fedprox", "fedadam", "scaffold", "fednova", "feddyn")  # whose clients may train together


def task(**options) -> LanguageModeling:
    """Nine clients, each with an alphabet of its own habits."""
    draw = np.random.default_rng(3)
    texts = {
        f"client{i}": ["".join(draw.choice(list("abcdefgh"), 30 + 9 * i, p=draw.dirichlet(np.ones(8))))]
        for i in range(9)
    }
    data = text_dataset("toy", texts, Reading("characters", LENGTH, test_fraction=0.25))
    small = {"width": 8, "depth": 2, "heads": 2} | options
    return language_modeling(0, data=data, model=lambda *shape: LANGUAGE_MODELS["transformer"](*shape, **small))


def trained(name: str, made: LanguageModeling, backend: SerialBackend, local=LOCAL) -> list:
    algorithm = make(name, local=local)
    loop = rounds(algorithm, initial(made, algorithm), backend, Population(made.sizes), 7)
    return [next(loop) for _ in range(2)]


# The model


def tiny(kind: str, folder) -> torch.nn.Module:
    if kind == "transformer":
        return LANGUAGE_MODELS["transformer"](50, 12, width=16, heads=2)
    transformers = pytest.importorskip("transformers")
    configs = {
        "gpt2": transformers.GPT2Config(vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=2),
        "llama": transformers.LlamaConfig(
            vocab_size=50,
            max_position_embeddings=12,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
    }
    configs[kind].save_pretrained(folder)
    return LANGUAGE_MODELS["causal_lm"](50, 12, path=str(folder), weights="random")


@pytest.mark.parametrize("kind", ["transformer", "gpt2", "llama"])
def test_a_later_token_never_changes_earlier_logits(kind, tmp_path):
    torch.manual_seed(0)
    model = tiny(kind, tmp_path).eval()
    tokens = torch.randint(50, (3, 12))
    with torch.no_grad():
        before = model(tokens)
        assert before.shape == (3, 12, 50)
        for place in range(12):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 1) % 50
            after = model(changed)
            torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-6)
            different = (after[:, place:] - before[:, place:]).abs().amax((0, 2))
            assert (different > 1e-5).all()  # but all that follows, it does


def test_a_shorter_sequence_is_continued_as_the_beginning_of_a_longer_one():
    torch.manual_seed(0)
    model = tiny("transformer", None).eval()
    tokens = torch.randint(50, (2, 12))
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5])


@pytest.mark.parametrize(
    ("options", "count"), [({}, 137_216), ({"width": 128, "depth": 4}, 867_328), ({"heads": 1}, 137_216)]
)
def test_parameters_are_as_many_as_the_formula_says(options, count):
    model = LANGUAGE_MODELS["transformer"](256, 64, **options)
    width, depth = options.get("width", 64), options.get("depth", 2)
    block = 12 * width**2 + 13 * width
    assert (256 + 64) * width + depth * block + 2 * width + width * 256 + 256 == count
    assert sum(p.numel() for p in model.parameters()) == count
    assert not list(model.buffers())


def test_the_initial_model_knows_nothing():
    made = task()
    loss = Learner(made, "cpu").test(Learner(made, "cpu").params())["test_loss"]
    assert loss == pytest.approx(math.log(made.data.vocabulary), abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "^heads is 3; it must divide 64, the width"),
        ({"width": 0}, "^width is 0; it must be >= 1"),
        ({"depth": 0}, "^depth is 0; it must be >= 1"),
        ({"dropout": 1.0}, r"^dropout is 1\.0; it must be at least 0 and below 1"),
    ],
)
def test_options_that_a_model_cannot_have_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LANGUAGE_MODELS["transformer"](256, 64, **options)


# Hugging Face's


@pytest.fixture
def gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    settings = transformers.GPT2Config(vocab_size=50, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    network = transformers.GPT2LMHeadModel(settings)
    network.save_pretrained(tmp_path / "gpt2")
    network.transformer.save_pretrained(tmp_path / "headless")
    transformers.BertConfig(vocab_size=50).save_pretrained(tmp_path / "bert")
    return network, tmp_path


def test_a_saved_model_gives_the_logits_that_it_gave(gpt2):
    network, folder = gpt2
    model = LANGUAGE_MODELS["causal_lm"](50, 12, path=str(folder / "gpt2"))
    tokens = torch.randint(50, (2, 12))
    torch.testing.assert_close(model.eval()(tokens), network.eval()(tokens).logits)
    assert {name.removeprefix("trunk.") for name, _ in model.named_parameters()} == set(
        dict(network.named_parameters())
    )
    again = [LANGUAGE_MODELS["causal_lm"](50, 12, path=str(folder / "gpt2")) for _ in range(2)]
    assert_same_bits(again[0].state_dict(), again[1].state_dict())


def test_a_saved_model_trains_and_the_shares_change_nothing(gpt2):
    made = task()
    path = str(gpt2[1] / "gpt2")
    made = replace(made, build_model=lambda *shape: LANGUAGE_MODELS["causal_lm"](*shape, path=path))
    alone, shared = (trained("fedavg", made, SerialBackend(made, shares)) for shares in (1, 3))
    assert_same_bits([r.state for r in alone], [r.state for r in shared])
    assert alone[1].metrics["train_loss"] < alone[0].metrics["train_loss"]
    assert groups.suggested_size(made, 8) == 1


@pytest.mark.parametrize(
    ("vocabulary", "length", "name", "message"),
    [
        (51, 12, "gpt2", "^path is .*gpt2', a model of 50 tokens; the data have 51: give the data the model's own tok"),
        (
            50,
            13,
            "gpt2",
            "gpt2', a model of sequences up to 12 tokens; the data have 13: give a smaller task.data",
        ),
        (50, 12, "nothing", "nothing has no model configuration .*; give a hub id, or a folder that holds config.json"),
        (50, 12, "bert", "bert cannot be loaded"),
    ],
)
def test_a_model_that_does_not_fit_the_data_says_so(gpt2, vocabulary, length, name, message):
    with pytest.raises(ValueError, match=message):
        LANGUAGE_MODELS["causal_lm"](vocabulary, length, path=str(gpt2[1] / name))


def test_weights_that_are_missing_are_not_made_up(gpt2):
    transformers = pytest.importorskip("transformers")
    settings = transformers.GPT2Config(
        vocab_size=50, n_positions=12, n_embd=16, n_layer=3, n_head=2, tie_word_embeddings=False
    )
    settings.save_pretrained(gpt2[1] / "gpt2")  # a block more, and a head of its own
    with pytest.raises(
        ValueError, match=r"is not what its config.json says: its weights lack .* more; restore the folder"
    ):
        LANGUAGE_MODELS["causal_lm"](50, 12, path=str(gpt2[1] / "gpt2"))


# The task


def test_loss_perplexity_and_accuracy_are_what_they_are_called():
    made = task()
    model = made.model().eval()
    sequences = torch.from_numpy(np.array(made.data.test["x"])).long()
    with torch.no_grad():
        chances = model(sequences[:, :-1]).softmax(-1)
    right = chances.gather(-1, sequences[:, 1:, None])[..., 0]
    metrics = Learner(made, "cpu").test(Learner(made, "cpu").params())
    assert metrics["test_loss"] == pytest.approx(-right.log().mean().item(), rel=1e-5)
    assert metrics["perplexity"] == math.exp(metrics["test_loss"])
    assert metrics["test_accuracy"] == (chances.argmax(-1) == sequences[:, 1:]).double().mean().item()


def test_a_perplexity_beyond_all_numbers_is_no_error():
    assert (
        task().summarize({"loss": 1e6, "hits": torch.tensor(0), "tokens": torch.tensor(10)})[0]["perplexity"]
        == math.inf
    )


def test_the_losses_are_those_of_the_sequences_one_by_one():
    made = task()
    model = made.model()
    batch = made.prepare(made.examples(8), None)
    each = made.losses(model, batch)
    torch.testing.assert_close(each.mean(), made.loss(model, batch))
    torch.testing.assert_close(each[1], made.loss(model, {"x": batch["x"][1:2]}))


def test_evaluation_in_parts_is_evaluation_of_the_whole(monkeypatch):
    made = task()
    params = Learner(made, "cpu").params()
    whole = Learner(made, "cpu").test(params)
    monkeypatch.setattr(language, "_LOGITS", 1)
    assert Learner(made, "cpu").test(params) == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr("fedray.evaluation.SHARD", 3)
    shards = [evaluate(made, params, SerialBackend(made, shares))[0] for shares in (1, 2, 7)]
    assert shards[0] == shards[1] == shards[2] == pytest.approx(whole, rel=1e-6)


def test_each_author_is_a_client_by_default_and_all_together_are_everyone():
    made = task()
    held = made.holdings()
    assert held["names"].tolist() == held["classes"].tolist() == [f"client{i}" for i in range(9)]
    assert np.array_equal(held["label_counts"], np.diag(made.sizes))
    together = torch.cat([made.examples(client)["x"] for client in range(9)])
    assert torch.equal(made.examples(EVERYONE)["x"], together)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_number_of_shares_changes_nothing(name, group):
    made = task()
    outcomes = []
    for shares in (1, 2, 7):
        backend = SerialBackend(made, shares, execution=Execution(group))
        history = trained(name, made, backend)
        outcomes.append(([r.state for r in history], [r.metrics for r in history], backend.client_states))
    assert_same_bits(outcomes[0], outcomes[1])
    assert_same_bits(outcomes[0], outcomes[2])


# not Adam: the gradient of a key's bias is nothing but rounding, which Adam makes steps of
@pytest.mark.parametrize("local", [LOCAL, replace(LOCAL, max_grad_norm=0.5, weight_decay=0.1, local_momentum=0.9)])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_together_computes_what_training_alone_does_but_for_rounding(name, local):
    try:
        make(name, local=local)
    except ValueError as error:
        if "is defined for" not in str(error):  # plain SGD, or at least SGD
            raise
        pytest.skip(str(error))
    made = task()
    together = trained(name, made, SerialBackend(made, execution=Execution(4)), local)
    for a, b in zip(together, trained(name, made, SerialBackend(made), local), strict=True):
        assert a.metrics == pytest.approx(b.metrics, rel=1e-3)
        torch.testing.assert_close(copy(a.state), copy(b.state), rtol=2e-3, atol=2e-4)


def test_clients_train_together_unless_the_model_draws_random_numbers():
    assert groups.suggested_size(task(), 8) == 4
    assert groups.suggested_size(task(dropout=0.1), 8) == 1


# Runs and messages

RUN = """\
rounds: 2
cohort: 3
task:
  name: language_modeling
  data: {name: sotu, length: 32, test_fraction: 0.05}
  model: {name: transformer, width: 8, depth: 1, heads: 1}
algorithm: {name: fedavg, local_lr: 0.5, local_steps: 2}
backend: serial
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


def test_a_run_without_any_file_of_ones_own(file, tmp_path, capsys):
    assert cli.main(["run", str(file), "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert line["perplexity"] == math.exp(line["test_loss"])
    assert lines[2]["test_loss"] < lines[0]["test_loss"]
    sent = sum(p.numel() * 4 for p in plan(config.read(file)).experiment.task.model().parameters())
    assert lines[2]["bytes_up_total"] == 2 * 3 * sent
    held = np.load(tmp_path / "run" / "partition.npz", allow_pickle=False)
    assert held["names"][-1] == "Joseph R Biden"
    assert "perplexity" in (tmp_path / "run" / "report.html").read_text()
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.data=digits", "task.data is digits, which holds no text; use sotu or text, or task.name=classification"),
        ("task.model=mlp", "task.model.name is 'mlp'; known: causal_lm, transformer"),
        ("task.model.heads=3", "task.model.heads is 3; it must divide 8, the width"),
        ("task.data.length=0", "task.data.length is 0; it must be >= 1"),
        ("task.data.lenght=9", "task.data (sotu) has no option 'lenght'; did you mean 'length'?"),
        ("task.data.test_by=author", "task.data.test_by is 'author'; known: client, position"),
        ("task.data.tokenizer=no/such", "task.data.tokenizer is 'no/such', which is neither bytes nor characters"),
        ("task.data={name: text, path: no.txt}", "task.data: no.txt does not exist; give a folder of .txt files"),
        ("task.model={name: causal_lm, path: no/such}", "task.model: no/such has no model configuration"),
        (
            "task={name: classification, data: sotu, partition: {name: iid, num_clients: 9}, model: softmax}",
            "task.data is sotu, which is text; continue it with task.name=language_modeling",
        ),
    ],
)
def test_a_mistake_is_one_line(file, tmp_path, capsys, override, message):
    if "such" in override:
        pytest.importorskip("transformers")
    assert cli.main(["run", str(file), override, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()
