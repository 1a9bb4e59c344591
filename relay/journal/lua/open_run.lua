-- Open a run and journal its run.started; create the stream if there is none.
-- KEYS: 1 frames  2 meta  3 index  4 open  5 runs  6 run  7 tombstone
-- ARGV: 1 run  2 writer  3 token  4 dialect  5 metadata  6 answer  7 channel  8 data of run.started
--       9 max_frames  10 max_bytes  11 retention_ms  12 seal (1 or 0)
-- Replies: {'ok', start seq, start ms, first seq, first ms} | {'run_exists'} | {'stream_sealed'}

local frames, meta, index, open, runs, run = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

local known = call('HMGET', run, 'writer', 'start_seq', 'start_ms', 'first_seq', 'first_ms')
if known[1] then
  if known[1] ~= ARGV[2] then return {'run_exists'} end
  return {'ok', tonumber(known[2]), tonumber(known[3]), tonumber(known[4]), tonumber(known[5])}
end

local now = clock_ms()
local s = load_stream(meta)
if s then
  if call('HGET', meta, 'sealed') == '1' then return {'stream_sealed'} end
else
  local former_ms = tonumber(call('GET', KEYS[7]) or -1)
  s = {
    new = true, rarely_changed = true, created = math.max(now, former_ms + 1), last_seq = 0, last_ms = 0, earliest = 1, bytes = 0,
    trimmed = 0, indexed = 0, largest = 0, last_data = 0, renewed = 0,
    max_frames = tonumber(ARGV[9]), max_bytes = tonumber(ARGV[10]), retention_ms = tonumber(ARGV[11]),
  }
end

local message = {0, 0, 0, ARGV[1], 'relay', ARGV[8]}
local refusal = add_frames(frames, index, s, now, message)
if refusal then return refusal end

local first_seq, first_ms = s.last_seq, s.last_ms
call('HSET', run, 'status', 'open', 'writer', ARGV[2], 'frames', 0, 'text_bytes', 0, 'reason', '',
  'last_seq', first_seq, 'last_ms', first_ms, 'last_data', 0, 'token', ARGV[3],
  'start_seq', message[1], 'start_ms', message[2], 'first_seq', first_seq, 'first_ms', first_ms,
  'ended_ms', 0, 'error', '', 'dialect', ARGV[4], 'metadata', ARGV[5], 'answer', ARGV[6])
call('ZADD', runs, message[1], ARGV[1])
call('ZADD', open, message[1], ARGV[1])
apply_retention(frames, index, s)
renew(s, now, frames, meta, index, open, runs, string.sub(run, 1, #run - #ARGV[1]))
save_stream(meta, s)
if s.new then
  call('HSET', meta, 'max_frames', s.max_frames, 'max_bytes', s.max_bytes, 'retention_ms', s.retention_ms,
    'sealed', ARGV[12], 'metadata', '')
end
call('HSET', meta, 'latest_run', ARGV[1])
if s.retention_ms > 0 then
  -- those that were made just now, or may have been
  for _, key in ipairs({meta, open, runs, run}) do call('PEXPIREAT', key, expires_at(s)) end
end
call('PUBLISH', ARGV[7], cmsgpack.pack(message))
return {'ok', message[1], message[2], first_seq, first_ms}
