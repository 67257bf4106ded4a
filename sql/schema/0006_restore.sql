-- What a dump does not carry over to another cluster: rights, and the numbers of transactions.

alter table orchestrator.control add column cluster bigint;
comment on column orchestrator.control.cluster is 'System identifier of the cluster whose transactions rerouted_by and outbox.written_by name; null: not known yet';

create table orchestrator.granted
( object text primary key
, rights text[] not null
);
comment on table orchestrator.granted is 'What roles.sql granted when it was last applied, as rights() saw it: a dump brings this over even where it brings no rights';
comment on column orchestrator.granted.object is 'Its kind and name, such as function now()';
comment on column orchestrator.granted.rights is 'Who may do what, such as orchestrator_submit EXECUTE; public stands for everybody';
