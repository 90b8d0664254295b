"""The table of tiles: what applies, what overrides it, and what is said where it is wrong."""

import json
import re

import pytest
import torch

from peftlite.kernels.configs import BUILT_IN, VARIABLE, config, kernels, read

ASKED = {"arch": "sm_90", "dtype": torch.bfloat16, "rank": 16, "columns": 768, "rows": 4096}
USE = {"BLOCK": 64, "num_warps": 2, "num_stages": 1}


def table(tmp_path, monkeypatch, content):
    path = tmp_path / "own.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv(VARIABLE, str(path))
    return path


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "interpreter", "sm_999"])
def test_every_kernel_has_an_entry_for_every_case(arch):
    for kernel in kernels():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for rank in (16, 64, 512):
                for rows in (0, 1, 10**9):
                    found = config(kernel, **ASKED | {"arch": arch, "dtype": dtype, "rank": rank, "rows": rows})
                    assert found["num_warps"] * 32 <= 1024


def test_the_first_entry_that_applies_is_used_before_the_built_in_ones(tmp_path, monkeypatch):
    entries = [
        {"when": {"arch": ["sm_90", "sm_100"], "dtype": "bfloat16", "rank": 32, "columns": 768, "rows": 4096}, "use": USE},
        {"when": {"arch": "sm_90", "rank": 64}, "use": USE | {"BLOCK": 128}},
    ]
    built_in = config("pack", **ASKED)
    table(tmp_path, monkeypatch, {"pack": entries})
    assert config("pack", **ASKED) == USE
    assert config("pack", **ASKED | {"rows": 2049}) == USE  # the same bucket
    for other in ({"rows": 4097}, {"columns": 769}, {"rank": 33}, {"dtype": torch.float16}):
        assert config("pack", **ASKED | other)["BLOCK"] == 128
    assert config("pack", **ASKED | {"rank": 65}) == config("pack", **ASKED | {"arch": "sm_80"}) == built_in


def test_a_kernel_without_an_entry_is_named():
    with pytest.raises(ValueError, match=r"no kernel configuration for row_nrom with arch=sm_90, dtype=bfloat16.*row_norm"):
        config("row_nrom", **ASKED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot be read \(.*\); correct it, or unset PEFTLITE_CONFIGS"),
        ([], "does not fit: it must map kernels to lists of entries; correct it, or unset PEFTLITE_CONFIGS"),
        ({"pack": {}}, "pack must be a list of entries"),
        ({"pack": [{"use": USE}]}, "entry 0 of pack must hold the objects 'when' and 'use'"),
        ({"pack": [{"when": {"rnak": 16}, "use": USE}]}, "entry 0 of pack asks for rnak, but 'when' knows arch, dtype, rank"),
        ({"pack": [{"when": {"arch": 90}, "use": USE}]}, "has arch=90, which must be a name or a list of names"),
        ({"pack": [{"when": {"rank": "16"}, "use": USE}]}, "has rank='16', which must be a whole number"),
        ({"pack": [{"when": {}, "use": {"BLOCK": 64}}]}, "entry 0 of pack lacks num_stages, num_warps"),
        ({"pack": [{"when": {}, "use": USE | {"BLOCK": 0}}]}, "has BLOCK=0, which must be a positive whole number"),
        ({"pack": [{"when": {}, "use": USE | {"BLOCK": 48}}]}, "has BLOCK=48, which must be a power of two"),
    ],
)
def test_a_table_that_does_not_fit_says_where(tmp_path, monkeypatch, content, message):
    path = table(tmp_path, monkeypatch, content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        config("pack", **ASKED)


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none.json cannot be read.*unset PEFTLITE_CONFIGS"):
        config("pack", **ASKED)


def test_the_built_in_table_is_what_the_file_says():
    assert read(BUILT_IN) == json.loads(BUILT_IN.read_text())
