-- Conditions that many queries put on timers and ids. Each is one expression, which the planner inlines:
-- it costs nothing, and indexes and partitions are used as if it had been written out.

create or replace function orchestrator.is_free(p_lease_until timestamptz, p_now timestamptz) returns boolean
language sql immutable parallel safe
return p_lease_until is null or p_lease_until <= p_now;
comment on function orchestrator.is_free(timestamptz, timestamptz) is
  'Whether a timer is not leased: it never was, or its lease has run out';

create or replace function orchestrator.is_dedicated(p_lane integer) returns boolean
language sql immutable parallel safe
return p_lane > 63;
comment on function orchestrator.is_dedicated(integer) is
  'Whether a lane is the dedicated lane of one destination; 0 to 63 are shared, and those below 0 hold parked timers';

-- Stable, as adding an interval is; the bounds let the executor leave out all other partitions.
create or replace function orchestrator.in_millisecond_of(p_id uuid, p_scheduled_at timestamptz) returns boolean
language sql stable parallel safe
return p_scheduled_at >= uuid_extract_timestamp(p_id)
  and p_scheduled_at < uuid_extract_timestamp(p_id) + interval '1 ms';
comment on function orchestrator.in_millisecond_of(uuid, timestamptz) is
  'Whether a scheduled_at is in the millisecond that an event id begins with: finds the partition by the id alone';
