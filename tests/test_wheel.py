"""The wheel holds all that the program needs, and works outside the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.once, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
HERE = Path(sysconfig.get_path("purelib"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel, and what it requires from this one.

    A path in a .pth file brings in packages, and leaves out the .pth files beside
    them: so this environment's editable mlxtp is not there.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, *options, wheel], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text(f"{HERE}\n")
    return python


def run(*command, cwd):
    """Run a command that sees neither the checkout nor mpirun; give its output."""
    foreign = ("PYTHONPATH", "OMPI_", "PMIX_", "PRTE_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_contents(wheel):
    """Every file of the package is in the wheel, and nothing else."""
    files = [path for path in ROOT.glob("mlxtp/**/*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert "mlxtp/py.typed" in names
    assert "mlxtp/stories/model/model.safetensors" in names
    assert "mlxtp/comm/native/graph.cpp" in names
    assert "mlxtp/serve/page/index.html" in names
    assert "mlxtp/serve/page/vendor/marked.LICENSE" in names


def test_the_sources_in_cpp_are_in_the_sdist(tmp_path):
    """Who builds from the sdist has what is compiled at the first start."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in ROOT.glob("mlxtp/**/*.cpp")}
    assert len(sources) == 3 and sources <= names


def test_generate_outside_the_checkout(installed, tmp_path):
    """The main job runs from the wheel's files, with the model that ships."""
    where = run(installed, "-c", "import mlxtp; print(mlxtp.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    options = ["--prompt", "One day", "--max-tokens", "5", "--json"]
    for program in (
        (installed, "-m", "mlxtp.generate"),
        (
            installed.parent / "mlxtp",
            "generate",
        ),
    ):
        answer = run(*program, *options, cwd=tmp_path)
        assert len(json.loads(answer)["tokens"]) == 5
