"""The house's rules: who imports whom, inside functions, too, and that the method does not know the toy."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")])}
BELOW = "grpo reward sample plumbing views"
ALLOWED = {  # module, or package -> the files and packages of ours that it may import
    "grpo": "", "plumbing": "plumbing", "reward": "plumbing", "sample": "plumbing", "views": BELOW,
    "train": BELOW, "evaluate": f"{BELOW} evaluation", "evaluation": f"{BELOW} evaluation",
    "evaluation.relearn": f"{BELOW} evaluate evaluation",
    "evaluation.shapes": f"{BELOW} evaluation shapes", "shapes": f"{BELOW} train evaluate evaluation shapes",
    "bench": f"{BELOW} train evaluate evaluation shapes bench"}
UPWARDS = {"sample": {"views.grid"}, "reward": {"views.direction"}}  # the last lines, as scripts


def imported(name, script=False) -> set:
    """What a module imports, ours as modules: without what it does as a script alone, or just that."""
    body, found = ast.parse(MODULES[name].read_text(encoding="utf-8")).body, set()
    last = [node for node in body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    for node in ast.walk(ast.Module(last if script else [node for node in body if node not in last], [])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            # a name is a module of the package, or stands in the package's own file
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("test")])
def test_imports_follow_the_rules(name):
    allowed = ALLOWED.get(name, ALLOWED.get(name.split(".")[0]))
    assert allowed is not None, "no Python file but those of the house"
    ours = imported(name) & MODULES.keys()
    assert not {module for module in ours if module.split(".")[0] not in allowed.split()}
    assert imported(name, script=True) & MODULES.keys() - {"plumbing.stop"} == UPWARDS.get(name, set())
    assert name != "grpo" or imported(name) == {"torch"}


def test_no_circles():
    """Importing a module also runs its package's own file."""
    arrows = {name: imported(name) for name in MODULES}
    for name, found in arrows.items():
        packages = {module.split(".")[0] for module in (name, *found)}
        arrows[name] = (found | packages) & MODULES.keys() - {name}
    TopologicalSorter(arrows).prepare()


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] in f"{BELOW} train".split()])
def test_the_method_does_not_know_the_toy_world(name):
    """A docstring, a comment or a message may name its command; nothing else has the word."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for prose in [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]:
        prose.value = ast.Constant("") if isinstance(prose.value, ast.Constant) else prose.value
    assert "shapes" not in ast.unparse(tree).replace("python -m shapes.train", "").lower()
