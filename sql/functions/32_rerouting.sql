-- Rerouting: a timer waits in a wrong lane when its destination was given a lane, or lost one, after it was
-- submitted.
-- Claims move the timers that they meet, run_maintenance() moves the rest.

-- After the last timer is moved, claims need not look any more. Whoever was submitting when the lanes changed
-- must have ended by then.
create or replace function orchestrator.reroute_remaining(p_limit integer default 50000) returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_nestloop = off
set enable_mergejoin = off
as $$
declare
  v_rerouted_by xid8;
  v_known text[];
  v_ended boolean;
  v_at tid[];
  v_lanes integer[];
  v_moved bigint;
  v_writers text[];
begin
  -- Others see what this changes of lanes when it has committed: the next run moves the timers.
  if exists (select from orchestrator.control_note) then
    perform orchestrator.fold_notes();
    return 0;
  end if;
  select c.rerouted_by, c.rerouted_writers into v_rerouted_by, v_known from orchestrator.newest_control() c;
  if v_rerouted_by is null then
    return 0;
  end if;
  -- Read after this has seen that lanes changed: whoever begins to write later sees it, too. Virtual
  -- transactions are compared, not processes: prepared transactions have none.
  v_writers := array(
    select l.virtualtransaction from pg_locks l
    where l.relation = 'orchestrator.timer'::regclass and l.locktype = 'relation'
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
      and l.pid is distinct from pg_backend_pid());
  v_ended := not coalesce(v_known, v_writers) && v_writers;

  -- Which destinations have timers in which lanes.
  with kind as materialized (
    select t.lane, t.destination, any_value(t.event_id) as event_id
    from orchestrator.timer t group by t.lane, t.destination
  ), wrong as materialized (
    -- Those that belong elsewhere; a lane below 0 stands for -1 - lane.
    select k.lane, k.destination, case when k.lane < 0 then -1 - r.lane else r.lane end as right_lane
    from kind k
    cross join lateral orchestrator.destination_of(k.event_id) d
    cross join lateral (select orchestrator.lane_for(d.name) as lane) r
    where k.lane <> case when k.lane < 0 then -1 - r.lane else r.lane end
  ), found as (
    select t.ctid as at, w.right_lane
    from orchestrator.timer t join wrong w on t.lane = w.lane and t.destination = w.destination
    where orchestrator.is_free(t.lease_until, orchestrator.now())
    limit p_limit for update of t skip locked
  )
  select array_agg(f.at), array_agg(f.right_lane), v_ended and not exists (select from wrong)
  into v_at, v_lanes, v_ended from found f;
  v_moved := orchestrator.move_timers(v_at, v_lanes);

  if not v_ended and orchestrator.fold_control() then
    update orchestrator.control c set rerouted_writers = v_writers
    where c.rerouted_by = v_rerouted_by and c.rerouted_writers is null;
  end if;
  -- From here on claims use floors again. Floors from before the lanes changed may be too high.
  if v_ended and pg_try_advisory_xact_lock(hashtext('orchestrator.floors')) then
    begin
      perform from orchestrator.control for update;
      perform orchestrator.reset_floors();
      -- Nobody can put a timer into a lane that lost its name before the oldest open transaction began.
      delete from orchestrator.lane l
      where orchestrator.is_dedicated(l.lane) and l.name is null
        and not exists (select from orchestrator.timer t where t.lane in (l.lane, -1 - l.lane));
      update orchestrator.control c set rerouted_by = null where c.rerouted_by = v_rerouted_by;
    exception when lock_not_available then
      perform set_config('orchestrator.problem'
        , 'timers were moved, but claims go on looking for others while another session has a lane or control', true);
    end;
  end if;
  return v_moved;
end $$;
comment on function orchestrator.reroute_remaining(integer) is
  'Moves up to p_limit timers to the lanes where they belong, and returns how many. '
  'When none are left, claims stop looking for them, and lanes of deleted destinations are deleted';

-- A function of its own: reroute_remaining() reads the whole table, this finds rows by their places, whatever
-- its size.
create or replace function orchestrator.move_timers(p_at tid[], p_lanes integer[]) returns bigint
language sql security definer
set search_path = orchestrator, pg_temp
set enable_nestloop = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  with moved as (
    update orchestrator.timer t set lane = m.lane
    from unnest(p_at, p_lanes) as m (at, lane)
    where t.ctid = any (p_at) and t.ctid = m.at
    returning 1)
  select count(*) from moved
$$;
comment on function orchestrator.move_timers(tid[], integer[]) is
  'Puts timers, found by their places, into lanes; returns how many. The caller has them locked';

create or replace function orchestrator.forget_recovered_destinations() returns bigint
language sql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  select count(*)
  from orchestrator.destination d
  join orchestrator.lane l on l.name = d.name
  cross join orchestrator.now() as n (now)
  where not d.configured
    and case when
        case l.breaker
          when 'closed' then greatest(d.changed_at, l.failed_at, l.closed_at) < n.now - interval '10 min'
          else l.open_until < n.now - interval '1 hour'
            and (select true from orchestrator.timer t where t.lane = l.lane limit 1) is null end
        and orchestrator.try_destination(d.name)
      then orchestrator.forget_destination(d.name) end
$$;
comment on function orchestrator.forget_recovered_destinations() is
  'Takes their lanes from destinations that were never configured and have not failed for ten minutes. '
  'Returns how many';

-- The caller has the rows locked. Waits for nobody: keys that another session has locked are left to the next
-- claim.
create or replace function orchestrator.reroute_or_park(
  p_at tid[], p_rerouted boolean, p_bounded boolean, p_skip integer[],
  out ready tid[], out changed boolean, out locked bigint, out lock_numbers integer[])
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_patterns constant boolean := exists (select from orchestrator.lane l where l.name is not null and l.hash is null);
  v_ordered tid[];
  v_parked bigint[];
begin
  ready := p_at;
  if p_rerouted then
    -- The lane where each belongs: its destination's, or its pattern's, or the shared one.
    with placed as materialized (
      select t.ctid as at, t.lane
        , coalesce(dedicated.lane
          , case when v_patterns then (
              select orchestrator.pattern_lane(orchestrator.destination_name(e.delivery_type, e.destination))
              from orchestrator.event e where e.id = t.event_id and e.scheduled_at = t.scheduled_at) end
          , (t.destination & 63)::integer) as right_lane
      from orchestrator.timer t
      left join lateral (select l.lane from orchestrator.lane l where l.hash = t.destination limit 1) dedicated on true
      where t.ctid = any (p_at)
    ), moved as (
      update orchestrator.timer t
      set lane = p.right_lane
      from placed p
      where t.ctid = p.at and p.lane <> p.right_lane
      returning t.ctid as at, t.lane
    ), free as (
      -- Of those, the ones in lanes that give any number now.
      select m.at from moved m
      left join lateral (select l.* from orchestrator.lane l where l.lane = m.lane limit 1) l on true
      where not orchestrator.is_dedicated(m.lane)
        or m.lane <> all (p_skip) and not l.limited and not p_bounded and l.breaker = 'closed' and l.paused_at is null
    )
    select array(select p.at from placed p where p.lane = p.right_lane) || array(select f.at from free f) into ready;
  end if;

  -- Puts off what was submitted before its destination was given a spread.
  with given as materialized (
    select t.ctid as at, t.* from orchestrator.timer t where t.ctid = any (ready)
  ), early as materialized (
    select t.at, t.scheduled_at + orchestrator.spread_shift(t.event_id, d.spread) as due_at
    from given t
    cross join lateral (
      select d.spread from orchestrator.lane l join orchestrator.destination d on d.name = l.name
      where l.lane = t.lane and d.spread is not null limit 1) d
    cross join lateral (
      select e.spread from orchestrator.event e where e.id = t.event_id and e.scheduled_at = t.scheduled_at limit 1) e
    where coalesce(t.attempt, 0) = 0 and e.spread is null
      and t.due_at < t.scheduled_at + orchestrator.spread_shift(t.event_id, d.spread)
  ), put_off as (
    update orchestrator.timer t
    set due_at = e.due_at
    from early e
    where t.ctid = e.at
  )
  select array(select r from unnest(ready) r where r <> all (array(select e.at from early e))) into ready;

  -- Locks ordering keys. Materialized first: where a stale statistic says that the index of ordering keys is
  -- empty, the planner would read all of it.
  with keyed as materialized (
    select t.ctid as at, t.ordering from orchestrator.timer t where t.ctid = any (ready)
  ), tried as materialized (
    select k.at, b.lock_number, pg_try_advisory_xact_lock(hashtext('orchestrator.ordering'), b.lock_number) as is_ours
    from keyed k cross join lateral (select orchestrator.ordering_lock_number(k.ordering) as lock_number) b
    where k.ordering is not null
  )
  select array(select k.at from keyed k where k.ordering is null), array(select t.at from tried t where t.is_ours)
    , (select count(*) from tried t where not t.is_ours)
    , (select array_agg(distinct t.lock_number) from tried t where not t.is_ours)
  into ready, v_ordered, locked, lock_numbers;

  -- Parks those that wait for an earlier event of their key. A new statement, and so a new snapshot: it sees
  -- what those did who had the locks before.
  if v_ordered <> '{}' then
    with parked as (
      update orchestrator.timer t
      set lane = -1 - t.lane
      where t.ctid = any (v_ordered) and orchestrator.ordering_held(t.ordering, t.event_id, t.scheduled_at, v_now)
      returning old.ctid as at, t.ordering
    )
    select ready || array(select o from unnest(v_ordered) o where o <> all (array(select p.at from parked p)))
      , array(select p.ordering from parked p)
    into ready, v_parked;
    if v_parked <> '{}' then
      perform orchestrator.advance_ordering(v_parked);
    end if;
  end if;
  changed := cardinality(ready) + locked < cardinality(p_at);
end $$;
comment on function orchestrator.reroute_or_park(tid[], boolean, boolean, integer[]) is
  'Moves locked timers in a wrong lane, puts off those spread since, and parks those that wait for their ordering key. '
  'Returns which are ready to lease, whether others became due elsewhere, and the ordering keys that were locked';
