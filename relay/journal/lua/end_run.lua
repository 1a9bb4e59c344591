-- End a run whoever its writer is.
-- KEYS: 1 frames  2 meta  3 index  4 open  5 runs  6 run
-- ARGV: 1 stream  2 run  3 channel  4 prefix of owners' channels  5 ending  6 owner it must have (or empty)
-- Replies: {'ok', 1 if this ended it, status, reason, owner, text bytes, last seq, ended ms,
--           delivery}
--          | {'unknown_stream'} | {'unknown_run'}

local frames, meta, index, open, runs, run = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

local s = load_stream(meta)
if not s then return {'unknown_stream'} end
local r = load_run(run)
if not r then return {'unknown_run'} end
if r.status ~= 'open' or (ARGV[6] ~= '' and ARGV[6] ~= r.owner) then
  return {'ok', 0, r.status, r.reason, r.owner, r.text_bytes, r.last_seq, r.ended_ms, r.deliver}
end

local ending = cmsgpack.unpack(ARGV[5])
local message = {0, 0, 0}
say_ending(message, ARGV[2], r, ending, last_words(r, ending))
local now = clock_ms()
local refusal = add_frames(frames, index, s, now, message)
if refusal then return refusal end
note_ending(message, open, ARGV[2], r, ending, r.place)
apply_retention(frames, index, s)
renew(s, now, frames, meta, index, open, runs, string.sub(run, 1, #run - #ARGV[2]))
save_stream(meta, s)
call('PUBLISH', ARGV[3], cmsgpack.pack(message))
tell_owner(ARGV[4], r.owner, ARGV[1], ARGV[2])
return {'ok', 1, r.status, r.reason, r.owner, r.text_bytes, r.last_seq, r.ended_ms, r.deliver}
