-- The members of an index whose time has come, earliest first.
-- KEYS: 1 index
-- ARGV: 1 how many  2 for how many ms nobody else is to get them, 0 to leave their time
-- Replies: the members

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
if tonumber(ARGV[2]) > 0 then
  for i = 1, #due do redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), due[i]) end
end
return due
