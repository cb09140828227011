-- Reads the observations of each object in the JSON array $1, one row per object.
-- `walk` as in invoice_with_observations.sql.
with recursive walk (root, object_id, event_key) as (
    select ids.value, ids.value, null::bytea
    from (select value collate "C" from jsonb_array_elements_text($1::jsonb)) as ids
    union
    select walk.root, next.object_id, next.event_key
    from walk cross join lateral (
        (select null::text collate "C" as object_id, event_key
         from mentions where mentions.object_id = walk.object_id offset 0)
        union all
        (select link.value collate "C", null
         from (select linked from events where events.key = walk.event_key offset 0) as event
         cross join lateral jsonb_array_elements_text(event.linked::jsonb) as link)
    ) as next
)
select root, string_agg(encode(key, 'hex') || telling, chr(10))
from walk cross join lateral (
    select key, telling from events where events.key = walk.event_key and telling is not null offset 0) as event
group by root
