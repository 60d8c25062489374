"""The import edges of the design: what may know what, and how large a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "mep"
LONGEST = 400

# What each part may import of the package, besides itself. Arrows point one way:
# blocks <- energies <- contrast <- optim <- presets <- training <- bench <- cli
CORE = ["curvature", "memory", "blocks", "settling", "energies", "contrast"]
INDEPENDENT = ["updates", "constraints", "curvature", "memory", "data", "kernels"]
ALLOWED = {
    "curvature": [],
    "kernels": [],
    "blocks": ["curvature", "kernels"],
    "settling": [],
    "couplings": ["blocks", "curvature", "kernels"],
    "energies": ["blocks", "couplings", "curvature", "settling", "kernels"],
    "contrast": ["curvature", "memory", "blocks", "couplings", "settling", "energies", "kernels"],
    "init": [],
    "models": ["init", "blocks", "couplings", "energies", "settling"],
    "updates": ["curvature", "kernels"],
    "continual": CORE,
    "constraints": [],
    "memory": [],
    "data": [],
    "diagnostics": CORE,
    "optim": [*CORE, "kernels", "updates", "constraints", "continual"],
    "presets": [*CORE, "optim", "updates", "constraints", "continual"],
}
BELOW_TRAINING = [*ALLOWED]
ALLOWED["training"] = BELOW_TRAINING
ALLOWED["bench"] = [*BELOW_TRAINING, "training"]
ALLOWED["cli"] = [*ALLOWED["bench"], "bench"]

FILES = sorted(ROOT.rglob("*.py"))


def part_of(path):
    """``blocks`` for mep/blocks/chain.py, ``optim`` for mep/optim.py, None for mep/__init__.py."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return None if first == "__init__" else first


def imported_parts(path):
    """The parts of the package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            own = node.module == "mep"
            names = [f"mep.{a.name}" for a in node.names] if own else [node.module or ""]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "mep":
                found.add(rest.partition(".")[0] or "mep")
    return found


def known_parts():
    return {part_of(path) for path in FILES} - {None}


def test_every_part_has_its_place():
    assert known_parts() <= set(ALLOWED)


def test_the_test_sees_imports(tmp_path):
    """Of every spelling, or a forbidden edge could hide in one."""
    file = tmp_path / "file.py"
    file.write_text(
        "import mep.optim as o\nfrom mep import bench\nfrom mep.cli.names import X\n"
        "def f():\n    from mep.data.idx import read_idx\nimport torch\n"
    )
    assert imported_parts(file) == {"optim", "bench", "cli", "data"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_the_arrows_only(path):
    part, imported = part_of(path), imported_parts(path)
    if part is None:  # the package's own door shows everything but the tools on top
        assert not imported & {"bench", "cli", "training"}
        return
    allowed = {part, *ALLOWED[part]}
    if part in ("bench", "cli"):  # users of the public interface, as anyone is
        allowed |= {"mep"}
    names = {name for name in imported if name in known_parts() or name == "mep"}
    assert names <= allowed, f"{part} must not import {sorted(names - allowed)}"


@pytest.mark.parametrize("part", INDEPENDENT)
def test_independent_parts_know_nothing_of_ep(part):
    assert not set(ALLOWED[part]) & {*CORE, "optim", "presets"} - {"curvature", "memory"}


@pytest.mark.parametrize("name", ["penalty", "ewc", "diagonal", "kronecker", "intelligence"])
def test_memories_of_tasks_are_fed_signals_and_know_nothing_of_ep(name):
    """Where these come from is for ``continual/fisher.py`` alone to know."""
    found = imported_parts(ROOT / "continual" / f"{name}.py")
    assert found <= {"curvature", "continual"}


def test_nothing_imports_the_tools_but_the_tools():
    for part, allowed in ALLOWED.items():
        assert "cli" not in allowed or part == "cli"
        assert "bench" not in allowed or part in ("bench", "cli")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small_and_named_for_what_they_hold(path):
    assert path.name not in ("utils.py", "helpers.py", "common.py", "misc.py")
    assert len(path.read_text().splitlines()) <= LONGEST
