-- Submission: staging table -> event + timer. submit_staged() takes everything. COPY clients call it
-- themselves; schedule_event() and submit_events() fill the staging table from their arguments. New events
-- have faster ways in, see 24_direct_submission.sql and 29_small_batches.sql.

create or replace function orchestrator.open_staging() returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
set client_min_messages = warning as $$
begin
  if to_regclass('pg_temp.submission') is not null then
    perform orchestrator.check_staging();
    delete from pg_temp.submission;
    return;
  end if;
  create temp table submission
  ( n integer not null
  , id uuid not null
  , scheduled_at timestamptz not null
  , source text not null
  , external_job_id text
  , delivery_type text not null
  , destination text
  , payload json not null
  , headers json
  , max_retries integer not null
  , retry_policy text
  , ordering_key text
  , priority smallint
  , spread interval
  , expires_at timestamptz
  , correlation_id text
  , traceparent text
  ) using heap on commit delete rows;
  -- Only this session can reach it, whatever role it has set.
  grant select, insert on pg_temp.submission to public;
end $$;
comment on function orchestrator.open_staging() is
  'Creates this session''s staging table pg_temp.submission, or empties it. '
  'COPY into it, then call submit_staged() in the same transaction';

-- A table of that name made by somebody else could run their code with this owner's rights.
create or replace function orchestrator.check_staging() returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  if not exists (
    select from pg_class
    where oid = to_regclass('pg_temp.submission') and relkind = 'r' and relowner = current_user::regrole
  ) then
    raise exception 'pg_temp.submission is not the staging table'
      using hint = 'drop it, then: select orchestrator.open_staging()', errcode = 'object_not_in_prerequisite_state';
  end if;
  -- The session may have opened it before a migration.
  if not exists (
    select from pg_attribute a where a.attrelid = 'pg_temp.submission'::regclass and a.attname = 'traceparent'
  ) then
    alter table pg_temp.submission
      add column if not exists expires_at timestamptz,
      add column correlation_id text,
      add column traceparent text;
  end if;
end $$;
comment on function orchestrator.check_staging() is
  'Refuses a staging table that open_staging() did not make, and adds the columns that a migration brought since';

-- Inlined by the planner: set-returning, and without settings of its own. The columns are in the order of
-- event.
create or replace function orchestrator.as_event(
  p_id uuid, p_scheduled_at timestamptz, p_created_at timestamptz, p_max_retries integer, p_source text
, p_external_job_id text, p_delivery_type text, p_destination text, p_retry_policy text, p_headers json, p_payload json
, p_ordering_key text, p_priority smallint, p_spread interval, p_expires_at timestamptz, p_predecessor uuid
, p_correlation_id text, p_traceparent text)
returns setof orchestrator.event
language sql immutable parallel safe rows 1 as $$
  select p_id, p_scheduled_at, p_created_at, p_max_retries::smallint, p_source
    , p_external_job_id, p_delivery_type, p_destination, p_retry_policy, p_headers, p_payload
    , p_ordering_key, nullif(p_priority, 0), p_spread, p_expires_at, p_predecessor
    , p_correlation_id, p_traceparent
$$;
comment on function orchestrator.as_event(
  uuid, timestamptz, timestamptz, integer, text, text, text, text, text, json, json, text, smallint, interval
, timestamptz, uuid, text, text) is
  'An event of these columns, for those that insert events where nothing is hot: insert_each() and move_horizon()';

-- Timers in order of the key.
create or replace function orchestrator.create_timers(
  p_ids uuid[], p_scheduled_at timestamptz[], p_due_at timestamptz[] default null, p_attempts integer[] default null)
returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_now timestamptz;
begin
  lock table orchestrator.timer in row exclusive mode;
  v_now := orchestrator.now();
  insert into orchestrator.timer
    (event_id, scheduled_at, due_at, lane, destination, priority, ordering, attempt, max_attempts, source, retrying
    , expires_at)
  select e.id, e.scheduled_at
    , greatest(v_now, coalesce(a.due_at
      , e.scheduled_at + coalesce(orchestrator.spread_shift(e.id, coalesce(e.spread, d.spread)), '0 s')))
    , p.lane, hashtextextended(n.name, 0), coalesce(e.priority, 0), hashtextextended(e.ordering_key, 0)
    , nullif(a.attempts, 0), coalesce(a.attempts, 0) + e.max_retries + 1
    , hashtextextended(e.source, 0), case when a.attempts is not null then true end
    , e.expires_at
  from unnest(p_ids, p_scheduled_at, p_due_at, p_attempts) as a (id, scheduled_at, due_at, attempts)
  cross join lateral (
    select e.* from orchestrator.event e where e.id = a.id and e.scheduled_at = a.scheduled_at limit 1) e
  cross join lateral (select orchestrator.destination_name(e.delivery_type, e.destination) as name) n
  cross join lateral (select orchestrator.lane_for(n.name) as lane) p
  left join orchestrator.lane l on l.lane = p.lane and p.lane > 63
  left join orchestrator.destination d on d.name = l.name
  order by a.id;
end $$;
comment on function orchestrator.create_timers(uuid[], timestamptz[], timestamptz[], integer[]) is
  'Creates the timers of events, one array element each, due when scheduled unless p_due_at says otherwise, and never '
  'before now. p_attempts: how many attempts each has had';

create or replace function orchestrator.announce_staged(p_now timestamptz) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC' as $$
begin
  insert into orchestrator.outbox (created_at, event_id, kind, key, value)
  select p_now, s.id, 'scheduled', orchestrator.record_key(s.ordering_key, s.external_job_id, s.id)
    , orchestrator.scheduled_message(
        s.id, s.source, s.external_job_id, s.scheduled_at, s.delivery_type, s.destination, p_now)
  from pg_temp.submission s;
end $$;
comment on function orchestrator.announce_staged(timestamptz) is
  'Writes a message to the scheduled topic for each staged row';

-- Only where some destinations have dedicated lanes.
create or replace function orchestrator.places_of(
  p_names text[], p_hashes bigint[], out lanes integer[], out spreads interval[])
language plpgsql stable security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_nestloop = off
set enable_mergejoin = off as $$
begin
  with place as materialized (
    select n.name, coalesce(own.lane, orchestrator.pattern_lane(n.name), (n.hash & 63)::integer) as lane
    from (select distinct u.name, u.hash from unnest(p_names, p_hashes) as u (name, hash)) n
    left join orchestrator.lane own on own.hash = n.hash
  )
  select array_agg(p.lane order by k.n), array_agg(d.spread order by k.n)
  into lanes, spreads
  from unnest(p_names) with ordinality as k (name, n)
  join place p on p.name = k.name
  left join orchestrator.lane l on l.lane = p.lane and p.lane > 63
  left join orchestrator.destination d on d.name = l.name;
end $$;
comment on function orchestrator.places_of(text[], bigint[]) is
  'The lanes of destinations, given by name and its hash, and the spreads that they have; in the same order';

-- The timers of new events, for all ways in. What a destination decides is looked up once for each kind: a
-- source, a delivery type and a destination. Each statement has one possible plan, so none is pinned.
create or replace function orchestrator.insert_timers(
  p_now timestamptz, p_ids uuid[], p_scheduled_at timestamptz[], p_max_retries smallint[], p_kinds integer[]
, p_sources text[], p_delivery_types text[], p_destinations text[]
, p_ordering_keys text[], p_priorities smallint[], p_spreads interval[], p_expires_at timestamptz[])
returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
declare
  v_names text[];
  v_hashes bigint[];
  v_source_hashes bigint[];
  v_lanes integer[];
  v_spreads interval[];
begin
  select array_agg(k.name order by k.n), array_agg(hashtextextended(k.name, 0) order by k.n)
    , array_agg(hashtextextended(k.source, 0) order by k.n)
    , array_agg((hashtextextended(k.name, 0) & 63)::integer order by k.n)
  into v_names, v_hashes, v_source_hashes, v_lanes
  from (
    select u.source, orchestrator.destination_name(u.delivery_type, u.destination) as name, u.n
    from unnest(p_sources, p_delivery_types, p_destinations)
      with ordinality as u (source, delivery_type, destination, n)
    offset 0) k;
  if exists (select from orchestrator.lane l where l.lane > 63 and l.name is not null) then
    select p.lanes, p.spreads into v_lanes, v_spreads from orchestrator.places_of(v_names, v_hashes) p;
  end if;

  insert into orchestrator.timer
    (event_id, scheduled_at, due_at, lane, destination, priority, ordering, max_attempts, source, expires_at)
  select e.id, e.scheduled_at
    , greatest(p_now, case
        when coalesce(e.spread, v_spreads[e.kind]) is null then e.scheduled_at
        else e.scheduled_at + orchestrator.spread_shift(e.id, coalesce(e.spread, v_spreads[e.kind])) end)
    , v_lanes[e.kind], v_hashes[e.kind], coalesce(e.priority, 0), hashtextextended(e.ordering_key, 0)
    , e.max_retries + 1, v_source_hashes[e.kind], e.expires_at
  -- Not one unnest() of all: that would keep what it returns in memory first.
  from (
    select unnest(p_ids) as id, unnest(p_scheduled_at) as scheduled_at, unnest(p_max_retries) as max_retries
      , unnest(p_kinds) as kind, unnest(p_ordering_keys) as ordering_key, unnest(p_priorities) as priority
      , unnest(p_spreads) as spread, unnest(p_expires_at) as expires_at) e;

  insert into orchestrator.statistic
    (minute, name, source, destination, source_label, destination_label, value)
  select date_trunc('minute', p_now), 'accepted', v_source_hashes[c.kind], v_hashes[c.kind]
    , p_sources[c.kind], v_names[c.kind], c.events
  from (
    select min(e.kind) as kind, count(*) as events
    from (select unnest(p_kinds) as kind) e
    group by v_source_hashes[e.kind], v_hashes[e.kind]) c;
end $$;
comment on function orchestrator.insert_timers(
  timestamptz, uuid[], timestamptz[], smallint[], integer[], text[], text[], text[], text[], smallint[], interval[]
, timestamptz[]) is
  'Creates the timers of new events and counts them. p_kinds says which element of p_sources, p_delivery_types and '
  'p_destinations is that of each event; optional arrays are null where no event has the field';

create or replace function orchestrator.note_priorities(p_priorities smallint[]) returns void
language sql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off as $$
  select orchestrator.note_control('priorities', p_priorities)
  from orchestrator.newest_control() c
  where not c.priorities @> p_priorities
$$;
comment on function orchestrator.note_priorities(smallint[]) is
  'Lets claims look at these priorities, unless they do already; null: none';

create or replace function orchestrator.require_plain(p_last timestamptz, p_policies text[]) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off as $$
begin
  if p_last >= (select c.horizon_at from orchestrator.newest_control() c)
    or p_policies is not null and not p_policies <@ array(select name from orchestrator.retry_policy)
  then
    raise check_violation;  -- go on row by row
  end if;
end $$;
comment on function orchestrator.require_plain(timestamptz, text[]) is
  'Raises check_violation when a batch reaches into the horizon, or names a retry policy that does not exist';

-- Plain inserts: on conflict, or looking for duplicates beforehand, costs each row an index probe and a WAL
-- record more. Takes no lock but those of its own rows, in order of id, so that two batches cannot deadlock.
create or replace function orchestrator.insert_plain(p_now timestamptz, p_announced boolean, p_predecessor uuid)
returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  perform orchestrator.require_plain(
    max(s.scheduled_at), array_agg(distinct s.retry_policy) filter (where s.retry_policy is not null))
  from pg_temp.submission s;
  insert into orchestrator.event
    (id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, retry_policy
    , ordering_key, priority, spread, expires_at, predecessor, correlation_id, traceparent, headers, payload)
  select s.id, s.scheduled_at, p_now, s.max_retries, s.source, s.external_job_id, s.delivery_type, s.destination
    , s.retry_policy
    , s.ordering_key, nullif(s.priority, 0), s.spread, s.expires_at, p_predecessor, s.correlation_id, s.traceparent
    , s.headers, s.payload
  from pg_temp.submission s
  order by s.id;
  perform orchestrator.insert_timers(p_now
  , array_agg(s.id order by s.id), array_agg(s.scheduled_at order by s.id)
  , array_agg(s.max_retries::smallint order by s.id), array_agg(s.kind::integer order by s.id)
  , array_agg(s.source order by s.id), array_agg(s.delivery_type order by s.id), array_agg(s.destination order by s.id)
  , array_agg(s.ordering_key order by s.id), array_agg(s.priority order by s.id), array_agg(s.spread order by s.id)
  , array_agg(s.expires_at order by s.id))
  from (select s.*, row_number() over (order by s.id) as kind from pg_temp.submission s) s
  having count(*) > 0;
  perform orchestrator.announce_staged(p_now) where p_announced;
end $$;
comment on function orchestrator.insert_plain(timestamptz, boolean, uuid) is
  'Inserts all staged rows as events with timers. Fails when one is a duplicate or breaks a constraint';

create or replace function orchestrator.unstage_duplicates(p_now timestamptz) returns orchestrator.submitted[]
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
declare
  v_answers orchestrator.submitted[];
  v_faulty boolean;
begin
  with repeated as materialized (
    select s.ctid as place, row_number() over (partition by s.id order by s.n) > 1 as is_copy
    from pg_temp.submission s
  ),
  gone as (
    delete from pg_temp.submission s
    using repeated r
    where r.place = s.ctid and (r.is_copy or exists (
      select from orchestrator.event e where e.id = s.id and e.scheduled_at = s.scheduled_at offset 0))
    returning s.*, r.is_copy
  ),
  counted as (
    insert into orchestrator.statistic
      (minute, name, source, destination, source_label, destination_label, value)
    select date_trunc('minute', p_now), 'duplicate', hashtextextended(g.source, 0), hashtextextended(d.name, 0)
      , g.source, d.name, count(*)
    from gone g
    cross join lateral (select orchestrator.destination_name(g.delivery_type, g.destination) as name) d
    group by g.source, d.name
  )
  select array_agg(row(g.n, g.id, 'duplicate', null, null)::orchestrator.submitted)
    , bool_or(c.field is not null and (g.is_copy or c.field <> 'retry_policy'))
  into v_answers, v_faulty
  from gone g
  cross join lateral orchestrator.check_submission(
    g.scheduled_at, g.source, g.external_job_id, g.delivery_type, g.destination, g.headers, g.max_retries
  , g.retry_policy, g.ordering_key, g.priority, g.spread, g.expires_at, g.correlation_id, g.traceparent
  , null, null, null) c;
  if v_faulty then
    raise check_violation;  -- insert_each() says which are refused
  end if;
  return v_answers;
end $$;
comment on function orchestrator.unstage_duplicates(timestamptz) is
  'Takes out of the staging table what is kept already or repeats another row; returns and counts it';

-- The clock is read when timer is locked, on which raise_floors() relies.
create or replace function orchestrator.insert_staged(p_predecessor uuid)
returns table (n integer, id uuid, result text, field text, reason text)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set plan_cache_mode = force_generic_plan
set enable_seqscan = off as $$
#variable_conflict use_column
declare
  v_now timestamptz;
  v_first timestamptz;
  v_priorities smallint[];
  v_former_ids boolean;
  v_duplicates orchestrator.submitted[];
  v_way text := 'plain';
  v_announced constant boolean := exists (select from orchestrator.outbox_kind where kind = 'scheduled');
begin
  perform orchestrator.check_staging();
  lock table orchestrator.timer in row exclusive mode;
  v_now := orchestrator.now();
  -- reroute_remaining() waits for transactions that may have read the lanes as they were. So this one needs
  -- its id before it reads them.
  perform pg_current_xact_id();
  select min(s.scheduled_at), array_agg(distinct s.priority) filter (where s.priority between -9 and 9)
  into v_first, v_priorities
  from pg_temp.submission s;
  perform orchestrator.note_priorities(v_priorities) where v_priorities is not null;
  select c.former_ids_until is not null into v_former_ids from orchestrator.newest_control() c;
  -- reschedule_event() has looked for former ids itself.
  perform orchestrator.recognise_former_ids() where v_former_ids and p_predecessor is null;

  begin
    perform orchestrator.insert_plain(v_now, v_announced, p_predecessor);
  exception
    when unique_violation then v_way := 'without duplicates';
    when check_violation or numeric_value_out_of_range then v_way := 'row by row';
  end;
  if v_way = 'without duplicates' then
    begin
      v_duplicates := orchestrator.unstage_duplicates(v_now);
      perform orchestrator.insert_plain(v_now, v_announced, p_predecessor);
      return query select * from unnest(v_duplicates);
    exception when unique_violation or check_violation or numeric_value_out_of_range then
      v_way := 'row by row';
    end;
  end if;
  if v_way = 'row by row' then
    return query select * from orchestrator.insert_each(v_now, v_announced, p_predecessor);
  end if;
  perform orchestrator.tell_due(v_first);
  perform orchestrator.tell_outbox() where v_announced;
end $$;
comment on function orchestrator.insert_staged(uuid) is
  'Turns staged rows into events and timers; all functions that stage call it. '
  'p_predecessor is the event that a reschedule ends; null: none';

create or replace function orchestrator.submit_staged()
returns table (n integer, id uuid, result text, field text, reason text)
language sql security definer
set search_path = orchestrator, pg_temp as $$
  select * from orchestrator.insert_staged(null)
$$;
comment on function orchestrator.submit_staged() is
  'Turns the rows of pg_temp.submission into events and their timers, and answers those that became no new event. '
  'Their result is duplicate (kept already, under that id; nothing changes) or refused (with field and reason)';

-- The states are looked up in a statement of their own, which sees the duplicates that the first one waited
-- for.
create or replace function orchestrator.submit_staged_with_status()
returns table (n integer, id uuid, result text, field text, reason text, status text)
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_answers orchestrator.submitted[];
begin
  select array_agg(row(k.n, k.id, k.result, k.field, k.reason)::orchestrator.submitted)
  into v_answers
  from orchestrator.insert_staged(null) k;
  if v_answers is not null then
    return query
    select a.n, a.id, a.result, a.field, a.reason
      , case when a.result = 'duplicate' then orchestrator.status_of(a.id) end
    from unnest(v_answers) a;
  end if;
end $$;
comment on function orchestrator.submit_staged_with_status() is
  'submit_staged(), with the state that each duplicate is in now';

-- The limit keeps the planner from joining all of timer to the view first.
create or replace function orchestrator.status_of(p_id uuid) returns text
language sql volatile security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off as $$
  select s.status
  from orchestrator.event_status s
  where s.id = p_id
    and orchestrator.in_millisecond_of(p_id, s.scheduled_at)
  limit 1
$$;
comment on function orchestrator.status_of(uuid) is 'The state that an event is in; null: there is none';

create or replace function orchestrator.try_submit_staged()
returns table (n integer, id uuid, result text, field text, reason text)
language sql security definer
set search_path = orchestrator, pg_temp
set lock_timeout = '250 ms' as $$
  select * from orchestrator.insert_staged(null)
$$;
comment on function orchestrator.try_submit_staged() is
  'submit_staged() for a batch of many clients. Fails after waiting 250 ms for another session, as one with an '
  'uncommitted event of the same id';

create or replace function orchestrator.try_submit_staged_with_status()
returns table (n integer, id uuid, result text, field text, reason text, status text)
language sql security definer
set search_path = orchestrator, pg_temp
set lock_timeout = '250 ms' as $$
  select * from orchestrator.submit_staged_with_status()
$$;
comment on function orchestrator.try_submit_staged_with_status() is
  'try_submit_staged(), with the state that each duplicate is in now';

-- Inlined. An event that is kept already kept all rules when it came: it stays a duplicate, although time has
-- passed or settings have changed since.
create or replace function orchestrator.lasting_fault(p_field text, p_id uuid, p_scheduled_at timestamptz) returns text
language sql volatile as $$
  select case
    when p_field not in ('scheduled_at', 'retry_policy') then p_field
    when p_field is not null then case when not orchestrator.is_kept(p_id, p_scheduled_at) then p_field end end
$$;
comment on function orchestrator.lasting_fault(text, uuid, timestamptz) is
  'The field that check_submission() named, unless the event is kept already and '
  'only time or settings speak against it';

create or replace function orchestrator.open_staged_days(p_now timestamptz) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  perform orchestrator.open_days(array(
    select distinct (s.scheduled_at at time zone 'UTC')::date
    from pg_temp.submission s
    where isfinite(s.scheduled_at)), p_now);
exception when lock_not_available then
  null;  -- another session keeps the horizon locked; the events wait there for maintenance
end $$;
comment on function orchestrator.open_staged_days(timestamptz) is
  'open_days() for the days of the staged rows; creates none while another session keeps the horizon locked';

create or replace function orchestrator.insert_each(p_now timestamptz, p_announced boolean, p_predecessor uuid)
returns table (n integer, id uuid, result text, field text, reason text)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set plan_cache_mode = force_generic_plan
set enable_nestloop = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
  v_control orchestrator.control;
  v_days date[];
  v_first_at timestamptz;
  v_ids uuid[];
  v_scheduled timestamptz[];
  v_waiting_from timestamptz;
  v_answers orchestrator.submitted[];
begin
  perform orchestrator.open_staged_days(p_now);
  -- Keeps days from getting their partition meanwhile: whoever gives a day one waits until all that went to
  -- the horizon is there to see.
  perform pg_advisory_xact_lock_shared(hashtext('orchestrator.horizon'));
  select * into v_control from orchestrator.newest_control();
  v_days := orchestrator.partition_days();
  v_first_at := orchestrator.first_day_kept(p_now)::timestamptz;
  with checked as materialized (
    select s.*, k.field, c.reason, d.day is null as beyond
      , row_number() over (partition by s.id, k.field is null order by s.n) as copy
    from pg_temp.submission s
    left join unnest(v_days) as d (day) on d.day = (s.scheduled_at at time zone 'UTC')::date
    cross join lateral (
      select *
      from orchestrator.check_submission(
        s.scheduled_at, s.source, s.external_job_id, s.delivery_type, s.destination, s.headers, s.max_retries
      , s.retry_policy, s.ordering_key, s.priority, s.spread, s.expires_at, s.correlation_id, s.traceparent
      , case when d.day is null then v_first_at end
      , p_now + make_interval(days => v_control.max_schedule_ahead_days), v_control.max_schedule_ahead_days)
      offset 0) c
    cross join lateral (select orchestrator.lasting_fault(c.field, s.id, s.scheduled_at) as field) k
  ),
  fresh as materialized (
    select c.*
    from checked c
    where c.field is null and c.copy = 1
      -- Deliberately a count: the planner would make an exists a join, which is slower here.
      and 0 = (select count(*) from orchestrator.horizon h where h.id = c.id and h.scheduled_at = c.scheduled_at)
  ),
  kept as (
    insert into orchestrator.event
    select e.*
    from fresh c
    cross join lateral orchestrator.as_event(
      c.id, c.scheduled_at, p_now, c.max_retries, c.source, c.external_job_id, c.delivery_type, c.destination
    , c.retry_policy, c.headers, c.payload, c.ordering_key, c.priority, c.spread, c.expires_at, p_predecessor
    , c.correlation_id, c.traceparent) e
    where not c.beyond
    order by c.id
    on conflict do nothing
    returning id, scheduled_at
  ),
  -- The columns in the order of event: horizon has others between them.
  waiting as (
    insert into orchestrator.horizon
      (id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, retry_policy
      , headers, payload, ordering_key, priority, spread, expires_at, predecessor, correlation_id, traceparent)
    select e.*
    from fresh c
    cross join lateral orchestrator.as_event(
      c.id, c.scheduled_at, p_now, c.max_retries, c.source, c.external_job_id, c.delivery_type, c.destination
    , c.retry_policy, c.headers, c.payload, c.ordering_key, c.priority, c.spread, c.expires_at, p_predecessor
    , c.correlation_id, c.traceparent) e
    where c.beyond
    order by c.id
    on conflict do nothing
    returning id, scheduled_at
  ),
  accepted as materialized (
    select f.*
    from fresh f
    join (select k.id from kept k union all select w.id from waiting w) a on a.id = f.id
  ),
  announced as (
    insert into orchestrator.outbox (created_at, event_id, kind, key, value)
    select p_now, a.id, 'scheduled', orchestrator.record_key(a.ordering_key, a.external_job_id, a.id)
      , orchestrator.scheduled_message(
          a.id, a.source, a.external_job_id, a.scheduled_at, a.delivery_type, a.destination, p_now)
    from accepted a
    where p_announced
  ),
  answer as materialized (
    select c.n, c.id, case when c.field is null then 'duplicate' else 'refused' end as result, c.field, c.reason
      , c.source, c.delivery_type, c.destination
    from checked c
    where c.field is not null or c.copy > 1 or c.id not in (select a.id from accepted a)
  ),
  counted as (
    insert into orchestrator.statistic
      (minute, name, source, destination, source_label, destination_label, value)
    select date_trunc('minute', p_now), r.name, hashtextextended(r.source, 0), hashtextextended(d.name, 0)
      , r.source, d.name, count(*)
    from (
      select 'accepted' as name, a.source, a.delivery_type, a.destination from accepted a
      union all
      select r.result, r.source, r.delivery_type, r.destination from answer r where r.result = 'duplicate') r
    cross join lateral (select orchestrator.destination_name(r.delivery_type, r.destination) as name) d
    group by r.name, r.source, d.name
  )
  select (select array_agg(k.id) from kept k), (select array_agg(k.scheduled_at) from kept k)
    , (select min(w.scheduled_at) from waiting w)
    , array_agg(row(a.n, a.id, a.result, a.field, a.reason)::orchestrator.submitted)
  into v_ids, v_scheduled, v_waiting_from, v_answers
  from answer a;
  perform orchestrator.create_timers(v_ids, v_scheduled) where v_ids is not null;
  -- Somebody detached the partition of a day by hand: from that day on, submissions must look into the
  -- horizon.
  update orchestrator.control c set horizon_at = v_waiting_from where c.horizon_at > v_waiting_from;
  return query select * from unnest(v_answers);
end $$;
comment on function orchestrator.insert_each(timestamptz, boolean, uuid) is
  'insert_staged() row by row, for a batch with duplicates, with mistakes, or with events for the horizon';

create or replace function orchestrator.is_kept(p_id uuid, p_scheduled_at timestamptz) returns boolean
language sql volatile security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off as $$
  select exists (select from orchestrator.stored_event e where e.id = p_id and e.scheduled_at = p_scheduled_at)
$$;
comment on function orchestrator.is_kept(uuid, timestamptz) is 'Whether there is an event of this id';

create or replace function orchestrator.scheduled_message(
  p_id uuid, p_source text, p_external_job_id text, p_scheduled_at timestamptz, p_delivery_type text
, p_destination text, p_created_at timestamptz)
returns bytea
language sql stable parallel safe
return convert_to(json_build_object(
  'id', p_id, 'source', p_source, 'external_job_id', p_external_job_id, 'scheduled_at', p_scheduled_at
, 'delivery_type', p_delivery_type, 'destination', p_destination, 'created_at', p_created_at)::text, 'UTF8');
comment on function orchestrator.scheduled_message(uuid, text, text, timestamptz, text, text, timestamptz) is
  'The message to the scheduled topic about an event that was accepted';

-- Once a transaction, and again only for what is due earlier: a loop over schedule_event() tells one time,
-- not each.
create or replace function orchestrator.tell_due(p_due_at timestamptz) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
declare
  v_now constant timestamptz := orchestrator.now();
begin
  if p_due_at < least(
    v_now + orchestrator.notify_within()
  , to_timestamp(nullif(current_setting('orchestrator.told', true), '')::double precision))
  then
    perform set_config('orchestrator.told', extract(epoch from greatest(p_due_at, v_now))::text, true);
    perform pg_notify('orchestrator_due', extract(epoch from greatest(p_due_at, v_now))::text);
  end if;
end $$;
comment on function orchestrator.tell_due(timestamptz) is
  'Notifies the dispatchers of an event due within notify_within(), as Unix seconds. A hint: they also poll';

create or replace function orchestrator.notify_within() returns interval
language sql immutable parallel safe
return interval '10 s';
comment on function orchestrator.notify_within() is
  'Submissions due within this time wake the dispatchers; the longest poll interval a dispatcher may have';
