-- The runs of a stream in the order they were opened.
-- KEYS: 1 meta  2 runs
-- ARGV: 1 run to begin after (or empty)  2 how many  3 prefix of run keys
-- Replies: {'ok', run, its HGETALL, run, its HGETALL, …} | {'unknown_stream'} | {'unknown_run'}

if redis.call('EXISTS', KEYS[1]) == 0 then return {'unknown_stream'} end
local first = 0
if ARGV[1] ~= '' then
  local rank = redis.call('ZRANK', KEYS[2], ARGV[1])
  if not rank then return {'unknown_run'} end
  first = rank + 1
end
local reply = {'ok'}
for _, run in ipairs(redis.call('ZRANGE', KEYS[2], first, first + ARGV[2] - 1)) do
  reply[#reply + 1] = run
  reply[#reply + 1] = redis.call('HGETALL', ARGV[3] .. run)
end
return reply
