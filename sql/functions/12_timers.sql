-- Conditions that many queries put on timers and ids. Each is one expression, which the planner inlines:
-- it costs nothing, and indexes and partitions are used as if it had been written out.

create or replace function orchestrator.is_free(p_lease_until timestamptz, p_now timestamptz) returns boolean
language sql immutable parallel safe
return p_lease_until is null or p_lease_until <= p_now;
comment on function orchestrator.is_free(timestamptz, timestamptz) is
  'Whether nobody holds a timer: it was never leased, or its lease has run out';
