"""The install line of the README where this machine's Python is another one, and the pins below ours."""

import os
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pip_and_uv_get_the_same_pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == PYPROJECT["tool"]["uv"]["constraint-dependencies"], "`python tools/lock.py` writes both"


def run(command, **kwargs):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


@pytest.fixture
def debian_13():
    """A folder with a new, minimal Debian 13 and its Python. Nothing of it is left afterwards."""
    if os.geteuid() != 0:
        pytest.skip("only root can set up a Debian in a folder")
    path = os.environ["PATH"] + ":/usr/sbin"
    for program in ("debootstrap", "unshare"):
        if not shutil.which(program, path=path):
            pytest.skip(f"there is no {program}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # In its own mount namespace: what debootstrap mounts is gone with it.
        command = ["unshare", "--mount", "debootstrap", "--variant=minbase"]
        command += ["--include=python3,python3-venv,ca-certificates", "trixie", folder]
        result = run(command, env=os.environ | {"PATH": path})
        if result.returncode:
            pytest.skip(f"debootstrap: {result.stdout.strip().splitlines()[-1]}")
        yield Path(folder)


def copy_of_the_repository(target):
    """Copies what a clone has and takes torch out of the dependencies: the benchmark needs none, and it takes GBs."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("results/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    (torch,) = [line for line in PYPROJECT["project"]["dependencies"] if line.startswith("torch==")]
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"{torch}",' in text
    (target / "pyproject.toml").write_text(text.replace(f'"{torch}",', ""))


@pytest.mark.slow
def test_the_benchmark_on_debian_13(debian_13):
    copy_of_the_repository(debian_13 / "dmash")
    # How this machine reaches its packages, the other one does, too.
    for name in ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt"):
        if Path(name).exists():
            shutil.copy(name, debian_13 / name[1:])
    env = {key: value for key, value in os.environ.items() if "proxy" in key.lower() or key.startswith("PIP_")}
    env.pop("PIP_FIND_LINKS", None)
    env |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
    script = """
        cd dmash && python3 -m venv .venv && . .venv/bin/activate
        pip install --no-cache-dir --quiet -c constraints.txt -e ".[test]"
        python --version
        pip check
        pytest --numprocesses 2 tests/test_aib_envs.py
    """
    result = run(["chroot", debian_13, "/bin/sh", "-euc", script], env=env)
    assert result.returncode == 0, result.stdout
    assert "Python 3.13." in result.stdout
