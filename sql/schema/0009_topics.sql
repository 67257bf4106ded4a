-- Which topics events may be delivered to, so that what is submitted from psql is refused as what comes over HTTP is.

create table orchestrator.topic_rule (
  one boolean primary key default true check (one)
, ready text
, own text[] not null
, allowed text[] not null
);
comment on table orchestrator.topic_rule is 'One row: the topics of this deployment, and those that events may be delivered to. Kept by configure_topics()';
comment on column orchestrator.topic_rule.one is 'There is but one row';
comment on column orchestrator.topic_rule.ready is 'Where KAFKA events without a destination go; null: no dispatcher with Kafka has started yet';
comment on column orchestrator.topic_rule.own is 'Topics that this deployment reads, or writes other than by deliveries';
comment on column orchestrator.topic_rule.allowed is 'KAFKA_ALLOW_TOPICS: patterns with * for any characters; none: all that are not read elsewhere';
insert into orchestrator.topic_rule (own, allowed) values ('{}', '{}');
