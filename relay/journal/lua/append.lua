-- Journal a batch of one run's frames, and perhaps its ending, then apply retention and tell followers.
-- KEYS: 1 frames  2 meta  3 index  4 open  5 runs  6 run
-- ARGV: 1 packed (an argument costs more than a packed value): {run, writer, producer seq of the first event,
--       text bytes, dialect, channel, ending status (or empty), reason, error, error as JSON (or empty), answer
--       (or empty), seq and ms of the newest frame that the writer knows, 1 if the last event is relay's own, of
--       the ending}
--       2 packed, as followers get it but for the three zeros: {0, 0, 0, run, event, data, run, event, data, …}
-- Replies: {'ok', last seq, last ms, appended, duplicates, next seq, resume token to renew (or empty), its ms,
--           owner, delivery (both only of a run that has ended)}
--          | {'rewound', last seq} | {'unknown_stream'} | {'unknown_run'} | {'fenced'} | {'sequence_gap', expected}
--          | {'run_ended', status, reason}

local frames, meta, index, open, runs, run = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local name, writer, producer_seq, given_text_bytes, dialect, channel, ending, reason, error_text, error_json, answer,
  known_seq, known_ms, own = unpack(cmsgpack.unpack(ARGV[1]))

local s = load_stream(meta)
local held = s and call('HMGET', run, 'status', 'writer', 'frames', 'text_bytes', 'reason', 'dialect', 'last_seq',
  'last_ms')
local status = held and held[1]
local last_seq, last_ms = 0, 0
if status then last_seq, last_ms = tonumber(held[7]), tonumber(held[8]) end
if last_seq < known_seq or (last_seq == known_seq and last_ms < known_ms) then
  return {'rewound', last_seq}
end
if not s then return {'unknown_stream'} end
if not status then return {'unknown_run'} end
if held[2] ~= writer then return {'fenced'} end
local message = cmsgpack.unpack(ARGV[2])
local n = #message
local count, given = tonumber(held[3]), (n - 3) / 3 - own
local duplicates = 0
if producer_seq > 0 then
  if producer_seq > count + 1 then return {'sequence_gap', count + 1} end
  duplicates = math.min(count + 1 - producer_seq, given)
end
local fresh = given - duplicates
local ends = ending ~= ''
-- A writer says its dialect with every batch; writing it each time would be one more command per append.
local names_dialect = dialect ~= '' and dialect ~= held[6]
if status ~= 'open' then
  if fresh > 0 or (ends and not (ending == status and reason == held[5])) then
    return {'run_ended', status, held[5]}
  end
  return {'ok', last_seq, last_ms, 0, duplicates, count + 1, '', 0, unpack(call('HMGET', run, 'owner', 'deliver'))}
end
if fresh == 0 and not ends then
  if answer ~= '' then call('HSET', run, 'answer', answer) end
  if names_dialect then call('HSET', run, 'dialect', dialect) end
  call('HSET', run, 'heard_ms', clock_ms())
  return {'ok', last_seq, last_ms, 0, duplicates, count + 1, ''}
end

count = count + fresh
local text_bytes = tonumber(held[4])
-- What of the text was in the duplicates is not known here; it is taken to be spread evenly.
if fresh > 0 then text_bytes = text_bytes + math.floor(given_text_bytes * fresh / given) end

local as_given = duplicates == 0 and not ends
if duplicates > 0 then
  local kept = {0, 0, 0}
  for i = 4 + 3 * duplicates, n do kept[#kept + 1] = message[i] end
  message, n = kept, #kept
end
if ends then
  local failure = ''
  if error_json ~= '' then failure = ',"error":' .. error_json end
  message[n + 1], message[n + 2] = name, 'relay'
  message[n + 3] = string.format('{"type":"run.ended","run":"%s","status":"%s","reason":"%s"', name, ending,
    reason) .. failure .. string.format(',"frames":%d,"text_bytes":%d}', count, text_bytes)
end

local now = clock_ms()
local refusal = add_frames(frames, index, s, now, message)
if refusal then return refusal end

local owner, delivery
if ends then
  call('HSET', run, 'status', ending, 'frames', count, 'text_bytes', text_bytes, 'reason', reason,
    'last_seq', s.last_seq, 'last_ms', s.last_ms, 'error', error_text, 'ended_ms', s.last_ms)
  call('HINCRBY', run, 'extra', own + 1)
  if fresh + own > 0 then call('HSET', run, 'last_data', s.last_data) end
  owner, delivery = unpack(call('HMGET', run, 'owner', 'deliver'))
  call('ZREM', open, name)
else
  call('HSET', run, 'frames', count, 'text_bytes', text_bytes,
    'last_seq', s.last_seq, 'last_ms', s.last_ms, 'last_data', s.last_data)
end
if names_dialect then call('HSET', run, 'dialect', dialect) end
if answer ~= '' then call('HSET', run, 'answer', answer) end
apply_retention(frames, index, s)
local token = ''
if renew(s, now, frames, meta, index, open, runs, string.sub(run, 1, #run - #name)) then
  token = call('HGET', run, 'token')
end
save_stream(meta, s)
if as_given then
  -- The zeros stand behind the head of the array and take a byte each.
  local head = n < 16 and 1 or n < 65536 and 3 or 5
  call('PUBLISH', channel, string.sub(ARGV[2], 1, head) .. cmsgpack.pack(message[1], message[2], message[3])
    .. string.sub(ARGV[2], head + 4))
else
  call('PUBLISH', channel, cmsgpack.pack(message))
end
return {'ok', s.last_seq, s.last_ms, fresh, duplicates, count + 1, token, s.retention_ms, owner, delivery}
