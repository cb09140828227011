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
-- SQLite would rather read whole tables: `cross join` keeps the order.
walk (object_id, event_key) as (
    select stripe_invoice_id, null from this where stripe_invoice_id is not null
    union
    select null, mentions.event_key
    from walk cross join mentions on mentions.object_id = walk.object_id
    union
    select link.value, null
    from walk cross join events on events.key = walk.event_key cross join json_each(events.linked) as link
)
select (select json_group_array(json_array(json(iif(secret_sha256 = $3, 'false', 'true')),
                                           json_array(id, tenant_uid, created_ms, expires_ms, revoked_ms)))
        from api_keys where secret_sha256 in ($3, $4)),
       document, stripe_invoice_id, imported_states, stored_ms, revision,
       -- One line per observation: the event key in hex, then JSON, which has no line breaks.
       (select group_concat(hex(key) || telling, char(10))
        from walk cross join events on key = event_key and telling is not null)
from (select 1 as always) as one left join this on true
