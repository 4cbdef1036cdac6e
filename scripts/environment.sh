# Virtual environments that are made once, and again when what they were made from changes.
# Sourced by scripts/test, scripts/demo and tests/acceptance/environment.

# find_python [NEWEST]: prints the first Python from 3.10 to 3.NEWEST that can make environments.
# $PYTHON, where set, is asked first.
find_python() {
  local newest=${1:-99} candidate
  for candidate in "${PYTHON:-python3}" python3 python3.1{4,3,2,1,0} python; do
    if "$candidate" -c "import ensurepip, sys, venv
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest))" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "No Python 3.10 or later${1:+, up to 3.$1,} with venv was found; set PYTHON to one." >&2
  return 1
}

# make_environment FOLDER PYTHON CONSTRAINTS TORCH REQUIREMENTS...: installs the requirements.
# Where the requirement TORCH cannot be met, some other torch is taken that the requirements allow.
# A finished environment holds a stamp over the interpreter, the constraints, what was asked for and,
# where that is the checkout itself, its place; while it is the same, nothing is done. $NO_DEPENDENCIES are packages whose own
# dependencies are not wanted.
make_environment() {
  local folder=$1 python=$2 constraints=$3 torch=$4 stamp
  shift 4
  stamp=$({
    "$python" -VV
    echo "$torch" "$@" "${NO_DEPENDENCIES:-}"
    cat "$constraints"
    case " $* " in *" -e . "*) pwd -P && cat pyproject.toml ;; esac
  } | cksum)
  if [ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ]; then return; fi

  echo "Making $folder with $("$python" -V), once" >&2
  "$python" -m venv --clear "$folder"
  # torch first and by itself, so that only its absence is forgiven.
  pip_install "$folder" -c "$constraints" "$torch" || echo "No $torch here: another will do" >&2
  pip_install "$folder" -c "$constraints" "$@"
  # shellcheck disable=SC2086 - a list of words
  if [ -n "${NO_DEPENDENCIES:-}" ]; then
    pip_install "$folder" -c "$constraints" --no-deps $NO_DEPENDENCIES
  fi
  echo "$stamp" >"$folder/stamp"
}

# pip_install FOLDER ARGUMENTS...: errors are shown, warnings are not.
pip_install() {
  local folder=$1
  shift
  "$folder/bin/python" -m pip install -qq --disable-pip-version-check "$@"
}
