"""The shape of the package: who may import whom, and that importing it stays light."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import quantdit

ROOT = Path(__file__).resolve().parents[1]
# Where each package lies in the checkout (setup.cfg, package_dir).
HOMES = {
    "quantdit": ROOT / "quantdit",
    "quantdit.calibration": ROOT / "calibration",
    "quantdit.kernels": ROOT / "kernels",
    "quantdit.exporters": ROOT / "exporters",
}

# A part imports itself and parts of earlier rows; parts of one row do not know each other. `""` is quantdit/__init__.py.
ORDER = (
    ("formats", "hadamard", "timesteps", "files", "memory", "after_import", "progress", "threads"),
    ("qtensor", "transform", "transformers_quantizer", "sealed"),
    ("layer_spec",),
    ("recipe",),
    ("kernels", "models"),
    ("calibration", "linear"),
    ("", "lora", "flux_lora"),
    ("checkpoint", "class_tree"),
    ("sources",),
    ("streaming", "random_weights", "diffusers_quantizer"),
    ("diffusers_classes",),
    ("pipeline",),
    ("sampling", "work_folder"),
    ("block_by_block",),
    ("compiler", "in_memory"),
    ("inspection", "exporters", "evaluation", "bench"),
    ("commands", "bench_baselines", "bench_report", "bench_onnx"),
    ("bench_cases",),
    ("bench_kernels",),
    ("models.train", "models.planted", "cli"),
)
# Files that only run as a script, or that only tests and reports use: nothing here imports them.
SCRIPTS = ("cli", "models.train", "models.planted")

LATER = {"QuantDiTConfig", "evaluate", "export", "gate", "generate", "load", "quantize"}  # imported when they are asked for
PUBLIC = sorted({"FORMATS", "Format", "QSpec", "QTensor", "Recipe", "Rule"} | LATER)
HEAVY = (
    "diffusers",
    "peft",
    "triton",
    "numba",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "transformers",
    "accelerate",
    "skimage",
    "scipy",
    "PIL",
)


def modules() -> dict[str, Path]:
    """Return every module of the package by its import name."""
    found = {}
    for package, home in HOMES.items():
        for path in sorted(home.rglob("*.py")):
            parts = path.relative_to(home).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = modules()


def part(module: str) -> str:
    """Return the part of ORDER a module belongs to: `quantdit.models.train.real_set` -> `models.train`."""
    inner = module.removeprefix("quantdit").removeprefix(".")
    known = [p for row in ORDER for p in row if p and (inner == p or inner.startswith(f"{p}."))]
    return max(known, key=len, default=inner)


def imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from quantdit import checkpoint` imports the module, `from quantdit.qtensor import QTensor` a name of it.
            found |= {full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names}
    return {name for name in found if name == "quantdit" or name.startswith("quantdit.")}


def test_all_modules_have_a_place_in_the_order():
    places = [p for row in ORDER for p in row]
    assert len(places) == len(set(places))
    assert {part(module) for module in MODULES} == set(places)


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_order(module: str):
    rank = {p: i for i, row in enumerate(ORDER) for p in row}
    own = part(module)
    for target in imports(MODULES[module]):
        assert target in MODULES, f"{module} imports {target}, which is no module of the package"
        other = part(target)
        assert other == own or rank[other] < rank[own], f"{module} ({own}) must not import {target} ({other})"
        assert other == own or other not in SCRIPTS, f"{module} imports the script {target}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_absolute(module: str):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno} imports relatively"
            assert node.names[0].name != "*", f"{module} line {node.lineno} imports everything"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str):
    assert importlib.import_module(module).__file__ == str(MODULES[module])


def test_no_module_is_named_after_a_dependency():
    """`quantdit/exporters/onnx.py` would be taken for onnx whenever its folder is on the path."""
    declared = [re.split(r"[ ;<>=!\[~]", r)[0] for r in importlib.metadata.requires("quantdit") or []]
    taken = {name.lower().replace("-", "_") for name in declared} | sys.stdlib_module_names
    taken |= {"onnx", "onnxruntime", "triton", "transformers", "huggingface_hub", "peft", "PIL", "skimage"}
    assert not {name.rpartition(".")[2] for name in MODULES} & taken
    assert not {path.stem for path in (ROOT / "tests").rglob("*.py")} & taken


def test_packages_of_setup_cfg_are_those_in_the_tree():
    import configparser

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    declared = set(config["options"]["packages"].split())
    assert declared == {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert all(path.parent.joinpath("__init__.py").exists() for path in MODULES.values())


def test_public_names():
    assert sorted(quantdit.__all__) == PUBLIC
    leaked = {n for n, v in vars(quantdit).items() if not n.startswith("_") and not isinstance(v, ModuleType)} - {"annotations"}
    assert leaked == set(PUBLIC) - LATER
    assert set(PUBLIC) <= set(dir(quantdit))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        quantdit.lod  # noqa: B018
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", quantdit.__version__)


def test_public_objects_say_what_they_are():
    for name in PUBLIC:
        if name != "FORMATS":
            assert getattr(quantdit, name).__doc__


def started(code: str) -> str:
    """Return what Python prints, started in the repository as a user would."""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


def test_folder_kernels_shadows_no_package():
    """`kernels` is a package that diffusers imports; ours is `quantdit.kernels`."""
    code = "from importlib.util import find_spec; print([getattr(find_spec(n), 'origin', None) for n in {!r}])"
    names = ["kernels", "calibration", "exporters"]
    for origin in ast.literal_eval(started(code.format(names))):
        assert origin is None or not Path(origin).is_relative_to(ROOT)
    assert not list((ROOT / "quantdit").rglob("__main__.py")), "python -m quantdit would put the repository on the path"
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


def test_importing_is_light():
    looked = f"[n for n in {HEAVY} if n in sys.modules]"
    code = f"""if True:
        import sys
        from torch.cuda import is_initialized
        first = {looked}
        import quantdit.cli
        print((first, {looked}, is_initialized()))"""
    first, then, initialised = ast.literal_eval(started(code))
    assert then == first, "only what torch itself brings"
    assert not set(then) & {"diffusers", "triton", "numba", "onnx", "onnxruntime", "matplotlib", "transformers"}
    assert not initialised
