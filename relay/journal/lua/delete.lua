-- Remove a stream; what stays for a day is the last ms, which the next life of the stream must exceed. Its
-- open runs end: that is told, but not written, because nothing of it stays.
-- KEYS: 1 frames  2 meta  3 index  4 open  5 runs  6 undelivered  7 tombstone
-- ARGV: 1 stream  2 channel  3 prefix of owners' channels  4 prefix of run keys  5 ending of open runs
--       6 how long the tombstone stays, in ms
-- Replies: {run, token, owner of an open one (or empty), 1 for an open one, run, token, …}

local s = load_stream(KEYS[2])
if not s then return {} end
local reply, message = {}, {s.last_seq, s.last_ms, math.max(clock_ms(), s.last_ms, s.created)}
local ending = cmsgpack.unpack(ARGV[5])
for _, name in ipairs(call('ZRANGE', KEYS[5], 0, -1)) do
  local r = load_run(ARGV[4] .. name)
  if r then
    reply[#reply + 1], reply[#reply + 2] = name, call('HGET', r.key, 'token')
    reply[#reply + 1] = r.status == 'open' and r.owner or ''
    reply[#reply + 1] = r.status == 'open' and 1 or 0
    if r.status == 'open' then
      say_ending(message, name, r, ending, last_words(r, ending))
      tell_owner(ARGV[3], r.owner, ARGV[1], name)
    end
    call('UNLINK', r.key)
  end
end
call('UNLINK', KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6])
if message[4] then
  call('PUBLISH', ARGV[2], cmsgpack.pack(message))
  s.last_ms = message[3]
end
call('SET', KEYS[7], math.max(s.last_ms, s.created), 'PX', ARGV[6])
call('PUBLISH', ARGV[2], '')
return reply
