"""The package that pip installs: one list of requirements, one version, torch as its only need."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest
from conftest import HOME

import hardneg

USE = """
import sys
import torch

allowed = {'hardneg', 'torch', *sys.stdlib_module_names}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] not in allowed:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
for name in list(sys.modules):  # torch imports numpy where it is there
    if name.partition('.')[0] == 'numpy':
        del sys.modules[name]

import hardneg
from hardneg import apply, contrastive_loss, draw, normalize

z1, z2 = torch.randn(2, 4, 8)
loss = contrastive_loss(z1, z2)
images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
views = apply(images, draw(4, 16, 16, torch.Generator()), 8)
print(loss.isfinite().item(), tuple(views.shape), tuple(normalize(images).shape))
print(hardneg.__file__)
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel of the project, built without network and build isolation."""
    out = tmp_path_factory.mktemp('wheel')
    source = tmp_path_factory.mktemp('source')
    shutil.copytree(HOME / 'hardneg', source / 'hardneg')
    for name in ('pyproject.toml', 'README.md', 'LICENSE', 'requirements.txt'):
        shutil.copy(HOME / name, source)
    pip = [sys.executable, '-m', 'pip', 'wheel', '--no-index', '--no-deps', '--no-build-isolation']
    subprocess.run([*pip, '-w', out, source], check=True, capture_output=True)
    (path,) = out.iterdir()
    return path


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('METADATA')]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
    assert names == {f'hardneg/{path.name}' for path in (HOME / 'hardneg').glob('*.py')}


def test_requirements_and_version_stand_in_one_place(wheel):
    about = metadata(wheel)
    assert about['Name'] == 'hardneg'
    assert about['Version'] == hardneg.__version__ == '1.0.0'
    needed = about.get_all('Requires-Dist')
    always = [line for line in needed if ';' not in line]
    assert always == ['torch>=2.6']
    extra = [line.partition(';')[0] for line in needed if 'extra == "train"' in line]
    assert extra == (HOME / 'requirements.txt').read_text().split()


def test_the_package_needs_torch_alone(wheel, tmp_path):
    """It is imported, and computes a loss and views, where no other package can be imported."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, '-c', USE], cwd=tmp_path, env={'PATH': ''}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 'True (4, 3, 8, 8) (4, 3, 16, 16)' in done.stdout
    assert str(tmp_path) in done.stdout
