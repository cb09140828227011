-- Reads the API keys with the hashes $3 and $4, the invoice $2 of tenant $1 and its observations, as one row.
--
-- Unless $5 (an internal reader), the invoice is not looked up without a key that may read it, so that the time to
-- answer does not reveal whether it exists.
with recursive
granted as (
    select 1
    where $5 or exists (select 1 from api_keys
                        where secret_sha256 in ($3, $4) and (tenant_uid is null or tenant_uid = $1))
),
-- `cross join` checks the key first: SQLite would otherwise look the invoice up, and check the key only if it exists.
this as (
    select invoices.* from granted cross join invoices
    where tenant_uid = $1 and invoice_uid = $2
),
-- Objects and events in turn: each row is either an object or an event, and `union` visits each once. The work is
-- linear in the number of links. (From object to object, an event that names n payments would cost n * n.)
-- PostgreSQL cannot know how few rows a recursion brings, and would rather read whole tables than use an index so
-- often: each `offset 0` keeps the planner from reordering the steps.
walk (object_id, event_key) as (
    select stripe_invoice_id, null::bytea from this where stripe_invoice_id is not null
    union
    select next.object_id, next.event_key
    from walk cross join lateral (
        (select null::text collate "C" as object_id, event_key
         from mentions where mentions.object_id = walk.object_id offset 0)
        union all
        (select link.value collate "C", null
         from (select linked from events where events.key = walk.event_key offset 0) as event
         cross join lateral jsonb_array_elements_text(event.linked::jsonb) as link)
    ) as next
)
select (select json_agg(json_build_array(secret_sha256 is distinct from $3,
                                         json_build_array(id, tenant_uid, created_ms, expires_ms, revoked_ms)))::text
        from api_keys where secret_sha256 in ($3, $4)),
       document, stripe_invoice_id, imported_states, stored_ms, revision,
       -- One line per observation: the event key in hex, then JSON, which has no line breaks.
       (select string_agg(encode(key, 'hex') || telling, chr(10))
        from walk cross join lateral (
            select key, telling from events where events.key = walk.event_key and telling is not null offset 0) as event)
from (select 1 as always) as one left join this on true
