-- Claiming: due timers become leased ones. Called by dispatchers, or by hand: select * from orchestrator.claim_due_events(10).

create or replace function orchestrator.register_worker(p_name text) returns integer
language sql security definer set search_path = orchestrator, pg_temp
as $$ insert into orchestrator.worker (name) values (left(p_name, 200)) returning worker $$;
comment on function orchestrator.register_worker(text) is 'Makes a worker number for one process; never used again by another';

-- Locks limited lanes in order, then timers with skip locked, so it waits for nobody but, for a moment, other claims and finishes of
-- those lanes. Those that it cannot lock, and ordering keys that another session has, are left out, and looked at again ever more rarely.
-- Each round shares what is left of the batch equally among the lanes that gave all they were asked for in the round
-- before (nothing, where the batch is smaller than their number); a lane gives its higher priorities first. Attempt grows with
-- the lease, which fences every earlier holder.
-- Rows are changed by ctid = any (array): a tenth less work than a join with them, and it leaves the planner no choice of plan.
-- Plans are pinned: left alone, the planner hashes a scan of every partition of event for each claim (18,000 events/s against
-- 49,000 with nested loops on the same data), and reads timer by a bitmap, which limit cannot stop early.
-- Events that were overdue when they came are all due at that moment; their ids, which begin with scheduled_at, keep their order.
-- The bounds on scheduled_at let the executor leave out all other partitions when it starts, and the limit makes it look each event
-- up by its key: a join is free to read all events between the bounds, for each one that was leased.
create or replace function orchestrator.claim_due_events(
  p_batch integer, p_worker integer default 0, p_lease interval default '60 s', p_lookahead interval default '0 s',
  p_skip integer[] default '{}', p_max_parallel integer default null)
returns table (event_id uuid, attempt smallint, due_at timestamptz, lease_until timestamptz, scheduled_at timestamptz, source text
  , external_job_id text, delivery_type text, destination text, ordering_key text, headers json, payload json
  , start_at timestamptz, lane integer, options json, waited json, expires_at timestamptz
  , correlation_id text, traceparent text)
language plpgsql security definer set search_path = orchestrator, pg_temp rows 100
set plan_cache_mode = force_generic_plan set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off
set enable_bitmapscan = off set jit = off as $$
#variable_conflict use_column
declare
  v_now constant timestamptz := orchestrator.now();
  v_until constant timestamptz := v_now + p_lookahead;
  v_lease_until constant timestamptz := v_until + p_lease;
  v_salt constant bigint := (random() * 1e15)::bigint;
  v_own_at_most constant integer := greatest(20, p_batch / 8);
  c_few constant integer := 200;
  v_last constant integer := coalesce(nullif(current_setting('orchestrator.last_own_lane', true), '')::integer, 63);
  v_own integer[];
  v_few boolean;
  v_stopped_at integer;
  v_more boolean;
  v_control orchestrator.control;
  v_paused bigint[] := '{}'; v_buckets integer[] := '{}'; v_left_out boolean := false; v_locked_out boolean := false;
  v_misses integer := nullif(current_setting('orchestrator.locked_out', true), '')::integer;
  v_wanted integer[];
  v_floors timestamptz[];
  v_floors_hold boolean;
  v_own_floor timestamptz;
  v_again_at timestamptz;
  v_lanes integer[]; v_priorities smallint[]; v_lane_floors timestamptz[]; v_caps integer[]; v_untils timestamptz[];
  v_queues integer[];
  v_full integer[]; v_asked integer[]; v_given bigint[];
  v_limited integer[]; v_allowed integer[]; v_kinds text[]; v_bounded integer[]; v_spread integer[]; v_deep integer[];
  v_left integer := p_batch;
  v_at tid[] := '{}'; v_odd_at tid[] := '{}'; v_lost_at tid[]; v_changed boolean := false;
  v_got bigint;
  v_ids uuid[]; v_all_ids uuid[] := '{}';
  v_scheduled timestamptz[]; v_all_scheduled timestamptz[] := '{}'; v_first timestamptz; v_last_scheduled timestamptz;
  v_due timestamptz[]; v_all_due timestamptz[] := '{}';
  v_attempts smallint[]; v_all_attempts smallint[] := '{}';
  v_from integer[]; v_all_from integer[] := '{}';
  v_start timestamptz[]; v_lease timestamptz[]; v_options json[]; v_waited json[];
begin
  if p_batch is null or p_batch not between 1 and 10000 then
    raise exception 'p_batch: expected 1 to 10000, got %', p_batch using errcode = 'invalid_parameter_value';
  end if;
  if p_lease is null or p_lookahead is null or p_lease <= '0 s' or p_lookahead < '0 s' then
    raise exception 'p_lease, p_lookahead: expected a positive lease and a lookahead of 0 or more, got % and %', p_lease, p_lookahead using errcode = 'invalid_parameter_value';
  end if;
  select * into v_control from orchestrator.control where not exists (select from orchestrator.control_note);
  if not found then
    perform orchestrator.fold_notes();
    select * into v_control from orchestrator.control_now();
    select coalesce(array_agg(n.destination) filter (where n.destination is not null), '{}'), p_skip || array_agg(n.lane) filter (where n.lane is not null)
    into v_paused, p_skip from orchestrator.noted_pauses() n;
    v_left_out := v_paused <> '{}';
  end if;
  if v_control.paused_at is not null then
    perform set_config('orchestrator.claim_again_at', '', false);
    return;
  end if;

  v_floors := orchestrator.floors(v_control, v_now);
  v_floors_hold := orchestrator.floors_hold(v_control, v_now);
  v_own_floor := case when v_floors_hold then v_control.own_floor else '-infinity' end;
  -- Where little is due in own lanes, that says which to look at; else this claim looks on from where the session's last one stopped.
  v_own := array(select t.lane from orchestrator.timer t where t.lane > 63 and t.due_at >= v_own_floor and t.due_at <= v_until order by t.due_at limit c_few);
  v_few := cardinality(v_own) < c_few;
  -- A queue is a lane and a priority. Lanes come at random, the queues of a lane together, the highest priority first.
  -- Of the own lanes that have work, which may be a thousand, each claim serves some: one row from each of many costs far more than many from each of some.
  select array_agg(q.lane order by q.place, q.priority desc), array_agg(q.priority order by q.place, q.priority desc), array_agg(q.floor order by q.place, q.priority desc)
    , array_agg(q.lane) filter (where q.limited or q.first_due < q.held_until)
    , array_agg(q.lane) filter (where q.lane < 64 and q.first_due < v_now - interval '250 ms'), count(*) filter (where q.lane > 63) = v_own_at_most
    , coalesce(max(q.lane) filter (where q.lane between 64 and v_last), max(q.lane) filter (where q.lane > 63))
  into v_lanes, v_priorities, v_lane_floors, v_limited, v_deep, v_more, v_stopped_at
  from (
    select l.lane, l.priority, l.place, false as limited, null::timestamptz as held_until, l.floor, t.due_at as first_due
    from (select l.lane, unnest(v_control.priorities) as priority, hashint8extended(l.lane, v_salt) as place, v_floors[l.lane + 1] as floor
          from orchestrator.lane l
          where l.lane < 64 and l.lane <> all (p_skip)) l
    cross join lateral (
      select t.due_at from orchestrator.timer t where t.lane = l.lane and t.priority = l.priority and t.due_at >= l.floor and t.due_at <= v_until order by t.due_at limit 1) t
    union all
    select own.lane, own.priority, hashint8extended(own.lane, v_salt)
      , own.limited or own.breaker <> 'closed' or p_max_parallel is not null, greatest(own.resumed_at, own.closed_at), own.usable_floor, own.due_at
    from (
      select l.*, t.due_at
      from (
        select l.*, unnest(v_control.priorities) as priority, case when v_floors_hold then l.floor else '-infinity' end as usable_floor
        from (
          select l.* from orchestrator.lane l where v_few and l.lane = any (v_own)
          union all
          (select l.* from orchestrator.lane l where not v_few and l.lane > v_last order by l.lane)
          union all
          (select l.* from orchestrator.lane l where not v_few and l.lane between 64 and v_last order by l.lane)) l
        where orchestrator.lane_open(l, v_now) and l.lane <> all (p_skip)) l
      cross join lateral (
        select t.due_at from orchestrator.timer t
        where t.lane = l.lane and t.priority = l.priority and t.due_at >= l.usable_floor and t.due_at <= v_until and (t.lease_until is null or t.lease_until <= v_now)
        order by t.due_at limit 1) t
      limit v_own_at_most) own) q;
  v_queues := array(select n from generate_subscripts(v_lanes, 1) n where v_lanes[n - 1] is distinct from v_lanes[n]);
  if v_limited is not null then
    v_wanted := v_limited;
    select l.caps, l.untils, l.lanes, l.allowed, l.kinds, l.bounded, l.spread, l.again_at
    into v_caps, v_untils, v_limited, v_allowed, v_kinds, v_bounded, v_spread, v_again_at
    from orchestrator.lane_limits(v_lanes, v_limited, v_now, v_until, p_max_parallel) l;
    v_limited := coalesce(v_limited, '{}');
    v_locked_out := not v_wanted <@ v_limited;
  end if;

  -- A lane that is behind while most are not is full of some destination's events. The youngest that are due show who else waits in it.
  if cardinality(v_deep) <= greatest(2, cardinality(v_lanes) / 2) then
    v_odd_at := array(
      select y.at from (select v_deep[1] as lane) d
      cross join lateral (
        select t.destination from orchestrator.timer t where t.lane = d.lane and t.priority = 0 and t.due_at >= v_floors[d.lane + 1] and t.due_at <= v_until order by t.due_at limit 1) front
      cross join lateral (
        select t.ctid as at, t.destination, t.lease_until from orchestrator.timer t
        where t.lane = d.lane and t.priority = 0 and t.due_at <= v_until order by t.due_at desc limit least(64, 8 + p_batch / 4)) y
      where y.destination <> front.destination and y.destination <> all (v_paused) and (y.lease_until is null or y.lease_until <= v_now)
      limit greatest(1, p_batch / 4));
    if v_odd_at <> '{}' then
      select array_agg(t.at) filter (where not t.odd), array_agg(t.at) filter (where t.odd)
      into v_at, v_odd_at
      from (
        select t.ctid as at, t.ordering is not null or v_control.rerouted_by is not null as odd from orchestrator.timer t
        where t.ctid = any (v_odd_at) and (t.lease_until is null or t.lease_until <= v_now) and t.attempt < t.max_attempts and t.expires_at > v_now is not false
        for update skip locked) t;
      v_left := v_left - coalesce(cardinality(v_at), 0) - coalesce(cardinality(v_odd_at), 0);
    end if;
  end if;

  loop
    if v_odd_at <> '{}' then
      -- A statement of its own: what it moves, only the next one sees.
      select v_at || s.ready, v_changed or s.changed or cardinality(s.ready) + s.locked < cardinality(v_odd_at)
        , v_left + s.locked, v_buckets || s.buckets, v_left_out or s.locked > 0, v_locked_out or s.locked > 0
      into v_at, v_changed, v_left, v_buckets, v_left_out, v_locked_out
      from orchestrator.sort_out(v_odd_at, v_control.rerouted_by is not null, p_max_parallel is not null, p_skip) s;
    end if;
    if v_at <> '{}' then
      with leased as (
        update orchestrator.timer t
        set lease_until = v_lease_until, worker = p_worker, attempt = t.attempt + 1, busy = t.ordering, slot = case when t.lane = any (v_bounded) then t.lane end
        where t.ctid = any (v_at)
        returning t.event_id, t.scheduled_at, t.due_at, t.attempt, t.lane
      )
      select array_agg(l.event_id), array_agg(l.scheduled_at), array_agg(l.due_at), array_agg(l.attempt), array_agg(l.lane)
      into v_ids, v_scheduled, v_due, v_attempts, v_from
      from (select * from leased order by due_at, event_id) l;
      v_all_ids := v_all_ids || v_ids; v_all_scheduled := v_all_scheduled || v_scheduled; v_all_due := v_all_due || v_due;
      v_all_attempts := v_all_attempts || v_attempts; v_all_from := v_all_from || v_from;
      v_at := '{}';
    end if;
    exit when v_left <= 0 or v_queues = '{}';
    with picked as materialized (
      select q.n, q.share, t.at, t.lost, t.odd
      from (select u.n, v_lanes[u.n] as lane, v_priorities[u.n] as priority, v_lane_floors[u.n] as floor, coalesce(v_untils[u.n], v_until) as until
              , least(v_caps[u.n], v_left / cardinality(v_queues) + (u.place <= v_left % cardinality(v_queues))::integer) as share
            from unnest(v_queues) with ordinality as u (n, place)) q
      cross join lateral (
        select t.ctid as at, t.attempt >= t.max_attempts + orchestrator.lost_leases_borne() or t.expires_at <= v_now is true as lost
          , t.ordering is not null or v_control.rerouted_by is not null or t.lane = any (v_spread) is true as odd
        from orchestrator.timer t
        where t.lane = q.lane and t.priority = q.priority and t.due_at >= q.floor and t.due_at <= q.until and (t.lease_until is null or t.lease_until <= v_now)
          and (not v_left_out or not (t.destination = any (v_paused) or t.ordering is not null and orchestrator.ordering_bucket(t.ordering) = any (v_buckets)))
        order by t.due_at
        limit q.share
        for update skip locked) t
    ), leased as (
      update orchestrator.timer t
      set lease_until = v_lease_until, worker = p_worker, attempt = t.attempt + 1, slot = case when t.lane = any (v_bounded) then t.lane end
      where t.ctid = any (array(select p.at from picked p where not p.odd and not p.lost))
      returning t.event_id, t.scheduled_at, t.due_at, t.attempt, t.lane
    ), asked as (
      select p.n, count(*) as given, count(*) = p.share as gave_all from picked p group by p.n, p.share
    )
    select array_agg(l.event_id), array_agg(l.scheduled_at), array_agg(l.due_at), array_agg(l.attempt), array_agg(l.lane)
      , array(select p.at from picked p where p.odd and not p.lost), array(select p.at from picked p where p.lost), (select count(*) from picked p where not p.lost)
      , array(select a.n from asked a where a.gave_all)
      , case when v_limited is not null then array(select a.n from asked a order by a.n) end
      , case when v_limited is not null then array(select a.given from asked a order by a.n) end
    into v_ids, v_scheduled, v_due, v_attempts, v_from, v_odd_at, v_lost_at, v_got, v_full, v_asked, v_given
    from (select * from leased order by due_at, event_id) l;
    v_all_ids := v_all_ids || v_ids; v_all_scheduled := v_all_scheduled || v_scheduled; v_all_due := v_all_due || v_due;
    v_all_attempts := v_all_attempts || v_attempts; v_all_from := v_all_from || v_from;
    if v_lost_at <> '{}' and orchestrator.bury(v_lost_at) < cardinality(v_lost_at) then
      -- Those whose ordering key another has stay, and would be met again.
      v_buckets := v_buckets || array(select orchestrator.ordering_bucket(t.ordering) from orchestrator.timer t where t.ctid = any (v_lost_at));
      v_left_out := true;
    end if;
    -- Those that were not asked, those that gave all they were asked for, and the next priority of those that did not.
    v_queues := v_queues[v_left + 1:] || v_full || case when cardinality(v_control.priorities) > 1 then array(
      select n + 1 from unnest(v_queues[:v_left]) n where v_lanes[n + 1] = v_lanes[n] and n <> all (v_full)) end;
    v_left := v_left - v_got;
    if v_limited is not null and v_left > 0 then
      v_caps := orchestrator.caps_left(v_lanes, v_caps, v_asked, v_given);
      v_queues := array(select n from unnest(v_queues) n where v_caps[n] > 0 is not false);
    end if;
  end loop;

  if v_limited is not null then
    select s.start_at, s.lease_until, s.options, s.waited into v_start, v_lease, v_options, v_waited
    from orchestrator.take_slots(v_all_ids, v_all_due, v_all_from, v_limited, v_allowed, v_kinds, v_bounded, v_now, v_lease_until, p_lease) s;
  end if;
  -- What went elsewhere, a lane that was not looked at, a limit that has more to give, a breaker that lets its next try through, or what another session has locked.
  v_again_at := least(case when v_locked_out then v_now + interval '10 ms' * power(2, least(7, coalesce(v_misses, 0) + 1)) end, case when v_changed or v_more and v_left > 0 then v_now end, v_again_at
    , (select min(l.open_until) from orchestrator.lane l where l.breaker <> 'closed' and l.open_until > v_now));
  perform set_config('orchestrator.claim_again_at', coalesce(extract(epoch from v_again_at)::text, ''), false)
    , set_config('orchestrator.last_own_lane', v_stopped_at::text, false);
  if v_locked_out or v_misses > 0 then
    perform set_config('orchestrator.locked_out', (case when v_locked_out then least(7, coalesce(v_misses, 0) + 1) else 0 end)::text, false);
  end if;
  select min(s), max(s) into v_first, v_last_scheduled from unnest(v_all_scheduled) s;
  return query
  select e.id, l.attempt, l.due_at, coalesce(l.lease_until, v_lease_until), e.scheduled_at, e.source, e.external_job_id, e.delivery_type, e.destination
    , e.ordering_key, e.headers, e.payload, coalesce(l.start_at, l.due_at), l.lane
    , l.options, case when l.waited is not null then l.waited
           when l.due_at < v_control.resumed_at then orchestrator.waits(l.due_at, v_now, v_control.last_paused_at, v_control.resumed_at, null, null, null) end
    , e.expires_at, e.correlation_id, e.traceparent
  from unnest(v_all_ids, v_all_scheduled, v_all_due, v_all_attempts, v_all_from, v_start, v_lease, v_options, v_waited)
    as l (event_id, scheduled_at, due_at, attempt, lane, start_at, lease_until, options, waited)
  cross join lateral (
    select e.* from orchestrator.event e
    where e.id = l.event_id and e.scheduled_at = l.scheduled_at
      and e.scheduled_at >= v_first and e.scheduled_at <= v_last_scheduled
    limit 1) e;
end $$;
comment on function orchestrator.claim_due_events(integer, integer, interval, interval, integer[], integer) is
  'Leases up to p_batch events that are due within p_lookahead to p_worker, shared fairly among lanes, as far as limits, breakers and pauses allow; none of the lanes in p_skip; p_max_parallel bounds own lanes that have no max_parallel. lease_until is when they become due again unless finished or released; what has expired by now ends. Finish each with its attempt number; begin none before its start_at, nor from its expires_at on. Afterwards current_setting(''orchestrator.claim_again_at'') says when a limit lets more through, in Unix seconds; empty: nothing waits for one';

create or replace function orchestrator.next_due_at() returns timestamptz
language sql volatile security definer set search_path = orchestrator, pg_temp
set enable_seqscan = off set enable_bitmapscan = off as $$
  select min(t.due_at) from orchestrator.control_now() c cross join unnest(c.priorities) as p (priority) cross join orchestrator.lane l
  cross join lateral (
    select t.due_at from orchestrator.timer t
    where t.lane = l.lane and t.priority = p.priority and t.due_at >= coalesce((orchestrator.floors(c, orchestrator.now()))[l.lane + 1], '-infinity') and (t.lease_until is null or t.lease_until <= orchestrator.now())
    order by t.due_at limit 1) t
  where c.paused_at is null and orchestrator.lane_open(l, orchestrator.now())
$$;
comment on function orchestrator.next_due_at() is 'When the next event is due that nobody holds and no pause or open breaker holds back; null when none is waiting';
