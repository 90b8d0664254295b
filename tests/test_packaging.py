"""What is built holds every module, and what is imported is lean."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, cwd: Path = ROOT) -> str:
    """Output of `code` in a fresh process, with `cwd` first on the path as in a shell that stands there.

    It may write byte code, as an installed package has it: compiling the sources anew is half of the import's time.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a clean copy of the files under version control."""
    folder = tmp_path_factory.mktemp("build")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        source, target = ROOT / name, folder / "copy" / name
        if name and (source.exists() or source.is_symlink()):
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                target.symlink_to(source.readlink())
            else:
                target.write_bytes(source.read_bytes())
    build(folder / "copy", folder / "dist")
    return folder / "dist"


def build(source: Path, target: Path, *options: str, **environment: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(target), str(source)]
    done = subprocess.run(
        command, cwd=source.parent, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def modules() -> set[str]:
    """Every file that belongs into the package, by its path in it."""
    package, kernels = ROOT / "peftlite", ROOT / "kernels"
    found = {p.relative_to(ROOT).as_posix() for p in package.rglob("*.py")} | {"peftlite/py.typed"}
    ours = [*kernels.rglob("*.py"), *kernels.rglob("*.json")]
    found |= {f"peftlite/kernels/{p.relative_to(kernels).as_posix()}" for p in ours}
    assert {"peftlite/adapter.py", "peftlite/methods/lora.py", "peftlite/kernels/lora_linear.py"} <= found
    assert "peftlite/kernels/configs.json" in found
    return found


def test_the_wheel_holds_every_module(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert modules() <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"peftlite"}
    assert not [name for name in names if name.endswith("kernels/__init__.py")]
    assert [name for name in names if name.endswith("LICENSE")]


@pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler")
def test_the_wheel_holds_the_native_passes_and_serves_every_python(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("peftlite/kernels/_native.")]
    assert "-cp310-abi3-" in wheel.name


def test_without_a_compiler_the_wheel_is_built_without_them(built: Path, tmp_path: Path) -> None:
    build(built.parent / "copy", tmp_path / "dist", "--wheel", CC="false")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "_native." in name]
        archive.extractall(tmp_path / "installed")
    code = "from peftlite.kernels import native_library; print(native_library.instruction_set(), native_library.__file__)"
    kind, where = python(code, cwd=tmp_path / "installed").split()
    assert kind == "none"
    assert Path(where) == tmp_path / "installed/peftlite/kernels/native_library.py"


def test_the_sdist_holds_them_as_ordinary_files(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    for name in modules():
        assert files[name].isfile(), name
    headers = {f"kernels/native_{part}.h" for part in ("passes", "dot", "product")}
    assert {"pyproject.toml", "kernels/native.c"} | headers <= files.keys()


def test_the_wheel_works_where_the_repository_is_not(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    where = python("import peftlite, peftlite.kernels.dora_linear as m; print(m.__file__)", cwd=tmp_path)
    assert Path(where) == tmp_path / "peftlite/kernels/dora_linear.py"


IMPORT = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import peftlite
seconds = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = {"triton", "transformers", "peft", "huggingface_hub", "accelerate", "tokenizers", "scipy", "matplotlib"}
assert not new & heavy, new & heavy
assert not heavy & {name for name in sys.modules if "." not in name}
assert not torch.cuda.is_initialized()
print(seconds)
"""


def test_import_is_lean_and_quick() -> None:
    assert min(float(python(IMPORT)) for _ in range(5)) < 0.15


def test_the_folder_kernels_shadows_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "peftlite" / "kernels").is_symlink()
    assert (ROOT / "peftlite" / "kernels").readlink() == Path("../kernels")
    assert python("import sys, transformers, transformers.integrations; print(sys.path[0] == '')") == "True"


def test_a_regular_package_of_that_name_wins(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("real = True\n")
    assert python(f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.real)") == "True"
