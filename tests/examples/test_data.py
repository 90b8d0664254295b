"""The tasks' files: quoting, malformed rows, errors, the cache, collation and bucketing."""

import logging

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from examples.minbert_multitask import cache as cache_module
from examples.minbert_multitask import data as data_module
from examples.minbert_multitask.data import (
    DATA_FILES,
    POOL,
    SPLITS,
    TASKS,
    SpecialTokens,
    TaskData,
    batches,
    collate,
    describe_problems,
    load_task,
    main,
)
from examples.minbert_multitask.files import Problem, parse_line, read_rows, unquote
from examples.minbert_multitask.tokenizer import SPECIAL, load_tokenizer

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
WORDS = ["good", "bad", "film", '"', "a", "?", "the"]
HEADERS = {
    "sst": "\tid\tsentence\tsentiment",
    "cfimdb": "\tid\tsentence\tsentiment",
    "quora": "\tid\tsentence1\tsentence2\tis_duplicate",
    "sts": "\tid\tsentence1\tsentence2\tsimilarity",
}


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    return load_tokenizer(tmp_path)


def word(name):
    return len(SPECIAL) + WORDS.index(name)


def quote(text):
    """One layer of CSV quoting."""
    return '"' + text.replace('"', '""') + '"'


def write(folder, task, lines, *, split="train", header=None, end="\n"):
    path = folder / DATA_FILES[task][split]
    path.write_bytes(end.join([header or HEADERS[task], *lines, ""]).encode())
    return path


def same(one: TaskData, two: TaskData) -> bool:
    fields = ("task", "split", "ids", "first", "second", "special", "problems")
    labels = (one.labels is None) == (two.labels is None)
    if one.labels is not None and labels:
        labels = torch.equal(one.labels, two.labels) and one.labels.dtype == two.labels.dtype
    return labels and all(getattr(one, name) == getattr(two, name) for name in fields)


def test_file_names_cover_every_task_and_split():
    assert {task: set(files) for task, files in DATA_FILES.items()} == {task: set(SPLITS) for task in TASKS}
    assert DATA_FILES["sst"]["dev"] == "ids-sst-dev.csv"
    assert DATA_FILES["sts"]["test-student"] == "sts-test-student.csv"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_sentences_become_ids_and_labels_classes(tmp_path, tokenizer, end):
    write(tmp_path, "sst", ["0\tx1\tA good film\t4", "1\tx2\tbad\t0"], end=end)
    data = load_task("sst", "train", tmp_path, tokenizer)
    assert data.ids == ["x1", "x2"]
    assert data.first == [[word("a"), word("good"), word("film")], [word("bad")]]
    assert data.second is None
    assert torch.equal(data.labels, torch.tensor([4, 0]))
    assert data.problems == ()


def test_similarities_are_never_truncated(tmp_path, tokenizer):
    write(tmp_path, "sts", ["0\tx\tgood\tbad\t4.6", "1\ty\tgood\tgood\t5.0", "2\tz\tgood\tfilm\t0"])
    data = load_task("sts", "train", tmp_path, tokenizer)
    assert torch.equal(data.labels, torch.tensor([4.6, 5.0, 0.0]))
    assert data.second == [[word("bad")], [word("good")], [word("film")]]


def test_duplicates_are_floats(tmp_path, tokenizer):
    write(tmp_path, "quora", ["0\tx\tgood ?\tbad ?\t0.0", "1\ty\tgood\tgood\t1.0"], split="dev")
    assert torch.equal(load_task("quora", "dev", tmp_path, tokenizer).labels, torch.tensor([0.0, 1.0]))


def test_test_files_have_no_labels_and_an_extra_column(tmp_path, tokenizer):
    write(tmp_path, "sst", ["1\t0.0\tx\tgood"], split="test-student", header="0\t\tid\tsentence")
    data = load_task("sst", "test-student", tmp_path, tokenizer)
    assert (data.ids, data.first, data.labels) == (["x"], [[word("good")]], None)


def test_a_byte_order_mark_and_a_missing_last_newline_are_harmless(tmp_path):
    path = write(tmp_path, "sst", ["0\tx\tgood\t1"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip())
    rows, problems = read_rows("sst", "train", tmp_path)
    assert (len(rows), problems) == (1, [])


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("plain", "plain"),
        ('"He said ""no""."', 'He said "no".'),  # one layer: STS
        ('"""What does """"it"""" mean?"""', 'What does "it" mean?'),  # two: Quora
        ('"""Would you like it?"""', '"Would you like it?"'),  # a quotation, not a second layer
        (quote(" " + quote('" film " " good "')), '" film " " good "'),  # with a blank in between: CFIMDB
        (quote(quote(" " + quote('" film " " good "'))), '" film " " good "'),  # three: CFIMDB's test file
        ('a "stray" quote', 'a "stray" quote'),
        ('"unclosed', '"unclosed'),
        ('"closed" early', '"closed" early'),
    ],
)
def test_quoting_is_undone_layer_by_layer(tmp_path, raw, text):
    write(tmp_path, "sst", [f"0\tx\t{raw}\t1", "1\ty\tfilm\t2"])
    rows, problems = read_rows("sst", "train", tmp_path)
    assert [row.sentences for row in rows] == [(text,), ("film",)]
    assert problems == []


@patient
@given(st.lists(st.text(st.characters(blacklist_characters='\t\r\n\0"', codec="utf-8")), min_size=2, max_size=5))
def test_fields_without_quotes_are_taken_as_they_stand(fields):
    assert parse_line("\t".join(fields), len(fields)) == fields


@patient
@given(st.text(st.characters(codec="utf-8")))
def test_unquote_is_stable(text):
    assert unquote(unquote(text)) == unquote(text)


MALFORMED = [
    ("sst", "7\tx\tgood", "3 fields where the header has 4"),
    ("sst", "7\tx\tgood\t1\t1", "5 fields where the header has 4"),
    ("sst", "", "1 fields where the header has 4"),
    ("sst", "7\tx\t \t1", "empty sentence"),
    ("sst", '7\tx\t""\t1', "empty sentence"),
    ("sst", "7\t\tgood\t1", "empty id"),
    ("sst", "7\tx\tgood\t", "empty sentiment"),
    ("sst", "7\tx\tgood\t5", "sentiment 5 is not one of 0..4"),
    ("sst", "7\tx\tgood\t-1", "sentiment -1 is not one of 0..4"),
    ("sst", "7\tx\tgood\t1.5", "sentiment 1.5 is not one of 0..4"),
    ("sst", "7\tx\tgood\tfine", "sentiment 'fine' is not a number"),
    ("cfimdb", "7\tx\tgood\t2", "sentiment 2 is not one of 0..1"),
    ("quora", "7\tx\tgood\tbad\t0.5", "is_duplicate 0.5 is not one of 0..1"),
    ("quora", "7\tx\tgood\t\t", "empty sentence2, is_duplicate"),
    ("sts", "7\tx\tgood\tbad\t5.1", "similarity 5.1 is not in 0..5"),
    ("sts", "7\tx\tgood\tbad\tnan", "similarity nan is not in 0..5"),
    ("sts", "7\tx\tgood\tbad\tinf", "similarity inf is not in 0..5"),
]


@pytest.mark.parametrize(("task", "line", "reason"), MALFORMED)
def test_malformed_rows_are_reported_with_their_line_and_skipped(tmp_path, tokenizer, caplog, task, line, reason):
    fine = "\t".join(["good"] * len(TASKS[task].sentences))
    path = write(tmp_path, task, [f"0\ta\t{fine}\t1", line, f"1\tb\t{fine}\t0"])
    with caplog.at_level(logging.WARNING):
        data = load_task(task, "train", tmp_path, tokenizer)
    assert data.problems == (Problem(path.name, 3, reason),)
    assert data.ids == ["a", "b"]
    assert f"{task} train: skipped 1 malformed row\n  {path.name}, line 3: {reason}" in caplog.text


def test_bytes_that_are_not_utf8_are_malformed(tmp_path):
    path = write(tmp_path, "sst", ["0\tx\tgood\t1"])
    path.write_bytes(path.read_bytes() + b"1\ty\tcaf\xe9\t1\n")
    rows, problems = read_rows("sst", "train", tmp_path)
    assert len(rows) == 1
    assert problems[0].line == 3
    assert "'utf-8' codec can't decode" in problems[0].reason


def test_long_reports_are_cut_and_counted():
    report = describe_problems([Problem("f.csv", n, "bad") for n in range(2, 14)])
    assert report.startswith("skipped 12 malformed rows\n  f.csv, line 2: bad")
    assert report.endswith("\n  ... and 2 more")


def test_missing_file_is_named(tmp_path, tokenizer):
    write(tmp_path, "sst", ["0\tx\tgood\t1"], split="dev")
    with pytest.raises(FileNotFoundError, match=r"train file of sst, ids-sst-train\.csv, is missing .*sst-dev\.csv\)"):
        load_task("sst", "train", tmp_path, tokenizer)


def test_missing_folder_says_how_to_fetch(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"found: no \.csv file\); `python -m examples.*data fetch DIR`"):
        load_task("sst", "train", tmp_path / "nowhere", tokenizer)


@pytest.mark.parametrize(
    ("task", "header", "message"),
    [
        ("sst", "\tid\tsentence", r"lacks the column sentiment \(found: id, sentence\)"),
        ("sst", "id,sentence,sentiment", r"lacks the columns id, sentence, sentiment .*tab-separated"),
        ("sts", "\tid\tsentence1\tsimilarity", r"sts-train\.csv lacks the column sentence2"),
    ],
)
def test_missing_columns_are_named(tmp_path, tokenizer, task, header, message):
    write(tmp_path, task, ["0\tx\tgood\t1"], header=header)
    with pytest.raises(ValueError, match=message):
        load_task(task, "train", tmp_path, tokenizer)


def test_a_file_without_a_usable_row(tmp_path, tokenizer):
    write(tmp_path, "sst", ["0\tx\tgood\t9"])
    with pytest.raises(ValueError, match=r"(?s)has no usable row; skipped 1 malformed row.*line 2: sentiment 9 is not"):
        load_task("sst", "train", tmp_path, tokenizer)


def test_unknown_task_and_split(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"unknown task 'sst2'; the tasks are sst, cfimdb, quora, sts"):
        load_task("sst2", "train", tmp_path, tokenizer)
    with pytest.raises(ValueError, match=r"unknown split 'test'; the splits are train, dev, test-student"):
        load_task("sst", "test", tmp_path, tokenizer)


def test_a_tokenizer_without_special_tokens(tmp_path):
    from tokenizers.models import WordPiece

    write(tmp_path, "sst", ["0\tx\tgood\t1"])
    with pytest.raises(ValueError, match=r"the tokenizer lacks \[PAD\], \[CLS\] or \[SEP\]"):
        load_task("sst", "train", tmp_path, Tokenizer(WordPiece({"[UNK]": 0}, unk_token="[UNK]")))


def cached_file(folder):
    (path,) = (folder / "cache").iterdir()  # exactly one: no temporary file is left
    return path


@pytest.mark.parametrize(("task", "split"), [("sst", "train"), ("sts", "train"), ("quora", "test-student")])
def test_a_cache_hit_gives_the_same_data_without_reading_again(tmp_path, tokenizer, monkeypatch, task, split):
    fine = "\t".join(["good film"] * len(TASKS[task].sentences))
    header = None if split == "train" else "\tid\tsentence1\tsentence2"
    lines = [f"0\ta\t{fine}\t1", "broken", f"1\tb\t{fine} \t2"] if split == "train" else [f"0\ta\t{fine}", "broken"]
    write(tmp_path, task, lines, split=split, header=header)
    fresh = load_task(task, split, tmp_path, tokenizer)
    assert same(load_task(task, split, tmp_path, tokenizer, cache=tmp_path / "cache"), fresh)
    monkeypatch.setattr(data_module, "read_rows", None)
    again = load_task(task, split, tmp_path, tokenizer, cache=tmp_path / "cache")
    assert same(again, fresh)
    assert again.problems[0].reason.startswith("1 fields")


def test_the_cache_follows_content_and_tokenizer(tmp_path, tokenizer):
    def load(tok=tokenizer):
        return load_task("sst", "train", tmp_path, tok, cache=tmp_path / "cache")

    write(tmp_path, "sst", ["0\tx\tgood\t1"])
    assert load().first == [[word("good")]]
    write(tmp_path, "sst", ["0\tx\tbad\t1"])
    assert load().first == [[word("bad")]]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "bad"]))
    assert load(load_tokenizer(tmp_path)).first == [[len(SPECIAL)]]
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "cannot be read"),
        (lambda raw: b"", "cannot be read"),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "does not match its checksum"),
    ],
)
def test_a_damaged_cache_is_rebuilt(tmp_path, tokenizer, caplog, damage, message):
    write(tmp_path, "sst", ["0\tx\tgood film\t1"])
    fresh = load_task("sst", "train", tmp_path, tokenizer, cache=tmp_path / "cache")
    path = cached_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert same(load_task("sst", "train", tmp_path, tokenizer, cache=tmp_path / "cache"), fresh)
    assert message in caplog.text
    assert cache_module.read_cache(cached_file(tmp_path)) is not None


def test_a_write_that_fails_leaves_no_file(tmp_path, tokenizer, monkeypatch):
    def half(tensors, path, metadata):
        with open(path, "wb") as handle:
            handle.write(b"half")
        raise OSError("disk full")

    write(tmp_path, "sst", ["0\tx\tgood\t1"])
    monkeypatch.setattr(cache_module, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        load_task("sst", "train", tmp_path, tokenizer, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_check_counts_rows(tmp_path, capsys):
    write(tmp_path, "sst", ["0\tx\tgood\t1", "1\ty\tgood\t8"])
    assert main(["check", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "ids-sst-train.csv" in shown
    assert "1 rows" in shown
    assert "line 3: sentiment 8 is not one of 0..4" in shown
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    assert "holds none of the tasks' files, such as ids-sst-train.csv" in capsys.readouterr().err


SPECIALS = SpecialTokens(pad=0, cls=2, sep=3)


def made(first, second=None, labels=None):
    """A TaskData of the given token ids."""
    return TaskData("sts", "dev", [str(i) for i in range(len(first))], first, second, labels, SPECIALS)


def test_collate_one_sentence():
    batch = collate(made([[9], [7, 8], [5, 6, 7]], labels=torch.tensor([3, 4, 5])), [2, 0])
    assert batch.input_ids.tolist() == [[2, 5, 6, 7, 3], [2, 9, 3, 0, 0]]
    assert batch.attention_mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert not batch.token_type_ids.any()
    assert batch.labels.tolist() == [5, 3]
    assert (batch.index, len(batch)) == ([2, 0], 2)
    features = torch.arange(2)
    assert batch.split(features) == (features, None)


def test_collate_stacks_pairs():
    batch = collate(made([[9], [7]], [[5, 6], [8]]), [0, 1])
    assert batch.input_ids.tolist() == [[2, 9, 3, 0], [2, 7, 3, 0], [2, 5, 6, 3], [2, 8, 3, 0]]
    assert batch.labels is None
    u, v = batch.split(batch.input_ids[:, 1])
    assert (u.tolist(), v.tolist()) == ([9, 7], [5, 8])


def test_collate_joins_pairs_for_a_cross_encoder():
    batch = collate(made([[9], [7]], [[5, 6], [8]]), [0, 1], cross_encoder=True)
    assert batch.input_ids.tolist() == [[2, 9, 3, 5, 6, 3], [2, 7, 3, 8, 3, 0]]
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch.split(batch.input_ids)[1] is None


def test_cross_encoder_leaves_single_sentences_alone():
    one = made([[9], [7, 8]])
    assert torch.equal(collate(one, [0, 1], cross_encoder=True).input_ids, collate(one, [0, 1]).input_ids)


@patient
@given(st.integers(1, 12), st.integers(1, 12), st.integers(5, 20))
def test_the_longer_sentence_is_cut_first(n, m, max_length):
    a, b = list(range(100, 100 + n)), list(range(200, 200 + m))
    batch = collate(made([a], [b]), [0], cross_encoder=True, max_length=max_length)
    while len(a) + len(b) > max_length - 3:  # the definition, token by token
        (a if len(a) > len(b) else b).pop()
    assert batch.input_ids[0].tolist() == [2, *a, 3, *b, 3]


def test_collate_cuts_at_max_length():
    batch = collate(made([[5, 6, 7, 8]], [[9]]), [0], max_length=4)
    assert batch.input_ids.tolist() == [[2, 5, 6, 3], [2, 9, 3, 0]]


def test_collate_errors():
    with pytest.raises(ValueError, match="cannot collate an empty batch"):
        collate(made([[5]]), [])
    with pytest.raises(ValueError, match="max_length 2 leaves no room"):
        collate(made([[5]]), [0], max_length=2)
    with pytest.raises(ValueError, match="max_length 4 leaves no room"):
        collate(made([[5]], [[6]]), [0], max_length=4, cross_encoder=True)


def test_batch_moves_to_a_device():
    batch = collate(made([[5]], labels=torch.tensor([1.0])), [0]).to("meta")
    tensors = (batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.labels)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


lengths = st.lists(st.integers(1, 30), min_size=0, max_size=300)


@patient
@given(lengths, st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 5), st.booleans(), st.booleans())
def test_every_example_is_in_exactly_one_batch(sizes, batch_size, seed, epoch, shuffle, cross):
    data = made([[1] * n for n in sizes], [[1] * (31 - n) for n in sizes])
    options = {"seed": seed, "epoch": epoch, "shuffle": shuffle, "cross_encoder": cross}
    found = batches(data, batch_size, **options)
    assert sorted(i for batch in found for i in batch) == list(range(len(sizes)))
    assert len(found) == -(-len(sizes) // batch_size)
    assert all(1 <= len(batch) <= batch_size for batch in found)
    if found:
        assert max(map(len, found)) - min(map(len, found)) <= 1
    assert found == batches(data, batch_size, **options)


@patient
@given(lengths, st.integers(1, 40))
def test_evaluation_batches_go_from_long_to_short(sizes, batch_size):
    found = batches(made([[1] * n for n in sizes]), batch_size, seed=0, epoch=0, shuffle=False)
    assert [sizes[i] for batch in found for i in batch] == sorted(sizes, reverse=True)


def test_shuffled_batches_hold_like_lengths_and_change_with_seed_and_epoch():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 60, (4 * POOL * 8,), generator=generator).tolist()
    data = made([[1] * n for n in sizes])
    found = batches(data, 8, seed=0, epoch=0)

    def padding(order):
        return sum(max(sizes[i] for i in batch) * len(batch) for batch in order) / sum(sizes) - 1

    unsorted = [list(range(k, k + 8)) for k in range(0, len(sizes), 8)]
    assert padding(found) < padding(unsorted) / 10
    # batches themselves come in random order: neighbours are not of neighbouring lengths
    assert [sizes[batch[0]] for batch in found] != sorted((sizes[batch[0]] for batch in found), reverse=True)
    assert found != batches(data, 8, seed=0, epoch=1)
    assert found != batches(data, 8, seed=1, epoch=0)


def test_a_cross_encoder_measures_pairs_by_their_sum():
    data = made([[1] * 9, [1] * 6, [1] * 8], [[1] * 1, [1] * 6, [1] * 3])
    options = {"seed": 0, "epoch": 0, "shuffle": False}
    assert batches(data, 1, **options) == [[0], [2], [1]]
    assert batches(data, 1, **options, cross_encoder=True) == [[1], [2], [0]]


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        batches(made([[1]]), 0, seed=0, epoch=0)
