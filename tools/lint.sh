#!/usr/bin/env bash
# Every static check, or with --fix every formatter. Reports all findings, then fails if there were any.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
py=.venv/bin/python
failed=()

mapfile -t native < <(git ls-files --cached --others --exclude-standard -- '*.h' '*.cc' '*.cpp' '*.cu')
mapfile -t python < <(git ls-files --cached --others --exclude-standard -- '*.py')
mapfile -t shell < <(git ls-files --cached --others --exclude-standard -- '*.sh' .ci/run)

# Is there the program of a command line, or the module, where it is `python -m module`?
is_there() {
    if [[ $1 == "$py" && $2 == -m ]]; then
        "$py" -c "import $3" 2>/dev/null
    else
        command -v "$1" >/dev/null
    fi
}

# name, command...: a tool that is not there is skipped aloud, and fails under CI.
check() {
    local name=$1
    shift
    if ! is_there "$@"; then
        echo "[lint] $name SKIPPED: it is not installed"
        [[ -z ${CI:-} ]] || failed+=("$name")
    elif "$@"; then
        echo "[lint] $name ok"
    else
        failed+=("$name")
    fi
}

if [[ ${1:-} == --fix ]]; then
    check clang-format clang-format-14 -i "${native[@]}"
    check ruff "$py" -m ruff check --quiet --fix "${python[@]}"
    check yapf "$py" -m yapf --in-place --parallel "${python[@]}"
else
    check clang-format clang-format-14 --dry-run --Werror --ferror-limit=1 "${native[@]}"
    check yapf "$py" -m yapf --diff --parallel "${python[@]}"
    check ruff "$py" -m ruff check --quiet .
    check mypy "$py" -m mypy
    check boundaries "$py" tools/check_boundaries.py
    check shellcheck shellcheck "${shell[@]}"
fi

if [[ ${#failed[@]} -gt 0 ]]; then
    echo "[lint] failed: ${failed[*]}"
    exit 1
fi
