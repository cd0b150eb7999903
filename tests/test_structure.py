"""The shape of the package: who may import whom, and that importing it stays light."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
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

# A package imports itself and packages of earlier rows; packages of one row do not know each other. `""` is quantdit/__init__.py,
# which every import of a package runs.
ORDER = (
    ("system", "formats"),
    ("tensors",),
    ("recipes",),
    ("models", "kernels"),
    ("layers", "calibration", "step_plans"),
    ("checkpoints",),
    ("integrations",),
    ("pipelines",),
    ("compiling",),
    ("inspection", "exporters", "evaluation"),
    ("api", "benchmarks", "checkpoint"),
    ("cli",),
    ("",),
)

# Imported when they are asked for.
LATER = {"QuantDiTConfig", "calibrate", "evaluate", "export", "gate", "generate", "inspect", "load", "quantize", "step_plan"}
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


def package(module: str) -> str:
    """Return the package of ORDER that a module belongs to: `quantdit.calibration.observe.capture` -> `calibration`."""
    return module.removeprefix("quantdit").removeprefix(".").partition(".")[0]


def imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, anywhere in it."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from quantdit import checkpoint` imports the module, `from quantdit.tensors.qtensor import QTensor` a name of it.
            found |= {full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names}
    return {name for name in found if name == "quantdit" or name.startswith("quantdit.")}


def test_all_packages_have_a_place_in_the_order():
    places = [p for row in ORDER for p in row]
    assert len(places) == len(set(places))
    assert {package(module) for module in MODULES} == set(places)


def test_imports_follow_the_order():
    """No package imports a later one, so what goes from the command line to a kernel never goes back up."""
    rank = {p: i for i, row in enumerate(ORDER) for p in row}
    for module, path in MODULES.items():
        own = package(module)
        for target in imports(path):
            assert target in MODULES, f"{module} imports {target}, which is no module of the package"
            other = package(target)
            assert other == own or rank[other] < rank[own], f"{module} must not import {target}: see ORDER"


def test_modules_do_not_import_each_other_in_circles():
    graph = {module: imports(path) & MODULES.keys() for module, path in MODULES.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_every_module_imports():
    for module, path in MODULES.items():
        assert importlib.import_module(module).__file__ == str(path)


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
            said = getattr(quantdit, name).__doc__
            assert said and not said.startswith(f"{name}("), "that is what dataclass writes where nobody wrote anything"


def started(code: str) -> str:
    """Return what Python prints, started in the repository as a user would."""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=900)
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages as `pip install .` makes it."""
    folder = tmp_path_factory.mktemp("site-packages")
    build = [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "build_py", "--build-lib", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("place", ["inside a clone", "beside a clone", "elsewhere"])
@pytest.mark.parametrize("kind", ["editable", "installed"])
def test_it_imports_from_anywhere(place: str, kind: str, installed: Path, tmp_path: Path):
    """Python looks in the current folder first, and a clone there bears the package's name."""
    (tmp_path / "quantdit").symlink_to(ROOT) if place == "beside a clone" else None
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    environment |= {"PYTHONPATH": str(installed)} if kind == "installed" else {}
    names = [name for name, path in MODULES.items() if path.name == "__init__.py"]
    code = f"import {', '.join(names)}; print(quantdit.kernels.__file__)"
    where = ROOT if place == "inside a clone" else tmp_path
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=where, env=environment)
    assert done.returncode == 0, done.stderr
    home = installed / "quantdit" if kind == "installed" and place == "elsewhere" else ROOT
    assert Path(done.stdout.strip()).resolve() == home / "kernels" / "__init__.py"
