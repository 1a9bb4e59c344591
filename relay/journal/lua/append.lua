-- Journal a batch of one run's frames, and perhaps its ending, then apply retention and tell followers.
-- KEYS: 1 frames  2 meta  3 index  4 open  5 runs  6 run
-- ARGV: 1 run  2 writer  3 producer seq of the first event  4 text bytes  5 dialect  6 channel
--       7 ending status (or empty)  8 reason  9 error  10 error as JSON (or empty)  11 answer (or empty)
--       12 seq and 13 ms of the newest frame that the writer knows  14 1 if the last event is relay's own, of
--       the ending  15… event, data, …
-- Replies: {'ok', last seq, last ms, appended, duplicates, next seq, resume token to renew (or empty), its ms,
--           owner, delivery (both only of a run that has ended)}
--          | {'rewound', last seq} | {'unknown_stream'} | {'unknown_run'} | {'fenced'} | {'sequence_gap', expected}
--          | {'run_ended', status, reason}

local frames, meta, index, open, runs, run = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

local s = load_stream(meta)
local held = s and call('HMGET', run, 'status', 'writer', 'frames', 'text_bytes', 'reason', 'dialect', 'last_seq',
  'last_ms')
local status = held and held[1]
local last_seq, last_ms = 0, 0
if status then last_seq, last_ms = tonumber(held[7]), tonumber(held[8]) end
local known_seq = tonumber(ARGV[12])
if last_seq < known_seq or (last_seq == known_seq and last_ms < tonumber(ARGV[13])) then
  return {'rewound', last_seq}
end
if not s then return {'unknown_stream'} end
if not status then return {'unknown_run'} end
if held[2] ~= ARGV[2] then return {'fenced'} end
local count, producer_seq, own = tonumber(held[3]), tonumber(ARGV[3]), tonumber(ARGV[14])
local given = (#ARGV - 14) / 2 - own
local duplicates = 0
if producer_seq > 0 then
  if producer_seq > count + 1 then return {'sequence_gap', count + 1} end
  duplicates = math.min(count + 1 - producer_seq, given)
end
local fresh = given - duplicates
local ends = ARGV[7] ~= ''
-- A writer says its dialect with every batch; writing it each time would be one more command per append.
local names_dialect = ARGV[5] ~= '' and ARGV[5] ~= held[6]
if status ~= 'open' then
  if fresh > 0 or (ends and not (ARGV[7] == status and ARGV[8] == held[5])) then
    return {'run_ended', status, held[5]}
  end
  return {'ok', last_seq, last_ms, 0, duplicates, count + 1, '', 0, unpack(call('HMGET', run, 'owner', 'deliver'))}
end
if fresh == 0 and not ends then
  if ARGV[11] ~= '' then call('HSET', run, 'answer', ARGV[11]) end
  if names_dialect then call('HSET', run, 'dialect', ARGV[5]) end
  call('HSET', run, 'heard_ms', clock_ms())
  return {'ok', last_seq, last_ms, 0, duplicates, count + 1, ''}
end

count = count + fresh
local text_bytes = tonumber(held[4])
-- What of the text was in the duplicates is not known here; it is taken to be spread evenly.
if fresh > 0 then text_bytes = text_bytes + math.floor(tonumber(ARGV[4]) * fresh / given) end

local message = {0, 0, 0}
local n = 3
for i = 15 + 2 * duplicates, #ARGV, 2 do
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

local owner, delivery
if ends then
  call('HSET', run, 'status', ARGV[7], 'frames', count, 'text_bytes', text_bytes, 'reason', ARGV[8],
    'last_seq', s.last_seq, 'last_ms', s.last_ms, 'error', ARGV[9], 'ended_ms', s.last_ms)
  call('HINCRBY', run, 'extra', own + 1)
  if fresh + own > 0 then call('HSET', run, 'last_data', s.last_data) end
  owner, delivery = unpack(call('HMGET', run, 'owner', 'deliver'))
  call('ZREM', open, ARGV[1])
else
  call('HSET', run, 'frames', count, 'text_bytes', text_bytes,
    'last_seq', s.last_seq, 'last_ms', s.last_ms, 'last_data', s.last_data)
end
if names_dialect then call('HSET', run, 'dialect', ARGV[5]) end
if ARGV[11] ~= '' then call('HSET', run, 'answer', ARGV[11]) end
apply_retention(frames, index, s)
local token = ''
if renew(s, now, frames, meta, index, open, runs, string.sub(run, 1, #run - #ARGV[1])) then
  token = call('HGET', run, 'token')
end
save_stream(meta, s)
call('PUBLISH', ARGV[6], cmsgpack.pack(message))
return {'ok', s.last_seq, s.last_ms, fresh, duplicates, count + 1, token, s.retention_ms, owner, delivery}
