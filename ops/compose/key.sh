#!/bin/bash
# Makes the first API key of a deployment, because `run` and `api` do not start in production while there is none. It may
# read and submit. It is kept in the volume of the deployment's secrets, where only root may read it:
#
#   docker compose exec --user 0 ocean cat /run/secrets/api_key
#
# What is there stays. So do all other keys: while there is one, a key that was revoked does not come back.
set -euo pipefail
name=made-by-compose file=${1:-/run/secrets}/api_key

keys=$(orchestrator keys list --json)
if grep -q "\"name\" *: *\"$name\"" <<<"$keys"; then
    [ ! -s "$file" ] || exit 0
    # A start before this one made the key, and ended before it kept it.
    orchestrator keys revoke "$name"
elif [ "$keys" != '[]' ]; then
    rm -f "$file"
    exit 0
fi
# All or nothing, and never on standard output, which is logged.
rm -f "$file.new"
(umask 0377 && orchestrator keys create "$name" --scope read --scope submit >"$file.new")
mv -f "$file.new" "$file"
