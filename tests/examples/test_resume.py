"""A run that was stopped, or killed, and resumed has the result of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import peftlite
from examples.minbert_multitask.run_folder import RunFolder, read_tensors
from examples.minbert_multitask.train import finish, train
from examples.minbert_multitask.trainer import Trainer, TrainingStoppedError

ROOT = Path(__file__).parents[2]
TIMES = ("seconds", "train_seconds", "train_seconds_per_task", "memory", "settings", "environment")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Leave out the report, which these tests do not look at and which takes longer than the tiny runs."""
    monkeypatch.setattr("examples.minbert_multitask.train.write_report", lambda folder, result: None)


class CrashError(Exception):
    pass


def untimed(record: dict) -> dict:
    """A record without what differs between two equal runs: times and the folder's name."""
    return {key: value for key, value in record.items() if key not in TIMES}


def assert_same_run(left: str | Path, right: str | Path) -> None:
    """Metrics, result, best network and predictions are equal, bit for bit."""
    a, b = RunFolder(left), RunFolder(right)
    assert [untimed(row) for row in a.read_metrics()] == [untimed(row) for row in b.read_metrics()]
    assert untimed(a.read_json("result.json")) == untimed(b.read_json("result.json"))
    for name in ("best.safetensors", "dev_outputs.safetensors"):
        tensors, other = read_tensors(a / name)[0], read_tensors(b / name)[0]
        assert tensors.keys() == other.keys()
        assert all(torch.equal(tensors[key], other[key]) for key in tensors)
    best = [row for row in a.read_metrics() if row["kind"] == "dev" and row["best"]][-1]
    assert best["scores"] == a.read_json("result.json")["scores"]  # read back from its file, the network is the same
    names = sorted(path.name for path in (a / "predictions").iterdir())
    assert names == sorted(path.name for path in (b / "predictions").iterdir())
    for name in names:
        assert (a / "predictions" / name).read_bytes() == (b / "predictions" / name).read_bytes()


VARIANTS = {
    "lora": {"method": "lora", "dropout": 0.1, "sampling": "annealed", "head": "nonlinear"},
    "full, progressive": {"method": "full", "unfreeze": "progressive", "epochs": 5, "eval_every": 6, "optimizer": "adamax"},
    "dora, progressive": {"method": "dora", "unfreeze": "progressive", "accumulate": 2, "epochs": 5, "backbones": 2},
    "adalora": {"method": "adalora", "backbones": 2},
    "dylora": {"method": "dylora", "accumulate": 2},
    "reflora": {"method": "reflora"},
    "xgblora": {"method": "xgblora"},
    "lisa": {"method": "lisa", "epochs": 3},
    "linear-probe, bf16": {"method": "linear-probe", "amp": "bf16", "sst_loss": "ordinal", "head": "conv"},
    "cross-encoder": {"cross_encoder": True, "sts_loss": "pearson", "pooling": "cls", "lr_multiplier": "sst=2"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_crash_and_a_resume_change_nothing(tiny, tmp_path, changes):
    settings = tiny(**changes)
    train(settings, quiet=True)

    crashed = replace(settings, output=str(tmp_path / "crashed"))
    for crash_at in (2, 7, 8):  # before the first save at step 3, off a save, right after one in the same run

        def crash(step: int, at: int = crash_at) -> None:
            if step == at:
                raise CrashError

        trainer = Trainer(crashed, resume=(tmp_path / "crashed").exists(), quiet=True)
        with pytest.raises(CrashError):
            trainer.run(on_step=crash)
        torch.manual_seed(123)  # a new process has another state
    # What the crash left behind after its last state, and a torn line, are written again
    with (tmp_path / "crashed" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    train(crashed, resume=True, quiet=True)
    assert_same_run(settings.output, crashed.output)


def test_stop_saves_where_it_is_even_during_an_evaluation(tiny, tmp_path):
    settings = tiny()
    train(settings, quiet=True)
    stopped = replace(settings, output=str(tmp_path / "stopped"), save_every=1000)
    trainer = Trainer(stopped, quiet=True)

    def stop(step: int) -> None:
        if step == 5:
            trainer.stop()

    with pytest.raises(TrainingStoppedError):
        trainer.run(on_step=stop)
    assert trainer.step == 5
    trainer = Trainer(stopped, resume=True, quiet=True)
    assert trainer.step == 5
    evaluate = trainer._evaluate

    def stop_inside() -> None:
        trainer.stop()
        evaluate()

    trainer._evaluate = stop_inside  # stops after the first batch of the evaluation at step 8
    with pytest.raises(TrainingStoppedError):
        trainer.run()
    trainer = Trainer(stopped, resume=True, quiet=True)
    assert (trainer.step, trainer.evaluated) == (8, 4)
    trainer.run()
    finish(trainer)
    assert_same_run(settings.output, stopped.output)


def command(output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "examples.minbert_multitask.train", "--output", str(output), *more]


def options(settings) -> list[str]:
    """The command-line options that give these settings, the output aside."""
    found = []
    for name, value in asdict(settings).items():
        if name == "output" or value is None or value is False or value == "":
            continue
        found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found


def test_sigkill_at_random_moments_leaves_valid_files_and_the_same_result(tiny, tmp_path):
    settings = tiny(tasks="sst,sts", epochs=25, eval_every=30, save_every=5)
    train(settings, quiet=True)
    output = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seed = random.randrange(10**6)
    print(f"seed of the moments: {seed}")
    rng = random.Random(seed)
    for _ in range(2):
        resume = ["--resume"] if (output / "settings.json").exists() else options(settings)
        process = subprocess.Popen(
            command(output, *resume), env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        line = process.stdout.readline()  # the line that says that training begins
        time.sleep(rng.random())
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0]
        assert process.returncode in (-signal.SIGKILL, 0), line + rest
        check_files(output)
    train(replace(settings, output=str(output)), resume=True, quiet=True)
    check_files(output)
    assert_same_run(settings.output, output)


def check_files(output: Path) -> None:
    """Every file that has its final name is whole."""
    folder = RunFolder(output)
    folder.read_settings()
    folder.read_metrics()
    for path in output.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue  # temporary files are not finished ones
        if path.suffix == ".safetensors":
            read_tensors(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            assert path.read_text().endswith("\n")
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        else:
            assert path.name == "metrics.jsonl"


def test_ctrl_c_saves_says_how_to_go_on_and_resumes(tiny, tmp_path):
    settings = tiny(tasks="sst", epochs=2000, eval_every=3000, save_every=100000)
    output = tmp_path / "interrupted"
    process = subprocess.Popen(
        command(output, *options(settings)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "trains" in process.stdout.readline()
    assert "step 0: dev" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[0]
    assert process.returncode == 130
    assert f"python -m examples.minbert_multitask.train --output {output} --resume" in rest
    _, values = RunFolder(output).load_state()
    assert f"stopped at step {values['step']} of 6000" in rest
    assert Trainer(replace(settings, output=str(output)), resume=True, quiet=True).step == values["step"]


def test_resuming_with_another_setting_names_it(tiny):
    settings = tiny(epochs=1)
    Trainer(settings, quiet=True)
    with pytest.raises(ValueError, match=r"cannot go on with other settings: lr is 0.001 in the run and 0.5 now"):
        Trainer(replace(settings, lr=0.5), resume=True, quiet=True)
    assert Trainer(replace(settings, save_every=7), resume=True, quiet=True).step == 0


def test_a_used_folder_is_refused_with_advice(tiny, tmp_path):
    settings = tiny(epochs=1)
    Trainer(settings, quiet=True)
    with pytest.raises(FileExistsError, match="already holds a run; add --resume to go on with it, or choose another"):
        Trainer(settings, quiet=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="is not empty and holds no run; choose another --output"):
        Trainer(replace(settings, output=str(tmp_path / "other")), quiet=True)
    with pytest.raises(FileNotFoundError, match=r"none holds no run: it has no settings\.json"):
        Trainer(replace(settings, output=str(tmp_path / "none")), resume=True, quiet=True)


def test_a_finished_run_is_left_as_it_is(tiny):
    settings = tiny(tasks="sst", epochs=1)
    result = train(settings, quiet=True)
    assert not (Path(settings.output) / "state.safetensors").exists()
    assert train(settings, resume=True, quiet=True) == json.loads(json.dumps(result))


def test_state_holds_no_frozen_weight(tiny):
    trainer = Trainer(tiny(method="lora"), quiet=True)
    trainer.save_state()
    tensors, _ = trainer.folder.load_state()
    saved = {name.removeprefix("network.") for name in tensors if name.startswith("network.")}
    adapters = {f"{n}.{k}" for n, a in peftlite.adapters(trainer.network).items() for k in a.adapter_parameters()}
    assert saved == adapters | {f"heads.{name}" for name in trainer.network.heads.state_dict()}
