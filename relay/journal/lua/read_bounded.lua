-- Frames after a seq until a count or a sum of data bytes is reached; the frame that reaches it is part.
-- For streams with frames so large that a count alone does not bound a page.
-- KEYS: 1 frames  2 meta
-- ARGV: 1 seq read after  2 max_frames  3 max_bytes
-- Replies: {created, earliest, last_seq, last_ms, largest} and the entries, among them the one at the seq

local meta = redis.call('HMGET', KEYS[2], 'created', 'earliest', 'last_seq', 'last_ms', 'largest')
if not meta[1] then return {meta, {}} end
local after, frames_left, bytes_left = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local page, from = {}, string.format('%d-0', after)
if after > 0 then
  local anchor = redis.call('XRANGE', KEYS[1], from, string.format('%d-18446744073709551615', after))
  if anchor[1] then page[1] = anchor[1] end
  from = string.format('%d-0', after + 1)
end
while frames_left > 0 and bytes_left > 0 do
  local sure = math.max(4, math.floor(bytes_left / math.max(tonumber(meta[5]), 1)))
  local wanted = math.min(frames_left, sure, 256)
  local entries = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', wanted)
  for i = 1, #entries do
    if bytes_left <= 0 then break end
    page[#page + 1] = entries[i]
    bytes_left = bytes_left - #entries[i][2][6]
  end
  frames_left = frames_left - #entries
  if #entries < wanted then break end
  from = '(' .. entries[#entries][1]
end
return {meta, page}
