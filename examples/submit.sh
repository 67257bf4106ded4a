#!/bin/sh
# Submits an event that is due in two seconds, once more by mistake, and waits until it is delivered.
#
#   make run                                                              # in another terminal
#   sh examples/submit.sh http://127.0.0.1:8080 http://127.0.0.1:9099/hook
#
# Needs curl. An API with keys: API_KEY=orch_… sh examples/submit.sh …
set -eu
api=$1
destination=$2

call() { # path, further arguments of curl
    path=$1
    shift
    curl --silent --show-error --fail-with-body --header "X-API-Key: ${API_KEY:-}" "$@" "$api/api/v1/events$path"
}

# The text that a field of a JSON document has; jq does it better.
field() {
    sed -n "s/.*\"$1\" *: *\"\([^\"]*\)\".*/\1/p"
}

# The date of GNU, or else that of BSD and macOS.
at=$(date -u -d '+2 seconds' +%Y-%m-%dT%H:%M:%SZ 2>/dev/null || date -u -v+2S +%Y-%m-%dT%H:%M:%SZ)
event=$(cat <<EVENT
{
  "source": "examples",
  "external_job_id": "order-17/reminder",
  "scheduled_at": "$at",
  "destination": "$destination",
  "payload": {"order": 17}
}
EVENT
)

id=$(call "" --json "$event" | field id)
echo "submitted $id"

# The same source, external_job_id and scheduled_at name the same event: a client that got no answer submits again.
again=$(call "" --json "$event" | field id)
echo "submitted $again"

status=scheduled
while [ "$status" = scheduled ] || [ "$status" = in_flight ] || [ "$status" = retrying ]; do
    sleep 0.5
    status=$(call "/$id" | field status)
done
echo "$status"
