-- Ids hold a bucket. Events that are kept already keep their ids; while there may be any, submissions look for both.

alter table orchestrator.control add column former_ids_until timestamptz;
comment on column orchestrator.control.former_ids_until is
  'No event scheduled later has an id by former_event_id(): submissions look for events under both ids until the days up to then are gone; null: there are none';

-- Where an earlier version may have submitted, and may go on to: it extends the time by what it submits.
update orchestrator.control c
set former_ids_until = greatest(
    (select max(to_date(right(p.relname, 8), 'YYYYMMDD')) + 1 from pg_inherits i join pg_class p on p.oid = i.inhrelid
     where i.inhparent = 'orchestrator.event'::regclass and p.relname ~ '^event_p\d{8}$')::timestamp at time zone 'UTC'
  , (select h.scheduled_at from orchestrator.horizon h order by h.id desc limit 1)
  , clock_timestamp() + interval '1 day')
where exists (select from orchestrator.migration m where m.applied_at < transaction_timestamp());

-- Their signatures change; functions/ makes them anew. A new database has none of them yet.
drop function if exists orchestrator.random_event_id(timestamptz);
drop function if exists orchestrator.event_id(text, text, timestamptz);
drop function if exists orchestrator.submit_events(jsonb);
