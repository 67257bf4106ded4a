-- Rerouting: timers that wait in a wrong lane, because a destination gained or lost one since they were submitted.
-- Claims move those they come across, run_maintenance() the rest.

-- Timers are in a wrong lane when their destination was given a lane, or lost one, after they were submitted. Claims move those they
-- come across; this moves the rest, so that claims need not look any more. Whoever was submitting when the lanes changed must have ended.
create or replace function orchestrator.reroute_remaining(p_limit integer default 50000) returns bigint
language plpgsql security definer set search_path = orchestrator, pg_temp
set enable_nestloop = off set enable_mergejoin = off as $$
declare
  v_rerouted_by xid8;
  v_known text[];
  v_ended boolean;
  v_at tid[];
  v_lanes integer[];
  v_moved bigint;
  v_writers text[];
begin
  -- What this may change of lanes, others see when it has committed: the next run settles it.
  if exists (select from orchestrator.control_note) then
    perform orchestrator.fold_notes();
    return 0;
  end if;
  select c.rerouted_by, c.rerouted_writers into v_rerouted_by, v_known from orchestrator.control c;
  if v_rerouted_by is null then
    return 0;
  end if;
  -- Read after the lanes were seen to have changed: who begins to write later sees that, too. Prepared transactions have no process.
  v_writers := array(
    select l.virtualtransaction from pg_locks l
    where l.relation = 'orchestrator.timer'::regclass and l.locktype = 'relation' and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') and l.pid is distinct from pg_backend_pid());
  v_ended := not coalesce(v_known, v_writers) && v_writers;
  with kind as materialized (
    select t.lane, t.destination, any_value(t.event_id) as event_id from orchestrator.timer t group by t.lane, t.destination
  ), wrong as materialized (
    select k.lane, k.destination, case when k.lane < 0 then -1 - r.lane else r.lane end as right_lane
    from kind k
    cross join lateral orchestrator.destination_of(k.event_id) d
    cross join lateral (select orchestrator.lane_for(d.name) as lane) r
    where k.lane <> case when k.lane < 0 then -1 - r.lane else r.lane end
  ), found as (
    select t.ctid as at, w.right_lane from orchestrator.timer t join wrong w on t.lane = w.lane and t.destination = w.destination
    where t.lease_until is null or t.lease_until <= orchestrator.now()
    limit p_limit for update of t skip locked
  )
  select array_agg(f.at), array_agg(f.right_lane), v_ended and not exists (select from wrong) into v_at, v_lanes, v_ended from found f;
  v_moved := orchestrator.move_timers(v_at, v_lanes);
  if not v_ended and orchestrator.fold_control() then
    update orchestrator.control c set rerouted_writers = v_writers where c.rerouted_by = v_rerouted_by and c.rerouted_writers is null;
  end if;
  -- Floors are used again from here on, and those of before the lanes changed may be too high.
  if v_ended and pg_try_advisory_xact_lock(hashtext('orchestrator.floors')) then
    begin
      perform from orchestrator.control for update;
      perform orchestrator.reset_floors();
      -- Nobody can put a timer into a lane that has had no name since before the oldest transaction began.
      delete from orchestrator.lane l
      where l.lane > 63 and l.name is null and not exists (select from orchestrator.timer t where t.lane in (l.lane, -1 - l.lane));
      update orchestrator.control c set rerouted_by = null where c.rerouted_by = v_rerouted_by;
    exception when lock_not_available then
      perform set_config('orchestrator.problem', 'timers were moved, but claims go on looking for others while another session has a lane or control', true);
    end;
  end if;
  return v_moved;
end $$;
comment on function orchestrator.reroute_remaining(integer) is 'Moves up to p_limit timers to the lanes where they belong; once there are none left, claims stop looking for them, and lanes of deleted destinations go. Returns how many it moved';

-- Apart from reroute_remaining(), which reads the whole table: rows are found by their places, whatever the size of the table.
create or replace function orchestrator.move_timers(p_at tid[], p_lanes integer[]) returns bigint
language sql security definer set search_path = orchestrator, pg_temp
set enable_nestloop = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
  with moved as (
    update orchestrator.timer t set lane = m.lane
    from unnest(p_at, p_lanes) as m (at, lane)
    where t.ctid = any (p_at) and t.ctid = m.at
    returning 1)
  select count(*) from moved
$$;
comment on function orchestrator.move_timers(tid[], integer[]) is 'Puts timers, by their places, into lanes. The caller has them locked; returns how many';

create or replace function orchestrator.forget_recovered_destinations() returns bigint
language sql security definer set search_path = orchestrator, pg_temp
set enable_seqscan = off set enable_bitmapscan = off as $$
  select count(*) from orchestrator.destination d join orchestrator.lane l on l.name = d.name cross join orchestrator.now() as n (now)
  where not d.configured
    and case when case l.breaker
        when 'closed' then greatest(d.changed_at, l.failed_at, l.closed_at) < n.now - interval '10 min'
        else l.open_until < n.now - interval '1 hour' and (select true from orchestrator.timer t where t.lane = l.lane limit 1) is null
      end and orchestrator.try_destination(d.name) then orchestrator.forget_destination(d.name) end
$$;
comment on function orchestrator.forget_recovered_destinations() is 'Gives up the lanes of destinations that were never configured and have not failed for ten minutes. Returns how many';

-- The caller has the rows locked. Never waits: keys whose lock another has are left for the next claim.
create or replace function orchestrator.reroute_or_park(p_at tid[], p_rerouted boolean, p_bounded boolean, p_skip integer[]
, out ready tid[], out changed boolean, out locked bigint, out buckets integer[])
language plpgsql security definer set search_path = orchestrator, pg_temp
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
  v_now constant timestamptz := orchestrator.now();
  v_patterns constant boolean := exists (select from orchestrator.lane l where l.name is not null and l.hash is null);
  v_ordered tid[];
  v_parked bigint[];
  v_moved bigint := 0;
begin
  ready := p_at;
  if p_rerouted then
    with placed as materialized (
      select t.ctid as at, t.lane, coalesce(own.lane
        , case when v_patterns then (
            select orchestrator.pattern_lane(orchestrator.destination_name(e.delivery_type, e.destination))
            from orchestrator.event e where e.id = t.event_id and e.scheduled_at = t.scheduled_at) end
        , (t.destination & 63)::integer) as right_lane
      from orchestrator.timer t left join lateral (select l.lane from orchestrator.lane l where l.hash = t.destination limit 1) own on true
      where t.ctid = any (p_at)
    ), moved as (
      update orchestrator.timer t
      set lane = (select p.right_lane from placed p where p.at = t.ctid)
      where t.ctid = any (array(select p.at from placed p where p.lane <> p.right_lane))
      returning t.ctid as at, t.lane
    ), free as (
      select m.at from moved m
      left join lateral (select l.* from orchestrator.lane l where l.lane = m.lane limit 1) l on true
      where m.lane < 64 or m.lane <> all (p_skip) and not l.limited and not p_bounded and l.breaker = 'closed' and l.paused_at is null
    )
    select array(select p.at from placed p where p.lane = p.right_lane) || array(select f.at from free f)
      , (select count(*) from moved) - (select count(*) from free)
    into ready, v_moved;
  end if;
  -- What was submitted before its destination was given a spread.
  with given as materialized (
    select t.ctid as at, t.* from orchestrator.timer t where t.ctid = any (ready)
  ), late as materialized (
    select t.at, t.scheduled_at + orchestrator.spread_shift(t.event_id, d.spread) as due_at
    from given t
    cross join lateral (
      select d.spread from orchestrator.lane l join orchestrator.destination d on d.name = l.name where l.lane = t.lane and d.spread is not null limit 1) d
    cross join lateral (select e.spread from orchestrator.event e where e.id = t.event_id and e.scheduled_at = t.scheduled_at limit 1) e
    where t.attempt = 0 and e.spread is null
      and t.due_at < t.scheduled_at + orchestrator.spread_shift(t.event_id, d.spread)
  ), put_off as (
    update orchestrator.timer t
    set due_at = (select l.due_at from late l where l.at = t.ctid)
    where t.ctid = any (array(select l.at from late l))
    returning 1
  )
  select array(select r from unnest(ready) r where r <> all (array(select l.at from late l))), v_moved + (select count(*) from put_off) into ready, v_moved;
  changed := v_moved > 0;
  -- Fenced off: where a stale statistic says that the index of ordering keys is empty, the planner would read all of it.
  with keyed as materialized (select t.ctid as at, t.ordering from orchestrator.timer t where t.ctid = any (ready)
  ), tried as materialized (
    select k.at, orchestrator.ordering_bucket(k.ordering) as bucket
      , pg_try_advisory_xact_lock(hashtext('orchestrator.ordering'), orchestrator.ordering_bucket(k.ordering)) as had
    from keyed k where k.ordering is not null
  )
  select array(select k.at from keyed k where k.ordering is null), array(select t.at from tried t where t.had)
    , (select count(*) from tried t where not t.had), array(select distinct t.bucket from tried t where not t.had)
  into ready, v_ordered, locked, buckets;
  if v_ordered <> '{}' then
    -- A new statement, and so a new snapshot: it sees what those did who had the locks before.
    with parked as (
      update orchestrator.timer t
      set lane = -1 - t.lane
      where t.ctid = any (v_ordered) and orchestrator.ordering_held(t.ordering, t.event_id, t.scheduled_at, v_now)
      returning old.ctid as at, t.ordering
    )
    select ready || array(select o from unnest(v_ordered) o where o <> all (array(select p.at from parked p))), array(select p.ordering from parked p)
    into ready, v_parked;
    if v_parked <> '{}' then
      perform orchestrator.advance_ordering(v_parked);
    end if;
  end if;
end $$;
comment on function orchestrator.reroute_or_park(tid[], boolean, boolean, integer[]) is
  'Of due timers that a claim has locked: moves those in a wrong lane (which it may lease all the same, unless that lane has limits or is to be skipped; p_bounded: all own lanes have limits), puts off those whose destination was spread since, and parks those that wait for their ordering key. Answers which may be leased, whether others became due elsewhere, and how many wait because another session has the lock of their ordering key, and which locks';
