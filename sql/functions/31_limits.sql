-- Limits: rates (GCRA), bounds on attempts under way, and one attempt at a time past an open breaker. A claim
-- locks the lanes that have any, reads what they allow, leases, and books what it took, in one transaction:
-- all claims together obey a limit. Attempts under way are counted from the timers, so no counter can go
-- wrong.
--
-- A lane's bound is how many attempts it may have under way: max_parallel, or the lower number that AIMD has
-- reached (lane.parallel_now). Its rate gives slots: the times at which one attempt each may start. What a
-- claim may take under both is allowed. It becomes the cap of the lane's queue.

create or replace function orchestrator.limited_ahead() returns interval
language sql immutable parallel safe
return interval '50 ms';
comment on function orchestrator.limited_ahead() is
  'How long before they are due events that take a slot are claimed. A slot taken earlier keeps another event waiting';

-- A claim books slots at most 10 s ahead (slots_until in lock_limits()), and the arrival time that it stores
-- is up to a burst of gaps later. One second is tolerance.
create or replace function orchestrator.plausible_next_slot(
  p_next_slot_at timestamptz, p_now timestamptz, p_gap interval, p_burst integer) returns timestamptz
language sql immutable parallel safe
return case when p_next_slot_at <= p_now + interval '11 s' + (p_burst + 1) * p_gap then p_next_slot_at end;
comment on function orchestrator.plausible_next_slot(timestamptz, timestamptz, interval, integer) is
  'lane.next_slot_at, if claims can have booked that far ahead. '
  'Null after the clock was set back: the rate starts afresh';

-- Locks in order of lane, and then reads in a new snapshot. A lane that an open transaction has gives
-- nothing. Another claim has it for milliseconds, and is waited for; after three claims of this session in a
-- row have waited in vain, the next ones do not wait.
--
-- One statement works out the limits:
--   bound   how many attempts each lane may have under way
--   free    how many of these are left; and the time span in which the claim may book slots of the rate
--   slots   how many slots of the rate that time span has
--   limits  what the lane allows: the least of these; and which of them it is
-- Its last select gives them to the queues of the claim, and finds when a lane will allow more.
create or replace function orchestrator.lock_limits(
  p_queues orchestrator.queue[], p_limited integer[], p_now timestamptz, p_until timestamptz, p_max_parallel integer,
  out queues orchestrator.queue[], out limits orchestrator.lane_limit[], out bounded integer[], out spread integer[],
  out locked_out boolean, out again_at timestamptz)
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = on
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_began constant timestamptz := clock_timestamp();
  v_patience constant text := current_setting('lock_timeout');
  v_locked integer[] := array(
    select l.lane from orchestrator.lane l where l.lane = any (p_limited) order by l.lane for update skip locked);
begin
  if not p_limited <@ v_locked
    and coalesce(current_setting('orchestrator.locked_out', true), '') in ('', '0', '1', '2') then
    begin
      perform set_config('lock_timeout', '50ms', true);
      perform from orchestrator.lane l
      where l.lane = any (p_limited) and l.lane <> all (v_locked)
      order by l.lane for update;
      v_locked := p_limited;
      perform set_config('lock_timeout', v_patience, true);
    exception when lock_not_available or query_canceled then
      perform orchestrator.pass_on_cancel(sqlstate, sqlerrm, v_began + '50 ms');
    end;
  end if;

  with bound as (
    -- gap: the time between two slots of the rate.
    -- under_way_from: no timer of the lane is due before, leased or not.
    select l.*, d.rate_per_second, d.burst, d.spread, orchestrator.lane_may_give(l, p_now) as may_give
      , case when orchestrator.floors_valid(c, p_now) then l.floor else '-infinity' end as under_way_from
      , case when l.name is not null
          then least(coalesce(d.max_parallel, p_max_parallel), floor(l.parallel_now))::integer end as bound
      , make_interval(secs => 1 / d.rate_per_second) as gap
    from orchestrator.control_now() c
    cross join orchestrator.lane l
    left join orchestrator.destination d on d.name = l.name
    where l.lane = any (v_locked)
  ), free as materialized (
    -- Slots are booked up to 10 s ahead; under a bound less, as each booking takes a place that others need.
    select b.*
      , least(p_until, p_now + case when b.bound is null then interval '10 s' else orchestrator.limited_ahead() end)
          as slots_until
      , case when b.bound is not null then greatest(0, b.bound - (
          select count(*) from orchestrator.timer t
          where t.slot = b.lane and t.due_at >= b.under_way_from and t.lease_until > p_now))::integer end
          as free
      , greatest(p_now, orchestrator.plausible_next_slot(b.next_slot_at, p_now, b.gap, b.burst)) - (b.burst - 1) * b.gap
          as first_slot_at
    from bound b
  ), slots as (
    -- 1e-6: seconds are floating point here; a slot that is due exactly at slots_until counts.
    select f.*
      , greatest(0, least(1000000, 1 + floor(
          (extract(epoch from f.slots_until - f.first_slot_at) + 1e-6) / extract(epoch from f.gap))))::integer as slots
    from free f
  ), limits as materialized (
    -- A lane whose breaker is not closed gives one event, as a try. Nulls do not limit.
    select s.lane, s.bound, s.spread, s.slots_until, s.first_slot_at + s.slots * s.gap as next_slot_at
      , case when s.bound is null and s.gap is null then p_until
          else least(p_until, p_now + orchestrator.limited_ahead()) end as until
      , case when s.may_give then least(case when s.breaker <> 'closed' then 1 end, s.free, s.slots) else 0 end
          as allowed
      , case when s.slots < coalesce(s.free, s.slots + 1) then 'rate' when s.free is not null then 'parallel' end
          as kind
    from slots s
  )
  -- again_at: when a rate has more to give, or when the next event of a bounded lane is due.
  select array_agg(row(q.lane, q.priority, q.floor, coalesce(l.until, q.until)
        , case when l.lane is not null then l.allowed when q.lane = any (p_limited) then 0 end
        , q.first_due)::orchestrator.queue
      order by q.n)
    , coalesce(array_agg(row(l.lane, l.allowed, l.kind, l.bound is not null)::orchestrator.lane_limit order by q.n)
        filter (where l.lane is not null), '{}')
    , array_agg(l.lane) filter (where l.bound is not null)
    , array_agg(l.lane) filter (where l.spread is not null)
    , count(l.lane) < (select count(distinct p) from unnest(p_limited) p)
    , min(least(
        case when l.kind = 'rate' then greatest(p_now, l.next_slot_at - (l.slots_until - p_now) / 2) end
      , case when l.until < p_until then (
          select t.due_at - orchestrator.limited_ahead()
          from orchestrator.control_now() c
          cross join unnest(c.priorities) as p (priority)
          cross join lateral (
            select t.due_at from orchestrator.timer t
            where t.lane = l.lane and t.priority = p.priority and t.due_at > l.until and t.due_at <= p_until
            order by t.due_at limit 1) t
          order by 1 limit 1) end))
  into queues, limits, bounded, spread, locked_out, again_at
  from unnest(p_queues) with ordinality as q (lane, priority, floor, until, cap, first_due, n)
  left join limits l on l.lane = q.lane;
end $$;
comment on function orchestrator.lock_limits(
  orchestrator.queue[], integer[], timestamptz, timestamptz, integer) is
  'Step 2 of a claim: locks limited lanes, and gives the queues the caps and ends that their limits set. '
  'Returns what each lane allows, and when it allows more; lanes that another session has locked get cap 0';

create or replace function orchestrator.needs_destination_row(p_destination orchestrator.destination) returns boolean
language sql immutable
return num_nonnulls(p_destination.rate_per_second, p_destination.max_parallel, p_destination.spread
  , p_destination.timeout, p_destination.signing_secret, p_destination.secret_headers) > 0;
comment on function orchestrator.needs_destination_row(orchestrator.destination) is
  'Whether claims must look at a destination''s row, not at its lane alone';

create or replace function orchestrator.lane_may_give(p_lane orchestrator.lane, p_now timestamptz) returns boolean
language sql immutable
-- opened_at or tried_at in the future: the clock was set back, so open_until means nothing.
return p_lane.paused_at is null
  and (p_lane.open_until <= p_now or coalesce(greatest(p_lane.opened_at, p_lane.tried_at) > p_now, false));
comment on function orchestrator.lane_may_give(orchestrator.lane, timestamptz) is
  'Whether claims may take from a lane: it is not paused, and its breaker lets at least a try through';

-- The rate is GCRA in closed form: the i-th theoretical arrival time (tat) is i·gap + max(next_slot_at, max
-- over j ≤ i of (earliest_j - (j-1)·gap)). gap is the time between two attempts, earliest_j when the j-th
-- attempt may start at the earliest, and lane.next_slot_at the tat of the last claim.
create or replace function orchestrator.book_slots(
  p_leased orchestrator.leased[], p_limits orchestrator.lane_limit[], p_now timestamptz, p_lease interval)
returns orchestrator.leased[]
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = on
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_leased orchestrator.leased[];
begin
  with option as materialized (
    -- What a dispatcher must know: rate and bound (true: a start and a result count at once), and what it
    -- sends along.
    select l.lane
      , json_strip_nulls(json_build_object(
          'rate', nullif(d.rate_per_second is not null, false), 'bound', nullif(k.bounded, false)
        , 'timeout_s', extract(epoch from d.timeout)
        , 'signing_secret', d.signing_secret, 'secret_headers', d.secret_headers)) as options
    from unnest(p_limits) k
    join orchestrator.lane l on l.lane = k.lane
    join orchestrator.destination d on d.name = l.name
    where k.bounded or num_nonnulls(d.rate_per_second, d.timeout, d.signing_secret, d.secret_headers) > 0
  ), leased as materialized (
    -- The leases of limited lanes, numbered within each lane (i).
    select c.n, c.event_id, c.due_at, c.lane, c.lease_until as leased_until, l.next_slot_at, l.held_by
      , l.last_paused_at, l.resumed_at, l.opened_at, l.closed_at, l.breaker, d.timeout, o.options
      , make_interval(secs => 1 / d.rate_per_second) as gap, d.burst, greatest(c.due_at, p_now) as earliest
      , row_number() over (partition by c.lane order by c.n) as i
    from unnest(p_leased) with ordinality
      as c (event_id, scheduled_at, due_at, attempt, lane, start_at, lease_until, options, waited, at, n)
    join orchestrator.lane l on l.lane = c.lane and l.lane in (select k.lane from unnest(p_limits) k)
    left join orchestrator.destination d on d.name = l.name
    left join option o on o.lane = c.lane
  ), arrival as (
    -- Their theoretical arrival times.
    select c.*
      , c.i * c.gap + greatest(
          orchestrator.plausible_next_slot(c.next_slot_at, p_now, c.gap, c.burst)
        , max(c.earliest - (c.i - 1) * c.gap) over (partition by c.lane order by c.i)) as tat
    from leased c
  ), slot as materialized (
    -- When each may start, and for how long it is then leased.
    select a.*, s.start_at
      , greatest(a.leased_until, s.start_at + greatest(p_lease, a.timeout + interval '5 s')) as lease_until
    from arrival a
    cross join lateral (
      select case when a.gap is null then a.due_at else greatest(a.earliest, a.tat - a.burst * a.gap) end as start_at) s
  ), booked as (
    -- The next slot of the rate; the limit that delays the lane; a try, when the breaker is not closed.
    update orchestrator.lane l
    set next_slot_at = coalesce(s.tat, l.next_slot_at)
      , held_by = case when coalesce(s.leases, 0) >= k.allowed then k.kind end
      , breaker = case when l.breaker <> 'closed' and s.leases > 0 then 'half_open' else l.breaker end
      , tried_at = case when l.breaker <> 'closed' and s.leases > 0 then p_now else l.tried_at end
      , open_until = case when l.breaker <> 'closed' and s.leases > 0 then s.lease_until else l.open_until end
    from unnest(p_limits) k
    left join (
      select s.lane, max(s.tat) as tat, max(s.lease_until) as lease_until, count(*) as leases
      from slot s group by s.lane) s on s.lane = k.lane
    where l.lane = k.lane
      and (s.leases > 0 and (s.tat is not null or l.breaker <> 'closed')
           or l.held_by is distinct from case when coalesce(s.leases, 0) >= k.allowed then k.kind end)
  ), prolonged as (
    update orchestrator.timer t
    set lease_until = s.lease_until
    from slot s
    where t.event_id = any (array(select s.event_id from slot s where s.lease_until > s.leased_until))
      and t.event_id = s.event_id
  ), why as (
    -- Why those start late that do.
    select s.n
      , orchestrator.wait_causes(s.due_at, greatest(s.start_at, p_now), s.last_paused_at, s.resumed_at
        , s.opened_at, case when s.closed_at >= s.opened_at then s.closed_at else p_now end
        , case when s.gap is not null and (s.start_at > p_now or s.held_by = 'rate') then 'rate' else s.held_by end)
          as waited
    from slot s
    where greatest(s.start_at, p_now) >= s.due_at + interval '1 ms'
      and (s.held_by is not null or s.start_at > p_now or s.resumed_at > s.due_at or s.closed_at > s.due_at
           or s.breaker <> 'closed')
  )
  -- A lease that was prolonged has moved.
  select array_agg(row(c.event_id, c.scheduled_at, c.due_at, c.attempt, c.lane, coalesce(s.start_at, c.start_at)
    , coalesce(s.lease_until, c.lease_until), s.options, w.waited
    , case when s.lease_until > s.leased_until is not true then c.at end)::orchestrator.leased order by c.n)
  into v_leased
  from unnest(p_leased) with ordinality
    as c (event_id, scheduled_at, due_at, attempt, lane, start_at, lease_until, options, waited, at, n)
  left join slot s using (n)
  left join why w using (n);
  return v_leased;
end $$;
comment on function orchestrator.book_slots(
  orchestrator.leased[], orchestrator.lane_limit[], timestamptz, interval) is
  'Step 5 of a claim: books leases with the limits of the lanes they came from. '
  'Returns all leases, with start_at, lease_until, options and waited of those that limits apply to';

create or replace function orchestrator.wait_causes(
  p_due_at timestamptz, p_begins_at timestamptz, p_paused_at timestamptz, p_resumed_at timestamptz,
  p_opened_at timestamptz, p_closed_at timestamptz, p_held_by text)
returns json
language sql immutable parallel safe as $$
  select case when pause + breaker + rest > 0 then json_strip_nulls(json_build_object(
      'rate', case when p_held_by = 'rate' then nullif(rest, 0) end
    , 'parallel', case when p_held_by = 'parallel' then nullif(rest, 0) end
    , 'breaker', nullif(breaker, 0), 'pause', nullif(pause, 0))) end
  from (
    select pause, breaker, case when p_held_by is null then 0 else greatest(0, total - pause - breaker) end as rest
    from (values (
      (extract(epoch from p_begins_at - p_due_at) * 1000)::integer
    , (p_paused_at is not null)::integer * greatest(0
        , (extract(epoch from least(p_begins_at, p_resumed_at) - greatest(p_due_at, p_paused_at)) * 1000)::integer)
    , (p_opened_at is not null)::integer * greatest(0
        , (extract(epoch from least(p_begins_at, p_closed_at) - greatest(p_due_at, p_opened_at)) * 1000)::integer)
    )) as t (total, pause, breaker)) parts
$$;
comment on function orchestrator.wait_causes(
  timestamptz, timestamptz, timestamptz, timestamptz, timestamptz, timestamptz, text) is
  'Milliseconds from due to begin, by cause: the last pause, the last opening of the breaker, and for the rest '
  'p_held_by, the limit. Null: there was no cause';
