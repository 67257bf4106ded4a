#!/bin/sh
# Puts the policy of 30 days and the index template into Elasticsearch; may be repeated.
#
#   ELASTICSEARCH_URL=https://elastic.example:9200 ELASTICSEARCH_USERNAME=… ELASTICSEARCH_PASSWORD=… ops/logging/setup.sh
set -eu

here=$(dirname "$0")
url=${ELASTICSEARCH_URL:-http://127.0.0.1:9200}

put() {
    # The login goes through standard input, so that no list of processes shows it.
    if [ -n "${ELASTICSEARCH_USERNAME:-}" ]; then
        printf 'user = "%s:%s"\n' "$ELASTICSEARCH_USERNAME" "${ELASTICSEARCH_PASSWORD:-}"
    fi | curl -fsS -K - -X PUT "$url/$1" -H 'content-type: application/json' --data-binary "@$here/$2"
    echo
}

put _ilm/policy/logs-orchestrator ilm-policy.json
put _index_template/logs-orchestrator index-template.json
