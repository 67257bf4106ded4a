-- Claiming: due timers become leased ones. Called by dispatchers, or by hand:
-- select * from claim_due_events(10).

-- A claim takes five steps; most claims skip steps 2 and 3:
--   1 queues_with_work    which lanes have due timers, in random order
--   2 lock_limits         locks the lanes that have limits, and reads what each may give (31_limits.sql)
--   3 lock_behind_flood   locks timers of other destinations in a shared lane that one destination has filled
--   4 rounds              share the batch among the lanes: pick_due_timers, then lease_timers
--   5 book_slots          books the leases with the limits (31_limits.sql)
-- lease_due_timers() takes them. claim_due_events() and, for dispatchers, claim_for_dispatch() join the
-- events. Steps without settings of their own run under those of lease_due_timers(), their only caller.
-- A queue is a lane and one priority of it. Floors: see 74_lane_floors.sql.

create or replace function orchestrator.register_worker(p_name text) returns integer
language sql security definer
set search_path = orchestrator, pg_temp
as $$ insert into orchestrator.worker (name) values (left(p_name, 200)) returning worker $$;
comment on function orchestrator.register_worker(text) is
  'Makes a worker number for one process. No other process ever gets the same number';

-- Inlined.
create or replace function orchestrator.shared_queues(
  p_priorities smallint[], p_floors timestamptz[], p_until timestamptz, p_skip integer[])
returns table (lane integer, priority smallint, floor timestamptz, first_due timestamptz)
language sql stable as $$
  select l.lane, l.priority, l.floor, t.due_at
  from (
    select l.lane, unnest(p_priorities) as priority, p_floors[l.lane + 1] as floor
    from orchestrator.lane l
    where not orchestrator.is_dedicated(l.lane) and l.lane <> all (p_skip)) l
  cross join lateral (
    select t.due_at from orchestrator.timer t
    where t.lane = l.lane and t.priority = l.priority and t.due_at >= l.floor and t.due_at <= p_until
    order by t.due_at limit 1) t
$$;
comment on function orchestrator.shared_queues(smallint[], timestamptz[], timestamptz, integer[]) is
  'Shared lanes and their priorities with a due timer, leased or not, and when the first was due';

-- Inlined. With p_lanes null it goes round: on from p_after to the last lane, then from the first to p_after.
create or replace function orchestrator.dedicated_queues(
  p_priorities smallint[], p_use_floors boolean, p_now timestamptz, p_until timestamptz, p_skip integer[],
  p_lanes integer[], p_after integer, p_most integer)
returns table (
  lane integer, priority smallint, floor timestamptz, first_due timestamptz, limited boolean, delayed_until timestamptz)
language sql stable as $$
  select l.lane, l.priority, l.usable_floor, t.due_at
    , l.limited or l.breaker <> 'closed', greatest(l.resumed_at, l.closed_at)
  from (
    select l.*, unnest(p_priorities) as priority
      , case when p_use_floors then l.floor else '-infinity' end as usable_floor
    from (
      select l.* from orchestrator.lane l where l.lane = any (p_lanes)
      union all
      (select l.* from orchestrator.lane l where p_lanes is null and l.lane > p_after order by l.lane)
      union all
      (select l.* from orchestrator.lane l where p_lanes is null and l.lane between 64 and p_after order by l.lane)) l
    where orchestrator.lane_may_give(l, p_now) and l.lane <> all (p_skip)) l
  cross join lateral (
    select t.due_at from orchestrator.timer t
    where t.lane = l.lane and t.priority = l.priority and t.due_at >= l.usable_floor and t.due_at <= p_until
      and orchestrator.is_free(t.lease_until, p_now)
    order by t.due_at limit 1) t
  limit p_most
$$;
comment on function orchestrator.dedicated_queues(
  smallint[], boolean, timestamptz, timestamptz, integer[], integer[], integer, integer) is
  'Up to p_most dedicated lanes and their priorities with a due timer that is not leased, and when the first was '
  'due. limited: limits apply; delayed_until: when its last pause or open breaker ended';

create or replace function orchestrator.queues_with_work(
  p_control orchestrator.control, p_now timestamptz, p_until timestamptz, p_batch integer, p_skip integer[],
  p_max_parallel integer,
  out queues orchestrator.queue[], out lower orchestrator.queue[], out limited integer[], out flooded integer,
  out more boolean)
language plpgsql as $$
#variable_conflict use_column
declare
  c_few constant integer := 200;
  -- A thousand dedicated lanes may have work. Each claim serves some: many rows of few lanes cost far less
  -- than one row of each of many.
  v_most constant integer := greatest(20, p_batch / 8);
  v_after constant integer := coalesce(nullif(current_setting('orchestrator.last_own_lane', true), '')::integer, 63);
  v_salt constant bigint := (random() * 1e15)::bigint;
  v_floors constant timestamptz[] := orchestrator.floors(p_control, p_now);
  v_use_floors constant boolean := orchestrator.floors_valid(p_control, p_now);
  v_lanes integer[];
  v_last integer;
begin
  -- Where few timers are due in dedicated lanes, they say which lanes to visit. Else this claim goes on where
  -- the session's last one stopped.
  v_lanes := array(
    select t.lane from orchestrator.timer t
    where orchestrator.is_dedicated(t.lane)
      and t.due_at >= case when v_use_floors then p_control.own_floor else '-infinity' end and t.due_at <= p_until
    order by t.due_at limit c_few);
  if cardinality(v_lanes) = c_few then
    v_lanes := null;
  end if;
  -- Lanes come at random, the priorities of a lane together, the highest one first. A shared lane is behind
  -- when its first timer has been due for long. While most shared lanes are not, one destination fills it.
  select array_agg(row(q.lane, q.priority, q.floor, p_until, null, q.first_due)::orchestrator.queue
      order by q.place, q.priority desc)
    , array_agg(q.lane) filter (where q.limited or q.first_due < q.delayed_until)
    , case when count(*) filter (where q.behind) <= greatest(2, count(*) / 2)
        then any_value(q.lane) filter (where q.behind) end
    , count(*) filter (where orchestrator.is_dedicated(q.lane)) = v_most
    , coalesce(max(q.lane) filter (where q.lane between 64 and v_after)
      , max(q.lane) filter (where orchestrator.is_dedicated(q.lane)))
  into queues, limited, flooded, more, v_last
  from (
    select s.lane, s.priority, s.floor, s.first_due, hashint8extended(s.lane, v_salt) as place
      , s.first_due < p_now - interval '250 ms' as behind, false as limited, null::timestamptz as delayed_until
    from orchestrator.shared_queues(p_control.priorities, v_floors, p_until, p_skip) s
    union all
    select d.lane, d.priority, d.floor, d.first_due, hashint8extended(d.lane, v_salt)
      , false, d.limited or p_max_parallel is not null, d.delayed_until
    from orchestrator.dedicated_queues(
      p_control.priorities, v_use_floors, p_now, p_until, p_skip, v_lanes, v_after, v_most) d) q;
  -- A lane gives its highest priority first; the others wait in lower.
  if cardinality(p_control.priorities) > 1 then
    select array_agg(q.queue order by q.n) filter (where q.is_first), array_agg(q.queue) filter (where not q.is_first)
    into queues, lower
    from (
      select row(u.lane, u.priority, u.floor, u.until, u.cap, u.first_due)::orchestrator.queue as queue, u.n
        , row_number() over (partition by u.lane order by u.n) = 1 as is_first
      from unnest(queues) with ordinality as u (lane, priority, floor, until, cap, first_due, n)) q;
  end if;
  perform set_config('orchestrator.last_own_lane', v_last::text, false);
end $$;
comment on function orchestrator.queues_with_work(
  orchestrator.control, timestamptz, timestamptz, integer, integer[], integer) is
  'Step 1 of a claim: the queues with due timers, and the lower priorities of their lanes. Also: lanes to lock, a '
  'shared lane that one destination has filled, and whether more dedicated lanes may have work';

-- It serves priority 0, the default, alone: at another priority nobody is served beside a flood.
create or replace function orchestrator.lock_behind_flood(
  p_control orchestrator.control, p_lane integer, p_now timestamptz, p_until timestamptz, p_batch integer,
  p_paused bigint[], out ready tid[], out unchecked tid[])
language plpgsql as $$
declare
  v_floor constant timestamptz := (orchestrator.floors(p_control, p_now))[p_lane + 1];
begin
  select array_agg(t.at) filter (where not t.unchecked), array_agg(t.at) filter (where t.unchecked)
  into ready, unchecked
  from (
    select t.ctid as at, t.ordering is not null or p_control.rerouted_by is not null as unchecked
    from orchestrator.timer t
    where t.ctid = any (array(
        select y.at
        from (
          select t.destination from orchestrator.timer t
          where t.lane = p_lane and t.priority = 0 and t.due_at >= v_floor and t.due_at <= p_until
          order by t.due_at limit 1) front
        cross join (
          select t.ctid as at, t.destination from orchestrator.timer t
          where t.lane = p_lane and t.priority = 0 and t.due_at >= v_floor and t.due_at <= p_until
            and orchestrator.is_free(t.lease_until, p_now)
          order by t.due_at desc limit 8 + p_batch / 4) y
        where y.destination <> front.destination and (p_paused is null or y.destination <> all (p_paused))
        limit greatest(1, p_batch / 4)))
      and orchestrator.is_free(t.lease_until, p_now)
      -- expires_at null: it never expires.
      and coalesce(t.attempt, 0) < t.max_attempts and t.expires_at > p_now is not false
    for update skip locked) t;
end $$;
comment on function orchestrator.lock_behind_flood(
  orchestrator.control, integer, timestamptz, timestamptz, integer, bigint[]) is
  'Step 3 of a claim: locks the youngest due timers of a lane that are not of the destination at its front. '
  'Returns those to lease (ready), and those that reroute_or_park() must check before (unchecked)';

-- Inlined. What the division leaves over goes to the first queues; when the batch is smaller than their
-- number, the later ones get nothing.
create or replace function orchestrator.share_of(p_cap integer, p_place bigint, p_left integer, p_queues integer)
returns integer
language sql immutable parallel safe
return least(p_cap, p_left / p_queues + (p_place <= p_left % p_queues)::integer);
comment on function orchestrator.share_of(integer, bigint, integer, integer) is
  'How many timers a round asks of the queue at a place, when p_left are wanted of p_queues queues';

create or replace function orchestrator.next_queues(
  p_queues orchestrator.queue[], p_lower orchestrator.queue[], p_given bigint[], p_left integer)
returns orchestrator.queue[]
language sql stable as $$
  select coalesce(array_agg(row(q.lane, q.priority, q.floor, q.until, q.cap, null)::orchestrator.queue
      order by q.asked, not q.gave_all, q.n), '{}')
  from (
    select q.lane, q.floor, q.until, q.n, q.asked, q.gave_all, q.cap - q.given as cap
      , case when q.gave_all or not q.asked then q.priority
          else (select max(l.priority) from unnest(p_lower) l where l.lane = q.lane and l.priority < q.priority) end
          as priority
    from (
      select q.*, p_given[q.n] as given, q.n <= p_left as asked
        , p_given[q.n] = orchestrator.share_of(q.cap, q.n, p_left, cardinality(p_queues)) as gave_all
      from unnest(p_queues) with ordinality as q (lane, priority, floor, until, cap, first_due, n)) q) q
  -- cap null: no limit.
  where q.priority is not null and q.cap > 0 is not false
$$;
comment on function orchestrator.next_queues(orchestrator.queue[], orchestrator.queue[], bigint[], integer) is
  'The queues that the next round of a claim asks: those not asked yet, and those that gave all they were asked for. '
  'Of other lanes, it is the next priority';

create or replace function orchestrator.pick_due_timers(
  p_queues orchestrator.queue[], p_left integer, p_now timestamptz, p_rerouted boolean, p_paused bigint[],
  p_spread integer[], p_lock_numbers integer[],
  out ready tid[], out unchecked tid[], out lock_numbers integer[], out got integer, out given bigint[])
language plpgsql as $$
#variable_conflict use_column
declare
  v_ending tid[];  -- locked timers of events that end without another attempt
begin
  with picked as materialized (
    -- A row for each timer, and one without a timer for each queue that gave none.
    select q.n, t.at, t.ends, t.unchecked
    from unnest(p_queues) with ordinality as q (lane, priority, floor, until, cap, first_due, n)
    left join lateral (
      select t.ctid as at
        , coalesce(t.attempt, 0) >= t.max_attempts + orchestrator.max_lost_leases()
          or t.expires_at <= p_now is true as ends
        , t.ordering is not null or p_rerouted or t.lane = any (p_spread) is true as unchecked
      from orchestrator.timer t
      where t.lane = q.lane and t.priority = q.priority and t.due_at >= coalesce(q.first_due, q.floor)
        and t.due_at <= q.until
        and orchestrator.is_free(t.lease_until, p_now)
        and (p_paused is null or t.destination <> all (p_paused))
        and (p_lock_numbers is null or t.ordering is null
             or orchestrator.ordering_lock_number(t.ordering) <> all (p_lock_numbers))
      order by t.due_at
      limit orchestrator.share_of(q.cap, q.n, p_left, cardinality(p_queues))
      for update skip locked) t on true
  )
  select array_agg(p.at) filter (where not p.ends and not p.unchecked)
    , array_agg(p.at) filter (where not p.ends and p.unchecked)
    , array_agg(p.at) filter (where p.ends)
    , count(*) filter (where not p.ends)
    , (select array_agg(g.given order by g.n) from (select p.n, count(p.at) as given from picked p group by p.n) g)
  into ready, unchecked, v_ending, got, given
  from picked p;
  -- Events whose ordering key another session has locked do not end yet; no later round may meet them again.
  lock_numbers := p_lock_numbers;
  if v_ending is not null and orchestrator.end_without_attempt(v_ending) < cardinality(v_ending) then
    lock_numbers := lock_numbers || array(
      select orchestrator.ordering_lock_number(t.ordering) from orchestrator.timer t where t.ctid = any (v_ending));
  end if;
end $$;
comment on function orchestrator.pick_due_timers(
  orchestrator.queue[], integer, timestamptz, boolean, bigint[], integer[], integer[]) is
  'Step 4 of a claim: locks the share of each queue, and ends expired events. Returns timers ready to lease, those '
  'that reroute_or_park() must check before, and how many each queue gave';

create or replace function orchestrator.lease_timers(
  p_ready tid[], p_lease_until timestamptz, p_worker integer, p_bounded integer[])
returns orchestrator.leased[]
language plpgsql as $$
declare
  v_leased orchestrator.leased[];
  v_expired bigint;
begin
  with leased as (
    update orchestrator.timer t
    set lease_until = p_lease_until, worker = p_worker, attempt = coalesce(t.attempt, 0) + 1, busy = t.ordering
      , slot = case when t.lane = any (p_bounded) then t.lane end
    where t.ctid = any (p_ready)
    returning t.event_id, t.scheduled_at, t.due_at, t.attempt, t.lane, t.ctid as at, old.lease_until
  )
  -- Events that were overdue when they came are all due at that moment; their ids, which begin with
  -- scheduled_at, keep their order.
  select array_agg(row(l.event_id, l.scheduled_at, l.due_at, l.attempt, l.lane
      , l.due_at, p_lease_until, null, null, l.at)::orchestrator.leased)
    , count(l.lease_until)
  into v_leased, v_expired
  from (select * from leased order by due_at, event_id) l;
  if v_expired > 0 then
    v_expired := v_expired + coalesce(nullif(current_setting('orchestrator.leases_expired', true), '')::bigint, 0);
    perform set_config('orchestrator.leases_expired', v_expired::text, true);
  end if;
  return v_leased;
end $$;
comment on function orchestrator.lease_timers(tid[], timestamptz, integer, integer[]) is
  'Step 4 of a claim: leases locked timers to a worker. Leases of the lanes p_bounded take a slot of max_parallel';

-- Called at the end of a claim. Each claim in a row that other sessions locked out waits twice as long for
-- the next.
create or replace function orchestrator.set_claim_again(
  p_now timestamptz, p_limits_at timestamptz, p_at_once boolean, p_locked_out boolean) returns void
language plpgsql as $$
declare
  v_misses integer := nullif(current_setting('orchestrator.locked_out', true), '')::integer;
  v_again_at timestamptz;
begin
  v_misses := case when p_locked_out then least(7, coalesce(v_misses, 0) + 1) when v_misses > 0 then 0 end;
  v_again_at := least(p_limits_at
    , case when p_at_once then p_now end
    , case when p_locked_out then p_now + interval '10 ms' * power(2, v_misses) end
    , (select min(l.open_until) from orchestrator.lane l where l.breaker <> 'closed' and l.open_until > p_now));
  perform set_config('orchestrator.claim_again_at', coalesce(extract(epoch from v_again_at)::text, ''), false);
  if v_misses is not null then
    perform set_config('orchestrator.locked_out', v_misses::text, false);
  end if;
end $$;
comment on function orchestrator.set_claim_again(timestamptz, timestamptz, boolean, boolean) is
  'Says when to claim again: at once, soon after something was locked, or when a limit or breaker allows more';

create or replace function orchestrator.check_claim(p_batch integer, p_lease interval, p_lookahead interval)
returns void
language plpgsql immutable as $$
begin
  if p_batch is null or p_batch not between 1 and 10000 then
    raise exception 'p_batch: expected 1 to 10000, got %', p_batch using errcode = 'invalid_parameter_value';
  end if;
  if p_lease is null or p_lookahead is null or p_lease <= '0 s' or p_lookahead < '0 s' then
    raise exception 'p_lease, p_lookahead: expected a positive lease and a lookahead of 0 or more, got % and %'
      , p_lease, p_lookahead using errcode = 'invalid_parameter_value';
  end if;
end $$;
comment on function orchestrator.check_claim(integer, interval, interval) is
  'Refuses arguments of claim_due_events() that are out of range';

create or replace function orchestrator.note_pause(
  p_leased orchestrator.leased[], p_control orchestrator.control, p_now timestamptz)
returns orchestrator.leased[]
language sql stable as $$
  select array_agg(row(l.event_id, l.scheduled_at, l.due_at, l.attempt, l.lane, l.start_at, l.lease_until, l.options
    , coalesce(l.waited, case when l.due_at < p_control.resumed_at then orchestrator.wait_causes(
        l.due_at, p_now, p_control.last_paused_at, p_control.resumed_at, null, null, null) end)
    , l.at)::orchestrator.leased order by l.n)
  from unnest(p_leased) with ordinality
    as l (event_id, scheduled_at, due_at, attempt, lane, start_at, lease_until, options, waited, at, n)
$$;
comment on function orchestrator.note_pause(orchestrator.leased[], orchestrator.control, timestamptz) is
  'Step 5 of a claim: says of leases that were due before the last pause of everything ended that it delayed them';

-- p_skip: lanes to leave out. p_max_parallel: bounds dedicated lanes that have no max_parallel.
--
-- It waits for nobody but, for a moment, other claims and finishes of limited lanes: it locks those lanes in
-- order, then timers with skip locked. What it cannot lock it leaves out, and looks again, less and less
-- often. The attempt number grows with each lease, which is the fence against every earlier worker.
--
-- Plans are pinned: left alone, the planner hashes a scan of every partition of event for each claim
-- (18,000 events/s against 49,000 with nested loops on the same data), and reads timer by a bitmap, which
-- limit cannot stop early. Rows are changed by ctid = any (array): a tenth less work than a join with them,
-- and it leaves the planner no choice.
create or replace function orchestrator.lease_due_timers(
  p_batch integer, p_worker integer, p_lease interval, p_lookahead interval, p_skip integer[],
  p_max_parallel integer)
returns orchestrator.leased[]
language plpgsql
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_nestloop = on
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_until constant timestamptz := v_now + p_lookahead;
  v_lease_until constant timestamptz := v_until + p_lease;
  v_control orchestrator.control;
  v_paused bigint[];                  -- timer.destination of destinations that only a note pauses so far
  v_work record;                      -- what queues_with_work() returns
  v_queues orchestrator.queue[];      -- those the next round asks, in order
  v_limits orchestrator.lane_limit[]; -- of the lanes that it has locked; null: none with due timers has any
  v_bounded integer[];                -- lanes where a lease takes a slot of max_parallel
  v_spread integer[];                 -- lanes whose destination has a spread
  v_left integer := p_batch;          -- leases still wanted
  v_spare integer := 10 * p_batch;    -- how many moved and parked timers may still be made up for
  v_ready tid[];                      -- locked timers to lease
  v_unchecked tid[];                  -- locked timers that may be in a wrong lane, or have to wait
  v_picked record;                    -- what pick_due_timers() returns
  v_leased orchestrator.leased[];
  v_lock_numbers integer[];           -- of ordering keys that another session has locked
  v_moved boolean := false;           -- whether timers became due elsewhere
  v_locked_out boolean := false;      -- whether another session has locked a lane or an ordering key
  v_again_at timestamptz;             -- when a limit allows more
begin
  perform orchestrator.check_claim(p_batch, p_lease, p_lookahead);
  select * into v_control from orchestrator.newest_control() where not exists (select from orchestrator.control_note);
  if not found then  -- notes of changes that hold already: control is read with them
    perform orchestrator.fold_notes();
    select * into v_control from orchestrator.control_now();
    select array_remove(array_agg(n.destination), null), p_skip || array_remove(array_agg(n.lane), null)
    into v_paused, p_skip from orchestrator.noted_pauses() n;
  end if;
  if v_control.paused_at is not null then
    perform set_config('orchestrator.claim_again_at', '', false);
    return null;
  end if;

  -- Step 1: which lanes have work.
  v_work := orchestrator.queues_with_work(v_control, v_now, v_until, p_batch, p_skip, p_max_parallel);
  v_queues := v_work.queues;

  -- Step 2: what lanes with limits may give.
  if v_work.limited is not null then
    select l.* into v_queues, v_limits, v_bounded, v_spread, v_locked_out, v_again_at
    from orchestrator.lock_limits(v_queues, v_work.limited, v_now, v_until, p_max_parallel) l;
  end if;

  -- Step 3: whoever shares a lane with a flood is served beside it.
  if v_work.flooded is not null then
    select f.ready, f.unchecked into v_ready, v_unchecked
    from orchestrator.lock_behind_flood(v_control, v_work.flooded, v_now, v_until, p_batch, v_paused) f;
    v_left := v_left - coalesce(cardinality(v_ready), 0) - coalesce(cardinality(v_unchecked), 0);
  end if;

  -- Step 4: rounds. Each leases what the round before has locked (the first one: step 3), then splits what is
  -- left of the batch evenly among the queues that filled their share before.
  loop
    if v_unchecked is not null then
      -- Moved timers count from the next round on. Others are wanted for those locked elsewhere, moved
      -- or parked.
      select v_ready || c.ready, v_left + c.locked + m.made_up, v_spare - m.made_up, v_lock_numbers || c.lock_numbers
        , v_moved or c.changed, v_locked_out or c.locked > 0
      into v_ready, v_left, v_spare, v_lock_numbers, v_moved, v_locked_out
      from orchestrator.reroute_or_park(
        v_unchecked, v_control.rerouted_by is not null, p_max_parallel is not null, p_skip) c
      cross join lateral (
        select least(v_spare, cardinality(v_unchecked) - cardinality(c.ready) - c.locked) as made_up) m;
    end if;
    if cardinality(v_ready) > 0 then
      v_leased := v_leased || orchestrator.lease_timers(v_ready, v_lease_until, p_worker, v_bounded);
    end if;
    exit when v_left <= 0 or coalesce(cardinality(v_queues), 0) = 0;

    v_picked := orchestrator.pick_due_timers(
      v_queues, v_left, v_now, v_control.rerouted_by is not null, v_paused, v_spread, v_lock_numbers);
    v_ready := v_picked.ready;
    v_unchecked := v_picked.unchecked;
    v_lock_numbers := v_picked.lock_numbers;
    if v_picked.got < v_left or v_unchecked is not null then
      v_queues := orchestrator.next_queues(v_queues, v_work.lower, v_picked.given, v_left);
    end if;
    v_left := v_left - v_picked.got;
  end loop;

  -- Step 5: slots of rates, longer leases, what delayed the events, and when to claim again.
  if v_limits is not null then
    v_leased := orchestrator.book_slots(v_leased, v_limits, v_now, p_lease);
  end if;
  if v_control.resumed_at is not null
    and v_control.resumed_at > (select min(l.due_at) from unnest(v_leased) l)
  then
    v_leased := orchestrator.note_pause(v_leased, v_control, v_now);
  end if;
  perform orchestrator.set_claim_again(v_now, v_again_at, v_moved or v_work.more and v_left > 0, v_locked_out);
  return v_leased;
end $$;
comment on function orchestrator.lease_due_timers(integer, integer, interval, interval, integer[], integer) is
  'All steps of a claim but the last: leases due timers, and returns the leases in the order to deliver them';

-- The bounds on scheduled_at let the executor leave out all other partitions when it starts. The limit makes
-- it look up each event by its key: a join may read all events between the bounds for each lease.
create or replace function orchestrator.claim_due_events(
  p_batch integer, p_worker integer default 0, p_lease interval default '60 s', p_lookahead interval default '0 s',
  p_skip integer[] default '{}', p_max_parallel integer default null)
returns table (
  event_id uuid, attempt smallint, due_at timestamptz, lease_until timestamptz, scheduled_at timestamptz, source text,
  external_job_id text, delivery_type text, destination text, ordering_key text, headers json, payload json,
  start_at timestamptz, lane integer, options json, waited json, expires_at timestamptz, correlation_id text,
  traceparent text)
language plpgsql security definer rows 100
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
set enable_material = off
set jit = off as $$
#variable_conflict use_column
declare
  v_leased constant orchestrator.leased[] :=
    orchestrator.lease_due_timers(p_batch, p_worker, p_lease, p_lookahead, p_skip, p_max_parallel);
  v_first timestamptz;
  v_last timestamptz;
begin
  select min(l.scheduled_at), max(l.scheduled_at) into v_first, v_last from unnest(v_leased) l;
  return query
  select e.id, l.attempt, l.due_at, l.lease_until, e.scheduled_at
    , e.source, e.external_job_id, e.delivery_type, e.destination, e.ordering_key
    , e.headers, e.payload, l.start_at, l.lane, l.options, l.waited
    , e.expires_at, e.correlation_id, e.traceparent
  from unnest(v_leased) l
  cross join lateral (
    select e.* from orchestrator.event e
    where e.id = l.event_id and e.scheduled_at = l.scheduled_at
      and e.scheduled_at >= v_first and e.scheduled_at <= v_last
    limit 1) e;
end $$;
comment on function orchestrator.claim_due_events(integer, integer, interval, interval, integer[], integer) is
  'Leases up to p_batch events due within p_lookahead, fairly among lanes, as limits, breakers and pauses allow. '
  'Finish each with its attempt number; begin none before its start_at, nor from its expires_at on';

-- Each column costs every event of a claim, here and in the client. So times that most leases of a claim
-- share are told once, and what most events lack is null.
--
-- The pinned plan reads the events of a claim in one pass over the primary key, on whose pages they mostly
-- lie side by side, and joins them with the leases by a hash.
create or replace function orchestrator.claim_for_dispatch(
  p_batch integer, p_worker integer, p_lease interval, p_lookahead interval, p_skip integer[] default '{}',
  p_max_parallel integer default null)
returns table (
  event_id uuid, attempt smallint, due_at double precision, start_at double precision, lease_until double precision,
  scheduled_at timestamptz, delivery_type text, destination text, key text, headers json, payload json, lane integer,
  timer tid, options json, waited json, expires_at double precision, correlation_id text, traceparent text)
language plpgsql security definer rows 100
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_nestloop = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_leased constant orchestrator.leased[] :=
    orchestrator.lease_due_timers(p_batch, p_worker, p_lease, p_lookahead, p_skip, p_max_parallel);
  v_ids uuid[];
  v_first timestamptz;
  v_last timestamptz;
  v_lease_until timestamptz;
begin
  select array_agg(l.event_id), min(l.scheduled_at), max(l.scheduled_at), min(l.lease_until)
  into v_ids, v_first, v_last, v_lease_until
  from unnest(v_leased) l;
  return query
  select e.id, l.attempt, date_part('epoch', l.due_at)
    , case when l.start_at <> l.due_at then date_part('epoch', l.start_at) end
    , case when l.lease_until <> v_lease_until then date_part('epoch', l.lease_until) end
    , e.scheduled_at, e.delivery_type, e.destination, coalesce(e.ordering_key, e.external_job_id), e.headers, e.payload
    , l.lane, l.at, l.options, l.waited, date_part('epoch', e.expires_at), e.correlation_id, e.traceparent
  from orchestrator.event e
  join unnest(v_leased) with ordinality
      as l (event_id, scheduled_at, due_at, attempt, lane, start_at, lease_until, options, waited, at, n)
    on l.event_id = e.id and l.scheduled_at = e.scheduled_at
  where e.id = any (v_ids) and e.scheduled_at >= v_first and e.scheduled_at <= v_last
  order by l.n;
  event_id := null;
  attempt := nullif(current_setting('orchestrator.locked_out', true), '')::smallint;
  due_at := date_part('epoch', v_now);
  start_at := nullif(current_setting('orchestrator.claim_again_at', true), '')::double precision;
  lease_until := date_part('epoch', v_lease_until);
  lane := nullif(current_setting('orchestrator.leases_expired', true), '')::integer;
  if lane is not null then
    perform set_config('orchestrator.leases_expired', '', true);
  end if;
  return next;
end $$;
comment on function orchestrator.claim_for_dispatch(integer, integer, interval, interval, integer[], integer) is
  'claim_due_events() for dispatchers: times in Unix seconds; start_at only where it is not due_at, lease_until where '
  'it is not that of the claim. The last row is the claim: its time, when to claim again, and in lane how many leases '
  'had expired';

create or replace function orchestrator.next_due_at() returns timestamptz
language sql volatile security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  select min(t.due_at)
  from orchestrator.queue_floors() q
  join orchestrator.lane l on l.lane = q.lane and orchestrator.lane_may_give(l, orchestrator.now())
  cross join lateral (
    select t.due_at from orchestrator.timer t
    where t.lane = q.lane and t.priority = q.priority and t.due_at >= q.floor
      and orchestrator.is_free(t.lease_until, orchestrator.now())
    order by t.due_at limit 1) t
  where (select c.paused_at is null from orchestrator.control_now() c)
$$;
comment on function orchestrator.next_due_at() is
  'When the next event is due that is not leased, and that no pause or open breaker delays; null: none is waiting';
