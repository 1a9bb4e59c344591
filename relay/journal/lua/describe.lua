-- What a stream is now.
-- KEYS: 1 meta  2 open  3 runs
-- Replies: {meta as HGETALL, open runs, number of runs}; an empty array when there is no stream

local meta = redis.call('HGETALL', KEYS[1])
if #meta == 0 then return {} end
return {meta, redis.call('ZRANGE', KEYS[2], 0, -1), redis.call('ZCARD', KEYS[3])}
