-- Put frames of one append, or of an opening, back under the ids they had.
-- KEYS: 1 frames  2 meta  3 index  4 open  5 runs  6 run  7 tombstone
-- ARGV: 1 run  2 channel  3 seq of the first frame  4 its ms  5 producer seq (0: an opening)  6 text bytes
--       7 opening  8 ending, its one error event under an empty dialect (or nothing)  9… event, data, …
-- Replies: {'ok', ms of the ending if they end the run} | {'rewound', last seq} | {'diverged', last seq}
--          | {'fenced'} | {'run_ended', status, reason}

local frames, meta, index, open, runs, run = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local name, first_seq, ms, producer_seq = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local given = (#ARGV - 8) / 2
local opening = cmsgpack.unpack(ARGV[7])

local s = load_stream(meta)
local r = s and load_run(run)
if r then
  local there = call('XRANGE', frames, ARGV[3] .. '-' .. ARGV[4], ARGV[3] .. '-' .. ARGV[4])[1]
  local covers = s.earliest > first_seq and r.last_seq >= first_seq  -- trimmed away since
  if covers or (there and there[2][2] == name and (given == 0 or there[2][6] == ARGV[10])) then
    return {'ok', 0}
  end
  if call('HGET', run, 'writer') ~= opening.writer then return {'fenced'} end
  if r.status ~= 'open' then return {'run_ended', r.status, r.reason} end
end

local now = clock_ms()
local former_ms = tonumber(call('GET', KEYS[7]) or -1)
if not r and former_ms >= ms then return {'run_ended', 'cancelled', 'stream_deleted'} end
local newest = call('XREVRANGE', frames, '+', '-', 'COUNT', 1)[1]
if not s then
  s = new_stream(now, KEYS[7], opening)
elseif s.last_seq > 0 and call('EXISTS', frames) == 0 then
  return {'rewound', 0}
elseif newest and tonumber(string.match(newest[1], '^%d+')) > s.last_seq then
  return {'diverged', s.last_seq}  -- by somebody else's hand
end
if s.last_seq == 0 then s.created, s.rarely_changed = math.min(s.created, ms), true end
if first_seq <= s.last_seq or (s.last_seq > 0 and ms < math.max(s.last_ms, s.created)) then
  return {'diverged', s.last_seq}
end
if first_seq > s.last_seq + 1 then return {'rewound', s.last_seq} end
if r then
  if producer_seq ~= r.frames + 1 then return {'diverged', s.last_seq} end
elseif producer_seq ~= 0 then
  -- Its opening stood before: it is not there, and nothing can be put there any more.
  return {'diverged', s.last_seq}
end

local message = {0, 0, 0}
for i = 9, #ARGV, 2 do say(message, name, ARGV[i], ARGV[i + 1]) end
local ending = ARGV[8] ~= '' and cmsgpack.unpack(ARGV[8])
if ending then
  r.frames, r.text_bytes = r.frames + given, r.text_bytes + tonumber(ARGV[6])
  say_ending(message, name, r, ending, ending[5][''])
end
local refusal = add_frames(frames, index, s, ms, message)
if refusal then return refusal end
if not r then
  if s.new then save_new_stream(meta, s) end
  new_run(s, meta, open, runs, run, name, opening, message[1], message[2], ms, given)
  if opening.seal then call('HSET', meta, 'sealed', 1) end
else
  if given > 0 then
    call('HINCRBY', run, 'frames', given)
    call('HINCRBY', run, 'text_bytes', ARGV[6])
    call('HSET', run, 'last_data', message[1] + given)
  end
  call('HSET', run, 'last_seq', s.last_seq, 'last_ms', ms, 'dialect', opening.dialect, 'answer', opening.answer)
  if ending then note_ending(message, open, name, r, ending, r.place - given) end
end
call('HSET', run, 'heard_ms', now)
apply_retention(frames, index, s)
renew(s, now, frames, meta, index, open, runs, string.sub(run, 1, #run - #name))
save_stream(meta, s)
expire_new(s, frames, meta, open, runs, run)
call('PUBLISH', ARGV[2], cmsgpack.pack(message))
return {'ok', ending and ms or 0}
