"""Compiles a Triton launch for a GPU that is not there, and reads what the machine code does.

A launch is specialised by the very binder that Triton runs before a real launch (dtypes, arguments that are 1 or divisible
by 16, aligned pointers), so that what is judged here is what a GPU of that architecture would run.
"""

import bisect
import hashlib
import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

KIB = 1024
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Architecture(NamedTuple):
    """A compilation target and its limits; `asserted` is False where figures are for information only."""

    target: GPUTarget
    shared_limit: int  # bytes of shared memory that one block may have
    asserted: bool = True


# Shared memory per block: CUDA C++ Programming Guide, table of compute capabilities; CDNA 3 ISA guide for gfx942.
ARCHITECTURES: dict[str, Architecture] = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_86": Architecture(GPUTarget("cuda", 86, 32), 99 * KIB),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 * KIB, asserted=False),
}
REGISTER_FILE = 64 * KIB  # 32-bit registers that one block may have on every sm_ target above

# What is counted, by a pattern for one instruction of the disassembly; all are counted by mnemonic, so that a new
# spelling of the same thing (LDG.E.LTC128B.128.CONSTANT) is not lost.
_SASS = {
    "hmma": r"HMMA\S*",
    "hgmma": r"HGMMA\S*",
    "tcgen05": r"UTC\w*MMA\S*",
    "wide_loads": r"(?:LDG|LDGSTS)\.\S*(?:128|256)\S*|UTMALDG\S*",
    "loads_64": r"(?:LDG|LDGSTS)\.(?:\S*\.)?64\S*",
    "loads_16": r"LDG\.(?:\S*\.)?[US]16\b\S*",
    "loads_8": r"LDG\.(?:\S*\.)?[US]8\b\S*",
    "local_loads": r"LDL\S*",
    "local_stores": r"STL\S*",
    "atomics": r"(?:ATOM|ATOMG|RED|REDG)\b\S*",
}
_GCN = {
    "hmma": r"v_mfma\S*",
    "hgmma": r"(?!)",
    "tcgen05": r"(?!)",
    "wide_loads": r"(?:global|buffer)_load_dwordx4\S*",
    "loads_64": r"(?:global|buffer)_load_dwordx2\S*",
    "loads_16": r"(?:global|buffer)_load_[us]short\S*",
    "loads_8": r"(?:global|buffer)_load_[us]byte\S*",
    "local_loads": r"scratch_load\S*",
    "local_stores": r"scratch_store\S*",
    "atomics": r"(?:global|buffer|flat)_atomic\S*",
}


@dataclass(frozen=True)
class Job:
    """One compilation: a kernel, specialised for one architecture."""

    kernel: JITFunction
    architecture: str
    signature: Mapping[str, str]
    constexprs: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """A digest of everything that the machine code depends on, the source of the kernel and all it calls included."""
        parts = (
            self.kernel.cache_key,
            self.architecture,
            sorted(self.signature.items()),
            sorted((key, str(value)) for key, value in self.constexprs.items()),
            sorted((key, str(value)) for key, value in self.attributes.items()),
            sorted(self.options.items()),
            triton.__version__,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]

    def constants(self) -> dict[str, Any]:
        """The compile-time arguments by name, those that an argument of 1 or None turned into one included."""
        names = list(self.signature)
        return {names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1}


def specialise(
    kernel: JITFunction, architecture: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any], options: Mapping[str, Any]
) -> Job:
    """Specialise a launch of `kernel` for `architecture`, as Triton would before running it there.

    Args:
        kernel: a function under ``@triton.jit``, made without the interpreter.
        architecture: a name of `ARCHITECTURES`.
        arguments: positional arguments of the kernel; tensors may be on the meta device, whose pointer counts as aligned.
        keywords: its other arguments, compile-time ones included.
        options: ``num_warps``, ``num_stages``, ``enable_fp_fusion`` and their like.

    Raises:
        TypeError: the kernel was made for the interpreter, which cannot be compiled.
    """
    if not isinstance(kernel, JITFunction):
        raise TypeError(
            f"{kernel!r} cannot be compiled: it was made under TRITON_INTERPRET=1; unset the variable in a new process"
        )
    backend = make_backend(ARCHITECTURES[architecture].target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = binder(*arguments, **keywords, **options)
    _, signature, constexprs, attributes = kernel._pack_args(backend, given, bound, specialization, given)
    return Job(kernel, architecture, signature, constexprs, attributes, dict(options))


def compile_job(job: Job) -> tuple[dict[str, Any], bytes]:
    """Compile `job`; its figures, and for NVIDIA the machine code, of which `count_instructions` knows the others.

    Registers, bytes of shared, stack and local memory, ``sqrt`` and ``div`` as sorted lists of the floating-point PTX forms
    that occur, and ``dots``, the number of products in Triton's intermediate form.
    """
    architecture = ARCHITECTURES[job.architecture]
    source = ASTSource(
        fn=job.kernel, signature=dict(job.signature), constexprs=dict(job.constexprs), attrs=dict(job.attributes)
    )
    compiled = triton.compile(source, target=architecture.target, options=dict(job.options))
    figures: dict[str, Any] = {
        "shared": compiled.metadata.shared,
        "threads": compiled.metadata.num_warps * architecture.target.warp_size,
        "dots": len(re.findall(r"= tt\.dot\b", compiled.asm["ttir"])),
    }
    if architecture.target.backend != "cuda":
        return figures | _read_gcn(compiled.asm["amdgcn"]), b""
    cubin = compiled.asm["cubin"]
    return figures | _read_usage(cubin) | _read_ptx(compiled.asm["ptx"]), _machine_code(cubin)


def count_instructions(architecture: str, codes: Sequence[bytes]) -> list[dict[str, int]]:
    """How many instructions of each kind in `_SASS` each of `codes` holds, and its spills, the stores to local memory.

    All are disassembled as one, since the disassembler takes longer to start than to read a kernel. Nothing for gfx, whose
    assembly the compiler writes itself.
    """
    target = ARCHITECTURES[architecture].target
    if target.backend != "cuda":
        return [{} for _ in codes]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        name = f"SM{target.arch}{'a' if target.arch >= 90 else ''}"  # as Triton compiles for them
        sass = _tool("nvdisasm", "--binary", name, file.name) if any(codes) else ""
    mnemonics: list[Counter[str]] = [Counter() for _ in codes]
    ends = list(itertools.accumulate(len(code) for code in codes))
    # A line is "/*0a40*/  @!P0 LDG.E.128 R4, desc[...] ;": the mnemonic stands after an optional predicate.
    for address, mnemonic in re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE):
        mnemonics[bisect.bisect_right(ends, int(address, 16))][mnemonic] += 1
    counts = [_count(_SASS, found) for found in mnemonics]
    return [found | {"spills": found["local_stores"]} for found in counts]


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(NVIDIA_TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _count(patterns: Mapping[str, str], mnemonics: Mapping[str, int]) -> dict[str, int]:
    return {
        name: sum(count for mnemonic, count in mnemonics.items() if re.fullmatch(pattern, mnemonic))
        for name, pattern in patterns.items()
    }


def _read_usage(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage says nothing of registers; its form changed? It said:\n{usage}")
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "stack": stack, "local": local}


def _machine_code(cubin: bytes) -> bytes:
    """The instructions of the one kernel in `cubin`: the section ``.text.<kernel>`` of an ELF64 file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    count, names_index = struct.unpack_from("<HH", cubin, 60)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * index) for index in range(count)]
    names = sections[names_index][4]
    found = [cubin[at : at + size] for name, _, _, _, at, size in sections if cubin.startswith(b".text.", names + name)]
    if len(found) != 1:
        raise RuntimeError(f"a compiled kernel must have one section of instructions, found {len(found)}")
    return found[0]


def _read_ptx(ptx: str) -> dict[str, Any]:
    return {name: sorted(set(re.findall(rf"\b({name}\.[a-z.]*f(?:32|64))\b", ptx))) for name in ("sqrt", "div")}


def _read_gcn(text: str) -> dict[str, Any]:
    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the gfx assembly says nothing of .{name}; its form changed?")
        return int(found.group(1))

    private = fact("private_segment_fixed_size")
    return {
        "registers": fact("vgpr_count"),
        "stack": private,
        "local": private,
        "spills": fact("vgpr_spill_count") + fact("sgpr_spill_count"),
        **_count(_GCN, Counter(re.findall(r"^\s+([a-z][a-z0-9_]*)", text, re.MULTILINE))),
        "sqrt": [],
        "div": [],
    }
