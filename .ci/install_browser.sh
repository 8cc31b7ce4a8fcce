#!/usr/bin/env bash
# Installs Debian's Chromium, which the tests of the demo page drive, unless it is there.
set -euo pipefail

browser=/usr/bin/chromium
if [ -x "$browser" ]; then
    "$browser" --version
    exit
fi
if ! command -v apt-get >/dev/null; then
    echo "error: $browser is missing and so is apt-get: install Chromium by hand and link it to $browser" >&2
    exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "error: $browser is missing: as root, run apt-get install chromium" >&2
        exit 1
    fi
    as_root=(sudo)
fi
"${as_root[@]}" apt-get update
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium fonts-dejavu-core
"$browser" --version
