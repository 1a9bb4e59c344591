-- The run's end is to be delivered no more; retention has waited for it.
-- KEYS: 1 frames  2 meta  3 index  4 undelivered  5 run
-- ARGV: 1 run
-- Replies: 1, or 0 when there is no such run

local s = load_stream(KEYS[2])
if not s or call('EXISTS', KEYS[5]) == 0 then return 0 end
call('HSET', KEYS[5], 'deliver', 'done')
if call('ZREM', KEYS[4], ARGV[1]) == 0 then return 1 end
s.keep_from = tonumber(call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')[2])
if s.keep_from then
  call('HSET', KEYS[2], 'keep_from', s.keep_from)
else
  call('HDEL', KEYS[2], 'keep_from')
end
apply_retention(KEYS[1], KEYS[3], s)
save_stream(KEYS[2], s)
return 1
