-- Drop the frames before a seq.
-- KEYS: 1 frames  2 meta  3 index
-- ARGV: 1 seq of the first frame to keep
-- Replies: {'ok'} | {'unknown_stream'}

local s = load_stream(KEYS[2])
if not s then return {'unknown_stream'} end
local first = math.min(tonumber(ARGV[1]), s.last_seq + 1)
if first > s.earliest then
  drop_prefix(KEYS[1], KEYS[3], s, first, 0, s.last_seq)
  save_stream(KEYS[2], s)
end
return {'ok'}
