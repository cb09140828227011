-- Reads the observations of all objects in the JSON array $1 together, as one row: no observation comes twice.
-- `walk` as in invoice_with_observations.sql.
with recursive walk (root, object_id, event_key) as (
    select '', ids.value, null from json_each($1) as ids
    union
    select walk.root, null, mentions.event_key
    from walk cross join mentions on mentions.object_id = walk.object_id
    union
    select walk.root, link.value, null
    from walk cross join events on events.key = walk.event_key cross join json_each(events.linked) as link
)
select root, group_concat(hex(key) || telling, char(10))
from walk cross join events on key = event_key and telling is not null
group by root
