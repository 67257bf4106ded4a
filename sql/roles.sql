-- Roles: what each part of the runtime, and each kind of user, may do. Applied last, whenever anything
-- before it changed. Roles belong to the whole server, so another database's migration may make them at
-- the same time.

do $$
declare
  v_role text;
begin
  foreach v_role in array array[
    'orchestrator_submit', 'orchestrator_dispatch', 'orchestrator_ingest', 'orchestrator_ops', 'orchestrator_read']
  loop
    if not exists (select from pg_roles where rolname = v_role) then
      begin
        execute format('create role %I nologin', v_role);
      exception
        when duplicate_object or unique_violation then null;
        when insufficient_privilege then
          raise exception 'role % is missing, and user % may not create roles', v_role, current_user
            using errcode = 'insufficient_privilege'
            , hint = 'As a superuser: create role orchestrator_submit; create role orchestrator_dispatch; '
              'create role orchestrator_ingest; create role orchestrator_ops; create role orchestrator_read; '
              || format('or: alter role %I createrole. Then migrate again.', current_user);
      end;
    end if;
  end loop;
end $$;

-- Functions run as their owner, so everything must belong to the schema's owner, whoever migrated or
-- restored a dump before.
do $$
declare
  v_change text;
begin
  for v_change in
    select format('alter %s orchestrator.%s owner to %I', o.kind, o.name, pg_get_userbyid(n.nspowner))
    from pg_namespace n
    cross join lateral (
      select case c.relkind when 'v' then 'view' when 'c' then 'type' else 'table' end as kind
        , quote_ident(c.relname) as name, c.relowner as owner
      from pg_class c
      where c.relnamespace = n.oid and c.relkind in ('r', 'p', 'v', 'c')
      union all
      -- Sequences of identity columns follow their tables.
      select 'sequence', quote_ident(c.relname), c.relowner
      from pg_class c
      where c.relnamespace = n.oid and c.relkind = 'S'
        and not exists (select from pg_depend d where d.objid = c.oid and d.deptype in ('a', 'i'))
      union all
      select 'function', format('%I(%s)', p.proname, pg_get_function_identity_arguments(p.oid)), p.proowner
      from pg_proc p
      where p.pronamespace = n.oid) o
    where n.nspname = 'orchestrator' and o.owner <> n.nspowner
  loop
    execute v_change;
  end loop;
end $$;

-- Exactly what follows is granted, whatever was granted before, or came with a dump.
revoke all on schema orchestrator from public,
  orchestrator_submit, orchestrator_dispatch, orchestrator_ingest, orchestrator_ops, orchestrator_read;
revoke all on all tables in schema orchestrator from public,
  orchestrator_submit, orchestrator_dispatch, orchestrator_ingest, orchestrator_ops, orchestrator_read;
revoke all on all sequences in schema orchestrator from public,
  orchestrator_submit, orchestrator_dispatch, orchestrator_ingest, orchestrator_ops, orchestrator_read;
revoke all on all functions in schema orchestrator from public,
  orchestrator_submit, orchestrator_dispatch, orchestrator_ingest, orchestrator_ops, orchestrator_read;
grant usage on schema orchestrator to
  orchestrator_submit, orchestrator_dispatch, orchestrator_ingest, orchestrator_ops, orchestrator_read;

-- Everybody: ids, names, and who is in the way.
grant execute on function
  orchestrator.now(),
  orchestrator.event_id(text, text, timestamptz, text, integer),
  orchestrator.random_event_id(timestamptz, integer),
  orchestrator.bucket(uuid),
  orchestrator.bucket_of_key(text),
  orchestrator.destination_name(text, text),
  orchestrator.spread_shift(uuid, interval),
  orchestrator.partition_bounds(),
  orchestrator.standstills(),
  orchestrator.oldest_due_at(),
  orchestrator.due_soon(interval, integer),
  orchestrator.xmin_horizon(),
  orchestrator.vital_signs(),
  orchestrator.held_destinations(integer),
  orchestrator.lock_holders(interval),
  orchestrator.lock_holders(interval, interval),
  orchestrator.holder_text(orchestrator.lock_holder),
  orchestrator.holder_remedy(orchestrator.lock_holder),
  orchestrator.holders_text(interval),
  orchestrator.holders_text(interval, interval),
  orchestrator.prove_writing(),
  orchestrator.staging_problem()
to orchestrator_submit, orchestrator_dispatch, orchestrator_ingest, orchestrator_ops, orchestrator_read;

-- Submitting.
grant execute on function
  orchestrator.open_staging(),
  orchestrator.submit_staged(),
  orchestrator.submit_staged_with_status(),
  orchestrator.try_submit_staged(),
  orchestrator.try_submit_staged_with_status(),
  orchestrator.open_direct(),
  orchestrator.submit_direct(
    uuid[], timestamptz[], smallint[], integer[], text[], text[], text[], text[], text[], smallint[], interval[],
    timestamptz[]),
  orchestrator.submit_batch(
    uuid[], timestamptz[], smallint[], integer[], text[], text[], text[], text[], json[], json[], text[], text[],
    text[], text[], smallint[], interval[], timestamptz[]),
  orchestrator.submit_events(jsonb),
  orchestrator.schedule_event(
    text, jsonb, timestamptz, text, text, integer, jsonb, text, text, text, integer, interval,
    timestamptz, text, text)
to orchestrator_submit, orchestrator_ingest, orchestrator_ops;

-- Between open_direct() and submit_direct(), see schema/0016_direct_submission.sql.
grant insert (
  id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, retry_policy,
  headers, payload, ordering_key, priority, spread, expires_at, correlation_id, traceparent)
on orchestrator.event to orchestrator_submit, orchestrator_ingest, orchestrator_ops;

-- What the API does besides.
grant execute on function
  orchestrator.cancel_event(uuid, text),
  orchestrator.reschedule_event(uuid, timestamptz, text, timestamptz),
  orchestrator.cancel_events(text, text, timestamptz, timestamptz, boolean, integer, uuid),
  orchestrator.find_api_key(bytea),
  orchestrator.count_api_keys(),
  orchestrator.keep_answer(uuid, json),
  orchestrator.kept_answer(uuid)
to orchestrator_submit, orchestrator_ops;

-- Dispatching, and publishing the outbox.
grant execute on function
  orchestrator.register_worker(text),
  orchestrator.claim_due_events(integer, integer, interval, interval, integer[], integer),
  orchestrator.claim_for_dispatch(integer, integer, interval, interval, integer[], integer),
  orchestrator.finish_events(
    uuid[], integer[], text[], integer[], double precision[], double precision[], text[], text[],
    double precision[], integer, double precision[], text[]),
  orchestrator.finish_free_events(
    uuid[], integer[], text[], integer[], double precision[], double precision[], text[], text[],
    double precision[], integer, double precision[], text[]),
  orchestrator.finish_delivered(
    uuid[], tid[], integer[], smallint[], double precision[], integer[], double precision, integer[], integer[],
    integer[], integer, smallint[], integer),
  orchestrator.release_events(uuid[], integer[]),
  orchestrator.release_free_events(uuid[], integer[]),
  orchestrator.ensure_dedicated_lane(text, boolean),
  orchestrator.own_lane(text, boolean),
  orchestrator.next_due_at(),
  orchestrator.next_lease_end(),
  orchestrator.backlog(),
  orchestrator.set_outbox(text[]),
  orchestrator.configure_topics(text, text[], text[]),
  orchestrator.outbox_batch(integer, bigint),
  orchestrator.outbox_published(tid[]),
  orchestrator.outbox_failed(tid[], text[]),
  orchestrator.outbox_pending(),
  orchestrator.outbox_backlog(),
  orchestrator.raise_floors(),
  orchestrator.repair_after_restore(),
  orchestrator.settle_restored()
to orchestrator_dispatch, orchestrator_ops;

-- Ingesting.
grant execute on function
  orchestrator.ingest_offsets(text),
  orchestrator.advance_offsets(text, integer[], bigint[], bigint[], bigint[], bigint[]),
  orchestrator.keep_rejects(text, integer[], bigint[], bytea[], bytea[], text[], text[]),
  orchestrator.execute_commands(text, jsonb),
  orchestrator.set_aside_staged(text, integer[], integer[], bigint[], bytea[], bytea[]),
  orchestrator.submit_set_aside(integer),
  orchestrator.keep_aside(integer)
to orchestrator_ingest, orchestrator_ops;

-- Operating: offsets, rejects, dead letters.
grant execute on function
  orchestrator.set_ingest_offset(text, integer, bigint),
  orchestrator.get_reject(bigint),
  orchestrator.resubmitted_reject(bigint, uuid),
  orchestrator.redrive_event(uuid),
  orchestrator.pass_dead_letter(uuid),
  orchestrator.redrive_dead_letters(
    text, text, timestamptz, timestamptz, text, double precision, boolean, integer, uuid, timestamptz),
  orchestrator.purge_dead_letters(text, text, timestamptz, timestamptz, text, boolean, integer, uuid),
  orchestrator.retry_outbox_failures()
to orchestrator_ops;

-- Asking.
grant execute on function
  orchestrator.get_event(uuid),
  orchestrator.events_by_external_id(text, integer, timestamptz, uuid),
  orchestrator.list_dead_letters(integer, timestamptz, uuid, text, text, timestamptz, timestamptz, text),
  orchestrator.statistics_by(timestamptz, timestamptz, text[], text, text),
  orchestrator.list_rejects(integer, bigint),
  orchestrator.ingest_offsets(text),
  orchestrator.outbox_pending(),
  orchestrator.statistics(),
  orchestrator.next_due_at(),
  orchestrator.backlog(),
  orchestrator.get_destination(text),
  orchestrator.list_destinations(integer, text),
  orchestrator.destination_for(text),
  orchestrator.changed_rights(),
  orchestrator.backlog_forecast(interval, interval, text),
  orchestrator.forecast(interval, interval, text, integer),
  orchestrator.first_day_kept(timestamptz),
  orchestrator.first_id(timestamptz),
  orchestrator.batch_holds(uuid, timestamptz, uuid, uuid, uuid[]),
  orchestrator.batch_outcomes(orchestrator.delivered_batch)
to orchestrator_read, orchestrator_ops;

-- Operating: destinations and pauses.
grant execute on function
  orchestrator.configure_destination(
    text, double precision, integer, integer, boolean, interval, text, text, jsonb, interval, integer,
    double precision, integer, interval, interval, interval, text[]),
  orchestrator.delete_destination(text),
  orchestrator.pause_destination(text),
  orchestrator.resume_destination(text),
  orchestrator.pause_all(),
  orchestrator.resume_all(),
  orchestrator.close_breaker(text),
  orchestrator.destination_json(text)
to orchestrator_ops;

-- Operating: maintenance, retention and keys.
grant execute on function
  orchestrator.run_maintenance(integer, integer),
  orchestrator.reroute_remaining(integer),
  orchestrator.create_partitions(date, date),
  orchestrator.configure_retention(integer, integer, integer, boolean),
  orchestrator.partitions_to_archive(),
  orchestrator.archived_partition(text),
  orchestrator.hand_partitions_to(text),
  orchestrator.create_api_key(text, bytea, text[]),
  orchestrator.revoke_api_key(text),
  orchestrator.find_api_key(bytea),
  orchestrator.count_api_keys()
to orchestrator_ops;

-- Reading tables.
grant select on all tables in schema orchestrator to orchestrator_read, orchestrator_ops;
revoke select on orchestrator.api_key from orchestrator_read, orchestrator_ops;
grant select (name, scopes, created_at) on orchestrator.api_key to orchestrator_ops;
grant insert, update, delete on orchestrator.retry_policy to orchestrator_ops;

-- psql's sessions have settings of their own, which change the texts that functions make. So what a role
-- may call, and what that calls, runs with the settings below. They cost a microsecond a call: functions
-- that are called for every batch, and make no text that depends on them, do without.
do $$
declare
  v_function regprocedure;
begin
  for v_function in
    select p.oid from pg_proc p
    where p.pronamespace = 'orchestrator'::regnamespace and p.prosecdef
      and exists (select from aclexplode(p.proacl) a where a.grantee <> p.proowner)
      and p.proname not in (
        'open_staging', 'submit_staged', 'submit_staged_with_status', 'try_submit_staged'
        , 'try_submit_staged_with_status', 'open_direct', 'submit_direct', 'submit_batch', 'keep_answer'
        , 'kept_answer', 'prove_writing', 'claim_due_events', 'claim_for_dispatch', 'finish_events'
        , 'finish_free_events', 'finish_delivered', 'release_events', 'release_free_events', 'raise_floors'
        , 'next_due_at', 'next_lease_end', 'backlog', 'advance_offsets', 'ingest_offsets', 'outbox_batch'
        , 'outbox_published', 'outbox_pending', 'outbox_backlog', 'staging_problem')
  loop
    execute format('alter function %s set timezone = ''UTC'' set datestyle = ISO set intervalstyle = postgres '
      'set extra_float_digits = 1', v_function);
    execute format('alter function %s set standard_conforming_strings = on set quote_all_identifiers = off'
      , v_function);
  end loop;
end $$;

-- migrate and doctor compare with this: a dump brings the table, and may leave the rights behind.
delete from orchestrator.granted;
insert into orchestrator.granted (object, rights) select r.object, r.rights from orchestrator.rights() r;
