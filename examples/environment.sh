# Sourced by the examples and by tests/run.sh: creates the Python environment once and activates it.
#
# It is the folder .venv of the repository, or EAGLE3_VENV. EAGLE3_VENV=none uses the active Python, which then needs
# the packages of requirements.txt.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_requirements=${EAGLE3_REQUIREMENTS:-$_root/requirements.txt}
if [ "${EAGLE3_VENV:-}" != none ]; then
    _venv=${EAGLE3_VENV:-$_root/.venv}
    _python=${PYTHON:-python3}
    [ ! -x "$_venv/bin/python" ] || _python=$_venv/bin/python
    "$_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $("$_python" --version) is too old, Python 3.11 or later is needed: set PYTHON to its path" >&2
        exit 2
    }
    [ -x "$_venv/bin/python" ] || "$_python" -c 'import ensurepip, venv' 2>/dev/null || {
        echo "error: $_python cannot make an environment: install its venv module (Debian: python3-venv)" >&2
        exit 2
    }
    command -v c++ >/dev/null || {
        echo "error: no C++ compiler, with which DeepSpeed builds a small helper: install g++ (or your build tools)" >&2
        exit 2
    }
    _header=$("$_python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    [ -e "$_header" ] || {
        echo "error: no $_header, which DeepSpeed's helper includes: install Python's headers (Debian: python3-dev)" >&2
        exit 2
    }
    # The environment keeps a copy of each installed requirements file, and packages are installed again only if one
    # differs. Other requirements files include requirements.txt, so both are copied then.
    _copy() { local name=${1#"$_root/"}; echo "$_venv/installed-${name//\//-}"; }
    if ! cmp -s "$_root/requirements.txt" "$(_copy "$_root/requirements.txt")" ||
        ! cmp -s "$_requirements" "$(_copy "$_requirements")"; then
        echo "installing ${_requirements#"$_root/"} into $_venv (some minutes)"
        [ -x "$_venv/bin/python" ] || "$_python" -m venv "$_venv"
        rm -f "$_venv"/installed* # until pip has finished, the environment counts as incomplete
        "$_venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$_requirements"
        cp "$_root/requirements.txt" "$(_copy "$_root/requirements.txt")"
        [ "$_requirements" -ef "$_root/requirements.txt" ] || cp "$_requirements" "$(_copy "$_requirements")"
    fi
    # shellcheck disable=SC1091
    . "$_venv/bin/activate"
fi
