"""Compile every kernel and shipped configuration for every architecture, without a GPU, and look at the machine code.

`make bench-static` writes static.jsonl and static.md beside this file. A row with errors makes the command fail: spills, another
tensor-core instruction than the type of the product has, registers or shared memory beyond the limits, serialized wgmma, inline
PTX on tiles whose registers are not four neighbours along k.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantdit.formats import FORMATS, QSpec
from quantdit.kernels.triton_ops import attention8, decode8, decode_trellis, dispatch, gemm_packed, gemm_w8a8, quantize_tokens
from quantdit.kernels.triton_ops.tuning import Config

FOLDER = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {80: "sm_80", 89: "sm_89", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
REGISTERS = 65536
# What the product of each type is in SASS. Small tiles may take mma.sync on Hopper and Blackwell too.
INSTRUCTION = {
    "int8": {80: r"IMMA", 89: r"IMMA", 90: r"IGMMA|IMMA", 100: r"UTCIMMA|IMMA", 120: r"IMMA"},
    "e4m3": {89: r"QMMA", 90: r"QGMMA", 100: r"UTCQMMA|QMMA", 120: r"QMMA"},
    "bf16": {80: r"HMMA", 89: r"HMMA", 90: r"HGMMA|HMMA", 100: r"UTCHMMA|HMMA", 120: r"HMMA"},
}
MMA = re.compile(r"^(HMMA|IMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)")
SASS = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")


@dataclass(frozen=True)
class Case:
    """One compilation: `types` of the arguments that are not constants, and the type of the product, if there is one."""

    kernel: str
    variant: str
    arch: int
    types: dict[str, str]
    constants: dict
    warps: int
    stages: int
    product: str | None = None
    macs: int = 0  # of a turn of the main loop
    neighbours: int = 1  # along k that inline PTX expects in a register

    @property
    def key(self) -> tuple[str, str, int]:
        """Return what names the row."""
        return self.kernel, self.variant, self.arch


MODULES = (quantize_tokens, decode8, decode_trellis, gemm_w8a8, gemm_packed, attention8)
JIT = {name: value for module in MODULES for name, value in vars(module).items() if name.endswith("_kernel")}
BRANCH = dict.fromkeys(("hidden_ptr", "up_ptr"))
BRANCH_TYPES = dict.fromkeys(BRANCH, "*bf16")
SIZES = ("M", "N", "K", "rank")


def text(c: Config) -> str:
    """Return a configuration as `128x256x128 w8 s3`."""
    return f"{c.bm}x{c.bn}x{c.bk} w{c.warps} s{c.stages}" + (f" k{c.splits}" if c.splits > 1 else "")


def quantize_cases(arch: int) -> Iterator[Case]:
    """Each format with its rotation, at widths of a row and of many; the last are parts that dispatch uses alone."""
    variants = [
        ("int rotated", "bf16", "i8", "int", 8, 0, True),
        ("int rotated, smoothed", "bf16", "fp32", "int", 8, 0, True),
        ("affine g32 rotated", "bf16", "i8", "affine", 4, 32, True),
        ("int g64 rotated", "bf16", "i8", "int", 4, 64, True),
        ("affine rotated", "bf16", "i8", "affine", 8, 0, True),
        ("rotated", "bf16", "i8", "none", 8, 0, True),
        ("rotated float32", "fp32", "i8", "none", 8, 0, True),
        ("int", "bf16", None, "int", 8, 0, False),
        ("int float32", "fp32", None, "int", 8, 0, False),
        ("int g32", "bf16", None, "int", 4, 32, False),
        ("affine", "bf16", None, "affine", 8, 0, False),
        ("affine g32 float32", "fp32", None, "affine", 4, 32, False),
    ]
    if arch >= 89:
        variants.append(("e4m3", "bf16", None, "fp8", 8, 0, False))
    if arch >= 89:
        variants.append(("e4m3 rotated", "bf16", "i8", "fp8", 8, 0, True))
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for name, x, multiplier, format, bits, group, rotated in variants:
        for k in widths(name, rotated, group):
            multiplied = torch.int8 if multiplier == "i8" else torch.float32
            if rotated and not dispatch.rotates_in_registers(k, dtypes[x], multiplied, arch):
                continue
            smooth = torch.empty(0, dtype=torch.float32 if multiplier == "fp32" else torch.int8)
            constants = quantize_tokens.constants_of(k, dtypes[x], smooth if multiplier else None, format, bits, group, arch)
            warps = constants.pop("num_warps")
            y = {"none": x, "fp8": "fp8e4nv"}.get(format, "i8")
            types = {
                "x_ptr": f"*{x}",
                "y_ptr": f"*{y}",
                "scale_ptr": "*fp32",
                "M": "i32",
                "K": "i32",
                "norm": "fp32",
            }
            absent = {"static_ptr": None}
            for argument, kind in (("premultiplier_ptr", multiplier), ("hadamard_ptr", "bf16" if rotated else None)):
                (types if kind else absent)[argument] = f"*{kind}" if kind else None
            product = "bf16" if rotated else None
            yield Case(
                "quantize_tokens_kernel",
                f"{name}, k={k}",
                arch,
                types,
                constants | absent,
                warps,
                quantize_tokens.STAGES,
                product,
            )


def widths(name: str, rotated: bool, group: int) -> tuple[int, ...]:
    """Return the widths of a variant's tokens: of few rows, the widest that dispatch lets in, and more of the usual ones."""
    widest = dispatch.LARGEST_GROUPED_WIDTH if group else dispatch.LARGEST_ROTATED_WIDTH if rotated else dispatch.LARGEST_WIDTH
    return (1536, widest, 8960) if name in ("int rotated", "rotated") else (1536, widest)


def project_cases(arch: int) -> Iterator[Case]:
    """The largest rank with each format, a small one with the usual."""
    variants = [
        ("int", torch.bfloat16, torch.int8, "int", 8, 0, 64),
        ("int", torch.bfloat16, torch.int8, "int", 8, 0, 32),
        ("int smoothed", torch.bfloat16, torch.float32, "int", 8, 0, 64),
        ("int smoothed float16", torch.float16, torch.float32, "int", 8, 0, 64),
        ("int g64", torch.bfloat16, torch.int8, "int", 4, 64, 64),
        ("affine", torch.bfloat16, torch.int8, "affine", 8, 0, 64),
        ("affine g32 smoothed", torch.bfloat16, torch.float32, "affine", 4, 32, 64),
    ]
    if arch >= 89:
        variants.append(("e4m3", torch.bfloat16, torch.int8, "fp8", 8, 0, 64))
    for name, dtype, multiplier, format, bits, group, rank in variants:
        smooth = torch.empty(0, dtype=multiplier)
        constants = quantize_tokens.project_constants(rank, dtype, smooth, format, bits, group)
        warps = constants.pop("num_warps")
        stages = constants.pop("num_stages")
        x = "bf16" if dtype == torch.bfloat16 else "fp16"
        types = {"x_ptr": f"*{x}", "hidden_ptr": f"*{x}", "down_ptr": "*bf16", "hadamard_ptr": "*bf16", "scale_ptr": "*fp32"}
        types["premultiplier_ptr"] = "*i8" if multiplier == torch.int8 else "*fp32"
        types["y_ptr"] = "*fp8e4nv" if format == "fp8" else "*i8"
        types |= dict.fromkeys(("M", "K", "rank"), "i32") | {"norm": "fp32"}
        constants["static_ptr"] = None
        yield Case("quantize_project_kernel", f"{name}, rank {rank}", arch, types, constants, warps, stages, "bf16")


def decode_cases(arch: int) -> Iterator[Case]:
    """Every packed format that decodes differently, and shorter last blocks."""
    packed = [
        name for name, f in FORMATS.items() if f.kind in ("affine", "codebook", "vectors") and f.decoded_dtype == torch.int8
    ]
    for name, tail in [*((name, 128) for name in packed), ("int4", 64), ("int3", 40)]:
        types, constants = weight_arguments(name, 64)
        constants["T"] = tail
        del constants["TAIL"]
        types |= {"y_ptr": "*u8", "N": "i32", "K": "i32", "row_bytes": "i32", "first_tile": "i32"}
        yield Case("decode8_kernel", f"{name}, block of {tail}", arch, types, constants | {"BN": decode8.BN}, 4, 3)


def trellis_cases(arch: int) -> Iterator[Case]:
    """Every width of codes with the smallest table, one that fits shared memory and one that does not."""
    for name, tail in [*((f"trellis{b}_l{w}", 128) for b in (2, 3, 4) for w in (10, 12, 16)), ("trellis3_l12", 40)]:
        types = {"data_ptr": "*u8", "codebook_ptr": "*i8", "y_ptr": "*i8"} | dict.fromkeys(
            ("N", "K", "row_bytes", "first_tile"), "i32"
        )
        constants = decode_trellis.constants(FORMATS[name]) | {"T": tail, "BN": decode_trellis.BN}
        yield Case("decode_trellis_kernel", f"{name}, block of {tail}", arch, types, constants, 4, 3)


def weight_arguments(name: str, group: int, rows: int = 1, k: int = 1536) -> tuple[dict[str, str], dict]:
    """Return types and constants of a stored weight."""
    layout = decode8.layout_of(QSpec(name, 128 if rows == 1 else rows, k, group, rows))
    types = {"data_ptr": "*u8"}
    constants = layout.constants()
    for argument, kinds in (
        ("multiplier_ptr", ("affine",)),
        ("offset_ptr", ("affine",)),
        ("codebook_ptr", ("codebook", "vectors")),
    ):
        if layout.kind in kinds:
            types[argument] = "*u8"
        else:
            constants[argument] = None
    return types, constants


def w8a8_cases(arch: int) -> Iterator[Case]:
    """Every configuration with each type; the first also with all that may follow, and with a width that is no multiple."""
    for dot, x, w in (("int8", "i8", "i8"), ("e4m3", "fp8e4nv", "fp8e4nv"), ("bf16", "i8", "u8")):
        if dot == "e4m3" and arch < 89:
            continue
        types = {"x_ptr": f"*{x}", "w_ptr": f"*{w}", "y_ptr": "*bf16", "token_scale_ptr": "*fp32", "scale_ptr": "*fp32"}
        types |= dict.fromkeys(SIZES, "i32") | {"bias_ptr": "*bf16"}
        plain = gemm_w8a8.CONFIGS[arch] if dot == "int8" else ()
        for i, c in enumerate(dict.fromkeys((*plain, *gemm_w8a8.SMALL[arch]))):
            tile = {"BM": c.bm, "BN": c.bn, "BK": c.bk, "DOT": dot, "EVEN_K": True}
            product, macs = ("bf16" if dot == "bf16" else dot), c.bm * c.bn * c.bk

            def case(variant: str, types: dict, constants: dict, c: Config = c, product: str = product, macs: int = macs) -> Case:
                name = f"{variant}, {text(c)}"
                return Case("gemm_w8a8_kernel", name, arch, types, constants, c.warps, c.stages, product, macs)

            yield case(dot, types, BRANCH | tile)
            if i == 0:
                yield case(f"{dot} ragged k", types, BRANCH | tile | {"EVEN_K": False})
            if c in gemm_w8a8.SMALL[arch] and dot == "int8":
                yield case(f"{dot} low rank", types | BRANCH_TYPES, tile)


# (format, group, rows of the table, type of the activations)
A8 = (
    ("int4", 1536, 1, "i8"),
    ("int4", 64, 1, "i8"),
    ("int4", 32, 1, "i8"),
    ("table4", 1536, 1, "i8"),
    ("table4", 1536, 8, "i8"),
    ("table4_e4m3", 1536, 1, "i8"),
    ("table3", 1536, 1, "i8"),
    ("int2", 32, 1, "i8"),
    ("vq256x4", 1536, 1, "i8"),
    ("ssvq256x8", 1536, 1, "i8"),
)
A16 = (
    ("int4", 64, 1, "bf16"),
    ("table4", 1536, 1, "bf16"),
    ("table4", 1536, 8, "bf16"),
    ("table4", 1536, 1, "fp16"),
    ("table4_e4m3", 1536, 1, "bf16"),
    ("table2", 1536, 1, "bf16"),
    ("table6", 1536, 1, "bf16"),
    ("int8", 1536, 1, "bf16"),
    ("vq256x4", 1536, 1, "bf16"),
)


def with_every_format(chosen: tuple[tuple, ...], x: str) -> tuple[tuple, ...]:
    """Return the chosen weights and, once, every other format that dispatch gives to gemm_packed_kernel with activations x."""
    named = {name for name, *_ in chosen}
    left = (
        name
        for name, f in FORMATS.items()
        if name not in named and f.kind != "trellis" and not (f.kind == "whole" if x == "i8" else f.sign_split)
    )
    return chosen + tuple((name, 32 if FORMATS[name].kind == "affine" else 1536, 1, x) for name in left)


def packed_cases(arch: int) -> Iterator[Case]:
    """Every configuration with the usual formats, the first with each of the others."""
    for (name, group, rows, x), configs in chain(
        ((a, gemm_packed.CONFIGS_A8[arch]) for a in with_every_format(A8, "i8")),
        ((a, gemm_packed.CONFIGS_A16[arch]) for a in with_every_format(A16, "bf16")),
    ):
        f = FORMATS[name]
        e4m3 = f.decoded_dtype == torch.float8_e4m3fn
        neighbours = 1 if f.kind == "codebook" and rows == 1 else 4 if x == "i8" else 2
        dot = gemm_packed.dot_of(torch.int8 if x == "i8" else torch.bfloat16, e4m3)
        plain, constants = weight_arguments(name, group, rows)
        plain |= {"x_ptr": f"*{x}", "scale_ptr": "*fp32", "bias_ptr": "*bf16"} | dict.fromkeys(
            (*SIZES, "row_bytes", "tiles", "tail_tiles"), "i32"
        )
        constants |= {"DOT": dot, "E4M3": e4m3, "ASM": True}
        if dot == "none":
            constants["token_scale_ptr"] = None
        else:
            plain["token_scale_ptr"] = "*fp32"
        main = (name, group, rows) in (("int4", 64, 1), ("table4", 1536, 1), ("table2", 1536, 1)) and x != "fp16"
        for i, c in enumerate(configs if main else configs[:1]):
            sums = "i32" if dot == "int8" else "fp32"
            y = {"y_ptr": f"*{sums}" if c.splits > 1 else "*bf16"}
            tile = {"BM": c.bm, "BN": c.bn, "SPLITS": c.splits}
            label = f"{name}{f' g{group}' if group < 1536 else ''}{' rows' if rows > 1 else ''} {x}"
            product, macs = ("int8" if dot == "int8" else "bf16"), c.bm * c.bn * c.bk

            def case(
                what: str,
                types: dict,
                constants: dict,
                label: str = label,
                c: Config = c,
                product: str = product,
                macs: int = macs,
                neighbours: int = neighbours,
            ) -> Case:
                variant = f"{label}{what}, {text(c)}"
                return Case("gemm_packed_kernel", variant, arch, types, constants, c.warps, c.stages, product, macs, neighbours)

            yield case("", plain | y, constants | tile | BRANCH)
            if i == 0 and (name, group) in (("int4", 64), ("table2", 1536)):
                yield case(" last block of 64", plain | y, constants | tile | BRANCH | {"TAIL": 64})
                yield case(" in plain Triton", plain | y, constants | tile | BRANCH | {"ASM": False})
            if x == "i8" and (name, group) == ("int4", 64) and c.splits == 1 and c.bm * c.bn <= gemm_packed.LIGHT:
                yield case(" low rank", plain | y | BRANCH_TYPES, constants | tile)


def sum_cases(arch: int) -> Iterator[Case]:
    """Every number of splits, of either type."""
    every = {c.splits for configs in (gemm_packed.CONFIGS_A8, gemm_packed.CONFIGS_A16) for c in configs[arch] if c.splits > 1}
    for splits in sorted(every):
        for sums in ("i32", "fp32"):
            types = {"sums_ptr": f"*{sums}", "y_ptr": "*bf16", "scale_ptr": "*fp32", "bias_ptr": "*bf16"}
            types |= dict.fromkeys(("M", "N", "rank"), "i32")
            constants = BRANCH | {"SPLITS": splits, "BM": 16, "BN": 64}
            if sums == "i32":
                types["token_scale_ptr"] = "*fp32"
            else:
                constants["token_scale_ptr"] = None
            yield Case("sum_splits_kernel", f"{splits} of {sums}", arch, types, constants, 4, 3)


def attention_cases(arch: int) -> Iterator[Case]:
    """Every configuration with each type of values and the usual head; once with a mask, causal, and with the other heads."""
    pointers = {"q_ptr": "*i8", "k_ptr": "*i8", "y_ptr": "*fp32", "q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32"}
    pointers |= {"v_scale_ptr": "*fp32"} | dict.fromkeys(("M", "N", "H", "v_row", "mask_b", "mask_h", "mask_m", "mask_n"), "i32")
    for pv, v, product in (("int8", "i8", "int8"), ("e4m3", "fp8e4nv", "e4m3"), ("float", "bf16", "bf16")):
        if pv == "e4m3" and arch < 89:
            continue
        first, *rest = attention8.SMALL if pv == "float" else attention8.CONFIGS[arch]
        others = ((c, "", 128) for c in rest)
        masked = ((c, " masked", 128) for c in attention8.SMALL)
        for c, what, d in ((first, "", 128), (first, " causal", 128), (first, "", 64), *masked, *others):
            types = pointers | {"v_ptr": f"*{v}"} | ({"mask_ptr": "*fp32"} if what == " masked" else {})
            constants = {"CAUSAL": what == " causal", "PV": pv, "D": d, "BM": c.bm, "BN": c.bn}
            constants |= {} if what == " masked" else {"mask_ptr": None}
            variant = f"{pv} d={d}{what}, {c.bm}x{c.bn} w{c.warps} s{c.stages}"
            macs = c.bm * c.bn * d
            yield Case("attention8_kernel", variant, arch, types, constants, c.warps, c.stages, product, macs)


def cases(arch: int) -> list[Case]:
    """Return everything that is shipped for an architecture."""
    return [
        c
        for make in (
            quantize_cases,
            project_cases,
            decode_cases,
            trellis_cases,
            w8a8_cases,
            packed_cases,
            sum_cases,
            attention_cases,
        )
        for c in make(arch)
    ]


def compiled(case: Case):
    """Compile as the JIT would for pointers and sizes that are multiples of 16."""
    kernel = JIT[case.kernel]
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in kernel.arg_names}
    aligned = {"K", "N", "row_bytes", "rank", "v_row"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name in aligned and signature[name] == "i32")
    }
    constants = {name: case.constants[name] for name in kernel.arg_names if name in case.constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def inspect(case: Case) -> dict:
    """Return the row of a case: what ptxas and the machine code say, and the errors."""
    row = {"kernel": case.kernel, "variant": case.variant, "arch": case.arch, "triton": triton.__version__}
    try:
        kernel = compiled(case)
    except Exception as error:  # a kernel that does not compile is a row, whatever the compiler raised
        text = str(error.__cause__ or error).strip().splitlines()
        return row | {"errors": [f"{type(error).__name__}: {text[-1] if text else ''}"[:200]]}
    usage = ptxas(kernel.asm["ptx"], case.arch)
    instructions, loop = machine_code(kernel.asm["cubin"])
    products = collections.Counter(op for op, _ in instructions if MMA.match(op))
    row |= {"registers": usage["registers"], "shared": kernel.metadata.shared, "spilled": usage["spilled"]}
    row |= {"product": " ".join(sorted(products)), "loop": len(loop) if loop else None}
    if loop and case.macs:
        row["per_mac"] = round(len(loop) * 32 * case.warps / case.macs, 4)
    errors = list(usage["errors"])
    if usage["spilled"]:
        errors.append(f"spills {usage['spilled']} bytes")
    if case.product and not re.search(INSTRUCTION[case.product][case.arch], row["product"]):
        errors.append(f"no tensor-core instruction of {case.product}: {row['product'] or 'none'}")
    if row["shared"] > SHARED[case.arch]:
        errors.append(f"{row['shared']} bytes of shared memory")
    if usage["registers"] * case.warps * 32 > REGISTERS:
        errors.append(f"{usage['registers']} registers in {case.warps} warps")
    errors += asm_layouts(kernel.asm["ttgir"], case.neighbours)
    return row | {"errors": errors}


def ptxas(ptx: str, arch: int) -> dict:
    """Return registers, spilled bytes and complaints of the assembler that Triton takes for an architecture."""
    blackwell = arch >= 100 or (arch >= 90 and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        tool = TOOLS / ("ptxas-blackwell" if blackwell else "ptxas")
        command = [tool, "-v", f"--gpu-name={NAMES[arch]}", file, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found.group(1)) if found else 0

    errors = [said[:200]] if done.returncode else []
    if "C7515" in said or "serialized" in said:
        errors.append("wgmma serialized")
    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return {"registers": number(r"Used (\d+) registers"), "spilled": spilled, "errors": errors}


def machine_code(cubin: bytes) -> tuple[list, list | None]:
    """Return all instructions (name, operands), and those of the loop with the most tensor-core instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    instructions, labels = [], {}
    for line in done.stdout.splitlines():
        if found := re.match(r"^(\.L\w+):", line.strip()):
            labels[found.group(1)] = len(instructions)
        elif found := SASS.match(line):
            instructions.append((found.group(2), found.group(3)))
    best: tuple[int, list | None] = (0, None)
    for end, (op, operands) in enumerate(instructions):
        target = re.search(r"`?\(?(\.L\w+)", operands) if op.startswith("BRA") else None
        if target and labels.get(target.group(1), end + 1) <= end:
            body = instructions[labels[target.group(1)] : end + 1]
            products = sum(bool(MMA.match(name)) for name, _ in body)
            if products > best[0]:
                best = products, body
    return instructions, best[1]


def asm_layouts(ttgir: str, neighbours: int) -> list[str]:
    """Return what is wrong with the tiles that inline PTX runs on: so many neighbours along k must share a register."""
    aliases = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, flags=re.MULTILINE))
    errors = set()
    for line in ttgir.splitlines():
        if "elementwise_inline_asm" not in line:
            continue
        rows, layout = re.findall(r"tensor<(\d+)x\d+xi8, (#[^>]*(?:<[^>]*>)?[^>]*)>", line)[-1]
        definition = aliases.get(layout, layout)
        if together(definition, int(rows)) < neighbours:
            errors.add(f"inline PTX on {definition[:120]}")
    return sorted(errors)


def together(layout: str, height: int) -> int:
    """Return how many consecutive registers of a thread are neighbours along the last axis of a tile of a height; 0: unknown."""
    if found := re.search(r"dot_op<.*kWidth = (\d+)", layout):
        return int(found.group(1))
    if "#ttg.blocked" in layout:
        numbers = {key: [int(n) for n in text.split(", ")] for key, text in re.findall(r"(\w+) = \[([\d, ]+)\]", layout)}
        rows, columns = numbers["sizePerThread"]
        # A thread alone along the axis goes on where it was, unless it has another row and rows come first.
        alone = rows == 1 and numbers["threadsPerWarp"][1] == numbers["warpsPerCTA"][1] == 1
        if numbers["order"][0] != 1:
            return 4 if alone and height <= numbers["threadsPerWarp"][0] * numbers["warpsPerCTA"][0] else 1
        return 4 if alone else columns
    if found := re.search(r"#ttg.linear<\{register = \[(.*?)\]\]", layout):
        bases = re.findall(r"\[?(\d+), (\d+)", found.group(1))
        run = 1
        for row, column in bases:
            if (int(row), int(column)) != (0, run):
                break
            run *= 2
        return run
    return 0


def markdown(rows: list[dict]) -> str:
    """Return the rows as a table, one line a kernel and variant, registers / shared KiB / loop instructions per MAC each."""
    by_case: dict[tuple[str, str], dict[int, dict]] = {}
    for row in rows:
        by_case.setdefault((row["kernel"], row["variant"]), {})[row["arch"]] = row
    architectures = sorted(NAMES)
    lines = [
        "# Kernels as compiled",
        "",
        f"Triton {rows[0]['triton']}, {len(rows)} compilations, no GPU. A cell: registers a thread, KiB of shared memory and,",
        "for a product, instructions of the main loop per multiplication (of one thread; tensor cores do the multiplying).",
        "No row spills. Made by `make bench-static`. Nothing here is a time.",
        "",
        f"| kernel | variant | {' | '.join(f'sm_{a}' for a in architectures)} |",
        f"|---|---|{'---|' * len(architectures)}",
    ]
    for (kernel, variant), found in by_case.items():
        cells = [_cell(found[a]) if a in found else "" for a in architectures]
        lines.append(f"| {kernel.removesuffix('_kernel')} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict) -> str:
    if row["errors"]:
        return "; ".join(row["errors"])
    per_mac = f", {row['per_mac']:.4f}" if "per_mac" in row else ""
    return f"{row['registers']}, {row['shared'] / 1024:.0f}{per_mac}"


def main() -> int:
    """Compile, write both files, say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, action="append", choices=sorted(NAMES), help="only these; rows of the others are kept"
    )
    parser.add_argument("--missing", action="store_true", help="only what the table lacks; its other rows are kept")
    parser.add_argument("--kernel", help="only kernels and variants with this in their names; nothing is written")
    args = parser.parse_args()
    file = FOLDER / "static.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {(row["kernel"], row["variant"], row["arch"]): row for row in kept} if args.missing else {}
    wanted = [case for arch in args.arch or sorted(NAMES) for case in cases(arch)]
    rows = []
    for case in wanted:
        if args.kernel and args.kernel not in f"{case.kernel} {case.variant}":
            continue
        row = known.get(case.key)
        if row is None:
            row = inspect(case)
            print(f"sm_{case.arch} {case.kernel} {case.variant}: {_cell(row)}", flush=True)
        rows.append(row)
    if not args.kernel:
        made = set(args.arch or NAMES)
        rows = sorted([row for row in kept if row["arch"] not in made] + rows, key=lambda row: row["arch"])
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (FOLDER / "static.md").write_text(markdown(rows))
    wrong = [row for row in rows if row["errors"]]
    for row in wrong:
        print(f"WRONG sm_{row['arch']} {row['kernel']} {row['variant']}: {'; '.join(row['errors'])}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
