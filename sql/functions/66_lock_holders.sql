-- Which sessions make others wait: those that have left a transaction open, and prepared transactions,
-- which belong to no session. Called by whoever was kept waiting, by doctor, and for the metrics. And what a
-- lock timeout may look like.

create or replace function orchestrator.holder_remedy(p_holder orchestrator.lock_holder) returns text
language sql stable
set search_path = orchestrator, pg_temp
as $$
  select case
    when p_holder.pid is null then format('rollback prepared %L', p_holder.query)
    else format('select pg_terminate_backend(%s)', p_holder.pid)
  end
$$;
comment on function orchestrator.holder_remedy(orchestrator.lock_holder) is
  'The statement that ends the holder''s transaction';

create or replace function orchestrator.holder_text(p_holder orchestrator.lock_holder) returns text
language sql stable
set search_path = orchestrator, pg_temp
set timezone = 'UTC'
as $$
  select case
    when p_holder.pid is null then
      format('prepared transaction %L (user %s), which no session has, since %s; end it: %s'
        , p_holder.query, p_holder.username, t.since, orchestrator.holder_remedy(p_holder))
    else
      format('pid %s (%s, user %s), %s, in a transaction since %s, last query: %s'
        , p_holder.pid, coalesce(nullif(p_holder.application_name, ''), 'no application_name')
        , p_holder.username, coalesce(p_holder.state, 'state unknown'), t.since, p_holder.query)
  end
  from (select coalesce(to_char(p_holder.since, 'YYYY-MM-DD HH24:MI:SS"Z"'), 'unknown') as since) t
$$;
comment on function orchestrator.holder_text(orchestrator.lock_holder) is
  'What a log line says of a session that makes others wait';

-- A transaction that has only read blocks nobody but those who need a table for themselves alone. So it
-- is left out, unless p_readers says how old it must be, or somebody waits for it. Sessions that are
-- idle come first. Of each it tells what the schema's owner can see. A prepared transaction has no pid,
-- and its gid in the place of a query.
create or replace function orchestrator.lock_holders(p_older interval, p_readers interval)
returns setof orchestrator.lock_holder
language sql volatile security definer
set search_path = orchestrator, pg_temp
as $$
  with waiting as materialized (
    select w.pid as waiter, unnest(pg_blocking_pids(w.pid)) as pid
    from pg_stat_activity w
    where w.wait_event_type = 'Lock' and w.datname = current_database()
  ), locks as materialized (
    -- All locks; ours: on tables of this schema, and advisory ones of this database.
    select l.*
      , (c.relnamespace = 'orchestrator'::regnamespace and c.relkind in ('r', 'p') or l.locktype = 'advisory')
        and l.database = (select d.oid from pg_database d where d.datname = current_database()) as ours
    from pg_locks l left join pg_class c on l.locktype = 'relation' and c.oid = l.relation
  ), held as materialized (
    select l.pid, case when l.pid is null then l.virtualtransaction end as prepared
      , bool_and(l.mode = 'AccessShareLock') as reads
    from locks l
    where l.granted and l.ours
    group by 1, 2
  )
  select h.* from (
    -- Sessions: their last query without its literals, and how many wait for them.
    select a.pid, a.usename, a.application_name, a.state, a.xact_start
      , regexp_replace(left(regexp_replace(regexp_replace(a.query
          , E'\\s+', ' ', 'g')
          , E'''[^'']*''|\\$([^$ ]*)\\$.*?\\$\\1\\$', '…', 'g'), 200)
          , '''.*$', '…')
      , (select count(*) from waiting w where w.pid = a.pid)::integer
    from pg_stat_activity a
    left join held h on h.pid = a.pid
    cross join lateral (
      select case
        when not h.reads or exists (select from waiting w where w.pid = a.pid) then p_older
        else p_readers
      end as older) o
    where o.older is not null
      and (h.pid is not null or exists (select from waiting w where w.pid = a.pid))
      and a.pid <> pg_backend_pid() and a.backend_type = 'client backend'
      and (a.xact_start < clock_timestamp() - o.older is not false or o.older <= '0 s')
    union all
    -- Prepared transactions: pg_blocking_pids() gives 0 for them, so the locks tell who waits for which.
    select null, p.owner, null, 'prepared', p.prepared, p.gid
      , (select count(distinct w.waiter) from waiting w
         join locks l on l.pid = w.waiter and not l.granted
         join locks k on k.virtualtransaction = x.virtual and k.granted
           and (k.locktype, k.database, k.relation, k.page, k.tuple, k.transactionid, k.classid, k.objid, k.objsubid)
             is not distinct from
             (l.locktype, l.database, l.relation, l.page, l.tuple, l.transactionid, l.classid, l.objid, l.objsubid)
         where w.pid = 0)::integer
    from pg_prepared_xacts p
    cross join lateral (
      select l.virtualtransaction as virtual from locks l
      where l.pid is null and l.locktype = 'transactionid' and l.transactionid = p.transaction) x
    join held h on h.prepared = x.virtual
    cross join lateral (select case when h.reads then p_readers else p_older end as older) o
    where p.database = current_database() and (p.prepared < clock_timestamp() - o.older or o.older <= '0 s')
  ) as h (pid, username, application_name, state, since, query, blocks)
  order by (h.state ~ '^(idle in transaction|prepared)') desc nulls last, h.since nulls first
$$;
comment on function orchestrator.lock_holders(interval, interval) is
  'Sessions and prepared transactions that have held locks for longer than p_older, with how many sessions '
  'wait for each. Those that have only read: longer than p_readers; null: only while somebody waits';

create or replace function orchestrator.lock_holders(p_older interval default '2 s')
returns setof orchestrator.lock_holder
language sql volatile security definer
set search_path = orchestrator, pg_temp
as $$
  select * from orchestrator.lock_holders(p_older, null)
$$;
comment on function orchestrator.lock_holders(interval) is
  'lock_holders() without those that have only read';

create or replace function orchestrator.holders_text(p_older interval, p_readers interval) returns text
language sql volatile security definer
set search_path = orchestrator, pg_temp
as $$
  select string_agg(h.text, '; ')
  from (
    select orchestrator.holder_text(h) as text
    from orchestrator.lock_holders(p_older, p_readers) h
    limit 3) h
$$;
comment on function orchestrator.holders_text(interval, interval) is
  'The first three of lock_holders(), for a log line; null: there are none';

create or replace function orchestrator.holders_text(p_older interval default '100 ms') returns text
language sql volatile security definer
set search_path = orchestrator, pg_temp
as $$
  select orchestrator.holders_text(p_older, null)
$$;
comment on function orchestrator.holders_text(interval) is
  'holders_text() without those that have only read';

-- PostgreSQL waits for a row in two steps: for its turn, and for the row. When lock_timeout fires just as the
-- first one ends, the second one forgets that, and the error calls itself a cancel by the user.
create or replace function orchestrator.pass_on_cancel(p_sqlstate text, p_message text, p_timed_out_at timestamptz)
returns void
language plpgsql as $$
begin
  if p_sqlstate = '57014' and clock_timestamp() < p_timed_out_at then
    raise query_canceled using message = p_message;
  end if;
end $$;
comment on function orchestrator.pass_on_cancel(text, text, timestamptz) is
  'For handlers of lock_not_available or query_canceled: raises a cancel again, unless it may have been lock_timeout, '
  'which cannot have fired before p_timed_out_at';
