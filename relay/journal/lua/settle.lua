-- Say which run the owner's claimed key led to.
-- KEYS: 1 claim
-- ARGV: 1 owner  2 stream  3 run
-- Replies: 1 when it was done, 0 when the claim is another's now

local held = redis.call('HMGET', KEYS[1], 'owner', 'keep_ms', 'stream')
if held[1] ~= ARGV[1] or held[3] then return 0 end
redis.call('HSET', KEYS[1], 'stream', ARGV[2], 'run', ARGV[3])
redis.call('PEXPIRE', KEYS[1], held[2])
return 1
