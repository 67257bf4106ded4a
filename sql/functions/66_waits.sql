-- Who holds others up: sessions that have left a transaction open. Asked by whoever was kept waiting, by doctor and by the metrics.

create or replace function orchestrator.holder_text(p_holder orchestrator.lock_holder) returns text
language sql stable set search_path = orchestrator, pg_temp set timezone = 'UTC' as $$
  select format('pid %s (%s, user %s), %s, in a transaction since %s, last query: %s', p_holder.pid, coalesce(nullif(p_holder.application_name, ''), 'no application_name')
    , p_holder.username, coalesce(p_holder.state, 'state unknown'), coalesce(to_char(p_holder.since, 'YYYY-MM-DD HH24:MI:SS"Z"'), 'unknown'), p_holder.query)
$$;
comment on function orchestrator.holder_text(orchestrator.lock_holder) is 'A session that holds others up, for a log line';

create or replace function orchestrator.lock_holders(p_older interval default '2 s') returns setof orchestrator.lock_holder
language sql volatile security definer set search_path = orchestrator, pg_temp as $$
  with waiting as materialized (
    select unnest(pg_blocking_pids(w.pid)) as pid from pg_stat_activity w
    where w.wait_event_type = 'Lock' and w.datname = current_database()
  ), held as materialized (
    select distinct l.pid from pg_locks l left join pg_class c on l.locktype = 'relation' and c.oid = l.relation
    where l.granted and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and (c.relnamespace = 'orchestrator'::regnamespace and c.relkind in ('r', 'p') and l.mode <> 'AccessShareLock' or l.locktype = 'advisory')
  )
  select a.pid, a.usename, a.application_name, a.state, a.xact_start
    , regexp_replace(left(regexp_replace(regexp_replace(a.query, E'\\s+', ' ', 'g'), E'''[^'']*''|\\$(\\w*)\\$.*?\\$\\1\\$', '…', 'g'), 200), '''.*$', '…')
    , (select count(*) from waiting w where w.pid = a.pid)::integer
  from pg_stat_activity a
  where a.pid in (select h.pid from held h union select w.pid from waiting w)
    and a.pid <> pg_backend_pid() and a.backend_type = 'client backend'
    and (a.xact_start < clock_timestamp() - p_older is not false or p_older <= '0 s')
  order by (a.state ~ '^idle in transaction') desc nulls last, a.xact_start nulls first
$$;
comment on function orchestrator.lock_holders(interval) is
  'Sessions of this database that have had a transaction open for longer than p_older with locks that others may wait for, those that are idle first: what can be seen of each by this schema''s owner, its last query without its literals, and how many sessions wait for it at this moment';

create or replace function orchestrator.holders_text(p_older interval default '100 ms') returns text
language sql volatile security definer set search_path = orchestrator, pg_temp as $$
  select string_agg(h.text, '; ') from (select orchestrator.holder_text(h) as text from orchestrator.lock_holders(p_older) h limit 3) h
$$;
comment on function orchestrator.holders_text(interval) is 'The first sessions of lock_holders(), for a log line; null: there are none';
