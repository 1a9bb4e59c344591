-- Keep a silent run from its idle timeout.
-- KEYS: 1 meta  2 run
-- ARGV: 1 writer
-- Replies: {'ok', status, reason, writer, last seq, last ms} | {'unknown_stream'} | {'unknown_run'} | {'fenced'}

local call = redis.call

if call('EXISTS', KEYS[1]) == 0 then return {'unknown_stream'} end
local held = call('HMGET', KEYS[2], 'status', 'reason', 'writer', 'last_seq', 'last_ms')
if not held[1] then return {'unknown_run'} end
if held[3] ~= ARGV[1] then return {'fenced'} end
if held[1] == 'open' then
  local time = call('TIME')
  call('HSET', KEYS[2], 'heard_ms', time[1] * 1000 + math.floor(time[2] / 1000))
end
return {'ok', held[1], held[2], held[3], held[4], held[5]}
