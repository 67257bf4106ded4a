-- Vital signs: what metrics and doctor ask about the state of the database. Every process asks every 15 s, so
-- each answer comes from an index, from a bounded part of one, or from PostgreSQL's own counts.

-- Unlike next_due_at() it leaves out what waits for its turn under a rate. Whether that is so, the last claim
-- has noted; the note does not hold beyond the slots that it gave, so it cannot hide that nobody claims.
create or replace function orchestrator.oldest_due_at() returns timestamptz
language sql volatile security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  select min(t.due_at)
  from orchestrator.now() n (now)
  cross join orchestrator.queue_floors() q
  join orchestrator.lane l on l.lane = q.lane
    and orchestrator.lane_may_give(l, n.now)
    and (l.held_by = 'rate' and l.next_slot_at > n.now) is not true
  cross join lateral (
    select t.due_at from orchestrator.timer t
    where t.lane = q.lane and t.priority = q.priority and t.due_at >= q.floor and t.due_at <= n.now
      and orchestrator.is_free(t.lease_until, n.now)
    order by t.due_at limit 1) t
  where (select c.paused_at is null from orchestrator.control_now() c)
$$;
comment on function orchestrator.oldest_due_at() is
  'When the oldest event was due that is not leased, and that no pause, open breaker or rate holds back; '
  'null: none waits';

create or replace function orchestrator.due_soon(p_within interval, p_most integer default 100000) returns bigint
language sql volatile security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  select count(*)
  from (
    select
    from orchestrator.now() n (now)
    cross join orchestrator.queue_floors() q
    -- Below 0 a lane has its timers that wait for their ordering key.
    cross join lateral (values (q.lane), (-1 - q.lane)) as l (lane)
    -- The limit makes it look up each lane in the index: a join would read all timers.
    cross join lateral (
      select from orchestrator.timer t
      where t.lane = l.lane and t.priority = q.priority and t.due_at > n.now and t.due_at <= n.now + p_within
      order by t.due_at
      limit p_most) t
    limit p_most) t
$$;
comment on function orchestrator.due_soon(interval, integer) is
  'How many events fall due within p_within from now, counted up to p_most';

-- Sessions of other databases do not count, as they hold no rows of this one back; those of standbys and
-- replication slots do. Vacuum has a snapshot, too, which holds nothing back.
create or replace function orchestrator.xmin_horizon(out age_seconds double precision, out age_transactions bigint)
language sql volatile security definer
set search_path = orchestrator, pg_temp
as $$
  select coalesce(max(extract(epoch from clock_timestamp() - h.since)), 0), coalesce(max(age(h.xmin)), 0)
  from (
    select a.xact_start, a.backend_xmin
    from pg_stat_activity a
    where a.backend_xmin is not null and a.pid <> pg_backend_pid()
      and (a.datname = current_database() or a.backend_type = 'walsender')
      and a.backend_type <> 'autovacuum worker'
    union all
    select p.prepared, p.transaction from pg_prepared_xacts p where p.database = current_database()
    union all
    select null, s.xmin from pg_replication_slots s where s.xmin is not null) as h (since, xmin)
$$;
comment on function orchestrator.xmin_horizon() is
  'Age of the oldest transaction, in seconds, and of the oldest snapshot, in transactions, that keep vacuum from '
  'removing dead rows. '
  'Of sessions it tells what the owner of this schema can see';

create or replace function orchestrator.vital_signs(
  out oldest_due_seconds double precision, out xmin_seconds double precision, out xmin_transactions bigint,
  out timers bigint, out dead_timers bigint, out timer_bytes bigint, out timer_index_bytes bigint,
  out connections bigint, out max_connections bigint)
language sql volatile security definer
set search_path = orchestrator, pg_temp
as $$
  select coalesce(extract(epoch from orchestrator.now() - orchestrator.oldest_due_at()), 0)
    , x.age_seconds, x.age_transactions
    , pg_stat_get_live_tuples(t.timer), pg_stat_get_dead_tuples(t.timer)
    , pg_table_size(t.timer), pg_indexes_size(t.timer)
    , (select sum(d.numbackends) from pg_stat_database d), current_setting('max_connections')::bigint
  from (select 'orchestrator.timer'::regclass::oid as timer) t
  cross join orchestrator.xmin_horizon() x
$$;
comment on function orchestrator.vital_signs() is
  'What metrics tell of the database: how late the oldest event is, what holds vacuum back, the table of timers, '
  'sessions of the server';

create or replace function orchestrator.held_destinations(p_most integer default 50)
returns table (name text, reason text, seconds double precision)
language sql volatile security definer
set search_path = orchestrator, pg_temp
as $$
  select h.name, h.reason, greatest(0, extract(epoch from n.now - h.since))
  from (
    select l.name, 'paused' as reason, l.paused_at as since
    from orchestrator.lane l
    where l.name is not null and l.paused_at is not null
    union all
    select l.name, 'breaker', l.opened_at
    from orchestrator.lane l
    where l.name is not null and l.breaker <> 'closed'
    union all
    -- Paused by a note alone.
    select p.name, 'paused', p.paused_at
    from orchestrator.noted_pauses() p
    where not exists (select from orchestrator.lane l where l.name = p.name and l.paused_at is not null)) h
  cross join orchestrator.now() n (now)
  order by h.since, h.name
  limit p_most
$$;
comment on function orchestrator.held_destinations(integer) is
  'Destinations that are paused, or whose breaker is not closed, and for how many seconds; those held longest first';
