"""A tiny random BERT and a tiny data folder, in the formats of the real ones."""

import json
import random
from pathlib import Path

import pytest
import torch

from examples.minbert_multitask.model import BertConfig, BertModel
from examples.minbert_multitask.settings import Settings

WORDS = ["good", "bad", "film", "dull", "fine", "a", "the", "cat", "dog", "runs", "sleeps", "why", "how", "plot", "joy"]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: 2 layers, hidden 32, random weights, a vocabulary of a few words."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **sizes, "max_position_embeddings": 32}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(BertConfig(**sizes, max_position_embeddings=32, initializer_range=0.2))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def write_tables(folder: Path, *, train: int = 20, dev: int = 12) -> Path:
    """Files of all four tasks in the course's format."""
    rng = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 7)))

    columns = {"ids-sst": "sentiment", "ids-cfimdb": "sentiment", "quora": "is_duplicate", "sts": "similarity"}
    for stem, label in columns.items():
        pair = stem in ("quora", "sts")
        for split, rows in (("train", train), ("dev", dev), ("test-student", 5)):
            labelled = split != "test-student"
            names = ["id", *(["sentence1", "sentence2"] if pair else ["sentence"]), *([label] if labelled else [])]
            lines = ["\t".join(["", *names])]
            for i in range(rows):
                value = {
                    "ids-sst": str(i % 5),
                    "ids-cfimdb": str(i % 2),
                    "quora": f"{i % 2}.0",
                    "sts": f"{rng.random() * 5:.2f}",
                }[stem]
                texts = [sentence(), sentence()] if pair else [sentence()]
                lines.append("\t".join([str(i), f"{stem}-{split}-{i}", *texts, *([value] if labelled else [])]))
            (folder / f"{stem}-{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny(tiny_bert: Path, tables: Path, tmp_path: Path):
    """Settings of a run of seconds: `tiny(method="full", ...)`."""

    def make(**changes: object) -> Settings:
        options = {
            "output": str(tmp_path / "run"),
            "data": str(tables),
            "weights": str(tiny_bert),
            "rank": 2,
            "batch_size": 8,
            "epochs": 2,
            "eval_every": 4,
            "save_every": 3,
            "log_every": 2,
            "threads": 1,
            "device": "cpu",
        }
        return Settings(**{**options, **changes})

    return make
