"""The settings that users give to the build in the environment (cmake/EpOptions.cmake, cmake/EpArchitectures.cmake)."""
from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CMAKE_DIR = Path(__file__).resolve().parents[2] / 'cmake'
KNOWN_TO_CUDA_13 = 'compute_75\ncompute_80\ncompute_86\ncompute_90\ncompute_100\ncompute_120\n'
KNOWN_TO_CUDA_12_4 = 'compute_70\ncompute_80\ncompute_90\n'

pytestmark = pytest.mark.skipif(shutil.which('cmake') is None, reason='cmake is not on the PATH')


def run_script(tmp_path: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A CMake script that prints its results with message(NOTICE), which goes to stderr."""
    path = tmp_path / 'script.cmake'
    path.write_text(f'list(APPEND CMAKE_MODULE_PATH "{CMAKE_DIR}")\n{script}')
    command = ['cmake', '-P', str(path)]
    env = {'PATH': os.environ['PATH'], **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def parse_arch_list(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    return run_script(
        tmp_path, f'include(EpArchitectures)\nep_parse_torch_arch_list(result "{text}")\n'
        'ep_check_arch_list("${result}")\nmessage(NOTICE "${result}")')


@pytest.mark.parametrize(('text', 'expected'), [
    ('9.0', '90-real'),
    ('8.0;9.0', '80-real;90-real'),
    ('8.0 9.0a+PTX', '80-real;90a'),
    ('8.0, 10.0', '80-real;100-real'),
    ('Hopper', '90-real'),
    ('Ampere;Blackwell+PTX', '80-real;86-real;100'),
    ('9.0;9.0', '90-real'),
])
def test_torch_arch_list_is_understood(tmp_path: Path, text: str, expected: str) -> None:
    assert parse_arch_list(tmp_path, text).stderr.strip() == expected


@pytest.mark.parametrize(('text', 'message'), [('nine', "'nine' is not like 9.0"), ('90', "'90' is not like 9.0"),
                                               ('7.5', "8.0 or newer, got '75-real'")])
def test_a_wrong_torch_arch_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    run = parse_arch_list(tmp_path, text)
    assert run.returncode != 0
    assert message in ' '.join(run.stderr.split())


@pytest.mark.parametrize(('known', 'is_sm90_off', 'expected'), [
    (KNOWN_TO_CUDA_13, 0, '80-real;90-real;100'),
    (KNOWN_TO_CUDA_12_4, 0, '80-real;90'),
    (KNOWN_TO_CUDA_13, 1, '80'),
])
def test_default_is_every_gpu_that_nvcc_knows_and_ptx_of_the_newest(tmp_path: Path, known: str, is_sm90_off: int,
                                                                    expected: str) -> None:
    run = run_script(
        tmp_path, f'include(EpArchitectures)\nset(EP_DISABLE_SM90_FEATURES {is_sm90_off})\n'
        f'ep_default_arch_list(result "{known}")\nmessage(NOTICE "${{result}}")')
    assert run.stderr.strip() == expected


@pytest.mark.parametrize(('capabilities', 'expected'), [
    ('9.0\n9.0\n', '90-real'),
    ('8.6\n9.0\n', '86-real;90-real'),
    ('9.0\n13.0\n', '80-real;90-real;100'),
    ('No devices were found\n', '80-real;90-real;100'),
    ('', '80-real;90-real;100'),
])
def test_native_is_the_gpus_of_the_machine_if_nvcc_knows_them_all(tmp_path: Path, capabilities: str,
                                                                  expected: str) -> None:
    run = run_script(
        tmp_path, f'include(EpArchitectures)\nset(EP_DISABLE_SM90_FEATURES 0)\n'
        f'ep_native_arch_list(result "{capabilities}" "{KNOWN_TO_CUDA_13}")\nmessage(NOTICE "${{result}}")')
    assert run.stderr.strip() == expected


def plan_of(folder: Path, *arguments: str) -> str:
    """What make would run there."""
    finished = subprocess.run(['make', '-n', *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.skipif(shutil.which('make') is None, reason='make is not on the PATH')
def test_the_demo_builds_for_itself_and_a_build_is_not_fooled_by_it(tmp_path: Path) -> None:
    for name in ('Makefile', 'setup.py', 'CMakeLists.txt', 'pyproject.toml', 'tools/dev_env.sh'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(CMAKE_DIR.parent / name, tmp_path / name)
    bare = plan_of(tmp_path, 'demo')
    assert 'dev_env.sh native build/native' in bare
    assert 'PYTHONPATH="' in bare
    assert 'dev_env.sh install' not in bare
    stamps = tmp_path / 'build' / 'stamps'
    stamps.mkdir(parents=True)
    for name in ('venv-base', 'venv-demo'):
        (stamps / name).touch()
    after_demo = plan_of(tmp_path, 'build')
    assert 'dev_env.sh venv all' in after_demo
    assert 'dev_env.sh install' in after_demo
    for name in ('venv', 'installed'):
        (stamps / name).touch()
    after_build = plan_of(tmp_path, 'demo')
    assert 'cmake --build build/dev' in after_build
    assert 'native' not in after_build


def read_options(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_script(
        tmp_path, 'include(EpOptions)\nmessage(NOTICE "${EP_DISABLE_SM90_FEATURES} ${EP_DISABLE_AGGRESSIVE_PTX} '
        '${EP_TOPK_IDX_BITS}")', **environment)


def test_options_have_the_defaults_of_the_readme(tmp_path: Path) -> None:
    assert read_options(tmp_path).stderr.strip() == '0 0 64'


def test_options_are_read_from_the_environment(tmp_path: Path) -> None:
    environment = {'DISABLE_SM90_FEATURES': '1', 'DISABLE_AGGRESSIVE_PTX_INSTRS': '1', 'TOPK_IDX_BITS': '32'}
    assert read_options(tmp_path, **environment).stderr.strip() == '1 1 32'


@pytest.mark.parametrize(('name', 'value'), [('DISABLE_SM90_FEATURES', 'yes'), ('TOPK_IDX_BITS', '16'),
                                             ('NVSHMEM_DIR', '/nowhere')])
def test_a_wrong_option_is_refused_by_name(tmp_path: Path, name: str, value: str) -> None:
    run = read_options(tmp_path, **{name: value})
    assert run.returncode != 0
    assert name in run.stderr
    assert value in run.stderr


def setup_system(tmp_path: Path, user: int, present: tuple[str,
                                                           ...] = ()) -> tuple[subprocess.CompletedProcess[str], str]:
    """`make system-lint` on a machine with few programs; and what was asked of apt-get, and when."""
    programs = tmp_path / 'bin'
    programs.mkdir()
    for name in ('bash', 'dirname', 'cat', 'grep'):
        (programs / name).symlink_to(shutil.which(name) or name)
    asked = tmp_path / 'asked'
    texts = {
        'id': f'echo {user}',
        'apt-get': f'echo "[apt-get] $*" | tee -a {asked} >&2',
        **dict.fromkeys(present, 'true')
    }
    for name, text in texts.items():
        (programs / name).write_text(f'#!/bin/sh\n{text}\n')
        (programs / name).chmod(0o755)
    (programs / 'tee').symlink_to(shutil.which('tee') or 'tee')
    ended = subprocess.run(
        [str(programs / 'bash'), str(CMAKE_DIR.parent / 'tools/dev_env.sh'), 'system', 'lint'],
        env={'PATH': str(programs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False)
    return ended, asked.read_text() if asked.exists() else ''


def test_what_is_installed_on_the_system_is_said_before(tmp_path: Path) -> None:
    ended, asked = setup_system(tmp_path, user=0)
    assert ended.returncode == 0
    assert 'install -y' in asked
    first, *rest = ended.stdout.splitlines()
    assert first == '[dev_env] installing on this system, as root, with apt-get: clang-format-14 shellcheck'
    assert rest
    assert all(line.startswith('[apt-get]') for line in rest)


def test_without_root_nothing_is_installed_and_what_is_missing_is_said(tmp_path: Path) -> None:
    ended, asked = setup_system(tmp_path, user=1000, present=('shellcheck', ))
    assert (ended.returncode, asked) == (0, '')
    assert "missing for 'lint': clang-format-14 (Debian's names). Nothing was installed." in ended.stdout


@pytest.mark.parametrize('user', [0, 1000])
def test_where_everything_is_there_nothing_is_said_or_done(tmp_path: Path, user: int) -> None:
    ended, asked = setup_system(tmp_path, user, present=('shellcheck', 'clang-format-14'))
    assert (ended.returncode, ended.stdout, asked) == (0, '', '')
