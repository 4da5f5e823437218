"""The install line of the README where this machine's Python is another one, and the pins below ours."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NO_DEBIAN = 77  # exit status

# A Debian 13 in memory, in a mount namespace of its own: nothing is left of it when its shell ends, however that ends.
# How this machine reaches its packages ($NETWORK), the other one does, too.
DEBIAN_13 = f"""
mount -t tmpfs -o size=4g debian "$TARGET"
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates trixie "$TARGET" || exit {NO_DEBIAN}
for file in $NETWORK; do if [ -e $file ]; then cp $file "$TARGET$file"; fi; done
cp -r "$CLONE" "$TARGET/dmash"
chroot "$TARGET" /bin/sh -euc "$COMMANDS"
"""
# The README's, without what `[test]` has besides pytest.
COMMANDS = """
cd /dmash && python3 -m venv .venv && . .venv/bin/activate
python --version
pip install --quiet --no-cache-dir --no-compile -c constraints.txt -e . pytest pytest-xdist
pip check
pytest --numprocesses 2 tests/test_aib_envs.py
"""


def test_pip_and_uv_get_the_same_pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == PYPROJECT["tool"]["uv"]["constraint-dependencies"], "`python tools/lock.py` writes both"


def run(command, **kwargs):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def test_the_tests_of_the_benchmark_need_no_torch():
    program = "import sys; sys.modules['torch'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    flags = ["--collect-only", "--quiet", "--numprocesses", "0", "tests/test_aib_envs.py"]
    result = run([sys.executable, "-c", program, *flags], cwd=ROOT)
    assert result.returncode == 0, result.stdout


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
def test_the_benchmark_on_debian_13(tmp_path):
    env = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "HOME": "/root", "LANG": "C.UTF-8"}
    if os.geteuid() != 0:
        pytest.skip("only root can set up a Debian in a folder")
    if not shutil.which("debootstrap", path=env["PATH"]):
        pytest.skip("there is no debootstrap")
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    (target := tmp_path / "debian").mkdir()
    probe = run([*unshare, "mount", "-t", "tmpfs", "debian", target])
    if probe.returncode:
        pytest.skip(f"nothing can be mounted: {probe.stdout.strip()}")

    copy_of_the_repository(tmp_path / "clone")
    env["NETWORK"] = "/etc/resolv.conf /etc/pip.conf /etc/ssl/certs/ca-certificates.crt"
    env |= {"CLONE": str(tmp_path / "clone"), "TARGET": str(target), "COMMANDS": COMMANDS}
    env.pop("PIP_FIND_LINKS", None)
    result = run([*unshare, "/bin/sh", "-euc", DEBIAN_13], env=env)
    if result.returncode == NO_DEBIAN:
        pytest.skip(f"debootstrap: {result.stdout.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stdout
    assert "Python 3.13." in result.stdout
