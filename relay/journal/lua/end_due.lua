-- End a run without an owner if it was silent for too long, or is too old.
-- KEYS: 1 frames  2 meta  3 index  4 open  5 runs  6 run
-- ARGV: 1 stream  2 run  3 channel  4 prefix of owners' channels  5 when the journal became reachable, in ms
--       6 ending of a silent run  7 ending of an old one  8 after how many ms one that is never due is looked at
-- Replies: {'ended', 1 if this ended it, status, reason, owner, text bytes, last seq, ended ms,
--           delivery}
--          | {'due_at', ms} | {'owned'} | {'unknown'}

local frames, meta, index, open, runs, run = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

local s = load_stream(meta)
local r = s and load_run(run)
if not r then return {'unknown'} end
if r.status ~= 'open' then
  return {'ended', 0, r.status, r.reason, r.owner, r.text_bytes, r.last_seq, r.ended_ms, r.deliver}
end
if r.owner ~= '' then return {'owned'} end

local now = clock_ms()
local life = call('HMGET', run, 'idle_ms', 'max_run_ms', 'first_ms', 'heard_ms', 'last_ms')
local idle_ms, max_run_ms = tonumber(life[1]), tonumber(life[2])
local silent_at, old_at = math.huge, math.huge
if idle_ms > 0 then
  silent_at = math.max(tonumber(life[4]), tonumber(life[5]), tonumber(ARGV[5])) + idle_ms
end
if max_run_ms > 0 then old_at = tonumber(life[3]) + max_run_ms end
local ending
if silent_at <= now then
  ending = cmsgpack.unpack(ARGV[6])
elseif old_at <= now then
  ending = cmsgpack.unpack(ARGV[7])
else
  return {'due_at', math.min(silent_at, old_at, now + tonumber(ARGV[8]))}
end

local message = {0, 0, 0}
say_ending(message, ARGV[2], r, ending, last_words(r, ending))
local refusal = add_frames(frames, index, s, now, message)
if refusal then return refusal end
note_ending(message, open, ARGV[2], r, ending, r.place)
apply_retention(frames, index, s)
renew(s, now, frames, meta, index, open, runs, string.sub(run, 1, #run - #ARGV[2]))
save_stream(meta, s)
call('PUBLISH', ARGV[3], cmsgpack.pack(message))
return {'ended', 1, r.status, r.reason, '', r.text_bytes, r.last_seq, r.ended_ms, r.deliver}
