"""The kernel suite on one small layer: who takes part, what is checked first, and what is left out and named."""

import json

import pytest
import torch

from benchmarks import kernel_candidates, kernels
from benchmarks.formulas import FORMULAS
from benchmarks.gpu_layers import tensors
from benchmarks.kernel_candidates import COMPILED, KernelSettings, candidates, gate

QUICK = ["--small", "--rounds", "2", "--warmup", "1", "--threads", "1", "--no-compile"]
BOTH = ["PEFT's formula", "Scaling DoRA's formula"]
GRADIENTS = {"lora": ("x", "lora_a", "lora_b"), "dora": ("x", "lora_a", "lora_b", "magnitude"), "row_norm": ()}
PEERS = {"lora": BOTH[:1], "dora": BOTH, "row_norm": BOTH}


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings(operation: str = "dora", dtype: str = "fp32", **changes) -> KernelSettings:
    sizes = {"rows": 7, "in_features": 24, "out_features": 40, "rank": 3, "dtype": dtype, "rounds": 1, "warmup": 0}
    return KernelSettings(operation, "test", **{**sizes, "device": "cpu", "threads": 1, "compile": False, **changes})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_every_candidate_computes_the_operation(operation, dtype):
    cell = settings(operation, dtype)
    found, absent = candidates(cell, "no compiler")
    assert list(found)[:2] == ["reference", "torch"]
    assert list(found)[-len(PEERS[operation]) :] == PEERS[operation]
    assert absent.keys() == {"triton", COMPILED}
    checks = gate(cell.case, tensors(cell.case, torch.device("cpu")), found)
    assert {name: len(of_one) for name, of_one in checks.items()} == dict.fromkeys(found, len(GRADIENTS[operation]) + 1)
    assert [check.name for of_one in checks.values() for check in of_one if not check.green] == []


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_the_gate_sees_a_wrong_candidate(operation):
    cell = settings(operation)
    found, _ = candidates(cell, "no compiler")
    right = found["torch"]
    found["torch"] = lambda case, t: right(case, t) * 1.001
    checks = gate(cell.case, tensors(cell.case, torch.device("cpu")), found)
    assert {name for name, of_one in checks.items() if not all(check.green for check in of_one)} == {"torch"}


def test_another_candidate_that_is_off_is_left_out_and_named(monkeypatch):
    peer = BOTH[0]
    right = FORMULAS["dora"][peer]
    monkeypatch.setitem(FORMULAS["dora"], peer, lambda t: right(t) + 1e-3 * t.magnitude)
    figures = kernels.measure(settings(), "no compiler")
    assert peer not in figures["candidates"]
    assert figures["absent"][peer].startswith(f"not timed, since it is off: {settings().case}: {peer}: output: error ")
    assert figures["candidates"].keys() == {"reference", "torch", "torch, ‖W‖² kept", BOTH[1]}
    assert figures["checks"] == 4 * (len(GRADIENTS["dora"]) + 1)


def test_the_compiled_reference_takes_part_where_there_is_a_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    found, absent = candidates(settings(), None)
    assert COMPILED in found
    assert COMPILED not in absent
    assert kernels.compiler_obstacle("cpu") is None

    def broken(function, **options):
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    assert kernels.compiler_obstacle("cpu") == "torch.compile fails here: RuntimeError: no C++ compiler"


def test_figures_of_lora_counted_by_hand():
    row = kernels.measure(settings("lora"), "no compiler")["candidates"]["torch"]
    M, N, K, r = 7, 40, 24, 3
    forward = M * N * K + M * r * K + M * N * r
    backward = M * N * K + 2 * M * r * K + 2 * M * N * r  # dx by two products, u, dA, dB
    assert row["gflop"] == 2 * (forward + backward) / 1e9
    assert row["saved_mib"] * 2**20 == 4 * M * r  # h
    assert row["relative"]["forward"] == (1.0, 1.0, 1.0)


def test_the_suite_runs_from_the_command_line_and_keeps_finished_cells(tmp_path, capsys, monkeypatch):
    output = tmp_path / "kernels.json"
    assert kernels.main([*QUICK, "--output", str(output)]) == 0
    assert "dora, small: 48 -> 80, 16 rows, r=8, bf16: not measured yet\n  25 checks green\n" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["suite"] == "kernels"
    assert len(found["cells"]) == 2 * len(kernels.OPERATIONS)
    for key, cell in found["cells"].items():
        phases = ["forward"] if "row_norm" in key else ["forward", "both"]
        for row in cell["figures"]["candidates"].values():
            assert list(row["ms"]) == phases
            for median, low, high in row["ms"].values():
                assert 0 < low <= median <= high
        assert cell["figures"]["absent"][COMPILED] == "left out by --no-compile"
    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("measured a finished cell"))
    assert kernels.main([*QUICK, "--output", str(output)]) == 0


def test_a_red_gate_prints_no_figure(tmp_path, capsys, monkeypatch):
    right = kernel_candidates.row_norm
    monkeypatch.setattr(kernel_candidates, "row_norm", lambda *a, **k: 1.01 * right(*a, **k))
    monkeypatch.setattr(kernels, "OPERATIONS", ("row_norm",))
    assert kernels.main([*QUICK, "--output", str(tmp_path / "x.json")]) == 1
    assert "refusing to print figures: 1 of 4 checks fail" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_the_suite_can_be_confined_to_some_models(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "measure", lambda *_: {"left_out": "not here"})
    output = tmp_path / "kernels.json"
    assert kernels.main(["--models", "MiniLM", "4096", "--no-compile", "--output", str(output)]) == 0
    seen = [cell["settings"]["model"] for cell in json.loads(output.read_text())["cells"].values()]
    assert sorted(set(seen)) == ["4096", "MiniLM"]
    assert len(seen) == (3 + 1) * len(kernels.OPERATIONS) * len(kernels.RANKS) * len(kernels.DTYPES)


@pytest.mark.parametrize(
    ("option", "reason"),
    [(["--ram-share", "1e-9"], "asks for 0.0 GiB, and 0.0 are allowed"), (["--seconds", "0"], "s, and 0 are allowed")],
)
def test_what_is_too_much_for_the_machine_is_left_out_and_named(option, reason, tmp_path, capsys):
    output = tmp_path / "kernels.json"
    assert kernels.main([*QUICK, *option, "--output", str(output)]) == 0
    figures = [cell["figures"] for cell in json.loads(output.read_text())["cells"].values()]
    assert all(reason in each["left_out"] for each in figures)
    assert capsys.readouterr().out.count("left out: ") == len(figures)


def test_too_much_goes_by_bytes_and_by_products():
    wide = settings(in_features=8192, out_features=8192, rows=512, rounds=9)
    assert kernels.too_much(wide, ram=2**30, seconds=1e9, rate=1e9) == "asks for 3.5 GiB, and 1.0 are allowed"
    assert kernels.too_much(wide, ram=2**40, seconds=10, rate=1e12) == "would take some 19 s, and 10 are allowed"
    assert kernels.too_much(wide, ram=2**40, seconds=1e9, rate=1e12) is None
    few = settings("row_norm", in_features=8192, out_features=8192, rows=512, rounds=9)
    assert kernels.too_much(few, ram=2**40, seconds=10, rate=1e12) is None  # no batch goes through it
