-- Which topics events may be delivered to. submit_events() and schedule_event() ask here. Programs that
-- COPY check for themselves, and the dispatcher checks again before it delivers, so that the hot path
-- has nothing to look up. The twin of orchestrator/events/topics.py.

create or replace function orchestrator.configure_topics(p_ready text, p_own text[], p_allowed text[]) returns void
language sql security definer
set search_path = orchestrator, pg_temp
as $$
  update orchestrator.topic_rule
  set ready = p_ready, own = p_own, allowed = p_allowed
  where (ready, own, allowed) is distinct from (p_ready, p_own, p_allowed)
$$;
comment on function orchestrator.configure_topics(text, text[], text[]) is
  'Sets the ready topic, the deployment''s own topics, and the patterns (with *) of topics that events may be '
  'delivered to. Dispatchers call it when they start';

create or replace function orchestrator.topic_fault(p_delivery_type text, p_destination text) returns text
language sql stable security definer
set search_path = orchestrator, pg_temp
as $$
  select case
    when p_delivery_type <> 'KAFKA' or p_destination is null or p_destination = r.ready then null
    when n.name ^@ '__' then
      format('expected no topic of Kafka itself, whose names begin with __, got %s'
        , orchestrator.shown(p_destination, 249))
    when n.name in (select translate(o, '.', '_') from unnest(r.own) o) then
      format('expected no topic that this product reads or writes itself, got %s'
        , orchestrator.shown(p_destination, 249))
    when r.allowed = '{}' and n.name ~ '_(process-kafka-message|event_submissions)$' then
      format('expected no topic that other deployments read, got %s; KAFKA_ALLOW_TOPICS can allow it'
        , orchestrator.shown(p_destination, 249))
    when r.allowed = '{}' and not n.name ^@ '_' then null
    when not exists (
      select from unnest(r.allowed) a
      where orchestrator.matches(p_destination, a) and (n.name ^@ '_') <= (translate(a, '.', '_') ^@ '_')) then
      format('expected a topic that KAFKA_ALLOW_TOPICS (%s) allows, got %s; add it there'
        , coalesce(nullif(array_to_string(r.allowed, ','), ''), 'not set')
        , orchestrator.shown(p_destination, 249))
  end
  from orchestrator.topic_rule r
  -- Kafka treats . and _ in topic names as the same.
  cross join lateral (select translate(p_destination, '.', '_') as name) n
$$;
comment on function orchestrator.topic_fault(text, text) is
  'Why an event of this delivery_type must not be delivered to this topic; null: it may be';
