-- Create a stream without frames, or change the one there is.
-- KEYS: 1 frames  2 meta  3 index  4 open  5 runs  6 tombstone
-- ARGV: 1 max_frames  2 max_bytes  3 retention_ms, each empty to leave it  4 metadata  5 1 to set the metadata
--       6 bounds of a new stream  7 prefix of run keys
-- Replies: {1 if it was created, retention_ms}, and when that has changed run, token, run, token, …

local frames, meta, index, open, runs = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]

local now = clock_ms()
local s = load_stream(meta)
local created = s == nil
if created then s = new_stream(now, KEYS[6], cmsgpack.unpack(ARGV[6])) end
local former_retention_ms = s.retention_ms
s.max_frames = tonumber(ARGV[1]) or s.max_frames
s.max_bytes = tonumber(ARGV[2]) or s.max_bytes
s.retention_ms = tonumber(ARGV[3]) or s.retention_ms
if created then
  save_new_stream(meta, s)
else
  call('HSET', meta, 'max_frames', s.max_frames, 'max_bytes', s.max_bytes, 'retention_ms', s.retention_ms)
end
if ARGV[5] == '1' then call('HSET', meta, 'metadata', ARGV[4]) end
apply_retention(frames, index, s)
local reply = {created and 1 or 0, s.retention_ms}
if created or s.retention_ms ~= former_retention_ms then
  s.renewed = 0
  renew(s, now, frames, meta, index, open, runs, ARGV[7])
  local forever = s.retention_ms == 0
  if forever then
    for _, key in ipairs({frames, meta, index, open, runs, string.sub(meta, 1, -5) .. 'undelivered'}) do
      call('PERSIST', key)
    end
  end
  for _, name in ipairs(call('ZRANGE', runs, 0, -1)) do
    if forever then call('PERSIST', ARGV[7] .. name) end
    reply[#reply + 1] = name
    reply[#reply + 1] = call('HGET', ARGV[7] .. name, 'token')
  end
end
save_stream(meta, s)
return reply
