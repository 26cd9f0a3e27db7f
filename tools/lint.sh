#!/usr/bin/env bash
# Every static check, or with --fix every formatter. Reports all findings, then fails if there were any.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
bin=.venv/bin
failed=()

mapfile -t native < <(git ls-files --cached --others --exclude-standard -- '*.h' '*.cc' '*.cpp' '*.cu')
mapfile -t python < <(git ls-files --cached --others --exclude-standard -- '*.py')
mapfile -t shell < <(git ls-files --cached --others --exclude-standard -- '*.sh' .ci/run)

# name, program, arguments...: a program that is not there is skipped aloud, and fails under CI.
check() {
    local name=$1
    shift
    if ! command -v "$1" >/dev/null; then
        echo "[lint] $name SKIPPED: no $1"
        [[ -z ${CI:-} ]] || failed+=("$name")
    elif "$@"; then
        echo "[lint] $name ok"
    else
        failed+=("$name")
    fi
}

if [[ ${1:-} == --fix ]]; then
    check clang-format clang-format-14 -i "${native[@]}"
    check ruff "$bin/ruff" check --quiet --fix "${python[@]}"
    check yapf "$bin/yapf" --in-place --parallel "${python[@]}"
else
    check clang-format clang-format-14 --dry-run --Werror "${native[@]}"
    check yapf "$bin/yapf" --diff --parallel "${python[@]}"
    check ruff "$bin/ruff" check --quiet .
    check mypy "$bin/mypy"
    check boundaries python3 tools/check_boundaries.py
    check shellcheck shellcheck "${shell[@]}"
fi

if [[ ${#failed[@]} -gt 0 ]]; then
    echo "[lint] failed: ${failed[*]}"
    exit 1
fi
