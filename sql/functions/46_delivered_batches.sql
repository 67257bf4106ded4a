-- Delivered batches: outcomes of events that were delivered at their first attempt, without a remark, as most
-- are. A dispatcher sends them as they are kept, in arrays: finish_delivered(). Everything else goes through
-- finish_events(). The views outcomes and event_status show both alike.

-- Inlined. It leads to one partition, and in its index to the rows of the ten seconds before the id.
create or replace function orchestrator.batch_holds(
  p_id uuid, p_scheduled_at timestamptz, p_first_id uuid, p_last_id uuid, p_ids uuid[])
returns boolean
language sql immutable parallel safe
return p_scheduled_at >= date_bin('10 s', uuid_extract_timestamp(p_id), timestamptz '1970-01-01 00:00:00+00')
  and p_scheduled_at <= uuid_extract_timestamp(p_id)
  and p_first_id <= p_id and p_last_id >= p_id and p_id = any (p_ids);
comment on function orchestrator.batch_holds(uuid, timestamptz, uuid, uuid, uuid[]) is
  'Whether an event is one of those in a row of delivered_batch';

-- Inlined.
create or replace function orchestrator.batch_outcomes(p_batch orchestrator.delivered_batch)
returns table (
  event_id uuid, scheduled_at timestamptz, due_at timestamptz, started_at timestamptz, finished_at timestamptz,
  worker integer, attempt smallint, status_code smallint, result text, error text, response text,
  claimed_at timestamptz, waited json, successor uuid)
language sql stable parallel safe as $$
  select i.id, uuid_extract_timestamp(i.id) + coalesce((p_batch).scheduled_us[i.n], 0) * interval '1 us'
    , (p_batch).due_at + coalesce((p_batch).due_us[i.n], 0) * interval '1 us'
    , (p_batch).claimed_at + (p_batch).started_us[i.n] * interval '1 us'
    , (p_batch).claimed_at + (p_batch).finished_us[i.n] * interval '1 us'
    , (p_batch).worker, 1::smallint
    , case when (p_batch).status_codes is null then (p_batch).status_code else (p_batch).status_codes[i.n] end
    , 'delivered', null::text, null::text
    , (p_batch).claimed_at + coalesce((p_batch).claimed_us[i.n], 0) * interval '1 us', null::json, null::uuid
  from unnest((p_batch).ids) with ordinality as i (id, n)
$$;
comment on function orchestrator.batch_outcomes(orchestrator.delivered_batch) is
  'The outcomes in a row of delivered_batch, one a row, in the form of the table outcome';

-- Reads the batches of one stretch after the other, not those of each id: where a million ids lie in one
-- millisecond, each is between the first and the last id of a thousand batches.
create or replace function orchestrator.delivered_before(p_event_ids uuid[], p_worker integer) returns uuid[]
language sql stable security definer
set search_path = orchestrator, pg_temp
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off as $$
  with given as materialized (
    select distinct g.id
      , date_bin('10 s', uuid_extract_timestamp(g.id), timestamptz '1970-01-01 00:00:00+00') as stretch
    from unnest(p_event_ids) as g (id)
  ), stretches as materialized (
    select (array_agg(g.id order by g.id))[1] as first_id, (array_agg(g.id order by g.id desc))[1] as last_id
      , g.stretch
    from given g
    group by g.stretch
  )
  select array_agg(g.id)
  from stretches s
  cross join lateral (
    select b.ids from orchestrator.delivered_batch b
    where b.scheduled_at >= s.stretch and b.scheduled_at <= uuid_extract_timestamp(s.last_id)
      and b.first_id <= s.last_id and b.last_id >= s.first_id and b.worker = p_worker
    offset 0) b
  cross join lateral unnest(b.ids) as i (id)
  join given g on g.id = i.id
$$;
comment on function orchestrator.delivered_before(uuid[], integer) is
  'Those events that delivered_batch has as delivered by a worker; null: none';

create or replace function orchestrator.check_delivered(
  p_event_ids uuid[], p_tids tid[], p_batches integer[], p_due_at double precision[], p_started_us integer[]
, p_finished_us integer[])
returns void
language plpgsql immutable as $$
begin
  if array_position(p_event_ids, null) is not null or p_event_ids is distinct from array_sort(p_event_ids) then
    raise exception 'p_event_ids: expected ids in order' using errcode = 'invalid_parameter_value';
  end if;
  if (cardinality(p_tids), cardinality(p_started_us), cardinality(p_finished_us))
      is distinct from (cardinality(p_event_ids), cardinality(p_event_ids), cardinality(p_event_ids))
    or p_batches[1] is distinct from 1 or cardinality(p_due_at) is distinct from cardinality(p_batches)
  then
    raise exception 'p_tids, p_started_us, p_finished_us: expected an element for each of p_event_ids; '
      'p_batches, from 1 on, and p_due_at: one for each batch'
      using errcode = 'invalid_parameter_value';
  end if;
end $$;
comment on function orchestrator.check_delivered(
  uuid[], tid[], integer[], double precision[], integer[], integer[]) is
  'Refuses arguments of finish_delivered() that would be kept where nobody finds them';

-- A step of finish_delivered(), with its settings. The planner may only look up each timer at its place. So
-- it locks the timers in the order of the ids, as finish_events() does, whatever their places are.
create or replace function orchestrator.end_delivered(
  p_event_ids uuid[],
  p_tids tid[],
  p_now timestamptz,
  out ended integer[],
  out orderings bigint[],
  out lanes integer[],
  out of_lanes integer[])
language plpgsql as $$
begin
  with finished as (
    -- The fence is t.attempt = 1: nobody has claimed the timer since. A place may have another timer by now.
    delete from orchestrator.timer t
    using unnest(p_event_ids, p_tids) with ordinality as r (event_id, tid, n)
    where t.ctid = r.tid and t.event_id = r.event_id and t.attempt = 1 and t.lease_until is not null
      and t.retrying is null
    returning t.lane, t.ordering, t.source, t.destination, r.n::integer
  ), delivered_counts as (
    insert into orchestrator.statistic (minute, name, source, destination, value)
    select date_trunc('minute', p_now), 'delivered', f.source
      , case when f.source is not null then f.destination end, count(*)
    from finished f
    group by 3, 4
  )
  select array_agg(f.n)
    , array_agg(f.ordering) filter (where f.ordering is not null)
    , array_agg(f.lane) filter (where orchestrator.is_dedicated(f.lane))
    , array_agg(f.n) filter (where orchestrator.is_dedicated(f.lane))
  into ended, orderings, lanes, of_lanes
  from finished f;
end $$;
comment on function orchestrator.end_delivered(uuid[], tid[], timestamptz) is
  'Deletes the timers of delivered events, and counts them. Returns the positions of those that it ended, their '
  'ordering keys, and the dedicated lanes with positions';

-- A batch is a row of delivered_batch: its ids lie in one stretch of ten seconds, so that a lookup by id
-- knows where to look. A batch of one is smaller as a row of outcome. All are kept as rows when some are not
-- found, since positions no longer fit then, and when they are announced, as announce_finished() reads rows.
--
-- It is for a dispatcher, which sends its results in this form. Those that it answers go through
-- finish_events(), which tells what became of them: their timers moved, a repeated call, or a lost lease.
create or replace function orchestrator.finish_delivered(
  p_event_ids uuid[],
  p_tids tid[],  -- of the timers, as the claim gave them
  p_batches integer[],  -- position of the first event of each batch
  p_scheduled_us smallint[],
  p_due_at double precision[],  -- for each batch, in Unix seconds
  p_due_us integer[],
  p_claimed_at double precision,
  p_claimed_us integer[],
  p_started_us integer[],
  p_finished_us integer[],
  p_status_code integer,
  p_status_codes smallint[],
  p_worker integer)
returns uuid[]
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_indexscan = off
set enable_indexonlyscan = off
set enable_bitmapscan = off
set jit = off as $$
declare
  v_count constant integer := cardinality(p_event_ids);
  v_claimed_at constant timestamptz := to_timestamp(p_claimed_at);
  v_announced constant boolean := exists (select from orchestrator.outbox_kind where kind = 'timestamp');
  v_now timestamptz;
  v_done record;
  v_rows integer[];  -- positions of those that are kept as rows of outcome
begin
  if coalesce(v_count, 0) = 0 then
    return null;
  end if;
  perform orchestrator.check_delivered(p_event_ids, p_tids, p_batches, p_due_at, p_started_us, p_finished_us);
  -- As finish_events() does.
  lock table orchestrator.timer in row exclusive mode;
  v_now := orchestrator.now();
  v_done := orchestrator.end_delivered(p_event_ids, p_tids, v_now);

  -- Step 1: log them, in batches if all were found.
  if cardinality(v_done.ended) = v_count and not v_announced then
    insert into orchestrator.delivered_batch
      (scheduled_at, first_id, last_id, due_at, claimed_at, worker, status_code, ids, scheduled_us, due_us, claimed_us
      , started_us, finished_us, status_codes)
    select uuid_extract_timestamp(p_event_ids[b.first]), p_event_ids[b.first], p_event_ids[b.last]
      , to_timestamp(p_due_at[b.n]), v_claimed_at, p_worker, p_status_code, p_event_ids[b.first:b.last]
      , p_scheduled_us[b.first:b.last], p_due_us[b.first:b.last], p_claimed_us[b.first:b.last]
      , p_started_us[b.first:b.last], p_finished_us[b.first:b.last], p_status_codes[b.first:b.last]
    from (
      select s.n, s.first, coalesce(p_batches[s.n + 1] - 1, v_count) as last
      from unnest(p_batches) with ordinality as s (first, n)) b
    where b.last > b.first;
    v_rows := array(
      select s.first from unnest(p_batches) with ordinality as s (first, n)
      where s.first = coalesce(p_batches[s.n + 1] - 1, v_count));
  else
    v_rows := v_done.ended;
  end if;
  if v_rows <> '{}' then
    insert into orchestrator.outcome
      (event_id, scheduled_at, due_at, started_at, finished_at, worker, attempt, status_code, result, claimed_at)
    select p_event_ids[r.n]
      , uuid_extract_timestamp(p_event_ids[r.n]) + coalesce(p_scheduled_us[r.n], 0) * interval '1 us'
      , to_timestamp(p_due_at[width_bucket(r.n, p_batches)]) + coalesce(p_due_us[r.n], 0) * interval '1 us'
      , v_claimed_at + p_started_us[r.n] * interval '1 us', v_claimed_at + p_finished_us[r.n] * interval '1 us'
      , p_worker, 1, case when p_status_codes is null then p_status_code else p_status_codes[r.n] end, 'delivered'
      , v_claimed_at + coalesce(p_claimed_us[r.n], 0) * interval '1 us'
    from unnest(v_rows) as r (n);
  end if;

  -- Step 2: announce them, and let the next events of their ordering keys go.
  if v_announced and v_rows <> '{}' then
    perform orchestrator.announce_finished(
      array_agg(p_event_ids[r.n])
    , array_agg(uuid_extract_timestamp(p_event_ids[r.n]) + coalesce(p_scheduled_us[r.n], 0) * interval '1 us')
    , array_agg(p_claimed_at + coalesce(p_claimed_us[r.n], 0) / 1e6))
    from unnest(v_rows) as r (n);
  end if;
  if v_done.orderings is not null then
    perform orchestrator.advance_ordering(v_done.orderings);
  end if;

  -- Step 3: update the breakers.
  if v_done.lanes is not null then
    perform orchestrator.update_breakers(array_agg(row(r.lane, p_event_ids[r.n], true
      , case when p_status_codes is null then p_status_code else p_status_codes[r.n] end
      , p_claimed_at + p_started_us[r.n] / 1e6, p_claimed_at + p_finished_us[r.n] / 1e6)::orchestrator.lane_result))
    from unnest(v_done.lanes, v_done.of_lanes) as r (lane, n);
  end if;

  -- Step 4: say which it did not find.
  if cardinality(v_done.ended) = v_count then
    return null;
  end if;
  return array(
    select g.id from unnest(p_event_ids) as g (id)
    except
    select p_event_ids[f.n] from unnest(v_done.ended) as f (n));
end $$;
comment on function orchestrator.finish_delivered(
  uuid[], tid[], integer[], smallint[], double precision[], integer[], double precision, integer[], integer[], integer[]
, integer, smallint[], integer) is
  'finish_events() of events that were delivered at their first attempt, for dispatchers: results as delivered_batch '
  'keeps them. '
  'Returns the events that it did not find, whose results go through finish_events(); null: none';
