-- Names that programs of the version before call; gone with the next release.

create or replace function orchestrator.settle_restored() returns bigint
language sql security definer
set search_path = orchestrator, pg_temp
as $$ select orchestrator.repair_after_restore() $$;
comment on function orchestrator.settle_restored() is 'Former name of repair_after_restore()';

create or replace function orchestrator.keep_aside(p_limit integer default 100, out kept bigint, out waiting bigint)
language sql security definer
set search_path = orchestrator, pg_temp
as $$ select a.kept, a.waiting from orchestrator.submit_set_aside(p_limit) a $$;
comment on function orchestrator.keep_aside(integer) is 'Former name of submit_set_aside()';
