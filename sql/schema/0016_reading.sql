-- Functions that have another name now, or return columns of other names. A new database has none of them.

drop function if exists orchestrator.next_slot(timestamptz, timestamptz, interval, integer);
drop function if exists orchestrator.is_limited(orchestrator.destination);
drop function if exists orchestrator.lane_open(orchestrator.lane, timestamptz);
