-- Whose database this is. migrate records CUSTOMER_NAME, and a process of another customer does not start.

create or replace function orchestrator.customer() returns text
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select c.name from orchestrator.customer c
$$;
comment on function orchestrator.customer() is
  'Returns the customer whose events are in this database; null: it is not recorded';

create or replace function orchestrator.set_customer(p_name text) returns void
language sql security definer
set search_path = orchestrator, pg_temp
as $$
  delete from orchestrator.customer;
  insert into orchestrator.customer (name) select p_name where p_name is not null
$$;
comment on function orchestrator.set_customer(text) is
  'Hands this database to another customer, as after a copy of it was restored. null: any may use it';
