-- Count a try that failed.
-- KEYS: 1 run
-- Replies: 1, or 0 when nothing is to be delivered

if redis.call('HGET', KEYS[1], 'deliver') ~= 'pending' then return 0 end
redis.call('HINCRBY', KEYS[1], 'tries', 1)
return 1
