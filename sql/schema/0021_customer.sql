-- Whose database this is. One image serves many customers, and one wrong variable would mix two of them.

create table orchestrator.customer (
  one boolean primary key default true check (one)
, name text not null
, recorded_at timestamptz not null default clock_timestamp()
);
comment on table orchestrator.customer is
  'One row: the customer whose events are here; none: not recorded. Kept by set_customer()';
comment on column orchestrator.customer.one is 'There is but one row';
comment on column orchestrator.customer.name is 'CUSTOMER_NAME of the processes that may work here';
comment on column orchestrator.customer.recorded_at is 'When migrate or an operator recorded it';
