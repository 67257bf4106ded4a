-- After a restore: rights that were not restored, numbers of transactions that mean nothing here, and what submissions need of a database.

-- Who may read a table may read its partitions, of which those that are retired stand alone; nobody needs more of one.
create or replace function orchestrator.rights() returns table (object text, rights text[])
language sql stable security definer set search_path = orchestrator, pg_temp as $$
  with held as (
    select 'schema ' || n.nspname as object, n.nspowner as owner, coalesce(n.nspacl, acldefault('n', n.nspowner)) as acl
    from pg_namespace n where n.nspname = 'orchestrator'
    union all
    select format('function %s(%s)', p.proname, pg_get_function_identity_arguments(p.oid)), p.proowner, coalesce(p.proacl, acldefault('f', p.proowner))
    from pg_proc p where p.pronamespace = 'orchestrator'::regnamespace
    union all
    select case c.relkind when 'S' then 'sequence ' when 'v' then 'view ' else 'table ' end || c.relname
      , c.relowner, coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner))
    from pg_class c
    where c.relnamespace = 'orchestrator'::regnamespace and c.relkind in ('r', 'p', 'v', 'S') and c.relname !~ '^(event|outcome)_p[0-9]{8}$'
    union all
    select 'partition ' || c.relname, c.relowner, c.relacl
    from pg_class c
    where c.relnamespace = 'orchestrator'::regnamespace and c.relkind = 'r' and c.relname ~ '^(event|outcome)_p[0-9]{8}$' and c.relacl is not null
    union all
    select format('column %s.%s', c.relname, a.attname), c.relowner, a.attacl
    from pg_class c join pg_attribute a on a.attrelid = c.oid
    where c.relnamespace = 'orchestrator'::regnamespace and a.attacl is not null and not a.attisdropped
  )
  select h.object, array(
    select coalesce(r.rolname, 'public') || ' ' || a.privilege_type
    from aclexplode(h.acl) a left join pg_roles r on r.oid = a.grantee
    where (a.grantee = 0 or r.rolname in ('orchestrator_submit', 'orchestrator_dispatch', 'orchestrator_ingest', 'orchestrator_ops', 'orchestrator_read'))
      and not (h.object ^@ 'partition ' and a.privilege_type = 'SELECT' and coalesce(r.rolname in ('orchestrator_ops', 'orchestrator_read'), false))
    union
    select 'owner ' || pg_get_userbyid(h.owner) where h.owner <> n.nspowner
    order by 1)
  from held h join pg_namespace n on n.nspname = 'orchestrator'
$$;
comment on function orchestrator.rights() is 'What everybody, and each role of this product, may do with each object of the schema; and whose it is, where it does not belong to who owns the schema';

create or replace function orchestrator.changed_rights() returns table (object text, lacking text[], foreign_rights text[])
language sql stable security definer set search_path = orchestrator, pg_temp as $$
  select r.object, array(select unnest(g.rights) except select unnest(r.rights)), array(select unnest(r.rights) except select unnest(g.rights))
  from orchestrator.rights() r
  left join orchestrator.granted g on g.object = r.object
  where r.rights <> coalesce(g.rights, '{}')
  order by r.object
$$;
comment on function orchestrator.changed_rights() is 'Objects whose rights are not as roles.sql left them, with those that are gone and those that somebody added; no row: all is as it was. migrate puts them right';

create or replace function orchestrator.staging_problem() returns text
language sql stable security definer set search_path = orchestrator, pg_temp as $$
  select format('user %1$s, who owns the schema, may not make temporary tables, which every submission needs; as the owner of the database: grant temporary on database %2$I to %1$I'
    , current_user, current_database())
  where not has_database_privilege(current_user, current_database(), 'temporary')
$$;
comment on function orchestrator.staging_problem() is 'Why nobody can submit, and what to do about it; null: they can';

-- Numbers of transactions rise for ever within a cluster, and begin anew in the next one: those that a dump brought along may lie far ahead.
-- The messages of before become the oldest, in the order of their own numbers: no transaction that is under way can write below the oldest one.
create or replace function orchestrator.repair_after_restore() returns bigint
language plpgsql security definer set search_path = orchestrator, pg_temp set enable_seqscan = off set lock_timeout = '80 ms' as $$
declare
  v_control orchestrator.control;
  v_cluster bigint;
  v_moved bigint;
begin
  begin
    select s.system_identifier into v_cluster from pg_control_system() s;
  exception when insufficient_privilege then
    null;
  end;
  -- What a statement sees of other transactions is below the end of its own snapshot.
  select * into v_control from orchestrator.control;
  if v_control.cluster is not distinct from v_cluster and v_control.rerouted_by >= pg_snapshot_xmax(pg_current_snapshot()) is not true
    and (select max(o.written_by) from orchestrator.outbox o where o.written_by is distinct from pg_current_xact_id_if_assigned())
      >= pg_snapshot_xmax(pg_current_snapshot()) is not true then
    return 0;
  end if;
  perform from orchestrator.control for update skip locked;
  if not found then
    return 0;
  end if;
  update orchestrator.outbox set written_by = pg_snapshot_xmin(pg_current_snapshot())
  where v_control.cluster <> v_cluster
    or written_by >= pg_snapshot_xmax(pg_current_snapshot()) and written_by is distinct from pg_current_xact_id_if_assigned();
  get diagnostics v_moved = row_count;
  update orchestrator.control c
  set cluster = v_cluster, marked_at = null, marked_writers = null, rerouted_writers = null, rerouted_by = case when c.rerouted_by is not null then pg_current_xact_id() end;
  return v_moved;
end $$;
comment on function orchestrator.repair_after_restore() is
  'In a database that came from another cluster: makes anew what depends on numbers of transactions. Called by run_maintenance(), and by the publisher of the outbox when it connects. Returns how many messages of the outbox it changed';
