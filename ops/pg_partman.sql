-- Hands the partition sets event and outcome to pg_partman 5, which creates their partitions from then
-- on, or takes them back. For sites that manage all their partitions in one way; nothing here needs it.
-- pg_partman must be installed in schema partman. tests/drills/test_extensions.py has run this with 5.5.0 on
-- PostgreSQL 18.6, as Debian packages them.
--
--   psql -d DATABASE -f ops/pg_partman.sql
--   psql -d DATABASE -v back=1 -f ops/pg_partman.sql  # takes them back
--   select orchestrator.run_pg_partman();              # then every few minutes, by pg_cron or cron: below
--
-- Both directions are safe at any time: both name and bound partitions alike, so each goes on where the
-- other stopped. The script locks the parents for a moment. It waits for them no longer than two
-- seconds; then it fails, and can be run again.
--
-- run_maintenance() goes on retiring partitions. pg_partman must not: it knows no timers, would detach a
-- day whose events are still to be delivered, and holds a lock that everybody waits for while it looks.
-- So `retention` stays unset in its configuration. It also goes on creating those of delivered_batch, for
-- each day that event has.

\set ON_ERROR_STOP on

begin;
set local timezone = 'UTC';
set local lock_timeout = '2 s';

\if :{?back}

delete from partman.part_config where parent_table in ('orchestrator.event', 'orchestrator.outcome');
drop table if exists partman.template_orchestrator_event, partman.template_orchestrator_outcome;
drop function if exists orchestrator.run_pg_partman();
select orchestrator.hand_partitions_to('maintenance');

\else

-- pg_partman begins with the first day that has no partition. It creates no past days, and meets no
-- existing ones.
select p.parent, partman.create_parent(
    p_parent_table => 'orchestrator.' || p.parent
  , p_control => 'scheduled_at'
  , p_interval => '1 day'
  , p_premake => c.partition_days_ahead
  , p_start_partition => to_char(b.end_day, 'YYYY-MM-DD')
  , p_default_table => false
  , p_automatic_maintenance => 'off'
  , p_jobmon => false)
from unnest(array['event', 'outcome']) as p (parent), orchestrator.control c, orchestrator.partition_bounds() b;

-- infinite_time_partitions: it goes on even if nothing is scheduled for days.
update partman.part_config
set infinite_time_partitions = true, retention = null, retention_keep_table = true
where parent_table in ('orchestrator.event', 'orchestrator.outcome');

-- pg_partman's own schedule is off (automatic_maintenance), for two reasons. It creates days of the
-- session's time zone. And it counts the days ahead from the newest partition that has a row, not from
-- today: called each time, it would run ahead of the horizon for a year.
create or replace function orchestrator.run_pg_partman() returns void
language plpgsql
set timezone = 'UTC'
set lock_timeout = '2 s'
as $$
declare
  v_last constant date := orchestrator.now()::date + (select c.partition_days_ahead from orchestrator.control c);
  v_parent text;
begin
  -- Whoever changes partition_days_ahead means pg_partman, too.
  update partman.part_config set premake = c.partition_days_ahead
  from orchestrator.control c
  where parent_table in ('orchestrator.event', 'orchestrator.outcome') and premake <> c.partition_days_ahead;
  foreach v_parent in array array['event', 'outcome'] loop
    if to_regclass('orchestrator.' || orchestrator.partition_name(v_parent, v_last)) is null then
      perform partman.run_maintenance('orchestrator.' || v_parent, p_analyze => false);
    end if;
  end loop;
end $$;
comment on function orchestrator.run_pg_partman() is
  'Makes pg_partman create the missing partitions up to partition_days_ahead, in UTC. Created by ops/pg_partman.sql.';
revoke all on function orchestrator.run_pg_partman() from public;

select orchestrator.hand_partitions_to('pg_partman');

\endif

commit;

-- With pg_cron:
--   select cron.schedule('orchestrator partitions', '*/5 * * * *', 'select orchestrator.run_pg_partman()');
--   select cron.unschedule('orchestrator partitions');
