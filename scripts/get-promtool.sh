#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
#
# Take promtool, or other programs, out of Debian's prometheus package and put them into a folder.
#
# Usage: scripts/get-promtool.sh FOLDER [promtool] [prometheus]
# Needs apt-get and dpkg-deb; root only to refresh apt's lists.
set -euo pipefail

folder=$(realpath "$1")
programs=("${@:2}")
[ "${#programs[@]}" -gt 0 ] || programs=(promtool)
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "get-promtool: this is no Debian system" >&2
    exit 1
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
chmod 755 "$scratch" # apt downloads as a user of its own
cd "$scratch"

fetch() { apt-get -qq -o APT::Sandbox::User=root download prometheus >/dev/null 2>&1; }
if ! fetch; then
    # Fresh machines have no package lists yet.
    [ "$(id -u)" = 0 ] && apt-get -qq update >/dev/null && fetch || {
        echo "get-promtool: apt has no package prometheus" >&2
        exit 1
    }
fi
dpkg-deb -x prometheus_*.deb unpacked
for program in "${programs[@]}"; do
    if [ ! -f "unpacked/usr/bin/$program" ]; then
        echo "get-promtool: no program $program in the package; it has: $(ls unpacked/usr/bin | xargs)" >&2
        exit 1
    fi
    install -m 755 "unpacked/usr/bin/$program" "$folder/$program"
    "$folder/$program" --version >/dev/null 2>&1
    echo "get-promtool: $folder/$program"
done
