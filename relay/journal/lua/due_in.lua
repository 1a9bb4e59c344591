-- Put a member into an index of times.
-- KEYS: 1 index
-- ARGV: 1 member  2 in how many ms  3 LT: only to make it sooner; CH: in any case
-- Replies: whatever ZADD does

local time = redis.call('TIME')
local at = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[2])
return redis.call('ZADD', KEYS[1], ARGV[3], at, ARGV[1])
