-- Let a stream take no further run.
-- KEYS: 1 meta
-- ARGV: 1 channel  2 what tells followers
-- Replies: {'ok'} | {'unknown_stream'}

local sealed = redis.call('HGET', KEYS[1], 'sealed')
if not sealed then return {'unknown_stream'} end
if sealed ~= '1' then redis.call('HSET', KEYS[1], 'sealed', 1) end
redis.call('PUBLISH', ARGV[1], ARGV[2])
return {'ok'}
