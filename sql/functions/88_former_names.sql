-- Names that programs of the version before call; gone with the next release.

-- Called by submit_staged() and its like of the version before, which may have waited for the migration.
create or replace function orchestrator.keep_staged(p_predecessor uuid)
returns table (n integer, id uuid, result text, field text, reason text)
language sql security definer
set search_path = orchestrator, pg_temp as $$
  select * from orchestrator.insert_staged(p_predecessor)
$$;
comment on function orchestrator.keep_staged(uuid) is 'Former name of insert_staged()';

create or replace function orchestrator.keep_each(p_now timestamptz, p_told boolean, p_predecessor uuid)
returns table (n integer, id uuid, result text, field text, reason text)
language sql security definer
set search_path = orchestrator, pg_temp as $$
  select * from orchestrator.insert_each(p_now, p_told, p_predecessor)
$$;
comment on function orchestrator.keep_each(timestamptz, boolean, uuid) is 'Former name of insert_each()';

create or replace function orchestrator.arm_events(
  p_ids uuid[], p_scheduled_at timestamptz[], p_due_at timestamptz[] default null, p_attempts integer[] default null)
returns void
language sql security definer
set search_path = orchestrator, pg_temp as $$
  select orchestrator.create_timers(p_ids, p_scheduled_at, p_due_at, p_attempts)
$$;
comment on function orchestrator.arm_events(uuid[], timestamptz[], timestamptz[], integer[]) is
  'Former name of create_timers()';
