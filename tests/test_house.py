"""The house's rules: who imports whom, and that the method does not know the toy world.

    grpo, reward, sample    import nothing of ours but where they run as scripts
    plumbing                reward and sample, and itself          train      these, and nothing else
    evaluate, evaluation    sample, reward, plumbing, themselves   shapes     all but bench; train in one file
    tests, bench            all, and no circle among what is imported at module level"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")])}
ALLOWED = {
    "grpo": "", "reward": "", "sample": "", "plumbing": "plumbing reward sample",
    "train": "plumbing grpo reward sample", "evaluation": "evaluation plumbing reward sample",
    "evaluate": "evaluation plumbing reward sample",
    "evaluation.shapes": "evaluation plumbing reward sample shapes",
    "shapes": "shapes evaluate evaluation plumbing grpo reward sample",
    "shapes.train": "shapes plumbing grpo reward sample train"}
FREE = ("tests", "test_core", "bench")
METHOD = [name for name in MODULES if name.split(".")[0] in ("grpo", "reward", "sample", "train", "plumbing")]


def executed_on_import(node):
    """The nodes below a module that run when it is imported: no function's body, nothing under __main__."""
    for child in ast.iter_child_nodes(node):
        main = isinstance(child, ast.If) and "__main__" in ast.unparse(child.test)
        if not main and not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield child
            yield from executed_on_import(child)


def imported(name, at_import=False) -> set:
    """Our modules that a module imports: anywhere in it, or as soon as it is imported itself."""
    tree, found = ast.parse(MODULES[name].read_text(encoding="utf-8")), set()
    for node in executed_on_import(tree) if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            # a name is a module of the package, or stands in the package's own file
            found |= {full if (full := f"{node.module}.{alias.name}") in MODULES else node.module
                      for alias in node.names}
    return found & MODULES.keys()


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] not in FREE])
def test_imports_follow_the_rules(name):
    package = name.split(".")[0]
    allowed = ALLOWED.get(name, ALLOWED.get(package))
    assert allowed is not None, f"{name}: no Python file but those of DESIGN's tree"
    found = imported(name, at_import=not allowed)
    assert not {module for module in found if module.split(".")[0] not in allowed.split()}


def test_no_circles():
    TopologicalSorter({name: imported(name, at_import=True) - {name} for name in MODULES}).prepare()


@pytest.mark.parametrize("name", METHOD)
def test_the_method_does_not_know_the_toy_world(name):
    """No identifier, import, flag, path or branch; a docstring, a comment, a message may name its command."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant):
            words = [word.lower() for _, word in ast.iter_fields(node) if isinstance(word, str)]
            assert not any("shapes" in word.split(".") for word in words), f"line {node.lineno}: {words}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            rest = node.value.replace("python -m shapes.train", "")
            assert "shapes" not in rest, f"line {node.lineno}: {node.value!r}"
