-- Floors: the time from which on claims look for timers in a lane. While a transaction keeps an old snapshot,
-- vacuum removes nothing, and without floors each claim would walk past every timer of its lanes that has
-- ended since. Dispatchers raise them, about once a second.
--
-- control.floors has one for each shared lane, lane.floor is that of a dedicated one, and control.own_floor
-- one for all dedicated lanes together.

-- Nothing appears below a floor. Whoever makes a timer due now, or puts one off, locks the table first and
-- reads the clock then. So once those have ended that had it locked when the clock showed marked_at, all that
-- anybody can still write is due later. A timer moves between lanes only from a lane to the one below 0 that
-- stands for it, and back, which have one floor; and by rerouting, while floors are not used.
-- Old snapshots do not delay this: it waits for the writers of timer to end, whatever they read.
create or replace function orchestrator.raise_floors() returns integer
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_control orchestrator.control;
  v_now timestamptz;
  v_writers text[];
  v_floors timestamptz[];
  v_dedicated_floor timestamptz;
begin
  select * into v_control from orchestrator.newest_control();
  -- A snapshot from before the writers ended would not show what they wrote.
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    return 0;
  end if;
  if v_control.rerouted_by is not null
    or orchestrator.now() between v_control.floors_at and v_control.floors_at + interval '900 ms'
    or not pg_try_advisory_xact_lock(hashtext('orchestrator.floors')) then
    return 0;
  end if;
  if not orchestrator.fold_control() then
    return 0;
  end if;
  select * into v_control from orchestrator.newest_control();
  if v_control.rerouted_by is not null then
    return 0;
  end if;
  v_now := orchestrator.now();
  if v_now <= v_control.floors_at then
    perform orchestrator.reset_floors();
    return 0;
  end if;

  -- Who writes timers now. Those who did at marked_at must have ended.
  v_writers := array(
    select l.virtualtransaction from pg_locks l
    where l.relation = 'orchestrator.timer'::regclass and l.locktype = 'relation'
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'));
  if v_control.marked_writers && v_writers then
    return 0;
  end if;

  -- Once more, for priorities noted by those who have just ended.
  perform orchestrator.fold_control();
  v_control.priorities := (select c.priorities from orchestrator.newest_control() c);
  v_floors := v_control.floors;
  v_dedicated_floor := v_control.own_floor;
  if v_control.marked_at is not null then
    v_floors := array(
      select least(v_control.marked_at
        , orchestrator.first_due(f.n::integer - 1, f.floor, v_control.priorities)
        , orchestrator.first_due(-f.n::integer, f.floor, v_control.priorities))
      from unnest(v_control.floors) with ordinality as f (floor, n)
      order by f.n);
    -- A row of a lane is not written for a few seconds: each claim of a limited lane writes it anyway.
    update orchestrator.lane l
    set floor = f.floor
    from (
      select l.lane, least(v_control.marked_at
        , orchestrator.first_due(l.lane, l.floor, v_control.priorities)
        , orchestrator.first_due(-1 - l.lane, l.floor, v_control.priorities)) as floor
      from (
        select l.lane, l.floor from orchestrator.lane l
        where orchestrator.is_dedicated(l.lane) and l.floor < v_control.marked_at - interval '10 s'
        order by l.floor limit 100
        for update skip locked) l) f
    where l.lane = f.lane and f.floor > l.floor + interval '10 s';
    -- In one look: a timer that moves below 0 meanwhile is seen here or there.
    v_dedicated_floor := case when exists (select from orchestrator.timer t where t.lane < -64) then v_dedicated_floor
      else least(v_control.marked_at, (
        select t.due_at from orchestrator.timer t
        where orchestrator.is_dedicated(t.lane) and t.due_at >= v_control.own_floor
        order by t.due_at limit 1)) end;
  end if;
  update orchestrator.control
  set floors = v_floors
    , own_floor = v_dedicated_floor
    , floors_at = v_now
    , marked_at = v_now
    , marked_writers = v_writers;
  return (select count(*) from unnest(v_floors, v_control.floors) as f (floor, before) where f.floor > f.before);
end $$;
comment on function orchestrator.raise_floors() is
  'Raises floors to the first timer of each lane: at most once a second, one session at a time, without waiting. '
  'Returns how many shared lanes have a higher floor';

-- Its callers pin its plan.
create or replace function orchestrator.first_due(p_lane integer, p_floor timestamptz, p_priorities smallint[])
returns timestamptz
language sql stable
set search_path = orchestrator, pg_temp
as $$
  select min(t.due_at) from unnest(p_priorities) as p (priority)
  cross join lateral (
    select t.due_at from orchestrator.timer t
    where t.lane = p_lane and t.priority = p.priority and t.due_at >= p_floor
    order by t.due_at limit 1) t
$$;
comment on function orchestrator.first_due(integer, timestamptz, smallint[]) is
  'When the first timer of a lane is due, leased or not, from p_floor on; null: it has none';

create or replace function orchestrator.reset_floors() returns void
language sql security definer
set search_path = orchestrator, pg_temp
as $$
  update orchestrator.lane set floor = '-infinity' where floor > '-infinity';
  update orchestrator.control
  set floors = array_fill('-infinity'::timestamptz, array[64]), own_floor = '-infinity'
    , floors_at = orchestrator.now(), marked_at = null, marked_writers = null
$$;
comment on function orchestrator.reset_floors() is
  'Lets claims look at everything until floors are raised: after timers changed lanes, or the clock was set back. '
  'The caller has the advisory lock of raise_floors()';

-- Reads all that vacuum has not removed, so it takes no lock until it has found something.
create or replace function orchestrator.lower_floors() returns integer
language plpgsql security definer
set search_path = orchestrator, pg_temp
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_lower integer;
begin
  select count(*) into v_lower
  from orchestrator.newest_control() c
  cross join (
    select f.n::integer - 1 as lane, f.floor
    from orchestrator.newest_control() c cross join unnest(c.floors) with ordinality as f (floor, n)
    union all
    select l.lane, greatest(l.floor, c.own_floor) from orchestrator.lane l, orchestrator.newest_control() c
    where orchestrator.is_dedicated(l.lane)) f
  where f.floor > '-infinity' and orchestrator.first_due(f.lane, '-infinity', c.priorities) < f.floor;
  if v_lower > 0 then
    perform pg_advisory_xact_lock(hashtext('orchestrator.floors'));
    perform orchestrator.reset_floors();
  end if;
  return v_lower;
end $$;
comment on function orchestrator.lower_floors() is
  'Resets all floors when a lane has a timer below its own, which only changes by hand can cause. '
  'Returns how many lanes had one';

create or replace function orchestrator.floors_valid(p_control orchestrator.control, p_now timestamptz) returns boolean
language sql immutable parallel safe
return p_control.rerouted_by is null and p_control.floors_at <= p_now;
comment on function orchestrator.floors_valid(orchestrator.control, timestamptz) is
  'Whether claims may use the floors: not while timers move between lanes, nor after the clock was set back';

create or replace function orchestrator.floors(p_control orchestrator.control, p_now timestamptz) returns timestamptz[]
language sql immutable parallel safe
return case when orchestrator.floors_valid(p_control, p_now) then p_control.floors
  else array_fill('-infinity'::timestamptz, array[64]) end;
comment on function orchestrator.floors(orchestrator.control, timestamptz) is
  'The floors of shared lanes as claims may use them';

-- Not inlined, so that the floor is looked up in the index of the timers: as part of a query that reads the
-- clock, it would only be compared.
create or replace function orchestrator.queue_floors()
returns table (lane integer, priority smallint, floor timestamptz)
language sql volatile security definer
set search_path = orchestrator, pg_temp
as $$
  select l.lane, p.priority
    , case when f.valid then coalesce(f.floors[l.lane + 1], l.floor) else '-infinity' end
  from orchestrator.control_now() c
  cross join lateral (
    select orchestrator.floors(c, orchestrator.now()) as floors
      , orchestrator.floors_valid(c, orchestrator.now()) as valid) f
  cross join orchestrator.lane l
  cross join unnest(c.priorities) as p (priority)
$$;
comment on function orchestrator.queue_floors() is
  'Each lane and priority, and the floor of the lane as it may be used now: no timer of it is due before';
