-- Names that programs of the version before call; gone with the next release.

-- Called by submit_staged() and its like of the version before, which may have waited for the migration.
create or replace function orchestrator.keep_staged(p_predecessor uuid)
returns table (n integer, id uuid, result text, field text, reason text)
language sql security definer
set search_path = orchestrator, pg_temp as $$
  select * from orchestrator.insert_staged(p_predecessor)
$$;
comment on function orchestrator.keep_staged(uuid) is 'Former name of insert_staged()';

create or replace function orchestrator.keep_each(p_now timestamptz, p_told boolean, p_predecessor uuid)
returns table (n integer, id uuid, result text, field text, reason text)
language sql security definer
set search_path = orchestrator, pg_temp as $$
  select * from orchestrator.insert_each(p_now, p_told, p_predecessor)
$$;
comment on function orchestrator.keep_each(timestamptz, boolean, uuid) is 'Former name of insert_each()';

create or replace function orchestrator.arm_events(
  p_ids uuid[], p_scheduled_at timestamptz[], p_due_at timestamptz[] default null, p_attempts integer[] default null)
returns void
language sql security definer
set search_path = orchestrator, pg_temp as $$
  select orchestrator.create_timers(p_ids, p_scheduled_at, p_due_at, p_attempts)
$$;
comment on function orchestrator.arm_events(uuid[], timestamptz[], timestamptz[], integer[]) is
  'Former name of create_timers()';

create or replace function orchestrator.check_submission(
  p_scheduled_at timestamptz, p_source text, p_external_job_id text, p_delivery_type text, p_destination text
, p_headers json, p_max_retries integer, p_retry_policy text, p_ordering_key text, p_priority smallint
, p_spread interval, p_expires_at timestamptz
, p_first_at timestamptz, p_end_at timestamptz, p_days_ahead integer)
returns table (field text, reason text)
language sql stable parallel safe as $$
  select c.field, c.reason
  from orchestrator.check_submission(
    p_scheduled_at, p_source, p_external_job_id, p_delivery_type, p_destination, p_headers, p_max_retries
  , p_retry_policy, p_ordering_key, p_priority, p_spread, p_expires_at, null, null, p_first_at, p_end_at
  , p_days_ahead) c
$$;
comment on function orchestrator.check_submission(
  timestamptz, text, text, text, text, json, integer, text, text, smallint, interval, timestamptz
, timestamptz, timestamptz, integer) is
  'Former form of check_submission(), without correlation_id and traceparent';

create or replace function orchestrator.settle_restored() returns bigint
language sql security definer
set search_path = orchestrator, pg_temp
as $$ select orchestrator.repair_after_restore() $$;
comment on function orchestrator.settle_restored() is 'Former name of repair_after_restore()';

create or replace function orchestrator.keep_aside(p_limit integer default 100, out kept bigint, out waiting bigint)
language sql security definer
set search_path = orchestrator, pg_temp
as $$ select a.kept, a.waiting from orchestrator.submit_set_aside(p_limit) a $$;
comment on function orchestrator.keep_aside(integer) is 'Former name of submit_set_aside()';

create or replace function orchestrator.own_lane(p_name text, p_configured boolean) returns integer
language sql security definer
set search_path = orchestrator, pg_temp
as $$ select orchestrator.ensure_dedicated_lane(p_name, p_configured) $$;
comment on function orchestrator.own_lane(text, boolean) is 'Former name of ensure_dedicated_lane()';

create or replace function orchestrator.notify_horizon() returns interval
language sql immutable parallel safe
return orchestrator.notify_within();
comment on function orchestrator.notify_horizon() is 'Former name of notify_within()';

create or replace function orchestrator.ordering_bucket(p_ordering bigint) returns integer
language sql immutable parallel safe
return orchestrator.ordering_lock_number(p_ordering);
comment on function orchestrator.ordering_bucket(bigint) is 'Former name of ordering_lock_number()';

-- Called by finish_events() of the version before, which may have waited for the migration.

create or replace function orchestrator.own_lanes(p_names text[], p_configured boolean)
returns table (name text, lane integer)
language sql security definer
set search_path = orchestrator, pg_temp
as $$ select l.name, l.lane from orchestrator.ensure_dedicated_lanes(p_names, p_configured) l $$;
comment on function orchestrator.own_lanes(text[], boolean) is 'Former name of ensure_dedicated_lanes()';

create or replace function orchestrator.watched_at_most() returns integer
language sql immutable parallel safe
return orchestrator.max_unconfigured_destinations();
comment on function orchestrator.watched_at_most() is 'Former name of max_unconfigured_destinations()';

create or replace function orchestrator.watch_lanes(p_lanes integer[], p_event_ids uuid[]) returns integer[]
language sql security definer
set search_path = orchestrator, pg_temp as $$
  select array_agg(r.lane order by f.n)
  from unnest(p_event_ids) with ordinality as f (event_id, n)
  join unnest(orchestrator.ensure_lanes_for_failures(array(
    select row(f.lane, f.event_id, null, null, null, null)::orchestrator.lane_result
    from unnest(p_lanes, p_event_ids) as f (lane, event_id)))) r on r.event_id = f.event_id
$$;
comment on function orchestrator.watch_lanes(integer[], uuid[]) is 'Former form of ensure_lanes_for_failures()';

create or replace function orchestrator.note_results(
  p_lanes integer[], p_delivered boolean[], p_status_codes integer[],
  p_started_at double precision[], p_finished_at double precision[])
returns void
language sql security definer
set search_path = orchestrator, pg_temp as $$
  select orchestrator.update_breakers(array(
    select row(r.lane, null, r.delivered, r.status_code, r.started_at, r.finished_at)::orchestrator.lane_result
    from unnest(p_lanes, p_delivered, p_status_codes, p_started_at, p_finished_at)
      as r (lane, delivered, status_code, started_at, finished_at)))
$$;
comment on function orchestrator.note_results(
  integer[], boolean[], integer[], double precision[], double precision[]) is
  'Former form of update_breakers()';

create or replace function orchestrator.hold_lane(p_lane integer) returns void
language sql security definer
set search_path = orchestrator, pg_temp
as $$ select orchestrator.recall_lane(p_lane) $$;
comment on function orchestrator.hold_lane(integer) is 'Former name of recall_lane()';
