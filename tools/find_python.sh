#!/bin/sh
# Prints the path of an interpreter that really runs and is Python 3.12 or 3.13 (3.12 first: most tested there).
# Exits with 2 and one line on how to get one when there is none. PYTHON=/path/to/python comes before the search.
# A name on PATH proves nothing: a pyenv shim exists and fails when its version is not the chosen one. So each
# candidate is asked for its version.

suits() {
    "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

accept() {
    if suits "$1"; then
        "$1" -c 'import sys; print(sys.executable)'
        exit 0
    fi
}

if [ -n "$PYTHON" ]; then
    accept "$PYTHON"
    echo "error: PYTHON=$PYTHON is not a Python >=3.12,<3.14 that runs; name another or leave PYTHON out" >&2
    exit 2
fi

versions=${PYENV_ROOT:-$HOME/.pyenv}/versions
for minor in 3.12 3.13; do
    accept "python$minor"
    for folder in $(ls -d "$versions/$minor".* 2>/dev/null | sort -rV); do
        accept "$folder/bin/python"
    done
done
accept python3
accept python
if command -v uv >/dev/null 2>&1; then
    found=$(uv python find --no-project '>=3.12,<3.14' 2>/dev/null) && accept "$found"
fi
echo "error: no Python >=3.12,<3.14 runs here; get one (apt install python3.12-venv, pyenv install 3.12," \
    "or uv python install 3.12) or name yours: make setup PYTHON=/path/to/python3.12" >&2
exit 2
