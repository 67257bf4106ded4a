-- Backups: what the scripts in ops/backup have done, and whether the archive of WAL keeps up.

create or replace function orchestrator.record_backup(
  p_kind text, p_started_at timestamptz, p_finished_at timestamptz, p_bytes bigint default null
, p_location text default null, p_problem text default null) returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp
as $$
declare
  v_run bigint;
begin
  insert into orchestrator.backup_run (kind, cluster, started_at, finished_at, bytes, location, problem)
  values (p_kind, orchestrator.this_cluster(), p_started_at, p_finished_at, p_bytes, p_location, left(p_problem, 1000))
  returning run into v_run;
  delete from orchestrator.backup_run r
  where r.kind = p_kind
    and r.run < (
      select min(n.run)
      from (select b.run from orchestrator.backup_run b where b.kind = p_kind order by b.run desc limit 100) n)
    and r.run is distinct from (
      select max(g.run) from orchestrator.backup_run g where g.kind = p_kind and g.problem is null);
  return v_run;
exception
  when check_violation or not_null_violation then
    raise exception 'record_backup: expected kind logical, base or verify, times in order and bytes of 0 or more, '
      'got %, % to %, % bytes'
      , coalesce(p_kind, 'null'), coalesce(to_json(p_started_at) #>> '{}', 'null')
      , coalesce(to_json(p_finished_at) #>> '{}', 'null'), coalesce(p_bytes::text, 'unknown')
      using errcode = 'invalid_parameter_value';
end $$;
comment on function orchestrator.record_backup(text, timestamptz, timestamptz, bigint, text, text) is
  'Records a backup or a verification: as failed if p_problem says why, else as good. Returns its number in backup_run';

-- A backup of another cluster, from which this database was restored by a dump, is none of this one.
create or replace function orchestrator.backups()
returns table (kind text, last_success timestamptz, last_run timestamptz, problem text, location text)
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select k.kind, g.finished_at, r.finished_at, r.problem, g.location
  from unnest(array['logical', 'base', 'verify']) as k (kind)
  left join lateral (
    select * from orchestrator.backup_run b
    where b.kind = k.kind and b.cluster is not distinct from orchestrator.this_cluster()
    order by b.run desc
    limit 1) r on true
  left join lateral (
    select * from orchestrator.backup_run b
    where b.kind = k.kind and b.cluster is not distinct from orchestrator.this_cluster() and b.problem is null
    order by b.run desc
    limit 1) g on true
  union all
  select 'wal', a.last_archived_time, greatest(a.last_archived_time, a.last_failed_time)
    , case
        when current_setting('archive_mode') <> 'off'
          and a.last_failed_time > coalesce(a.last_archived_time, '-infinity') then
          format('archive_command failed for %s, %s times since %s', a.last_failed_wal, a.failed_count
            , to_char(a.stats_reset at time zone 'UTC', 'YYYY-MM-DD HH24:MI UTC'))
      end
    , a.last_archived_wal
  from pg_stat_archiver a
$$;
comment on function orchestrator.backups() is
  'The last good backup of each kind (logical, base, verify, wal), and what went wrong with the last run. '
  'No row is missing: null says that there was none of this cluster';
