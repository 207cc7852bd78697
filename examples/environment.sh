# Sourced by the examples and by tests/run.sh: makes the Python environment once and activates it.
#
# It is the folder .venv of the repository, or EAGLE3_VENV. To use an environment of your own as it is, set
# EAGLE3_VENV=none; it then has to hold what requirements.txt names.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_requirements=${EAGLE3_REQUIREMENTS:-$_root/requirements.txt}
if [ "${EAGLE3_VENV:-}" != none ]; then
    _venv=${EAGLE3_VENV:-$_root/.venv}
    _python=${PYTHON:-python3}
    "$_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $("$_python" --version) is too old, Python 3.11 or later is needed: set PYTHON to its path" >&2
        exit 2
    }
    command -v c++ >/dev/null || {
        echo "error: no C++ compiler; DeepSpeed builds a small helper with it: install g++ (or your system's build tools)" >&2
        exit 2
    }
    # Installed again only if the files that say what to install have changed.
    _wanted=$(cat "$_root/requirements.txt" "$_requirements")
    if [ "$(cat "$_venv/installed.txt" 2>/dev/null)" != "$_wanted" ]; then
        echo "installing $(basename "$_requirements") into $_venv (some minutes)"
        [ -x "$_venv/bin/python" ] || "$_python" -m venv "$_venv"
        "$_venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$_requirements"
        printf '%s\n' "$_wanted" >"$_venv/installed.txt"
    fi
    # shellcheck disable=SC1091
    . "$_venv/bin/activate"
fi
