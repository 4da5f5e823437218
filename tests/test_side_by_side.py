"""Repetition between the algorithm scripts is the design; this is what keeps the copies from drifting apart."""

import ast
import difflib
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["dr", "da", "dma", "dmah", "dmash"]

# Definitions that are not the same everywhere. Scripts joined by + have the same one, and it differs between groups.
DIFFERENT = {
    "Args": ("dr da dma dmah dmash", "each method has its own flags"),
    "method_name": ("dr da dma dmah dmash", "each method has its own name"),
    "WIDTH": ("dr+da dma+dmah+dmash", "with z, its size stands beside WIDTH"),
    "MLP": ("dr da dma dmah dmash", "how the context enters a network: not, by its own adapter, as input, by omega"),
    "Actor": ("dr da+dma+dmah+dmash", "DR's policy is told nothing about the context"),
    "ReplayBuffer": ("dr+da dma+dmah+dmash", "without an encoder there is no window"),
    "Agent": ("dr da dma dmah dmash", "the method itself"),
    "make_envs": ("dr da dma+dmah+dmash", "who sees the true context"),
}
# What these have in common with the scripts above: a run and its life, and nothing about the method.
RELATIVES = ["hyperzero", "hyperdynamics"]
RUN = {"STOP", "open_run", "save_checkpoint", "load_checkpoint", "on_signal", "make_agent", "capture_video"}
RUN |= {"evaluate_only"}
SECTIONS = ["Arguments", "Context", "Hypernetwork", "Networks", "Replay", "Acting", "Run", "Training"]


def source(script):
    return (ROOT / (f"{script}.py" if script in RELATIVES else f"{script}_sac.py")).read_text()


def definitions(script):
    """{name: source} of the top-level functions, classes and constants."""
    text, found = source(script), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            names = [node.name]
        elif isinstance(node, ast.Assign):
            start = node.lineno
            names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        else:
            continue
        lines = "\n".join(text.splitlines()[start - 1 : node.end_lineno])
        found |= dict.fromkeys(names, lines)
    return found


DEFINITIONS = {script: definitions(script) for script in SCRIPTS}
PAIRS = list(itertools.combinations(SCRIPTS, 2))


def group_of(name, script):
    """The number of the group in which `script` has its version of `name`, or None."""
    groups = [group.split("+") for group in DIFFERENT.get(name, ("+".join(SCRIPTS), ""))[0].split()]
    return next((i for i, group in enumerate(groups) if script in group), None)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_definitions_of_the_same_name_are_the_same_to_the_letter(one, other):
    problems = []
    for name in sorted(DEFINITIONS[one].keys() & DEFINITIONS[other].keys()):
        a, b = (DEFINITIONS[script][name] for script in (one, other))
        groups = [group_of(name, one), group_of(name, other)]
        if None in groups:
            how = "the same" if a == b else "different"
            problems.append(f"{name}, {how} in {one} and {other}: DIFFERENT[{name!r}] has no group for one of them")
            continue
        together = groups[0] == groups[1]
        if together and a != b:
            diff = "\n".join(difflib.unified_diff(a.splitlines(), b.splitlines(), one, other, lineterm="", n=1))
            problems.append(f"{name} differs: make it the same, or list it in DIFFERENT with the reason\n{diff}")
        if not together and a == b:
            problems.append(f"{name} is the same in {one} and {other}, but DIFFERENT puts them into two groups")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("script", RELATIVES)
def test_relatives_share_what_a_run_is(script):
    own = definitions(script)
    assert {name: own[name] for name in RUN} == {name: DEFINITIONS["dr"][name] for name in RUN}


def test_most_definitions_are_shared():
    shared = set.intersection(*(set(found) for found in DEFINITIONS.values())) - DIFFERENT.keys()
    assert shared >= {"open_run", "save_checkpoint", "load_checkpoint", "evaluate_only", "train", "POLICY_FREQUENCY"}
    with_encoder = (
        set.intersection(*(set(DEFINITIONS[script]) for script in ("dma", "dmah", "dmash"))) - DIFFERENT.keys()
    )
    assert with_encoder >= {"subsample", "avg_l1_norm", "sim_norm", "Encoder"}
    with_adapter = (
        set.intersection(*(set(DEFINITIONS[script]) for script in ("da", "dmah", "dmash"))) - DIFFERENT.keys()
    )
    assert with_adapter >= {"Omega", "Hypernetwork", "generated_linear", "adapt"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_come_in_the_same_order(script):
    sections = [line.split()[2].rstrip(":") for line in source(script).splitlines() if re.match(r"# -{9,} ?\w", line)]
    assert sections == [section for section in SECTIONS if section in sections] and len(sections) >= 5


def test_definitions_come_in_the_same_order():
    for one, other in PAIRS:
        common = [name for name in DEFINITIONS[one] if name in DEFINITIONS[other]]
        assert common == [name for name in DEFINITIONS[other] if name in DEFINITIONS[one]]


def test_the_papers_idea_is_a_short_diff():
    diff = difflib.ndiff(source("dma").splitlines(), source("dmash").splitlines())
    assert sum(line[0] in "+-" for line in diff) < 120


def test_the_readmes_diff_is_in_the_scripts():
    (block,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for line in block.splitlines() if line.strip()]
    for sign, script in (("-", "dma"), ("+", "dmash")):
        shown = [line[1:] for line in lines if line[0] in (sign, " ")]
        assert len(shown) > 10 and set(shown) <= set(source(script).splitlines())


@pytest.mark.parametrize("script", [*SCRIPTS, *RELATIVES])
def test_scripts_are_short(script):
    assert len(source(script).splitlines()) <= 550


def test_the_benchmark_is_short():
    assert len((ROOT / "aib_envs.py").read_text().splitlines()) <= 450, "a limit for ours: raise it for your own tasks"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained_on_its_line(script):  # tyro shows that comment in --help
    for line in DEFINITIONS[script]["Args"].splitlines()[2:]:
        assert re.fullmatch(r"    \w+: .+ = .+  # .+", line), line


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_do_not_import_each_other(script):
    imports = {node for node in ast.walk(ast.parse(source(script))) if isinstance(node, ast.Import | ast.ImportFrom)}
    modules = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    assert not {module for module in modules if module.endswith("_sac")}
