-- Statistics: whatever happens appends its counts as deltas; they are folded once a minute, and read
-- from both tables. So nothing counts a big table.

create or replace function orchestrator.max_statistic_pairs() returns integer
language sql immutable parallel safe
return 1000;
comment on function orchestrator.max_statistic_pairs() is
  'Pairs of source and destination that statistic_folded tells apart in a minute or hour. '
  'Others are summed by source, under destination *';

create or replace function orchestrator.add_statistics(p_counts orchestrator.statistic_folded[]) returns void
language sql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_nestloop = off
as $$
  with given as (
    select g.*
      , exists (
          select from orchestrator.statistic_folded t
          where t.minute = g.minute and t.name = g.name
            and t.source = g.source and t.destination = g.destination) as known
    from unnest(p_counts) g
  ), ranked as (
    -- The greatest new pairs first.
    select g.*
      , row_number() over (
          partition by g.minute, g.name, g.known
          order by g.value desc, g.source, g.destination) as place
    from given g
  ), room as materialized (
    -- How many new pairs each minute and name may still have.
    select g.minute, g.name
      , orchestrator.max_statistic_pairs() - (
          select count(*) from orchestrator.statistic_folded t
          where t.minute = g.minute and t.name = g.name) as pairs
    from (select distinct g.minute, g.name from given g) g
  ), placed as (
    select r.*, r.known or r.place <= m.pairs as kept
    from ranked r
    join room m on m.minute = r.minute and m.name = r.name
  )
  insert into orchestrator.statistic_folded as t (minute, name, source, destination, value)
  select p.minute, p.name, p.source, case when p.kept then p.destination else '*' end, sum(p.value)
  from placed p
  group by 1, 2, 3, 4
  on conflict (minute, name, source, destination) do update set value = t.value + excluded.value
$$;
comment on function orchestrator.add_statistics(orchestrator.statistic_folded[]) is
  'Adds counts to statistic_folded. Once a minute and name has max_statistic_pairs() pairs, new pairs are counted '
  'under destination *';

create or replace function orchestrator.fold_statistics(p_now timestamptz) returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_seqscan = off
set enable_bitmapscan = off
set enable_nestloop = off
as $$
declare
  v_folded bigint;
  v_kept_from constant timestamptz := orchestrator.first_day_kept(p_now)::timestamptz;
  v_counts orchestrator.statistic_folded[];
begin
  with gone as (
    delete from orchestrator.statistic d
    where d.ctid = any (array(select d.ctid from orchestrator.statistic d limit 500000))
    returning d.*
  ), learnt as (
    insert into orchestrator.statistic_label (hash, label)
    select distinct l.hash, l.label
    from gone g
    cross join lateral (values
      (g.source, g.source_label), (g.destination, g.destination_label)) as l (hash, label)
    where l.label is not null
    on conflict do nothing
    returning hash, label
  ), known as materialized (
    select l.hash, l.label from orchestrator.statistic_label l
    union all
    select l.hash, l.label from learnt l
  ), named as (
    select g.minute, g.name, coalesce(s.label, '') as source, coalesce(d.label, '') as destination
      , sum(g.value)::bigint as value
    from gone g
    left join known s on s.hash = g.source
    left join known d on d.hash = g.destination
    group by 1, 2, 3, 4
  )
  select (select count(*) from gone)
    , array_agg(row(n.minute, n.name, n.source, n.destination, n.value)::orchestrator.statistic_folded)
  into v_folded, v_counts
  from named n;
  perform orchestrator.add_statistics(v_counts) where v_folded > 0;
  perform orchestrator.coarsen_statistics('hour', p_now - interval '2 days', p_now - interval '3 hours');
  perform orchestrator.coarsen_statistics('day', '-infinity', v_kept_from);
  return v_folded;
end $$;
comment on function orchestrator.fold_statistics(timestamptz) is
  'Folds up to 500,000 deltas into statistic_folded and coarsens what is old; returns how many deltas it folded';

create or replace function orchestrator.coarsen_statistics(
  p_unit text, p_from timestamptz, p_until timestamptz) returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_seqscan = off
set enable_bitmapscan = off
set enable_nestloop = off
as $$
declare
  v_counts orchestrator.statistic_folded[];
begin
  with gone as (
    delete from orchestrator.statistic_folded s
    where s.minute >= date_trunc(p_unit, p_from) and s.minute < date_trunc(p_unit, p_until)
      and (s.minute <> date_trunc(p_unit, s.minute)
        or p_unit = 'day' and (s.source <> '' or s.destination <> ''))
    returning s.*
  ), summed as (
    select date_trunc(p_unit, g.minute) as minute, g.name
      , case when p_unit = 'day' then '' else g.source end as source
      , case when p_unit = 'day' then '' else g.destination end as destination
      , sum(g.value)::bigint as value
    from gone g
    group by 1, 2, 3, 4
  )
  select array_agg(row(s.minute, s.name, s.source, s.destination, s.value)::orchestrator.statistic_folded)
  into v_counts
  from summed s;
  perform orchestrator.add_statistics(v_counts) where v_counts is not null;
end $$;
comment on function orchestrator.coarsen_statistics(text, timestamptz, timestamptz) is
  'Sums the counts from p_from to p_until by whole hours, or by whole days without source and destination';

create or replace function orchestrator.statistics_by(
  p_from timestamptz default null, p_until timestamptz default null, p_by text[] default '{}',
  p_source text default null, p_destination text default null)
returns table (minute timestamptz, name text, source text, destination text, value bigint)
language plpgsql stable security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_nestloop = off
as $$
#variable_conflict use_column
declare
  v_until constant timestamptz := coalesce(p_until, orchestrator.now());
  v_from constant timestamptz := coalesce(p_from, v_until - interval '1 hour');
  v_destination constant text :=
    case when p_destination is not null then orchestrator.as_destination(p_destination) end;
begin
  if not p_by <@ array['minute', 'source', 'destination'] then
    raise exception 'by: expected minute, source and destination, got %', array_to_string(p_by, ', ')
      using errcode = 'invalid_parameter_value';
  end if;
  if v_from >= v_until then
    raise exception 'from: expected a time before until, got %', to_json(p_from) #>> '{}'
      using errcode = 'invalid_parameter_value';
  end if;
  return query
  with known as materialized (
    -- The names of hashes, those too that were not folded yet.
    select l.hash, l.label from orchestrator.statistic_label l
    union
    select l.hash, l.label
    from orchestrator.statistic d
    cross join lateral (values
      (d.source, d.source_label), (d.destination, d.destination_label)) as l (hash, label)
    where l.label is not null
  )
  select g.minute, g.name, g.source, g.destination, sum(g.value)::bigint
  from (
    select case when 'minute' = any (p_by) then u.minute end as minute
      , u.name
      , case when 'source' = any (p_by) then u.source end as source
      , case when 'destination' = any (p_by) then u.destination end as destination
      , u.value
    from (
      select s.minute, s.name, s.source, s.destination, s.value from orchestrator.statistic_folded s
      union all
      select d.minute, d.name, coalesce(ls.label, ''), coalesce(ld.label, ''), d.value
      from orchestrator.statistic d
      left join known ls on ls.hash = d.source
      left join known ld on ld.hash = d.destination) u
    where u.minute >= date_trunc('minute', v_from) and u.minute < v_until
      and u.name <> 'retrying'
      and (p_source is null or u.source = p_source)
      and (v_destination is null or u.destination = v_destination)) g
  group by 1, 2, 3, 4
  having sum(g.value) <> 0
  order by 1, 2, 3, 4;
end $$;
comment on function orchestrator.statistics_by(timestamptz, timestamptz, text[], text, text) is
  'What happened from p_from (default: an hour earlier) until p_until (default: now), by any of minute, source and '
  'destination. Columns that p_by does not name are null';

create or replace function orchestrator.first_timers(p_until timestamptz)
returns table (due_at timestamptz, lease_until timestamptz, retrying boolean)
language sql volatile security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  select t.due_at, t.lease_until, t.retrying
  from orchestrator.queue_floors() q
  -- Below 0 a lane has its timers that wait for their ordering key.
  cross join lateral (values (q.lane), (-1 - q.lane)) as l (lane)
  cross join lateral (
    select t.due_at, t.lease_until, t.retrying
    from orchestrator.timer t
    where t.lane = l.lane and t.priority = q.priority and t.due_at >= q.floor and t.due_at <= p_until
    order by t.due_at
    limit 10000) t
$$;
comment on function orchestrator.first_timers(timestamptz) is
  'Timers due until then, the first 10,000 of each lane and priority. '
  'Timers that wait for their ordering key are among them';

create or replace function orchestrator.backlog() returns bigint
language sql volatile security definer
set search_path = orchestrator, pg_temp
as $$
  select count(*)
  from orchestrator.now() as n (now)
  cross join lateral orchestrator.first_timers(n.now) t
  where orchestrator.is_free(t.lease_until, n.now)
$$;
comment on function orchestrator.backlog() is
  'Events that are due and not claimed, for whatever reason, counted up to 10,000 a lane and priority';

-- Leased timers are due within the longest lookahead of any dispatcher, which is notify_within(), and
-- are the first that each lane has.
create or replace function orchestrator.statistics() returns json
language sql volatile security definer
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  with total as materialized (
    select n.name, coalesce(sum(c.value), 0)::bigint as value
    from unnest(array[
      'accepted', 'duplicate', 'rejected', 'delivered', 'retried', 'dead', 'cancelled', 'redriven', 'rescheduled'
      , 'expired', 'purged', 'retrying']) as n (name)
    left join (
      select s.name, s.value from orchestrator.statistic_folded s
      union all
      select d.name, d.value from orchestrator.statistic d) c using (name)
    group by n.name
  ), live as (
    -- What was accepted or redriven and has not ended.
    select sum(case t.name
          when 'accepted' then t.value
          when 'redriven' then t.value
          when 'delivered' then -t.value
          when 'dead' then -t.value
          when 'cancelled' then -t.value
          when 'rescheduled' then -t.value
          when 'expired' then -t.value
        end)::bigint as live
      , (sum(t.value) filter (where t.name = 'retrying'))::bigint as retrying
    from total t
  )
  select json_build_object(
    'live', l.live
  , 'scheduled', l.live - l.retrying - f.in_flight + f.retrying
  , 'retrying', l.retrying - f.retrying
  , 'in_flight', f.in_flight
  , 'backlog', f.backlog
  , 'oldest_due_at', f.oldest_due_at
  , 'next_due_at', coalesce(orchestrator.next_due_at(), case when h.paused_at is null then (
      select w.scheduled_at from orchestrator.horizon w where w.ended_at is null order by w.id limit 1) end)
  , 'dead_letters', (select count(*) from orchestrator.dead_letter)
  , 'totals', (select json_object_agg(t.name, t.value order by t.name) from total t where t.name <> 'retrying')
  , 'paused_at', h.paused_at
  , 'destinations_paused', h.destinations_paused
  , 'breakers_open', h.breakers_open
  , 'at', n.now)
  from orchestrator.now() as n (now)
  cross join live l
  cross join orchestrator.standstills() h
  cross join lateral (
    select count(*) filter (where t.lease_until > n.now) as in_flight
      , count(*) filter (where t.lease_until > n.now and t.retrying) as retrying
      , count(*) filter (where t.due_at <= n.now and orchestrator.is_free(t.lease_until, n.now)) as backlog
      , min(t.due_at) filter (
          where t.due_at <= n.now and orchestrator.is_free(t.lease_until, n.now)) as oldest_due_at
    from orchestrator.first_timers(n.now + orchestrator.notify_within()) t) f
$$;
comment on function orchestrator.statistics() is
  'Live events by state, the backlog, dead letters, pauses, open breakers, and totals since installation. '
  'The counts include what is not folded yet; the backlog is that of backlog()';
