"""Texts as sequences of tokens: nothing is lost, nothing is learnt twice, nobody's words are somebody else's."""

import json
import os
import zlib

import numpy as np
import pytest

from fedray.data import Dataset
from fedray.data.partitions import by_column, dirichlet
from fedray.data.text import sotu, text
from fedray.data.tokens import Reading, text_dataset
from fedray.errors import DataError

os.environ["HF_HUB_OFFLINE"] = "1"
RNG = np.random.default_rng(0)


def toy(lengths: dict[str, list[int]], **options) -> tuple[Dataset, dict[str, list[str]]]:
    """Texts of characters that occur once in all of them, so that a token says where it comes from."""
    texts, code = {}, 0x4E00
    for client, parts in lengths.items():
        texts[client] = []
        for count in parts:
            texts[client].append("".join(map(chr, range(code, code + count))))
            code += count
    return text_dataset("toy", texts, Reading(tokenizer="characters", **options)), texts


LENGTHS = {"ann": [40], "bob": [7, 1, 12], "cy": [100, 3], "di": [25, 25]}


def test_sequences_of_bytes_to_the_letter():
    texts = {"ann": ["abcdefghij"], "bob": ["uv", "w", "xyz12345"]}
    data = text_dataset("toy", texts, Reading(length=3, test_fraction=0.3))
    assert data.classes == ("ann", "bob")
    assert data.vocabulary == 256
    assert data.train["x"].dtype == np.uint8
    rows = [(data.classes[y], bytes(x)) for x, y in zip(data.train["x"], data.train["y"], strict=True)]
    assert rows == [("ann", b"abcd"), ("ann", b"defg"), ("bob", b"uv\0w"), ("bob", b"w\0xy"), ("bob", b"yz12")]
    rows = [(data.classes[y], bytes(x)) for x, y in zip(data.test["x"], data.test["y"], strict=True)]
    assert rows == [("bob", b"345\0")]  # three letters of ann are no sequence


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_every_token_but_the_first_is_predicted_once(length):
    data, texts = toy(LENGTHS, length=length, test_fraction=0.1)
    for place, client in enumerate(data.classes):
        own = data.train["x"][data.train["y"] == place]
        assert np.array_equal(own[1:, 0], own[:-1, -1])  # one begins with the last token of the one before
        stream = np.concatenate([own[:1, 0], own[:, 1:].reshape(-1)])
        known = sorted("".join("".join(parts) for parts in texts.values()))
        said = "".join(known[token - 1] if token else "\0" for token in stream)
        whole = "".join(f"{part}\0" for part in texts[client])
        assert whole.startswith(said)
        assert len(whole) - len(said) <= length + 0.1 * len(whole)


@pytest.mark.parametrize("test_by", ["position", "client"])
def test_no_token_of_a_client_is_in_anothers_sequences_nor_in_both_train_and_test(test_by):
    data, texts = toy(LENGTHS, length=4, test_by=test_by, test_fraction=0.3)
    known = sorted("".join("".join(parts) for parts in texts.values()))
    wrote = {character: client for client, parts in texts.items() for part in parts for character in part}
    seen: dict[str, set[str]] = {}
    for split, columns in (("train", data.train), ("test", data.test)):
        seen[split] = set()
        for x, y in zip(columns["x"], columns["y"], strict=True):
            characters = {known[token - 1] for token in x if token}
            assert {wrote[character] for character in characters} == {data.classes[y]}
            seen[split] |= characters
    assert seen["train"]
    assert seen["test"]
    assert not seen["train"] & seen["test"]
    shared = set(data.train["y"]) & set(data.test["y"])
    assert shared == (set() if test_by == "client" else shared | set(data.test["y"]))


def test_other_clients_are_tested_on_with_another_split_seed():
    lengths = {f"client{i}": [30] for i in range(20)}
    first, again, other = (
        set(toy(lengths, length=4, test_by="client", split_seed=seed)[0].test["y"]) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(first) == len(other) == 2


def test_text_for_testing_of_its_own_belongs_to_whom_it_says():
    data = text_dataset("toy", {"ann": ["abcd"]}, Reading(length=2), {"ann": ["efgh"], "zoe": ["ijkl"]})
    assert data.classes == ("ann", "zoe")
    assert data.test["y"].tolist() == [0, 0, 1, 1]
    assert bytes(data.train["x"].reshape(-1)) == b"abccd\0"


def test_characters_are_numbered_in_order_and_zero_ends_a_text():
    data = text_dataset("toy", {"ann": ["cab"], "bob": ["ÄaÄ"]}, Reading("characters", 1, test_fraction=0.5))
    assert data.vocabulary == 5
    assert data.train["x"].tolist() == [[3, 1], [4, 1]]
    assert data.test["x"].tolist() == [[2, 0], [4, 0]]


@pytest.mark.parametrize(("count", "dtype"), [(200, np.uint8), (300, np.int16), (40_000, np.int32)])
def test_tokens_take_no_more_bytes_than_they_need(count, dtype):
    data, _ = toy({"ann": [count]}, length=8)
    assert data.train["x"].dtype == dtype
    assert data.train["x"].max() < data.vocabulary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, r"^length is 0; it must be >= 1"),
        ({"test_fraction": 1.0}, r"^test_fraction is 1\.0; it must be between 0 and 1"),
        ({"length": 500}, r"^length is 500, but the longest text to train on in toy has 94 tokens"),
        ({"length": 50}, r"^length is 50, but the longest text to test on in toy has 10 .*larger test_fraction$"),
        ({"tokenizer": "no/such/folder"}, r"^tokenizer is 'no/such/folder', which is neither bytes nor characters"),
    ],
)
def test_what_cannot_be_read_so_says_why(options, message):
    if "tokenizer" in options:
        pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message):
        text_dataset("toy", {"ann": ["a" * 103]}, Reading(**options))


def test_one_client_cannot_be_split_by_client():
    with pytest.raises(ValueError, match=r"^test_by is client, but there is only one client"):
        text_dataset("toy", {"ann": ["a" * 103]}, Reading(test_by="client"))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.full((3, 4), 9), r"toy \(train\): there is a token 9; tokens must be 0\.\.8"),
        (np.full((3, 4), -1), "there is a token -1"),
        (np.zeros((3, 4), np.float32), r"x is float32 \(3, 4\); tokens must be whole numbers N×L"),
        (np.zeros(3, np.int64), r"x is int64 \(3,\)"),
    ],
)
def test_tokens_are_checked(tokens, message):
    columns = {"x": tokens, "y": np.zeros(3, np.int64)}
    with pytest.raises(DataError, match=message):
        Dataset("toy", columns, columns, ("a",), vocabulary=9)


# What comes with fedray


def test_the_addresses_are_the_same_everywhere():
    data = sotu()
    assert data.num_classes == 43
    assert data.input_shape == (65,)
    assert (len(data.train["y"]), len(data.test["y"])) == (4759, 514)
    assert bytes(data.train["x"][0]) == b"Fellow-Citizens of the Senate and House of Representatives: In me"
    assert zlib.crc32(data.train["x"].data) == 2_747_915_804
    assert np.bincount(data.train["y"]).min() > 100


def test_each_president_is_a_client():
    data = sotu()
    partition = by_column(data, 0, column="y")
    assert partition.names == data.classes
    assert partition.names[0] == "George Washington"
    assert len(partition.indices) == len(data.train["y"])
    mixed = dirichlet(data, 0, num_clients=10, alpha=0.1)
    assert sorted(mixed.indices) == list(range(len(data.train["y"])))


# Files


@pytest.fixture
def folder(tmp_path):
    for name, content in {"1_ann_a": "abcdefgh", "2_bob_b": "ijklmnop", "3_ann_b": "qrstuvwx"}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    return tmp_path


SMALL = Reading(length=2, test_fraction=0.4)


def test_one_file_is_one_client_and_a_pattern_finds_it_in_the_name(folder):
    assert text(str(folder), reading=SMALL).classes == ("1_ann_a", "2_bob_b", "3_ann_b")
    data = text(str(folder), reading=Reading(length=2, test_fraction=0.2), client_pattern=r"\d_(.+)_")
    assert data.classes == ("ann", "bob")
    ann = data.train["x"][data.train["y"] == 0]
    assert bytes(np.concatenate([ann[0, :1], ann[:, 1:].reshape(-1)])) == b"abcdefgh\0qrstuv"
    assert text(str(folder / "2_bob_b.txt"), reading=SMALL).classes == ("2_bob_b",)


def test_one_folder_is_one_client_if_the_files_are_in_folders(folder):
    for name in ("ann", "bob"):
        (folder / "deep" / name).mkdir(parents=True)
        for file in folder.glob(f"*_{name}_*.txt"):
            file.rename(folder / "deep" / name / file.name)
    data = text(str(folder / "deep"), reading=SMALL)
    assert data.classes == ("ann", "bob")
    assert np.bincount(data.train["y"]).tolist() == [5, 2]


def rows(clients: str) -> list[dict[str, str]]:
    return [{"who": client, "said": f"words of {client}"} for client in clients]


def write(path, content: list[dict[str, str]]) -> str:
    datasets = pytest.importorskip("datasets")
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(content).to_csv(path)
    else:
        datasets.Dataset.from_list(content).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_column_says_who_the_client_is(tmp_path, suffix):
    path = write(tmp_path / f"letters{suffix}", rows("abab"))
    data = text(path, reading=SMALL, text_column="said", client_column="who")
    assert data.name == "letters"
    assert data.classes == ("a", "b")
    first = data.train["x"][data.train["y"] == 1]
    assert bytes(np.concatenate([first[0, :1], first[:, 1:].reshape(-1)])).startswith(b"words of b\0wo")


def test_a_split_of_the_data_is_tested_on(tmp_path):
    write(tmp_path / "train.parquet", rows("ab"))
    write(tmp_path / "test.parquet", rows("c"))
    options = {"text_column": "said", "client_column": "who", "test_split": "test"}
    data = text(str(tmp_path), reading=SMALL, **options)
    assert data.classes == ("a", "b", "c")
    assert (set(data.train["y"]), set(data.test["y"])) == ({0, 1}, {2})
    with pytest.raises(ValueError, match=r"^test_split is 'dev'; .* has test, train"):
        text(str(tmp_path), **(options | {"test_split": "dev"}))


def test_columns_and_patterns_that_are_not_there_are_named(folder, tmp_path):
    path = write(tmp_path / "letters.jsonl", rows("ab"))
    with pytest.raises(ValueError, match=r"^text_column is 'text'; .*letters\.jsonl has the columns who, said"):
        text(path)
    with pytest.raises(ValueError, match=r"^client_column is 'client'; "):
        text(path, text_column="said")
    for pattern, problem in ((r"\d_(.*)_z", "finds no client in the file name '1_ann_a'"), ("(", "is no regular")):
        with pytest.raises(ValueError, match=rf"^client_pattern is .*, which {problem}"):
            text(str(folder), client_pattern=pattern)
    with pytest.raises(ValueError, match="with a group"):
        text(str(folder), client_pattern="ann|bob")


def test_files_that_are_not_there_or_no_text_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt does not exist; give a folder of \.txt files"):
        text(str(tmp_path / "gone.txt"))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"bad\.txt is no readable UTF-8 text"):
        text(str(tmp_path))


def test_a_tokenizer_of_hugging_face_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<end>": 0, "<odd>": 1, "the": 2, "cat": 3, "sat": 4, "dog": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<odd>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<odd>")
    wrapped.save_pretrained(tmp_path / "words")
    texts = {"ann": ["the cat sat", "the dog ran"]}
    data = text_dataset("toy", texts, Reading(str(tmp_path / "words"), 2, test_fraction=0.4))
    assert data.vocabulary == 6
    assert data.train["x"].tolist() == [[2, 3, 4], [4, 0, 2]]
    assert data.test["x"].tolist() == [[5, 1, 0]]
