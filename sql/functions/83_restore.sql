-- After a restore: rights that were not restored, transaction numbers that mean nothing in this cluster,
-- and what submissions need of a database.

-- Whoever may read a table may read its partitions, of which retired ones are tables of their own.
-- Nobody needs any other right on a partition.
create or replace function orchestrator.rights() returns table (object text, rights text[])
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  with held as (
    select 'schema ' || n.nspname as object, n.nspowner as owner
      , coalesce(n.nspacl, acldefault('n', n.nspowner)) as acl
    from pg_namespace n
    where n.nspname = 'orchestrator'
    union all
    select format('function %s(%s)', p.proname, pg_get_function_identity_arguments(p.oid)), p.proowner
      , coalesce(p.proacl, acldefault('f', p.proowner))
    from pg_proc p
    where p.pronamespace = 'orchestrator'::regnamespace
    union all
    select case c.relkind when 'S' then 'sequence ' when 'v' then 'view ' else 'table ' end || c.relname, c.relowner
      , coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner))
    from pg_class c
    where c.relnamespace = 'orchestrator'::regnamespace and c.relkind in ('r', 'p', 'v', 'S')
      and c.relname !~ '^(event|outcome|delivered_batch)_p[0-9]{8}$'
    union all
    select 'partition ' || c.relname, c.relowner, c.relacl
    from pg_class c
    where c.relnamespace = 'orchestrator'::regnamespace and c.relkind = 'r'
      and c.relname ~ '^(event|outcome|delivered_batch)_p[0-9]{8}$' and c.relacl is not null
    union all
    select 'type ' || c.relname, c.relowner, null
    from pg_class c
    where c.relnamespace = 'orchestrator'::regnamespace and c.relkind = 'c'
    union all
    select format('column %s.%s', c.relname, a.attname), c.relowner, a.attacl
    from pg_class c join pg_attribute a on a.attrelid = c.oid
    where c.relnamespace = 'orchestrator'::regnamespace and a.attacl is not null and not a.attisdropped
  )
  select h.object, array(
    select coalesce(r.rolname, 'public') || ' ' || a.privilege_type
    from aclexplode(h.acl) a
    left join pg_roles r on r.oid = a.grantee
    where (a.grantee = 0
        or r.rolname in ('orchestrator_submit', 'orchestrator_dispatch', 'orchestrator_ingest'
          , 'orchestrator_ops', 'orchestrator_read'))
      and not (h.object ^@ 'partition ' and a.privilege_type = 'SELECT'
        and coalesce(r.rolname in ('orchestrator_ops', 'orchestrator_read'), false))
    union
    select 'owner ' || pg_get_userbyid(h.owner) where h.owner <> n.nspowner
    order by 1)
  from held h
  join pg_namespace n on n.nspname = 'orchestrator'
$$;
comment on function orchestrator.rights() is
  'What everybody, and each role of this product, may do with each object of the schema. '
  'It names the owner of an object that is not the schema''s';

create or replace function orchestrator.changed_rights()
returns table (object text, lacking text[], foreign_rights text[])
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select r.object
    , array(select unnest(g.rights) except select unnest(r.rights))
    , array(select unnest(r.rights) except select unnest(g.rights))
  from orchestrator.rights() r
  left join orchestrator.granted g on g.object = r.object
  where r.rights <> coalesce(g.rights, '{}')
  order by r.object
$$;
comment on function orchestrator.changed_rights() is
  'Objects whose rights differ from what roles.sql granted, with the rights that are missing and those that were '
  'added. migrate restores them';

create or replace function orchestrator.staging_problem() returns text
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select format('user %1$s, who owns the schema, may not make temporary tables, which every submission needs; '
      'as the owner of the database: grant temporary on database %2$I to %1$I'
    , current_user, current_database())
  where not has_database_privilege(current_user, current_database(), 'temporary')
$$;
comment on function orchestrator.staging_problem() is
  'Why nobody can submit, and what to do about it; null: submissions are possible';

create or replace function orchestrator.this_cluster() returns bigint
language plpgsql stable security definer
set search_path = orchestrator, pg_temp
as $$
begin
  return (select s.system_identifier from pg_control_system() s);
exception when insufficient_privilege then
  return null;
end $$;
comment on function orchestrator.this_cluster() is
  'Returns the system identifier, which a physical backup brings along and a dump does not. '
  'Null: the owner of the schema may not read it';

-- Transaction numbers only rise within a cluster, and start again in another. Those that a dump brought
-- along may lie far ahead. Messages with such numbers become the oldest ones, and keep their own order:
-- no running transaction can write a message below the oldest number.
create or replace function orchestrator.repair_after_restore() returns bigint
language plpgsql security definer
set search_path = orchestrator, pg_temp
set lock_timeout = '80 ms'
set enable_seqscan = off
as $$
declare
  v_control orchestrator.control;
  v_cluster constant bigint := orchestrator.this_cluster();
  v_moved bigint;
begin
  -- Every number that a statement sees of other transactions is below the end of its own snapshot.
  select * into v_control from orchestrator.newest_control();
  if v_control.cluster is not distinct from v_cluster
    and v_control.rerouted_by >= pg_snapshot_xmax(pg_current_snapshot()) is not true
    and (
      select max(o.written_by) from orchestrator.outbox o
      where o.written_by is distinct from pg_current_xact_id_if_assigned())
    >= pg_snapshot_xmax(pg_current_snapshot()) is not true then
    return 0;
  end if;
  perform from orchestrator.control for update skip locked;
  if not found then
    return 0;
  end if;
  update orchestrator.outbox set written_by = pg_snapshot_xmin(pg_current_snapshot())
  where v_control.cluster <> v_cluster
    or written_by >= pg_snapshot_xmax(pg_current_snapshot())
      and written_by is distinct from pg_current_xact_id_if_assigned();
  get diagnostics v_moved = row_count;
  update orchestrator.control c
  set cluster = v_cluster, marked_at = null, marked_writers = null, rerouted_writers = null
    , rerouted_by = case when c.rerouted_by is not null then pg_current_xact_id() end;
  return v_moved;
end $$;
comment on function orchestrator.repair_after_restore() is
  'In a database restored from another cluster: replaces transaction numbers that mean nothing here. '
  'Returns how many outbox messages it changed; maintenance and the outbox''s publisher call it';
