-- Rows that the steps of a finish hand on to one another, and functions that have another name now.

create type orchestrator.finished_event as
( event_id uuid
, scheduled_at timestamptz
, result text
, due_at timestamptz
, claimed_at double precision
);
comment on type orchestrator.finished_event is
  'An event whose attempt has been recorded: delivered, retried (then due_at is when next) or dead';

create type orchestrator.lane_result as
( lane integer
, event_id uuid
, succeeded boolean
, status_code integer
, started_at double precision
, finished_at double precision
);
comment on type orchestrator.lane_result is 'The result of one attempt, as the circuit breaker of a lane counts it';

drop function if exists orchestrator.waiting_for(text);
drop function if exists orchestrator.waits_for(bigint, uuid, timestamptz);
