-- Direct submission: a client copies new events straight into the table event, and submit_direct() makes
-- their timers. It saves the staging table, and PostgreSQL writes the rows of a COPY to the WAL by the page.
-- It takes only what is new and keeps every rule: a batch that fails is staged, see 20_submission.sql.
--
--   begin;
--   select orchestrator.open_direct();     -- created_at of the events; null: stage them
--   copy orchestrator.event (id, scheduled_at, created_at, …) from stdin;    -- in order of id
--   select orchestrator.submit_direct(…);  -- the same events
--   commit;

create or replace function orchestrator.inserted_events() returns bigint
language sql volatile security definer
set search_path = orchestrator, pg_temp as $$
  select sum(pg_stat_get_xact_tuples_inserted(i.inhrelid))::bigint
  from pg_inherits i
  where i.inhparent = 'orchestrator.event'::regclass and current_setting('track_counts')::boolean
$$;
comment on function orchestrator.inserted_events() is
  'How many events this session has inserted, as PostgreSQL counts it within a transaction; null: it does not';

-- Timer is locked before the clock is read, on which raise_floors() relies, and the transaction has its id
-- before submit_direct() reads the lanes, on which reroute_remaining() does.
create or replace function orchestrator.open_direct() returns timestamptz
language plpgsql security definer
set search_path = orchestrator, pg_temp
set enable_seqscan = off as $$
declare
  v_now timestamptz;
begin
  if exists (select from orchestrator.outbox_kind where kind = 'scheduled')
    or exists (select from orchestrator.newest_control() c where c.former_ids_until is not null)
  then
    return null;
  end if;
  perform set_config('lock_timeout', '250ms', true);
  lock table orchestrator.timer in row exclusive mode;
  v_now := orchestrator.now();
  insert into orchestrator.direct_submission (xact, created_at, inserted)
  values (pg_current_xact_id(), v_now, orchestrator.inserted_events());
  return v_now;
end $$;
comment on function orchestrator.open_direct() is
  'Allows this transaction to insert into event, and returns the created_at to insert; null: stage the events. '
  'submit_direct() must follow; until the end of the transaction nothing waits longer than 250 ms';

create or replace function orchestrator.submit_direct(
  p_ids uuid[], p_scheduled_at timestamptz[], p_max_retries smallint[], p_kinds integer[]
, p_sources text[], p_delivery_types text[], p_destinations text[]
, p_retry_policies text[] default null, p_ordering_keys text[] default null, p_priorities smallint[] default null
, p_spreads interval[] default null, p_expires_at timestamptz[] default null)
returns void
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
declare
  v_events constant integer := coalesce(cardinality(p_ids), 0);
  v_opened orchestrator.direct_submission;
  v_first timestamptz;
  v_last timestamptz;
begin
  delete from orchestrator.direct_submission d where d.xact = pg_current_xact_id() returning * into v_opened;
  if not found then
    raise exception 'open_direct() was not called' using errcode = 'object_not_in_prerequisite_state';
  end if;
  if coalesce(orchestrator.inserted_events() - v_opened.inserted, v_events) <> v_events then
    raise exception '% events were inserted, but % are to get timers'
    , orchestrator.inserted_events() - v_opened.inserted, v_events
      using errcode = 'invalid_parameter_value';
  end if;
  select min(s.at), max(s.at) into v_first, v_last from unnest(p_scheduled_at) as s (at);
  perform orchestrator.require_plain(v_last, p_retry_policies);
  perform orchestrator.note_priorities(array_agg(distinct p.priority))
  from unnest(p_priorities) as p (priority)
  where p.priority is not null;
  perform orchestrator.insert_timers(v_opened.created_at, p_ids, p_scheduled_at, p_max_retries, p_kinds
  , p_sources, p_delivery_types, p_destinations, p_ordering_keys, p_priorities, p_spreads, p_expires_at);
  perform orchestrator.tell_due(v_first);
end $$;
comment on function orchestrator.submit_direct(
  uuid[], timestamptz[], smallint[], integer[], text[], text[], text[], text[], text[], smallint[], interval[]
, timestamptz[]) is
  'Creates the timers of the events that this transaction has inserted since open_direct(), one array element each. '
  'p_kinds says which element of p_sources, p_delivery_types and p_destinations is that of each event';
