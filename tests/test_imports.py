"""The order of the layers: imports go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import zotuner

PACKAGE = Path(zotuner.__file__).parent

# A module may import from layers below its own, and within its layer from those named before it.
LAYERS = [
    ["errors", "signals", "remote", "files", "noise", "block_types", "blocks", "config", "metrics", "pickled"],
    ["quantized", "pertnn", "perturb", "gradients", "card", "pth"],
    ["tuner", "tuner_out", "optim", "tasks", "virtual", "adapters", "models", "snapshot", "ledger", "published", "hub"],
    ["prompting", "batch", "scoring", "objective", "evaluate", "progress"],
    [
        "trajectory",
        "steppers",
        "training",
        "finetune",
        "replay",
        "visit",
        "sampled",
        "expected",
        "meta",
        "meta_train",
        "controls",
    ],
    ["report", "log", "inspection", "compare", "bench", "demo", "preview", "cli", "__main__"],
]
ORDER = {name: (layer, place) for layer, names in enumerate(LAYERS) for place, name in enumerate(names)}
EVERYWHERE = {"__init__"}  # asked for the version alone


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("zotuner."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "zotuner":
            found |= {alias.name for alias in node.names if alias.name != "__version__"}
    return found


def test_every_module_has_its_place() -> None:
    assert {part(path) for path in PACKAGE.rglob("*.py")} - EVERYWHERE == set(ORDER)


def test_imports_go_down_only() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        for name in imported(path)
        if part(path) not in EVERYWHERE and name != part(path) and ORDER[name] >= ORDER[part(path)]
    ]
    assert wrong == []


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "datasets", "numba", "peft")
    code = f"import sys, zotuner; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_importing_the_optimizers_loads_neither_transformers_nor_datasets() -> None:
    heavy = ("transformers", "datasets", "peft")
    code = f"import sys, zotuner; zotuner.MeZO; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_exists_and_is_documented() -> None:
    assert all(getattr(zotuner, name).__doc__ for name in zotuner.__all__)
