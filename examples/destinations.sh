#!/bin/sh
# Limits what a destination gets, stops it while its owner repairs something, and lets it go on.
#
#   DATABASE_URL=postgresql://… sh examples/destinations.sh hooks.example.com
#
# A destination is a host, with its port unless that is the usual one, or `kafka:` and a topic.
set -eu
destination=$1

# At most 50 attempts begin a second, and 20 are under way at once, by all dispatchers together. It holds at once.
orchestrator destinations set "$destination" --rate 50 --burst 10 --max-parallel 20

# No attempt to it begins until it is resumed; its events wait, and others go on.
orchestrator destinations pause "$destination"
orchestrator destinations show "$destination"
orchestrator destinations resume "$destination"

# Without its settings it is limited by nothing again.
orchestrator destinations delete "$destination"
