-- Journal a batch of one run's frames, and perhaps its ending, then apply retention and tell followers.
-- KEYS: 1 frames  2 meta  3 index  4 open  5 runs  6 run
-- ARGV: 1 run  2 writer  3 producer seq of the first event  4 text bytes  5 dialect  6 channel
--       7 ending status (or empty)  8 reason  9 error  10 error as JSON (or empty)  11… event, data, …
-- Replies: {'ok', last seq, last ms, appended, duplicates, next seq, resume token to renew (or empty), its ms}
--          | {'unknown_stream'} | {'unknown_run'} | {'fenced'} | {'sequence_gap', expected}
--          | {'run_ended', status, reason}

local frames, meta, index, open, runs, run = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

local s = load_stream(meta)
if not s then return {'unknown_stream'} end
local held = call('HMGET', run, 'status', 'writer', 'frames', 'text_bytes', 'reason', 'dialect')
local status, reason = held[1], held[5]
if not status then return {'unknown_run'} end
if held[2] ~= ARGV[2] then return {'fenced'} end
local count = tonumber(held[3])
local given = (#ARGV - 10) / 2
local skip = count + 1 - tonumber(ARGV[3])
if skip < 0 then return {'sequence_gap', count + 1} end
local duplicates = math.min(skip, given)
local fresh = given - duplicates
local ends = ARGV[7] ~= ''
-- A writer says its dialect with every batch; writing it each time would be one more command per append.
local names_dialect = ARGV[5] ~= '' and ARGV[5] ~= held[6]
if status ~= 'open' then
  if fresh > 0 or (ends and not (ARGV[7] == status and ARGV[8] == reason)) then
    return {'run_ended', status, reason}
  end
  return {'ok', s.last_seq, s.last_ms, 0, duplicates, count + 1, ''}
end
if fresh == 0 and not ends then
  if names_dialect then call('HSET', run, 'dialect', ARGV[5]) end
  return {'ok', s.last_seq, s.last_ms, 0, duplicates, count + 1, ''}
end

count = count + fresh
local text_bytes = tonumber(held[4])
-- What of the text was in the duplicates is not known here; it is taken to be spread evenly.
if fresh > 0 then text_bytes = text_bytes + math.floor(tonumber(ARGV[4]) * fresh / given) end

local message = {0, 0, 0}
local n = 3
for i = 11 + 2 * duplicates, #ARGV, 2 do
  message[n + 1], message[n + 2], message[n + 3] = ARGV[1], ARGV[i], ARGV[i + 1]
  n = n + 3
end
if ends then
  local failure = ''
  if ARGV[10] ~= '' then failure = ',"error":' .. ARGV[10] end
  message[n + 1], message[n + 2] = ARGV[1], 'relay'
  message[n + 3] = string.format('{"type":"run.ended","run":"%s","status":"%s","reason":"%s"', ARGV[1],
    ARGV[7], ARGV[8]) .. failure .. string.format(',"frames":%d,"text_bytes":%d}', count, text_bytes)
end

local now = clock_ms()
local refusal = add_frames(frames, index, s, now, message)
if refusal then return refusal end

if ends then
  call('HSET', run, 'status', ARGV[7], 'frames', count, 'text_bytes', text_bytes, 'reason', ARGV[8],
    'last_seq', s.last_seq, 'last_ms', s.last_ms, 'error', ARGV[9], 'ended_ms', s.last_ms)
  if fresh > 0 then call('HSET', run, 'last_data', s.last_data) end
  call('ZREM', open, ARGV[1])
else
  call('HSET', run, 'frames', count, 'text_bytes', text_bytes,
    'last_seq', s.last_seq, 'last_ms', s.last_ms, 'last_data', s.last_data)
end
if names_dialect then call('HSET', run, 'dialect', ARGV[5]) end
apply_retention(frames, index, s)
local token = ''
if renew(s, now, frames, meta, index, open, runs, string.sub(run, 1, #run - #ARGV[1])) then
  token = call('HGET', run, 'token')
end
save_stream(meta, s)
call('PUBLISH', ARGV[6], cmsgpack.pack(message))
return {'ok', s.last_seq, s.last_ms, fresh, duplicates, count + 1, token, s.retention_ms}
