-- Give a run another writer, and nobody for its owner.
-- KEYS: 1 meta  2 run
-- ARGV: 1 stream  2 run  3 prefix of owners' channels  4 writer  5 idle_ms of a run that had an owner
-- Replies: {'ok', next seq, last seq, last ms, former owner} | {'unknown_stream'} | {'unknown_run'}
--          | {'run_ended', status, reason}

local call = redis.call

if call('EXISTS', KEYS[1]) == 0 then return {'unknown_stream'} end
local held = call('HMGET', KEYS[2], 'status', 'reason', 'owner', 'frames', 'last_seq', 'last_ms')
if not held[1] then return {'unknown_run'} end
if held[1] ~= 'open' then return {'run_ended', held[1], held[2]} end
local time = call('TIME')
call('HSET', KEYS[2], 'writer', ARGV[4], 'owner', '', 'heard_ms', time[1] * 1000 + math.floor(time[2] / 1000))
if held[3] ~= '' then
  call('HSET', KEYS[2], 'idle_ms', ARGV[5])
  call('PUBLISH', ARGV[3] .. held[3], ARGV[1] .. ' ' .. ARGV[2])
end
return {'ok', held[4] + 1, tonumber(held[5]), tonumber(held[6]), held[3]}
