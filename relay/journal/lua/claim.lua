-- Claim an idempotency key, or renew the owner's own claim.
-- KEYS: 1 claim
-- ARGV: 1 body digest  2 owner  3 lease in ms  4 how long a settled claim is kept, in ms
-- Replies: {'won'} | {'pending'} | {'settled', stream, run} | {'mismatch'}

local held = redis.call('HMGET', KEYS[1], 'digest', 'owner', 'stream', 'run', 'leased_until')
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local settled = held[3]
if held[1] and (settled or now < tonumber(held[5])) then
  if held[1] ~= ARGV[1] then return {'mismatch'} end
  if settled then return {'settled', held[3], held[4]} end
  if held[2] ~= ARGV[2] then return {'pending'} end
end
redis.call('HSET', KEYS[1], 'digest', ARGV[1], 'owner', ARGV[2], 'leased_until', now + tonumber(ARGV[3]),
  'keep_ms', ARGV[4])
redis.call('PEXPIRE', KEYS[1], math.max(tonumber(ARGV[3]), tonumber(ARGV[4])))
return {'won'}
