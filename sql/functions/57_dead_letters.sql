-- Dead letters: list, redrive, purge; one, or all that match a filter, in the order of ids, which is
-- that of scheduled_at. The functions for many answer one row: how many dead letters they saw, how many
-- match, how many they redrove or purged (none in a dry run), ten examples, and p_after of the next
-- call; null: there are no more.

-- Looks only at events that have died, and so at one partition for each.
create or replace function orchestrator.redrive(p_ids uuid[], p_due_at timestamptz[]) returns uuid[]
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_nestloop = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_ids uuid[];
  v_scheduled timestamptz[];
  v_due timestamptz[];
  v_attempts integer[];
begin
  with gone as (
    -- All but those that will have expired, and those whose topic is not allowed.
    delete from orchestrator.dead_letter d
    where d.event_id = any (array(
      select r.event_id from unnest(p_ids, p_due_at) as r (event_id, due_at)
      cross join lateral (
        select from orchestrator.event e
        where e.id = r.event_id
          and orchestrator.in_millisecond_of(r.event_id, e.scheduled_at)
          and (e.expires_at is null or e.expires_at > r.due_at)
          and orchestrator.topic_fault(e.delivery_type, e.destination) is null
        limit 1) e))
    returning d.event_id, d.scheduled_at, d.attempts
  )
  select array_agg(g.event_id order by g.event_id)
    , array_agg(g.scheduled_at order by g.event_id)
    , array_agg(greatest(r.due_at, g.scheduled_at) order by g.event_id)
    , array_agg(g.attempts order by g.event_id)
  into v_ids, v_scheduled, v_due, v_attempts
  from gone g
  join unnest(p_ids, p_due_at) as r (event_id, due_at) on r.event_id = g.event_id;
  if v_ids is null then
    return '{}';
  end if;
  perform orchestrator.create_timers(v_ids, v_scheduled, v_due, v_attempts);
  insert into orchestrator.outcome (event_id, scheduled_at, finished_at, attempt, result)
  select r.event_id, r.scheduled_at, v_now, r.attempts, 'redriven'
  from unnest(v_ids, v_scheduled, v_attempts) as r (event_id, scheduled_at, attempts);
  insert into orchestrator.statistic (minute, name, source, destination, value)
  select date_trunc('minute', v_now), n.name, t.source, t.destination, count(*)
  from orchestrator.timer t cross join (values ('redriven'), ('retrying')) as n (name)
  where t.event_id = any (v_ids)
  group by 2, 3, 4;
  perform orchestrator.tell_due(min(d)) from unnest(v_due) d;
  return v_ids;
end $$;
comment on function orchestrator.redrive(uuid[], timestamptz[]) is
  'Makes dead events due at p_due_at, one for each id, with as many attempts as at first. '
  'Events that will have expired, or whose topic is not allowed, stay dead; returns the others';

create or replace function orchestrator.redrive_event(p_event_id uuid)
returns table (event_id uuid, result text, status text)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_id constant uuid := (select e.id from orchestrator.find_events(p_event_id, null) e);
begin
  if orchestrator.redrive(array[v_id], array[orchestrator.now()]) <> '{}' then
    return query select v_id, 'redriven', 'retrying';
  else
    return query
    select s.id
      , case
          when s.status <> 'dead' then 'not_dead'
          when orchestrator.topic_fault(s.delivery_type, s.destination) is not null then 'refused'
          when exists (select from orchestrator.dead_letter d where d.event_id = s.id) then 'expired'
          else 'purged'
        end
      , s.status
    from orchestrator.find_events(v_id, null) e
    cross join lateral (
      select s.id, s.status, s.delivery_type, s.destination from orchestrator.event_status s
      where s.id = e.id and s.scheduled_at = e.scheduled_at
      limit 1) s;
  end if;
end $$;
comment on function orchestrator.redrive_event(uuid) is
  'Makes a dead event due now, with as many attempts as at first; no row: there is no such event. '
  'Result: redriven, not_dead, expired, refused (its topic is not allowed) or purged';

create or replace function orchestrator.pass_dead_letter(p_event_id uuid) returns boolean
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_ordering bigint;
begin
  update orchestrator.dead_letter d
  set blocks = null
  where d.event_id = p_event_id and d.blocks is not null
  returning old.blocks into v_ordering;
  perform orchestrator.advance_ordering(array[v_ordering]) where v_ordering is not null;
  return v_ordering is not null;
end $$;
comment on function orchestrator.pass_dead_letter(uuid) is
  'Lets the later events of a dead one''s ordering key go on, where its retry policy (dead_blocks) holds them back; '
  'false: it held back none';

create or replace function orchestrator.find_dead_letters(
  p_source text, p_destination text, p_died_from timestamptz, p_died_until timestamptz, p_reason text,
  p_limit integer, p_after uuid, out seen bigint, out ids uuid[], out next_after uuid)
language plpgsql stable security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_name constant text := case when p_destination is not null then orchestrator.as_destination(p_destination) end;
begin
  if p_limit is null or p_limit not between 1 and 100000 then
    raise exception 'p_limit: expected 1 to 100000, got %', coalesce(p_limit::text, 'null')
      using errcode = 'invalid_parameter_value';
  end if;
  with dead as materialized (
    select d.* from orchestrator.dead_letter d
    where p_after is null or d.event_id > p_after
    order by d.event_id
    limit p_limit
  )
  select count(*)
    , case when count(*) >= p_limit then max(d.event_id::text)::uuid end
    , coalesce(array_agg(d.event_id order by d.event_id) filter (where
        (p_died_from is null or d.died_at >= p_died_from)
        and (p_died_until is null or d.died_at < p_died_until)
        and (p_reason is null
          or strpos(lower(d.reason collate "pg_c_utf8"), lower(p_reason collate "pg_c_utf8")) > 0)
        and (p_source is null or e.source = p_source)
        and (v_name is null
          or orchestrator.matches(orchestrator.destination_name(e.delivery_type, e.destination), v_name))), '{}')
  into seen, next_after, ids
  from dead d
  left join lateral (
    select e.* from orchestrator.event e
    where e.id = d.event_id and e.scheduled_at = d.scheduled_at
    limit 1) e on true;
end $$;
comment on function orchestrator.find_dead_letters(text, text, timestamptz, timestamptz, text, integer, uuid) is
  'Dead letters that match a filter, among the next p_limit after p_after. '
  'next_after: where the next call begins; null: there are no more';

create or replace function orchestrator.list_dead_letters(
  p_limit integer default 100, p_before_died_at timestamptz default null, p_before_id uuid default null,
  p_source text default null, p_destination text default null,
  p_died_from timestamptz default null, p_died_until timestamptz default null, p_reason text default null)
returns setof json
language plpgsql stable security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set plan_cache_mode = force_custom_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set enable_incremental_sort = off
as $$
declare
  v_name constant text := case when p_destination is not null then orchestrator.as_destination(p_destination) end;
begin
  return query
  select row_to_json(d)
  from orchestrator.dead_letters d
  where (p_before_id is null or (d.died_at, d.id) < (p_before_died_at, p_before_id))
    and (p_died_from is null or d.died_at >= p_died_from)
    and (p_died_until is null or d.died_at < p_died_until)
    and (p_reason is null
      or strpos(lower(d.reason collate "pg_c_utf8"), lower(p_reason collate "pg_c_utf8")) > 0)
    and (p_source is null or d.source = p_source)
    and (v_name is null or orchestrator.matches(d.destination_name, v_name))
  order by d.died_at desc, d.id desc
  limit p_limit;
end $$;
comment on function orchestrator.list_dead_letters(
  integer, timestamptz, uuid, text, text, timestamptz, timestamptz, text) is
  'Dead letters that match, newest first; the next page starts after the last (died_at, id) seen. '
  'p_reason is a part of the reason; upper and lower case are the same';

create or replace function orchestrator.redrive_dead_letters(
  p_source text default null, p_destination text default null,
  p_died_from timestamptz default null, p_died_until timestamptz default null, p_reason text default null,
  p_rate double precision default null, p_dry_run boolean default false,
  p_limit integer default 10000, p_after uuid default null, p_start_at timestamptz default null)
returns table (
  seen bigint, matched bigint, redriven bigint, examples uuid[], next_after uuid, next_start_at timestamptz)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_start_at constant timestamptz := greatest(p_start_at, orchestrator.now());
  v_found record;
  v_ids uuid[];
begin
  if p_rate <= 0 or p_rate > 1e6 or p_rate = 'NaN' then
    raise exception 'p_rate: expected more than 0 and at most 1000000 events a second, got %', p_rate
      using errcode = 'invalid_parameter_value';
  end if;
  select * into v_found
  from orchestrator.find_dead_letters(
    p_source, p_destination, p_died_from, p_died_until, p_reason, p_limit, p_after);
  seen := v_found.seen;
  matched := cardinality(v_found.ids);
  examples := v_found.ids[:10];
  next_after := v_found.next_after;
  next_start_at := v_start_at + make_interval(secs => coalesce(matched / p_rate, 0));
  redriven := 0;
  if not p_dry_run and matched > 0 then
    -- All but those that another session is redriving or purging at this moment.
    v_ids := array(
      select d.event_id from orchestrator.dead_letter d
      where d.event_id = any (v_found.ids)
      order by d.event_id
      for update skip locked);
    redriven := cardinality(orchestrator.redrive(v_ids
      , array(
          select v_start_at + make_interval(secs => coalesce((n - 1) / p_rate, 0))
          from generate_series(1, cardinality(v_ids)) n
          order by n)));
  end if;
  return next;
end $$;
comment on function orchestrator.redrive_dead_letters(
  text, text, timestamptz, timestamptz, text, double precision, boolean, integer, uuid, timestamptz) is
  'Makes matching dead events (without a filter: all) due again, p_rate a second from p_start_at on. '
  'Looks at p_limit after p_after; pass next_after and next_start_at to the next call';

create or replace function orchestrator.purge_dead_letters(
  p_source text default null, p_destination text default null,
  p_died_from timestamptz default null, p_died_until timestamptz default null, p_reason text default null,
  p_dry_run boolean default false, p_limit integer default 10000, p_after uuid default null)
returns table (seen bigint, matched bigint, purged bigint, examples uuid[], next_after uuid)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_found record;
  v_orderings bigint[];
begin
  if num_nonnulls(p_source, p_destination, p_died_from, p_died_until, p_reason) = 0 then
    raise exception 'purge_dead_letters: give p_source, p_destination, p_died_from, p_died_until or p_reason'
      using errcode = 'invalid_parameter_value';
  end if;
  select * into v_found
  from orchestrator.find_dead_letters(
    p_source, p_destination, p_died_from, p_died_until, p_reason, p_limit, p_after);
  seen := v_found.seen;
  matched := cardinality(v_found.ids);
  examples := v_found.ids[:10];
  next_after := v_found.next_after;
  purged := 0;
  if matched > 0 and not p_dry_run then
    with gone as (
      delete from orchestrator.dead_letter d
      where d.event_id = any (array(
        select d.event_id from orchestrator.dead_letter d
        where d.event_id = any (v_found.ids)
        order by d.event_id
        for update skip locked))
      returning d.blocks
    )
    select count(*), array_agg(distinct g.blocks) filter (where g.blocks is not null)
    into purged, v_orderings
    from gone g;
    -- Later events of their ordering keys need not wait any more.
    perform orchestrator.advance_ordering(v_orderings) where v_orderings is not null;
    insert into orchestrator.statistic (minute, name, value)
    select date_trunc('minute', orchestrator.now()), 'purged', purged where purged > 0;
  end if;
  return next;
end $$;
comment on function orchestrator.purge_dead_letters(
  text, text, timestamptz, timestamptz, text, boolean, integer, uuid) is
  'Deletes matching dead letters; their events stay dead and cannot be redriven. '
  'Looks at p_limit after p_after; next_after null: there are no more';
