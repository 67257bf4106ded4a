-- Submission: staging table -> event + timer. submit_staged() is the one way in; COPY clients call it themselves,
-- schedule_event() and submit_events() fill the staging table from their arguments.

create or replace function orchestrator.open_staging() returns void
language plpgsql security definer set search_path = orchestrator, pg_temp set client_min_messages = warning as $$
begin
  if to_regclass('pg_temp.submission') is not null then
    perform orchestrator.check_staging();
    delete from pg_temp.submission;
    return;
  end if;
  create temp table submission
  ( n integer not null, id uuid not null, scheduled_at timestamptz not null, source text not null, external_job_id text
  , delivery_type text not null, destination text, payload json not null, headers json
  , max_retries integer not null, retry_policy text, ordering_key text, priority smallint, spread interval, expires_at timestamptz) using heap on commit delete rows;
  -- Only this session can reach it, whatever role it has set.
  grant select, insert on pg_temp.submission to public;
end $$;
comment on function orchestrator.open_staging() is
  'Makes this session''s staging table pg_temp.submission, or empties it. COPY into it, then call submit_staged() in the same transaction';

-- A table of that name made by somebody else could run their code with this owner's rights.
create or replace function orchestrator.check_staging() returns void
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
begin
  if not exists (select from pg_class
                 where oid = to_regclass('pg_temp.submission') and relkind = 'r' and relowner = current_user::regrole) then
    raise exception 'pg_temp.submission is not the staging table'
      using hint = 'drop it, then: select orchestrator.open_staging()', errcode = 'object_not_in_prerequisite_state';
  end if;
  if not exists (select from pg_attribute a where a.attrelid = 'pg_temp.submission'::regclass and a.attname = 'expires_at') then
    alter table pg_temp.submission add column expires_at timestamptz;
  end if;
end $$;
comment on function orchestrator.check_staging() is 'Refuses a staging table that open_staging() did not make; adds what one lacks that was made before a migration';

-- By the key, in order of it; p_attempts: that they have had.
create or replace function orchestrator.arm_events(p_ids uuid[], p_scheduled_at timestamptz[], p_due_at timestamptz[] default null, p_attempts integer[] default null)
returns void
language plpgsql security definer set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_now timestamptz;
begin
  lock table orchestrator.timer in row exclusive mode;
  v_now := orchestrator.now();
  insert into orchestrator.timer (event_id, scheduled_at, due_at, lane, destination, priority, ordering, attempt, max_attempts, source, retrying, expires_at)
  select e.id, e.scheduled_at
    , greatest(v_now, coalesce(a.due_at, e.scheduled_at + coalesce(orchestrator.spread_shift(e.id, coalesce(e.spread, d.spread)), '0 s')))
    , p.lane, hashtextextended(n.name, 0), coalesce(e.priority, 0), hashtextextended(e.ordering_key, 0)
    , coalesce(a.attempts, 0), coalesce(a.attempts, 0) + e.max_retries + 1, hashtextextended(e.source, 0), case when a.attempts is not null then true end, e.expires_at
  from unnest(p_ids, p_scheduled_at, p_due_at, p_attempts) as a (id, scheduled_at, due_at, attempts)
  cross join lateral (select e.* from orchestrator.event e where e.id = a.id and e.scheduled_at = a.scheduled_at limit 1) e
  cross join lateral (select orchestrator.destination_name(e.delivery_type, e.destination) as name) n
  cross join lateral (select orchestrator.lane_for(n.name) as lane) p
  left join orchestrator.lane l on l.lane = p.lane and p.lane > 63
  left join orchestrator.destination d on d.name = l.name
  order by a.id;
end $$;
comment on function orchestrator.arm_events(uuid[], timestamptz[], timestamptz[], integer[]) is
  'Makes the timers of events, one array element each, due when scheduled unless p_due_at says otherwise, and never before now';

-- Takes no lock but those of its own rows, inserted in order of id so that two batches cannot deadlock.
-- The plain insert is tried first: looking for duplicates beforehand, or on conflict, costs each row an index probe and a
-- WAL record more. Only a batch that breaks a constraint, or reaches into the horizon, is classified row by row.
-- The clock is read when timer is locked, on which raise_floors() relies.
create or replace function orchestrator.keep_staged(p_predecessor uuid)
returns table (n integer, id uuid, result text, field text, reason text)
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC'
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  v_now timestamptz;
  v_first timestamptz;
  v_last timestamptz;
  v_policies text[];
  v_priorities smallint[];
  v_horizon_at timestamptz;
  v_new_priority boolean;
  v_own_lanes boolean;
  v_former_ids boolean;
  v_told constant boolean := exists (select from orchestrator.outbox_kind where kind = 'scheduled');
begin
  perform orchestrator.check_staging();
  lock table orchestrator.timer in row exclusive mode;
  v_now := orchestrator.now();
  -- With a transaction id, which reroute_remaining() looks at, before lanes are read.
  perform pg_current_xact_id();
  v_own_lanes := exists (select from orchestrator.lane l where l.lane > 63 and l.name is not null);
  select min(s.scheduled_at), max(s.scheduled_at), array_agg(distinct s.retry_policy) filter (where s.retry_policy is not null)
    , array_agg(distinct s.priority) filter (where s.priority between -9 and 9)
  into v_first, v_last, v_policies, v_priorities
  from pg_temp.submission s;
  select c.horizon_at, c.former_ids_until is not null, not c.priorities @> v_priorities
  into v_horizon_at, v_former_ids, v_new_priority
  from orchestrator.control c;
  if v_new_priority then
    perform orchestrator.note_control('priorities', v_priorities);
  end if;
  -- A reschedule has looked already.
  perform orchestrator.recognise_former_ids() where v_former_ids and p_predecessor is null;
  begin
    if v_last >= v_horizon_at or v_policies is not null and not v_policies <@ array(select name from orchestrator.retry_policy) then
      raise check_violation;
    end if;
    insert into orchestrator.event
      (id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, retry_policy, ordering_key, priority, spread, expires_at, predecessor, headers, payload)
    select s.id, s.scheduled_at, v_now, s.max_retries, s.source, s.external_job_id, s.delivery_type, s.destination, s.retry_policy, s.ordering_key, nullif(s.priority, 0), s.spread, s.expires_at, p_predecessor, s.headers, s.payload
    from pg_temp.submission s
    order by s.id;
    with named as materialized (
      select s.id, s.scheduled_at, s.spread, s.priority, s.ordering_key, s.max_retries, s.expires_at, s.source
        , orchestrator.destination_name(s.delivery_type, s.destination) as name
      from pg_temp.submission s
      order by s.id
    ), place as materialized (
      select n.name, coalesce(own.lane, orchestrator.pattern_lane(n.name), (hashtextextended(n.name, 0) & 63)::integer) as lane
      from (select distinct n.name from named n where v_own_lanes) n
      left join orchestrator.lane own on own.hash = hashtextextended(n.name, 0)
    ), armed_apart as (
      insert into orchestrator.timer (event_id, scheduled_at, due_at, lane, destination, priority, ordering, attempt, max_attempts, source, expires_at)
      select n.id, n.scheduled_at, greatest(v_now, n.scheduled_at + coalesce(orchestrator.spread_shift(n.id, coalesce(n.spread, d.spread)), '0 s'))
        , p.lane, hashtextextended(n.name, 0), coalesce(n.priority, 0), hashtextextended(n.ordering_key, 0), 0, n.max_retries + 1, hashtextextended(n.source, 0), n.expires_at
      from named n
      join place p on p.name = n.name
      left join orchestrator.lane l on l.lane = p.lane and p.lane > 63
      left join orchestrator.destination d on d.name = l.name
      where v_own_lanes
      order by n.id
    ), armed as (
      insert into orchestrator.timer (event_id, scheduled_at, due_at, lane, destination, priority, ordering, attempt, max_attempts, source, expires_at)
      select n.id, n.scheduled_at
        , greatest(v_now, case when n.spread is null then n.scheduled_at else n.scheduled_at + orchestrator.spread_shift(n.id, n.spread) end)
        , (h.hash & 63)::integer, h.hash, coalesce(n.priority, 0), hashtextextended(n.ordering_key, 0), 0, n.max_retries + 1, hashtextextended(n.source, 0), n.expires_at
      from named n
      cross join lateral (select hashtextextended(n.name, 0) as hash offset 0) h
      where not v_own_lanes
    )
    insert into orchestrator.statistic (minute, name, source, destination, source_label, destination_label, value)
    select date_trunc('minute', v_now), 'accepted', hashtextextended(n.source, 0), hashtextextended(n.name, 0), n.source, n.name, count(*)
    from named n
    group by n.source, n.name;
    insert into orchestrator.outbox (created_at, event_id, kind, key, value)
    select v_now, s.id, 'scheduled', orchestrator.record_key(s.ordering_key, s.external_job_id, s.id)
      , orchestrator.scheduled_message(s.id, s.source, s.external_job_id, s.scheduled_at, s.delivery_type, s.destination, v_now)
    from pg_temp.submission s
    where v_told;
  exception when unique_violation or check_violation or numeric_value_out_of_range then
    return query select * from orchestrator.keep_each(v_now, v_told, p_predecessor);
  end;
  perform orchestrator.tell_due(v_first);
  perform orchestrator.tell_outbox() where v_told;
end $$;
comment on function orchestrator.keep_staged(uuid) is
  'submit_staged(), with the predecessor of an event that is rescheduled; null: none';

create or replace function orchestrator.submit_staged()
returns table (n integer, id uuid, result text, field text, reason text)
language sql security definer set search_path = orchestrator, pg_temp as $$
  select * from orchestrator.keep_staged(null)
$$;
comment on function orchestrator.submit_staged() is
  'Turns the rows of pg_temp.submission into events and their timers. Answers only the rows that became no new event: result duplicate (kept already, under that id; nothing changes) or refused (with field and reason)';

-- The states are looked up in a statement of their own, which sees the duplicates that the first one waited for.
create or replace function orchestrator.submit_staged_with_status()
returns table (n integer, id uuid, result text, field text, reason text, status text)
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
#variable_conflict use_column
declare
  v_numbers integer[]; v_ids uuid[]; v_results text[]; v_fields text[]; v_reasons text[];
begin
  select array_agg(k.n), array_agg(k.id), array_agg(k.result), array_agg(k.field), array_agg(k.reason)
  into v_numbers, v_ids, v_results, v_fields, v_reasons
  from orchestrator.keep_staged(null) k;
  if v_numbers is not null then
    return query
    select a.n, a.id, a.result, a.field, a.reason, case when a.result = 'duplicate' then orchestrator.status_of(a.id) end
    from unnest(v_numbers, v_ids, v_results, v_fields, v_reasons) as a (n, id, result, field, reason);
  end if;
end $$;
comment on function orchestrator.submit_staged_with_status() is 'submit_staged(), with the state that each duplicate is in now';

-- The limit keeps the planner from joining all of timer to the view first.
create or replace function orchestrator.status_of(p_id uuid) returns text
language sql volatile security definer set search_path = orchestrator, pg_temp
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off as $$
  select s.status from orchestrator.event_status s
  where s.id = p_id and s.scheduled_at >= uuid_extract_timestamp(p_id) and s.scheduled_at < uuid_extract_timestamp(p_id) + interval '1 ms'
  limit 1
$$;
comment on function orchestrator.status_of(uuid) is 'The state that an event is in; null: there is none';

create or replace function orchestrator.try_submit_staged()
returns table (n integer, id uuid, result text, field text, reason text)
language sql security definer set search_path = orchestrator, pg_temp set lock_timeout = '250 ms' as $$
  select * from orchestrator.keep_staged(null)
$$;
comment on function orchestrator.try_submit_staged() is
  'submit_staged() for a batch of many clients: fails after 250 ms behind another session, as one with an uncommitted event of the same id, so that the rest can go without that one';

create or replace function orchestrator.try_submit_staged_with_status()
returns table (n integer, id uuid, result text, field text, reason text, status text)
language sql security definer set search_path = orchestrator, pg_temp set lock_timeout = '250 ms' as $$
  select * from orchestrator.submit_staged_with_status()
$$;
comment on function orchestrator.try_submit_staged_with_status() is 'try_submit_staged(), with the state that each duplicate is in now';

-- The lock keeps days from getting their partition meanwhile: whoever gives a day one waits until all that went to the horizon is there to see.
create or replace function orchestrator.keep_each(p_now timestamptz, p_told boolean, p_predecessor uuid)
returns table (n integer, id uuid, result text, field text, reason text)
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC'
set plan_cache_mode = force_generic_plan set enable_nestloop = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
  v_control orchestrator.control;
  v_days date[];
  v_first_at timestamptz;
  v_ids uuid[]; v_scheduled timestamptz[];
  v_waiting_from timestamptz;
  v_numbers integer[]; v_answered uuid[]; v_results text[]; v_fields text[]; v_reasons text[];
begin
  begin
    perform orchestrator.open_days(array(
      select distinct (s.scheduled_at at time zone 'UTC')::date from pg_temp.submission s where isfinite(s.scheduled_at)), p_now);
  exception when lock_not_available then null;  -- a session that stays in the horizon: they wait there for maintenance
  end;
  perform pg_advisory_xact_lock_shared(hashtext('orchestrator.horizon'));
  select * into v_control from orchestrator.control;
  v_days := orchestrator.partition_days();
  v_first_at := orchestrator.first_day_kept(p_now)::timestamptz;
  with checked as materialized (
    select s.*, k.field, c.reason, d.day is null as beyond, row_number() over (partition by s.id, k.field is null order by s.n) as copy
    from pg_temp.submission s
    left join unnest(v_days) as d (day) on d.day = (s.scheduled_at at time zone 'UTC')::date
    cross join lateral (select * from orchestrator.check_submission(
      s.scheduled_at, s.source, s.external_job_id, s.delivery_type, s.destination, s.headers, s.max_retries, s.retry_policy,
      s.ordering_key, s.priority, s.spread, s.expires_at, case when d.day is null then v_first_at end
      , p_now + make_interval(days => v_control.max_schedule_ahead_days), v_control.max_schedule_ahead_days) offset 0) c
    -- What is kept already was right when it came: it is a duplicate, whatever time, or a change of the settings, has made of it.
    cross join lateral (select case
      when c.field not in ('scheduled_at', 'retry_policy') then c.field
      when c.field is not null then case when not orchestrator.is_kept(s.id, s.scheduled_at) then c.field end end as field) k
  ), fresh as materialized (
    select * from checked c
    where c.field is null and c.copy = 1
      -- A count cannot be made into a join.
      and 0 = (select count(*) from orchestrator.horizon h where h.id = c.id and h.scheduled_at = c.scheduled_at)
  ), kept as (
    insert into orchestrator.event
      (id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, retry_policy, ordering_key, priority, spread, expires_at, predecessor, headers, payload)
    select c.id, c.scheduled_at, p_now, c.max_retries, c.source, c.external_job_id, c.delivery_type, c.destination, c.retry_policy, c.ordering_key, nullif(c.priority, 0), c.spread, c.expires_at, p_predecessor, c.headers, c.payload
    from fresh c
    where not c.beyond
    order by c.id
    on conflict do nothing
    returning id, scheduled_at
  ), waiting as (
    insert into orchestrator.horizon
      (id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, retry_policy, ordering_key, priority, spread, expires_at, predecessor, headers, payload)
    select c.id, c.scheduled_at, p_now, c.max_retries, c.source, c.external_job_id, c.delivery_type, c.destination, c.retry_policy, c.ordering_key, nullif(c.priority, 0), c.spread, c.expires_at, p_predecessor, c.headers, c.payload
    from fresh c
    where c.beyond
    order by c.id
    on conflict do nothing
    returning id, scheduled_at
  ), accepted as materialized (
    select f.* from fresh f join (select k.id from kept k union all select w.id from waiting w) a on a.id = f.id
  ), told as (
    insert into orchestrator.outbox (created_at, event_id, kind, key, value)
    select p_now, a.id, 'scheduled', orchestrator.record_key(a.ordering_key, a.external_job_id, a.id)
      , orchestrator.scheduled_message(a.id, a.source, a.external_job_id, a.scheduled_at, a.delivery_type, a.destination, p_now)
    from accepted a
    where p_told
  ), answer as materialized (
    select c.n, c.id, case when c.field is null then 'duplicate' else 'refused' end as result, c.field, c.reason, c.source, c.delivery_type, c.destination
    from checked c
    where c.field is not null or c.copy > 1 or c.id not in (select a.id from accepted a)
  ), counted as (
    insert into orchestrator.statistic (minute, name, source, destination, source_label, destination_label, value)
    select date_trunc('minute', p_now), r.name, hashtextextended(r.source, 0), hashtextextended(d.name, 0), r.source, d.name, count(*)
    from (select 'accepted' as name, a.source, a.delivery_type, a.destination from accepted a
          union all select r.result, r.source, r.delivery_type, r.destination from answer r where r.result = 'duplicate') r
    cross join lateral (select orchestrator.destination_name(r.delivery_type, r.destination) as name) d
    group by r.name, r.source, d.name
  )
  select (select array_agg(k.id) from kept k), (select array_agg(k.scheduled_at) from kept k), (select min(w.scheduled_at) from waiting w)
    , array_agg(a.n), array_agg(a.id), array_agg(a.result), array_agg(a.field), array_agg(a.reason)
  into v_ids, v_scheduled, v_waiting_from, v_numbers, v_answered, v_results, v_fields, v_reasons
  from answer a;
  perform orchestrator.arm_events(v_ids, v_scheduled) where v_ids is not null;
  -- A day that lost its partition by hand.
  update orchestrator.control c set horizon_at = v_waiting_from where c.horizon_at > v_waiting_from;
  return query select * from unnest(v_numbers, v_answered, v_results, v_fields, v_reasons);
end $$;
comment on function orchestrator.keep_each(timestamptz, boolean, uuid) is
  'keep_staged() row by row, for a batch with duplicates, with mistakes, or with events for the horizon';

create or replace function orchestrator.is_kept(p_id uuid, p_scheduled_at timestamptz) returns boolean
language sql volatile security definer set search_path = orchestrator, pg_temp set enable_seqscan = off as $$
  select exists (select from orchestrator.stored_event e where e.id = p_id and e.scheduled_at = p_scheduled_at)
$$;
comment on function orchestrator.is_kept(uuid, timestamptz) is 'Whether there is an event of this id';

create or replace function orchestrator.scheduled_message(
  p_id uuid, p_source text, p_external_job_id text, p_scheduled_at timestamptz, p_delivery_type text, p_destination text, p_created_at timestamptz)
returns bytea
language sql stable parallel safe
return convert_to(json_build_object('id', p_id, 'source', p_source, 'external_job_id', p_external_job_id, 'scheduled_at', p_scheduled_at
  , 'delivery_type', p_delivery_type, 'destination', p_destination, 'created_at', p_created_at)::text, 'UTF8');
comment on function orchestrator.scheduled_message(uuid, text, text, timestamptz, text, text, timestamptz) is 'What the scheduled topic is told of an event that was accepted';

-- Once a transaction, and again only for what is due earlier: a loop over schedule_event() tells one time, not each time.
create or replace function orchestrator.tell_due(p_due_at timestamptz) returns void
language plpgsql security definer set search_path = orchestrator, pg_temp as $$
declare
  v_now constant timestamptz := orchestrator.now();
begin
  if p_due_at < least(v_now + orchestrator.notify_horizon(), to_timestamp(nullif(current_setting('orchestrator.told', true), '')::double precision)) then
    perform set_config('orchestrator.told', extract(epoch from greatest(p_due_at, v_now))::text, true);
    perform pg_notify('orchestrator_due', extract(epoch from greatest(p_due_at, v_now))::text);
  end if;
end $$;
comment on function orchestrator.tell_due(timestamptz) is
  'Notifies the dispatchers of an event due within notify_horizon(), as Unix seconds. A hint: they poll all the same';

create or replace function orchestrator.notify_horizon() returns interval
language sql immutable parallel safe
return interval '10 s';
comment on function orchestrator.notify_horizon() is
  'Submissions due within this time wake the dispatchers; the longest poll interval a dispatcher may have';

create or replace function orchestrator.submit_events(p_events jsonb)
returns table (n integer, id uuid, result text, field text, reason text, status text)
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' set enable_nestloop = off as $$
#variable_conflict use_column
begin
  if jsonb_typeof(p_events) is distinct from 'array' then
    raise exception 'p_events: expected a JSON array of events, got %', coalesce(jsonb_typeof(p_events), 'null') using errcode = 'invalid_parameter_value';
  end if;
  perform orchestrator.open_staging();
  return query
  with item as materialized (
    select i.n::integer as n, i.event, e.*,
      case
        when jsonb_typeof(i.event) <> 'object' then 'event: expected an object'
        when u.unknown is not null then left(u.unknown, 80) || ': unknown field; expected source, external_job_id, scheduled_at, delivery_type, destination, payload, headers, max_retries, retry_policy, ordering_key, priority, spread_seconds, expires_at'
        when w.wrong is not null then w.wrong
        when e.scheduled_at is null then 'scheduled_at: required'
        when e.at is null then format('scheduled_at: expected an RFC 3339 time with a zone, such as 2030-01-31T08:00:00Z, got %s', orchestrator.shown(e.scheduled_at, 50))
        when i.event ->> 'expires_at' is not null and e.expires_at is null
          then format('expires_at: expected an RFC 3339 time with a zone, such as 2030-01-31T08:00:00Z, got %s', orchestrator.shown(i.event ->> 'expires_at', 50))
        when e.expires_at >= '2201-01-01 00:00:00+00'
          then format('expires_at: expected a time from 1970 to 2200, got %s', to_json(e.expires_at) #>> '{}')
        when e.source is null then 'source: required'
        when e.destination is null and e.delivery_type = 'HTTP' then 'destination: required'
        when e.delivery_type = 'HTTP' and e.destination ~ '^https?://[^/?#]*@'
          then 'destination: expected no user name or password in the URL: send credentials in headers'
        when e.delivery_type = 'KAFKA' and orchestrator.topic_fault(e.delivery_type, e.destination) is not null
          then 'destination: ' || orchestrator.topic_fault(e.delivery_type, e.destination)
        when e.delivery_type = 'HTTP' and e.destination ~ E'[^\\x01-\\x7f]'
          then 'destination: expected ASCII: write the host in its xn-- form and percent-encode the rest'
        when e.external_job_id in ('.', '..')
          then format('external_job_id: expected a text that can be a part of a path, got %s', e.external_job_id)
        when not i.event ? 'payload' then 'payload: required'
        when jsonb_typeof(i.event -> 'max_retries') not in ('number', 'null') or not pg_input_is_valid(e.max_retries, 'smallint')
          then format('max_retries: expected 0 to 100, got %s', case jsonb_typeof(i.event -> 'max_retries') when 'object' then 'an object' when 'array' then 'an array' else left((i.event -> 'max_retries')::text, 20) end)
        when jsonb_typeof(i.event -> 'priority') not in ('number', 'null') or not pg_input_is_valid(i.event ->> 'priority', 'smallint')
          then format('priority: expected -9 to 9, got %s', case jsonb_typeof(i.event -> 'priority') when 'object' then 'an object' when 'array' then 'an array' else left((i.event -> 'priority')::text, 20) end)
        when jsonb_typeof(i.event -> 'spread_seconds') not in ('number', 'null')
          or (case jsonb_typeof(i.event -> 'spread_seconds') when 'number' then (i.event ->> 'spread_seconds')::numeric end) not between 0.000001 and 604800
          then format('spread_seconds: expected more than 0 and at most 604800 seconds, got %s', case jsonb_typeof(i.event -> 'spread_seconds') when 'object' then 'an object' when 'array' then 'an array' else left((i.event -> 'spread_seconds')::text, 20) end)
        else 'headers: ' || orchestrator.check_headers(i.event -> 'headers')
      end as problem
    from jsonb_array_elements(p_events) with ordinality as i (event, n)
    cross join lateral (select i.event ->> 'source' as source, i.event ->> 'external_job_id' as external_job_id, i.event ->> 'scheduled_at' as scheduled_at
      , orchestrator.as_time(i.event ->> 'scheduled_at') as at, orchestrator.as_time(i.event ->> 'expires_at') as expires_at
      , coalesce(i.event ->> 'delivery_type', 'HTTP') as delivery_type, i.event ->> 'destination' as destination
      , i.event ->> 'max_retries' as max_retries, i.event ->> 'retry_policy' as retry_policy, i.event ->> 'ordering_key' as ordering_key) e
    cross join lateral (select min(k) as unknown from jsonb_object_keys(case jsonb_typeof(i.event) when 'object' then i.event else '{}' end) k
      where k <> all ('{source,external_job_id,scheduled_at,delivery_type,destination,payload,headers,max_retries,retry_policy,ordering_key,priority,spread_seconds,expires_at}')) u
    cross join lateral (select min(format('%s: expected a string, got %s', f.key, jsonb_typeof(f.value))) as wrong
      from jsonb_each(case jsonb_typeof(i.event) when 'object' then i.event else '{}' end) f
      where f.key = any ('{source,external_job_id,scheduled_at,delivery_type,destination,retry_policy,ordering_key,expires_at}') and jsonb_typeof(f.value) not in ('string', 'null')) w
  ), staged as (
    insert into pg_temp.submission
      (n, id, scheduled_at, source, external_job_id, delivery_type, destination, payload, headers, max_retries, retry_policy, ordering_key, priority, spread, expires_at)
    select i.n, coalesce(orchestrator.event_id(i.source, i.external_job_id, i.at, i.ordering_key), orchestrator.random_event_id(i.at, orchestrator.bucket_of_key(i.ordering_key)))
      , i.at, i.source, i.external_job_id, i.delivery_type, i.destination, (i.event -> 'payload')::json
      , nullif(i.event -> 'headers', 'null')::json, coalesce(i.max_retries::integer, 3), i.retry_policy, i.ordering_key
      , (i.event ->> 'priority')::smallint, make_interval(secs => (i.event ->> 'spread_seconds')::double precision), i.expires_at
    from item i
    where i.problem is null
  )
  select i.n, null::uuid, 'refused', split_part(i.problem, ': ', 1), substr(i.problem, strpos(i.problem, ': ') + 2), null::text
  from item i
  where i.problem is not null;
  return query
  with staged as materialized (select s.n, s.id from pg_temp.submission s),
  answer as materialized (select * from orchestrator.submit_staged_with_status())
  select s.n, case when a.result is distinct from 'refused' then coalesce(a.id, s.id) end, coalesce(a.result, 'accepted'), a.field, a.reason
    , case when a.result is null then 'scheduled' else a.status end
  from staged s left join answer a on a.n = s.n
  order by s.n;
end $$;
comment on function orchestrator.submit_events(jsonb) is
  'Submits an array of events (source, scheduled_at, destination, payload; optional external_job_id, delivery_type, headers, max_retries, retry_policy, ordering_key, priority, spread_seconds, expires_at; KAFKA events may leave out destination). One row for each: accepted, duplicate (it is kept already, and has that status now) or refused with field and reason; a refused one does not fail the others';

create or replace function orchestrator.schedule_event(
  p_destination text, p_payload jsonb, p_scheduled_at timestamptz default orchestrator.now(), p_source text default 'psql',
  p_external_job_id text default null, p_max_retries integer default 3, p_headers jsonb default null, p_retry_policy text default null,
  p_delivery_type text default 'HTTP', p_ordering_key text default null, p_priority integer default null, p_spread interval default null, p_expires_at timestamptz default null)
returns uuid
language plpgsql security definer set search_path = orchestrator, pg_temp set timezone = 'UTC' as $$
declare
  v_answer record;
begin
  select * into v_answer from orchestrator.submit_events(jsonb_build_array(jsonb_build_object(
    'destination', p_destination, 'payload', p_payload, 'scheduled_at', p_scheduled_at, 'source', p_source,
    'external_job_id', p_external_job_id, 'max_retries', p_max_retries, 'headers', p_headers, 'retry_policy', p_retry_policy,
    'delivery_type', p_delivery_type, 'ordering_key', p_ordering_key, 'priority', p_priority, 'spread_seconds', extract(epoch from p_spread), 'expires_at', p_expires_at)));
  if v_answer.result = 'refused' then
    raise exception '%: %', v_answer.field, v_answer.reason using errcode = 'invalid_parameter_value';
  end if;
  if v_answer.result = 'duplicate' then
    raise notice 'event % is kept already, and is %', v_answer.id, replace(v_answer.status, '_', ' ');
  end if;
  return v_answer.id;
end $$;
comment on function orchestrator.schedule_event(text, jsonb, timestamptz, text, text, integer, jsonb, text, text, text, integer, interval, timestamptz) is
  'Submits one event and returns its id; submitting the same (source, external_job_id, scheduled_at, ordering_key) again returns the same id, changes nothing, and says by a notice what state the event is in';
