-- Give up the owner's pending claim.
-- KEYS: 1 claim
-- ARGV: 1 owner
-- Replies: 1 when it was given up, 0 when it was not the owner's or is settled

local held = redis.call('HMGET', KEYS[1], 'owner', 'stream')
if held[1] ~= ARGV[1] or held[2] then return 0 end
return redis.call('UNLINK', KEYS[1])
