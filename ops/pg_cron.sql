-- Makes pg_cron (1.4 or newer) call run_maintenance() every minute, for installations where neither
-- `orchestrator run` nor `orchestrator maintain` does. Run it in the database that cron.database_name
-- names, as the schema's owner:
--
--   psql -d DATABASE -f ops/pg_cron.sql
--   psql -d DATABASE -v back=1 -f ops/pg_cron.sql     # undoes it
--
-- If the orchestrator uses another database, name it: -v database=NAME. Set retention in SQL then:
--
--   select orchestrator.configure_retention(p_retention_days => 30, p_partition_days_ahead => 30);
--
-- tests/drills/test_extensions.py has run this with pg_cron 1.6.8 on PostgreSQL 18.6, as Debian packages
-- them.
--
-- pg_cron cannot write files: to archive days before they are dropped, run `orchestrator maintain`
-- somewhere.

\set ON_ERROR_STOP on
\if :{?database}
\else
  select current_database() as database \gset
\endif

begin;
\if :{?back}
select cron.unschedule(j.jobname) from cron.job j
where j.jobname in ('orchestrator maintenance', 'orchestrator log of cron');
\else
-- One statement, so that it is a transaction of its own. pg_cron never runs it twice at once, and
-- run_maintenance() takes a lock of its own. The next call does what one call leaves over.
select cron.schedule_in_database('orchestrator maintenance', '* * * * *'
  , 'select orchestrator.run_maintenance()', :'database');
-- pg_cron keeps a row of each run forever: this deletes those that are older than three days.
select cron.schedule('orchestrator log of cron', '17 3 * * *', $$
  delete from cron.job_run_details d using cron.job j
  where j.jobid = d.jobid and j.jobname like 'orchestrator %' and d.end_time < now() - interval '3 days' $$);
\endif
commit;

-- To see how it is doing: select * from orchestrator.maintenance_run order by run desc limit 10, or
-- orchestrator doctor.
