-- Direct submission: clients copy new events straight into the table event, and one call makes their timers.
-- A transaction that has opened one and not ended it by that call cannot commit: no event is without a timer.

-- Unlogged: a row lives no longer than its transaction.
create unlogged table orchestrator.direct_submission
( xact xid8 primary key
, created_at timestamptz not null
, inserted bigint
);
comment on table orchestrator.direct_submission is
  'The transaction that has called open_direct() and not yet submit_direct(); others see no row';
comment on column orchestrator.direct_submission.xact is 'The transaction';
comment on column orchestrator.direct_submission.created_at is
  'event.created_at of the events, and the time before which no timer of them is due';
comment on column orchestrator.direct_submission.inserted is
  'inserted_events() when it was opened; null: PostgreSQL does not count';

create function orchestrator.require_submit_direct() returns trigger
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  if exists (select from orchestrator.direct_submission d where d.xact = new.xact) then
    raise exception 'open_direct() was called, and submit_direct() was not: the events would have no timers'
      using errcode = 'object_not_in_prerequisite_state';
  end if;
  return null;
end $$;
comment on function orchestrator.require_submit_direct() is
  'Refuses to commit a transaction that has opened a direct submission and not ended it';
create constraint trigger direct_submission_ended after insert on orchestrator.direct_submission
  deferrable initially deferred for each row execute function orchestrator.require_submit_direct();

create function orchestrator.require_open_direct() returns trigger
language plpgsql security definer
set search_path = orchestrator, pg_temp as $$
begin
  if not exists (select from orchestrator.direct_submission d where d.xact = pg_current_xact_id()) then
    raise exception 'events cannot be inserted into orchestrator.event alone: they would have no timers'
      using errcode = 'object_not_in_prerequisite_state'
      , hint = 'call orchestrator.schedule_event() or orchestrator.submit_events(), or see orchestrator.open_direct()';
  end if;
  return null;
end $$;
comment on function orchestrator.require_open_direct() is
  'Refuses events from whoever has not called open_direct() in the same transaction';
-- Not for the owner, as whom the functions run. For each statement: a trigger for each row would make COPY
-- insert row by row.
create trigger event_opened before insert on orchestrator.event
  for each statement when (not has_table_privilege('orchestrator.timer'::regclass, 'insert'))
  execute function orchestrator.require_open_direct();
