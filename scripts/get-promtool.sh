#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
#
# Take the promtool program out of Debian's prometheus package and put it into a folder.
#
# Usage: scripts/get-promtool.sh FOLDER      (needs apt-get and dpkg-deb; root only to refresh apt's lists)
set -euo pipefail

folder=$(realpath "$1")
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
install -m 755 unpacked/usr/bin/promtool "$folder/promtool"
"$folder/promtool" --version >/dev/null
echo "get-promtool: $folder/promtool"
