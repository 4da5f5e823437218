"""The copies in the algorithm scripts, and tools/sync.py, which keeps them the same."""

import shutil
import subprocess

import pytest

from tools import sync


def test_the_copies_are_the_same():
    problems = sync.check()
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


SCRIPT = """# of {script}
import torch


@dataclass
class Args:  # of {script}
    pass


# ---- Networks ----
# Why it is so wide.
WIDTH = 256  # size


def norm(x):
    return x / 2


class MLP:  # of {script}
    pass


class Actor(MLP):  # of {actor}
    pass


class ReplayBuffer:  # of {buffer}
    pass


class Agent:  # of {script}
    pass


def make_envs(args):  # of {envs}
    pass


def train(args):
    n = 1
    return norm(n)


if __name__ == "__main__":
    main(train)
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Small scripts of the same names, with copies that are the same."""
    for script in sync.SCRIPTS:
        name = script.removesuffix("_sac.py")
        text = SCRIPT.format(
            script=script,
            actor="DR" if name == "dr" else "the others",
            buffer="those without a window" if name in ("dr", "da") else "the others",
            envs=name if name in ("dr", "da") else "the others",
        )
        (tmp_path / script).write_text(text)
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    assert sync.check() == []
    return tmp_path


def sources(root):
    return {path.name: path.read_text() for path in root.glob("*.py")}


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))


def run(monkeypatch, capsys, *flags):
    """Exit code and output of `python tools/sync.py flags`."""
    monkeypatch.setattr("sys.argv", ["sync.py", *flags])
    code = 0
    try:
        sync.main()
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):  # to stderr, and exit code 1
            return 1, code
    output = capsys.readouterr()
    return code, output.out + output.err


EDITS = {
    "a comment": ("dmah_sac.py", "    n = 1\n", "    # mine\n    n = 1\n"),
    "a renamed local": ("dr_sac.py", "    n = 1\n    return norm(n)", "    number = 1\n    return norm(number)"),
    "a type hint": ("dma_sac.py", "def norm(x):", "def norm(x: torch.Tensor):"),
    "comments above": ("dmah_sac.py", "def norm(x):", "# one\n# two\n# three\n# four\ndef norm(x):"),
    "a comment changed": ("dmash_sac.py", "# Why it is so wide.", "# Why it is"),
    "a constant": ("dmash_sac.py", "WIDTH = 256", "WIDTH = 128"),
    "a constant's type": ("dmash_sac.py", "WIDTH = 256", "WIDTH: int = 256"),
    "a decorator": ("da_sac.py", "def norm(x):", "@torch.no_grad()\ndef norm(x):"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_named_with_its_command_and_written_into_the_others(name, root, monkeypatch, capsys):
    script, old, new = EDITS[name]
    edit(root / script, old, new)
    before = sources(root)
    code, message = run(monkeypatch, capsys, "--check")
    assert code == 1 and message.splitlines()[-1] == f"python tools/sync.py {script}"
    assert sources(root) == before

    code, message = run(monkeypatch, capsys, script)
    assert code == 0 and len(message.splitlines()) > 1  # what it did
    assert run(monkeypatch, capsys, "--check")[0] == 0
    after = sources(root)
    assert after[script] == before[script]
    assert all(new in text and f"class MLP:  # of {name}" in text for name, text in after.items())
    assert run(monkeypatch, capsys, script) == (0, "")


def test_what_two_scripts_share_has_two_commands(root, monkeypatch, capsys):
    edit(root / "da_sac.py", "# of those without a window", "# of both")  # ReplayBuffer of DR and DA
    code, message = run(monkeypatch, capsys, "--check")
    commands = [f"python tools/sync.py {name}" for name in ("da_sac.py", "dr_sac.py")]
    assert code == 1 and sorted(message.splitlines()[-2:]) == commands  # each can be pasted
    before = sources(root)
    run(monkeypatch, capsys, "da_sac.py")
    changed = {name for name, text in sources(root).items() if text != before[name]}
    assert changed == {"dr_sac.py"} and sync.check() == []


def test_of_two_scripts_git_knows_which_was_edited(root, monkeypatch, capsys):
    name = ["-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    edit(root / "da_sac.py", "# of those without a window", "# of both")
    code, message = run(monkeypatch, capsys, "--check")
    assert code == 1 and message.splitlines()[-2:] == ["Run:", "python tools/sync.py da_sac.py"]


def test_edits_in_several_scripts_all_survive(root, monkeypatch, capsys):
    edit(root / "dma_sac.py", "return x / 2", "return x / 3")
    edit(root / "dmash_sac.py", "WIDTH = 256", "WIDTH = 128")
    edit(root / "dr_sac.py", "    n = 1", "    n = 2")
    _, message = run(monkeypatch, capsys, "--check")
    commands = [line for line in message.splitlines() if line.startswith("python")]
    assert len(commands) == 3
    for command in commands:
        run(monkeypatch, capsys, *command.split()[2:])
    assert sync.check() == []
    for text in sources(root).values():
        assert "return x / 3" in text and "WIDTH = 128" in text and "    n = 2" in text


def test_what_was_edited_in_another_script_is_left_unless_it_is_named(root, monkeypatch, capsys):
    edit(root / "dma_sac.py", "return x / 2", "return what_somebody_has_worked_on(x)")
    edit(root / "dma_sac.py", "WIDTH = 256", "WIDTH = 128")
    before = sources(root)
    _, message = run(monkeypatch, capsys, "dmash_sac.py")
    assert sources(root) == before and message.splitlines()[-1].endswith("python tools/sync.py dma_sac.py")
    _, message = run(monkeypatch, capsys, "dmash_sac.py", "norm")
    assert "-    return what_somebody_has_worked_on(x)" in message  # what is overwritten is shown
    edit(root / "dma_sac.py", "WIDTH = 128", "WIDTH = 256")
    assert sync.check() == []


def test_a_version_is_shared_by_its_scripts_only(root, monkeypatch, capsys):
    edit(root / "dr_sac.py", "class Actor(MLP):", "class Actor(MLP, DR):")
    edit(root / "dma_sac.py", "class Actor(MLP):", "class Actor(MLP, Context):")
    edit(root / "dma_sac.py", "def make_envs(args):", "def make_envs(args, **options):")
    for script in ("dma_sac.py", "dr_sac.py"):
        run(monkeypatch, capsys, script)
    texts = sources(root)
    assert [name for name in sync.SCRIPTS if "class Actor(MLP, DR)" in texts[name]] == ["dr_sac.py"]
    assert sum("class Actor(MLP, Context)" in text for text in texts.values()) == len(sync.SCRIPTS) - 1
    assert sum("**options" in text for text in texts.values()) == len(sync.SCRIPTS) - 2


def test_a_readers_script_is_left_alone(root, monkeypatch, capsys):
    """Copied from another one, with its own MLP, and a train that is not like the others'."""
    shutil.copy(root / "dmash_sac.py", root / "film_sac.py")
    edit(root / "film_sac.py", "class MLP:", "class MLP(mine):")
    edit(root / "film_sac.py", "def train(args):", "def train(args, mine):")
    edit(root / "dmash_sac.py", "def train(args):", "def train(args):  # ours")
    mine = (root / "film_sac.py").read_text()
    assert "film" not in run(monkeypatch, capsys, "--check")[1]
    run(monkeypatch, capsys, "dmash_sac.py")
    assert (root / "film_sac.py").read_text() == mine and "# ours" in (root / "dr_sac.py").read_text()
    before = sources(root)
    code, message = run(monkeypatch, capsys, "film_sac.py")
    assert code == 2 and "SCRIPTS" in message and sources(root) == before


def test_a_script_that_is_listed_is_kept_but_for_its_own(root, monkeypatch, capsys):
    shutil.copy(root / "dmash_sac.py", root / "film_sac.py")
    edit(root / "film_sac.py", "class MLP:", "class MLP(mine):")
    edit(root / "film_sac.py", "def norm(x):", "def norm(x, mine=0):")
    monkeypatch.setattr(sync, "SCRIPTS", (*sync.SCRIPTS, "film_sac.py"))
    assert run(monkeypatch, capsys, "--check")[1].splitlines()[-1] == "python tools/sync.py film_sac.py"
    monkeypatch.setitem(sync.VERSIONS, "norm", [{"film_sac.py"}])  # as its reader wants it
    assert sync.check() == []
    edit(root / "dr_sac.py", "def train(args):", "def train(args):  # ours")
    run(monkeypatch, capsys, "dr_sac.py")
    text = (root / "film_sac.py").read_text()
    assert text.count("mine") == 2 and "# ours" in text


def test_a_script_that_is_gone_is_not_missed(root):
    (root / "dmah_sac.py").unlink()
    assert sync.check() == []


@pytest.mark.parametrize("flags", [[], ["--check", "dr_sac.py"], ["none.py"], ["aib_run.py"], ["dr_sac.py", "nothing"]])
def test_wrong_use(flags, root, monkeypatch, capsys):
    before = sources(root)
    assert run(monkeypatch, capsys, *flags)[0] == 2 and sources(root) == before
