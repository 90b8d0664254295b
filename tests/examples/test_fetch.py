"""Downloading public data, from a stand-in for the hub that serves the same paths on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from examples.minbert_multitask.data import DATA_FILES, load_task, main
from examples.minbert_multitask.fetch import SOURCES, FetchError, fetch
from examples.minbert_multitask.tokenizer import load_tokenizer
from examples.minbert_multitask.weights import minilm_folder

SST = [{"text": 'a "good"\tfilm\nindeed', "label": 3, "label_text": "positive"}, {"text": "bad", "label": 0}]
PAIRS = [{"text1": "who?", "text2": '"what" now', "label": 1}, {"text1": "a", "text2": "b", "label": 0}]
SCORES = [{"text1": "a man", "text2": "one man", "label": 4.75}, {"text1": "a", "text2": "b", "label": 0.2}]
UNLABELLED = [{"text1": "a", "text2": "b", "label": -1}]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """A proxy of the machine's has no business with 127.0.0.1."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def hub():
    """A server of `hub.files` (path -> bytes); `hub.requests` lists what was asked, `hub.announce` lies about sizes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            body = server.files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"") + server.announce.get(self.path, 0)))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        server.requests, server.announce, server.files = [], {}, {}
        add(server, "SetFit/sst5", {"train": SST, "dev": SST, "test": SST})
        add(server, "SetFit/qqp", {"train": PAIRS, "validation": PAIRS, "test": UNLABELLED})
        add(server, "SetFit/stsb", {"train": SCORES, "validation": SCORES, "test": UNLABELLED})
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def add(server, repository, splits):
    names = [".gitattributes", *(f"{name}.jsonl" for name in splits)]
    listing = {"sha": "abc123", "siblings": [{"rfilename": name} for name in names]}
    server.files[f"/api/datasets/{repository}"] = json.dumps(listing).encode()
    for name, rows in splits.items():
        server.files[f"/datasets/{repository}/resolve/abc123/{name}.jsonl"] = lines(rows)


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_fetched_files_load(hub, tmp_path, capsys):
    assert main(["fetch", str(tmp_path), "--endpoint", hub.url + "/"]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {name for task in SOURCES for name in DATA_FILES[task].values()}
    shown = capsys.readouterr().out
    assert all(source.terms in shown for source in SOURCES.values())

    tokenizer = load_tokenizer(minilm_folder())

    def ids(sentence):
        return tokenizer.encode(sentence, add_special_tokens=False).ids

    sst = load_task("sst", "train", tmp_path, tokenizer)
    assert sst.ids == ["sst-train-0", "sst-train-1"]
    assert sst.first == [ids('a "good" film indeed'), ids("bad")]
    assert torch.equal(sst.labels, torch.tensor([3, 0]))
    sts = load_task("sts", "dev", tmp_path, tokenizer)
    assert torch.equal(sts.labels, torch.tensor([4.75, 0.2]))
    quora = load_task("quora", "train", tmp_path, tokenizer)
    assert quora.second == [ids('"what" now'), ids("b")]
    assert torch.equal(quora.labels, torch.tensor([1.0, 0.0]))
    assert load_task("quora", "test-student", tmp_path, tokenizer).labels is None


def test_finished_files_are_not_downloaded_again(hub, tmp_path, capsys):
    first = fetch(tmp_path, tasks=("sst",), endpoint=hub.url)
    assert [path.name for path in first] == list(DATA_FILES["sst"].values())
    first[1].unlink()
    hub.requests.clear()
    assert fetch(tmp_path, tasks=("sst",), endpoint=hub.url) == [first[1]]
    assert hub.requests == ["/api/datasets/SetFit/sst5", "/datasets/SetFit/sst5/resolve/abc123/dev.jsonl"]
    hub.requests.clear()
    assert fetch(tmp_path, tasks=("sst",), endpoint=hub.url) == []
    assert hub.requests == []
    assert "sst: all files are there already" in capsys.readouterr().out


def test_an_interrupted_download_leaves_no_file_and_can_be_repeated(hub, tmp_path):
    path = "/datasets/SetFit/sst5/resolve/abc123/dev.jsonl"
    hub.announce[path] = 10
    size = len(hub.files[path])
    with pytest.raises(FetchError, match=rf"dev\.jsonl broke off after {size} of {size + 10} bytes; run the same"):
        fetch(tmp_path, tasks=("sst",), endpoint=hub.url)
    assert [p.name for p in tmp_path.iterdir()] == ["ids-sst-train.csv"]
    hub.announce.clear()
    assert len(fetch(tmp_path, tasks=("sst",), endpoint=hub.url)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"text": "a"}\n', r"line 1: expected JSON with text and label \(KeyError"), (b"{\n", "line 1: expected JSON")],
)
def test_rows_of_another_form(hub, tmp_path, content, message):
    hub.files["/datasets/SetFit/sst5/resolve/abc123/train.jsonl"] = content
    with pytest.raises(FetchError, match=message):
        fetch(tmp_path, tasks=("sst",), endpoint=hub.url)
    assert list(tmp_path.iterdir()) == []


def test_a_repository_without_the_split(hub, tmp_path):
    add(hub, "SetFit/sst5", {"train": SST, "test": SST})
    with pytest.raises(FetchError, match=r"SetFit/sst5 has no dev\.jsonl or validation\.jsonl or val\.jsonl \(found: "):
        fetch(tmp_path, tasks=("sst",), endpoint=hub.url)


@pytest.mark.parametrize("listing", [b"<html>", b"[]", b"{}"])
def test_an_endpoint_that_is_no_hub(hub, tmp_path, listing):
    hub.files["/api/datasets/SetFit/sst5"] = listing
    with pytest.raises(FetchError, match="did not answer with a list of files; is the endpoint a hub"):
        fetch(tmp_path, tasks=("sst",), endpoint=hub.url)


def test_failures_on_the_command_line(hub, tmp_path, capsys):
    hub.files.clear()
    assert main(["fetch", str(tmp_path), "--endpoint", hub.url, "--tasks", "sts"]) == 1
    assert "error: cannot download http://127.0.0.1" in (shown := capsys.readouterr().err)
    assert "HTTP Error 404: Not Found; run the same command again" in shown
    assert leftovers(tmp_path) == []


def test_no_server_and_no_scheme(tmp_path):
    with pytest.raises(FetchError, match=r"cannot download http://127\.0\.0\.1:9/.*refused"):
        fetch(tmp_path, endpoint="http://127.0.0.1:9")
    with pytest.raises(FetchError, match=r"file:///etc/api/.* is not an http\(s\) address; give --endpoint as in"):
        fetch(tmp_path, endpoint="file:///etc")


def test_tasks_without_a_source(tmp_path):
    with pytest.raises(ValueError, match="no source for the task cfimdb; public data exist for sst, quora, sts"):
        fetch(tmp_path, tasks=("cfimdb",))
