-- Remove a stream; what stays for a day is the last ms, which the next life of the stream must exceed.
-- KEYS: 1 frames  2 meta  3 index  4 open  5 runs  6 tombstone
-- ARGV: 1 prefix of run keys  2 channel  3 how long the tombstone stays, in ms
-- Replies: the resume tokens of its runs

local last_ms = redis.call('HGET', KEYS[2], 'last_ms')
if not last_ms then return {} end
local tokens = {}
local runs = redis.call('ZRANGE', KEYS[5], 0, -1)
for i = 1, #runs do
  local run = ARGV[1] .. runs[i]
  local token = redis.call('HGET', run, 'token')
  if token then tokens[#tokens + 1] = token end
  redis.call('UNLINK', run)
end
redis.call('SET', KEYS[6], last_ms, 'PX', ARGV[3])
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5])
redis.call('PUBLISH', ARGV[2], '')
return tokens
